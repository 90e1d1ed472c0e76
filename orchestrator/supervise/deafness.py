"""Registrations that nobody hears in some namespace: a mark in the state directory, from a death until its successor
listens. While there is a mark of a registration, no supervisor of the host enables it.

A mark is made before the registration is disabled, and looked for again after it was enabled: whichever supervisor is
last, it leaves the registration disabled if any listener is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator

_DIRECTORY = "deaf"
_LOCK = "lock"  # that of the ledger: whoever changes registrations holds it


def key_name(key: object) -> str:
    """A registration as file names have it."""
    return str(key).replace("/", ",")


class Marks:
    """The marks of one profile in one namespace, `owner`, and the sight of all others."""

    def __init__(self, state_dir: str, owner: str) -> None:
        self._state_dir = state_dir
        self._directory = f"{state_dir}/{_DIRECTORY}"
        self._owner = owner

    def set(self, keys: Iterable[str]) -> None:
        """Raises OSError."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)  # noqa: PTH103 (a supervisor imports no pathlib)
        for key in keys:
            os.close(os.open(self._path(key), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def clear(self, keys: Iterable[str]) -> None:
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(key))  # noqa: PTH108

    def clear_all(self) -> None:
        self.clear(name.partition("@")[0] for name in self._names() if name.partition("@")[2] == self._owner)

    def is_deaf(self, key: str) -> bool:
        """Whether anybody's listener is dead."""
        return any(name.partition("@")[0] == key for name in self._names())

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._directory)  # noqa: PTH208
        except FileNotFoundError:
            return []

    def _path(self, key: str) -> str:
        return f"{self._directory}/{key}@{self._owner}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the lock of the host; False if an orch at work has it. Raises OSError."""
        descriptor = os.open(f"{self._state_dir}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)
