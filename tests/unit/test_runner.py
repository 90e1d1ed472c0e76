"""The watcher of one process, run as it is: a script of the standard library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.supervise import runner


@pytest.mark.parametrize("is_listening", [True, False], ids=["heard", "its caller was killed"])
def test_it_watches_and_tells_how_the_process_ended(tmp_path: Path, *, is_listening: bool) -> None:
    order = {
        "name": "helper",
        "argv": ["/bin/sh", "-c", "exit 3"],
        "cwd": str(tmp_path),
        "env": {},
        "log": str(tmp_path / "helper.log"),
        "disable": [],
        "adopt": 0,
    }
    read, write = os.pipe()
    if not is_listening:
        os.close(read)
    done = subprocess.run(
        [sys.executable, "-I", "-S", runner.__file__], input=json.dumps(order).encode(), stdout=write, timeout=30
    )
    os.close(write)
    assert done.returncode == 0
    record = json.loads((tmp_path / "helper.exit").read_text())
    assert record["status"] == 3
    if is_listening:
        assert json.loads(os.read(read, 1000)) == {"pid": record["pid"]}
        os.close(read)
