"""orch as a child that gets a signal at a stage of its work: `python -m tests.stages STAGE SIGNAL apply ...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator import app, cli, watchdog
from orchestrator.journal import Ledger
from orchestrator.model import Backend
from orchestrator.ports import System


class Stage(StrEnum):
    """Of an apply that has to be confirmed, and is not."""

    GUARDED = "guarded"
    LOADING = "loading"
    LOADED = "loaded"
    VERIFIED = "verified"
    UNDOING = "undoing"


class _Rules:
    """The rules of the kernel; something happens before and after they are loaded."""

    def __init__(self, real: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._real = real
        self._before = before
        self._after = after

    def load(self, *arguments: Any) -> None:
        self._before()
        self._real.load(*arguments)
        self._after()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def main(wanted: Stage, number: int, argv: list[str]) -> int:
    real_system, real_start, real_settle = app.kernel_system, watchdog.start, Ledger.settle_applied

    def reaching(*stages: Stage) -> Callable[[], None]:
        """What reaches the first of them when it is called first, and so on."""
        coming = iter(stages)

        def reach() -> None:
            if next(coming, None) is wanted:
                os.kill(os.getpid(), number)

        return reach

    loading, loaded = reaching(Stage.LOADING, Stage.UNDOING), reaching(Stage.LOADED)
    guarded, verified = reaching(Stage.GUARDED), reaching(Stage.VERIFIED)

    def system(state_dir: Path) -> System:
        there = real_system(state_dir)
        rules: Any = _Rules(there.rules[Backend.NFTABLES], loading, loaded)
        return replace(there, rules={**there.rules, Backend.NFTABLES: rules})

    def start(state_dir: Path) -> None:
        real_start(state_dir)
        guarded()

    def settle(*arguments: Any, **named: Any) -> None:
        real_settle(*arguments, **named)
        verified()

    app.kernel_system, watchdog.start = system, start
    Ledger.settle_applied = settle  # type: ignore[method-assign]
    return cli.run(argv)


if __name__ == "__main__":
    sys.exit(main(Stage(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
