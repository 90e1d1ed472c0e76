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
import json
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from orchestrator.engine import counters, netlink
from orchestrator.engine.names import NEXT
from orchestrator.supervise import (
    control,
    inotify,
    lifecycle,
    lifetimes,
    logs,
    place,
    succession,
    successor,
    traces,
    trust,
    watching,
)
from orchestrator.supervise.deafness import Marks
from orchestrator.supervise.errands import Errands
from orchestrator.supervise.inotify import Change
from orchestrator.supervise.lifecycle import Act, Acts, Life, State
from orchestrator.supervise.order import Order, VersionError
from orchestrator.supervise.reactor import Reactor, Timer
from orchestrator.supervise.succession import Succession

SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MARK = "ORCH_SUPERVISOR"
"""The variable in the environment of a supervisor by which it is found; see launcher.py."""

STATE_FILE = "supervisor.json"
OWN_LOG = "supervisor.log"

LOOK_S = 1.5
"""Between two looks at a process; one that hangs is found by the third at the latest, within 5 s."""

STOPPED_S = 2.0
"""How long a process may be stopped by a signal."""

_READY_POLL_S = 0.02
_ENABLE_AGAIN_S = 0.25
_COUNT_PAUSE_S = 1.0
_FIRST_REQUEST_WITHIN_S = 30.0
_EXHAUSTED_PAUSE_S = 0.5
_ERROR, _WARNING, _INFO = 3, 4, 6  # levels of sd-daemon(3)
_ANSWER_MAX = 65536

Answer = Callable[[Mapping[str, Any]], None]


@dataclass(eq=False, slots=True)
class Process:
    """One that is looked after. `pidfd` is of one that is not our child, else -1. `how` it ended last, in short.

    `timer` is for the deadline of its life, `look` for the next look at it.
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
    when_ready: list[Answer] = field(default_factory=list)
    when_gone: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_looked_at_always(self) -> bool:
        """Nothing wakes us when it hangs: it touches no page, or we are not told that it is stopped."""
        return not self.order.has_page or self.pidfd >= 0


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
        self._processes: dict[str, Process] = {}
        self._successions: dict[str, Succession] = {}
        self._not_taken_up: dict[str, Any] = {}
        self.is_kept = False
        self.begins_anew = True
        self.extra: dict[str, Any] = {}
        self.on_signal: Callable[[int], None] = self._end_on_term
        self.on_reaped: Callable[[int, int], None] = lambda _pid, _code: None
        self.on_change: Callable[[], None] = lambda: None
        self.relay: Callable[[str, str, int], None] | None = None
        self._marks = Marks(state_dir, os.path.basename(directory))  # noqa: PTH119 (no pathlib here)
        # Opened now: whoever is out of descriptors or memory when a process dies can still disable.
        self._netlink = netlink.open_control_socket()
        self._netlink.bind((0, 0))
        self._next_count = 0.0
        self._count_timer: Timer | None = None
        self._requests = 0
        self._listener = listener
        listener.settimeout(0)
        self._listen()
        self.watch_files(".", inotify.MODIFIED, self._files_written)
        self._patience = self.at(time.monotonic() + _FIRST_REQUEST_WITHIN_S, self._end_if_idle)
        self._succeed()

    @property
    def processes(self) -> Mapping[str, Life]:
        return {name: process.life for name, process in self._processes.items()}

    def run(self) -> None:
        """Until nothing is left to look after, or `end`."""
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # those that it starts inherit this, too
            signal.signal(number, signal.SIG_IGN)
        self.at(time.monotonic(), self._reap)  # what ended before it hears of children
        try:
            self.loop(SIGNALS)
        except Exception:
            if self.begins_anew:
                successor.begin_anew(self._listener, partial(self.say, level=_ERROR))
            raise

    def say(self, text: str, level: int = _INFO) -> None:
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
            process = self._by_pid(child.si_pid)
            has_ended = child.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)
            code = child.si_status if child.si_code == os.CLD_EXITED else -child.si_status
            if process is None:
                if has_ended:
                    for begun in self._successions.values():
                        if begun.pid == child.si_pid:
                            begun.reaped(code)
                    self.on_reaped(child.si_pid, code)
            elif has_ended:
                self._gone(process, code)
            elif child.si_code == os.CLD_STOPPED:
                self._look_at(process, STOPPED_S, partial(self._look_whether_stopped, process, child.si_pid))

    def _by_pid(self, pid: int) -> Process | None:
        return next((p for p in self._processes.values() if p.life.pid == pid and p.pidfd < 0), None)

    # -- what was said of a process is done ---------------------------------------------------------------------------

    def _follow(self, process: Process, life: Life, acts: Acts) -> None:
        """Take a new life over, and act."""
        before, process.life = process.life, life
        if process.timer:
            process.timer.cancel()
        process.timer = self.at(life.deadline, partial(self._deadline, process)) if life.deadline is not None else None
        for act in acts:
            self._act(process, act)
        if process.life.state in (State.BACKOFF, State.STOPPING, State.FATAL):
            self._stop_looking(process)
        if life.state is not before.state:
            process.since = time.time()
            self._tell_state(process, life)
        if (life.state, life.pid) != (before.state, before.pid) or Act.FORGET in acts:
            self.changed()
        self._answer_all(process, acts)  # who is answered may look at once what is told

    def _tell_state(self, process: Process, life: Life) -> None:
        has_reason = life.state is State.FATAL or (life.state is State.STOPPING and not life.is_leaving)
        reason = f": {life.reason}" if has_reason else ""
        self.say(f"{process.order.name}: {life.state}{reason}", _ERROR if life.state is State.FATAL else _INFO)

    def _act(self, process: Process, act: Act) -> None:
        match act:
            case Act.SPAWN:
                self._spawn(process)
            case Act.DISABLE:
                self._disable(process)
            case Act.HEARD:
                self._marks.clear(process.order.keys)
                self._look_from_now_on(process)
            case Act.ENABLE:
                self._send(process.order.keep_disabled)
                self._enable(process)
            case Act.TERM:
                self._kill(process, signal.SIGTERM)
            case Act.ABORT:
                self._kill(process, signal.SIGABRT)
            case Act.KILL:
                self._kill(process, signal.SIGKILL)
            case Act.FORGET:
                self._forget(process)

    def _deadline(self, process: Process) -> None:
        was_starting = process.life.state is State.STARTING
        life, acts = lifecycle.passed(process.life, time.monotonic())
        if was_starting:
            life = lifecycle.because(life, self._missing(process))
        self._follow(process, life, acts)

    def _spawn(self, process: Process) -> None:
        name = process.order.name
        process.oom_kills = traces.oom_kills()
        process.patience = traces.Patience()
        process.pidfd = -1
        if process.tail is None:
            process.tail = logs.Tail(logs.file_name(name), from_end=False)
        try:
            pid = _start(process.order, process.order.argv)
        except OSError as error:
            reason = f"cannot be started: {error.strerror}"
            self._follow(process, *lifecycle.ended(process.life, reason, time.monotonic()))
            return
        process.life = lifecycle.spawned(process.life, pid)
        process.born = 0
        with contextlib.suppress(OSError):  # a supervisor after this one finds it by its environment
            process.born = traces.born(pid)
        self._look_at(process, _READY_POLL_S, partial(self._look_whether_ready, process))

    def _kill(self, process: Process, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if process.pidfd >= 0:
                signal.pidfd_send_signal(process.pidfd, number)
            else:
                os.kill(process.life.pid, number)
                if number == signal.SIGTERM:
                    os.kill(process.life.pid, signal.SIGCONT)

    def _gone(self, process: Process, code: int | None) -> None:
        """It has ended; `code` is None where only its parent is told how."""
        if process.pidfd >= 0:
            self.unwatch(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1
        succession = self._successions.get(process.order.name)
        if succession and not succession.is_alone:
            self._left_alone(process, succession, code)
            return
        is_out_of_memory = code == -signal.SIGKILL and traces.oom_kills() > process.oom_kills
        reason = traces.how_it_ended(code, is_out_of_memory=is_out_of_memory)
        life = process.life
        process.how = life.reason if life.state is State.STOPPING else reason
        words = traces.last_line(logs.file_name(process.order.name)) if code and code > 0 else ""
        self._follow(process, *lifecycle.ended(life, f"{reason}: {words}" if words else reason, time.monotonic()))
        if not life.is_leaving:
            self._record(process, life.pid)

    def _record(self, process: Process, pid: int) -> None:
        self.say(f"{process.order.name}: pid {pid} {process.how}", _WARNING)
        record = {"pid": pid, "how": process.how, "time": time.time()}
        with contextlib.suppress(OSError):
            _write(f"{process.order.name}.exit", record)

    def _forget(self, process: Process) -> None:
        self._marks.clear(process.order.keys)
        self._stop_looking(process)
        if process.timer:
            process.timer.cancel()
        if self._processes.get(process.order.name) is process:
            del self._processes[process.order.name]

    def _answer_all(self, process: Process, acts: Acts) -> None:
        """Tell those who wait until it is ready, or gone."""
        if Act.HEARD in acts:
            self._answer(process, {"pid": process.life.pid})
        elif process.life.state is State.FATAL:
            self._answer(process, {"error": process.how or process.life.reason})
        elif Act.FORGET in acts:
            self._answer(process, {"error": "it was stopped meanwhile"})
        if Act.FORGET in acts:
            waiting, process.when_gone = process.when_gone, []
            for callback in waiting:
                callback()
            self._end_if_idle()

    def _answer(self, process: Process, answer: Mapping[str, Any]) -> None:
        waiting, process.when_ready = process.when_ready, []
        for tell in waiting:
            tell(answer)

    def _end_if_idle(self) -> None:
        if not (self._processes or self._not_taken_up or self.is_kept or self._requests):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(STATE_FILE)  # noqa: PTH108 (no pathlib here)
            self.end()

    # -- registrations ------------------------------------------------------------------------------------------------

    def _disable(self, process: Process) -> None:
        with contextlib.suppress(OSError):  # a full disk: it is disabled all the same
            self._marks.set(process.order.keys)
        self._send(process.order.disable)

    def _enable(self, process: Process) -> None:
        """Enable what nobody is deaf to, as soon as no orch is at work, if it is still ready then."""
        if not process.order.enable or process.life.state is not State.RUNNING:
            return
        try:
            with self._marks.locked() as is_mine:
                if not is_mine:
                    self.at(time.monotonic() + _ENABLE_AGAIN_S, partial(self._enable, process))
                    return
                for key, message in process.order.enable.items():
                    if not self._marks.is_deaf(key):
                        self._send([message])
        except OSError as error:
            self.say(f"{process.order.name}: its registrations stay disabled: {error}", _ERROR)
            return
        if any(map(self._marks.is_deaf, process.order.keys)):
            self._send(process.order.disable)

    def _send(self, messages: list[str]) -> None:
        for message in messages:
            with contextlib.suppress(OSError):  # one registration that is gone must not keep us from the next
                self._netlink.send(bytes.fromhex(message))
                self._netlink.recv(_ANSWER_MAX)

    # -- looking at processes -----------------------------------------------------------------------------------------

    def _look_at(self, process: Process, after_s: float, look: Callable[[], None]) -> None:
        self._stop_looking(process)
        process.look = self.at(time.monotonic() + after_s, look)

    def _stop_looking(self, process: Process) -> None:
        if process.look:
            process.look.cancel()
            process.look = None

    def _look_whether_ready(self, process: Process) -> None:
        if process.life.state is not State.STARTING:
            return
        process.look = None
        if self._is_ready(process):
            self._follow(process, *lifecycle.ready(process.life))
        elif process.life.pid:
            self._look_at(process, _READY_POLL_S, partial(self._look_whether_ready, process))

    def _is_ready(self, process: Process) -> bool:
        if process.order.has_page and not _says_ready(process.order.name, process.life.pid):
            return False
        return not self._missing(process)

    def _missing(self, process: Process) -> str:
        """What keeps it from being ready, in words; empty if nothing is known that does."""
        rows = traces.queues()
        missing = [number for number in process.order.queues if number not in rows or not rows[number].is_ready]
        return f"it does not listen on queue {', '.join(map(str, missing))}" if missing else ""

    def _look_whether_stopped(self, process: Process, pid: int) -> None:
        process.look = None
        if process.life.pid != pid or process.life.state not in (State.RUNNING, State.STARTING):
            return
        if traces.is_stopped(pid):
            self._hung(process, f"{lifecycle.HUNG}stopped by a signal for {STOPPED_S:g} s", can_tell=False)
        elif process.life.state is State.STARTING:
            self._look_whether_ready(process)
        else:
            self._look_from_now_on(process)

    def _look_from_now_on(self, process: Process) -> None:
        """It works, or is idle: the first look, and as many as are needed to see which."""
        self._stop_looking(process)
        process.patience = traces.Patience()
        self._look_whether_hung(process)

    def _look_whether_hung(self, process: Process) -> None:
        process.look = None
        if process.life.state is not State.RUNNING:
            return
        if process.pidfd >= 0 and traces.is_stopped(process.life.pid):
            self._look_at(process, STOPPED_S, partial(self._look_whether_stopped, process, process.life.pid))
            return
        rows = traces.queues()
        work = process.patience.look([rows[number] for number in process.order.queues if number in rows])
        succession = self._successions.get(process.order.name)
        if work is traces.Work.HUNG and succession:  # whichever of the two it is: the process reads on, or hangs still
            succession.abandon("packets wait, and nobody answers them")
            self._look_from_now_on(process)
        elif work is traces.Work.HUNG:
            self._hung(process, f"{lifecycle.HUNG}packets wait, and it answers none", can_tell=True)
        elif work is traces.Work.BUSY or process.is_looked_at_always or succession:
            self._look_at(process, LOOK_S, partial(self._look_whether_hung, process))

    def _hung(self, process: Process, reason: str, *, can_tell: bool) -> None:
        self._follow(process, *lifecycle.hung(process.life, reason, time.monotonic(), can_tell=can_tell))

    # -- files --------------------------------------------------------------------------------------------------------

    def _files_written(self, changes: list[Change]) -> None:
        """A page was touched or a log written."""
        is_lost = any(change.mask & inotify.LOST for change in changes)
        names = {change.name for change in changes}
        for process in self._processes.values():
            name = process.order.name
            if is_lost or logs.file_name(name) in names:
                self._read_log(process)
            is_touched = is_lost or f"{name}.stats" in names
            if is_touched and process.life.state is State.RUNNING and not process.look:
                self._look_from_now_on(process)

    def _read_log(self, process: Process) -> None:
        relay = self.relay
        name = process.order.name
        if relay and process.tail:
            while lines := process.tail.lines():
                for line in lines:
                    relay(name, line, _INFO)
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
            for name, process in self._processes.items()
        }
        report = {"pid": os.getpid(), "processes": {**self._not_taken_up, **processes}, **self.extra}
        try:
            _write(STATE_FILE, report)
        except OSError:  # a full disk: the file has room for what it had
            with contextlib.suppress(OSError), open(STATE_FILE, "r+", encoding="utf-8") as file:  # noqa: PTH123
                json.dump(report, file)
                file.truncate()

    def _tell_counts(self) -> None:
        self._count_timer = None
        self._next_count = time.monotonic() + _COUNT_PAUSE_S
        self._write_state()

    # -- the predecessor ----------------------------------------------------------------------------------------------

    def _succeed(self) -> None:
        """Adopt what runs, and take up what has ended meanwhile: its registrations are enabled, and nobody listens."""
        known = _read_state(STATE_FILE)["processes"]
        for name, seen in known.items():
            self._take_up(name, seen)
        if known:
            self._write_state()

    def _take_up(self, name: str, seen: Mapping[str, Any]) -> None:
        """What is known of it may be nonsense; it is tried again while nothing can be opened."""
        self._not_taken_up.pop(name, None)
        if name in self._processes:
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
                self.say(f"{name} is not looked after yet: {error.strerror}", _WARNING)
                self.at(time.monotonic() + _EXHAUSTED_PAUSE_S, partial(self._take_up_later, name, seen))

    def _take_up_later(self, name: str, seen: Mapping[str, Any]) -> None:
        self._take_up(name, seen)
        if self._patience.is_cancelled:  # else a first request is to come
            self._end_if_idle()

    def _succeed_one(self, orders: Order, seen: Mapping[str, Any]) -> None:
        is_alive = bool(seen["born"]) and traces.born(seen["pid"]) == seen["born"]
        pid = seen["pid"] if is_alive else _running(orders)  # one of which nothing was written yet
        if pid:
            self._adopt(orders, pid, is_ready=is_alive and seen["state"] == State.RUNNING)
            process = self._processes[orders.name]
            self._find_succession(process)
            restarts = seen["restarts"] + process.life.restarts  # it may be ready only now
            process.life = lifecycle.counted(process.life, restarts=restarts, reason=seen["reason"])
            process.since = seen["since"]
        elif seen["state"] == State.FATAL:
            self._add(orders, lifecycle.give_up(orders.policy, str(seen["reason"])))
        else:
            process = self._add(orders, lifecycle.adopt(orders.policy, 0))
            if begun := self._find_succession(process):
                self._left_alone(process, begun, None)
                return
            reason = "ended while nobody looked after it"
            self._follow(process, *lifecycle.ended(process.life, reason, time.monotonic()))

    def _add(self, orders: Order, life: Life) -> Process:
        process = self._processes[orders.name] = Process(orders, life, time.time())
        return process

    def _adopt(self, orders: Order, pid: int, *, is_ready: bool) -> None:
        """Raises OSError if there is no such process."""
        born = traces.born(pid)
        pidfd = os.pidfd_open(pid)
        process = self._add(orders, lifecycle.adopt(orders.policy, pid))
        process.pidfd, process.born = pidfd, born
        process.oom_kills = traces.oom_kills()
        process.tail = logs.Tail(logs.file_name(orders.name), from_end=True)
        self.watch(pidfd, partial(self._gone, process, None))
        if is_ready:
            self._look_from_now_on(process)
            return
        self._follow(process, lifecycle.doubted(process.life, time.monotonic()), ())
        self._look_whether_ready(process)

    # -- successors of a process ---------------------------------------------------------------------------------------

    def _begin_succession(self, orders: Order, answer: Answer) -> None:
        """Let another process take over from one that runs, which goes on if that fails."""
        process = self._processes.get(orders.name)
        if orders.name in self._successions:
            self._successions[orders.name].then.append(partial(self._begin_succession, orders, answer))
        elif process is not None and process.order.env == orders.env and process.life.state is not State.FATAL:
            if process.life.state is State.RUNNING:
                answer({"pid": process.life.pid})
            else:
                process.when_ready.append(answer)
        elif process is None or process.life.state is not State.RUNNING or not process.order.has_page:
            answer({"error": "no process is there to take over from", "is_refused": True})
        else:
            try:
                self._follow_succession(process, orders, _start(orders, succession.argv(orders)))
            except OSError as error:
                answer({"error": f"cannot be started: {error.strerror}"})
            else:
                process.when_ready.append(answer)
                self._look_from_now_on(process)

    def _settle(self, name: str, then: Callable[[], None]) -> None:
        """Wait until no process takes over under that name: its documents are read and renamed until then."""
        if name in self._successions:
            self._successions[name].then.append(then)
        else:
            then()

    def _follow_succession(self, process: Process, orders: Order, pid: int) -> Succession:
        name = orders.name
        self._successions[name] = Succession(
            self,
            orders,
            pid,
            says_ready=partial(_says_ready, name, pid),
            late=partial(self._kill, process, signal.SIGKILL),
            over=partial(self._succession_over, process),
        )
        return self._successions[name]

    def _succession_over(self, process: Process, why: str) -> None:
        name = process.order.name
        over = self._successions.pop(name)
        if why:
            self.say(f"{name}: pid {over.pid} did not take over: {why}", _WARNING)
            self._answer(process, {"error": why} | ({"is_refused": True} if over.is_refused else {}))
            if over.is_alone:
                self._gone(process, over.code)
        else:
            self._take_over_from(process, over)
            self._answer(process, {"pid": over.pid})
        for callback in over.then:
            callback()

    def _left_alone(self, process: Process, begun: Succession, code: int | None) -> None:
        """The predecessor has ended; nobody listens unless its successor is ready already, which may take its time."""
        begun.left_alone(code)
        if process.order.name in self._successions:
            self._stop_looking(process)
            self._follow(process, *lifecycle.orphaned(process.life))

    def _take_over_from(self, process: Process, over: Succession) -> None:
        self.say(f"{over.order.name}: pid {over.pid} took over from pid {process.life.pid}")
        with contextlib.suppress(OSError):  # then its documents are those of before if it has to be started again
            succession.take_up_documents(over.order)
        process.order = over.order
        process.born, process.since = traces.born(over.pid), time.time()
        if not _is_child(over.pid):
            process.pidfd, over.pidfd = over.pidfd, -1
            self.watch(process.pidfd, partial(self._gone, process, None))
        self._follow(process, *lifecycle.succeeded(process.life, over.order.policy, over.pid))
        self._look_from_now_on(process)

    def _find_succession(self, process: Process) -> Succession | None:
        """The one that a supervisor before this one began, and that goes on without it."""
        with contextlib.suppress(OSError, ValueError):
            orders = Order.read(process.order.name, NEXT)
            pid = _running(orders)
            if pid not in (0, process.life.pid):
                return self._follow_succession(process, orders, pid)
        return None

    # -- requests -----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in control.EXHAUSTED:
                raise
            self.unwatch(self._listener.fileno())  # whoever asks waits a little longer
            self.at(time.monotonic() + _EXHAUSTED_PAUSE_S, self._listen)
            return
        self._patience.cancel()
        self._requests += 1
        self.watch(channel.fileno(), partial(self._hear, channel))

    def _listen(self) -> None:
        self.watch(self._listener.fileno(), self._accept)

    def _hear(self, channel: socket.socket) -> None:
        self.unwatch(channel.fileno())
        try:
            request = control.decode(channel.recv(control.MESSAGE_MAX))
            channel.send(control.encode(control.TAKEN))
        except OSError:  # nobody waits for it any more
            request = None
        if request is None:
            self._close(channel)
            return
        answer = partial(self._reply, channel)
        try:
            self._take(request, answer)
        except VersionError as error:
            answer({"error": str(error), "is_outdated": True})
        except (OSError, ValueError, LookupError, TypeError) as error:
            answer({"error": f"{type(error).__name__}: {error}"})

    def _take(self, request: Mapping[str, Any], answer: Answer) -> None:
        match request:
            case {"do": "start", "name": str(name)}:
                begin = partial(self._begin, Order.read(name), answer)
                self._stop(name, begin)
            case {"do": "succeed", "name": str(name)}:
                self._begin_succession(_next_order(name), answer)
            case {"do": "settle", "name": str(name)}:
                self._settle(name, partial(answer, {}))
            case {"do": "adopt", "name": str(name), "pid": int(pid)}:
                known = self._processes.get(name)
                if known and known.life.pid == pid:
                    answer({"pid": pid})
                else:
                    self._stop(name, partial(self._take_over, Order.read(name), pid, answer))
            case {"do": "stop", "name": str(name)}:
                self._stop(name, partial(answer, {}))
            case {"do": "end"}:
                self._stop_all(partial(answer, {"kept": self.is_kept}))
            case _:
                raise VersionError("not a request")

    def _begin(self, orders: Order, answer: Answer) -> None:
        life, acts = lifecycle.begin(orders.policy, time.monotonic())
        process = self._add(orders, life)
        process.when_ready.append(answer)
        self.say(f"{orders.name}: {life.state}")
        self.changed()  # before it starts: a supervisor after this one is to find it
        self._follow(process, life, acts)
        self.changed()

    def _take_over(self, orders: Order, pid: int, answer: Answer) -> None:
        try:
            self._adopt(orders, pid, is_ready=True)
        except OSError as error:
            answer({"error": f"pid {pid}: {error.strerror}"})
            return
        self.changed()
        answer({"pid": pid})

    def _stop(self, name: str, then: Callable[[], None]) -> None:
        process = self._processes.get(name)
        if process is None:
            then()
            return
        process.when_gone.append(then)
        if name in self._successions:
            self._successions[name].abandon("its predecessor is to end")
        if not process.life.is_leaving:
            self._follow(process, *lifecycle.stop(process.life, time.monotonic()))

    def _stop_all(self, then: Callable[[], None]) -> None:
        left = list(self._processes)

        def gone(name: str) -> None:
            left.remove(name)
            if not left:
                then()

        if not left:
            then()
        for name in list(left):
            self._stop(name, partial(gone, name))

    def _reply(self, channel: socket.socket, answer: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # who asked may have been killed
            channel.send(control.encode(answer))
        self._close(channel)

    def _close(self, channel: socket.socket) -> None:
        channel.close()
        self._requests -= 1
        self._end_if_idle()


def _start(orders: Order, argv: list[str]) -> int:
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


def _running(orders: Order) -> int:
    """The pid of a process that was started as that, 0 if there is none."""
    directory = os.getcwd()  # noqa: PTH109 (no pathlib here)
    return traces.with_environment(orders.env, lambda pid: trust.is_helper(pid, directory, orders.name))


def _next_order(name: str) -> Order:
    """That of a successor. It is in force already if whoever asks was not told that it took over."""
    try:
        return Order.read(name, NEXT)
    except FileNotFoundError:
        return Order.read(name)


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _says_ready(name: str, pid: int) -> bool:
    try:
        seen = counters.read(f"{name}.stats")
    except (OSError, ValueError):
        return False
    return seen.pid == pid and seen.state is counters.State.READY


def _write(path: str, content: Mapping[str, Any]) -> None:
    """Replace a file by a new one, whole. Raises OSError."""
    new = f"{path}.new"
    with open(new, "w", encoding="utf-8") as file:  # noqa: PTH123 (no pathlib here)
        json.dump(content, file)
    os.rename(new, path)  # noqa: PTH104


def claim(directory: str) -> None:
    """Be known as the supervisor in the foreground before this process has become it. Raises OSError."""
    path = f"{directory}/{STATE_FILE}"
    pid = os.getpid()
    _write(path, {**_read_state(path), "pid": pid, "claimed_by": traces.born(pid), "service": True})


def _read_state(path: str) -> dict[str, Any]:
    """What a supervisor wrote; without a process if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 (no pathlib here)
            report = json.load(file)
    except (OSError, ValueError):
        return {"processes": {}}
    return report if isinstance(report, dict) and isinstance(report.get("processes"), dict) else {"processes": {}}


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
