"""What a service does with its profile: applied at the start and on demand, torn down at the end, one after the other.

Decides only; whoever uses it starts the commands, says when they ended and when a pause is over, and passes on what it
is told. Times are of the monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.supervise.pauses import Pauses

AGAIN_S, AGAIN_MAX_S = 1.0, 30.0
END_WITHIN_S = 90.0
"""For how long a teardown is tried again; a unit of systemd has two minutes (TimeoutStopSec=)."""

_REFUSED = 1
"""The exit code of a command that was refused, or failed, and left all as it was."""


class Command(StrEnum):
    APPLY = "apply"
    TEARDOWN = "teardown"


class Wish(StrEnum):
    """What somebody outside wants: HUP and TERM."""

    APPLY_AGAIN = "apply again"
    END = "end"


@dataclass(slots=True)
class Service:
    """The commands to run. `running` is the one under way; `is_serving` from the first success to the end.

    A later apply that fails is tried again until one works, a teardown that is refused for `END_WITHIN_S`: `pause_s` is
    how long to wait before `again`, 0 if there is nothing to try again.
    """

    running: Command | None = None
    is_serving: bool = False
    is_ending: bool = False
    is_over: bool = False
    exit_code: int = 0
    trouble: str = ""
    pause_s: float = 0.0
    _is_wanted_again: bool = False
    _end_by: float = 0.0
    _pauses: Pauses = field(default_factory=lambda: Pauses(AGAIN_S, AGAIN_MAX_S))

    def begin(self) -> Command | None:
        """The first command, unless somebody has wished for the end before."""
        return None if self.is_ending else self._start(Command.APPLY)

    def wish(self, wish: Wish, now: float) -> Command | None:
        """The command to start now, if any; the one that runs is let end, and what is wished comes after it."""
        if wish is Wish.APPLY_AGAIN:
            self._is_wanted_again = True
        elif not self.is_ending:
            self.is_ending = not self.is_over
            self._end_by = now + END_WITHIN_S
        self._pauses.reset()
        return self._next()

    def ended(self, exit_code: int, now: float) -> Command | None:
        """Take the exit code of the command that ran, and say what to start now, if anything."""
        command, self.running = self.running, None
        self.trouble = f"{command} failed with exit code {exit_code}" if exit_code else ""
        if command is Command.TEARDOWN:
            self._torn_down(exit_code, now)
            return None
        if not exit_code:
            self.is_serving = True
            self._pauses.reset()
        elif not (self.is_serving or self.is_ending):
            self._end(exit_code)
        elif not (self._is_wanted_again or self.is_ending):
            self._is_wanted_again = True
            self.pause_s = self._pauses.take()
            return None
        return self._next()

    def again(self) -> Command | None:
        """The pause is over: the command to start now, if any."""
        return self._next() if self.pause_s else None

    def _torn_down(self, exit_code: int, now: float) -> None:
        pause_s = self._pauses.take()
        if exit_code == _REFUSED and now + pause_s <= self._end_by:
            self.pause_s = pause_s
        else:
            self._end(exit_code)

    def _end(self, exit_code: int) -> None:
        self.is_over = True
        self.exit_code = exit_code

    def _next(self) -> Command | None:
        if self.running or self.is_over:
            return None
        if self.is_ending:
            return self._start(Command.TEARDOWN)
        if self._is_wanted_again:
            self._is_wanted_again = False
            return self._start(Command.APPLY)
        return None

    def _start(self, command: Command) -> Command:
        self.running = command
        self.pause_s = 0.0
        return command
