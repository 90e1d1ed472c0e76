"""Drift: what is not as it was applied is made so again, but never fought over.

Whoever looks for it may be another process every time (`orch watch`, or a child of a supervisor), so what was mended
lately is in the ledger.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.app import App
from orchestrator.errors import Interrupted, OrchError, RefusedError, RollbackError
from orchestrator.execute import EXPECTED
from orchestrator.journal import Ledger
from orchestrator.ports import ProcessState
from orchestrator.reports import PlanRefusedError
from orchestrator.state import Applied, Change, Held, Mending, Owner, Plan, Repair, Scope

_PAUSE_S = 0.5
_AGAIN_S = 0.5
_TRIAL_AGAIN_S = 5.0
_GIVE_WAY_S = 0.1  # without the lock, which others try to get more often than that
_AT_WORK = (ProcessState.STARTING, ProcessState.BACKOFF, ProcessState.STOPPING)


@dataclass(frozen=True, slots=True)
class Limits:
    """Nothing is mended more often than `repairs` times within `within_s`; then it is left alone for `quiet_s`.

    What is mended besides is none of its concern: one thing that others fight over does not keep it from the rest.
    """

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

    `again_in_s` is when to look again, 0 for at leisure. With `is_partial` not all that has drifted was mended, and
    `changes` are what was; `reason` says why if something else was tried, and failed.
    """

    owner: Owner
    outcome: Outcome
    changes: tuple[Change, ...] = ()
    reason: str = ""
    is_news: bool = True
    again_in_s: float = 0.0
    is_partial: bool = False


def wait_s(mending: Mending, subject: str, now_s: float, limits: Limits) -> float | None:
    """How long what has drifted must wait: not at all the first time, then ever longer; None if it is fought over."""
    recent = [r.at for r in mending.repairs if r.subject == subject and now_s - r.at < limits.within_s]
    if not recent:
        return 0.0
    if len(recent) >= limits.repairs:
        return None
    pause_s: float = min(_PAUSE_S * 2 ** (len(recent) - 1), limits.within_s / limits.repairs)
    return max(0.0, max(recent) + pause_s - now_s)


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
        with app.settled(_command(owner), renewed=owner) as ledger:
            begun = _mend(app, ledger, owner, limits)
        return begun.go_on() if isinstance(begun, _Attempt) else begun
    except Interrupted:
        raise
    except RefusedError as error:  # another orch is at work for longer than we waited
        return MendReport(owner, Outcome.WAITING, reason=_say(error), again_in_s=_AGAIN_S)
    except EXPECTED as error:
        return MendReport(owner, Outcome.FAILED, reason=_say(error))


def _first_look(app: App, ledger: Ledger, owner: Owner, *, is_dry_run: bool) -> MendReport | None:
    """None if there is something to do that needs the lock; this look takes none, and changes nothing."""
    applied = _applied(ledger, owner)
    if applied is None:
        return MendReport(owner, Outcome.RIGHT)
    if not is_dry_run and app.is_remade(ledger, owner):
        return None
    plan = app.plan(ledger, owner, applied.target)[1]
    mending, now_s = ledger.mending(owner), app.system.clock.monotonic()
    is_right = _is_right(plan)
    if is_dry_run:
        outcome = Outcome.RIGHT if is_right and not plan.waiting else Outcome.DIFFERS
        return MendReport(owner, outcome, plan.changes, "; ".join(filter(None, (_refused(plan), *plan.waiting))))
    is_to_settle = bool(mending.failure or ledger.unsettled())
    if is_right:
        return None if is_to_settle else _right(owner, plan)
    if _is_on_trial(ledger, owner):
        reason = "it has to be confirmed first"
        return MendReport(owner, Outcome.WAITING, plan.changes, reason, again_in_s=_TRIAL_AGAIN_S)
    rest = _sparing(app, ledger, applied, plan, mending.held_at(now_s))
    if _is_right(rest):
        return None if is_to_settle else _left_alone(owner, plan, mending, now_s)
    at_work = _at_work(app, applied, rest)
    return MendReport(owner, Outcome.WAITING, plan.changes, at_work, again_in_s=_AGAIN_S) if at_work else None


def _applied(ledger: Ledger, owner: Owner) -> Applied | None:
    """What is applied, by the name that the namespace has now."""
    found = ledger.find(owner)
    return replace(found, owner=owner) if found else None


def _right(owner: Owner, plan: Plan) -> MendReport:
    """There is nothing to do, but perhaps for others."""
    return MendReport(owner, Outcome.WAITING if plan.waiting else Outcome.RIGHT, reason="; ".join(plan.waiting))


def _is_right(plan: Plan) -> bool:
    return plan.is_empty and not plan.refusals


def _sparing(app: App, ledger: Ledger, applied: Applied, plan: Plan, spared: frozenset[str]) -> Plan:
    """What of a plan is left when some of its subjects are."""
    if spared.isdisjoint(change.subject for change in plan.changes):
        return plan
    return app.plan(ledger, applied.owner, applied.target, spared)[1]


def _left_alone(owner: Owner, plan: Plan, mending: Mending, now_s: float) -> MendReport:
    reason = mending.trouble(now_s, _subjects(plan))
    return MendReport(owner, Outcome.GIVEN_UP, plan.changes, reason, is_news=False)


def _subjects(plan: Plan) -> tuple[str, ...]:
    """What a plan changes, each once."""
    return tuple(dict.fromkeys(change.subject for change in plan.changes))


def _at_work(app: App, applied: Applied, plan: Plan) -> str:
    """Which supervisor makes this right without us, in words; empty if none does."""
    owner = applied.owner
    if any(change.scope not in (Scope.PROCESS, Scope.HOST) for change in plan.changes):
        return ""
    told = app.system.processes.supervised(owner.profile, owner.netns)
    return next((f"{one.name} is {one.state}: {one.reason}".rstrip(": ") for one in told if one.state in _AT_WORK), "")


def _command(owner: Owner) -> str:
    return f"watch {owner.profile}"


def _mend(app: App, ledger: Ledger, owner: Owner, limits: Limits) -> MendReport | _Attempt:
    """What became of it, or what is to be gone on with, in parts."""
    applied = _applied(ledger, owner)
    if applied is None or _is_on_trial(ledger, owner):
        return MendReport(owner, Outcome.RIGHT)
    plan = app.plan(ledger, owner, applied.target)[1]
    now_s = app.system.clock.monotonic()
    mending = _forget_old(ledger.mending(owner), now_s, limits)
    if _is_right(plan):
        if ledger.unsettled(owner):  # it could not be undone, and need not be any more
            app.establish(ledger, applied.wanted, ask=False)
        _remember(ledger, owner, replace(mending, failure=""))
        return _right(owner, plan)
    held, waits = mending.held_at(now_s), {s: wait_s(mending, s, now_s, limits) for s in _subjects(plan)}
    fought_over = [subject for subject, pause_s in waits.items() if pause_s is None and subject not in held]
    if fought_over:
        return _give_up(ledger, owner, plan, _hold(mending, fought_over, now_s, limits), fought_over)
    pauses = {subject: pause_s for subject, pause_s in waits.items() if pause_s and subject not in held}
    rest = _sparing(app, ledger, applied, plan, held.union(pauses))
    again_in_s = min(pauses.values(), default=0.0)
    if not _is_right(rest):
        _remember(ledger, owner, mending)
        spared = frozenset(_subjects(plan)).difference(_subjects(rest))
        attempt = _Attempt(app, applied, rest, spared=spared, known=mending.failure, again_in_s=again_in_s)
        return attempt if attempt.begin(ledger) else attempt.report()
    if pauses:
        return MendReport(owner, Outcome.WAITING, plan.changes, "it was mended a moment ago", again_in_s=again_in_s)
    mending = replace(mending, failure="")  # what could not be mended is right
    _remember(ledger, owner, mending)
    return _left_alone(owner, plan, mending, now_s)


class _Attempt:
    """One go at what has drifted but for what is spared: all together, and if that fails, in parts.

    Each part has the lock for itself: it may take as long as an apply, and others want to do their work in between.
    `known` is the failure that was told before, `again_in_s` when what is spared is due.
    """

    def __init__(
        self, app: App, applied: Applied, plan: Plan, *, spared: frozenset[str], known: str, again_in_s: float
    ) -> None:
        self._app = app
        self._applied = applied
        self._plan = plan
        self._spared = spared
        self._known = known
        self._again_in_s = again_in_s
        self._failure = ""
        self._parts: tuple[frozenset[str], ...] = ()
        self._failures: list[str] = []
        self._mended: tuple[Change, ...] = ()
        self._begun: set[str] = set()

    def begin(self, ledger: Ledger) -> bool:
        """All together; true if that failed, and is to be gone on with in parts.

        What cannot be taken back is left for the next command, and nothing else is tried meanwhile.
        """
        owner, target = self._applied.owner, self._applied.target
        try:
            self._failure = self._try(ledger, self._plan, self._spared)
            self._parts = self._app.parts(ledger, owner, target, self._spared) if self._failure else ()
        except RollbackError as error:
            self._failure = _say(error)
        if len(self._parts) > 1:
            return True
        self._remember_failure(ledger)
        return False

    def go_on(self) -> MendReport:
        """In parts; raises RefusedError if others took over before anything was mended."""
        try:
            self._divide(self._parts, self._spared)
        except Interrupted:
            raise
        except RefusedError:
            if not self._mended:
                raise
        except EXPECTED as error:
            self._failures.append(_say(error))
        return self.report()

    def report(self) -> MendReport:
        owner, failure = self._applied.owner, self._what_fails()
        if not failure:
            is_partial = bool(self._spared or self._plan.waiting)
            return MendReport(
                owner, Outcome.MENDED, self._plan.changes, again_in_s=self._again_in_s, is_partial=is_partial
            )
        if self._mended:
            reason = f"not the rest: {failure}"
            return MendReport(owner, Outcome.MENDED, self._mended, reason, again_in_s=_AGAIN_S, is_partial=True)
        is_news = failure != self._known
        return MendReport(
            owner, Outcome.FAILED, self._plan.changes, failure, is_news=is_news, again_in_s=self._again_in_s
        )

    def _what_fails(self) -> str:
        """Why not all is right; empty if it is."""
        left = set(_subjects(self._plan)).difference(change.subject for change in self._mended)
        is_all_mended = bool(self._mended) and not left
        return "" if is_all_mended else "; ".join(dict.fromkeys(self._failures or [self._failure]))

    def _divide(self, parts: tuple[frozenset[str], ...], spared: frozenset[str]) -> None:
        """Try one half, and then the other: of many parts one that fails is found in few attempts.

        The first half needs nothing of the second; of that, what needs what failed is spared with it.
        """
        middle = len(parts) // 2
        first, second = parts[:middle], parts[middle:]
        self._try_half(first, spared.union(*second))
        self._try_half(second, spared.union(*first).difference(change.subject for change in self._mended))

    def _try_half(self, parts: tuple[frozenset[str], ...], spared: frozenset[str]) -> None:
        with self._turn() as ledger:
            plan = self._app.plan(ledger, self._applied.owner, self._applied.target, spared)[1]
            try:
                failure = "" if _is_right(plan) else self._try(ledger, plan, spared)
            except RollbackError as error:
                self._failures.append(_say(error))
                self._remember_failure(ledger)
                raise
            is_divided = bool(failure) and len(parts) > 1
            if failure and not is_divided:
                self._failures.append(failure)
            if parts[-1] == self._parts[-1] and not is_divided:  # the last one; what is not told is not remembered
                self._remember_failure(ledger)
        if is_divided:
            self._divide(parts, spared)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[Ledger]:
        """The lock once more, after those who wait for it. Raises RefusedError if something else is to be there now."""
        owner = self._applied.owner
        self._app.system.clock.sleep(_GIVE_WAY_S)
        with self._app.settled(_command(owner)) as ledger:
            applied = _applied(ledger, owner)
            if applied is None or applied.target != self._applied.target or _is_on_trial(ledger, owner):
                raise RefusedError(f"{owner} was changed meanwhile")
            self._applied = applied
            yield ledger

    def _try(self, ledger: Ledger, plan: Plan, spared: frozenset[str]) -> str:
        """Carry it out; why that cannot be done, if so."""
        if plan.cut:
            return _what_is_cut(plan)
        if plan.refusals:
            return _refused(plan)
        self._note_repairs(ledger, _subjects(plan))
        try:
            report = self._app.establish(ledger, self._applied.wanted, ask=False, spared=spared)
        except (Interrupted, RollbackError):
            raise
        except EXPECTED as error:
            return _say(error)
        if report.declined:
            return _what_is_cut(report.plan)
        self._mended += plan.changes
        self._begun.difference_update(_subjects(plan))
        return ""

    def _note_repairs(self, ledger: Ledger, subjects: Collection[str]) -> None:
        """Before the first effect, so that being killed counts as well; each subject once until it is mended."""
        now_s, owner = self._app.system.clock.monotonic(), self._applied.owner
        mending = ledger.mending(owner)
        repairs = tuple(Repair(subject, now_s) for subject in subjects if subject not in self._begun)
        self._begun.update(subjects)
        _remember(ledger, owner, replace(mending, repairs=(*mending.repairs, *repairs)))

    def _remember_failure(self, ledger: Ledger) -> None:
        owner = self._applied.owner
        _remember(ledger, owner, replace(ledger.mending(owner), failure=self._what_fails()))


def _what_is_cut(plan: Plan) -> str:
    return f"{plan.cut} live connections would lose their helper: orch apply asks first"


def _is_on_trial(ledger: Ledger, owner: Owner) -> bool:
    at = (owner.profile, owner.netns.identity)
    return any((pending.owner.profile, pending.owner.netns.identity) == at for pending in ledger.pending())


def _forget_old(mending: Mending, now_s: float, limits: Limits) -> Mending:
    return replace(
        mending,
        repairs=tuple(repair for repair in mending.repairs if now_s - repair.at < limits.within_s),
        held=tuple(held for held in mending.held if now_s < held.until),
    )


def _hold(mending: Mending, subjects: Iterable[str], now_s: float, limits: Limits) -> Mending:
    repairs = Counter(repair.subject for repair in mending.repairs)
    until = f"left alone for {limits.quiet_s / 60:g} min, or until orch apply"

    def reason(subject: str) -> str:
        often = f"{repairs[subject]} times within {limits.within_s:g} s"
        if mending.failure:
            return f"{subject} was to be mended {often}, and is not right ({mending.failure}): {until}"
        return f"{subject} was mended {often} and changes again: {until}"

    held = (Held(subject, now_s + limits.quiet_s, reason(subject)) for subject in subjects)
    return replace(mending, held=(*mending.held, *held), failure="")


def _give_up(ledger: Ledger, owner: Owner, plan: Plan, mending: Mending, given_up: Collection[str]) -> MendReport:
    """Say what is left alone from now on; the next look, which is soon, mends the rest."""
    _remember(ledger, owner, mending)
    changes = tuple(change for change in plan.changes if change.subject in given_up)
    reason = "; ".join(held.reason for held in mending.held if held.subject in given_up)
    again_in_s = _AGAIN_S if len(changes) < len(plan.changes) else 0.0
    return MendReport(owner, Outcome.GIVEN_UP, changes, reason, again_in_s=again_in_s)


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
