"""A queue changes hands between processes, on queues of the running kernel in a network namespace of the test's own.

With packets of helped connections, and with queues that are bound and let go of: tests/kernel/test_zero_gap.py.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from orchestrator.engine import handover, nfqueue
from orchestrator.engine.api import Bounds, Direction
from orchestrator.engine.counters import Snapshot, State, read
from orchestrator.engine.ctnetlink import SequenceAdjustment
from orchestrator.engine.handover import HandoverError, Peer, reached
from orchestrator.engine.inspector import Duty, Inspector
from orchestrator.engine.names import NEXT, NOT_HANDED_OVER, handover_socket
from orchestrator.helpers.ftp import Ftp
from orchestrator.supervise import filters, traces
from tests.processes import DOCUMENT, QUEUE
from tests.processes import NAME as PROCESS_NAME
from tests.unit.test_loop import CLONE_NEWNET, QUEUE_NUM, WAIT_S, Net, a_net
from tests.waiting import until

ROOT = str(Path(__file__).parents[2])
NAME = "unit"

# Serves a queue that is bound already, given as descriptor and number, or that of its predecessor; tells when, and how
# it ends.
SERVE = """
import os, signal, socket, sys
sys.path.append(sys.argv[1])
from orchestrator.engine import ctnetlink, handover, names, netlink, nfqueue
from orchestrator.engine.api import Bounds
from orchestrator.engine.counters import Page, State
from orchestrator.engine.inspector import Duty, Inspector
from orchestrator.engine.loop import Answers, Loop, stop_on
from orchestrator.helpers.tftp import Tftp
nfqueue._NFQA_CFG_F_CONNTRACK = 0  # which a kernel may lack
is_first, name = len(sys.argv) > 2, "unit"
predecessor = None if is_first else handover.Peer(names.handover_socket(name))
queue = socket.socket(fileno=int(sys.argv[2])) if is_first else netlink.open_queue_socket(4096)
page = Page(f"{name}.stats") if is_first else Page()
answers = Answers(queue, ctnetlink.Client(netlink.open_control_socket()), page.counters)
inspector = Inspector(Tftp(), Duty(frozenset({b"tftp"}), Bounds(), by_rules=False), answers)
loop = Loop(queue, answers, inspector, page, accept_verdict=inspector.plain_verdict)
stop_on(loop, {signal.SIGTERM})
door = handover.Door(loop, inspector, page, queue)
if is_first:
    loop.queues[int(sys.argv[3])] = False
    listener = handover.listen(name)
else:
    with_queue = {"queue_socket": queue, "page": page, "loop": loop, "inspector": inspector}
    listener = handover.take_over(predecessor, sorted(loop.queues), **with_queue)
page.state = State.READY
page.beat()
if predecessor:
    predecessor.done()
door.open(listener)
print("ready", *sorted(loop.queues), flush=True)
loop.run()
print("left" if loop.has_left else "stopped", flush=True)
os._exit(0)
"""


class Place:
    """A runtime directory, and the processes that serve there, one after the other."""

    def __init__(self, net: Net, directory: Path) -> None:
        self.net = net
        self.directory = directory
        self.started: list[subprocess.Popen[str]] = []
        self.first = self.start(str(net.queue.fileno()), str(QUEUE_NUM))

    def start(self, *given: str) -> subprocess.Popen[str]:
        """A process, once it serves; without arguments it is a successor."""
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", SERVE, ROOT, *given],
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            pass_fds=(self.net.queue.fileno(),),
        )
        self.started.append(process)
        assert says(process) == f"ready {QUEUE_NUM}"
        return process

    def peer(self) -> Peer:
        return Peer(str(self.directory / handover_socket(NAME)))

    def page(self) -> Snapshot:
        return read(str(self.directory / f"{NAME}.stats"))

    def passes(self, text: bytes) -> None:
        self.net.send(text)
        assert self.net.receive(1) == [text]


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with a_net() as net:
        place = Place(net, tmp_path)
        try:
            yield place
        finally:
            for process in place.started:
                process.kill()
                process.communicate()


@pytest.mark.slow
def test_every_packet_comes_once_and_in_order_while_five_successors_take_over(place: Place) -> None:
    is_over = threading.Event()
    sent: list[bytes] = []

    def send() -> None:
        while not is_over.is_set():
            sent.append(b"%d" % len(sent))
            place.net.send(sent[-1])
            if len(sent) % 50 == 0:
                assert place.net.receive(50) == sent[-50:]

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for _ in range(5):
            before = place.started[-1]
            place.start()
            assert (says(before), before.wait(WAIT_S)) == ("left", 0)
    finally:
        is_over.set()
        sender.join(WAIT_S)
    rest = len(sent) % 50
    assert place.net.receive(rest) == sent[len(sent) - rest :]
    last = place.started[-1]
    last.terminate()
    assert says(last) == "stopped"
    told = place.page()
    assert (told.pid, told.counters.packets) == (last.pid, len(sent))
    assert (told.counters.overruns, told.counters.kernel_errors) == (0, 0)
    assert 0 < told.counters.busy_ns < 10**9 * WAIT_S


@pytest.mark.parametrize("stage", ["connected", "told", "ready", "gone on"])
def test_a_successor_that_gives_up_leaves_everything_as_it_was(place: Place, stage: str) -> None:
    place.passes(b"before")
    peer = place.peer()
    if stage != "connected":
        left = peer.take([QUEUE_NUM])
        place.net.send(b"meanwhile")
        left.listener.close()
        os.close(left.queue_socket)
        os.close(left.page)
        if stage == "gone on":
            peer.begin()
        if stage == "ready":
            handover._send(peer._channel, handover._READY)
        peer.close()
        assert place.net.receive(1) == [b"meanwhile"]
    peer.close()
    place.passes(b"after")
    assert place.page().pid == place.first.pid
    place.start()
    place.passes(b"and with the next one")
    assert says(place.first) == "left"


def test_a_queue_is_configured_as_before_when_a_successor_gives_up(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nfqueue, "_NFQA_CFG_F_CONNTRACK", 0)
    peer = place.peer()
    left = peer.take([QUEUE_NUM])
    peer.begin()
    with socket.socket(fileno=left.queue_socket) as queue:
        queue.send(nfqueue.encode_config(QUEUE_NUM, is_fail_open=True, max_len=1, is_bound=True, is_answered=False))
    left.listener.close()
    os.close(left.page)
    peer.close()
    place.passes(b"it goes on")
    place.first.send_signal(signal.SIGSTOP)
    until(lambda: traces.is_stopped(place.first.pid), "it is stopped")
    place.net.send(b"first", b"second", b"third")
    place.net.receiver.settimeout(0)
    with pytest.raises(BlockingIOError):  # a full queue that fails open would let the second pass
        place.net.receive(1)
    place.net.receiver.settimeout(WAIT_S)
    place.first.send_signal(signal.SIGCONT)
    assert place.net.receive(3) == [b"first", b"second", b"third"]


def test_a_successor_without_room_for_what_it_is_handed_over_says_so(place: Place) -> None:
    peer = place.peer()
    before = open_files()
    with room_for(2), pytest.raises(OSError, match="Too many open files") as raised:
        peer.take([QUEUE_NUM])
    assert raised.value.errno == errno.EMFILE
    assert not isinstance(raised.value, HandoverError)  # its predecessor is not to blame
    assert open_files() == before
    peer.close()
    place.passes(b"and on")
    assert place.page().pid == place.first.pid


def test_descriptors_that_nobody_waits_for_are_not_taken_in() -> None:
    """A successor has a helper in it, which may send what it likes, and as often."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = open_files()
        handover._send(theirs, handover._READY, (theirs.fileno(), 0))
        assert handover._receive(ours) == (handover._READY, [])
        assert open_files() == before


def test_a_last_word_counts_however_late_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else both would read from then on."""
    monkeypatch.setattr(handover, "ANSWER_WITHIN_S", -1.0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        handover._send(theirs, handover._TAKEN)
        assert handover._is_taken(ours)


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """So many files can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, open_files())) + 10, hard))
    spare: list[int] = []
    try:
        with suppress(OSError):
            while True:
                spare.append(os.dup(2))
        for _ in range(count):
            os.close(spare.pop())
        yield
    finally:
        for descriptor in spare:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_files() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.mark.slow
def test_who_cannot_open_a_file_for_its_successor_goes_on_and_is_not_busy_with_it(place: Place) -> None:
    pid = place.first.pid
    taken = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(taken) + 1)) - taken), limits[1]))
    place.peer().close()  # who waits in accept(2) has a descriptor for the first
    before = cpu_s(pid)
    peer = place.peer()
    with pytest.raises(HandoverError, match="gone or silent"):
        peer.take([QUEUE_NUM])  # two seconds
    assert cpu_s(pid) - before < 0.5
    place.passes(b"and on")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    peer.close()
    place.start()
    assert says(place.first) == "left"


def cpu_s(pid: int) -> float:
    """CPU time that a process has used. Source: proc(5), stat, utime and stime."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_one_that_is_silent_stops_packets_for_two_seconds(place: Place) -> None:
    peer = place.peer()
    left = peer.take([QUEUE_NUM])
    place.net.send(b"meanwhile")
    assert place.net.receive(1) == [b"meanwhile"]
    with pytest.raises(HandoverError):
        peer.begin()
    assert left.queues == {QUEUE_NUM: False}


@pytest.mark.slow
def test_a_predecessor_that_is_gone_or_silent_is_told_of(place: Place) -> None:
    place.first.send_signal(signal.SIGSTOP)
    with pytest.raises(HandoverError, match="gone or silent"):
        place.peer().take([QUEUE_NUM])
    place.first.kill()
    place.first.wait(WAIT_S)
    with pytest.raises(HandoverError, match="nobody is there"):
        place.peer()


def test_one_that_dies_after_it_let_go_is_missed_by_nobody(place: Place) -> None:
    peer = place.peer()
    left = peer.take([QUEUE_NUM])
    peer.begin()
    place.first.kill()
    place.first.wait(WAIT_S)
    peer.done()
    left.listener.close()
    place.net.send(b"waits for its successor")
    with socket.socket(fileno=left.queue_socket) as queue:
        assert queue.recv(1 << 16).endswith(b"waits for its successor")


def test_what_asks_for_nothing_known_changes_nothing(place: Place) -> None:
    """Nor does a queue that cannot be bound, as on a kernel without NFQA_CT, or one that somebody holds."""
    for message in (b"", b"\xff\xff\xff\xffx", b"\x02\0\0\0[]", b'\x05\0\0\0{"a"'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.connect(str(place.directory / handover_socket(NAME)))
            with suppress(BrokenPipeError):
                channel.send(message)
    place.passes(b"x")
    assert place.page().pid == place.first.pid


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param([b"\x7f\0\0\0", *[b" "] * 126], id="a byte every half second", marks=pytest.mark.slow),
        pytest.param([b'\x16\0\0\0{"error": "\\u001b[2J"}'], id="for a terminal"),
    ],
)
def test_a_process_that_its_helper_has_taken_over_neither_holds_nor_fools_who_asks_it(
    tmp_path: Path, answer: list[bytes]
) -> None:
    is_over = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / handover_socket(NAME)))
        listener.listen()

        def drip() -> None:
            channel, _ = listener.accept()
            with channel, suppress(BrokenPipeError):
                for part in answer:
                    channel.sendall(part)
                    if is_over.wait(0.5 if len(answer) > 1 else 0):
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        with reached(tmp_path, NAME) as peer, pytest.raises(HandoverError) as raised:
            peer.serve([QUEUE_NUM])
        took = time.monotonic() - started
        is_over.set()
        thread.join(WAIT_S)
    assert str(raised.value).isprintable()
    assert took < WAIT_S


@pytest.mark.slow
def test_who_asks_waits_for_as_long_as_a_process_may_wait_for_the_kernel(tmp_path: Path) -> None:
    """At each of its queues, that is: else it does later what whoever asked takes for failed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / handover_socket(NAME)))
        listener.listen()

        def answer() -> None:
            channel, _ = listener.accept()
            with channel:
                time.sleep(handover.ANSWER_WITHIN_S + 0.5)
                handover._send(channel, handover._DONE)

        with ThreadPoolExecutor(1) as thread:
            answered = thread.submit(answer)
            with reached(tmp_path, NAME) as peer:
                peer.serve([QUEUE_NUM])
            answered.result()


# The real process, on a kernel that may lack NFQA_CT: without the last two attributes of the request to bind a queue.
PROCESS = """
import struct, sys
sys.path.append(sys.argv[1])
from orchestrator.engine import loading, nfqueue, process
encode = nfqueue.encode_config
def encode_without_conntrack(*args, **options):
    message = encode(*args, **options)[:-16]
    return struct.pack("=I", len(message)) + message[4:]
nfqueue.encode_config = encode_without_conntrack
loading.end_after(lambda: process.main(sys.argv[2]))
"""


@pytest.mark.slow
def test_whole_processes_hand_over_with_all_that_holds_them(tmp_path: Path) -> None:
    """Filters of system calls in force, as a user of its own each; the second serves a further queue."""
    document = f"helper-{PROCESS_NAME}.toml"
    (tmp_path / document).write_text(DOCUMENT)
    (tmp_path / f"{document}{NEXT}").write_text(DOCUMENT.replace(f"[{QUEUE}]", f"[{QUEUE}, {QUEUE + 1}]"))
    filters.write(tmp_path)
    page = str(tmp_path / f"{PROCESS_NAME}.stats")

    def start(name: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", PROCESS, ROOT, name], cwd=tmp_path)
        started.append(process)
        until(lambda: is_ready(page, process.pid), "it is ready")
        return process

    def run(name: str) -> int:
        command = [sys.executable, "-I", "-S", "-c", PROCESS, ROOT, name]
        return subprocess.run(command, cwd=tmp_path, stderr=subprocess.DEVNULL, timeout=WAIT_S).returncode

    started: list[subprocess.Popen[bytes]] = []
    with ThreadPoolExecutor(1) as inside:  # a thread that gives up its namespace
        try:
            inside.submit(unshare_net).result()
            first = inside.submit(start, document).result()
            second = inside.submit(start, f"{document}{NEXT}").result()
            assert first.wait(WAIT_S) == 0
            assert set(inside.submit(queues).result()) == {QUEUE, QUEUE + 1}
            peer = Peer(str(tmp_path / handover_socket(PROCESS_NAME)))
            peer.serve([QUEUE + 1, QUEUE + 2])
            assert set(inside.submit(queues).result()) == {QUEUE + 1, QUEUE + 2}
            peer.close()
            assert read(page).counters.denied == 0
            second.send_signal(signal.SIGSTOP)
            assert inside.submit(run, f"{document}{NEXT}").result() == NOT_HANDED_OVER  # no answer
            second.send_signal(signal.SIGCONT)
            (tmp_path / handover_socket(PROCESS_NAME)).unlink()
            assert inside.submit(run, f"{document}{NEXT}").result() == NOT_HANDED_OVER  # nobody to ask
            assert set(inside.submit(queues).result()) == {QUEUE + 1, QUEUE + 2}
            second.terminate()
            assert second.wait(WAIT_S) == 0
        finally:
            for process in started:
                process.kill()
                process.wait()


def is_ready(page: str, pid: int) -> bool:
    try:
        told = read(page)
    except (OSError, ValueError):  # not written yet
        return False
    return (told.pid, told.state) == (pid, State.READY)


def unshare_net() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        pytest.skip("needs root")


def queues() -> list[int]:
    lines = Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text().splitlines()
    return [int(line.split()[0]) for line in lines]


def test_what_an_inspector_knows_goes_through_json() -> None:
    def make() -> Inspector:
        return Inspector(Ftp(), Duty(frozenset({b"ftp"}), Bounds(), by_rules=True), conntrack=NoConntrack())

    one, other = make(), make()
    one.written[7] = bytes(range(20))
    one._adjusted[7, Direction.REPLY] = SequenceAdjustment(1 << 31, -3, 5)
    one._partials.keep(9, Direction.ORIGINAL, seq=4711, data=b"POR")
    other.remember(json.loads(json.dumps(one.memory())))
    assert other.memory() == one.memory()
    assert other._partials.take(9, Direction.ORIGINAL, seq=4711) == b"POR"


class NoConntrack:
    def request(self, message: bytes) -> int:
        raise AssertionError(message)
