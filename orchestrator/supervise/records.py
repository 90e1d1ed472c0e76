"""What a supervisor says and writes down for others: the levels of its words, and small files of JSON."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

ERROR, WARNING, INFO = 3, 4, 6  # of the levels of sd-daemon(3)

Say = Callable[[str, int], None]


def write(path: str, content: Mapping[str, Any]) -> None:
    """Replace a file by a new one, whole. Raises OSError."""
    new = f"{path}.new"
    with open(new, "w", encoding="utf-8") as file:  # noqa: PTH123 (a supervisor imports no pathlib)
        json.dump(content, file)
    os.rename(new, path)  # noqa: PTH104


def write_over(path: str, content: Mapping[str, Any]) -> None:
    """Write into the file that is there, if that can be done: on a full disk it has room for what it had."""
    with contextlib.suppress(OSError), open(path, "r+", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(content, file)
        file.truncate()


def read_state(path: str) -> dict[str, Any]:
    """What a supervisor wrote; without a process if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            report = json.load(file)
    except (OSError, ValueError):
        return {"processes": {}}
    return report if isinstance(report, dict) and isinstance(report.get("processes"), dict) else {"processes": {}}
