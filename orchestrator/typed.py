"""Commands of orch, as a person is told to type them."""

from __future__ import annotations

import shlex
from pathlib import Path

DEFAULT_STATE = Path("/run/orch")


def how_to(*words: str, state_dir: Path = DEFAULT_STATE) -> str:
    """`orch WORDS`, quoted for a shell; for another state directory than the usual one it names that."""
    named = [] if state_dir == DEFAULT_STATE else ["--state-dir", str(state_dir)]
    return shlex.join(["orch", *words, *named])
