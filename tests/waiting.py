"""Waiting for what others do in their own time."""

from __future__ import annotations

import time
from collections.abc import Callable

WITHIN_S = 30.0
_POLL_S = 0.005


def until(holds: Callable[[], bool], what: str | Callable[[], str], *, within_s: float = WITHIN_S) -> float:
    """Wait; seconds that it took. A function as `what` is asked when the time is over.

    To look takes a fifth of the time at most: a guest has one CPU, which what is waited for needs.
    """
    started = looked = time.monotonic()
    while not holds():
        now = time.monotonic()
        assert now < started + within_s, f"not within {within_s:g} s: {what() if callable(what) else what}"
        time.sleep(max(_POLL_S, 4 * (now - looked)))
        looked = time.monotonic()
    return time.monotonic() - started
