"""What the kernel tells of a process and of its queues, read from /proc; and how a process ended, in words."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

_QUEUES = "/proc/self/net/netfilter/nfnetlink_queue"
_WHOLE_PACKETS = 2  # NFQNL_COPY_PACKET: the queue is configured
_SILENT_LOOKS = 2
_ENVIRONMENT_LEN = 1 << 16

GONE = (FileNotFoundError, ProcessLookupError)
"""What /proc says of a process that is gone; any other error says nothing of it."""


class BetweenProgramsError(ProcessLookupError):
    """A process is about to become another program: what /proc says of it would be that of neither."""


@dataclass(frozen=True, slots=True)
class QueueRow:
    """A bound queue of this namespace: packets that wait for a verdict, and all that it ever had room for."""

    waiting: int
    seen: int
    is_ready: bool


def queues() -> dict[int, QueueRow]:
    """By number; none if the kernel has none. Source: nfnetlink_queue.c, seq_show."""
    try:
        with open(_QUEUES, encoding="ascii") as file:  # noqa: PTH123 (a supervisor imports no pathlib)
            lines = file.readlines()
    except FileNotFoundError:
        return {}
    rows = {}
    for line in lines:
        number, _, waiting, copy_mode, _, _, lost, seen, *_ = map(int, line.split())
        rows[number] = QueueRow(waiting, seen - lost, copy_mode == _WHOLE_PACKETS)  # lost: no room in the socket
    return rows


class Work(Enum):
    IDLE = "idle"
    BUSY = "busy"
    HUNG = "hung"


class Patience:
    """Looks at the queues of a process, one after the other: it hangs if it twice in a row answered nothing that waits.

    Some seconds between looks tell a process that hangs from one that waits for its turn of the CPU.
    """

    def __init__(self) -> None:
        self._answered = -1
        self._silent = 0

    def look(self, rows: list[QueueRow]) -> Work:
        waiting = sum(row.waiting for row in rows)
        answered = sum(row.seen for row in rows) - waiting
        is_silent = answered == self._answered
        self._answered = answered
        if not is_silent:
            self._silent = 0
            return Work.BUSY
        if not waiting:
            self._silent = 0
            return Work.IDLE
        self._silent += 1
        return Work.HUNG if self._silent >= _SILENT_LOOKS else Work.BUSY


def born(pid: int) -> int:
    """When a process started, in clock ticks since boot: with its pid, what identifies it. 0 if it is gone.

    Raises OSError if that cannot be told: no descriptor is left.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else 0


def with_environment(environment: Mapping[str, str], is_ours: Callable[[int], bool]) -> int:
    """A process of this network namespace that was started with an environment, and maybe more; 0 if none of ours."""
    wanted = {f"{name}={value}".encode() for name, value in environment.items()}
    for entry in os.listdir("/proc") if wanted else []:  # noqa: PTH208 (a supervisor imports no pathlib)
        with contextlib.suppress(*GONE, PermissionError):
            is_marked = entry.isdigit() and wanted.issubset(variables(int(entry)))
            if is_marked and _netns(entry) == _netns("self") and is_ours(int(entry)):
                return int(entry)
    return 0


def variables(pid: int) -> list[bytes]:
    """The environment that a process was started with, NAME=VALUE each, as far as one of ours goes. Raises OSError.

    A process can show any part of its memory as that, gigabytes too: prctl(2), PR_SET_MM_MAP.
    """
    data = _read(pid, "environ")
    if not data:
        os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 (a thread of the kernel has none: it is as good as gone)
        if not _read(pid, "cmdline"):  # this memory is new: binfmt_elf.c, create_elf_tables
            raise BetweenProgramsError(pid)
        data = _read(pid, "environ")  # that memory was the last program's
    return data.rstrip(b"\0").split(b"\0")


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:  # noqa: PTH123
        return file.read(_ENVIRONMENT_LEN)


def _netns(pid: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")  # noqa: PTH115


def is_stopped(pid: int) -> bool:
    """Whether a signal stopped it; a debugger that holds it is another matter. Source: proc(5), stat."""
    return _stat(pid)[:1] == ["T"]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; none if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()
    except GONE:
        return []


def oom_kills() -> int:
    """How many processes of this host the kernel has killed for want of memory; 0 if it does not tell."""
    try:
        with open("/proc/vmstat", encoding="ascii") as file:  # noqa: PTH123
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


def how_it_ended(code: int | None, *, is_out_of_memory: bool = False) -> str:
    """In words: `code` is an exit code, or a signal as a negative number, None if nobody was told."""
    if code is None:
        return "ended"
    if code >= 0:
        return f"exited with {code}"
    words = f"killed by {_signal_name(-code)}"
    return f"{words}: out of memory" if code == -signal.SIGKILL and is_out_of_memory else words


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_line(path: str) -> str:
    """The last line of a file as printable text; empty if there is none."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return "".join(ch if ch.isprintable() else "?" for ch in lines[-1])[:500] if lines else ""
