"""What a service manager is told."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.supervise.notify import Manager


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@orch-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(address.replace("@", "\0", 1))
        made.settimeout(10)
        yield made, address


def test_says_what_systemd_reads(listener: tuple[socket.socket, str]) -> None:
    heard, address = listener
    manager = Manager(address)
    before = time.monotonic()
    manager.ready("profile ftp")
    manager.reloading("again")
    manager.stopping("bye")
    manager.alive()
    messages = [heard.recv(4096).decode().splitlines() for _ in range(4)]
    assert [messages[i] for i in (0, 2, 3)] == [
        ["READY=1", "STATUS=profile ftp"],
        ["STOPPING=1", "STATUS=bye"],
        ["WATCHDOG=1"],
    ]
    name, _, number = messages[1][1].partition("=")
    assert (messages[1][0], name, messages[1][2]) == ("RELOADING=1", "MONOTONIC_USEC", "STATUS=again")
    assert before <= int(number) / 1e6 + 1e-6 <= time.monotonic() + 1e-6


@pytest.mark.parametrize(
    ("usec", "pid", "watchdog_s"),
    [("3000000", "", 1.5), ("3000000", "own", 1.5), ("3000000", "1", 0.0), ("", "", 0.0), ("soon", "", 0.0)],
)
def test_takes_the_environment_so_that_no_child_has_it(usec: str, pid: str, watchdog_s: float) -> None:
    environ = {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": usec, "PATH": "/bin"}
    if pid:
        environ["WATCHDOG_PID"] = str(os.getpid()) if pid == "own" else pid
    assert Manager.take(environ) == Manager("/run/notify", watchdog_s)
    assert environ == {"PATH": "/bin"}


def test_nobody_listening_is_no_error(tmp_path: Path) -> None:
    Manager().ready("nobody asked")
    Manager(str(tmp_path / "gone")).ready("nobody is there")


def test_a_manager_that_does_not_read_blocks_nobody(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(address)
        for _ in range(1000):  # more than net.unix.max_dgram_qlen, which is 10 or 512
            Manager(address).alive()
