"""Another process takes over from one that is looked after: begun, found by the next supervisor, and over."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from functools import partial

from orchestrator.engine.names import NEXT
from orchestrator.supervise import lifecycle, succession, traces
from orchestrator.supervise.lifecycle import State
from orchestrator.supervise.order import Order
from orchestrator.supervise.process import Answer, Process, is_child, running, says_ready, start
from orchestrator.supervise.processes import Processes
from orchestrator.supervise.reactor import Reactor
from orchestrator.supervise.records import INFO, WARNING, Say
from orchestrator.supervise.succession import Succession


class Successions:
    """Those of the processes of a profile, one at a time of each: see `Process.succession`."""

    def __init__(self, reactor: Reactor, processes: Processes, say: Say) -> None:
        self._reactor = reactor
        self._processes = processes
        self._say = say

    def begin(self, orders: Order, answer: Answer) -> None:
        """Let another process take over from one that runs, which goes on if that fails."""
        process = self._processes.by_name.get(orders.name)
        if process is not None and process.succession:
            process.succession.then.append(partial(self.begin, orders, answer))
        elif process is not None and process.order.env == orders.env and process.life.state is not State.FATAL:
            if process.life.state is State.RUNNING:
                answer({"pid": process.life.pid})
            else:
                process.when_ready.append(answer)
        elif process is None or process.life.state is not State.RUNNING or not process.order.has_page:
            answer({"error": "no process is there to take over from", "is_refused": True})
        else:
            try:
                self.follow(process, orders, start(orders, succession.argv(orders)))
            except OSError as error:
                answer({"error": f"cannot be started: {error.strerror}"})
            else:
                process.when_ready.append(answer)
                self._processes.looks.from_now_on(process)

    def settle(self, name: str, then: Callable[[], None]) -> None:
        """Wait until no process takes over under that name: its documents are read and renamed until then."""
        process = self._processes.by_name.get(name)
        if process is not None and process.succession:
            process.succession.then.append(then)
        else:
            then()

    def find(self, process: Process) -> Succession | None:
        """The one that a supervisor before this one began, and that goes on without it."""
        with contextlib.suppress(OSError, ValueError):
            orders = Order.read(process.order.name, NEXT)
            pid = running(orders)
            if pid not in (0, process.life.pid):
                return self.follow(process, orders, pid)
        return None

    def follow(self, process: Process, orders: Order, pid: int) -> Succession:
        """Raises OSError as Succession does."""
        begun = Succession(
            self._reactor,
            orders,
            pid,
            says_ready=partial(says_ready, orders.name, pid),
            late=partial(process.kill, signal.SIGKILL),
            over=partial(self._over, process),
        )
        process.succession = begun
        return begun

    def _over(self, process: Process, why: str) -> None:
        over, process.succession = process.succession, None
        assert over is not None
        if why:
            self._say(f"{process.order.name}: pid {over.pid} did not take over: {why}", WARNING)
            process.answer({"error": why} | ({"is_refused": True} if over.is_refused else {}))
            if over.is_alone:
                self._processes.gone(process, over.code)
        else:
            self.take_over(process, over)
            process.answer({"pid": over.pid})
        for callback in over.then:
            callback()

    def take_over(self, process: Process, over: Succession) -> None:
        """The successor is the process from now on."""
        self._say(f"{over.order.name}: pid {over.pid} took over from pid {process.life.pid}", INFO)
        with contextlib.suppress(OSError):  # then its documents are those of before if it has to be started again
            succession.take_up_documents(over.order)
        process.order = over.order
        process.born, process.since = traces.born(over.pid), time.time()
        if not is_child(over.pid):
            process.pidfd, over.pidfd = over.pidfd, -1
            self._reactor.watch(process.pidfd, partial(self._processes.gone, process, None))
        self._processes.follow(process, *lifecycle.succeeded(process.life, over.order.policy, over.pid))
        self._processes.looks.from_now_on(process)
