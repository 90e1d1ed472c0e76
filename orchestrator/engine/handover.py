"""A helper process gives its queues to its successor, and no packet is lost or waits longer than for that moment.

A queue belongs to the netlink socket that bound it, not to a process (nfnetlink_queue.c, peer_portid), and lives as
long as anybody has that socket open. So the socket changes hands, with all that is needed to go on at the next packet:

    successor  -> succeed                   once it has loaded its code
    process    -> what it knows, sockets    it has stopped to read by then, and owes no verdict
    successor  -> ready
    process    -> go                        from now on the successor reads
    successor  -> taken                     it has bound all its queues, and the process ends

Before `go` either may give up after a while: the process reads on. After it, it does so once the successor is gone,
never while both may read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from struct import Struct
from struct import error as struct_error
from time import monotonic, sleep
from typing import Any

from orchestrator.engine.counters import Page
from orchestrator.engine.inspector import Inspector
from orchestrator.engine.loop import Loop
from orchestrator.engine.names import handover_socket

ANSWER_WITHIN_S = 2.0
"""How long one end waits for the other, while packets wait for both."""

_READY, _GO, _TAKEN, _DONE = ({"say": word} for word in ("ready", "go", "taken", "done"))
_ACCEPT_AGAIN_S = 0.2
_LENGTH = Struct("=I")
_MESSAGE_MAX = 16 << 20
_DESCRIPTORS = 3
_STACK_LEN = 256 << 10
_BACKLOG = 4
_NETLINK_NETFILTER = 12
_TIMEVAL = Struct("@ll")
_PART_MAX = 1 << 16
_WORDS_MAX = 500
_GONE = "the other end of the handover is gone or silent"


class HandoverError(OSError):
    """The other end of a handover is not there, does not answer, or says what it should not.

    What this end cannot do is another OSError.
    """


def listen(name: str) -> socket.socket:
    """The socket of a new process in its working directory; whoever was there before is found no more. Raises OSError.

    It reaches nobody: it only takes in who may open it, which is root.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(handover_socket(name))  # noqa: PTH108 (a helper process imports no pathlib)
    listener.bind(handover_socket(name))
    listener.listen(_BACKLOG)
    return listener


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a process leaves: its listening socket, descriptors of its queue socket and page, and what it knows.

    `queues` are its queues, and whether each lets packets pass when it is full.
    """

    listener: socket.socket
    queue_socket: int
    page: int
    queues: Mapping[int, bool]
    counters: Mapping[str, int]
    memory: Mapping[str, Any]


class Peer:
    """The process that serves under a name, for its successor or for orch."""

    def __init__(self, path: str) -> None:
        """Raises HandoverError if there is none."""
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _limit(self._channel, ANSWER_WITHIN_S)
        try:
            self._channel.connect(path)
        except OSError as error:
            self._channel.close()
            raise HandoverError(f"nobody is there to hand over its queues: {error.strerror}") from error

    def close(self) -> None:
        self._channel.close()

    def serve(self, queues: Sequence[int]) -> None:
        """Let it serve just these queues, the first failing open. Raises HandoverError."""
        _limit(self._channel, ANSWER_WITHIN_S * (1 + len(queues)))  # it may wait for the kernel at each
        _send(self._channel, {"do": "serve", "queues": list(queues)})
        answer, _ = _receive(self._channel)
        if answer != _DONE:
            raise HandoverError(_printable(answer.get("error", "it does not answer")))

    def take(self, queues: Sequence[int]) -> Inheritance:
        """Let it stop reading and say what it leaves; `queues` are those that the successor will have bound.

        From here on packets wait. Raises HandoverError, and OSError with EMFILE if this process has no room for it.
        """
        _send(self._channel, {"do": "succeed", "queues": list(queues)})
        told, descriptors = _receive(self._channel, _DESCRIPTORS)
        try:
            queue_socket, page, listener = descriptors
            counters = {str(name): int(count) for name, count in told["counters"].items()}
            fail_open = frozenset(map(int, told["fail_open"]))
            bound = {int(number): number in fail_open for number in told["queues"]}
            memory = dict(told["memory"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            _close(descriptors)
            raise HandoverError(f"the process before this one leaves something else: {error!r}") from error
        taken_over = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=listener)
        return Inheritance(taken_over, queue_socket, page, bound, counters, memory)

    def begin(self) -> None:
        """Once this returns, nobody else reads. Raises HandoverError if it is not to be."""
        _send(self._channel, _READY)
        if _receive(self._channel)[0] != _GO:
            raise HandoverError("the process before this one went on")

    def done(self) -> None:
        """Let it end; it may be gone already. Raises HandoverError: then it reads on, and the successor must end."""
        try:
            _send(self._channel, _TAKEN)
        except HandoverError as error:
            if not isinstance(error.__cause__, BrokenPipeError | ConnectionResetError):
                raise
        self.close()


@contextlib.contextmanager
def reached(directory: os.PathLike[str], name: str) -> Iterator[Peer]:
    """The process of a name in a runtime directory of any length; an address may have 107 bytes. Raises OSError."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        peer = Peer(f"/proc/self/fd/{descriptor}/{handover_socket(name)}")
    finally:
        os.close(descriptor)
    with contextlib.closing(peer):
        yield peer


def take_over(
    predecessor: Peer,
    queues: Sequence[int],
    *,
    queue_socket: socket.socket,
    page: Page,
    loop: Loop,
    inspector: Inspector,
) -> socket.socket:
    """Be where the predecessor was; the listening socket. Once this returns, nobody else reads. Raises HandoverError.

    The queue socket keeps its descriptor: whoever was given it need not know.
    """
    left = predecessor.take(queues)
    os.dup2(left.queue_socket, queue_socket.fileno(), inheritable=False)
    os.close(left.queue_socket)
    kind = queue_socket.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    protocol = queue_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
    if (kind, protocol) != (socket.AF_NETLINK, _NETLINK_NETFILTER):
        raise HandoverError("what was handed over is no socket for queues")
    try:
        page.take_over(left.page, left.counters)
        inspector.remember(left.memory)
    except (LookupError, TypeError, ValueError) as error:
        raise HandoverError(f"the process before this one leaves something else: {error!r}") from error
    loop.queues.update(left.queues)
    predecessor.begin()
    return left.listener


class Door:
    """Where a process is asked to hand over, or to serve other queues: a thread that sleeps until somebody does."""

    def __init__(self, loop: Loop, inspector: Inspector, page: Page, queue_socket: socket.socket) -> None:
        """Starts the thread, which waits for `open`. Call it after privileges were dropped."""
        self._loop = loop
        self._inspector = inspector
        self._page = page
        self._queue_socket = queue_socket
        self._opened: SimpleQueue[socket.socket] = SimpleQueue()
        threading.stack_size(_STACK_LEN)
        thread = threading.Thread(target=self._watch, name="handover", daemon=True)
        thread.start()
        self.thread_id = thread.ident

    def open(self, listener: socket.socket) -> None:
        """Take in who comes, from now on."""
        self._opened.put(listener)

    def _watch(self) -> None:
        listener = self._opened.get()
        while not self._loop.has_left:
            try:
                channel, _ = listener.accept()
            except (OSError, MemoryError):  # no file can be opened now: whoever asks waits, and nobody else
                sleep(_ACCEPT_AGAIN_S)
                continue
            with contextlib.suppress(Exception), channel:  # whoever asked is gone, or is nobody, or memory short
                self._answer(channel, listener)

    def _answer(self, channel: socket.socket, listener: socket.socket) -> None:
        request, _ = _receive(channel)  # it may take its time: nobody waits for it yet
        _limit(channel, ANSWER_WITHIN_S)
        match request:
            case {"do": "succeed", "queues": [*queues]}:
                with self._loop.paused():
                    self._give(channel, listener, frozenset(map(int, queues)))
            case {"do": "serve", "queues": [*queues]}:
                _send(channel, self._serve([int(number) for number in queues]))

    def _give(self, channel: socket.socket, listener: socket.socket, queues: frozenset[int]) -> None:
        """Leave all to a successor. Raises HandoverError if it is gone or silent."""
        told = {
            "queues": sorted(self._loop.queues),
            "fail_open": [number for number, is_fail_open in self._loop.queues.items() if is_fail_open],
            "counters": asdict(self._page.counters),
            "memory": self._inspector.memory(),
        }
        _send(channel, told, (self._queue_socket.fileno(), self._page.fileno(), listener.fileno()))
        if _receive(channel)[0] != _READY:
            return
        _send(channel, _GO)
        _limit(channel, 0)
        if _is_taken(channel):
            self._loop.leave()
            return
        self._inspector.drained()  # what it wrote is unknown: what the kernel shows counts
        for number in queues.difference(self._loop.queues):
            self._loop.unbind(number)
        self._loop.configure_again()

    def _serve(self, wanted: Sequence[int]) -> Mapping[str, str]:
        """Bind what is missing, and let go of the rest; packets that wait there are dropped."""
        try:
            for place, number in enumerate(wanted):
                self._loop.bind_beside(number, is_fail_open=place == 0)
        except OSError as error:
            return {"error": str(error)}
        for number in set(self._loop.queues).difference(wanted):
            self._loop.unbind(number)
        return _DONE


def _is_taken(channel: socket.socket) -> bool:
    """Wait for the successor's last word, or its end."""
    try:
        return _receive(channel)[0] == _TAKEN
    except HandoverError:
        return False


def _limit(channel: socket.socket, within_s: float) -> None:
    """Let each system call on a channel fail after a while; 0 is never. Python's own way takes more system calls."""
    value = _TIMEVAL.pack(int(within_s), int(within_s % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        channel.setsockopt(socket.SOL_SOCKET, option, value)


def _printable(said: object) -> str:
    return "".join(ch if ch.isprintable() else "?" for ch in str(said))[:_WORDS_MAX]


def _send(channel: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Raises HandoverError."""
    data = json.dumps(message).encode()
    header = _LENGTH.pack(len(data))
    try:
        if descriptors:
            socket.send_fds(channel, [header], descriptors)
        else:
            channel.sendall(header)
        channel.sendall(data)
    except OSError as error:
        raise HandoverError(_GONE) from error


def _receive(channel: socket.socket, room: int = 0) -> tuple[Mapping[str, Any], list[int]]:
    """A message, and up to `room` descriptors that came along: the kernel closes what there is no room for.

    Once it has begun it must not take long. Raises HandoverError, and OSError if descriptors were lost (MSG_CTRUNC): as
    many files of this process, or of the host, are open as may be.
    """
    descriptors: list[int] = []
    try:
        header, descriptors, flags, _ = socket.recv_fds(channel, _LENGTH.size, room)
        deadline = monotonic() + ANSWER_WITHIN_S
        (length,) = _LENGTH.unpack(header)
        data = bytearray()
        while len(data) < min(length, _MESSAGE_MAX) and (part := channel.recv(min(length - len(data), _PART_MAX))):
            data += part
            if len(data) < length and monotonic() > deadline:  # what is there as a whole counts, however late
                raise TimeoutError(_GONE)
        message = json.loads(data)
    except (OSError, ValueError, RecursionError, struct_error) as error:
        _close(descriptors)
        raise HandoverError(_GONE) from error
    if room and flags & socket.MSG_CTRUNC:
        _close(descriptors)
        raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}, so the queues cannot be taken over")
    if not isinstance(message, dict):
        _close(descriptors)
        raise HandoverError("the other end of the handover says something else")
    return message, descriptors


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
