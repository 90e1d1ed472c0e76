"""The shipped unit under a real systemd: start, reload, restart, kill, hang and stop, with FTP through the router."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from lab import topology
from lab.control import control
from lab.layout import REPOSITORY, LabError
from lab.systemd import Systemd, booted
from lab.topology import ROUTER, ROUTER_FILTER, load_filter
from orchestrator.ports import ProcessSeen
from orchestrator.session import DEFAULT_STATE
from tests.hosts import Harness
from tests.kernel.conftest import clean_orch, snapshot
from tests.metrics import samples
from tests.reports import REPORTS
from tests.waiting import until

UNIT = "orch@ftp.service"
EXPORTER = "orch-exporter.service"
SHIPPED = REPOSITORY / "contrib/systemd/orch@.service"
PROGRAM = Path("/usr/bin/orch")
PROFILE = Path("/etc/orch/ftp.yaml")
_DATA_PORTS = itertools.count(20001)
FIGURES = REPORTS.setdefault("service: under systemd", [])


def profile(ports: str) -> str:
    return (
        f"profile: ftp\nnetns: {ROUTER}\nfamilies: [ip]\nhelpers:\n"
        f"  ftp: {{queueing: registration, attach: [{{path: incoming, ports: {ports}}}]}}\n"
    )


@pytest.fixture(scope="module")
def systemd(routed: None) -> Iterator[Systemd]:
    """A systemd with the unit of the repository, unchanged, and orch where the unit looks for it."""
    PROGRAM.symlink_to(REPOSITORY / ".venv/bin/orch")
    PROFILE.parent.mkdir()
    PROFILE.write_text(profile("2121"))
    try:
        with booted() as made:
            made.install(SHIPPED.name, SHIPPED.read_text())
            yield made
    finally:
        PROGRAM.unlink()
        shutil.rmtree(PROFILE.parent)


@pytest.fixture(scope="module")
def orch(systemd: Systemd) -> Iterator[Harness]:
    with clean_orch(DEFAULT_STATE) as harness:
        load_filter(ROUTER, ROUTER_FILTER)
        yield harness


def helper(orch: Harness) -> ProcessSeen:
    (process,) = orch.system.processes.running()
    return process


def main_pid(systemd: Systemd) -> int:
    return int(systemd.properties(UNIT, "MainPID")["MainPID"])


def transfers() -> None:
    with control() as session:
        session.transfer("PASV", next(_DATA_PORTS))


def wait_replaced(systemd: Systemd, pid: int) -> None:
    until(lambda: main_pid(systemd) != pid, "systemd starts it again")
    systemd.start(UNIT)  # waits until it has started


@pytest.fixture
def served(systemd: Systemd, orch: Harness) -> Harness:
    """The service at work, whatever the test before has left."""
    systemd.start(UNIT)
    return orch


def test_it_is_active_when_ftp_works(systemd: Systemd, served: Harness) -> None:
    transfers()
    seen = systemd.properties(UNIT, "ActiveState", "SubState", "StatusText")
    assert (seen["ActiveState"], seen["SubState"]) == ("active", "running")
    assert seen["StatusText"] == "profile ftp: ftp running"
    text = systemd.run("systemctl", "status", "--no-pager", UNIT)
    assert f'Status: "{seen["StatusText"]}"' in text
    assert "Applied: " in systemd.journal(UNIT)
    assert "as applied" in systemd.run(str(PROGRAM), "status", "ftp", check=False)
    exposure = systemd.run("systemd-analyze", "security", "--no-pager", UNIT, check=False).splitlines()[-1]
    FIGURES.append(exposure)
    assert " OK " in exposure


def test_a_reload_applies_what_the_file_says_now(systemd: Systemd, served: Harness) -> None:
    before = main_pid(systemd), helper(served).pid
    PROFILE.write_text(profile("[2121, 2122]"))
    try:
        systemd.run("systemctl", "reload", UNIT)
        until(lambda: "2122" in topology.ruleset(ROUTER), "the new port is applied")
        assert (main_pid(systemd), helper(served).pid) == before
    finally:
        PROFILE.write_text(profile("2121"))


def test_its_helper_dies_and_the_journal_has_its_last_words(systemd: Systemd, served: Harness) -> None:
    supervisor, pid = main_pid(systemd), helper(served).pid
    os.kill(pid, signal.SIGABRT)
    until(lambda: "after 1 restart" in systemd.properties(UNIT, "StatusText")["StatusText"], "it is replaced")
    assert helper(served).pid != pid
    assert main_pid(systemd) == supervisor
    transfers()
    assert "ftp: Fatal Python error: Aborted" in systemd.journal(UNIT)


def test_its_successor_takes_over_what_runs(systemd: Systemd, served: Harness) -> None:
    supervisor, pid = main_pid(systemd), helper(served).pid
    systemd.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
    transfers()
    wait_replaced(systemd, supervisor)
    assert helper(served).pid == pid
    assert systemd.properties(UNIT, "StatusText")["StatusText"].startswith("profile ftp: ftp running")
    transfers()


def test_a_restart_begins_anew_and_a_hung_one_is_replaced(systemd: Systemd, served: Harness) -> None:
    systemd.install(f"{UNIT}.d/watchdog.conf", "[Service]\nWatchdogSec=5\nTimeoutAbortSec=1\n")
    before = helper(served).pid
    systemd.run("systemctl", "restart", UNIT)
    pid = helper(served).pid
    assert pid != before
    supervisor = main_pid(systemd)
    systemd.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", UNIT)
    wait_replaced(systemd, supervisor)
    assert helper(served).pid == pid
    transfers()


def metric(name: str) -> float | None:
    """What the exporter says now of the profile; None before it serves, and while there is no such figure."""
    with contextlib.suppress(URLError), urlopen("http://127.0.0.1:10932/metrics") as answer:
        seen = samples(answer.read().decode())
        return next((s.value for s in seen if s.name == name and s.labels["profile"] == "ftp"), None)
    return None


def test_the_exporter_can_do_with_what_its_unit_allows(systemd: Systemd, served: Harness) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    systemd.install(EXPORTER, SHIPPED.with_name(EXPORTER).read_text())
    systemd.start(EXPORTER)
    try:
        until(lambda: metric("orch_helper_up") == 1, "it serves", within_s=120)
        until(lambda: metric("orch_profile_drift") == 0, "it has looked for drift", within_s=120)
    finally:
        print(systemd.journal(EXPORTER))
    exposure = systemd.run("systemd-analyze", "security", "--no-pager", EXPORTER, check=False).splitlines()[-1]
    FIGURES.append(exposure)
    assert " OK " in exposure
    systemd.run("systemctl", "stop", EXPORTER)
    assert systemd.properties(EXPORTER, "Result")["Result"] == "success"


def test_a_stop_leaves_nothing(systemd: Systemd, served: Harness) -> None:
    systemd.run("systemctl", "stop", UNIT)
    left = snapshot()
    assert systemd.properties(UNIT, "Result", "ActiveState") == {"Result": "success", "ActiveState": "inactive"}
    assert left == topology.ruleset(ROUTER)


def test_a_profile_that_cannot_be_applied_fails_the_start(systemd: Systemd, orch: Harness) -> None:
    systemd.run("systemctl", "stop", UNIT)
    PROFILE.write_text(profile("2121").replace("ftp: {", "ftp: {queue: 70000, "))
    try:
        with pytest.raises(LabError, match="queue number 70000 is out of range"):
            systemd.start(UNIT)
    finally:
        PROFILE.write_text(profile("2121"))
        systemd.run("systemctl", "stop", UNIT)
    assert not orch.system.processes.running()
