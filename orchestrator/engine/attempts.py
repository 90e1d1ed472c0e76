"""What a helper tries that it may not: refused in Python, counted and told, before the kernel would refuse it.

The kernel's filter of system calls is what holds; this says who tried what. Source: the table of audit events in
Python's documentation.
"""

from __future__ import annotations

import errno
import linecache
import sys
import threading
import traceback
from collections.abc import Callable

_KINDS = frozenset({"fcntl", "os", "pty", "resource", "shutil", "signal", "socket", "subprocess", "syslog", "tempfile"})
_EVENTS = frozenset({"ctypes.call_function", "ctypes.dlopen", "ctypes.dlsym", "import", "open"})
_SHOWN = 80


def refuse(told: Callable[[str], None], *, exempt_thread: int | None = None) -> None:
    """From now on what would open, start, connect or import something raises PermissionError, and `told` is what.

    There is no way back. Tracebacks show the source only where it was read before. Of one thread, which is not the
    helper's, nothing is told.
    """
    _forget_sources()
    sys.unraisablehook = threading.excepthook = _show

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if (event in _EVENTS or event.partition(".")[0] in _KINDS) and threading.get_ident() != exempt_thread:
            what = event if not arguments else f"{event} {arguments[0]!r:.{_SHOWN}}"
            told(what)
            raise PermissionError(errno.EPERM, f"a helper may not do this while it serves: {what}")

    sys.addaudithook(hook)


def _show(raised: sys.UnraisableHookArgs | threading.ExceptHookArgs) -> None:
    """Print what a thread or a `__del__` of a helper raised: the interpreter's own way looks for files of source."""
    if raised.exc_value is not None and not isinstance(raised.exc_value, SystemExit):  # which is how a thread ends
        traceback.print_exception(raised.exc_value)


def _forget_sources() -> None:
    """Make tracebacks look for no file: that would count as an attempt of the helper."""
    for module in tuple(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str):
            linecache.cache.setdefault(file, (0, None, [], file))
