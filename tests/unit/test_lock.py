"""The lock, among real processes: it goes with its holder, and what orch starts does not inherit it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from orchestrator.errors import OrchError
from orchestrator.journal import Ledger
from orchestrator.kernel.clock import MonotonicClock
from orchestrator.kernel.netns import find
from orchestrator.model import ProcessSpec, Restart
from orchestrator.ports import Launch
from tests.namespaces import named_netns
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


def test_a_full_disk_keeps_nobody_from_locking(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with ledger.locked("test", wait_s=0, clock=MonotonicClock()):
            assert ledger.is_locked()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "lock").read_text() == ""
    assert not ledger.is_locked()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_who_is_not_root_locks_nothing() -> None:
    """Who can read a file can lock it, that of SQLite too: no orch could work, and no watchdog would undo anything."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        with open_ledger(directory).watched(lambda: None):
            modes = {file.name: file.stat().st_mode & 0o777 for file in directory.iterdir()}
        assert modes == dict.fromkeys(("lock", "ledger.sqlite", "watchdog"), 0o600)
        assert opened_by_nobody(directory) == "cannot read"


def opened_by_nobody(directory: Path) -> str:
    """What another user hears who wants to look."""
    pid = os.fork()
    if not pid:
        os.setgid(65534)
        os.setuid(65534)
        try:
            Ledger.open(directory, boot_id="boot", create=False)
        except OrchError as error:
            os._exit("cannot read" in str(error))
        finally:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {0: "something else", 1: "cannot read"}.get(code, "nothing")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)")
def test_neither_a_supervisor_nor_a_helper_inherits_the_lock(tmp_path: Path) -> None:
    with named_netns() as name, local_processes(tmp_path) as processes:
        netns, ledger = find(name), open_ledger(tmp_path)
        with ledger.locked("test", wait_s=0, clock=MonotonicClock()):
            spec = ProcessSpec("sleeper", ("sleep", "1000"), (), (), (), restart=Restart.NEVER)
            helper = processes.start(Launch(PROFILE, netns, spec, {}, "digest"))
        pids = [helper, *processes.supervisors(PROFILE, netns.identity)]
        assert len(pids) == 2
        opened = {str(fd.readlink()) for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir()}
        assert not {str(tmp_path / "lock"), str(tmp_path / "ledger.sqlite")} & opened
        assert not ledger.is_locked()
