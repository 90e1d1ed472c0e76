"""What an applied profile looks like now: helpers, processes, queues, expectations, and what differs from then."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.engine.counters import Snapshot
from orchestrator.model import HELPER_PROGRAM, Backend, HelperKey, ProcessSpec, Queueing, Registration, RuleQueue
from orchestrator.ports import System
from orchestrator.state import Action, Applied, HelperSummary, Observed, Owner, Plan

_HUNG_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class QueueStatus:
    queue_num: int
    is_bound: bool
    waiting: int
    dropped: int


@dataclass(frozen=True, slots=True)
class HelperStatus:
    """One helper of an applied profile; `expectations` are those that exist now, `queueing` is empty in the kernel.

    `counters` are those of a native helper process, None without one. `hung_s` is for how long it has not touched the
    packets that wait, 0 if it works. `last_words` is how a dead process ended.
    """

    name: str
    engine: str
    queueing: str
    registrations: tuple[tuple[HelperKey, str], ...]
    queues: tuple[QueueStatus, ...]
    expectations: int
    pid: int
    since_s: float
    last_words: str
    counters: Snapshot | None = None
    hung_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ProfileStatus:
    """An applied profile; `drift` has a line for everything that is not as it was applied."""

    owner: Owner
    source: str
    backend: Backend
    applied_at: float
    helpers: tuple[HelperStatus, ...]
    drift: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HostStatus:
    """All profiles, those that only their rules or processes tell of (`unknown`), and transactions nobody finished.

    `working` tells that an orch is at work right now: what is shown may be half of something.
    """

    profiles: tuple[ProfileStatus, ...]
    unknown: tuple[Owner, ...]
    unsettled: tuple[str, ...]
    working: bool = False


def lost_profile(applied: Applied, reason: str) -> ProfileStatus:
    """The status of a profile whose namespace cannot be looked into."""
    drift = (f"netns {applied.owner.netns}: {reason}",)
    backend = applied.target.rules.backend
    return ProfileStatus(applied.owner, applied.source, backend, applied.applied_at, (), drift)


def profile_status(applied: Applied, observed: Observed, plan: Plan, system: System) -> ProfileStatus:
    """`plan` is what would make the system as it was applied: its changes are the drift."""
    drift = [f"{c.subject}: {_drift_text(c.detail, c.reason, c.action)}" for c in plan.changes]
    drift += [refusal.what for refusal in plan.refusals]
    expectations = dict(system.host.expectations(applied.owner.netns))
    helpers = tuple(_helper_status(h, applied, observed, expectations, system) for h in applied.helpers)
    backend = applied.target.rules.backend
    return ProfileStatus(applied.owner, applied.source, backend, applied.applied_at, helpers, tuple(drift))


def _helper_status(
    helper: HelperSummary, applied: Applied, observed: Observed, expectations: dict[str, int], system: System
) -> HelperStatus:
    live = {r.key: r for r in observed.registrations}
    wanted = {r.key: r for r in applied.target.registrations}
    keys = [key for key in helper.keys if key in wanted]
    rule_queue = next((q for q in applied.target.rule_queues if q.helper == helper.name), None)
    spec = _process_of(helper, applied.target.processes)
    process = next((p for p in observed.processes if spec and p.name == spec.name), None)
    queues = _queues(_queue_nums([wanted[key] for key in keys], rule_queue), observed)
    at = (applied.owner.profile, applied.owner.netns, spec.name if spec else "")
    is_native = spec is not None and spec.argv[0] == HELPER_PROGRAM
    # Read after the queues: a process that was idle has touched its page by now if a packet was waiting then.
    counters = system.processes.counters(*at) if is_native and process else None
    return HelperStatus(
        name=helper.name,
        engine=helper.engine,
        queueing=(Queueing.RULES if rule_queue else Queueing.REGISTRATION) if keys else "",
        registrations=tuple((key, str(live[key].status) if key in live else "missing") for key in keys),
        queues=queues,
        expectations=sum(expectations.get(name, 0) for name in {key.name for key in helper.keys}),
        pid=process.pid if process else 0,
        since_s=process.since_s if process else 0.0,
        last_words=system.processes.last_words(*at) if spec and not process else "",
        counters=counters,
        hung_s=_hung_s(counters, queues, system.clock.monotonic()) if counters else 0.0,
    )


def _process_of(helper: HelperSummary, processes: tuple[ProcessSpec, ...]) -> ProcessSpec | None:
    """A native helper has a process of its own name; others share one that serves their registrations."""
    for spec in processes:
        is_own = spec.argv[0] == HELPER_PROGRAM and spec.name == helper.name
        if is_own or set(helper.keys) & set(spec.keys):
            return spec
    return None


def _hung_s(counters: Snapshot, queues: tuple[QueueStatus, ...], now_s: float) -> float:
    silent_s = now_s - counters.beat_ns / 1e9
    return silent_s if silent_s > _HUNG_AFTER_S and any(queue.waiting for queue in queues) else 0.0


def _queue_nums(registrations: list[Registration], rule_queue: RuleQueue | None) -> list[int]:
    """With queueing by rules the registration's number is a name that nobody listens on."""
    return list(rule_queue.queues) if rule_queue else sorted({r.queue_num for r in registrations})


def _queues(numbers: list[int], observed: Observed) -> tuple[QueueStatus, ...]:
    rows = {q.queue_num: q for q in observed.queues}
    return tuple(
        QueueStatus(
            queue_num=number,
            is_bound=number in rows,
            waiting=rows[number].waiting if number in rows else 0,
            dropped=rows[number].queue_dropped + rows[number].user_dropped if number in rows else 0,
        )
        for number in numbers
    )


def _drift_text(detail: str, reason: str, action: Action) -> str:
    state = {Action.CREATE: "missing", Action.DELETE: "should not be there"}.get(action, "")
    return ": ".join(part for part in (state, reason or detail) if part)
