"""What a killed command left is taken up by the next one that writes: an apply is undone, a teardown is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.errors import Interrupted, OrchError, RollbackError
from orchestrator.execute import EXPECTED, lead_back
from orchestrator.journal import Ledger
from orchestrator.model import Netns
from orchestrator.ports import System
from orchestrator.reports import Talk
from orchestrator.state import (
    CreateRegistration,
    DeleteRegistration,
    KeepRegistrations,
    Owner,
    Unsettled,
    UpdateRegistration,
)

_HOST_WIDE = (CreateRegistration, UpdateRegistration, DeleteRegistration, KeepRegistrations)


@dataclass(frozen=True, slots=True)
class Settling:
    """`reach` finds the way into a namespace, None where it is gone; `finish` takes up a teardown.

    Both ways give back a sentence for each step that could not be undone or done. Of a teardown, which is planned anew
    each time, that is a warning; so it is for those who are forgiven, as they are about to be torn down, and for the
    one who is about to be applied anew: the journal keeps what is half-done until that has succeeded.
    """

    system: System
    ledger: Ledger
    talk: Talk
    reach: Callable[[Owner], Netns | None]
    finish: Callable[[Unsettled], tuple[str, ...]]
    is_forgiven: Callable[[Owner], bool]
    renewed: Owner | None

    def run(self) -> RollbackError | None:
        """Settle everything that can be; the error to raise if half an apply cannot be undone now.

        Nothing else may be done before that: to undo it later would undo what others did to registrations it changed.
        """
        stuck = [
            (unsettled, left) for unsettled in reversed(self.ledger.unsettled()) if (left := self._settle(unsettled))
        ]
        if not stuck:
            return None
        first, leftovers = stuck[0][0], tuple(sentence for _, left in stuck for sentence in left)
        return RollbackError(OrchError(f"{first.sentence}, and undoing it failed"), leftovers)

    def _settle(self, unsettled: Unsettled) -> tuple[str, ...]:
        """What is left, if others must wait for it."""
        verb = "finishing" if unsettled.is_teardown else "undoing"
        self.talk.warn(f"{unsettled.sentence}: {verb} it")
        leftovers = self._lead(unsettled)
        if not leftovers:
            return ()
        is_renewed = self.renewed is not None and unsettled.is_of(self.renewed)
        if not (unsettled.is_teardown or is_renewed or self.is_forgiven(unsettled.owner)):
            return leftovers
        for sentence in leftovers:
            self.talk.warn(f"left: {sentence}")
        live = {r.key for r in self.system.registry.dump()}
        self.ledger.claim(r for r in unsettled.registrations if r.key in live)
        return ()

    def _lead(self, unsettled: Unsettled) -> tuple[str, ...]:
        try:
            return self.finish(unsettled) if unsettled.is_teardown else self._undo(unsettled)
        except Interrupted:
            raise
        except EXPECTED as error:
            return (str(error),)

    def _undo(self, unsettled: Unsettled) -> tuple[str, ...]:
        """What was in a namespace that is gone went with it; only what is the host's is left to undo."""
        netns = self.reach(unsettled.owner)
        begun = [(n, step) for n, step in unsettled.begun if netns is not None or isinstance(step, _HOST_WIDE)]
        leftovers = lead_back(
            begun,
            self.system,
            netns or unsettled.owner.netns,
            self.talk.step,
            undone=lambda sequence: self.ledger.undone(unsettled.id, sequence),
        )
        if not leftovers:
            self.ledger.settle(unsettled.id)
        return leftovers
