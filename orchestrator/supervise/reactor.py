"""One thread that sleeps in poll(2) until a descriptor, a signal or a time it waits for; otherwise nothing wakes it."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from orchestrator.supervise import inotify
from orchestrator.supervise.inotify import Change, Inotify

Callback = Callable[[], None]
Tell = Callable[[list[Change]], None]

_FILES_PAUSE_S = 0.2
"""Between two looks at what happened to files: whoever writes much wakes us no more than that."""

_WAKEUPS_LEN = 4096


@dataclass(eq=False, slots=True)
class Timer:
    deadline: float
    callback: Callback
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Reactor:
    """Callbacks of descriptors, times and signals, one at a time. An exception of a callback ends `loop`."""

    def __init__(self) -> None:
        self._poller = select.poll()
        self._callbacks: dict[int, Callback] = {}
        self._timers: list[Timer] = []
        self._inotify: Inotify | None = None
        self._tells: dict[int, list[tuple[int, Tell]]] = {}
        self._is_over = False

    def watch(self, descriptor: int, callback: Callback) -> None:
        """Call back whenever a descriptor can be read, or its other end is gone."""
        self._callbacks[descriptor] = callback
        self._poller.register(descriptor, select.POLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Before it is closed."""
        del self._callbacks[descriptor]
        self._poller.unregister(descriptor)

    def at(self, deadline: float, callback: Callback) -> Timer:
        """Call back once, at a time of the monotonic clock."""
        timer = Timer(deadline, callback)
        self._timers.append(timer)
        return timer

    def watch_files(self, directory: str, mask: int, tell: Tell) -> None:
        """Tell of changes to the files of a directory, and of LOST. Raises OSError.

        All share one instance: a user has 128 (fs.inotify.max_user_instances), and root has a supervisor per profile.
        """
        if self._inotify is None:
            self._inotify = Inotify()
            self.watch(self._inotify.fileno(), self._read_files)
        watch = self._inotify.add(directory, mask | inotify.ALSO)
        self._tells.setdefault(watch, []).append((mask, tell))

    def _read_files(self) -> None:
        assert self._inotify is not None
        descriptor = self._inotify.fileno()
        changes = self._inotify.read()
        self.unwatch(descriptor)
        self.at(time.monotonic() + _FILES_PAUSE_S, lambda: self.watch(descriptor, self._read_files))
        for watch, tells in list(self._tells.items()):
            for mask, tell in list(tells):
                mine = [c for c in changes if c.mask & inotify.LOST or (c.watch == watch and c.mask & mask)]
                if mine:
                    tell(mine)

    def end(self) -> None:
        """Let `loop` return."""
        self._is_over = True

    def heard_signal(self, number: int) -> None:
        """A signal came, one of one of those that `loop` was told."""
        raise NotImplementedError

    def loop(self, signals: tuple[signal.Signals, ...]) -> None:
        """Until `end`; it takes these signals over, for good."""
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, lambda *_: None)
        self.watch(read, lambda: self._take_signals(read))
        while not self._is_over:
            self._turn()

    def _turn(self) -> None:
        for descriptor, _ in self._poller.poll(self._timeout_ms()):
            callback = self._callbacks.get(descriptor)
            if callback is not None:  # one that came before it may have ended it
                callback()
        now = time.monotonic()
        due = sorted((timer for timer in self._timers if timer.deadline <= now), key=lambda timer: timer.deadline)
        self._timers = [timer for timer in self._timers if timer.deadline > now and not timer.is_cancelled]
        for timer in due:
            if not timer.is_cancelled:
                timer.callback()

    def _timeout_ms(self) -> int | None:
        deadlines = [timer.deadline for timer in self._timers if not timer.is_cancelled]
        return max(0, ceil(1000 * (min(deadlines) - time.monotonic()))) if deadlines else None

    def _take_signals(self, descriptor: int) -> None:
        for number in sorted(set(os.read(descriptor, _WAKEUPS_LEN))):
            self.heard_signal(number)
