"""The supervisor after this one: this process anew when it failed, or one in the background for what a service leaves.

Either has the listening socket as its standard input, and adopts what runs as if this one had been killed.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping

ANEW_AFTER_S = 60.0
"""One that fails again within this time ends: to begin anew does not help."""

_BEGUN_ANEW = "ORCH_SUPERVISOR_ANEW"  # when, by the monotonic clock


def begin_anew(listener: socket.socket, say: Callable[[str], None]) -> None:
    """Say which exception is being handled, and become a new supervisor; returns if that was done a moment ago.

    Requests are forgotten: whoever made one notices, and makes it again. Raises OSError.
    """
    import traceback  # not before it is needed: supervisors are small

    for line in traceback.format_exc().splitlines():
        say(line)
    now = time.monotonic()
    if now - float(os.environ.get(_BEGUN_ANEW, "-inf")) < ANEW_AFTER_S:
        return
    say("begins anew")
    os.dup2(listener.fileno(), 0)
    os.execve(sys.executable, sys.orig_argv, {**os.environ, _BEGUN_ANEW: str(now)})


def leave_to_another(listener: socket.socket, argv: list[str], environment: Mapping[str, str], *, log: str) -> None:
    """Start a supervisor that nobody waits for, in a session of its own. Raises OSError."""
    os.posix_spawn(
        argv[0],
        argv,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, listener.fileno(), 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=[],
    )
