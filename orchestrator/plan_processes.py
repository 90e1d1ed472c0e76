"""What happens to each helper process: started, restarted, stopped, or given a new supervisor."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.model import HELPER_PROGRAM, ProcessSpec
from orchestrator.plan_standin import StandIn
from orchestrator.ports import Launch, ProcessSeen
from orchestrator.state import Action, Change, Observed, Refusal, Scope, SucceedProcess

_UNINSPECTED = "nothing is inspected meanwhile"


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """`succeed` take over from those that run. `stop_first` are in the way of those that start: they start again, or
    hold a queue that another one needs.
    """

    succeed: tuple[SucceedProcess, ...]
    start: tuple[Launch, ...]
    stop_first: tuple[ProcessSeen, ...]
    stop_last: tuple[ProcessSeen, ...]
    watch: tuple[tuple[Launch, ProcessSeen], ...]
    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]

    @property
    def stop(self) -> tuple[ProcessSeen, ...]:
        return (*self.stop_first, *self.stop_last)


def plan_processes(launches: tuple[Launch, ...], observed: Observed, stand_in: StandIn | None) -> ProcessPlan:
    running = {p.name: p for p in observed.processes}
    succeed: list[SucceedProcess] = []
    start: list[Launch] = []
    restart: list[ProcessSeen] = []
    waiting: list[Launch] = []
    watch: list[tuple[Launch, ProcessSeen]] = []
    changes: list[Change] = []
    for launch in launches:
        seen = running.pop(launch.spec.name, None)
        queues = "queue " + ", ".join(map(str, launch.spec.queues))
        if seen is None:
            start.append(launch)
            changes.append(Change(Action.CREATE, Scope.PROCESS, launch.spec.name, queues))
            continue
        reason = _restart_reason(launch, seen, observed)
        if _hands_over(launch, seen, launches, observed):
            succeed.append(SucceedProcess(None, launch, seen))
            changes.append(Change(Action.UPDATE, Scope.PROCESS, launch.spec.name, f"hand over, {queues}", reason))
        elif reason:
            restart.append(seen)
            start.append(launch)
            is_stood_in = stand_in is not None and stand_in.name == launch.spec.name
            how, effect = ("replace behind a stand-in", "") if is_stood_in else ("restart", _UNINSPECTED)
            changes.append(Change(Action.UPDATE, Scope.PROCESS, launch.spec.name, f"{how}, {queues}", reason, effect))
        elif not seen.pid:
            waiting.append(launch)  # and others listen on its queues
        elif not seen.watched:
            watch.append((launch, seen))
            changes.append(
                Change(Action.UPDATE, Scope.PROCESS, launch.spec.name, "watch again", reason="its supervisor is gone")
            )
    surplus = tuple(running.values())
    changes += [Change(Action.DELETE, Scope.PROCESS, seen.name, seen.place) for seen in surplus]
    needed = {queue for launch in start for queue in launch.spec.queues}
    in_the_way = tuple(seen for seen in surplus if needed & held_queues(observed, (seen,)))
    freed = held_queues(observed, tuple(seen for seen in (*restart, *surplus) if seen.pid))
    handed = held_queues(observed, tuple(step.process for step in succeed))
    free = [*((launch, freed) for launch in (*start, *waiting)), *((step.after, freed | handed) for step in succeed)]
    return ProcessPlan(
        succeed=tuple(succeed),
        start=tuple(start),
        stop_first=(*restart, *in_the_way),
        stop_last=tuple(seen for seen in surplus if seen not in in_the_way),
        watch=tuple(watch),
        changes=tuple(changes),
        refusals=tuple(
            refusal for launch, queues_free in free for refusal in _refuse_start(launch, observed, freed=queues_free)
        ),
    )


def _restart_reason(launch: Launch, seen: ProcessSeen, observed: Observed) -> str:
    if seen.digest != launch.digest:
        return _change_reason(launch, observed)
    missing = sorted(set(launch.spec.queues) - {row.queue_num for row in observed.queues if row.is_ready})
    if missing:
        return f"it does not listen on queue {', '.join(map(str, missing))}"
    return ""


def _hands_over(launch: Launch, seen: ProcessSeen, launches: tuple[Launch, ...], observed: Observed) -> bool:
    """Whether one that runs and must change can hand over its queues, and its successor listen on new ones besides.

    It cannot where packets come in another way than before, or where it needs a queue of another process, or that one
    of its own.
    """
    before = _applied_spec(observed, launch.spec.name)
    if seen.digest == launch.digest or not seen.hands_over or before is None:
        return False
    is_native = before.argv[0] == launch.spec.argv[0] == HELPER_PROGRAM
    if not is_native or bool(before.enables) != bool(launch.spec.enables):
        return False
    bound = {row.queue_num for row in observed.queues if row.is_ready}
    others = tuple(p for p in observed.processes if p.name != seen.name)
    wanted = {number for other in launches if other.spec.name != seen.name for number in other.spec.queues}
    return (
        bound.issuperset(before.queues)
        and wanted.isdisjoint(before.queues)
        and held_queues(observed, others).isdisjoint(launch.spec.queues)
    )


def _change_reason(launch: Launch, observed: Observed) -> str:
    before = _applied_spec(observed, launch.spec.name)
    texts = {d.name: d.text for d in observed.applied.target.documents} if observed.applied else {}
    is_same = before == launch.spec and all(texts.get(name) == text for name, text in launch.files.items())
    return "its program changes" if is_same else "its configuration changes"


def _applied_spec(observed: Observed, name: str) -> ProcessSpec | None:
    """How the ledger says that a process was started."""
    specs = observed.applied.target.processes if observed.applied else ()
    return next((spec for spec in specs if spec.name == name), None)


def surplus_queues(step: SucceedProcess, observed: Observed) -> tuple[int, ...]:
    """Queues of a process that its successor needs no more."""
    before = _applied_spec(observed, step.after.spec.name)
    return tuple(sorted(set(before.queues).difference(step.after.spec.queues))) if before else ()


def held_queues(observed: Observed, processes: tuple[ProcessSeen, ...]) -> set[int]:
    """Queues that running processes of ours are taken to hold: those that they were started for, by the ledger if it
    knows. The kernel does not tell: a queue that was handed over has the port id of its first process.
    """
    if observed.applied is None:
        return {number for process in processes for number in process.queues}
    names = {process.name for process in processes}
    return {number for spec in observed.applied.target.processes if spec.name in names for number in spec.queues}


def _refuse_start(launch: Launch, observed: Observed, *, freed: set[int]) -> list[Refusal]:
    refusals = [
        Refusal(
            f"queue {row.queue_num} is held by {observed.queue_holders.get(row.queue_num, f'port id {row.port_id}')}",
            hint="stop that, or give the helper another queue (queue:)",
            where=f"netns {observed.netns}",
        )
        for row in observed.queues
        if row.queue_num in launch.spec.queues and row.queue_num not in freed
    ]
    program = launch.spec.argv[0]
    if program in observed.missing_programs:
        refusals.append(Refusal(f"{program} is not installed", hint=f"apt-get install {program}, or engine: kernel"))
    return refusals
