"""The supervisor as a service, with commands that only say that they ran."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.supervise import control, foreground

WITHIN_S = 30


@dataclass(slots=True)
class Running:
    """One at work: `manager` hears what systemd would hear."""

    process: subprocess.Popen[str]
    manager: socket.socket
    directory: Path

    def hear(self) -> dict[str, str]:
        """The next message to the manager that is not a sign of life."""
        while (message := self.manager.recv(4096).decode()) == "WATCHDOG=1":
            pass
        return dict(line.split("=", 1) for line in message.splitlines())

    def end(self) -> tuple[int, str]:
        """Its exit code and all it has printed."""
        said, _ = self.process.communicate(timeout=WITHIN_S)
        return self.process.returncode, said


@contextlib.contextmanager
def started(directory: Path, *, apply: str = "echo applied", teardown: str = "echo torn down") -> Iterator[Running]:
    runtime = directory / "ftp@1-2"
    runtime.mkdir()
    contract = {
        "profile": "ftp",
        "directory": str(runtime),
        "state_dir": str(directory),
        "apply": ["/bin/sh", "-c", apply],
        "teardown": ["/bin/sh", "-c", teardown],
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        manager.settimeout(WITHIN_S)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", foreground.__file__, json.dumps(contract)],
            env={"NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "100000", "ORCH_YES": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield Running(process, manager, runtime)
        finally:
            process.kill()
            process.communicate()


def test_from_the_start_to_the_end(tmp_path: Path) -> None:
    with started(tmp_path) as running:
        assert running.hear() == {"READY": "1", "STATUS": "profile ftp: no processes"}
        running.process.send_signal(signal.SIGHUP)
        told = running.hear()
        assert (told["RELOADING"], told["STATUS"]) == ("1", "profile ftp: apply is running")
        assert running.hear()["READY"] == "1"
        running.process.send_signal(signal.SIGTERM)
        assert running.hear()["STOPPING"] == "1"
        assert running.end() == (0, "applied\napplied\ntorn down\n")
        assert not running.directory.exists()


def test_it_says_that_it_lives(tmp_path: Path) -> None:
    with started(tmp_path) as running:
        heard = [running.manager.recv(4096) for _ in range(4)]
        assert heard.count(b"WATCHDOG=1") >= 3


def test_commands_have_a_clean_environment(tmp_path: Path) -> None:
    with started(tmp_path, apply="env") as running:
        running.hear()
        running.process.terminate()
        _, said = running.end()
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "ORCH_YES"} & {line.split("=")[0] for line in said.splitlines()}


def test_a_first_apply_that_fails_is_the_end(tmp_path: Path) -> None:
    with started(tmp_path, apply="exit 64") as running:
        assert running.end() == (64, "apply failed with exit code 64\n")


def test_a_later_one_that_fails_is_told(tmp_path: Path) -> None:
    file = shlex.quote(str(tmp_path / "once"))
    with started(tmp_path, apply=f"mkdir {file} 2>&-") as running:
        running.hear()
        running.process.send_signal(signal.SIGHUP)
        running.hear()
        assert running.hear() == {
            "READY": "1",
            "STATUS": "profile ftp: apply failed with exit code 1",
        }
        running.process.send_signal(signal.SIGINT)
        assert running.end()[0] == 0


def test_what_the_teardown_says_is_how_it_ends(tmp_path: Path) -> None:
    with started(tmp_path, teardown="exit 3") as running:
        running.hear()
        running.process.terminate()
        assert running.end()[0] == 3


def test_an_apply_under_way_is_stopped_before_the_teardown(tmp_path: Path) -> None:
    apply = "trap 'echo undone; exit 143' TERM; echo begun; while :; do sleep 0.01; done"
    with started(tmp_path, apply=apply) as running:
        assert running.process.stdout is not None
        assert running.process.stdout.readline() == "begun\n"
        running.process.terminate()
        assert running.hear()["STOPPING"] == "1"
        assert running.end() == (0, "undone\napply failed with exit code 143\ntorn down\n")


def test_commands_reach_it_while_they_run(tmp_path: Path) -> None:
    """Whoever asks it to stop everything is told that it stays."""
    with started(tmp_path) as running:
        running.hear()
        answer = control.ask(str(running.directory), {"do": "end"}, taken_within_s=WITHIN_S, done_within_s=WITHIN_S)
        assert answer == {"kept": True}
        running.process.terminate()
        assert running.end()[0] == 0
