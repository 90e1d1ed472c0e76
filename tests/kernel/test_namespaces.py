"""A namespace that is deleted while a profile is applied in it: what it has on the host is released, and only that."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lab.control import control
from lab.ends import FTP_PORT
from lab.topology import ROUTER, ROUTER_FILTER, load_filter, run
from orchestrator.kernel.cthelper import KernelRegistry
from orchestrator.kernel.netns import find
from orchestrator.supervise.launcher import LocalProcesses
from tests.hosts import Harness
from tests.reports import REPORTS
from tests.waiting import until

BLUE = "orch-blue"
FTP = f"profile: ftp\nhelpers:\n  ftp: {{queueing: registration, attach: [{{path: incoming, ports: {FTP_PORT}}}]}}\n"
_WITHIN_S = 120.0  # a guest is slow to start a program
FIGURES = REPORTS.setdefault("namespaces: from the deletion until all is released", [])


@pytest.fixture
def blue() -> Iterator[str]:
    run("ip", "netns", "add", BLUE)
    try:
        yield BLUE
    finally:
        if Path("/run/netns", BLUE).exists():
            run("ip", "netns", "delete", BLUE)


@contextmanager
def container() -> Iterator[str]:
    """A namespace that has no name: the path by which it is found through the one process that lives there."""
    with subprocess.Popen(["unshare", "--net", "sleep", "1000"]) as process:
        try:
            path, here = f"/proc/{process.pid}/ns/net", find("").identity
            until(lambda: find(path).identity != here, "it is in a namespace of its own")
            yield path
        finally:
            process.kill()


def has_inode(name: str, identity: str) -> bool:
    """Whether a namespace has got the inode of another; if not it is made anew."""
    if find(name).identity == identity:
        return True
    run("ip", "netns", "delete", name)
    run("ip", "netns", "add", name)
    return False


def owners(orch: Harness) -> list[str]:
    return sorted(str(one.owner.netns) for one in orch.status().profiles)


@contextmanager
def released(orch: Harness, netns: str) -> Iterator[None]:
    """What is done here makes that a profile is torn down: all of its processes end, the supervisor last.

    To look for them again and again would take the time that the teardown needs: a guest has one CPU.
    """
    assert isinstance(orch.system.processes, LocalProcesses)
    helpers = [process.pid for process in orch.system.processes.running() if process.netns == netns]
    pidfds = [os.pidfd_open(pid) for pid in (*helpers, *orch.system.processes.supervisors("ftp", netns))]
    yield
    started = time.monotonic()
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], _WITHIN_S)[0], "its processes end"
        os.close(pidfd)
    FIGURES.append(f"{time.monotonic() - started:.1f} s")


def test_of_two_that_share_a_registration_the_last_one_takes_it_along(orch: Harness, blue: str) -> None:
    load_filter(ROUTER, ROUTER_FILTER)
    identity = find(blue).identity
    orch.apply(FTP, ROUTER)
    orch.apply(FTP, blue)
    registered = KernelRegistry().dump()
    with released(orch, identity):
        run("ip", "netns", "delete", blue)
    until(lambda: owners(orch) == [ROUTER], "its profile is forgotten", within_s=_WITHIN_S)
    assert KernelRegistry().dump() == registered
    with control() as session:
        session.transfer("PASV", 22001)
    with ExitStack() as stack, container() as path:
        identity = find(path).identity
        orch.apply(FTP, path)
        assert owners(orch) == sorted([ROUTER, path])
        orch.teardown("ftp", ROUTER)
        assert KernelRegistry().dump() == registered
        stack.enter_context(released(orch, identity))
    until(lambda: not owners(orch), "its profile is forgotten", within_s=_WITHIN_S)
    assert not KernelRegistry().dump()


def test_a_namespace_that_got_the_inode_of_a_deleted_one_has_nothing(orch: Harness, blue: str) -> None:
    """Nobody looks after the first one any more, so it is found out by the next command."""
    first = find(blue)
    orch.apply("profile: ftp\nhelpers: {ftp: {engine: kernel, attach: [{path: incoming, ports: 2121}]}}\n", blue)
    run("ip", "netns", "delete", blue)
    run("ip", "netns", "add", blue)
    until(lambda: has_inode(blue, first.identity), "the kernel gives the inode to another namespace")
    (status,) = orch.status().profiles
    assert "it is gone" in status.drift[0]
    assert not orch.apply(FTP, blue).plan.is_empty
    assert "netns orch-blue is gone, and profile ftp with it" in orch.warnings
    orch.teardown("ftp", blue)
