"""The packet loop: reads packets of all queues on one socket, in order, and answers each with what the inspector says.

Whatever happens to one packet, it gets a verdict and the next one is read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import socket
import sys
import threading
import traceback  # here, because a process that has dropped its privileges may not be able to read the module
from collections.abc import Callable, Iterable, Iterator
from struct import Struct
from time import monotonic_ns, sleep, thread_time_ns
from types import TracebackType
from typing import Protocol

from orchestrator.engine import netlink, nfqueue
from orchestrator.engine.counters import Counters, Page
from orchestrator.engine.ctnetlink import Client
from orchestrator.engine.netlink import DecodeError
from orchestrator.engine.nfqueue import Change, Packet

RECEIVE_BUFFER = 8 << 20
"""Bytes of waiting packets that the queue socket has room for: the default holds 166 of them."""

QUEUE_LENGTH = 128
"""Packets that may wait in a queue: all of them stand still for as long as a process hangs."""

BATCH = 32
"""Most packets that are read and answered at once; the first of them waits for the last."""

_SLOT = 65536 + 4096  # the largest packet, and the attributes before it
_PATIENCE_MAX = 16  # packets that are read one by one before the next look whether more wait
_TELL_AFTER_NS = 10_000_000  # what was counted is told that often, and before anything that may take longer
_IDLE_NS = 1_000_000_000  # who begins to work after that tells the supervisor, which has gone to sleep by then
_TIMEVAL = Struct("@ll")
_TRACEBACK_PLACES = 64
_TRACEBACK_INTERVAL_NS = 1_000_000_000
_STOP_STACK_LEN = 256 << 10
_BIND_ATTEMPTS = 8
_BIND_AGAIN_NS = 250_000_000
_PAUSE_AGAIN_S = 0.05
_POLL_S = 0.005

# Sequence numbers of requests: of verdicts 0, of bindings the queue number + 1; of a stop and a pause these bits with
# the pid, as the answer to one of a process may be read by its successor.
_BINDING_MAX = 0x10000
_STOP, _PAUSE = 0x80000000, 0xC0000000


class Outcome(Protocol):
    """What an inspector says about a packet; `after` are requests to ctnetlink once the verdict was given."""

    @property
    def verdict(self) -> int: ...
    @property
    def change(self) -> Change | None: ...
    @property
    def after(self) -> tuple[bytes, ...]: ...
    @property
    def made(self) -> tuple[object, ...]: ...
    @property
    def rewritten(self) -> tuple[object, ...]: ...
    @property
    def refused(self) -> tuple[str, ...]: ...
    @property
    def error(self) -> BaseException | None: ...


class Inspector(Protocol):
    def inspect(self, packet: Packet) -> Outcome: ...

    def drained(self) -> None:
        """Every packet read from now on was queued after the last verdict."""


class Answers:
    """Verdicts that wait to be sent together. A request to ctnetlink goes after them, and sees what they changed.

    It would be wrong before them: the kernel adjusts the sequence number of a packet when it gets its verdict, and
    what the verdict says of a connection must not undo what is younger.
    """

    def __init__(self, queue_socket: socket.socket, control: Client, counters: Counters) -> None:
        self._socket = queue_socket
        self._control = control
        self._counters = counters
        self._waiting: list[bytes] = []

    def add(self, answer: bytes) -> None:
        self._waiting.append(answer)

    def request(self, message: bytes) -> int:
        """The errno of the kernel, 0 for done."""
        self.send()
        return self._control.request(message)

    def send(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        self._counters.packets += len(waiting)
        try:
            self._socket.send(b"".join(waiting))
        except OSError:  # rewritten packets of a batch can exceed the send buffer together
            for answer in waiting:
                self._send_alone(answer)

    def _send_alone(self, answer: bytes) -> None:
        try:
            self._socket.send(answer)
        except OSError:
            self._counters.kernel_errors += 1


class Shortcut(Protocol):
    """A quicker way to the same answers. What it declines, the inspector decides, and it is told."""

    def answer(self, message: memoryview) -> bytes | None: ...

    def learn(self, message: memoryview, packet: Packet) -> None: ...


class _NoShortcut:
    def answer(self, message: memoryview) -> None: ...

    def learn(self, message: memoryview, packet: Packet) -> None: ...


class Loop:
    """Serves the queues that were bound with `bind`, until `stop`.

    While packets come one by one, each is read and answered with two system calls. As soon as they wait, all are read
    at once (recvmmsg) and answered with one message. The inspector makes its requests through the same `answers`.
    `accept_verdict` is for a packet whose inspection failed. `queues` are those that are bound, and whether each lets
    packets pass when it is full. `has_left`: another process serves them.
    """

    def __init__(
        self,
        queue_socket: socket.socket,
        answers: Answers,
        inspector: Inspector,
        page: Page,
        *,
        accept_verdict: Callable[[Packet], int],
        shortcut: Shortcut | None = None,
    ) -> None:
        self._socket = queue_socket
        self._answers = answers
        self._inspector = inspector
        self._inspect = inspector.inspect
        self._shortcut = shortcut or _NoShortcut()
        self._decode = nfqueue.Decoder().decode
        self._accept_verdict = accept_verdict
        self._page = page
        self._counters = page.counters
        self._slots = _Slots(queue_socket)
        self._after: list[bytes] = []
        self.queues: dict[int, bool] = {}
        self._answered: dict[int, int] = {}
        self._stop_sequence, self._pause_sequence = _STOP | os.getpid(), _PAUSE | os.getpid()
        self._is_stopping = self._is_interrupted = False
        self._wants_pause, self._rests, self._goes_on = False, threading.Event(), threading.Event()
        self.has_left = False
        self._tell_next_ns = self._began_ns = 0
        self._tracebacks = _Tracebacks()

    def bind(self, queue_num: int, *, is_fail_open: bool) -> None:
        """Bind a queue, or only configure it; packets that come meanwhile are served. Not for use while `run` runs.

        Raises OSError: EPERM if another socket holds it, ETIMEDOUT if the kernel's answers are lost.
        """
        self._wait_at_most(_BIND_AGAIN_NS)
        self._bind(queue_num, is_fail_open=is_fail_open, wait=self._serve_for_a_while)

    def bind_beside(self, queue_num: int, *, is_fail_open: bool) -> None:
        """The same from another thread, while `run` runs. Raises OSError."""
        self._bind(queue_num, is_fail_open=is_fail_open, wait=lambda: sleep(_POLL_S))

    def unbind(self, queue_num: int) -> None:
        """Let go of a queue; what waits in it is dropped. From any thread."""
        self._socket.send(nfqueue.encode_unbind(queue_num))
        self.queues.pop(queue_num, None)

    def configure_again(self) -> None:
        """The queues are as this process had them, whatever another one that has the socket made of them."""
        for number, is_fail_open in self.queues.items():
            self._socket.send(
                nfqueue.encode_config(
                    number, is_fail_open=is_fail_open, max_len=QUEUE_LENGTH, is_bound=True, is_answered=False
                )
            )

    def _bind(self, queue_num: int, *, is_fail_open: bool, wait: Callable[[], None]) -> None:
        """The answer is lost while the buffer is full or memory short, so it is asked for again. That to an earlier
        attempt counts as well: it may come late, behind packets.

        EBUSY says then that this socket has the queue: of another one it would be EPERM (nfqnl_recv_config).
        """
        is_bound, sequence = queue_num in self.queues, queue_num + 1
        self._answered.pop(sequence, None)
        for _ in range(_BIND_ATTEMPTS):
            message = nfqueue.encode_config(
                queue_num, is_fail_open=is_fail_open, max_len=QUEUE_LENGTH, sequence=sequence, is_bound=is_bound
            )
            self._socket.send(message)
            number = self._answer_to(sequence, wait)
            if number == 0:
                self.queues[queue_num] = is_fail_open
                return
            if number not in (errno.EBUSY, errno.ETIMEDOUT):
                break
            is_bound = is_bound or number == errno.EBUSY
        if queue_num not in self.queues and number == errno.ETIMEDOUT:
            self.unbind(queue_num)  # it may be ours, and nobody knows
        raise OSError(number, os.strerror(number))

    def _answer_to(self, sequence: int, wait: Callable[[], None]) -> int:
        """The errno of the kernel, 0 for done, ETIMEDOUT for none within a while."""
        deadline = monotonic_ns() + _BIND_AGAIN_NS
        while sequence not in self._answered:
            if monotonic_ns() > deadline:
                return errno.ETIMEDOUT
            wait()
        return self._answered.pop(sequence)

    def _serve_for_a_while(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._serve([self._slots.receive()])

    def run(self) -> None:
        """Serve until `stop` was called and everything was answered that waited then, or `leave`. Raises OSError."""
        self._began_ns = thread_time_ns() - self._counters.busy_ns  # a predecessor may have counted, too
        self._slots.truncated += self._counters.truncated
        while not self._is_stopping:
            self._serve_on()
            self._count_losses()
            self._tell()
            if self._is_interrupted and not self._is_stopping:
                self._rest()

    def _serve_on(self) -> None:
        """Until the answer to a stop or a pause comes."""
        alone, patience, deepest = 0, 1, 0
        self._wait_at_most(_TELL_AFTER_NS)
        while not self._is_interrupted:
            if alone < patience:
                alone += 1
                self._serve([self._receive()])
            elif waiting := self._slots.receive_waiting():
                deepest = max(deepest, len(waiting))
                self._serve(waiting)
            else:
                self._inspector.drained()
                patience = 1 if deepest > 1 else min(2 * patience, _PATIENCE_MAX)
                alone = deepest = 0

    def _rest(self) -> None:
        self._is_interrupted = False
        if self._wants_pause:
            self._rests.set()
            self._goes_on.wait()
            self._goes_on.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """From another thread: nothing is read in the block, and no verdict is owed for what was read before it."""
        self._wants_pause = True
        self._interrupt(self._pause_sequence)
        while not self._rests.wait(_PAUSE_AGAIN_S):  # the answer is lost while the buffer is full or memory short
            self._interrupt(self._pause_sequence)
        try:
            yield
        finally:
            self._wants_pause = False
            self._rests.clear()
            self._goes_on.set()

    def leave(self) -> None:
        """Within a pause: let `run` end, as somebody else reads from now on."""
        self.has_left = self._is_stopping = True

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._interrupt(self._stop_sequence)

    def _interrupt(self, sequence: int) -> None:
        """The kernel answers this request on the queue socket, after all that waits, unless memory is short."""
        flags = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK
        with contextlib.suppress(OSError):
            self._socket.send(netlink.message(netlink.NLMSG_NOOP, b"", flags=flags, sequence=sequence))

    def _receive(self) -> memoryview:
        """Wait for a message, but tell what was counted before a long wait."""
        try:
            return self._slots.receive()
        except BlockingIOError:
            self._inspector.drained()
            self._tell()
        self._wait_at_most(0)
        message = self._slots.receive()
        if monotonic_ns() >= self._tell_next_ns + _IDLE_NS:
            self._page.touch()
        self._wait_at_most(_TELL_AFTER_NS)
        return message

    def _wait_at_most(self, duration_ns: int) -> None:
        """Let receiving fail with EAGAIN after a while; 0 is never."""
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(duration_ns // 10**9, duration_ns % 10**9 // 1000)
        )

    def _tell(self) -> None:
        now_ns = monotonic_ns()
        self._tell_next_ns = now_ns + _TELL_AFTER_NS
        self._counters.busy_ns = thread_time_ns() - self._began_ns
        self._page.beat(now_ns)

    def _serve(self, messages: list[memoryview]) -> None:
        for message in messages:
            self._answer(message)
        self._answers.send()
        if self._after:
            self._request_after()
        if len(messages) == BATCH:  # an overrun leaves a full socket behind
            self._count_losses()
        self._counters.batches += 1
        if monotonic_ns() >= self._tell_next_ns:
            self._tell()

    def _answer(self, message: memoryview) -> None:
        """Answer a packet with a verdict, and take any other message for what it is."""
        try:
            quick = self._shortcut.answer(message)
        except Exception as error:  # noqa: BLE001 (nor may it depend on what a helper calls dull)
            self._note(error)
            quick = None
        if quick is not None:
            self._answers.add(quick)
            return
        try:
            packet = self._decode(message)
        except DecodeError:
            self._answer_other(message)
            return
        try:
            outcome = self._inspect(packet)
            answer = nfqueue.encode_verdict(packet, outcome.verdict, outcome.change)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with one packet, the others must go on)
            self._note(error)
            self._answers.add(nfqueue.encode_verdict(packet, self._accept_verdict(packet)))
            return
        self._answers.add(answer)
        self._shortcut.learn(message, packet)
        if outcome.made or outcome.refused or outcome.rewritten or outcome.error or outcome.after:
            self._count(outcome)

    def _answer_other(self, message: memoryview) -> None:
        answer = netlink.answer(message)
        if answer is not None:
            self._take_answer(*answer)
            return
        self._counters.parse_errors += 1
        identity = nfqueue.identify(message)
        if identity:
            self._answers.add(nfqueue.encode_plain_verdict(*identity, nfqueue.ACCEPT))

    def _take_answer(self, sequence: int, number: int) -> None:
        if sequence == self._stop_sequence:
            self._is_stopping = self._is_interrupted = True
        elif sequence == self._pause_sequence:
            self._is_interrupted = True
        elif sequence:
            if sequence <= _BINDING_MAX:  # else it is the answer to a predecessor
                self._answered[sequence] = number
        elif number == errno.ENOENT:
            self._counters.stale += 1
        else:
            self._counters.kernel_errors += 1

    def _request_after(self) -> None:
        requests, self._after = self._after, []
        self._counters.kernel_errors += sum(self._answers.request(request) != 0 for request in requests)

    def _count(self, outcome: Outcome) -> None:
        counters = self._counters
        counters.expectations += len(outcome.made)
        counters.refused += len(outcome.refused)
        counters.rewritten += len(outcome.rewritten)
        self._after += outcome.after
        if outcome.refused:
            self._page.note(f"refused: {outcome.refused[-1]}")
        if outcome.error is not None:
            self._note(outcome.error)

    def _count_losses(self) -> None:
        self._counters.overruns = netlink.lost_messages(self._socket)
        self._counters.truncated = self._slots.truncated

    def _note(self, error: BaseException) -> None:
        self._counters.exceptions += 1
        with contextlib.suppress(Exception):  # its text is code of a helper too, the disk may be full, memory short
            self._page.note(f"{type(error).__name__}: {error}")
            self._tracebacks.print(error)


class _Tracebacks:
    """Prints an exception once for each place in the code that raised it, and at most one in a second."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, int]] = set()
        self._next_ns = 0

    def print(self, error: BaseException) -> None:
        now = monotonic_ns()
        place = _place(error.__traceback__)
        if place in self._seen or len(self._seen) >= _TRACEBACK_PLACES or now < self._next_ns:
            return
        self._seen.add(place)
        self._next_ns = now + _TRACEBACK_INTERVAL_NS
        sys.stderr.write("".join(traceback.format_exception(error)))
        sys.stderr.flush()


def _place(trace: TracebackType | None) -> tuple[str, int]:
    place = ("", 0)
    while trace is not None:
        place = (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return place


def stop_on(loop: Loop, signals: Iterable[signal.Signals]) -> None:
    """Make these signals stop the loop. Call it in the main thread, after privileges were dropped.

    A handler would come too late: a signal between Python's last look for one and the system call does not end it.
    """
    awaited = frozenset(signals)
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)

    def wait() -> None:
        while True:  # the answer that stops the loop may be lost, see `paused`: then the next signal does it
            signal.sigwait(awaited)
            loop.stop()

    threading.stack_size(_STOP_STACK_LEN)
    threading.Thread(target=wait, name="stop", daemon=True).start()


# -- receiving ---------------------------------------------------------------------------------------------------------


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """struct msghdr, recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vector", ctypes.POINTER(_IoVec)),
        ("vector_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """struct mmsghdr, recvmmsg(2)."""

    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


class _Slots:
    """Buffers for a batch of messages, each for the largest; a call overwrites what the one before it read."""

    def __init__(self, channel: socket.socket) -> None:
        memory = mmap.mmap(-1, BATCH * _SLOT)  # zero pages until they are needed, which is the first of a slot mostly
        view = memoryview(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.truncated = 0
        self._views = [view[at : at + _SLOT] for at in range(0, BATCH * _SLOT, _SLOT)]
        self._vectors = [_IoVec(start + at, _SLOT) for at in range(0, BATCH * _SLOT, _SLOT)]
        self._messages = (_Message * BATCH)()
        for message, vector in zip(self._messages, self._vectors, strict=True):
            message.header.vector, message.header.vector_length = ctypes.pointer(vector), 1
        words = memoryview(self._messages).cast("B").cast("I")
        self._lengths = words[_Message.length.offset // words.itemsize :: ctypes.sizeof(_Message) // words.itemsize]
        self._channel = channel
        self._recvmmsg = ctypes.CDLL(None, use_errno=True).recvmmsg
        self._recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
        self._arguments = (
            *(channel.fileno(), ctypes.addressof(self._messages), BATCH),
            *(socket.MSG_DONTWAIT | socket.MSG_TRUNC, None),
        )

    def receive(self) -> memoryview:
        """Wait for one message. Raises OSError."""
        slot = self._views[0]
        length = self._channel.recv_into(slot, 0, socket.MSG_TRUNC)
        return slot[:length] if length <= _SLOT else self._cut(slot)

    def receive_waiting(self) -> list[memoryview]:
        """All messages that wait, as far as there are slots; an empty list if none does. Raises OSError."""
        count = self._recvmmsg(*self._arguments)
        if count < 0:
            number = ctypes.get_errno()
            if number in (errno.EAGAIN, errno.EINTR):
                return []
            raise OSError(number, os.strerror(number))
        lengths = self._lengths[:count].tolist()
        return [
            slot[:length] if length <= _SLOT else self._cut(slot)
            for slot, length in zip(self._views, lengths, strict=False)
        ]

    def _cut(self, slot: memoryview) -> memoryview:
        """A message that was longer than its slot (MSG_TRUNC tells its real length)."""
        self.truncated += 1
        return slot
