"""The supervisor as a service, with commands that only say that they ran."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.app import boot_id
from orchestrator.journal import Ledger
from orchestrator.kernel.clock import MonotonicClock
from orchestrator.supervise import control, foreground
from orchestrator.supervise.order import Order
from tests.waiting import until

WITHIN_S = 30
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
ROOT = str(Path(__file__).parents[2])
FAILING = """
import signal, sys
sys.path.append(sys.argv[1])
from orchestrator.supervise import foreground

class Failing(foreground.Foreground):
    def _signalled(self, number):
        if number == signal.SIGHUP:
            raise RuntimeError("a mistake")
        super()._signalled(number)

foreground.Foreground = Failing
sys.exit(foreground.main(sys.argv[2]))
"""


@dataclass(slots=True)
class Running:
    """One at work: `manager` hears what systemd would hear."""

    process: subprocess.Popen[str]
    manager: socket.socket
    directory: Path

    def hear(self) -> dict[str, str]:
        """The next message to the manager that is not a sign of life."""
        started = time.monotonic()
        while (message := self.manager.recv(4096).decode()) == "WATCHDOG=1":
            assert time.monotonic() < started + WITHIN_S, "signs of life alone"
        return dict(line.split("=", 1) for line in message.splitlines())

    def end(self) -> tuple[int, str]:
        """Its exit code and all it has printed."""
        said, _ = self.process.communicate(timeout=WITHIN_S)
        return self.process.returncode, said


@contextlib.contextmanager
def started(
    directory: Path,
    *,
    apply: str = "echo applied",
    teardown: str = "echo torn down",
    program: Sequence[str] = (foreground.__file__,),
) -> Iterator[Running]:
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
        with control.listen(str(runtime)) as listener:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", *program, json.dumps(contract)],
                env={"NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "100000", "ORCH_YES": "1"},
                stdin=listener.fileno(),
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


def failing_at(runs: str, directory: Path) -> str:
    """A command that is refused in some of its runs, by their numbers."""
    count = shlex.quote(str(directory / "count"))
    return f"echo run >> {count}; case $(wc -l < {count}) in {runs}) exit 1;; esac; echo done"


def test_a_later_one_that_fails_is_tried_again(tmp_path: Path) -> None:
    with started(tmp_path, apply=failing_at("2|3", tmp_path)) as running:
        assert running.hear()["READY"] == "1"
        running.process.send_signal(signal.SIGHUP)
        heard = [running.hear() for _ in range(6)]
        assert ["RELOADING" in message for message in heard] == [True, False] * 3
        assert heard[-1] == {"READY": "1", "STATUS": "profile ftp: no processes"}
        running.process.terminate()
        code, said = running.end()
        assert code == 0
        trouble = "apply failed with exit code 1: again in"
        assert said.splitlines() == ["done", f"{trouble} 1 s", f"{trouble} 2 s", "done", "torn down"]


def test_a_teardown_that_is_refused_is_tried_again(tmp_path: Path) -> None:
    with started(tmp_path, teardown=failing_at("1", tmp_path)) as running:
        running.hear()
        running.process.terminate()
        assert running.hear()["STOPPING"] == "1"
        assert "READY" not in running.hear()
        assert running.end() == (0, "applied\nteardown failed with exit code 1: again in 1 s\ndone\n")


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


def sleeping(directory: Path) -> str:
    """A command that starts a process that does nothing, as an apply would."""
    order = Order(
        name="idle",
        argv=["/bin/sleep", "1000"],
        env={"LEFT_BY": str(directory)},
        queues=[],
        has_page=False,
        keys=[],
        disable=[],
        keep_disabled=[],
        enable={},
        is_restarted=True,
        restart_limit=3,
        restart_window_s=600,
        ready_within_s=WITHIN_S,
    )
    request = {"do": "start", "name": "idle"}
    ask = (
        f"import sys; sys.path.append({ROOT!r}); from orchestrator.supervise import control\n"
        f"from pathlib import Path; Path('ftp@1-2/idle.order').write_bytes({order.encode()!r})\n"
        f"answer = control.ask('ftp@1-2', {request!r}, taken_within_s={WITHIN_S}, done_within_s={WITHIN_S})\n"
        "sys.exit('pid' not in answer)"
    )
    return f"cd {shlex.quote(str(directory))}; exec {sys.executable} -I -S -c {shlex.quote(ask)}"


def reported(running: Running) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((running.directory / "supervisor.json").read_text())
    return found


def wait_for(running: Running, holds: Callable[[Mapping[str, Any]], bool]) -> None:
    until(lambda: holds(reported(running)), lambda: f"it reports {reported(running)}")


@contextlib.contextmanager
def cleaned_up(running: Running) -> Iterator[None]:
    """Nobody and nothing goes on after the block."""
    try:
        yield
    finally:
        report = reported(running)
        for pid in (report["pid"], report["processes"]["idle"]["pid"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@needs_root
def test_what_its_teardown_leaves_is_looked_after_in_the_background(tmp_path: Path) -> None:
    with started(tmp_path, apply=sleeping(tmp_path), teardown="exit 3") as running, cleaned_up(running):
        running.hear()
        pid = reported(running)["processes"]["idle"]["pid"]
        running.process.terminate()
        code, said = running.end()
        assert (code, said.splitlines()[-1]) == (3, "not stopped, and left to a supervisor in the background: idle")
        wait_for(running, lambda report: report["pid"] != running.process.pid)
        assert reported(running)["processes"]["idle"]["pid"] == pid
        os.kill(pid, signal.SIGKILL)
        wait_for(running, lambda report: report["processes"]["idle"]["restarts"] == 1)


@needs_root
def test_it_begins_anew_after_a_mistake_of_its_own_and_once_only(tmp_path: Path) -> None:
    """What runs goes on, and is looked after; a second time it ends, and leaves that to another."""
    once = tmp_path / "once"
    apply = f"test -e {once} || {{ touch {once}; {sleeping(tmp_path)}; }}"
    with started(tmp_path, apply=apply, program=("-c", FAILING, ROOT)) as running, cleaned_up(running):
        running.hear()
        pid = reported(running)["processes"]["idle"]["pid"]
        running.process.send_signal(signal.SIGHUP)
        assert running.hear() == {"READY": "1", "STATUS": "profile ftp: idle running"}
        assert reported(running)["processes"]["idle"]["pid"] == pid
        os.kill(pid, signal.SIGKILL)
        wait_for(running, lambda report: report["processes"]["idle"]["restarts"] == 1)
        running.process.send_signal(signal.SIGHUP)
        code, said = running.end()
        assert code == 1
        assert said.count("RuntimeError: a mistake") == 3, "logged twice, and at last it ends by it"
        assert said.count("begins anew") == 1
        wait_for(running, lambda report: report["pid"] != running.process.pid)


def test_a_mistake_in_the_end_does_not_make_it_apply_again(tmp_path: Path) -> None:
    teardown = "echo $$; while :; do sleep 0.01; done"
    with started(tmp_path, teardown=teardown, program=("-c", FAILING, ROOT)) as running:
        running.hear()
        running.process.terminate()
        assert running.process.stdout is not None
        assert running.process.stdout.readline() == "applied\n"
        child = int(running.process.stdout.readline())
        running.process.send_signal(signal.SIGHUP)
        try:
            assert running.process.wait(WITHIN_S) == 1
        finally:
            os.killpg(child, signal.SIGKILL)
        assert "applied" not in running.end()[1]


@needs_root
def test_it_takes_over_under_the_lock(tmp_path: Path) -> None:
    profile = tmp_path / "ftp.yaml"
    profile.write_text("profile: ftp\nhelpers:\n  ftp: {engine: kernel}\n")
    argv = [sys.executable, "-m", "orchestrator", "run", str(profile), "--wait", "0", "--state-dir", str(tmp_path)]
    with (
        closing(Ledger.open(tmp_path, boot_id=boot_id(), create=True)) as ledger,
        ledger.locked("apply another", wait_s=0, clock=MonotonicClock()),
    ):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "busy: orch apply another" in done.stderr
    assert not list(tmp_path.glob("ftp@*"))
