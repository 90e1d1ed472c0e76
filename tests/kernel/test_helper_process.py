"""Native helper processes at work, started as orch starts them, in a namespace of their own."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.topology import nft, run
from orchestrator.engine.counters import Counters, State
from orchestrator.engine.privileges import own_user
from orchestrator.errors import HelperProcessError
from orchestrator.kernel.host import KernelHost
from orchestrator.kernel.netns import entered, find
from orchestrator.model import Netns
from orchestrator.supervise.launcher import LocalProcesses
from tests.namespaces import named_netns
from tests.processes import (
    NAME,
    OWN_HELPER,
    PROFILE,
    QUEUE,
    launch,
    local_processes,
    own_document,
    unsupervised,
)
from tests.waiting import until

PORT = 6969
RULES = f"""
table inet unit {{
    chain output {{
        type filter hook output priority 0
        udp dport {PORT} queue flags bypass to {QUEUE}
    }}
}}
"""


@pytest.fixture
def netns() -> Iterator[Netns]:
    with named_netns() as name:
        run("ip", "-n", name, "link", "set", "lo", "up")
        nft(name, RULES)
        yield find(name)


@pytest.fixture
def processes(tmp_path: Path, netns: Netns) -> Iterator[LocalProcesses]:
    with local_processes(tmp_path) as processes:
        yield processes


def counted(processes: LocalProcesses, netns: Netns) -> Counters:
    seen = processes.counters(PROFILE, netns, NAME)
    assert seen is not None
    assert seen.state is State.READY
    return seen.counters


def wait_for_packets(processes: LocalProcesses, netns: Netns, count: int) -> None:
    """The page is written after the verdict: the packet may be there first."""
    until(lambda: counted(processes, netns).packets == count, f"{count} packets counted")


def exchange(netns: Netns, count: int) -> None:
    """Send datagrams to ourselves through the queue, and see all of them come out of it."""
    with entered(netns):
        here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with here:
        here.bind(("127.0.0.1", PORT))
        here.settimeout(30)
        for number in range(count):
            here.sendto(b"%d" % number, ("127.0.0.1", PORT))
            assert here.recv(100) == b"%d" % number


def test_it_serves_its_queue_and_counts(processes: LocalProcesses, netns: Netns) -> None:
    pid = processes.start(launch(netns))
    exchange(netns, 50)
    wait_for_packets(processes, netns, 50)
    counters = counted(processes, netns)
    assert (counters.exceptions, counters.parse_errors, counters.overruns) == (0, 0, 0)
    assert counters.busy_ns
    (process,) = processes.running()
    assert process.pid == pid
    processes.stop(process)
    assert not processes.running()
    exchange(netns, 1)


def test_it_may_little_and_has_limits(processes: LocalProcesses, netns: Netns) -> None:
    pid = processes.start(launch(netns))
    status = dict(line.partition(":\t")[::2] for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert [int(status[f"Cap{kind}"], 16) for kind in ("Eff", "Prm", "Inh", "Bnd", "Amb")] == [0x1000, 0x1000, 0, 0, 0]
    own = str(own_user(str(processes.runtime_dir(PROFILE, netns)), NAME).uid)
    assert (status["Uid"].split(), status["Gid"].split(), status["Groups"].split()) == ([own] * 4, [own] * 4, [])
    assert (status["NoNewPrivs"], status["Seccomp"], status["Seccomp_filters"]) == ("1", "2", "2")
    limits = {line[:26].strip(): line[26:].split()[:2] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()}
    wanted = {"address space": 128 << 20, "data size": 128 << 20, "file size": 1 << 20}
    wanted |= {"open files": 64, "processes": 0, "core file size": 0}
    assert {name: limits[f"Max {name}"] for name in wanted} == {name: [str(n)] * 2 for name, n in wanted.items()}
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")


def test_a_helper_of_ones_own(processes: LocalProcesses, netns: Netns) -> None:
    """With a thread of its own, which does not keep it from ending in order."""
    source = f"import threading\nthreading.Thread(target=threading.Event().wait).start()\n{OWN_HELPER}"
    processes.start(launch(netns, own_document(source), source=source))
    exchange(netns, 2)
    wait_for_packets(processes, netns, 2)
    (process,) = processes.running()
    processes.stop(process)
    told = processes.counters(PROFILE, netns, NAME)
    assert told is not None
    assert told.state is State.STOPPING


def test_after_a_kill_packets_pass_and_its_successor_begins_anew(processes: LocalProcesses, netns: Netns) -> None:
    os.kill(processes.start(launch(netns)), signal.SIGKILL)
    until(lambda: "SIGKILL" in processes.last_words(PROFILE, netns, NAME), "its death is told")
    exchange(netns, 3)
    processes.start(launch(netns))
    assert counted(processes, netns).packets == 0
    exchange(netns, 1)
    wait_for_packets(processes, netns, 1)


def test_what_is_queued_while_it_starts_is_answered(processes: LocalProcesses, netns: Netns) -> None:
    """Rules may be there before it is, and packets then come between the binding of a queue and the answer to it."""
    flood = os.fork()
    if not flood:
        with entered(netns):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        while True:
            sender.sendto(b"x", ("127.0.0.1", PORT))
    try:
        processes.start(launch(netns))
    finally:
        os.kill(flood, signal.SIGKILL)
        os.waitpid(flood, 0)
    until(lambda: not any(row.waiting for row in KernelHost().queues(netns)), "no packet waits")
    assert counted(processes, netns).packets


def test_a_stopped_one_keeps_its_packets_and_goes_on(processes: LocalProcesses, netns: Netns) -> None:
    pid = processes.start(launch(netns))
    with unsupervised(processes, PROFILE, netns):
        os.kill(pid, signal.SIGSTOP)
        with entered(netns):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender:
            sender.sendto(b"x", ("127.0.0.1", PORT))
        (row,) = KernelHost().queues(netns)
        assert row.waiting == 1
        assert counted(processes, netns).packets == 0
        os.kill(pid, signal.SIGCONT)
    wait_for_packets(processes, netns, 1)


def test_a_queue_that_somebody_holds_is_named(processes: LocalProcesses, netns: Netns) -> None:
    processes.start(launch(netns))
    with pytest.raises(HelperProcessError) as caught:
        processes.start(launch(netns, profile="other"))
    assert f"cannot listen on queue {QUEUE}: it is held by another process" in caught.value.hint
