"""What happens to each helper process: started, restarted, stopped, or given a new supervisor."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.ports import Launch, ProcessSeen
from orchestrator.state import Action, Change, Observed, Refusal, Scope


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """`stop_first` are in the way of those that start: they start again, or hold a queue that another one needs."""

    start: tuple[Launch, ...]
    stop_first: tuple[ProcessSeen, ...]
    stop_last: tuple[ProcessSeen, ...]
    watch: tuple[tuple[Launch, ProcessSeen], ...]
    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]

    @property
    def stop(self) -> tuple[ProcessSeen, ...]:
        return (*self.stop_first, *self.stop_last)


def plan_processes(launches: tuple[Launch, ...], observed: Observed) -> ProcessPlan:
    running = {p.name: p for p in observed.processes}
    bound = {q.queue_num for q in observed.queues if q.is_ready}
    start: list[Launch] = []
    restart: list[ProcessSeen] = []
    watch: list[tuple[Launch, ProcessSeen]] = []
    changes: list[Change] = []
    for launch in launches:
        seen = running.pop(launch.spec.name, None)
        queues = "queue " + ", ".join(map(str, launch.spec.queues))
        if seen is None:
            start.append(launch)
            changes.append(Change(Action.CREATE, Scope.PROCESS, launch.spec.name, queues))
            continue
        reason = _restart_reason(launch, seen, bound)
        if reason:
            restart.append(seen)
            start.append(launch)
            changes.append(Change(Action.UPDATE, Scope.PROCESS, launch.spec.name, f"restart, {queues}", reason=reason))
        elif not seen.watched:
            watch.append((launch, seen))
            changes.append(
                Change(Action.UPDATE, Scope.PROCESS, launch.spec.name, "watch again", reason="its supervisor is gone")
            )
    surplus = tuple(running.values())
    changes += [Change(Action.DELETE, Scope.PROCESS, seen.name, seen.place) for seen in surplus]
    needed = {queue for launch in start for queue in launch.spec.queues}
    in_the_way = tuple(seen for seen in surplus if needed & held_queues(observed, (seen,)))
    freed = held_queues(observed, (*restart, *surplus))
    return ProcessPlan(
        start=tuple(start),
        stop_first=(*restart, *in_the_way),
        stop_last=tuple(seen for seen in surplus if seen not in in_the_way),
        watch=tuple(watch),
        changes=tuple(changes),
        refusals=tuple(refusal for launch in start for refusal in _refuse_start(launch, observed, freed=freed)),
    )


def _restart_reason(launch: Launch, seen: ProcessSeen, bound: set[int]) -> str:
    if seen.digest != launch.digest:
        return "its configuration changes"
    missing = sorted(set(launch.spec.queues) - bound)
    if missing:
        return f"it does not listen on queue {', '.join(map(str, missing))}"
    return ""


def held_queues(observed: Observed, processes: tuple[ProcessSeen, ...]) -> set[int]:
    """Queues that running processes of ours are taken to hold: those that the ledger says they were started for."""
    if observed.applied is None:
        pids = {process.pid for process in processes}
        return {row.queue_num for row in observed.queues if row.port_id in pids}
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
