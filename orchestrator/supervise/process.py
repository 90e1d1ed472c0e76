"""One process that is looked after, and what can be done with it: started, found again, sent a signal."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.engine import counters
from orchestrator.supervise import logs, traces, trust
from orchestrator.supervise.lifecycle import Life
from orchestrator.supervise.order import Order
from orchestrator.supervise.reactor import Timer
from orchestrator.supervise.succession import Succession

Answer = Callable[[Mapping[str, Any]], None]


@dataclass(eq=False, slots=True)
class Process:
    """One that is looked after. `pidfd` is of one that is not our child, else -1. `how` it ended last, in short.

    `timer` is for the deadline of its life, `look` for the next look at it. `succession`: another takes over from it.
    """

    order: Order
    life: Life
    since: float
    how: str = ""
    born: int = 0
    pidfd: int = -1
    oom_kills: int = 0
    timer: Timer | None = None
    look: Timer | None = None
    patience: traces.Patience = field(default_factory=traces.Patience)
    tail: logs.Tail | None = None
    succession: Succession | None = None
    when_ready: list[Answer] = field(default_factory=list)
    when_gone: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_looked_at_always(self) -> bool:
        """Nothing wakes us when it hangs: it touches no page, or we are not told that it is stopped."""
        return not self.order.has_page or self.pidfd >= 0

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)
            else:
                os.kill(self.life.pid, number)
                if number == signal.SIGTERM:
                    os.kill(self.life.pid, signal.SIGCONT)

    def answer(self, answer: Mapping[str, Any]) -> None:
        """Tell those who wait until it is ready."""
        waiting, self.when_ready = self.when_ready, []
        for tell in waiting:
            tell(answer)


def start(orders: Order, argv: list[str]) -> int:
    """Start a process in a session of its own; it writes its log itself. Returns its pid. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        log = os.open(logs.file_name(orders.name), flags, 0o600)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        return os.posix_spawn(
            argv[0],
            argv,
            orders.env,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
            setsigmask=[],
        )
    finally:
        os.close(log)


def running(orders: Order) -> int:
    """The pid of a process that was started as that, 0 if there is none."""
    directory = os.getcwd()  # noqa: PTH109 (a supervisor imports no pathlib)
    return traces.with_environment(orders.env, lambda pid: trust.is_helper(pid, directory, orders.name))


def is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def says_ready(name: str, pid: int) -> bool:
    """Whether the page of that name is of this process, and says that it is ready."""
    try:
        seen = counters.read(f"{name}.stats")
    except (OSError, ValueError):
        return False
    return seen.pid == pid and seen.state is counters.State.READY
