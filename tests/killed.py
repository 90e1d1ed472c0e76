"""orch that kills itself at the N-th call that changes something: `python -m tests.killed 3 BEFORE apply FILE`.

The adapters of the running kernel are wrapped, so nothing in orch knows of it. With N = 0 it lives, and says its calls.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from unittest.mock import patch

from orchestrator import app, cli
from orchestrator.ports import System
from tests.adapters import CHANGES, wrapped


class Moment(StrEnum):
    BEFORE = "BEFORE"
    AFTER = "AFTER"


@dataclass(slots=True)
class Death:
    """SIGKILL to this process before or after its `place`-th counted call (from 1; 0 is never)."""

    place: int = 0
    moment: Moment = Moment.BEFORE
    calls: list[str] = field(default_factory=list)

    def awaiting(self, system: System) -> System:
        """The same system, whose calls that change something are counted."""
        return wrapped(system, self.around, CHANGES)

    def around(self, name: str, call: Callable[[], Any]) -> Any:
        self.calls.append(name)
        if (len(self.calls), Moment.BEFORE) == (self.place, self.moment):
            os.kill(os.getpid(), signal.SIGKILL)
        result = call()
        if (len(self.calls), Moment.AFTER) == (self.place, self.moment):
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def main(place: str, moment: str, *argv: str) -> int:
    death = Death(int(place), Moment(moment))
    make = app.kernel_system

    def dying(state_dir: Path) -> System:
        return death.awaiting(make(state_dir))

    with patch.object(app, "kernel_system", dying):
        code = cli.run(list(argv))
    print(*(f"{number} {call}" for number, call in enumerate(death.calls, 1)), sep="\n", file=sys.stderr)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
