"""How long to wait before something that failed is tried again."""

from __future__ import annotations


class Pauses:
    """Seconds: `first_s`, then twice as long each time, `last_s` at most."""

    def __init__(self, first_s: float, last_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._last_s = last_s

    def take(self) -> float:
        """The next one."""
        taken_s, self._next_s = self._next_s, min(2 * self._next_s, self._last_s)
        return taken_s

    def reset(self) -> None:
        """Begin with the first one again."""
        self._next_s = self._first_s
