"""Describe a helper that is not ours. Its code is read here and runs elsewhere: in a process without privilege."""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from orchestrator import catalogue
from orchestrator.catalogue import CatalogueEntry
from orchestrator.catalogue.description import Description, parse
from orchestrator.engine.loading import ENTRY_POINTS
from orchestrator.errors import OrchError
from orchestrator.supervise import filters

WITHIN_S = 10.0
"""How long the code of a helper may take to be loaded."""

_BEGIN = "import sys; sys.path.append(sys.argv[1]); from orchestrator.engine.describe import main; main(*sys.argv[2:])"
_PACKAGE_PARENT = Path(__file__).parents[2]


def describe(use: str, *, within_s: float = WITHIN_S) -> Description | None:
    """The helper in the file `use`, an absolute path, or the one that an installed package offers under that name.

    None if no package does. Raises OrchError for a file that is missing or, if orch is root, that another user could
    change, and for what is no helper.
    """
    if use.startswith("/"):
        return _describe_file(Path(os.path.realpath(use)), within_s)
    from importlib.metadata import entry_points

    if not entry_points(group=ENTRY_POINTS, name=use):
        return None
    return _parsed(_ask("installed", use, b"", within_s))


def installed(warn: Callable[[str], None]) -> tuple[CatalogueEntry, ...]:
    """What installed packages offer, but for names that the catalogue has; one that cannot be used is warned of."""
    from importlib.metadata import entry_points

    found = []
    for use in sorted(entry_points(group=ENTRY_POINTS).names - catalogue.helpers().keys()):
        try:
            description = describe(use)
        except OrchError as error:
            warn(f"{_printable(use)}: {error.what}")
            continue
        if description is not None:
            found.append(catalogue.described(_printable(use), description))
    return tuple(found)


def _describe_file(file: Path, within_s: float) -> Description:
    if not str(file).isprintable():
        raise OrchError(f"its path has a character that cannot be printed: {str(file)!r}")
    source = _read(file)
    try:
        text = source.decode()
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise OrchError(f"line {line} is not UTF-8", where=str(file), hint="save the file as UTF-8") from error
    described = _parsed(_ask("file", str(file), source, within_s))
    return replace(described, file=str(file), source=text)


def _read(file: Path) -> bytes:
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OrchError("not a regular file", where=str(file))
            if os.geteuid() == 0:
                _refuse_insecure(file, status)
            return opened.read()
    except OSError as error:
        raise OrchError(f"cannot be read: {error.strerror}", where=str(file)) from error


def _refuse_insecure(file: Path, status: os.stat_result) -> None:
    """Root runs nothing that others could change: neither the file nor any directory on the way to it."""
    for path, seen in ((file, status), *((directory, directory.stat()) for directory in file.parents)):
        if seen.st_uid != 0 or seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            hint = "move the helper to a directory that only root can write, like those above it"
            if path == file:
                hint = f"chown root {path}; chmod go-w {path}"
            raise OrchError(f"{path} can be changed by others than root", where=str(file), hint=hint)


def _ask(kind: str, name: str, source: bytes, within_s: float) -> object:
    """The answer of engine/describe.py. Raises OrchError if there is none.

    Nothing but files in memory connects the two, whose size is limited there: what it says costs no more, and whatever
    it leaves running holds nobody up.
    """
    with _memory(source) as asked, _memory() as answer, _memory() as said:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BEGIN, str(_PACKAGE_PARENT), kind, name, filters.loading().hex()],
            stdin=asked,
            stdout=answer,
            stderr=said,
            cwd="/",
            env={"LANG": "C.UTF-8"},
            start_new_session=True,
        ) as process:
            try:
                has_ended = _ends(process.pid, within_s)
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # it is not reaped yet: that number is still its own
        if not has_ended:
            raise OrchError(f"its code did not end within {within_s:g} s")
        answer.seek(0)
        said.seek(0)
        try:
            return json.loads(answer.read())
        except (ValueError, RecursionError):
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            raise OrchError(": ".join(["loading it ended without an answer", *map(_printable, last)])) from None


def _memory(content: bytes = b"") -> BinaryIO:
    file = os.fdopen(os.memfd_create("orch"), "r+b", buffering=0)
    file.write(content)
    file.seek(0)
    return file


def _ends(pid: int, within_s: float) -> bool:
    """True once a child has ended, which is not reaped; False if it still runs after `within_s`."""
    pidfd = os.pidfd_open(pid)
    try:
        return bool(select.select([pidfd], [], [], within_s)[0])
    finally:
        os.close(pidfd)


def _parsed(answer: object) -> Description:
    if not isinstance(answer, dict) or "error" in answer:
        raise OrchError(_printable(answer.get("error") if isinstance(answer, dict) else answer))
    try:
        return parse(answer.get("declared"))
    except ValueError as error:
        raise OrchError(_printable(error)) from error


def _printable(said: object) -> str:
    """What code of others said, in one line that harms no terminal."""
    return "".join(ch if ch.isprintable() else " " for ch in str(said))[:500]
