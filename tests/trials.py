"""What the ledger of a state directory says of an apply that has to be confirmed, and how its time passes in a test."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from orchestrator.app import boot_id
from orchestrator.journal import Ledger
from orchestrator.serial import to_json
from orchestrator.state import Pending


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
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
