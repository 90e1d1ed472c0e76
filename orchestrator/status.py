"""What an applied profile looks like now: helpers, processes, queues, expectations, and what differs from then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.engine.counters import Snapshot
from orchestrator.model import (
    HELPER_PROGRAM,
    Backend,
    HelperKey,
    ProcessSpec,
    Queueing,
    QueueRow,
    Registration,
    RuleQueue,
)
from orchestrator.ports import Lifetimes, ProcessSeen, ProcessState, Supervised, System
from orchestrator.state import Action, Applied, HelperSummary, Observed, Owner, Plan, Unsettled

_HUNG_AFTER_S = 2.0


class HelperState(StrEnum):
    """Those of a supervisor, and what is seen without one: `unsupervised` runs, but nobody would start it again."""

    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    FATAL = "fatal"
    HUNG = "hung"
    UNSUPERVISED = "unsupervised"
    NO_PROCESS = "no process"
    IN_KERNEL = "in kernel"

    @property
    def is_well(self) -> bool:
        return self in (HelperState.RUNNING, HelperState.IN_KERNEL)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the status of helpers is made of: the registrations of the host, and the rest from the profile's namespace.

    `processes` and `supervised` are those of the profile. `connections` is None where nobody counted them.
    """

    registrations: tuple[Registration, ...]
    processes: tuple[ProcessSeen, ...]
    queues: tuple[QueueRow, ...]
    expectations: Mapping[str, int]
    connections: Mapping[str, int] | None
    supervised: tuple[Supervised, ...]
    lifetimes: Mapping[str, Lifetimes]


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
    packets that wait, 0 if it works. `last_words` is how a dead process ended. `since_s` is the age of the process,
    `state_since` when its supervisor saw it come into its state, in seconds of the wall clock (0: nobody saw).
    `connections` are those that have the helper now, None where nobody counted; `restarts` and `lifetimes` are None
    without a supervisor.
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
    state: HelperState
    counters: Snapshot | None = None
    hung_s: float = 0.0
    connections: int | None = None
    restarts: int | None = None
    reason: str = ""
    state_since: float = 0.0
    lifetimes: Lifetimes | None = None

    @property
    def last_error(self) -> str:
        """Why it does not run or how it ended last; what a native helper refused or what went wrong there last."""
        gone = self.reason or self.last_words
        note = self.counters.note if self.counters else ""
        return (note or gone) if self.state.is_well else (gone or note)


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is applied waits for its confirmation for another `left_s`, below 0 when that is over.

    `is_watched` tells that somebody is there who undoes it then; else the next command that writes does.
    """

    left_s: float
    is_watched: bool

    @property
    def is_overdue(self) -> bool:
        return self.left_s <= 0


@dataclass(frozen=True, slots=True)
class ProfileStatus:
    """An applied profile; `drift` has a line for everything that is not as it was applied.

    `trial` is None unless it has to be confirmed. `mending` is why watching does not mend it,
    empty if it does or nobody watches.
    """

    owner: Owner
    source: str
    backend: Backend
    applied_at: float
    helpers: tuple[HelperStatus, ...]
    drift: tuple[str, ...]
    trial: Waiting | None = None
    mending: str = ""


@dataclass(frozen=True, slots=True)
class HostStatus:
    """All profiles, those that only their rules or processes tell of (`unknown`), and transactions nobody finished.

    `working` tells that an orch is at work right now: what is shown may be half of something.
    """

    profiles: tuple[ProfileStatus, ...]
    unknown: tuple[Owner, ...]
    unsettled: tuple[Unsettled, ...]
    working: bool = False

    @property
    def is_right(self) -> bool:
        """Nothing is other than it was applied, and every helper works."""
        helpers = [helper for profile in self.profiles for helper in profile.helpers]
        is_as_applied = not (self.unknown or self.unsettled or any(profile.drift for profile in self.profiles))
        trials = [profile.trial for profile in self.profiles if profile.trial]
        is_guarded = all(trial.is_watched and not trial.is_overdue for trial in trials)
        return is_as_applied and is_guarded and all(helper.state.is_well for helper in helpers)


def lost_profile(applied: Applied, reason: str) -> ProfileStatus:
    """The status of a profile whose namespace cannot be looked into."""
    drift = (f"netns {applied.owner.netns}: {reason}",)
    backend = applied.target.rules.backend
    return ProfileStatus(applied.owner, applied.source, backend, applied.applied_at, (), drift)


def profile_status(
    applied: Applied, observed: Observed, plan: Plan, system: System, connections: Mapping[str, int] | None
) -> ProfileStatus:
    """`plan` is what would make the system as it was applied: its changes are the drift."""
    drift = [f"{c.subject}: {_drift_text(c.detail, c.reason, c.action)}" for c in plan.changes]
    drift += [*(refusal.what for refusal in plan.refusals), *plan.waiting]
    profile, netns = applied.owner.profile, applied.owner.netns
    seen = Seen(
        registrations=observed.registrations,
        processes=observed.processes,
        queues=observed.queues,
        expectations=system.host.expectations(netns),
        connections=connections,
        supervised=system.processes.supervised(profile, netns),
        lifetimes=system.processes.lifetimes(profile, netns),
    )
    helpers = helper_statuses(applied, seen, system)
    backend = applied.target.rules.backend
    return ProfileStatus(applied.owner, applied.source, backend, applied.applied_at, helpers, tuple(drift))


def helper_statuses(applied: Applied, seen: Seen, system: System) -> tuple[HelperStatus, ...]:
    """Every helper of an applied profile; only counters and last words are looked up, for each that has a process."""
    return tuple(_helper_status(helper, applied, seen, system) for helper in applied.helpers)


def _helper_status(helper: HelperSummary, applied: Applied, seen: Seen, system: System) -> HelperStatus:
    live = {r.key: r for r in seen.registrations}
    wanted = {r.key: r for r in applied.target.registrations}
    keys = [key for key in helper.keys if key in wanted]
    names = {key.name for key in helper.keys}
    rule_queue = next((q for q in applied.target.rule_queues if q.helper == helper.name), None)
    spec = process_of(helper, applied.target.processes)
    process = next((p for p in seen.processes if spec and p.name == spec.name and p.pid), None)
    supervised = next((s for s in seen.supervised if spec and s.name == spec.name), None)
    queues = _queues(_queue_nums([wanted[key] for key in keys], rule_queue), seen.queues)
    at = (applied.owner.profile, applied.owner.netns, spec.name if spec else "")
    is_native = spec is not None and spec.argv[0] == HELPER_PROGRAM
    # Read after the queues: a process that was idle has touched its page by now if a packet was waiting then.
    counters = system.processes.counters(*at) if is_native and process else None
    hung_s = _hung_s(counters, queues, system.clock.monotonic()) if counters else 0.0
    return HelperStatus(
        name=helper.name,
        engine=helper.engine,
        queueing=(Queueing.RULES if rule_queue else Queueing.REGISTRATION) if keys else "",
        registrations=tuple((key, str(live[key].status) if key in live else "missing") for key in keys),
        queues=queues,
        expectations=sum(seen.expectations.get(name, 0) for name in names),
        pid=process.pid if process else 0,
        since_s=process.since_s if process else 0.0,
        last_words=system.processes.last_words(*at) if spec and not process else "",
        state=_state(process, supervised, hung_s=hung_s) if spec else HelperState.IN_KERNEL,
        counters=counters,
        hung_s=hung_s,
        connections=None if seen.connections is None else sum(seen.connections.get(name, 0) for name in names),
        restarts=supervised.restarts if supervised else None,
        reason=supervised.reason if supervised else "",
        state_since=supervised.since if supervised else 0.0,
        lifetimes=_added(seen.lifetimes, names) if supervised else None,
    )


def _state(process: ProcessSeen | None, supervised: Supervised | None, *, hung_s: float) -> HelperState:
    if supervised and supervised.state is not ProcessState.RUNNING:
        return HelperState(supervised.state)
    if process is None:
        return HelperState.NO_PROCESS
    if hung_s:
        return HelperState.HUNG
    return HelperState.RUNNING if process.watched else HelperState.UNSUPERVISED


def _added(lifetimes: Mapping[str, Lifetimes], names: set[str]) -> Lifetimes:
    found = [lifetimes[name] for name in names if name in lifetimes]
    return Lifetimes(
        made=sum(one.made for one in found),
        used=sum(one.used for one in found),
        expired=sum(one.expired for one in found),
        cancelled=sum(one.cancelled for one in found),
    )


def process_of(helper: HelperSummary, processes: tuple[ProcessSpec, ...]) -> ProcessSpec | None:
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


def _queues(numbers: list[int], live: tuple[QueueRow, ...]) -> tuple[QueueStatus, ...]:
    rows = {q.queue_num: q for q in live}
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
