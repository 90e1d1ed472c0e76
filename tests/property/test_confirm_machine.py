"""Random histories of a host in which applies have to be confirmed, and are rolled back, at once or later."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from orchestrator import confirm
from orchestrator.errors import OrchError, RefusedError
from orchestrator.model import Target
from orchestrator.reports import Report, Trial
from tests.faults import KILL, run
from tests.hosts import Harness, both
from tests.property.test_machine import Host, helpers, places

WITHIN_S = 60.0


def try_out(orch: Harness, place: tuple[str, str], text: str) -> Report:
    desired, target = both(text)
    trial = Trial(WITHIN_S, lambda: None, accepts_loss=True)
    return orch.app(place[1]).apply(desired, target, ask=False, trial=trial)


class HostOnTrial(Host):
    """A rollback leads to one of `texts`, which are all that was ever asked for.

    `trial` is where something waits for its confirmation while other things happen, and what was there before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.texts: set[str] = set()
        self.trial: tuple[tuple[str, str], Target | None] | None = None

    def teardown(self) -> None:
        if self.trial:
            confirm.confirm(self.orch.app(), "")
        super().teardown()

    def is_waiting(self) -> bool:
        return self.trial is not None

    def is_torn_down(self, place: tuple[str, str]) -> bool:
        """While something waits that is refused, wherever there is anything."""
        if not (self.trial and place in self.applied):
            return super().is_torn_down(place)
        before = self.kernel.dump_text()
        with suppress(RefusedError):
            self.orch.teardown(*place)
            raise AssertionError("something waits")
        assert self.kernel.dump_text() == before
        return False

    def target(self, place: tuple[str, str]) -> Target | None:
        """What the ledger says is applied."""
        found = self.orch.app(place[1]).applied(place[0])
        return found[0].target if found else None

    @precondition(lambda self: not self.trial)
    @rule(place=places, helpers=helpers())
    def begin_to_wait(self, place: tuple[str, str], helpers: str) -> None:
        text = f"profile: {place[0]}\nhelpers:\n{helpers}"
        before = self.target(place)
        with suppress(OrchError):
            if try_out(self.orch, place, text).pending:
                self.trial = (place, before)
        self.note(place, text)

    @precondition(lambda self: self.trial)
    @rule(verdict=st.sampled_from(["yes", "no", "late"]))
    def wait_no_longer(self, verdict: str) -> None:
        """Whatever happened meanwhile, it is kept, or what was before is back."""
        assert self.trial is not None
        (place, before), self.trial = self.trial, None
        after = self.target(place)
        if verdict == "yes":
            confirm.confirm(self.orch.app(), "")
        else:
            self.undo(verdict)
        assert self.target(place) == (after if verdict == "yes" else before) or self.is_broken
        self.note(place)

    @precondition(lambda self: not self.trial)
    @rule(
        place=places,
        helpers=helpers(),
        verdict=st.sampled_from(["yes", "no", "late", "killed"]),
        event=st.integers(0, 40),
    )
    def be_tried(self, place: tuple[str, str], helpers: str, verdict: str, event: int) -> None:
        """Confirmed, it is what is applied; else what was before is, whoever was killed where."""
        text = f"profile: {place[0]}\nhelpers:\n{helpers}"
        before = self.target(place)
        faults = {event: KILL} if verdict == "killed" else {}
        run(self.orch, self.kernel, lambda orch, _: try_out(orch, place, text), faults)
        if not self.waits():
            self.settle(place[1])
            self.note(place, text)
            return
        if verdict == "yes":
            confirm.confirm(self.orch.app(), "")
            assert self.target(place) == both(text)[1]
        else:
            self.undo(verdict)
            assert self.target(place) == before or self.is_broken
        self.note(place, text)

    @precondition(lambda self: not self.trial)
    @rule(place=places)
    def roll_back(self, place: tuple[str, str]) -> None:
        """It becomes what it was before, which is something else than now; or that is refused, and nothing changes."""
        before = self.target(place)
        with suppress(OrchError):
            confirm.roll_back(self.orch.app(place[1]), place[0], to=None, ask=False)
            assert self.target(place) != before
        self.note(place)

    def undo(self, verdict: str) -> None:
        """In time or late; what others broke may stand in the way, and then a teardown does it."""
        with suppress(OrchError):
            if verdict == "no":
                confirm.roll_back(self.orch.app(), "", to=None, ask=False)
            self.kernel.now += WITHIN_S
            self.orch.teardown("nobody")
        if self.waits():
            assert self.is_broken
            self.orch.teardown(every_netns=True)

    def note(self, place: tuple[str, str], *texts: str) -> None:
        """Keep the model: whatever is applied is something that was asked for."""
        self.texts |= {*texts, *self.applied.values()}
        for each in (place, *self.applied):
            target = self.target(each)
            self.applied.pop(each, None)
            if target is not None:
                self.applied[each] = next(text for text in self.texts if both(text)[1] == target)

    def waits(self) -> bool:
        with self.orch.app().reading() as ledger:
            return bool(ledger.pending())

    @invariant()
    def only_what_is_on_trial_waits(self) -> None:
        self.texts |= set(self.applied.values())
        assert self.waits() == self.is_waiting()


TestHostOnTrial = HostOnTrial.TestCase
TestHostOnTrial.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
