"""What becomes of a helper process: started, ready, ended, restarted, given up.

Pure: it is told what happens, and says what to do. The supervisor does that, in this order, and tells it when a
deadline has passed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

FIRST_DELAY_S = 0.1
LAST_DELAY_S = 5.0
STOP_WITHIN_S = 5.0
"""How long a process may take to end after SIGTERM."""

HUNG = "hung: "
"""How the reason begins why one that does not work any more is ended."""

ABORT_WITHIN_S = 0.5
"""How long one that hangs may take to say where it is, after SIGABRT."""


class State(StrEnum):
    """The states of Supervisor (supervisord.org), with their meanings there."""

    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    FATAL = "fatal"


class Act(StrEnum):
    """What the supervisor does. ENABLE comes after HEARD only, and nothing is spawned after an end without DISABLE."""

    SPAWN = "spawn"
    DISABLE = "disable"
    HEARD = "heard"
    ENABLE = "enable"
    TERM = "term"
    ABORT = "abort"
    KILL = "kill"
    FORGET = "forget"


Acts = tuple[Act, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """At most `limit` restarts within `window_s` seconds; ready within `ready_within_s` of each start."""

    is_restarted: bool = True
    limit: int = 10
    window_s: float = 600.0
    ready_within_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Life:
    """One helper process, all its restarts included; `pid` is 0 while there is none. Times are of the monotonic clock.

    `restarts` are those that became ready. `recent` are the times of the attempts within the window. `reason` says why
    it ended last, or why it is about to be ended. `deadline` is when `passed` is to be called. `is_proven`: it was
    ready once. `is_leaving`: its end is wanted.
    """

    policy: Policy
    state: State
    pid: int = 0
    restarts: int = 0
    recent: tuple[float, ...] = ()
    reason: str = ""
    deadline: float | None = None
    is_proven: bool = False
    is_leaving: bool = False


def begin(policy: Policy, now: float) -> tuple[Life, Acts]:
    return Life(policy, State.STARTING, deadline=now + policy.ready_within_s), (Act.SPAWN,)


def adopt(policy: Policy, pid: int) -> Life:
    """A process that runs already."""
    return Life(policy, State.RUNNING, pid, is_proven=True)


def doubted(life: Life, now: float) -> Life:
    """It is not known whether one that runs is ready."""
    return replace(life, state=State.STARTING, deadline=now + life.policy.ready_within_s)


def counted(life: Life, *, restarts: int, reason: str) -> Life:
    """With what a supervisor before this one knew of it."""
    return replace(life, restarts=restarts, reason=reason)


def succeeded(life: Life, policy: Policy, pid: int) -> tuple[Life, Acts]:
    """Another process has taken over, and counts as started anew; the one before it may have been given up by then."""
    running = Life(policy, State.RUNNING, pid, is_proven=True)
    return running, () if life.state is State.RUNNING else (Act.HEARD, Act.ENABLE)


def orphaned(life: Life) -> tuple[Life, Acts]:
    """It has ended while another process takes over, which is not ready yet, and has a deadline of its own."""
    if life.state not in (State.RUNNING, State.STARTING):
        return life, ()
    return replace(life, state=State.STARTING, deadline=None), (Act.DISABLE,)


def give_up(policy: Policy, reason: str) -> Life:
    """A process that ended for good before anybody asked."""
    return Life(policy, State.FATAL, reason=reason, is_proven=True)


def spawned(life: Life, pid: int) -> Life:
    return replace(life, pid=pid)


def ready(life: Life) -> tuple[Life, Acts]:
    """It listens. Whoever started it enables its registrations; after a restart nobody else does."""
    if life.state is not State.STARTING:
        return life, ()
    running = replace(life, state=State.RUNNING, deadline=None, is_proven=True)
    if not life.is_proven:
        return running, (Act.HEARD,)
    return replace(running, restarts=life.restarts + 1), (Act.HEARD, Act.ENABLE)


def ended(life: Life, reason: str, now: float) -> tuple[Life, Acts]:
    """It is gone, or could not be started. A reason why it was ended goes before how it ended."""
    if life.is_leaving:
        return replace(life, pid=0, deadline=None), (Act.FORGET,)
    reason = life.reason if life.state is State.STOPPING else reason
    over = replace(life, pid=0, deadline=None, reason=reason)
    if not life.is_proven or not life.policy.is_restarted:
        return replace(over, state=State.FATAL), (Act.DISABLE,)
    recent = tuple(at for at in life.recent if at > now - life.policy.window_s)
    if len(recent) >= life.policy.limit:
        reason = f"restarted {len(recent)} times in {life.policy.window_s:g} s, the last time: {reason}"
        return replace(over, state=State.FATAL, recent=recent, reason=reason), (Act.DISABLE,)
    waiting = replace(over, state=State.BACKOFF, recent=recent)
    if not recent:
        starting, acts = _again(waiting, now)
        return starting, (Act.DISABLE, *acts)
    return replace(waiting, deadline=now + delay_s(len(recent))), (Act.DISABLE,)


def hung(life: Life, reason: str, now: float, *, can_tell: bool) -> tuple[Life, Acts]:
    """It does not work any more; `can_tell`: a signal would reach it."""
    if life.state not in (State.RUNNING, State.STARTING):
        return life, ()
    deadline = now + ABORT_WITHIN_S if can_tell else None
    return replace(life, state=State.STOPPING, reason=reason, deadline=deadline), (
        Act.DISABLE,
        Act.ABORT if can_tell else Act.KILL,
    )


def stop(life: Life, now: float) -> tuple[Life, Acts]:
    """Somebody wants it to end, who has seen to its registrations."""
    if not life.pid:
        return replace(life, deadline=None, is_leaving=True), (Act.FORGET,)
    leaving = replace(life, state=State.STOPPING, reason="", is_leaving=True, deadline=now + STOP_WITHIN_S)
    return leaving, (Act.TERM,)


def passed(life: Life, now: float) -> tuple[Life, Acts]:
    """Its deadline has passed."""
    match life.state:
        case State.STARTING:
            return hung(life, f"not ready within {life.policy.ready_within_s:g} s", now, can_tell=True)
        case State.BACKOFF:
            return _again(life, now)
        case State.STOPPING:
            return replace(life, deadline=None), (Act.KILL,)
        case _:
            return replace(life, deadline=None), ()


def because(life: Life, detail: str) -> Life:
    """With more of the reason."""
    return replace(life, reason=f"{life.reason}: {detail}") if detail else life


def delay_s(attempts: int) -> float:
    """How long to wait before the next restart after so many recent ones: not at all before the first."""
    return min(FIRST_DELAY_S * 2.0 ** min(attempts - 1, 10), LAST_DELAY_S) if attempts else 0.0


def _again(life: Life, now: float) -> tuple[Life, Acts]:
    deadline = now + life.policy.ready_within_s
    return replace(life, state=State.STARTING, recent=(*life.recent, now), deadline=deadline), (Act.SPAWN,)
