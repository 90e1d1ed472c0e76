"""What a helper process tells of itself: one page of shared memory, written after each batch, read by anybody.

The page is readiness, heartbeat and counters in one. Nobody is woken up for it, and a process that hangs or was killed
leaves what it said last.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from operator import attrgetter
from struct import Struct


class State(IntEnum):
    STARTING = 0
    READY = 1
    STOPPING = 2


@dataclass(slots=True)
class Counters:
    """Everything since the process started, and those whose queues it took over.

    `batches` are answers to the kernel, each for one or more of the `packets`. `refused` are expectations that the
    guard or a helper refused, `rewritten` payloads changed for NAT. `parse_errors` are messages of the kernel that
    could not be read, `truncated` those longer than the buffer, `exceptions` what a helper raised, `stale` verdicts for
    packets that were gone, `kernel_errors` other requests that the kernel refused. `overruns` are messages that the
    socket buffer had no room for. `denied` are attempts of a helper at what it may not, such as to open a file.
    `busy_ns` is the CPU time of serving, in nanoseconds.
    """

    packets: int = 0
    batches: int = 0
    expectations: int = 0
    refused: int = 0
    rewritten: int = 0
    parse_errors: int = 0
    exceptions: int = 0
    overruns: int = 0
    truncated: int = 0
    stale: int = 0
    kernel_errors: int = 0
    denied: int = 0
    busy_ns: int = 0


NAMES = tuple(field.name for field in fields(Counters))
_values = attrgetter(*NAMES)

_MAGIC = b"orchstat"
_VERSION = 2
_SEQUENCE = Struct("=Q")
_NOTE_LEN = 200
_CONTENT = Struct(f"=8sIII4xQQ{len(NAMES)}Q{_NOTE_LEN}s")  # magic, version, pid, state, beats, beat_ns, counters, note
_CONTENT_AT = _SEQUENCE.size
_LAST_AT = _CONTENT_AT + _CONTENT.size
_PAGE_SIZE = 4096
_READ_ATTEMPTS = 100
_READ_PAUSE_S = 0.001


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A page at one instant. `beat_ns` is when the process last wrote it, on the monotonic clock of the host.

    `note` is one printable line for people: the last thing that was refused or went wrong.
    """

    pid: int
    state: State
    beats: int
    beat_ns: int
    counters: Counters
    note: str = ""


class Page:
    """The writer's side. Change `counters` and call `beat`: that is what others see."""

    __slots__ = ("_beats", "_descriptor", "_memory", "_note", "_pid", "counters", "state")

    def __init__(self, path: str = "") -> None:
        """Create the page; one of that name that another process still writes stays its own. Raises OSError.

        Without a name nobody sees it, until it is that of a predecessor.
        """
        self._beats = 0
        self._note = b""
        self._pid = os.getpid()
        self.counters = Counters()
        self.state = State.STARTING
        if path:
            self._descriptor = _open_own(path)
            os.posix_fallocate(self._descriptor, 0, _PAGE_SIZE)  # to write without a disk behind it would kill us
        else:
            self._descriptor = os.memfd_create("page", os.MFD_CLOEXEC)
            os.truncate(self._descriptor, _PAGE_SIZE)
        self._memory = mmap.mmap(self._descriptor, _PAGE_SIZE)
        self.beat()

    def fileno(self) -> int:
        """For a successor, who has it locked from then on."""
        return self._descriptor

    def take_over(self, descriptor: int, counted: Mapping[str, int]) -> None:
        """Go on in the page of a predecessor, from what it counted. Raises OSError, ValueError."""
        self._memory = mmap.mmap(descriptor, _PAGE_SIZE)
        os.close(self._descriptor)
        self._descriptor = descriptor
        for name in NAMES:
            setattr(self.counters, name, counted.get(name, 0))

    def note(self, text: str) -> None:
        """What the next beat tells people; the end of a long text is lost."""
        self._note = text.encode(errors="replace")[:_NOTE_LEN]

    def denied(self, what: str) -> None:
        """Count an attempt of a helper at what it may not."""
        self.counters.denied += 1
        self.note(f"denied: {what}")

    def touch(self) -> None:
        """Wake whoever watches the page (inotify): from now on there is work. Writing to the memory tells nobody."""
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, b"\0", _PAGE_SIZE - 1)

    def beat(self, now_ns: int = 0) -> None:
        """Write everything, at a time of the monotonic clock (0: now).

        The sequence number in front goes first, the one behind goes last.
        """
        memory, counters = self._memory, self.counters
        self._beats = beats = self._beats + 1
        _SEQUENCE.pack_into(memory, 0, beats)
        _CONTENT.pack_into(
            *(memory, _CONTENT_AT, _MAGIC, _VERSION, self._pid, self.state, beats, now_ns or time.monotonic_ns()),
            *(*_values(counters), self._note),
        )
        _SEQUENCE.pack_into(memory, _LAST_AT, beats)


def _open_own(path: str) -> int:
    """A file that no other process writes. That of a dead one is taken over: a full disk may have room for no other."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        os.unlink(path)  # noqa: PTH108
        return _open_own(path)
    return descriptor


def read(path: str) -> Snapshot:
    """Read a page while it is being written. Raises OSError, and ValueError if it is none."""
    with (
        open(path, "rb") as file,  # noqa: PTH123 (a helper process imports no pathlib)
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory,
    ):
        if len(memory) != _PAGE_SIZE:
            raise ValueError(f"not a page of counters: {path}")
        for _ in range(_READ_ATTEMPTS):
            # The other way round than it is written: equal numbers mean that nothing was written in between.
            (last,) = _SEQUENCE.unpack_from(memory, _LAST_AT)
            content = memory[_CONTENT_AT:_LAST_AT]
            (first,) = _SEQUENCE.unpack_from(memory, 0)
            if first == last:
                return _decode(content)
            time.sleep(_READ_PAUSE_S)  # the writer may wait for our CPU
    raise ValueError(f"the process ended, or was stopped, while it wrote {path}")


def _decode(content: bytes) -> Snapshot:
    magic, version, pid, state, beats, beat_ns, *counters, note = _CONTENT.unpack(content)
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError("not a page of counters, or of another version")
    return Snapshot(pid, State(state), beats, beat_ns, Counters(*counters), _printable(note))


def _printable(note: bytes) -> str:
    """As text for a terminal: what somebody sends over a network may end up in it."""
    text = note.rstrip(b"\0").decode(errors="replace")
    return "".join(character if character.isprintable() else "?" for character in text)
