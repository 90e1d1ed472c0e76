"""Helper processes that die, hang and keep dying while there is traffic: each is replaced, and nobody waits for that.

ORCH_KILLS is how often a process is killed in each queueing, 10 times in the suite; `make soak-all` sets it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.control import control
from lab.ends import opened
from lab.topology import CLIENT, ROUTER, SERVER_IP, run
from orchestrator.kernel.netns import find
from orchestrator.model import Status
from orchestrator.ports import ProcessState, Supervised
from orchestrator.supervise.looks import LOOK_S
from tests.kernel.native import QUEUEINGS, Router, ftp_and_tftp, router
from tests.processes import unsupervised
from tests.reports import REPORTS
from tests.waiting import until

KILLS = int(os.environ.get("ORCH_KILLS", "10"))
OFTEN = "{restart_limit: 1000, restart_window: 1s}"
FIGURES = REPORTS.setdefault("supervision: how long nobody inspected", [])
HELPER_PORT = 7080
"""Of a helper that does what the payload says."""

FILTERS = f"add rule inet filter forward ct state new udp dport {HELPER_PORT} accept"

OBEDIENT = f"""
from orchestrator.engine.api import L4, NOTHING, Helper, Policy, Serves

class Obedient(Helper):
    serves = (Serves(L4.UDP, ({HELPER_PORT},)),)
    policies = (Policy("obedient", 1, 30),)

    def inspect(self, payload, direction, flow, private):
        while payload == b"hang":
            pass
        if payload == b"eat":
            self.eaten = b"x" * (40 << 20)
        return NOTHING
"""


@pytest.fixture(scope="module", params=QUEUEINGS)
def native(routed: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with router(ftp_and_tftp(request.param, OFTEN), request.param, tmp_path_factory.mktemp("state")) as made:
        yield made


def seen(native: Router, name: str = "ftp") -> Supervised | None:
    profile = native.process("tftp").profile
    return next((one for one in native.local.supervised(profile, find(ROUTER)) if one.name == name), None)


def restarts(native: Router) -> int:
    """How often it was replaced; -1 while it does not run, or is not yet enabled again."""
    one = seen(native)
    if one is None or one.state is not ProcessState.RUNNING:
        return -1
    statuses = {r.status for r in native.orch.system.registry.dump() if r.key.name == "ftp-us"}
    wanted = Status.ENABLED if native.queueing == "registration" else Status.DISABLED
    return one.restarts if statuses == {wanted} else -1


def restarted(native: Router, times: int) -> float:
    return until(lambda: restarts(native) == times, lambda: f"{times} restarts; it says {seen(native)}")


def supervisor(native: Router) -> int:
    (pid,) = native.local.supervisors(native.process("tftp").profile, find(ROUTER).identity)
    return pid


def percentiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"p50 {statistics.median(ordered):.3f} s, p99 {ordered[int(0.99 * (len(ordered) - 1))]:.3f} s"


def test_every_one_that_is_killed_is_replaced_and_new_sessions_pass_meanwhile(native: Router) -> None:
    gone, held = [], []
    for number in range(KILLS):
        before = restarts(native)
        killed = time.monotonic()
        native.kill()
        with control() as talk:
            talk.chat()
        held.append(time.monotonic() - killed)
        restarted(native, before + 1)
        gone.append(time.monotonic() - killed)
        if number % 10 == 0:
            with control() as talk:
                talk.transfer("PORT", 40200)
    FIGURES.append(
        f"{native.queueing}: {KILLS} kills: replaced after {percentiles(gone)}; "
        f"a session that began then had its first answer after {percentiles(held)}"
    )


def test_a_stopped_one_is_found_and_replaced(native: Router) -> None:
    before = restarts(native)
    stopped = time.monotonic()
    os.kill(native.process().pid, signal.SIGSTOP)
    until(lambda: restarts(native) != before, "it is found")
    found = time.monotonic() - stopped
    restarted(native, before + 1)
    after = seen(native)
    assert after is not None
    assert after.reason.startswith("hung: stopped by a signal")
    FIGURES.append(f"{native.queueing}: stopped (SIGSTOP): found after {found:.2f} s")
    with control() as talk:
        talk.transfer("PORT", 40201)


def test_without_its_supervisor_it_goes_on_and_apply_gives_it_another(native: Router) -> None:
    pid = native.process().pid
    os.kill(supervisor(native), signal.SIGKILL)
    until(lambda: not native.process().watched, "the supervisor is gone")
    with control() as talk:
        talk.transfer("PORT", 40202)
    assert "ftp: its supervisor is gone" in native.orch.status().profiles[0].drift
    native.apply()
    assert (native.process().pid, native.process().watched) == (pid, True)
    before = restarts(native)
    os.kill(pid, signal.SIGSTOP)  # no signal tells of that: it is not a child
    restarted(native, before + 1)


def test_a_supervisor_that_is_stopped_is_no_obstacle(native: Router) -> None:
    pid = native.process().pid
    with unsupervised(native.local, native.process().profile, find(ROUTER)):
        native.apply()
    assert (native.process().pid, native.process().watched) == (pid, True)
    with control() as talk:
        talk.transfer("PORT", 40203)


def test_a_registration_stays_disabled_while_another_namespace_is_deaf(native: Router) -> None:
    """What one supervisor knows of another is a mark in the state directory."""
    if native.queueing == "rules":
        assert not (native.orch.state_dir / "deaf").exists() or not list((native.orch.state_dir / "deaf").iterdir())
        return
    mark = native.orch.state_dir / "deaf" / "ftp-us,ip,tcp@other@0-1"
    mark.touch()
    times = restarts(native)
    native.kill()
    until(lambda: (one := seen(native)) is not None and one.restarts == times + 1, "it is replaced")
    status = {r.key.l3proto: r.status for r in native.orch.system.registry.dump() if r.key.name == "ftp-us"}
    assert set(status.values()) == {Status.DISABLED}
    mark.unlink()
    native.apply()
    assert restarts(native) == times + 1


@pytest.fixture
def full(routed: None, tmp_path: Path) -> Iterator[Router]:
    """A profile at work whose state directory has no room for anything more."""
    tmp_path.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "size=768k", "full", str(tmp_path))
    try:
        with router(ftp_and_tftp("rules", OFTEN), "rules", tmp_path / "state") as made:
            with (tmp_path / "rest").open("wb", buffering=0) as rest, contextlib.suppress(OSError):
                while rest.write(bytes(4096)):
                    pass
            yield made
    finally:
        run("umount", "--lazy", str(tmp_path))


def test_a_full_disk_loses_lines_of_logs_and_nothing_else(full: Router) -> None:
    for times in (1, 2, 3):
        full.kill()
        restarted(full, times)
        with control() as talk:
            talk.transfer("PORT", 40204)


@pytest.fixture(scope="module")
def obedient(routed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """A helper of one's own; those of others than root are not run, so it cannot be below /tmp."""
    with tempfile.TemporaryDirectory(prefix="orch-test-", dir="/run") as directory:
        file = Path(directory, "obedient.py")
        file.write_text(OBEDIENT)
        text = (
            f"profile: own\nhelpers: {{ftp: {{use: {file}, attach: {{path: incoming}}, "
            "process: {restart_limit: 2, restart_window: 1h}}}\n"
        )
        with router(text, "rules", tmp_path_factory.mktemp("state"), filters=FILTERS) as made:
            yield made


def obey(word: bytes) -> None:
    with opened(CLIENT, socket.SOCK_DGRAM) as client:
        client.sendto(word, (SERVER_IP, HELPER_PORT))


def test_an_endless_loop_is_found_and_its_log_says_where_it_was(obedient: Router) -> None:
    """The packet that it hangs over is lost with it; without packets nobody would look."""
    started = time.monotonic()
    obey(b"hang")
    processes = obedient.local
    until(lambda: any(one.reason for one in processes.supervised("own", find(ROUTER))), "it is found")
    found = time.monotonic() - started
    until(lambda: processes.supervised("own", find(ROUTER))[0].restarts == 1, "it is replaced")
    assert processes.supervised("own", find(ROUTER))[0].reason == "hung: packets wait, and it answers none"
    assert "obedient.py" in obedient.log("ftp")
    assert found > 2 * LOOK_S - 0.5
    FIGURES.append(f"endless loop: found after {found:.2f} s")


def test_one_that_keeps_hanging_is_given_up(obedient: Router) -> None:
    def is_fatal() -> bool:
        obey(b"hang")
        return obedient.local.supervised("own", find(ROUTER))[0].state is ProcessState.FATAL

    until(is_fatal, "it is given up")
    fatal = obedient.local.supervised("own", find(ROUTER))[0]
    assert fatal.reason == "restarted 2 times in 3600 s, the last time: hung: packets wait, and it answers none"
    obey(b"anything")


@contextlib.contextmanager
def little_memory(pid: int, directory: Path) -> Iterator[None]:
    """A control group in which a process gets 8 MiB more than it has, and is killed if it wants more still.

    The kernel says so on the console, where nobody looks for it: that is off meanwhile.
    """
    level = Path("/proc/sys/kernel/printk")
    before = level.read_text()
    level.write_text("1")
    run("mount", "-t", "cgroup2", "none", str(directory))
    group = directory / "little"
    try:
        (directory / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / "memory.max").write_text("8M")
        (group / "cgroup.procs").write_text(str(pid))
        yield
        group.rmdir()
    finally:
        run("umount", str(directory))
        level.write_text(before)


def test_one_that_the_kernel_kills_for_want_of_memory_is_replaced_and_that_is_told(
    obedient: Router, tmp_path: Path
) -> None:
    obedient.apply()  # it was given up above
    tmp_path.mkdir(exist_ok=True)
    with little_memory(obedient.process().pid, tmp_path):
        obey(b"eat")
        until(lambda: obedient.local.supervised("own", find(ROUTER))[0].restarts == 1, "it is replaced")
    assert obedient.local.supervised("own", find(ROUTER))[0].reason == "killed by SIGKILL: out of memory"
