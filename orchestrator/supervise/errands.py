"""Commands of orch that a supervisor runs as its children: it imports too little to do what they do.

A child is in the namespace of the supervisor and writes where the supervisor writes; it takes none of our variables
along, or it would be taken for a supervisor, or told what somebody told the service.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OWN_NETNS = "/proc/self/ns/net"
"""How a child names the namespace that it is in: whatever name that had may be another's by now."""

_OURS = "ORCH_"
_ORCH = (sys.executable, "-P", "-m", "orchestrator")
_FOR_THE_CHILD = [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGXFSZ]

Ended = Callable[[int], None]


class Supervisor(Protocol):
    """What errands need of orchestrator.supervise.supervisor.Supervisor."""

    on_reaped: Callable[[int, int], None]


def orch(*words: str, state_dir: str) -> list[str]:
    """The command line of orch in the supervisor's namespace; `words` are the command and what is said to it."""
    return [*_ORCH, *words, "--netns", OWN_NETNS, "--state-dir", state_dir]


class Errands:
    """The commands that run now; one for each supervisor, as it takes the children that are nobody else's."""

    def __init__(self, supervisor: Supervisor, environment: Mapping[str, str]) -> None:
        passed = {name: value for name, value in environment.items() if not name.startswith(_OURS)}
        self._environment = {"PATH": SEARCH_PATH, **passed}
        self._running: dict[int, Ended] = {}
        supervisor.on_reaped = self._reaped

    def start(self, argv: list[str], ended: Ended) -> int:
        """Run a command, and call back with its exit code, 128 + N after signal N. Returns its pid. Raises OSError."""
        pid = os.posix_spawn(
            argv[0],
            argv,
            self._environment,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setpgroup=0,  # a terminal's INT is for the supervisor, which says when to stop
            setsigdef=_FOR_THE_CHILD,
        )
        self._running[pid] = ended
        return pid

    def _reaped(self, pid: int, code: int) -> None:
        ended = self._running.pop(pid, None)
        if ended:  # else it is an orphan that came to us as process 1
            ended(code if code >= 0 else 128 - code)
