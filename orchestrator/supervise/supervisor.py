"""The supervisor of one profile in one namespace: it starts helper processes, looks after them, and starts them again.

It runs as `python -I -S supervisor.py DIRECTORY STATE_DIR` in that namespace, its listening socket on standard input,
with the standard library and the engine alone, and sleeps until something happens. In DIRECTORY there is, by name of a
process: NAME.order, NAME.log, NAME.stats and NAME.exit; and supervisor.sock, supervisor.json and supervisor.log. If it
is killed the processes go on. The next one adopts them.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # -I and -S leave the standard library alone on the path; it stays first
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120

import contextlib
import signal
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from orchestrator.engine.names import NEXT
from orchestrator.supervise import (
    control,
    inotify,
    lifecycle,
    lifetimes,
    logs,
    place,
    records,
    successor,
    traces,
    watching,
)
from orchestrator.supervise.deafness import Marks
from orchestrator.supervise.errands import Errands
from orchestrator.supervise.inotify import Change
from orchestrator.supervise.lifecycle import Life, State
from orchestrator.supervise.order import Order, VersionError
from orchestrator.supervise.process import Answer, Process, running
from orchestrator.supervise.processes import Processes
from orchestrator.supervise.reactor import Reactor, Timer
from orchestrator.supervise.records import ERROR, INFO, WARNING
from orchestrator.supervise.requests import EXHAUSTED_PAUSE_S, Requests
from orchestrator.supervise.successions import Successions

SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MARK = "ORCH_SUPERVISOR"
"""The variable in the environment of a supervisor by which it is found; see launcher.py."""

STATE_FILE = "supervisor.json"
OWN_LOG = "supervisor.log"

_COUNT_PAUSE_S = 1.0


class Supervisor(Reactor):
    """Its working directory is the one of the profile, from now on, and its namespace must be that of the profile.

    `on_signal` is called for TERM, INT and HUP, `on_reaped` for the end of a child that is none of its processes, with
    its exit code, `on_change` after a change of a state. `relay` gets each line of a log: whose, the line, its level.
    With `is_kept` it does not end when nothing is left to look after, and with `begins_anew` it is replaced when a
    callback fails. `extra` goes into supervisor.json.
    """

    def __init__(self, directory: str, state_dir: str, listener: socket.socket) -> None:
        """Adopts what its predecessor looked after. Raises OSError."""
        super().__init__()
        os.chdir(directory)
        self._not_taken_up: dict[str, Any] = {}
        self.is_kept = False
        self.begins_anew = True
        self.extra: dict[str, Any] = {}
        self.on_signal: Callable[[int], None] = self._end_on_term
        self.on_reaped: Callable[[int, int], None] = lambda _pid, _code: None
        self.on_change: Callable[[], None] = lambda: None
        self.relay: Callable[[str, str, int], None] | None = None
        self._next_count = 0.0
        self._count_timer: Timer | None = None
        marks = Marks(state_dir, os.path.basename(directory))  # noqa: PTH119 (no pathlib here)
        self._processes = Processes(self, marks, say=self.say, changed=self.changed, forgotten=self._end_if_idle)
        self._successions = Successions(self, self._processes, self.say)
        self._listener = listener
        self._requests = Requests(self, listener, self._take, self._end_if_idle)
        self.watch_files(".", inotify.MODIFIED, self._files_written)
        self._succeed()

    @property
    def processes(self) -> Mapping[str, Life]:
        return {name: process.life for name, process in self._processes.by_name.items()}

    def run(self) -> None:
        """Until nothing is left to look after, or `end`."""
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # those that it starts inherit this, too
            signal.signal(number, signal.SIG_IGN)
        self.at(time.monotonic(), self._reap)  # what ended before it hears of children
        try:
            self.loop(SIGNALS)
        except Exception:
            if self.begins_anew:
                successor.begin_anew(self._listener, partial(self.say, level=ERROR))
            raise

    def say(self, text: str, level: int = INFO) -> None:
        """Its own words: relayed, or in its log."""
        if self.relay:
            self.relay("", text, level)
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            os.write(2, f"{stamp} {text}\n".encode())
        logs.bound(OWN_LOG)

    def changed(self) -> None:
        """Tell others what is so now."""
        self._write_state()
        self.on_change()

    def counted(self) -> None:
        """Tell others what is in `extra` now, at most once a second."""
        now = time.monotonic()
        if self._count_timer is None:
            self._count_timer = self.at(max(now, self._next_count), self._tell_counts)

    def _end_if_idle(self) -> None:
        if not (self._processes.by_name or self._not_taken_up or self.is_kept or self._requests.pending):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(STATE_FILE)  # noqa: PTH108 (no pathlib here)
            self.end()

    # -- requests -----------------------------------------------------------------------------------------------------

    def _take(self, request: Mapping[str, Any], answer: Answer) -> None:
        processes = self._processes
        match request:
            case {"do": "start", "name": str(name)}:
                processes.stop(name, partial(processes.begin, Order.read(name), answer))
            case {"do": "succeed", "name": str(name)}:
                self._successions.begin(_next_order(name), answer)
            case {"do": "settle", "name": str(name)}:
                self._successions.settle(name, partial(answer, {}))
            case {"do": "adopt", "name": str(name), "pid": int(pid)}:
                known = processes.by_name.get(name)
                if known and known.life.pid == pid:
                    answer({"pid": pid})
                else:
                    processes.stop(name, partial(processes.look_after, Order.read(name), pid, answer))
            case {"do": "stop", "name": str(name)}:
                processes.stop(name, partial(answer, {}))
            case {"do": "end"}:
                processes.stop_all(partial(answer, {"kept": self.is_kept}))
            case _:
                raise VersionError("not a request")

    # -- signals and children -----------------------------------------------------------------------------------------

    def heard_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
        else:
            self.on_signal(number)

    def _end_on_term(self, number: int) -> None:
        """Its processes go on without it."""
        if number == signal.SIGTERM:
            self.end()

    def _reap(self) -> None:
        options = os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOHANG
        while True:
            try:
                child = os.waitid(os.P_ALL, 0, options)
            except ChildProcessError:
                return
            if child is None:
                return
            if child.si_code == os.CLD_STOPPED:
                self._processes.child_stopped(child.si_pid)
            elif child.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                code = child.si_status if child.si_code == os.CLD_EXITED else -child.si_status
                if not self._processes.child_ended(child.si_pid, code):
                    self.on_reaped(child.si_pid, code)

    # -- files --------------------------------------------------------------------------------------------------------

    def _files_written(self, changes: list[Change]) -> None:
        """A page was touched or a log written."""
        is_lost = any(change.mask & inotify.LOST for change in changes)
        names = {change.name for change in changes}
        for name, process in self._processes.by_name.items():
            if is_lost or logs.file_name(name) in names:
                self._read_log(process)
            if is_lost or f"{name}.stats" in names:
                self._processes.looks.touched(process)

    def _read_log(self, process: Process) -> None:
        relay = self.relay
        name = process.order.name
        if relay and process.tail:
            while lines := process.tail.lines():
                for line in lines:
                    relay(name, line, INFO)
        logs.bound(logs.file_name(name))

    def _write_state(self) -> None:
        processes = {
            name: {
                "state": process.life.state,
                "pid": process.life.pid,
                "born": process.born,
                "restarts": process.life.restarts,
                "since": process.since,
                "reason": process.life.reason,
            }
            for name, process in self._processes.by_name.items()
        }
        report = {"pid": os.getpid(), "processes": {**self._not_taken_up, **processes}, **self.extra}
        try:
            records.write(STATE_FILE, report)
        except OSError:
            records.write_over(STATE_FILE, report)

    def _tell_counts(self) -> None:
        self._count_timer = None
        self._next_count = time.monotonic() + _COUNT_PAUSE_S
        self._write_state()

    # -- the predecessor ----------------------------------------------------------------------------------------------

    def _succeed(self) -> None:
        """Adopt what runs, and take up what has ended meanwhile: its registrations are enabled, and nobody listens."""
        known = records.read_state(STATE_FILE)["processes"]
        for name, seen in known.items():
            self._take_up(name, seen)
        if known:
            self._write_state()

    def _take_up(self, name: str, seen: Mapping[str, Any]) -> None:
        """What is known of it may be nonsense; it is tried again while nothing can be opened."""
        self._not_taken_up.pop(name, None)
        if name in self._processes.by_name:
            return  # somebody has had it started meanwhile
        try:
            self._succeed_one(Order.read(name), seen)
        except ProcessLookupError:  # it has ended in this moment
            self._take_up(name, seen)
        except (ValueError, LookupError, TypeError):
            return
        except OSError as error:
            if error.errno in control.EXHAUSTED:
                self._not_taken_up[name] = seen
                self.say(f"{name} is not looked after yet: {error.strerror}", WARNING)
                self.at(time.monotonic() + EXHAUSTED_PAUSE_S, partial(self._take_up_later, name, seen))

    def _take_up_later(self, name: str, seen: Mapping[str, Any]) -> None:
        self._take_up(name, seen)
        if not self._requests.is_first_to_come:
            self._end_if_idle()

    def _succeed_one(self, orders: Order, seen: Mapping[str, Any]) -> None:
        is_alive = bool(seen["born"]) and traces.born(seen["pid"]) == seen["born"]
        pid = seen["pid"] if is_alive else running(orders)  # one of which nothing was written yet
        if pid:
            process = self._processes.adopt(orders, pid, is_ready=is_alive and seen["state"] == State.RUNNING)
            self._successions.find(process)
            restarts = seen["restarts"] + process.life.restarts  # it may be ready only now
            process.life = lifecycle.counted(process.life, restarts=restarts, reason=seen["reason"])
            process.since = seen["since"]
        elif seen["state"] == State.FATAL:
            self._processes.add(orders, lifecycle.give_up(orders.policy, str(seen["reason"])))
        else:
            process = self._processes.add(orders, lifecycle.adopt(orders.policy, 0))
            if begun := self._successions.find(process):
                self._processes.left_alone(process, begun, None)
            else:
                reason = "ended while nobody looked after it"
                self._processes.follow(process, *lifecycle.ended(process.life, reason, time.monotonic()))


def _next_order(name: str) -> Order:
    """That of a successor. It is in force already if whoever asks was not told that it took over."""
    try:
        return Order.read(name, NEXT)
    except FileNotFoundError:
        return Order.read(name)


def claim(directory: str) -> None:
    """Be known as the supervisor in the foreground before this process has become it. Raises OSError."""
    path = f"{directory}/{STATE_FILE}"
    pid = os.getpid()
    records.write(path, {**records.read_state(path), "pid": pid, "claimed_by": traces.born(pid), "service": True})


def main(directory: str, state_dir: str) -> int:
    """Detached: the listening socket is standard input, the log standard error."""
    supervisor = Supervisor(directory, state_dir, control.inherited())
    lifetimes.attach(supervisor)
    errands = Errands(supervisor, os.environ)
    profile = os.path.basename(directory).partition("@")[0]  # noqa: PTH119 (no pathlib here)
    place.watch(supervisor, os.environ, place.Release(supervisor, errands, profile, state_dir).begin)
    watching.attach(supervisor, errands, directory=directory, state_dir=state_dir)
    supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
