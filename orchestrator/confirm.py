"""What was applied, and back: confirm an apply that waits for it, or return to what was applied before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.app import App
from orchestrator.errors import RefusedError, RollbackError, UsageError
from orchestrator.execute import EXPECTED
from orchestrator.journal import Ledger
from orchestrator.reports import Report
from orchestrator.state import Applied, Owner, Past, Pending


class Verdict(StrEnum):
    """What became of an apply that had to be confirmed."""

    WAITING = "waiting"
    CONFIRMED = "confirmed"
    ROLLED_BACK = "rolled back"


@dataclass(frozen=True, slots=True)
class Rollback:
    """How a rollback ended: `to` is what is applied now, None if nothing is. `report` is None if others were quicker.

    `is_verdict` tells that it was the answer to an apply that waited.
    """

    owner: Owner
    to: Applied | None
    report: Report | None
    is_verdict: bool


@dataclass(frozen=True, slots=True)
class History:
    """What was applied for a profile in a namespace, newest first; `current` is the place of what is applied now.

    `current` is None if nothing is, or if that has not been confirmed yet (`is_pending`).
    """

    owner: Owner
    past: tuple[Past, ...]
    current: int | None
    is_pending: bool


def confirm(app: App, wanted: str) -> Owner:
    """Keep what waits; RefusedError if nothing does, or several do and `wanted` does not say which."""
    with app.settled(f"confirm {wanted}".strip()) as ledger:
        owner = _only(_waiting(app, ledger, wanted))
        if owner is None:
            raise RefusedError("nothing waits for a confirmation", hint="orch status shows what is applied")
        ledger.confirm(owner)
        return owner


def keep(app: App, pending: Pending) -> Verdict:
    """Confirm an apply unless it was settled meanwhile; what became of it.

    Waits for other orchs until its deadline; WAITING if they have not ended by then.
    """
    clock = app.system.clock
    patient = replace(app, wait_s=max(0, math.ceil(pending.left_s(clock.boottime()))))
    try:
        with patient.settled(f"confirm {pending.owner.profile}") as ledger:
            found = _verdict(ledger, pending)
            if found is not Verdict.WAITING:
                return found
            ledger.confirm(pending.owner)
            return Verdict.CONFIRMED
    except RefusedError:
        if pending.left_s(clock.boottime()) > 0:
            raise
        return Verdict.WAITING


def verdict(app: App, pending: Pending) -> Verdict:
    """What became of an apply; reads only."""
    with app.reading() as ledger:
        return _verdict(ledger, pending)


def roll_back(app: App, wanted: str, *, to: int | None, ask: bool) -> Rollback:
    """Undo the apply that waits for its confirmation; if none does, return to line `to` of the history.

    Without `to` that is the newest line which is not what is applied now. What the watchdog undoes while this waits for
    the lock is not undone twice. Raises RefusedError if there is nothing to return to.
    """
    with app.reading() as ledger:
        waiting = _waiting(app, ledger, wanted) if to is None else {}
        asked = _only(waiting)
    with app.settled(f"rollback {wanted}".strip()) as ledger:
        if asked is not None:
            return undo(app, ledger, waiting[asked])
        owner = _only(owner for owner in ledger.remembered() if app.is_asked_for(owner, wanted))
        if owner is None:
            raise RefusedError("there is no history to go back in", hint="orch history shows what was applied")
        app.refuse_while_pending(ledger, owner)
        applied = ledger.find(owner)
        ledger.forget_mending(owner)
        line = _line(ledger.history(owner), applied, to)
        wanted_again = replace(line.wanted, owner=app.current(ledger, owner))
        report = app.establish(ledger, wanted_again, ask=ask, is_rollback=True)
        return Rollback(owner, line, report, is_verdict=False)


def undo(app: App, ledger: Ledger, pending: Pending) -> Rollback:
    """Undo an apply that waits for its confirmation, unless others did. Raises RollbackError if it stays as it is."""
    found = _verdict(ledger, pending)
    if found is Verdict.CONFIRMED:
        raise RefusedError(f"{pending.owner} was confirmed meanwhile", hint="once more, to go back in its history")
    if found is Verdict.ROLLED_BACK:
        return Rollback(pending.owner, pending.prior, None, is_verdict=True)
    try:
        report = app.roll_back(ledger, pending)
    except RollbackError:
        raise
    except EXPECTED as error:
        raise RollbackError(error, (f"what was applied for {pending.owner} and not confirmed",)) from error
    return Rollback(pending.owner, pending.prior, report, is_verdict=True)


def history(app: App, wanted: str) -> tuple[History, ...]:
    """Of every namespace (or one, if it was named), every profile (or one); reads only."""
    with app.reading() as ledger:
        waiting = {_at(pending.owner) for pending in ledger.pending()}
        return tuple(
            _history(ledger, owner, is_pending=_at(owner) in waiting)
            for owner in ledger.remembered()
            if app.is_asked_for(owner, wanted)
        )


def _history(ledger: Ledger, owner: Owner, *, is_pending: bool) -> History:
    past, applied = ledger.history(owner), ledger.find(owner)
    places = (n for n, one in enumerate(past) if applied and one.applied.target == applied.target)
    return History(owner, past, None if is_pending else next(places, None), is_pending)


def _line(past: tuple[Past, ...], applied: Applied | None, to: int | None) -> Applied:
    if to is not None and not 1 <= to <= len(past):
        raise UsageError(f"there is no line {to} in the history", hint=f"orch history shows {len(past)}")
    if to is not None:
        return past[to - 1].applied
    older = (one.applied for one in past if applied is None or one.applied.target != applied.target)
    found = next(older, None)
    if found is None:
        raise RefusedError("nothing else was applied before", hint="orch history shows what was")
    return found


def _waiting(app: App, ledger: Ledger, wanted: str) -> Mapping[Owner, Pending]:
    return {pending.owner: pending for pending in ledger.pending() if app.is_asked_for(pending.owner, wanted)}


def _verdict(ledger: Ledger, pending: Pending) -> Verdict:
    if any(one.owner == pending.owner and one.deadline_s == pending.deadline_s for one in ledger.pending()):
        return Verdict.WAITING
    applied, prior = ledger.find(pending.owner), pending.prior
    is_as_before = applied is None or (prior is not None and applied.target == prior.target)
    return Verdict.ROLLED_BACK if is_as_before else Verdict.CONFIRMED


def _only(owners: Iterable[Owner]) -> Owner | None:
    """The one there is, None if there is none; raises RefusedError if there are several."""
    found = tuple(owners)
    if found[1:]:
        raise RefusedError(f"which one: {', '.join(map(str, found))}", hint="name the profile, or its --netns")
    return found[0] if found else None


def _at(owner: Owner) -> tuple[str, str]:
    return owner.profile, owner.netns.identity
