"""A router on which native helpers work, and what a test does to them: stop, kill, count, lose packets."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.ends import FTP_PORT, TFTP_PORT
from lab.topology import ROUTER, ROUTER_FILTER, load_filter, nft
from orchestrator.engine.counters import Counters
from orchestrator.kernel.netns import find
from orchestrator.model import Status
from orchestrator.ports import ProcessSeen
from orchestrator.supervise.launcher import LocalProcesses
from orchestrator.verify.expectations import Events, expectations_made
from tests.hosts import Harness
from tests.kernel.conftest import clean_orch
from tests.processes import unsupervised
from tests.reports import REPORTS
from tests.waiting import WITHIN_S, until

QUEUEINGS = ("rules", "registration")
ACTIVE = {False: "PORT", True: "EPRT"}
PASSIVE = {False: "PASV", True: "EPSV"}
families = pytest.mark.parametrize("ip6", [False, True], ids=["ip", "ip6"])
FIGURES = REPORTS.setdefault("native engine: how long traffic was held", [])


def ftp_and_tftp(queueing: str, process: str = "{restart: never}") -> str:
    """A profile for the scripted servers; when the process of ftp is dead it stays so, unless told otherwise."""
    return (
        "profile: native\nhelpers:\n"
        f"  ftp: {{queueing: {queueing}, attach: [{{path: incoming, ports: {FTP_PORT}}}], process: {process}}}\n"
        f"  tftp: {{queueing: {queueing}, attach: [{{path: incoming, ports: {TFTP_PORT}}}]}}\n"
    )


def starts_with(word: str) -> str:
    """The match for payloads to the scripted FTP server, or from it, that begin with four characters."""
    port = "sport" if word[0].isdigit() else "dport"
    return f"tcp {port} {FTP_PORT} @ih,0,32 0x{word.encode().hex()}"


def kill(*pids: int) -> None:
    """SIGKILL, and wait until the kernel has let go of everything the processes held."""
    with contextlib.ExitStack() as stack:
        pidfds = [os.pidfd_open(pid) for pid in pids]
        for pidfd in pidfds:
            stack.callback(os.close, pidfd)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], WITHIN_S)[0]


@dataclass(slots=True)
class Router:
    """The router of the topology with a profile applied; `events` are the expectations made on it."""

    orch: Harness
    text: str
    queueing: str
    events: Events

    def apply(self) -> None:
        self.orch.apply(self.text, ROUTER)

    def process(self, name: str = "ftp") -> ProcessSeen:
        return next(p for p in self.orch.system.processes.running() if p.name == name)

    def counters(self, name: str = "ftp") -> Counters:
        """As they are once every packet of its queues was counted; the process writes them some milliseconds late."""
        until(lambda: self._counted(name).packets >= self._queued(name), "all packets counted")
        return self._counted(name)

    def _counted(self, name: str) -> Counters:
        process = self.process(name)
        seen = self.orch.system.processes.counters(process.profile, find(ROUTER), name)
        assert seen is not None
        return seen.counters

    def _queued(self, name: str) -> int:
        mine = self.queues(name)
        rows = self.orch.system.host.queues(find(ROUTER))
        return sum(row.seen - row.user_dropped for row in rows if row.queue_num in mine)

    def log(self, name: str) -> str:
        return (self.local.runtime_dir(self.process(name).profile, find(ROUTER)) / f"{name}.log").read_text()

    @property
    def local(self) -> LocalProcesses:
        processes = self.orch.system.processes
        assert isinstance(processes, LocalProcesses)
        return processes

    def queues(self, name: str = "ftp") -> tuple[int, ...]:
        (profile,) = self.orch.status().profiles
        return next(tuple(q.queue_num for q in h.queues) for h in profile.helpers if h.name == name)

    def waiting(self, *queues: int) -> int:
        return sum(row.waiting for row in self.orch.system.host.queues(find(ROUTER)) if row.queue_num in queues)

    def dropped(self, queue_num: int) -> int:
        """Packets of a queue that the kernel did not keep."""
        rows = self.orch.system.host.queues(find(ROUTER))
        return next(row.queue_dropped + row.user_dropped for row in rows if row.queue_num == queue_num)

    def wait_for(self, waiting: int, *queues: int) -> None:
        until(lambda: self.waiting(*queues) >= waiting, f"{waiting} packets in queues {queues}")

    @contextlib.contextmanager
    def stopped(self, name: str = "ftp") -> Iterator[int]:
        """A helper process that does nothing until the block ends, and nobody replaces it; its pid."""
        process = self.process(name)
        with unsupervised(self.local, process.profile, find(ROUTER)):
            os.kill(process.pid, signal.SIGSTOP)
            try:
                yield process.pid
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)

    def kill(self, name: str = "ftp") -> None:
        kill(self.process(name).pid)

    def wait_disabled(self, name: str) -> float:
        """Wait for the supervisor: seconds until no registration of that name is enabled."""
        return until(lambda: self._statuses(name) == {Status.DISABLED}, f"{name} disabled")

    def _statuses(self, name: str) -> set[Status]:
        return {r.status for r in self.orch.system.registry.dump() if r.key.name == name}


@contextlib.contextmanager
def router(text: str, queueing: str, state: Path, *, filters: str = "") -> Iterator[Router]:
    """A router that drops what nobody expects, except what `filters` accepts (nft commands)."""
    with clean_orch(state) as orch, expectations_made(ROUTER) as events:
        load_filter(ROUTER, ROUTER_FILTER)
        if filters:
            load_filter(ROUTER, filters)
        orch.apply(text, ROUTER)
        yield Router(orch, text, queueing, events)


@dataclass(frozen=True, slots=True)
class Losses:
    """What is being lost on its way to a host."""

    netns: str

    def count(self) -> int:
        listing = nft(self.netns, "list table inet lossy")
        return int(listing.partition("packets ")[2].split()[0])

    def wait(self) -> None:
        """Wait until one more is lost than until now."""
        before = self.count()
        until(lambda: self.count() > before, "something is lost")


@contextlib.contextmanager
def losing(netns: str, match: str) -> Iterator[Losses]:
    """Lose every packet that comes to a host and matches, until the block ends."""
    chain = f"chain arriving {{ type filter hook prerouting priority -450; {match} counter drop; }};"
    load_filter(netns, f"table inet lossy {{ {chain} }}")
    try:
        yield Losses(netns)
    finally:
        nft(netns, "delete table inet lossy")
