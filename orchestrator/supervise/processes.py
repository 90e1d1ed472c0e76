"""The processes of a profile, and their life: what happens to one, and what is done about it as lifecycle.py says."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial

from orchestrator.supervise import lifecycle, logs, looks, records, traces
from orchestrator.supervise.deafness import Marks
from orchestrator.supervise.lifecycle import Act, Acts, Life, State
from orchestrator.supervise.looks import Looks
from orchestrator.supervise.order import Order
from orchestrator.supervise.process import Answer, Process, start
from orchestrator.supervise.reactor import Reactor
from orchestrator.supervise.records import ERROR, INFO, WARNING, Say
from orchestrator.supervise.registrations import Registrations
from orchestrator.supervise.succession import Succession


class Processes:
    """`changed` is called after a change of a state, and `forgotten` when one is looked after no more."""

    def __init__(
        self, reactor: Reactor, marks: Marks, *, say: Say, changed: Callable[[], None], forgotten: Callable[[], None]
    ) -> None:
        """Raises OSError."""
        self.by_name: dict[str, Process] = {}
        self.looks = Looks(reactor, self.follow)
        self._say = say
        self._reactor = reactor
        self._registrations = Registrations(reactor, marks, say)
        self._changed = changed
        self._forgotten = forgotten

    # -- what others want of one --------------------------------------------------------------------------------------

    def begin(self, orders: Order, answer: Answer) -> None:
        """Start one that is not there."""
        life, acts = lifecycle.begin(orders.policy, time.monotonic())
        process = self.add(orders, life)
        process.when_ready.append(answer)
        self._say(f"{orders.name}: {life.state}", INFO)
        self._changed()  # before it starts: a supervisor after this one is to find it
        self.follow(process, life, acts)
        self._changed()

    def look_after(self, orders: Order, pid: int, answer: Answer) -> None:
        """Look after one that runs already."""
        try:
            self.adopt(orders, pid, is_ready=True)
        except OSError as error:
            answer({"error": f"pid {pid}: {error.strerror}"})
            return
        self._changed()
        answer({"pid": pid})

    def stop(self, name: str, then: Callable[[], None]) -> None:
        """End one, if there is one of that name, and look after it no more; also one that others began meanwhile."""
        process = self.by_name.get(name)
        if process is None:
            then()
            return
        process.when_gone.append(partial(self.stop, name, then))
        if process.succession:
            process.succession.abandon("its predecessor is to end")
        if not process.life.is_leaving:
            self.follow(process, *lifecycle.stop(process.life, time.monotonic()))

    def stop_all(self, then: Callable[[], None]) -> None:
        left = list(self.by_name)

        def gone(name: str) -> None:
            left.remove(name)
            if not left:
                then()

        if not left:
            then()
        for name in list(left):
            self.stop(name, partial(gone, name))

    def add(self, orders: Order, life: Life) -> Process:
        process = self.by_name[orders.name] = Process(orders, life, time.time())
        return process

    def adopt(self, orders: Order, pid: int, *, is_ready: bool) -> Process:
        """Raises OSError if there is no such process."""
        born = traces.born(pid)
        pidfd = os.pidfd_open(pid)
        process = self.add(orders, lifecycle.adopt(orders.policy, pid))
        process.pidfd, process.born = pidfd, born
        process.oom_kills = traces.oom_kills()
        process.tail = logs.Tail(logs.file_name(orders.name), from_end=True)
        self._reactor.watch(pidfd, partial(self.gone, process, None))
        if is_ready:
            self.looks.from_now_on(process)
        else:
            self.follow(process, lifecycle.doubted(process.life, time.monotonic()), ())
            self.looks.whether_ready(process)
        return process

    # -- what happens to one ------------------------------------------------------------------------------------------

    def child_stopped(self, pid: int) -> None:
        process = self._by_pid(pid)
        if process:
            self.looks.stopped(process)

    def child_ended(self, pid: int, code: int) -> bool:
        """False if it is none of the processes; it may be about to take over from one."""
        process = self._by_pid(pid)
        if process:
            self.gone(process, code)
            return True
        for process in self.by_name.values():
            if process.succession and process.succession.pid == pid:
                process.succession.reaped(code)
        return False

    def _by_pid(self, pid: int) -> Process | None:
        return next((p for p in self.by_name.values() if p.life.pid == pid and p.pidfd < 0), None)

    def gone(self, process: Process, code: int | None) -> None:
        """It has ended; `code` is None where only its parent is told how."""
        if process.pidfd >= 0:
            self._reactor.unwatch(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1
        if process.succession and not process.succession.is_alone:
            self.left_alone(process, process.succession, code)
            return
        is_out_of_memory = code == -signal.SIGKILL and traces.oom_kills() > process.oom_kills
        reason = traces.how_it_ended(code, is_out_of_memory=is_out_of_memory)
        life = process.life
        process.how = life.reason if life.state is State.STOPPING else reason
        words = traces.last_line(logs.file_name(process.order.name)) if code and code > 0 else ""
        self.follow(process, *lifecycle.ended(life, f"{reason}: {words}" if words else reason, time.monotonic()))
        if not life.is_leaving:
            self._record(process, life.pid)

    def left_alone(self, process: Process, begun: Succession, code: int | None) -> None:
        """The predecessor has ended; nobody listens unless its successor is ready already, which may take its time."""
        begun.left_alone(code)
        if process.succession:
            self.looks.stop(process)
            self.follow(process, *lifecycle.orphaned(process.life))

    def _deadline(self, process: Process) -> None:
        was_starting = process.life.state is State.STARTING
        life, acts = lifecycle.passed(process.life, time.monotonic())
        if was_starting:
            life = lifecycle.because(life, looks.missing(process))
        self.follow(process, life, acts)

    def _record(self, process: Process, pid: int) -> None:
        self._say(f"{process.order.name}: pid {pid} {process.how}", WARNING)
        record = {"pid": pid, "how": process.how, "time": time.time()}
        with contextlib.suppress(OSError):
            records.write(f"{process.order.name}.exit", record)

    # -- what was said of a process is done ---------------------------------------------------------------------------

    def follow(self, process: Process, life: Life, acts: Acts) -> None:
        """Take a new life over, and act."""
        before, process.life = process.life, life
        if process.timer:
            process.timer.cancel()
        process.timer = None
        if life.deadline is not None:
            process.timer = self._reactor.at(life.deadline, partial(self._deadline, process))
        for act in acts:
            self._act(process, act)
        if process.life.state in (State.BACKOFF, State.STOPPING, State.FATAL):
            self.looks.stop(process)
        if life.state is not before.state:
            process.since = time.time()
            self._tell_state(process, life)
        if (life.state, life.pid) != (before.state, before.pid) or Act.FORGET in acts:
            self._changed()
        self._answer_all(process, acts)  # who is answered may look at once what is told

    def _tell_state(self, process: Process, life: Life) -> None:
        has_reason = life.state is State.FATAL or (life.state is State.STOPPING and not life.is_leaving)
        reason = f": {life.reason}" if has_reason else ""
        self._say(f"{process.order.name}: {life.state}{reason}", ERROR if life.state is State.FATAL else INFO)

    def _act(self, process: Process, act: Act) -> None:
        match act:
            case Act.SPAWN:
                self._spawn(process)
            case Act.DISABLE:
                self._registrations.disable(process)
            case Act.HEARD:
                self._registrations.unmark(process)
                self.looks.from_now_on(process)
            case Act.ENABLE:
                self._registrations.enable(process)
            case Act.TERM:
                process.kill(signal.SIGTERM)
            case Act.ABORT:
                process.kill(signal.SIGABRT)
            case Act.KILL:
                process.kill(signal.SIGKILL)
            case Act.FORGET:
                self._forget(process)

    def _spawn(self, process: Process) -> None:
        name = process.order.name
        process.oom_kills = traces.oom_kills()
        process.patience = traces.Patience()
        process.pidfd = -1
        if process.tail is None:
            process.tail = logs.Tail(logs.file_name(name), from_end=False)
        try:
            pid = start(process.order, process.order.argv)
        except OSError as error:
            reason = f"cannot be started: {error.strerror}"
            self.follow(process, *lifecycle.ended(process.life, reason, time.monotonic()))
            return
        process.life = lifecycle.spawned(process.life, pid)
        process.born = 0
        with contextlib.suppress(OSError):  # a supervisor after this one finds it by its environment
            process.born = traces.born(pid)
        self.looks.until_ready(process)

    def _forget(self, process: Process) -> None:
        self._registrations.unmark(process)
        self.looks.stop(process)
        if process.timer:
            process.timer.cancel()
        if self.by_name.get(process.order.name) is process:
            del self.by_name[process.order.name]

    def _answer_all(self, process: Process, acts: Acts) -> None:
        """Tell those who wait until it is ready, or gone."""
        if Act.HEARD in acts:
            process.answer({"pid": process.life.pid})
        elif process.life.state is State.FATAL:
            process.answer({"error": process.how or process.life.reason})
        elif Act.FORGET in acts:
            process.answer({"error": "it was stopped meanwhile"})
        if Act.FORGET in acts:
            waiting, process.when_gone = process.when_gone, []
            for callback in waiting:
                callback()
            self._forgotten()
