"""Find the class of a helper: one of ours, one in a file of the user's own, or one that an installed package offers.

Whatever is loaded here runs. A helper that is not ours is loaded only where there is no privilege worth having.
"""

from __future__ import annotations

import contextlib
import linecache  # what it knows it shows in tracebacks, and reads no file
import os
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from orchestrator.engine.api import Helper

ENTRY_POINTS = "orch.helpers"
"""The group of entry points under which packages offer helpers: a name, and the class or its module."""

_FILE_MODULE = "orch_helper"


class LoadError(Exception):
    """A helper that cannot be loaded, and why."""


def builtin(name: str) -> type[Helper]:
    """The helper in orchestrator/helpers/NAME.py. Raises LoadError if there is none."""
    module = f"orchestrator.helpers.{name.replace('-', '_')}"
    try:
        return _helper_in(import_module(module))
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # it is there, and something that it needs is not
            raise
        raise LoadError(f"there is no helper {name!r}") from error


def from_source(source: bytes, file: str) -> type[Helper]:
    """The helper in the source of a file. Raises LoadError, with what its code raised if that was the reason."""
    module = ModuleType(_FILE_MODULE)
    module.__file__ = file
    sys.modules[_FILE_MODULE] = module  # dataclasses look their module up
    linecache.cache[file] = (len(source), None, source.decode(errors="replace").splitlines(keepends=True), file)
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise LoadError(_told(error, file)) from error
    return _helper_in(module)


def installed(name: str) -> type[Helper]:
    """The helper of an entry point. Raises LoadError. Without site-packages on the path (-S) they are put there."""
    import site
    from importlib.metadata import entry_points

    if sys.flags.no_site:
        site.main()
    points = tuple(entry_points(group=ENTRY_POINTS, name=name))
    if len(points) != 1:
        raise LoadError(f"{len(points)} installed packages offer a helper {name!r}")
    try:
        offered = points[0].load()
    except (Exception, SystemExit) as error:
        raise LoadError(_told(error)) from error
    if isinstance(offered, ModuleType):
        return _helper_in(offered)
    if isinstance(offered, type) and issubclass(offered, Helper):
        return offered
    raise LoadError(f"{points[0].value} is not a subclass of Helper")


def end_after(work: Callable[[], int]) -> NoReturn:
    """Do the work of a process, and end with its status, or 1, without the finalization of Python.

    What others left in it runs no more, and their threads hold nobody up. Finalization would also end those, for which
    the C library loads a library: where nothing can be opened any more it is too late for that.
    """
    status = 1
    try:
        try:
            status = work()
        except BaseException:  # noqa: BLE001 (it is told, and it is the end)
            sys.excepthook(*sys.exc_info())
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a full disk loses what it said, and others may have closed it
                stream.flush()
    finally:
        os._exit(status)


def _helper_in(module: ModuleType) -> type[Helper]:
    """The one public subclass of Helper that a module defines."""
    found = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Helper) and value.__module__ == module.__name__
        if not name.startswith("_")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(sorted(helper.__name__ for helper in found))
        raise LoadError(f"there are several subclasses of Helper in it: {names}")
    raise LoadError("there is no subclass of orchestrator.engine.api.Helper in it")


def _told(error: BaseException, file: str = "") -> str:
    """What was raised, and by which line of the file, or of any file."""
    from traceback import extract_tb

    text = f"{type(error).__name__}: {error}"
    frames = [frame for frame in extract_tb(error.__traceback__) if file in ("", frame.filename)]
    if isinstance(error, SyntaxError) or not frames:
        return text
    return f"{text} (line {frames[-1].lineno}{'' if file else f' of {frames[-1].filename}'})"
