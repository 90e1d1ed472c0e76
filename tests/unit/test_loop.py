"""The packet loop, on queues of the running kernel in a network namespace of the test's own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from orchestrator.engine import ctnetlink, loop, netlink, nfqueue
from orchestrator.engine.api import L4, Tuple
from orchestrator.engine.counters import Page, read
from orchestrator.engine.loop import BATCH, Answers, Loop
from orchestrator.engine.nfqueue import ACCEPT, Change, Packet

QUEUE_NUM = 7
QUEUED_PORT = 5000
CLONE_NEWNET = 0x40000000
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
HEADERS_LEN = 28  # IPv4 and UDP
WAIT_S = 20.0
NOBODY = Tuple(bytes(4), bytes(4), 1, 1)


@dataclass(slots=True)
class Outcome:
    verdict: int = ACCEPT
    change: Change | None = None
    after: tuple[bytes, ...] = ()
    made: tuple[object, ...] = ()
    rewritten: tuple[object, ...] = ()
    refused: tuple[str, ...] = ()
    error: Exception | None = None


@dataclass(slots=True)
class Recorder:
    """Accepts everything, or does as the payload says; keeps what it saw."""

    outcomes: dict[bytes, Outcome] = field(default_factory=dict)
    seen: list[bytes] = field(default_factory=list)
    seen_when_drained: SimpleQueue[int] = field(default_factory=SimpleQueue)

    def inspect(self, packet: Packet) -> Outcome:
        payload = bytes(packet.payload[HEADERS_LEN:])
        self.seen.append(payload)
        if payload == b"raise":
            raise ZeroDivisionError(payload)
        return self.outcomes.get(payload, Outcome())

    def drained(self) -> None:
        self.seen_when_drained.put(len(self.seen))


def accept(packet: Packet) -> int:
    return ACCEPT


@dataclass(frozen=True, slots=True)
class Net:
    """Two ends on one loopback device; what goes to the receiver is queued on `queue`."""

    queue: socket.socket
    control: socket.socket
    sender: socket.socket
    receiver: socket.socket

    def send(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.sender.send(payload)

    def receive(self, count: int) -> list[bytes]:
        return [self.receiver.recv(1 << 16) for _ in range(count)]


def make_net(receive_buffer: int) -> Net:
    """In a thread that gives up its namespace; the new one lives as long as its sockets."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise PermissionError(ctypes.get_errno(), "unshare")
    rule = f"iptables -A OUTPUT -p udp --dport {QUEUED_PORT} -j NFQUEUE --queue-num {QUEUE_NUM}"
    for command in ("ip link set lo up", rule):
        subprocess.run(command.split(), check=True, capture_output=True)
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    receiver.settimeout(WAIT_S)
    receiver.bind(("127.0.0.1", QUEUED_PORT))
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 << 20)  # packets that wait count as its own
    sender.settimeout(WAIT_S)
    sender.connect(receiver.getsockname())
    return Net(netlink.open_queue_socket(receive_buffer), netlink.open_control_socket(), sender, receiver)


def bind_without_conntrack(queue: socket.socket) -> None:
    """As `encode_config`, for kernels that have no NFQA_CT: without its last two attributes, MASK and FLAGS."""
    message = nfqueue.encode_config(QUEUE_NUM, is_fail_open=False, max_len=1024)[:-16]
    queue.send(struct.pack("=I", len(message)) + message[4:])
    assert netlink.answer(queue.recv(4096)) == (0, 0)


@contextlib.contextmanager
def a_net(receive_buffer: int = loop.RECEIVE_BUFFER) -> Iterator[Net]:
    with ThreadPoolExecutor(1) as thread:
        try:
            net = thread.submit(make_net, receive_buffer).result()
        except (PermissionError, FileNotFoundError) as error:
            pytest.skip(f"needs root, iproute2 and iptables: {error}")
    try:
        bind_without_conntrack(net.queue)
        yield net
    finally:
        for one in (net.queue, net.control, net.sender, net.receiver):
            one.close()


@pytest.fixture
def net() -> Iterator[Net]:
    with a_net() as made:
        yield made


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(str(tmp_path / "page"))


def make_loop(net: Net, recorder: Recorder, page: Page) -> Loop:
    return Loop(net.queue, make_answers(net, page), recorder, page, accept_verdict=accept)


def make_answers(net: Net, page: Page) -> Answers:
    return Answers(net.queue, ctnetlink.Client(net.control), page.counters)


@contextlib.contextmanager
def running(made: Loop) -> Iterator[None]:
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield
    finally:
        made.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_packets_one_by_one(net: Net, recorder: Recorder, page: Page, tmp_path: Path) -> None:
    payloads = [b"%d" % number for number in range(50)]
    with running(make_loop(net, recorder, page)):
        for payload in payloads:
            net.send(payload)
            assert net.receive(1) == [payload]
    assert recorder.seen == payloads
    written = read(str(tmp_path / "page"))
    assert written.counters == page.counters
    assert (written.counters.packets, written.pid) == (50, os.getpid())
    assert written.counters.busy_ns > 0
    assert written.beats >= 2


def test_packets_that_wait_are_read_together_and_in_order(net: Net, recorder: Recorder, page: Page) -> None:
    payloads = [b"%d" % number for number in range(10 * BATCH)]
    net.send(*payloads)
    with running(make_loop(net, recorder, page)):
        assert net.receive(len(payloads)) == payloads
    assert recorder.seen == payloads
    assert page.counters.packets == len(payloads)
    assert page.counters.batches <= 15  # one alone, ten batches, the end, and perhaps one cut by the clock


def test_stop_answers_what_waits_before_it(net: Net, recorder: Recorder, page: Page) -> None:
    payloads = [b"%d" % number for number in range(100)]
    net.send(*payloads)
    made = make_loop(net, recorder, page)
    made.stop()
    made.run()
    assert net.receive(100) == payloads


def test_a_pause_that_cannot_be_asked_for_yet_is_asked_for_again(net: Net, recorder: Recorder, page: Page) -> None:
    """As when memory is short; whoever rests is let go on."""

    class Short(socket.socket):
        refusals = 3

        def send(self, data: Any, flags: int = 0) -> int:
            if threading.current_thread() is threading.main_thread() and self.refusals:
                self.refusals -= 1
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
            return super().send(data, flags)

    with Short(fileno=os.dup(net.queue.fileno())) as short:
        answers = Answers(net.queue, ctnetlink.Client(net.control), page.counters)
        made = Loop(short, answers, recorder, page, accept_verdict=accept)
        with running(made):
            with made.paused():
                net.send(b"meanwhile")
                assert recorder.seen == []
            assert net.receive(1) == [b"meanwhile"]
    assert short.refusals == 0


def test_the_inspector_is_told_when_nothing_waits(net: Net, recorder: Recorder, page: Page) -> None:
    net.send(*(b"%d" % number for number in range(100)))
    with running(make_loop(net, recorder, page)):
        assert recorder.seen_when_drained.get(timeout=WAIT_S) == 100
    assert net.receive(100)[-1] == b"99"


@pytest.mark.parametrize("waiting", [1, 10])
def test_an_exception_costs_nobody_a_packet(
    waiting: int, net: Net, recorder: Recorder, page: Page, capfd: pytest.CaptureFixture[str]
) -> None:
    payloads = [b"before", *[b"raise"] * waiting, b"after"]
    net.send(*payloads)
    with running(make_loop(net, recorder, page)):
        assert net.receive(len(payloads)) == payloads
    assert page.counters.exceptions == waiting
    assert capfd.readouterr().err.count("ZeroDivisionError: b'raise'") == 1


class _MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("it says nothing")


def test_an_error_that_cannot_be_told_costs_nobody_a_packet(
    net: Net, recorder: Recorder, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text is code of a helper, and the log may lie on a full disk."""
    recorder.outcomes[b"mute"] = Outcome(error=_MuteError())
    with Path("/dev/full").open("wb", buffering=0) as full, running(make_loop(net, recorder, page)):
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        for payload in (b"mute", b"raise", b"and on"):
            net.send(payload)
            assert net.receive(1) == [payload]
    assert page.counters.exceptions == 2


def test_a_verdict_that_cannot_be_encoded_costs_nobody_a_packet(net: Net, recorder: Recorder, page: Page) -> None:
    recorder.outcomes[b"huge"] = Outcome(change=Change(payload=bytes(65536)))
    with running(make_loop(net, recorder, page)):
        net.send(b"huge")
        assert net.receive(1) == [b"huge"]
    assert page.counters.exceptions == 1


def test_an_error_of_the_helper_is_counted_beside_its_verdict(
    net: Net, recorder: Recorder, page: Page, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder.outcomes[b"x"] = Outcome(error=LookupError("of a helper"), made=(1, 2), refused=("a",), rewritten=(1,))
    with running(make_loop(net, recorder, page)):
        net.send(b"x")
        net.receive(1)
    counters = page.counters
    assert (counters.exceptions, counters.expectations, counters.refused, counters.rewritten) == (1, 2, 1, 1)
    assert "LookupError: of a helper" in capfd.readouterr().err


def udp_packet(payload: bytes) -> bytes:
    """IPv4 to the receiver, without the checksum that UDP may lack."""
    udp = struct.pack("!HHHH", QUEUED_PORT, QUEUED_PORT, 8 + len(payload), 0) + payload
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, b"\x7f\0\0\1", b"\x7f\0\0\1")
    total = sum(struct.unpack("!10H", header))
    checksum = ~((total >> 16) + (total & 0xFFFF)) & 0xFFFF
    return header[:10] + struct.pack("!H", checksum) + header[12:] + udp


def test_rewritten_packets_that_exceed_the_send_buffer_together(net: Net, recorder: Recorder, page: Page) -> None:
    payloads = [b"%d" % number + bytes(60000) for number in range(4)]
    for payload in payloads:
        recorder.outcomes[payload] = Outcome(change=Change(payload=udp_packet(b"new" + payload)))
    net.queue.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)  # the kernel doubles it
    net.send(b"first", *payloads)
    with running(make_loop(net, recorder, page)):
        assert net.receive(5) == [b"first", *(b"new" + payload for payload in payloads)]
    assert page.counters.kernel_errors == 0


def test_the_largest_packets_pass_whole(net: Net, recorder: Recorder, page: Page) -> None:
    largest = bytes(range(256)) * 255
    with running(make_loop(net, recorder, page)):
        net.send(largest)
        assert net.receive(1) == [largest]
    assert recorder.seen == [largest]
    assert page.counters.truncated == 0


def test_requests_come_after_the_verdict(net: Net, recorder: Recorder, page: Page) -> None:
    request = ctnetlink.encode_conntrack_update(NOBODY, L4.UDP, 0, helper=b"x")
    recorder.outcomes[b"x"] = Outcome(after=(request, request))
    with running(make_loop(net, recorder, page)):
        net.send(b"x")
        net.receive(1)
        net.send(b"y")
        net.receive(1)
    assert page.counters.kernel_errors == 2  # ENOENT each


def test_a_request_comes_after_the_verdicts_on_the_packets_before(net: Net, page: Page) -> None:
    """Also on those that were read together with the packet that leads to it."""
    answers = make_answers(net, page)
    arrived: list[bytes] = []

    class Asking(Recorder):
        def inspect(self, packet: Packet) -> Outcome:
            if bytes(packet.payload[HEADERS_LEN:]) == b"ask":
                answers.request(ctnetlink.encode_conntrack_update(NOBODY, L4.UDP, 0, helper=b"x"))
                arrived.extend(net.receive(3))
            return Outcome()

    net.send(b"a", b"b", b"c", b"ask", b"d")
    with running(Loop(net.queue, answers, Asking(), page, accept_verdict=accept)):
        pass  # what waits is answered before the end
    assert arrived == [b"a", b"b", b"c"]
    assert net.receive(2) == [b"ask", b"d"]


def test_what_the_kernel_says_of_verdicts_is_counted(net: Net, recorder: Recorder, page: Page) -> None:
    net.queue.send(nfqueue.encode_plain_verdict(4711, QUEUE_NUM, ACCEPT))
    net.queue.send(nfqueue.encode_plain_verdict(4711, QUEUE_NUM + 1, ACCEPT))
    with running(make_loop(net, recorder, page)):
        net.send(b"x")
        assert net.receive(1) == [b"x"]
    assert (page.counters.stale, page.counters.kernel_errors, page.counters.packets) == (1, 1, 1)


def test_losses_are_counted_and_do_not_outlast_themselves(recorder: Recorder, page: Page) -> None:
    payloads = [b"%04d" % number + bytes(1000) for number in range(400)]
    with a_net(receive_buffer=100_000) as net:
        made = make_loop(net, recorder, page)
        net.send(*payloads)
        with running(made):
            net.receive(1)
            net.send(b"later")
            while net.receive(1) != [b"later"]:
                pass
        delivered = len(recorder.seen) - 1
        assert 0 < delivered < 400
        assert recorder.seen == [*payloads[:delivered], b"later"]
        assert page.counters.overruns == 400 - delivered


def test_a_queue_that_cannot_be_bound(net: Net, recorder: Recorder, page: Page) -> None:
    """EPERM where another socket has it; EOPNOTSUPP comes first from a kernel without NFQA_CT. Packets go on."""
    net.send(b"before")
    with netlink.open_queue_socket(4096) as other:
        answers = Answers(other, ctnetlink.Client(net.control), page.counters)
        made = Loop(other, answers, recorder, page, accept_verdict=accept)
        with pytest.raises(OSError) as raised:  # noqa: PT011
            made.bind(QUEUE_NUM, is_fail_open=True)
    assert raised.value.errno in (errno.EPERM, errno.EOPNOTSUPP)


@pytest.mark.slow
def test_a_binding_whose_answer_is_lost_is_asked_for_again(
    recorder: Recorder, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer is full: EBUSY says then that the queue is bound, and EPERM that another socket has it."""
    monkeypatch.setattr(nfqueue, "_NFQA_CFG_F_CONNTRACK", 0)  # a kernel may have no NFQA_CT
    with a_net() as net:
        made = make_loop(net, recorder, page)
        bind_from(net.control, QUEUE_NUM + 2)
        for number in (QUEUE_NUM + 1, QUEUE_NUM + 2):
            net.queue.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 100_000)
            net.send(*[bytes(1000)] * 20)
            net.queue.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel makes it 2304
            with contextlib.suppress(PermissionError):
                made.bind(number, is_fail_open=True)
        assert made.queues == {QUEUE_NUM + 1: True}
        assert bind_from(net.control, QUEUE_NUM + 1) == errno.EPERM
        assert net.receive(40) == [bytes(1000)] * 40
        assert (page.counters.kernel_errors, netlink.lost_messages(net.queue)) == (0, 2)


def test_a_binding_is_answered_behind_packets_that_take_their_time(
    net: Net, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a process that takes over under load: each answer comes later than it is asked for again."""
    monkeypatch.setattr(nfqueue, "_NFQA_CFG_F_CONNTRACK", 0)
    now_ns = 0

    class Slow(Recorder):
        def inspect(self, packet: Packet) -> Outcome:
            nonlocal now_ns
            now_ns += loop._BIND_AGAIN_NS // 10
            net.send(b"one more")
            return super().inspect(packet)

    monkeypatch.setattr(loop, "monotonic_ns", lambda: now_ns)
    net.send(*[b"waits"] * 20)
    made = make_loop(net, Slow(), page)
    made.bind(QUEUE_NUM + 1, is_fail_open=True)
    assert made.queues == {QUEUE_NUM + 1: True}


def bind_from(channel: socket.socket, number: int) -> int:
    """The errno of the kernel."""
    channel.send(nfqueue.encode_config(number, is_fail_open=False, max_len=1, sequence=1))
    answer = netlink.answer(channel.recv(4096))
    assert answer is not None
    return answer[1]


SERVE = """
import signal, sys

class Idle:
    inspect = None
    def drained(self): ...

from orchestrator.engine import ctnetlink, loop, netlink
from orchestrator.engine.counters import Page
channel = netlink.open_queue_socket(4096)
page = Page(sys.argv[1])
answers = loop.Answers(channel, ctnetlink.Client(channel), page.counters)
made = loop.Loop(channel, answers, Idle(), page, accept_verdict=None)
loop.stop_on(made, {signal.SIGTERM})
print("ready", flush=True)
made.run()
print("done", flush=True)
"""


def test_a_signal_ends_the_loop(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVE, str(tmp_path / "page")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=WAIT_S)[0] == "done\n"
    assert process.returncode == 0


def test_a_message_longer_than_its_slot_is_cut_and_counted() -> None:
    """A netlink socket keeps the same promise as a datagram socket: MSG_TRUNC tells the real length."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        slots = loop._Slots(ours)
        assert slots.receive_waiting() == []
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        messages = [b"a", bytes(80_000), b"", b"b" * 5000]
        for message in messages:
            theirs.send(message)
        first = bytes(slots.receive())
        assert first == b"a"
        assert [len(view) for view in slots.receive_waiting()] == [65536 + 4096, 0, 5000]
        assert slots.truncated == 1
        theirs.send(bytes(80_000))
        assert len(slots.receive()) == 65536 + 4096
        assert slots.truncated == 2
