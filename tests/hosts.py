"""Builders for tests that apply profiles: an App over any system, and what it said."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import profile, render
from orchestrator.app import App
from orchestrator.execute import Outcome
from orchestrator.model import Desired, Target
from orchestrator.ports import System
from orchestrator.reports import Difference, Report, Talk, TeardownReport
from orchestrator.state import Plan, describe
from orchestrator.status import HostStatus
from orchestrator.supervise.describe import describe as describe_helper

FTP = "profile: ftp\nhelpers:\n  ftp: {engine: conntrackd}\n"


@dataclass(slots=True)
class Harness:
    """orch as a library: profiles as text in, reports out; every step and warning is kept."""

    system: System
    state_dir: Path
    answer: bool = True
    steps: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    signal_number: int = 0
    boot_id: str = "boot-1"

    def app(self, netns: str | None = None) -> App:
        talk = Talk(self._step, self.warnings.append, self._confirm, lambda: self.signal_number)
        return App(self.system, self.state_dir, self.boot_id, talk, netns)

    def apply(self, text: str, netns: str | None = None) -> Report:
        desired, target = both(text)
        return self.app(netns).apply(desired, target, ask=False)

    def diff(self, text: str, netns: str | None = None) -> Difference:
        desired, target = both(text)
        return self.app(netns).diff(desired, target)

    def teardown(self, name: str = "", netns: str | None = None, *, every_netns: bool = False) -> TeardownReport:
        return self.app(netns).teardown(name, every_netns=every_netns)

    def teardown_file(self, text: str, netns: str | None = None) -> TeardownReport:
        desired, target = both(text)
        return self.app(netns).teardown(desired.profile, every_netns=False, desired=desired, target=target)

    def status(self, name: str = "", netns: str | None = None) -> HostStatus:
        return self.app(netns).status(name)

    def _step(self, outcome: Outcome) -> None:
        name = describe(outcome.step)
        self.steps.append(f"({name})" if outcome.is_undo else name)

    def _confirm(self, plan: Plan, reason: str) -> bool:
        self.questions.append(reason)
        return self.answer


@functools.cache
def both(text: str) -> tuple[Desired, Target]:
    desired = profile.load(text, "test.yaml", describe_helper, directory=str(Path("profiles").absolute()))
    return desired, render.target(desired)
