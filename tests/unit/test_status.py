"""What `orch status` says of native helper processes: how packets reach them, what they count, and when they hang."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.engine.counters import Counters, Snapshot, State
from orchestrator.fake import HOST, FakeKernel
from orchestrator.status import HelperStatus
from orchestrator.views import human, machine
from tests.hosts import FTP, Harness

NATIVE = "profile: ftp\nhelpers:\n  ftp: {engine: native}\n"
COUNTERS = Counters(packets=4, batches=3, expectations=2, refused=1, exceptions=5, overruns=6, busy_ns=80_000)


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def orch(kernel: FakeKernel, tmp_path: Path) -> Harness:
    return Harness(kernel.system(), tmp_path / "state")


def helper(orch: Harness) -> HelperStatus:
    (profile,) = orch.status().profiles
    (found,) = profile.helpers
    return found


def text(orch: Harness) -> str:
    return human.status_text(orch.status(), human.Paint(is_on=False))


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
    lines = text(orch).splitlines()[2:]
    assert [line.strip() for line in lines] == [
        "since its start: packets 4 (20 us each), expectations 2, refused 1, parse errors 0, exceptions 5, overruns 6",
        "last: refused: port 22 is outside 1024-65535",
    ]
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
    assert "hangs: packets wait, and it has done nothing for 1 min" in text(orch)
    says(kernel, beat_s=kernel.now)
    assert "hangs" not in text(orch)


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
    shown = text(orch)
    assert "no process (pid 7 exited with 1)" in shown
    assert "has no listener" in shown
    assert "since its start" not in shown


def test_conntrackd_counts_nothing(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    assert helper(orch).counters is None
    assert helper(orch).queueing == "registration"
    assert machine.status_value(orch.status())["profiles"][0]["helpers"][0]["counters"] is None
