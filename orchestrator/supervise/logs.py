"""The logs of helper processes, which they write themselves: bounded, and relayed line by line where somebody listens.

A log is copied and emptied when it is long: whoever writes it holds it open, and appends. What is written in between is
lost, and so is what a full disk has no room for.
"""

from __future__ import annotations

import contextlib
import os

LOG_BYTES = 256 << 10
"""How long a log may become; the one before it is kept."""

_READ_BYTES = 64 << 10
_LINE_BYTES = 4096


def file_name(name: str) -> str:
    return f"{name}.log"


def bound(path: str) -> bool:
    """Copy a log that is too long to PATH.old and empty it; True if it was."""
    try:
        if os.stat(path).st_size <= LOG_BYTES:  # noqa: PTH116 (a supervisor imports no pathlib)
            return False
        _keep(path)
        os.truncate(path, 0)
    except OSError:
        return False
    return True


def _keep(path: str) -> None:
    with contextlib.suppress(OSError), open(path, "rb") as log, open(f"{path}.old", "wb") as old:  # noqa: PTH123
        old.write(log.read(2 * LOG_BYTES))


class Tail:
    """Reads what is appended to a log, in whole lines."""

    def __init__(self, path: str, *, from_end: bool) -> None:
        self._path = path
        self._offset = _size(path) if from_end else 0
        self._rest = b""

    def lines(self) -> list[str]:
        """Those since the last call. A long one is cut into several."""
        if self._offset > _size(self._path):  # it was emptied
            self._offset = 0
        try:
            with open(self._path, "rb") as file:  # noqa: PTH123
                file.seek(self._offset)
                data = file.read(_READ_BYTES)
        except OSError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_BYTES:
            whole, self._rest = [*whole, self._rest], b""
        return [line.decode(errors="replace") for line in whole]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return 0
