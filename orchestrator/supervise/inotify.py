"""Be told what happens to the files of directories: inotify(7), which the standard library does not have."""

from __future__ import annotations

import ctypes
import os
from struct import Struct
from typing import NamedTuple

MODIFIED = 0x2
"""Written with write(2); memory that is mapped tells nothing."""

MOVED_OUT = 0x40
MOVED_IN = 0x80
CREATED = 0x100
DELETED = 0x200
LOST = 0x4000
"""There were too many to tell; in what is told only."""

ALSO = 0x20000000
"""Together with what is watched in that directory already, instead of in its place; in what is asked for only."""

_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC  # IN_NONBLOCK and IN_CLOEXEC are the same numbers
_EVENT = Struct("@iIII")
_BUFFER_LEN = 1 << 16


class Change(NamedTuple):
    """Something happened to the file `name` in the directory of `watch`; `mask` says what."""

    watch: int
    mask: int
    name: str


class Inotify:
    """Raises OSError, as all of its methods."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = _checked(self._libc.inotify_init1(_FLAGS))

    def add(self, directory: str, mask: int) -> int:
        """Watch a directory; which watch it is."""
        return _checked(self._libc.inotify_add_watch(self._descriptor, os.fsencode(directory), mask))

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self) -> list[Change]:
        """What happened since the last call; it does not wait."""
        try:
            data = os.read(self._descriptor, _BUFFER_LEN)
        except BlockingIOError:
            return []
        changes = []
        offset = 0
        while offset < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size + length
            changes.append(Change(watch, mask, os.fsdecode(data[offset - length : offset].rstrip(b"\0"))))
        return changes


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
