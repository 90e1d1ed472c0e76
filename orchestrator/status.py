"""What an applied profile looks like now: helpers, processes, queues, expectations, and what differs from then."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.model import Backend, HelperKey, Registration
from orchestrator.ports import System
from orchestrator.state import Action, Applied, HelperSummary, Observed, Owner, Plan


@dataclass(frozen=True, slots=True)
class QueueStatus:
    queue_num: int
    is_bound: bool
    waiting: int
    dropped: int


@dataclass(frozen=True, slots=True)
class HelperStatus:
    """One helper of an applied profile; `expectations` are those that exist now, `queueing` is empty in the kernel."""

    name: str
    engine: str
    queueing: str
    registrations: tuple[tuple[HelperKey, str], ...]
    queues: tuple[QueueStatus, ...]
    expectations: int
    pid: int
    since_s: float
    last_words: str


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
    """All profiles, rules of ours that the ledger does not know, and transactions that nobody finished.

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
    spec = next((s for s in applied.target.processes if set(keys) & set(s.keys)), None)
    process = next((p for p in observed.processes if spec and p.name == spec.name), None)
    is_dead = spec is not None and process is None
    owner = applied.owner
    return HelperStatus(
        name=helper.name,
        engine=helper.engine,
        queueing="registration" if keys else "",
        registrations=tuple((key, str(live[key].status) if key in live else "missing") for key in keys),
        queues=_queues([wanted[key] for key in keys], observed),
        expectations=sum(expectations.get(name, 0) for name in {key.name for key in helper.keys}),
        pid=process.pid if process else 0,
        since_s=process.since_s if process else 0.0,
        last_words=system.processes.last_words(owner.profile, owner.netns, spec.name) if spec and is_dead else "",
    )


def _queues(registrations: list[Registration], observed: Observed) -> tuple[QueueStatus, ...]:
    rows = {q.queue_num: q for q in observed.queues}
    numbers = sorted({r.queue_num for r in registrations})
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
