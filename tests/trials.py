"""What the ledger of a state directory says of an apply that has to be confirmed, and how its time passes in a test."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
from collections.abc import Callable, Set
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from orchestrator.app import boot_id
from orchestrator.journal import Ledger
from orchestrator.serial import to_json
from orchestrator.state import Pending
from orchestrator.supervise.traces import born, is_stopped
from tests.waiting import until


def ledger_of(state: Path) -> Ledger:
    return Ledger.open(state, boot_id=boot_id(), create=False)


def waiting(state: Path) -> tuple[Pending, ...]:
    with closing(ledger_of(state)) as ledger:
        return ledger.pending()


def is_watched(state: Path) -> bool:
    with closing(ledger_of(state)) as ledger:
        return ledger.is_watched()


def pass_time(state: Path) -> None:
    """As if the deadline were long over."""
    (over,) = (replace(one, deadline_s=1.0) for one in waiting(state))
    with closing(sqlite3.connect(state / "ledger.sqlite")) as ledger, ledger:
        ledger.execute("UPDATE pending SET value = ?", (to_json(over),))


def wait_for(condition: Callable[[], bool], within_s: float = 60) -> None:
    until(condition, "what is waited for", within_s=within_s)


def watchdogs(state: Path) -> set[int]:
    """Those that undo what is not confirmed, and those behind them."""
    wanted = ["-m", "orchestrator.watchdog", str(state)]
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_text().rstrip("\0").split("\0")[-3:] == wanted:
                found.add(int(entry.name))
    return found


def _is_still(pids: Set[int]) -> bool:
    return all(is_stopped(pid) or not born(pid) for pid in pids)


def kill_watchdogs(state: Path) -> None:
    """All at once: one that is stopped starts no other."""
    stopped: set[int] = set()
    while new := watchdogs(state) - stopped:
        for pid in new:
            os.kill(pid, signal.SIGSTOP)
        stopped |= new
        until(partial(_is_still, frozenset(stopped)), "all watchdogs are stopped")
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
