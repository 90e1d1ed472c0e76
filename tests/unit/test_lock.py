"""The lock, among real processes: it goes with its holder, and what orch starts does not inherit it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from orchestrator.journal import Ledger
from orchestrator.kernel.clock import MonotonicClock
from orchestrator.kernel.netns import find
from orchestrator.model import ProcessSpec, Restart
from orchestrator.ports import Launch
from tests.processes import PROFILE, local_processes

HOLDER = """
import sys
from pathlib import Path
from orchestrator.journal import Ledger
from orchestrator.kernel.clock import MonotonicClock
with Ledger.open(Path(sys.argv[1]), boot_id="boot", create=True).locked("test", wait_s=0, clock=MonotonicClock()):
    print("locked", flush=True)
    sys.stdin.read()
"""


def open_ledger(directory: Path) -> Ledger:
    return Ledger.open(directory, boot_id="boot", create=True)


def test_a_lock_of_a_dead_process_is_none(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        assert ledger.is_locked()
        assert (tmp_path / "lock").read_text() == f"orch test (pid {holder.pid})"
        holder.send_signal(signal.SIGKILL)
    with ledger.locked("test", wait_s=0, clock=MonotonicClock()):
        assert (tmp_path / "lock").read_text() == f"orch test (pid {os.getpid()})"
    assert not ledger.is_locked()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)")
def test_neither_a_supervisor_nor_a_helper_inherits_the_lock(tmp_path: Path) -> None:
    name = f"orch-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        netns, ledger = find(name), open_ledger(tmp_path)
        with local_processes(tmp_path) as processes:
            with ledger.locked("test", wait_s=0, clock=MonotonicClock()):
                spec = ProcessSpec("sleeper", ("sleep", "1000"), (), (), (), restart=Restart.NEVER)
                helper = processes.start(Launch(PROFILE, netns, spec, {}, "digest"))
            pids = [helper, *processes.supervisors(PROFILE, netns.identity)]
            assert len(pids) == 2
            opened = {str(fd.readlink()) for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir()}
            assert not {str(tmp_path / "lock"), str(tmp_path / "ledger.sqlite")} & opened
            assert not ledger.is_locked()
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
