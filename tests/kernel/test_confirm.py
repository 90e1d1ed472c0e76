"""A watchdog that brings back what was applied before: registrations, processes and rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.topology import ROUTER, ruleset
from orchestrator.app import local_processes
from orchestrator.kernel.cthelper import KernelRegistry
from tests.hosts import Harness
from tests.kernel.conftest import cli_here
from tests.trials import is_watched, pass_time, waiting
from tests.waiting import until

FIRST = "profile: trial\nhelpers: {ftp: {queueing: registration}}\n"
SECOND = "profile: trial\nhelpers: {tftp: {}}\n"


@pytest.fixture
def state(orch: Harness) -> Iterator[Path]:
    """No watchdog outlives a test."""
    yield orch.state_dir
    (orch.state_dir / "ledger.sqlite").unlink(missing_ok=True)
    until(lambda: not is_watched(orch.state_dir), "its watchdogs have ended", within_s=60)


def look(state: Path) -> list[str]:
    """What there is, but for pids."""
    processes = [f"{seen.name} {seen.digest} {seen.watched}" for seen in local_processes(state).running()]
    return [*map(str, KernelRegistry().dump()), *processes, ruleset(ROUTER)]


def test_what_is_not_confirmed_is_undone_by_another_process(state: Path, tmp_path: Path) -> None:
    """The watchdog starts what the second profile has stopped, and unregisters what it has registered."""
    for name, text in (("first", FIRST), ("second", SECOND)):
        (tmp_path / name).write_text(text)
    assert cli_here("apply", str(tmp_path / "first"), "--netns", ROUTER, state=state).returncode == 0
    before = look(state)
    done = cli_here("apply", str(tmp_path / "second"), "--netns", ROUTER, "--confirm-within", "3600", state=state)
    assert (done.returncode, look(state) != before) == (0, True), done.stderr
    pass_time(state)
    until(lambda: not waiting(state), "it is undone", within_s=120)
    assert look(state) == before, (state / "watchdog.log").read_text()
    assert cli_here("status", state=state).returncode == 0
