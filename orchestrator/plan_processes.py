"""What happens to each helper process: started, restarted, stopped, or given a new watcher."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.ports import Launch, ProcessSeen
from orchestrator.state import Action, Change, Observed, Refusal, Scope


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    start: tuple[Launch, ...]
    stop: tuple[tuple[ProcessSeen, str], ...]
    watch: tuple[tuple[Launch, ProcessSeen], ...]
    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]


def plan_processes(launches: tuple[Launch, ...], observed: Observed) -> ProcessPlan:
    running = {p.name: p for p in observed.processes}
    bound = {q.queue_num for q in observed.queues if q.is_ready}
    start: list[Launch] = []
    stop: list[tuple[ProcessSeen, str]] = []
    watch: list[tuple[Launch, ProcessSeen]] = []
    changes: list[Change] = []
    refusals: list[Refusal] = []
    for launch in launches:
        seen = running.pop(launch.spec.name, None)
        queues = "queue " + ", ".join(map(str, launch.spec.queues))
        if seen is None:
            start.append(launch)
            changes.append(Change(Action.CREATE, Scope.PROCESS, launch.spec.name, queues))
            refusals += _refuse_start(launch, observed, held=set())
            continue
        reason = _restart_reason(launch, seen, bound)
        if reason:
            stop.append((seen, reason))
            start.append(launch)
            changes.append(Change(Action.UPDATE, Scope.PROCESS, launch.spec.name, f"restart, {queues}", reason=reason))
            refusals += _refuse_start(launch, observed, held=_queues_of(seen, observed))
        elif not seen.watched:
            watch.append((launch, seen))
            changes.append(
                Change(Action.UPDATE, Scope.PROCESS, launch.spec.name, "watch again", reason="its watcher is gone")
            )
    for seen in running.values():
        stop.append((seen, "not in the profile"))
        changes.append(Change(Action.DELETE, Scope.PROCESS, seen.name, f"pid {seen.pid}"))
    return ProcessPlan(tuple(start), tuple(stop), tuple(watch), tuple(changes), tuple(refusals))


def _restart_reason(launch: Launch, seen: ProcessSeen, bound: set[int]) -> str:
    if seen.digest != launch.digest:
        return "its configuration changes"
    missing = sorted(set(launch.spec.queues) - bound)
    if missing:
        return f"it does not listen on queue {', '.join(map(str, missing))}"
    return ""


def _queues_of(seen: ProcessSeen, observed: Observed) -> set[int]:
    """Queues that a running process of ours is taken to hold: those that the ledger says it was started for."""
    applied = observed.applied
    if applied is None:
        return {q.queue_num for q in observed.queues if q.port_id == seen.pid}
    return {r.queue_num for r in applied.registrations}


def _refuse_start(launch: Launch, observed: Observed, *, held: set[int]) -> list[Refusal]:
    refusals = [
        Refusal(
            f"queue {row.queue_num} is held by {observed.queue_holders.get(row.queue_num, f'port id {row.port_id}')}",
            hint="stop that, or give the helper another queue (queue:)",
            where=f"netns {observed.netns}",
        )
        for row in observed.queues
        if row.queue_num in launch.spec.queues and row.queue_num not in held
    ]
    program = launch.spec.argv[0]
    if program in observed.missing_programs:
        refusals.append(Refusal(f"{program} is not installed", hint=f"apt-get install {program}, or engine: kernel"))
    return refusals
