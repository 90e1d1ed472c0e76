"""What `orch status` says of native helper processes: how packets reach them, what they count, and when they hang."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.engine.counters import Counters, Snapshot, State
from orchestrator.fake import HOST, FakeKernel
from orchestrator.model import L4Proto
from orchestrator.ports import Lifetimes, ProcessState, Supervised
from orchestrator.session import ExitCode
from orchestrator.status import HelperState, HelperStatus
from orchestrator.views import human, machine
from orchestrator.views import status as view
from tests.hosts import FTP, Harness

NATIVE = "profile: ftp\nhelpers:\n  ftp: {engine: native}\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to ask for registrations")
COUNTERS = Counters(packets=4, batches=3, expectations=2, refused=1, exceptions=5, overruns=6, busy_ns=80_000)


def helper(orch: Harness) -> HelperStatus:
    (profile,) = orch.status().profiles
    (found,) = profile.helpers
    return found


def text(orch: Harness) -> str:
    return view.text(orch.status(), human.Paint(is_on=False), now_s=0.0)


def says(kernel: FakeKernel, *, beat_s: float, note: str = "") -> None:
    kernel.counters["ftp"] = Snapshot(1, State.READY, 1, int(beat_s * 1e9), COUNTERS, note)


def wait_in_queue(kernel: FakeKernel, queue_num: int) -> None:
    queues = kernel.at(HOST).queues
    queues[queue_num] = replace(queues[queue_num], waiting=1)


def test_a_native_helper_is_queued_by_rules_and_binds_both_queues(orch: Harness) -> None:
    orch.apply(NATIVE)
    seen = helper(orch)
    assert (seen.engine, seen.queueing, len(seen.queues)) == ("native", "rules", 2)
    assert all(queue.is_bound for queue in seen.queues)
    assert {state for _, state in seen.registrations} == {"disabled"}
    assert seen.pid


def test_with_queueing_by_registration_its_queue_is_the_registrations(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(NATIVE.replace("native", "native, queueing: registration"))
    seen = helper(orch)
    assert seen.queueing == "registration"
    assert {queue.queue_num for queue in seen.queues} == {r.queue_num for r in kernel.registrations.values()}


def test_what_it_counts_is_shown(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(NATIVE)
    says(kernel, beat_s=kernel.now, note="refused: port 22 is outside 1024-65535")
    heading, row, wrong = text(orch).splitlines()[1:]
    at = heading.index("PACKETS")
    assert row[at:].split()[:1] == ["4"]
    assert row.endswith("refused: port 22 is outside 1024-65535")
    assert wrong.strip() == "exceptions 5, overruns 6"
    shown = machine.status_value(orch.status())["profiles"][0]["helpers"][0]
    assert shown["counters"]["busy_ns"] == 80_000
    assert shown["note"] == "refused: port 22 is outside 1024-65535"
    assert shown["hung_s"] == 0


def test_a_packet_that_nobody_touches_is_a_hang(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(NATIVE)
    says(kernel, beat_s=kernel.now)
    wait_in_queue(kernel, helper(orch).queues[1].queue_num)
    assert not helper(orch).hung_s
    kernel.now += 60
    assert helper(orch).state is HelperState.HUNG
    assert not orch.status().is_right
    assert "packets wait, and it has done nothing for 1 min" in text(orch)
    says(kernel, beat_s=kernel.now)
    assert helper(orch).state is HelperState.RUNNING
    assert orch.status().is_right


def test_silence_without_packets_is_none(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(NATIVE)
    says(kernel, beat_s=kernel.now)
    kernel.now += 3600
    assert not helper(orch).hung_s


def test_a_dead_one_says_how_it_ended_and_counts_nothing(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(NATIVE)
    says(kernel, beat_s=kernel.now)
    kernel.last_words["ftp"] = "pid 7 exited with 1"
    kernel.kill(helper(orch).pid)
    seen = helper(orch)
    assert seen.state is HelperState.NO_PROCESS
    assert (seen.last_error, seen.counters) == ("pid 7 exited with 1", None)
    assert not any(queue.is_bound for queue in seen.queues)


def test_conntrackd_counts_nothing(orch: Harness) -> None:
    orch.apply(FTP)
    assert helper(orch).counters is None
    assert helper(orch).queueing == "registration"
    assert machine.status_value(orch.status())["profiles"][0]["helpers"][0]["counters"] is None


def supervised(state: ProcessState, pid: int = 0) -> tuple[Supervised, ...]:
    return (Supervised("ftp", state, pid, 3, 1000.0, "exited with 1"),)


def test_what_its_supervisor_says_is_its_state(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(NATIVE)
    at = ("ftp", HOST.identity)
    pid = helper(orch).pid
    for state in ProcessState:
        kernel.supervised[at] = supervised(state, pid)
        assert helper(orch).state == HelperState(state)
        assert orch.status().is_right == (state is ProcessState.RUNNING)
    kernel.kill(pid)
    kernel.supervised[at] = supervised(ProcessState.FATAL)
    seen = helper(orch)
    assert (seen.state, seen.restarts, seen.last_error) == (HelperState.FATAL, 3, "exited with 1")
    kernel.supervised[at] = supervised(ProcessState.RUNNING, pid)
    assert helper(orch).state is HelperState.NO_PROCESS  # it died just now, and nobody has noticed yet


def test_a_process_without_a_supervisor_is_told_of(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(NATIVE)
    kernel.running_processes = {
        pid: (replace(seen, watched=False), launch) for pid, (seen, launch) in kernel.running_processes.items()
    }
    seen = helper(orch)
    assert (seen.state, seen.restarts, seen.lifetimes) == (HelperState.UNSUPERVISED, None, None)
    assert not orch.status().is_right


def test_expectations_and_connections_are_those_of_its_names(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(NATIVE)
    kernel.supervised["ftp", HOST.identity] = supervised(ProcessState.RUNNING, helper(orch).pid)
    assert helper(orch).lifetimes == Lifetimes()
    kernel.lifetimes["ftp", HOST.identity] = {"ftp-us": Lifetimes(7, 4, 2, 1), "ftp": Lifetimes(100, 100)}
    kernel.at(HOST).connections = {"ftp-us": 5, "ftp": 50}
    assert helper(orch).lifetimes == Lifetimes(7, 4, 2, 1)
    assert helper(orch).connections == 5
    shown = machine.status_value(orch.status())["profiles"][0]["helpers"][0]
    assert shown["lifetimes"] == {"made": 7, "used": 4, "expired": 2, "cancelled": 1}
    assert (shown["connections"], shown["state"], shown["restarts"]) == (5, "running", 3)


def test_a_helper_in_the_kernel_has_no_process(orch: Harness, kernel: FakeKernel) -> None:
    kernel.modules_available.update({"nf_conntrack_ftp": (("ftp", L4Proto.TCP),), "nf_nat_ftp": ()})
    orch.apply(NATIVE.replace("native", "kernel"))
    kernel.at(HOST).connections = {"ftp": 2}
    seen = helper(orch)
    assert (seen.state, seen.connections, seen.lifetimes) == (HelperState.IN_KERNEL, 2, None)
    assert orch.status().is_right


def watch(state_dir: Path, stdout: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "orchestrator", "status", "nobodys", "--watch", "--interval", "0.1"]
    return subprocess.Popen([*command, "--state-dir", str(state_dir)], stdout=stdout)


def interrupted(child: subprocess.Popen[bytes]) -> int:
    child.send_signal(signal.SIGINT)
    return child.wait(30)


@needs_root
def test_watching_goes_on_until_interrupted(tmp_path: Path) -> None:
    with watch(tmp_path, subprocess.PIPE) as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(3)] == [b"Profile nobodys is not applied.\n"] * 3
        assert interrupted(child) == ExitCode.DIFFERS, "who asks for a profile wants it applied"


@needs_root
def test_watching_on_a_terminal_begins_at_the_top_each_time(tmp_path: Path) -> None:
    ours, terminal = pty.openpty()
    with watch(tmp_path, terminal) as child:
        os.close(terminal)
        seen = b""
        while seen.count(b"\n") < 2:
            seen += os.read(ours, 4096)
        assert interrupted(child) == ExitCode.DIFFERS, "who asks for a profile wants it applied"
    os.close(ours)
    assert seen.startswith(b"\x1b[H\x1b[JProfile nobodys is not applied.\r\n\x1b[H\x1b[J")
