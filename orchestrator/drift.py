"""Drift: what is not as it was applied is made so again, but never fought over.

Whoever looks for it may be another process every time (`orch watch`, or a child of a supervisor), so what was mended
lately is in the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.app import App
from orchestrator.errors import Interrupted, OrchError, RefusedError
from orchestrator.execute import EXPECTED
from orchestrator.journal import Ledger
from orchestrator.ports import ProcessState
from orchestrator.reports import PlanRefusedError
from orchestrator.state import Applied, Change, Mending, Owner, Plan, Repair, Scope

_PAUSE_S = 0.5
_AGAIN_S = 0.5
_TRIAL_AGAIN_S = 5.0
_AT_WORK = (ProcessState.STARTING, ProcessState.BACKOFF, ProcessState.STOPPING)


@dataclass(frozen=True, slots=True)
class Limits:
    """Nothing is mended more often than `repairs` times within `within_s`; then it is left alone for `quiet_s`."""

    repairs: int = 5
    within_s: float = 60.0
    quiet_s: float = 600.0


class Outcome(StrEnum):
    """`waiting`: others are at work, or it was mended a moment ago. `given up`: it was mended too often."""

    RIGHT = "right"
    DIFFERS = "differs"
    MENDED = "mended"
    WAITING = "waiting"
    FAILED = "failed"
    GIVEN_UP = "given up"


@dataclass(frozen=True, slots=True)
class MendReport:
    """What became of one profile. `reason` is why it is not mended; `is_news` is false for what was said before.

    `again_in_s` is when to look again, 0 for at leisure.
    """

    owner: Owner
    outcome: Outcome
    changes: tuple[Change, ...] = ()
    reason: str = ""
    is_news: bool = True
    again_in_s: float = 0.0


def wait_s(mending: Mending, subjects: Iterable[str], now_s: float, limits: Limits) -> float | None:
    """How long what has drifted must wait: not at all the first time, then ever longer; None if it is fought over."""
    wanted = set(subjects)
    recent = [r for r in mending.repairs if r.subject in wanted and now_s - r.at < limits.within_s]
    often = max(Counter(repair.subject for repair in recent).values(), default=0)
    if not often:
        return 0.0
    if often >= limits.repairs:
        return None
    pause_s: float = min(_PAUSE_S * 2 ** (often - 1), limits.within_s / limits.repairs)
    return max(0.0, max(repair.at for repair in recent) + pause_s - now_s)


def mend(app: App, owner: Owner, limits: Limits, *, is_dry_run: bool = False) -> MendReport:
    """Make one profile as it was applied, if it is not. Who is at work is waited for, and so is a confirmation.

    Nothing is done that cuts live connections, which only a person may want. Of what orch expects to happen it raises
    Interrupted alone.
    """
    try:
        with app.reading() as ledger:
            report = _first_look(app, ledger, owner, is_dry_run=is_dry_run)
        if report is not None:
            return report
        with app.settled(f"watch {owner.profile}") as ledger:
            return _mend(app, ledger, owner, limits)
    except Interrupted:
        raise
    except RefusedError as error:  # another orch is at work for longer than we waited
        return MendReport(owner, Outcome.WAITING, reason=_say(error), again_in_s=_AGAIN_S)
    except EXPECTED as error:
        return MendReport(owner, Outcome.FAILED, reason=_say(error))


def _first_look(app: App, ledger: Ledger, owner: Owner, *, is_dry_run: bool) -> MendReport | None:
    """None if there is something to do that needs the lock; this look takes none, and changes nothing."""
    applied = ledger.find(owner)
    if applied is None:
        return MendReport(owner, Outcome.RIGHT)
    plan = app.plan(ledger, owner, applied.target)[1]
    mending = ledger.mending(owner)
    is_right = plan.is_empty and not plan.refusals
    if is_dry_run:
        return MendReport(owner, Outcome.RIGHT if is_right else Outcome.DIFFERS, plan.changes, _refused(plan))
    if is_right and not mending.trouble and not ledger.unsettled():
        return MendReport(owner, Outcome.RIGHT)
    if is_right:
        return None
    if app.system.clock.monotonic() < mending.held_until:
        return MendReport(owner, Outcome.GIVEN_UP, plan.changes, mending.trouble, is_news=False)
    if _is_on_trial(ledger, owner):
        reason = "it has to be confirmed first"
        return MendReport(owner, Outcome.WAITING, plan.changes, reason, again_in_s=_TRIAL_AGAIN_S)
    at_work = _at_work(app, applied, plan)
    return MendReport(owner, Outcome.WAITING, plan.changes, at_work, again_in_s=_AGAIN_S) if at_work else None


def _at_work(app: App, applied: Applied, plan: Plan) -> str:
    """Which supervisor makes this right without us, in words; empty if none does."""
    owner = applied.owner
    if any(change.scope not in (Scope.PROCESS, Scope.HOST) for change in plan.changes):
        return ""
    told = app.system.processes.supervised(owner.profile, owner.netns)
    return next((f"{one.name} is {one.state}: {one.reason}".rstrip(": ") for one in told if one.state in _AT_WORK), "")


def _mend(app: App, ledger: Ledger, owner: Owner, limits: Limits) -> MendReport:
    applied = ledger.find(owner)
    if applied is None or _is_on_trial(ledger, owner):
        return MendReport(owner, Outcome.RIGHT)
    plan = app.plan(ledger, owner, applied.target)[1]
    mending = ledger.mending(owner)
    if plan.is_empty and not plan.refusals:
        _remember(ledger, owner, replace(mending, trouble=""))
        return MendReport(owner, Outcome.RIGHT)
    now_s = app.system.clock.monotonic()
    subjects = [change.subject for change in plan.changes]
    pause_s = wait_s(mending, subjects, now_s, limits)
    if pause_s is None:
        return _give_up(ledger, owner, plan, _held(mending, subjects, now_s, limits))
    if pause_s:
        return MendReport(owner, Outcome.WAITING, plan.changes, "it was mended a moment ago", again_in_s=pause_s)
    recent = tuple(r for r in mending.repairs if now_s - r.at < limits.within_s)
    if not plan.refusals:
        mending = replace(mending, repairs=(*recent, *(Repair(subject, now_s) for subject in subjects)))
        _remember(ledger, owner, mending)
    trouble = _establish(app, ledger, applied)
    _remember(ledger, owner, replace(mending, trouble=trouble))
    if trouble:
        return MendReport(owner, Outcome.FAILED, plan.changes, trouble, is_news=trouble != mending.trouble)
    return MendReport(owner, Outcome.MENDED, plan.changes)


def _is_on_trial(ledger: Ledger, owner: Owner) -> bool:
    at = (owner.profile, owner.netns.identity)
    return any((pending.owner.profile, pending.owner.netns.identity) == at for pending in ledger.pending())


def _establish(app: App, ledger: Ledger, applied: Applied) -> str:
    """Make it true again; why it is not, if it is not."""
    try:
        report = app.establish(ledger, applied.wanted, ask=False)
    except Interrupted:
        raise
    except EXPECTED as error:
        return _say(error)
    cut = report.plan.cut
    return f"{cut} live connections would lose their helper: orch apply asks first" if report.declined else ""


def _held(mending: Mending, subjects: list[str], now_s: float, limits: Limits) -> Mending:
    often = Counter(r.subject for r in mending.repairs if now_s - r.at < limits.within_s)
    subject = max(subjects, key=lambda subject: often[subject])
    trouble = (
        f"{subject} was mended {often[subject]} times within {limits.within_s:g} s and changes again: "
        f"left alone for {limits.quiet_s / 60:g} min, or until orch apply"
    )
    return replace(mending, held_until=now_s + limits.quiet_s, trouble=trouble)


def _give_up(ledger: Ledger, owner: Owner, plan: Plan, mending: Mending) -> MendReport:
    _remember(ledger, owner, mending)
    return MendReport(owner, Outcome.GIVEN_UP, plan.changes, mending.trouble)


def _remember(ledger: Ledger, owner: Owner, mending: Mending) -> None:
    if ledger.mending(owner) != mending:
        ledger.remember_mending(owner, mending)


def _refused(plan: Plan) -> str:
    return "; ".join(refusal.what for refusal in plan.refusals)


def _say(error: Exception) -> str:
    """All refusals of a plan, else what went wrong and where."""
    if isinstance(error, PlanRefusedError):
        return "; ".join(refusal.what for refusal in error.refusals)
    if isinstance(error, OrchError):
        return ": ".join(part for part in (error.where, error.what) if part)
    return str(error)
