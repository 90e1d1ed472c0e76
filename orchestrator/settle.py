"""What a killed command left is taken up by the next one that writes: an apply is undone, a teardown is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.errors import Interrupted, OrchError, RollbackError
from orchestrator.execute import EXPECTED, lead_back
from orchestrator.release import idles_iptables
from orchestrator.remove import remove
from orchestrator.state import (
    CreateRegistration,
    DeleteRegistration,
    KeepRegistrations,
    LoadRules,
    Owner,
    Unsettled,
    UpdateRegistration,
)
from orchestrator.work import Work

_HOST_WIDE = (CreateRegistration, UpdateRegistration, DeleteRegistration, KeepRegistrations)


@dataclass(frozen=True, slots=True)
class Settling:
    """A step that could not be undone or done is told of. Of a teardown, which is planned anew each time, that is a
    warning; so it is for those who are forgiven, as they are about to be torn down, and for the one who is about to be
    applied anew (`renewed`): the journal keeps what is half-done until that has succeeded.
    """

    work: Work
    is_forgiven: Callable[[Owner], bool]
    renewed: Owner | None

    def run(self) -> RollbackError | None:
        """Settle everything that can be; the error to raise if half an apply cannot be undone now.

        Nothing else may be done before that: to undo it later would undo what others did to registrations it changed.
        """
        ledger = self.work.ledger
        stuck = [(unsettled, left) for unsettled in reversed(ledger.unsettled()) if (left := self._settle(unsettled))]
        if not stuck:
            return None
        first, leftovers = stuck[0][0], tuple(sentence for _, left in stuck for sentence in left)
        return RollbackError(OrchError(f"{first.sentence}, and undoing it failed"), leftovers)

    def _settle(self, unsettled: Unsettled) -> tuple[str, ...]:
        """What is left, if others must wait for it."""
        verb = "finishing" if unsettled.is_teardown else "undoing"
        self.work.talk.warn(f"{unsettled.sentence}: {verb} it")
        leftovers = self._lead(unsettled)
        if not leftovers:
            return ()
        is_renewed = self.renewed is not None and unsettled.is_of(self.renewed)
        if not (unsettled.is_teardown or is_renewed or self.is_forgiven(unsettled.owner)):
            return leftovers
        for sentence in leftovers:
            self.work.talk.warn(f"left: {sentence}")
        live = self.work.live_keys()
        self.work.ledger.claim(r for r in unsettled.registrations if r.key in live)
        return ()

    def _lead(self, unsettled: Unsettled) -> tuple[str, ...]:
        """One sentence for each step that could not be undone or done."""
        try:
            if unsettled.is_teardown:
                return remove(self.work, self.work.reachable(unsettled.owner)).leftovers
            return self._undo(unsettled)
        except Interrupted:
            raise
        except EXPECTED as error:
            return (str(error),)

    def _undo(self, unsettled: Unsettled) -> tuple[str, ...]:
        """What was in a namespace that is gone went with it; only what is the host's is left to undo."""
        work, owner = self.work, self.work.reachable(unsettled.owner)
        is_there = work.observer.is_there(owner.netns)
        begun = [(n, step) for n, step in unsettled.begun if is_there or isinstance(step, _HOST_WIDE)]
        leftovers = lead_back(
            begun,
            work.system,
            work.ledger,
            owner if is_there else unsettled.owner,
            work.talk.step,
            undone=lambda sequence: work.ledger.undone(unsettled.id, sequence),
            unseen=() if is_there else self._unseen(unsettled),
        )
        if not leftovers:
            work.ledger.settle(unsettled.id)
        return leftovers

    def _unseen(self, unsettled: Unsettled) -> tuple[str, ...]:
        """Where rules that it loaded may be, in a namespace without a name, that would be idle; nobody can tell."""
        loaded = [step.after.backend for _, step in unsettled.begun if isinstance(step, LoadRules)]
        may_idle = idles_iptables(self.work.system.host.kernel_release())
        return (str(unsettled.owner),) if may_idle and not all(backend.is_nftables for backend in loaded) else ()
