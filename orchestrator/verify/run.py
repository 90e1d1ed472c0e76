"""Apply a profile in a throw-away router, hold every dialogue, and take all of it away again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import count
from pathlib import Path

from orchestrator import render
from orchestrator.app import App, boot_id, kernel_system
from orchestrator.errors import Interrupted, OrchError, RollbackError
from orchestrator.journal import Ledger
from orchestrator.kernel.clock import MonotonicClock
from orchestrator.model import Desired, Target
from orchestrator.reports import Talk
from orchestrator.state import LoadModule
from orchestrator.verify import trials
from orchestrator.verify.dialogues import PORTS_ANNOUNCED
from orchestrator.verify.disguise import Case, cases, disguised, left_out
from orchestrator.verify.expectations import Events, expectations_made
from orchestrator.verify.network import Network, load_filter, network
from orchestrator.verify.play import play

_FIRST_PORT = 40000
_REMOVING_WAITS_S = 600.0  # for the lock


class Outcome(StrEnum):
    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"
    NO_DIALOGUE = "no dialogue"


@dataclass(frozen=True, slots=True)
class Result:
    """How a dialogue ended: why it failed or was skipped, and the time that it took, in seconds."""

    case: Case
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Verification:
    """All results, in the order of the profile, and the kernel modules that were loaded for it and stay."""

    profile: str
    results: tuple[Result, ...]
    modules: tuple[str, ...] = ()

    def count(self, outcome: Outcome) -> int:
        return sum(result.outcome is outcome for result in self.results)


_KEPT = (
    "what was registered for the trial stays, disabled: this kernel would make iptables rules idle; "
    "the next orch verify without such rules removes it"
)


class NotRemovedError(RollbackError):
    """What was made for the trial could not be taken away; `leftovers` lists it."""

    def __init__(self, leftovers: tuple[str, ...]) -> None:
        super().__init__(OrchError("not all that was made for the trial could be taken away again"), leftovers)
        self.hint = "what is left is registered on this host under a name that begins with v, and is in nobody's way"


@dataclass(frozen=True, slots=True)
class Trial:
    """How a profile is verified: `talk` is told of steps and warnings, and knows of signals.

    `host` is the state directory of all others, whose lock is taken; `templates` one of templates that replace ours,
    None for none.
    """

    talk: Talk
    host: Path
    wait_s: float
    templates: Path | None = None

    def run(self, desired: Desired) -> Verification:
        """Raises OrchError if the profile cannot be tried here, Interrupted at a signal; nothing stays but modules."""
        for name, reason in trials.remove_abandoned(self._alone()).items():
            became = f"and something stays for now: {reason}" if reason else "what it left is taken away"
            self.talk.warn(f"{name} did not clean up: {became}")
        with trials.place(self.host) as place:
            state = place.state_dir
            registered = [r.key for r in kernel_system(state).registry.dump()]
            without = left_out(desired, registered)
            todo = cases(desired, without)
            if not any(_is_to_hold(case) for case in todo):
                return Verification(desired.profile, tuple(_foregone(case) for case in todo))
            tried = disguised(desired, prefix=place.prefix, without=without)
            target = render.target(tried, template_dir=self.templates)
            with network() as there, expectations_made(there.router.netns.path) as events:
                load_filter(there.router, ((c.l4proto, c.port) for c in todo if _is_to_hold(c)))
                with self._applied(state, there, tried, target) as modules:
                    return Verification(desired.profile, tuple(self._held(todo, there, events)), modules)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other orch is at work. Raises RefusedError if one is for longer than we wait."""
        talk, clock = self.talk, MonotonicClock()
        with (
            contextlib.closing(Ledger.open(self.host, boot_id=boot_id(), create=True)) as ledger,
            ledger.locked("verify", wait_s=self.wait_s, clock=clock, interrupted=talk.interrupted, say=talk.warn),
        ):
            yield

    @contextlib.contextmanager
    def _applied(self, state: Path, there: Network, desired: Desired, target: Target) -> Iterator[tuple[str, ...]]:
        """The profile, applied on the router while the block runs; signals do not stop its removal."""
        app = App(kernel_system(state), state, boot_id(), self.talk, there.router.netns.path, self.wait_s)
        last = replace(app, talk=replace(self.talk, interrupted=lambda: 0), wait_s=_REMOVING_WAITS_S)
        try:
            report = app.apply(desired, target, ask=False)
            yield tuple(step.name for step in report.plan.steps if isinstance(step, LoadModule))
        finally:
            removal = last.teardown(desired.profile, every_netns=False)
            if any(one.plan.kept for one in removal.reports):
                self.talk.warn(_KEPT)
            if leftovers := tuple(line for one in removal.reports for line in one.leftovers):
                raise NotRemovedError(leftovers)

    def _held(self, todo: tuple[Case, ...], there: Network, events: Events) -> Iterator[Result]:
        first = {case.port for case in todo}
        free = (number for number in count(_FIRST_PORT, PORTS_ANNOUNCED) if first.isdisjoint(_row(number)))
        for case in todo:
            if number := self.talk.interrupted():
                raise Interrupted(number)
            if not _is_to_hold(case):
                yield _foregone(case)
                continue
            started = time.monotonic()
            reason = play(case, there, events, _row(next(free)))
            seconds = time.monotonic() - started
            yield Result(case, Outcome.FAILED if reason else Outcome.OK, reason, seconds)


def _is_to_hold(case: Case) -> bool:
    return case.dialogue is not None and not (case.skipped or case.unserved)


def _foregone(case: Case) -> Result:
    """The result of a case that there is nothing to hold of."""
    if case.skipped:
        return Result(case, Outcome.SKIPPED, case.skipped)
    if case.unserved:
        return Result(case, Outcome.FAILED, case.unserved)
    return Result(case, Outcome.NO_DIALOGUE)


def _row(first: int) -> tuple[int, ...]:
    return tuple(range(first, first + PORTS_ANNOUNCED))
