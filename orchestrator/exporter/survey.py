"""What is too dear for a scrape: every rule listed and compared, every connection counted. Taken by a child process.

A child, because a thread that plans a hundred profiles would make every scrape meanwhile wait for it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchError

log = logging.getLogger(__name__)

_SAYS_SOMETHING = (0, 2)  # as applied, or not as applied
_WITHIN_S = 600.0


@dataclass(frozen=True, slots=True)
class Survey:
    """What `orch status` said: `drift` by profile and namespace, `connections` by these and the name of the helper.

    `taken_at` is in seconds of the wall clock, when it was complete. `unknown` are profiles that only their rules or
    processes tell of.
    """

    taken_at: float
    took_s: float
    drift: Mapping[tuple[str, str], int]
    connections: Mapping[tuple[str, str, str], int]
    unknown: int


class Surveyor:
    """Takes a survey every `interval_s` seconds in a thread of its own; `latest` is the last one that was taken."""

    def __init__(self, state_dir: Path, interval_s: float) -> None:
        self.latest: Survey | None = None
        self._state_dir = state_dir
        self._interval_s = interval_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="survey", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take no more; a survey under way is not waited for."""
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                self.latest = take(self._state_dir)
            except (OrchError, OSError) as error:
                log.error("%s", error)
            self._is_over.wait(self._interval_s)


def take(state_dir: Path) -> Survey:
    """Ask `orch status`, which changes nothing and takes as long as it takes. Raises OrchError."""
    started = time.monotonic()
    # -I: what the directory or the environment of whoever started us holds is not imported by a process of root.
    command = [sys.executable, "-I", "-m", "orchestrator", "status", "--json", "--state-dir", str(state_dir)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ORCH_")}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        raise OrchError(f"orch status took more than {_WITHIN_S:g} s") from None
    if done.returncode not in _SAYS_SOMETHING:
        raise OrchError(f"orch status failed with {done.returncode}: {done.stderr.strip()}")
    return read(json.loads(done.stdout)["status"], time.time(), time.monotonic() - started)


def read(status: Mapping[str, Any], taken_at: float, took_s: float) -> Survey:
    """A survey out of the status as JSON; what two namespaces of one name have is added up."""
    drift: Counter[tuple[str, str]] = Counter()
    connections: Counter[tuple[str, str, str]] = Counter()
    for profile in status["profiles"]:
        at = (profile["profile"], profile["netns"])
        drift[at] += len(profile["drift"])
        for helper in profile["helpers"]:
            if helper["connections"] is not None:
                connections[(*at, helper["name"])] += helper["connections"]
    return Survey(taken_at, took_s, drift, connections, len(status["unknown"]))
