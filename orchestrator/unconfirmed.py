"""An apply that waits for its confirmation: what may be done meanwhile, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestrator.errors import RefusedError
from orchestrator.establish import Establishing
from orchestrator.execute import EXPECTED
from orchestrator.journal import Ledger
from orchestrator.remove import remove
from orchestrator.reports import Report
from orchestrator.state import Owner, Pending
from orchestrator.typed import how_to
from orchestrator.work import Work


def roll_back(work: Work, pending: Pending) -> Report:
    """Make true again what was before an apply that nobody confirmed; nobody is asked, and no signal stops it.

    Under the lock, with nothing unsettled. Where the name of the namespace is gone nothing is to return there.
    """
    work = replace(work, talk=replace(work.talk, interrupted=lambda: 0))
    owner = work.observer.current(pending.owner)
    is_gone = owner.netns.path != "" and not work.observer.is_there(owner.netns)
    if pending.prior is None or is_gone:
        report = remove(work, work.reachable(owner))
    else:
        report = Establishing(work, replace(pending.prior.wanted, owner=owner), is_rollback=True).run_all()
    if report.leftovers:
        work.ledger.reject(pending)
    return report


def roll_back_overdue(work: Work, is_forgiven: Callable[[Owner], bool]) -> None:
    """Do what a watchdog should have done; what fails is tried again by the next command."""
    for pending in work.ledger.pending():
        if pending.left_s(work.system.clock.boottime()) > 0 or is_forgiven(pending.owner):
            continue
        why = "could not be undone as a whole" if pending.is_rejected else "was not confirmed in time"
        work.talk.warn(f"the apply of {pending.owner} {why}: undoing it")
        try:
            left = roll_back(work, pending).leftovers
        except EXPECTED as error:
            left = (str(error),)
        for sentence in left:
            work.talk.warn(f"it could not be undone: {sentence}")


def refuse_while_pending(ledger: Ledger, now_s: float, renewed: Owner | None = None) -> None:
    """What is done meanwhile might stand in the way back. `now_s` is of the boot clock.

    What should have been undone by now, and cannot be, is in nobody's way but in that of its own profile.
    """
    for pending in ledger.waiting():
        name = pending.owner.profile
        confirm, rollback, teardown = (
            how_to(command, name, state_dir=ledger.directory) for command in ("confirm", "rollback", "teardown")
        )
        if pending.left_s(now_s) > 0:
            raise RefusedError(f"{pending.owner} waits for its confirmation", hint=f"{confirm}, or {rollback}")
        if renewed and (renewed.profile, renewed.netns.identity) == (name, pending.owner.netns.identity):
            raise RefusedError(
                f"{pending.owner} was not confirmed, and could not be undone",
                hint=f"{teardown} takes it away, {confirm} keeps what there is",
            )
