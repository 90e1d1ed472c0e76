"""What a service does with its profile: applied at the start and on demand, torn down at the end, one after the other.

Decides only; whoever uses it starts the commands, says when they ended, and passes on what it is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Command(StrEnum):
    APPLY = "apply"
    TEARDOWN = "teardown"


class Wish(StrEnum):
    """What somebody outside wants: HUP and TERM."""

    APPLY_AGAIN = "apply again"
    END = "end"


@dataclass(slots=True)
class Service:
    """The commands to run. `running` is the one under way; `is_serving` from the first success to the end."""

    running: Command | None = None
    is_serving: bool = False
    is_ending: bool = False
    is_over: bool = False
    exit_code: int = 0
    trouble: str = ""
    _is_wanted_again: bool = False

    def begin(self) -> Command | None:
        """The first command, unless somebody has wished for the end before."""
        return None if self.is_ending else self._start(Command.APPLY)

    def wish(self, wish: Wish) -> Command | None:
        """The command to start now, if any; the one that runs is let end, and what is wished comes after it."""
        if wish is Wish.END:
            self.is_ending = not self.is_over
        else:
            self._is_wanted_again = True
        return self._next()

    def ended(self, exit_code: int) -> Command | None:
        """Take the exit code of the command that ran, and say what to start now, if anything."""
        command, self.running = self.running, None
        self.trouble = f"{command} failed with exit code {exit_code}" if exit_code else ""
        if command is Command.TEARDOWN or (exit_code and not self.is_serving and not self.is_ending):
            self.is_over = True
            self.exit_code = exit_code
            return None
        self.is_serving |= not exit_code
        return self._next()

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
        return command
