"""Looks at a process: whether it is ready, stopped, or hangs. The next look at it takes the place of one to come."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from orchestrator.supervise import lifecycle, traces
from orchestrator.supervise.lifecycle import Acts, Life, State
from orchestrator.supervise.process import Process, says_ready
from orchestrator.supervise.reactor import Reactor

LOOK_S = 1.5
"""Between two looks at a process; one that hangs is found by the third at the latest, within 5 s."""

STOPPED_S = 2.0
"""How long a process may be stopped by a signal."""

_READY_POLL_S = 0.02

Follow = Callable[[Process, Life, Acts], None]


class Looks:
    """`follow` gets what was seen, as the life of a process from now on and what is to be done."""

    def __init__(self, reactor: Reactor, follow: Follow) -> None:
        self._reactor = reactor
        self._follow = follow

    def until_ready(self, process: Process) -> None:
        """It was started a moment ago."""
        self._at(process, _READY_POLL_S, self.whether_ready)

    def whether_ready(self, process: Process) -> None:
        if process.life.state is not State.STARTING:
            return
        process.look = None
        if _is_ready(process):
            self._follow(process, *lifecycle.ready(process.life))
        elif process.life.pid:
            self.until_ready(process)

    def from_now_on(self, process: Process) -> None:
        """It works, or is idle: the first look, and as many as are needed to see which."""
        self.stop(process)
        process.patience = traces.Patience()
        self._whether_hung(process)

    def touched(self, process: Process) -> None:
        """Its page was written: it works, and nobody looks at one that was idle."""
        if process.life.state is State.RUNNING and not process.look:
            self.from_now_on(process)

    def stopped(self, process: Process) -> None:
        """A signal stopped it."""
        self._at(process, STOPPED_S, partial(self._whether_stopped, pid=process.life.pid))

    def stop(self, process: Process) -> None:
        if process.look:
            process.look.cancel()
            process.look = None

    def _at(self, process: Process, after_s: float, look: Callable[[Process], None]) -> None:
        self.stop(process)
        process.look = self._reactor.at(time.monotonic() + after_s, partial(look, process))

    def _whether_stopped(self, process: Process, pid: int) -> None:
        process.look = None
        if process.life.pid != pid or process.life.state not in (State.RUNNING, State.STARTING):
            return
        if traces.is_stopped(pid):
            self._hung(process, f"{lifecycle.HUNG}stopped by a signal for {STOPPED_S:g} s", can_tell=False)
        elif process.life.state is State.STARTING:
            self.whether_ready(process)
        else:
            self.from_now_on(process)

    def _whether_hung(self, process: Process) -> None:
        process.look = None
        if process.life.state is not State.RUNNING:
            return
        if process.pidfd >= 0 and traces.is_stopped(process.life.pid):
            self.stopped(process)
            return
        rows = traces.queues()
        work = process.patience.look([rows[number] for number in process.order.queues if number in rows])
        succession = process.succession
        if work is traces.Work.HUNG and succession:  # whichever of the two it is: the process reads on, or hangs still
            succession.abandon("packets wait, and nobody answers them")
            self.from_now_on(process)
        elif work is traces.Work.HUNG:
            self._hung(process, f"{lifecycle.HUNG}packets wait, and it answers none", can_tell=True)
        elif work is traces.Work.BUSY or process.is_looked_at_always or succession:
            self._at(process, LOOK_S, self._whether_hung)

    def _hung(self, process: Process, reason: str, *, can_tell: bool) -> None:
        self._follow(process, *lifecycle.hung(process.life, reason, time.monotonic(), can_tell=can_tell))


def _is_ready(process: Process) -> bool:
    if process.order.has_page and not says_ready(process.order.name, process.life.pid):
        return False
    return not missing(process)


def missing(process: Process) -> str:
    """What keeps it from being ready, in words; empty if nothing is known that does."""
    rows = traces.queues()
    unbound = [number for number in process.order.queues if number not in rows or not rows[number].is_ready]
    return f"it does not listen on queue {', '.join(map(str, unbound))}" if unbound else ""
