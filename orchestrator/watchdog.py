"""The process that undoes an apply which nobody confirms: `python -P -m orchestrator.watchdog STATE_DIR`.

It belongs to no terminal, HUP, INT and TERM do nothing to it, and it holds nothing of the command that started it. One
of them is at work on a state directory, for all that waits there; further ones stand behind it, and it starts one if
there is none of its own: where it is killed that one is at work at once. It sleeps until the ledger changes or a
deadline comes, and ends once nothing waits any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator import app
from orchestrator.errors import LedgerVersionError, OrchError
from orchestrator.execute import EXPECTED, Outcome
from orchestrator.journal import Ledger
from orchestrator.reports import Talk
from orchestrator.state import Pending, describe
from orchestrator.supervise import inotify
from orchestrator.supervise.inotify import Inotify

LOG = "watchdog.log"

_READY = b"ready"
_LOCK_WAIT_S = 600.0  # whoever holds the lock for longer is waited for again
_AGAIN_AFTER_S = 30.0
_LOG_LEN = 1 << 18  # it may try again for days
_CHANGES = inotify.MODIFIED | inotify.CREATED | inotify.DELETED | inotify.MOVED_IN
_SECOND_AGAIN_S, _SECOND_AGAIN_MAX_S = 1.0, 30.0  # one that ends at once is not started again and again
_NEVER_S = 1e9
_TFD_TIMER_ABSTIME = 1  # timerfd_settime(2); TFD_NONBLOCK and TFD_CLOEXEC are O_NONBLOCK and O_CLOEXEC
_log = logging.getLogger(__name__)


def start(state_dir: Path) -> None:
    """Start one, and come back once it is ready. Raises OrchError if it does not get there."""
    process = _started(state_dir, subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as said:
        is_ready = said.read(len(_READY)) == _READY
    process.returncode = 0  # it is meant to outlive us: no warning about a child that was not reaped
    if not is_ready:
        raise OrchError("nobody could be started who would undo it", where=f"its log is {state_dir / LOG}")


def _started(state_dir: Path, said: int) -> subprocess.Popen[bytes]:
    """A watchdog that may not be ready yet, which it says to `said`. Raises OSError."""
    passed = {name: value for name, value in os.environ.items() if not name.startswith("ORCH_")}
    with (state_dir / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "orchestrator.watchdog", str(state_dir)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=log,
            cwd="/",
            env=passed,
            start_new_session=True,
        )


def main(state_dir: Path) -> None:
    """Be a watchdog: say that we are ready, and look after what waits until nothing does."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _do_nothing)  # not SIG_IGN, which what we start would inherit
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(process)d] %(message)s")
    talk = Talk(_log_step, _log.warning, lambda _plan, _reason: False, lambda: 0)
    system = app.kernel_system(state_dir)
    dog = Watchdog(app.App(system, state_dir, app.boot_id(), talk, wait_s=_LOCK_WAIT_S))
    dog.run(_say_ready)


class Watchdog:
    """Sleeps until what waits in the ledger of `app` is overdue, and undoes it."""

    def __init__(self, app: app.App) -> None:
        self._app = app
        self._clock = app.system.clock
        self._timer = _Timer()
        self._changes = Inotify()
        self._changes.add(str(app.state_dir), _CHANGES)
        self._second = _Second(app.state_dir, not_before_s=self._clock.boottime() + _SECOND_AGAIN_S)
        self._known: tuple[Pending, ...] = ()
        self._trouble = ""

    def run(self, ready: Callable[[], None]) -> None:
        if not self._has_ledger():
            return
        with contextlib.closing(self._open()) as ledger, ledger.watched(ready):
            tried_s = again_s = 0.0
            while waiting := self._pending():
                now_s = self._clock.boottime()
                due_s = min(_due_s(one, tried_s=tried_s, again_s=again_s) for one in waiting)
                if due_s <= now_s:
                    tried_s = now_s
                    self._undo()
                    again_s = self._clock.boottime() + _AGAIN_AFTER_S
                    continue
                self._sleep(until_s=min(due_s, self._be_backed(now_s)))

    def _be_backed(self, now_s: float) -> float:
        """When to see to it again that somebody stands behind this one; whoever cannot read the ledger would end."""
        return math.inf if self._trouble else self._second.be_there(now_s)

    def _undo(self) -> None:
        """Settling undoes what is overdue; what could not be undone is tried again."""
        log = self._app.state_dir / LOG
        with contextlib.suppress(OSError):
            if log.stat().st_size > _LOG_LEN:
                os.truncate(log, 0)
        try:
            with self._app.settled("rollback of what nobody confirmed"):
                pass
        except EXPECTED as error:
            _log.error("%s", error)

    def _pending(self) -> tuple[Pending, ...]:
        """Nothing, where the ledger was taken away or is a newer orch's; what was known, where it cannot be read."""
        if not self._has_ledger():
            return ()
        try:
            with contextlib.closing(self._open()) as ledger:
                self._known = ledger.pending()
            self._trouble = ""
        except LedgerVersionError as error:
            _log.error("%s", error)
            return ()
        except EXPECTED as error:
            if str(error) != self._trouble:  # what is written into our log wakes us again
                _log.error("%s", error)
            self._trouble = str(error)
        return self._known

    def _has_ledger(self) -> bool:
        return (self._app.state_dir / "ledger.sqlite").exists()

    def _open(self) -> Ledger:
        """For writing: only so a ledger is repaired whose writer was killed."""
        return Ledger.open(self._app.state_dir, boot_id=self._app.boot_id, create=True)

    def _sleep(self, *, until_s: float) -> None:
        """Until that moment of the boot clock, or until the second one ends, or something is written."""
        self._timer.set(until_s)
        select.select([self._timer.fileno(), self._changes.fileno(), *self._second.descriptors], [], [])
        self._changes.read()


def _due_s(pending: Pending, *, tried_s: float, again_s: float) -> float:
    """Its deadline, or `again_s` if it was overdue already when that was tried, at `tried_s`; by the boot clock."""
    is_tried = pending.is_rejected or pending.deadline_s <= tried_s
    return again_s if is_tried else pending.deadline_s


class _Second:
    """A watchdog behind this one, which takes over when this one is killed.

    It is not started at once, as an apply is under way then.
    """

    def __init__(self, state_dir: Path, *, not_before_s: float) -> None:
        self._state_dir = state_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before_s = not_before_s
        self._pause_s = _SECOND_AGAIN_S
        self.descriptors: list[int] = []

    def be_there(self, now_s: float) -> float:
        """Start one if there is none; when to try that again, by the boot clock."""
        if self._process and self._process.poll() is None:
            return math.inf
        while self.descriptors:
            os.close(self.descriptors.pop())
        if now_s < self._not_before_s:
            return self._not_before_s
        self._not_before_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _SECOND_AGAIN_MAX_S)
        try:
            self._process = _started(self._state_dir, subprocess.DEVNULL)
            self.descriptors.append(os.pidfd_open(self._process.pid))
        except OSError as error:
            _log.error("nobody stands behind this one: %s", error)
            return self._not_before_s
        return math.inf


class _Timer:
    """Readable from a moment of the boot clock on: timerfd_create(2), which Python has from 3.13 on."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.timerfd_create(time.CLOCK_BOOTTIME, os.O_NONBLOCK | os.O_CLOEXEC)
        _check(self._descriptor)

    def fileno(self) -> int:
        return int(self._descriptor)

    def set(self, moment_s: float) -> None:
        """0 would be never."""
        seconds, fraction = divmod(min(max(moment_s, 0.001), _NEVER_S), 1)
        setting = (ctypes.c_long * 4)(0, 0, int(seconds), int(fraction * 1e9))
        _check(self._libc.timerfd_settime(self._descriptor, _TFD_TIMER_ABSTIME, setting, None))


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _say_ready() -> None:
    os.write(1, _READY)
    os.dup2(2, 1)  # nobody hears us any more


def _log_step(outcome: Outcome) -> None:
    _log.info("%s: %s", describe(outcome.step), outcome.error or "ok")


def _do_nothing(_number: int, _frame: object) -> None:
    pass


if __name__ == "__main__":
    main(Path(sys.argv[1]))
