"""Start, find and stop helper processes; they are found by a mark in their environment, never by a pid file."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.engine import counters
from orchestrator.engine.counters import Snapshot, State
from orchestrator.errors import HelperProcessError, PreflightError
from orchestrator.model import HELPER_PROGRAM, HelperKey, Netns, QueueRow
from orchestrator.ports import Clock, Launch, ProcessSeen
from orchestrator.supervise import runner

_PROCESS_MARK = "ORCH_PROCESS"
_RUNNER_MARK = "ORCH_RUNNER"
_POLL_S = 0.02
_GRACE_S = runner.STOP_WITHIN_S * 2 + 2
_HELPER_SCRIPT = Path(__file__).parents[1] / "engine" / "process.py"
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class _Mark:
    """What we write into the environment of a process: whose it is, and which documents it was started with."""

    state_dir: str
    profile: str
    name: str
    digest: str

    def __str__(self) -> str:
        return "\x1f".join((self.state_dir, self.profile, self.name, self.digest))

    @classmethod
    def parse(cls, text: str) -> _Mark | None:
        parts = text.split("\x1f")
        return cls(*parts) if len(parts) == 4 else None


@dataclass(frozen=True, slots=True)
class LocalProcesses:
    """Processes of this host. `encode_disable` makes the netlink message that a watcher sends when its process dies;
    `entered` runs code in a namespace; `queues` lists the bound queues of one.
    """

    state_dir: Path
    clock: Clock
    encode_disable: Callable[[HelperKey], bytes]
    entered: Callable[[Netns], AbstractContextManager[None]]
    queues: Callable[[Netns], tuple[QueueRow, ...]]

    def runtime_dir(self, profile: str, netns: Netns) -> Path:
        return self.state_dir / f"{profile}@{netns.identity.replace(':', '-')}"

    def running(self) -> tuple[ProcessSeen, ...]:
        marked = [(pid, kind, mark) for pid, kind, mark in _scan() if mark.state_dir == str(self.state_dir)]
        watchers = {(_netns_of(pid), mark.profile, mark.name) for pid, kind, mark in marked if kind == _RUNNER_MARK}
        seen = []
        for pid, kind, mark in marked:
            netns = _netns_of(pid)
            if kind == _PROCESS_MARK and netns:
                watched = (netns, mark.profile, mark.name) in watchers
                seen.append(ProcessSeen(mark.profile, netns, mark.name, pid, mark.digest, _age_s(pid), watched))
        return tuple(sorted(seen, key=lambda p: (p.netns, p.profile, p.name, p.pid)))

    def start(self, launch: Launch) -> int:
        directory = self.runtime_dir(launch.profile, launch.netns)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in launch.files.items():
            (directory / name).write_text(text)
        name = launch.spec.name
        # conntrackd leaves the first two behind when it is killed, and then refuses to start.
        for leftover in ("conntrackd.lock", "conntrackd.ctl", f"{name}.exit", f"{name}.stats"):
            (directory / leftover).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # what it says from now on is its own, not its predecessor's
            (directory / f"{name}.log").replace(directory / f"{name}.log.old")
        pid = self._spawn_runner(launch, argv=_command(launch.spec.argv), adopt=0)
        self._wait_ready(launch, pid)
        return pid

    def watch(self, launch: Launch, process: ProcessSeen) -> None:
        self.runtime_dir(launch.profile, launch.netns).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._spawn_runner(launch, argv=list(launch.spec.argv), adopt=process.pid)

    def stop(self, process: ProcessSeen) -> None:
        for pid, kind, mark in _scan():
            same = (mark.profile, mark.name, mark.state_dir) == (process.profile, process.name, str(self.state_dir))
            if kind == _RUNNER_MARK and same and _netns_of(pid) == process.netns:
                _signal_and_wait(pid, signal.SIGUSR1, _GRACE_S)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if _signal_and_wait(process.pid, number, runner.STOP_WITHIN_S):
                return
        raise HelperProcessError(f"{process.name} (pid {process.pid}) does not end, not even by SIGKILL")

    def counters(self, profile: str, netns: Netns, name: str) -> Snapshot | None:
        try:
            return counters.read(str(self.runtime_dir(profile, netns) / f"{name}.stats"))
        except (OSError, ValueError):
            return None

    def last_words(self, profile: str, netns: Netns, name: str) -> str:
        directory = self.runtime_dir(profile, netns)
        try:
            record = json.loads((directory / f"{name}.exit").read_text())
        except (OSError, ValueError):
            return _tail(directory / f"{name}.log", 1)
        return f"pid {record['pid']} {_say_status(record['status'])} at {_say_time(record['time'])}"

    def cleanup(self, profile: str, netns: Netns) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.runtime_dir(profile, netns))

    def _spawn_runner(self, launch: Launch, *, argv: list[str], adopt: int) -> int:
        spec = launch.spec
        directory = self.runtime_dir(launch.profile, launch.netns)
        mark = str(_Mark(str(self.state_dir), launch.profile, spec.name, launch.digest))
        order = {
            "name": spec.name,
            "argv": argv,
            "cwd": str(directory),
            "env": {"PATH": _SEARCH_PATH, "LANG": "C", _PROCESS_MARK: mark},
            "log": str(directory / f"{spec.name}.log"),
            "disable": [self.encode_disable(key).hex() for key in spec.keys],
            "adopt": adopt,
        }
        with self.entered(launch.netns), (directory / "runner.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", runner.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                env={"LANG": "C", _RUNNER_MARK: mark},
                start_new_session=True,
            )
        answer = _converse(process, json.dumps(order).encode())
        if "pid" not in answer:
            reason = answer.get("error", "its watcher ended at once")
            raise HelperProcessError(f"cannot start {spec.name}: {reason}", where=f"netns {launch.netns}")
        return int(answer["pid"])

    def _says_ready(self, launch: Launch) -> bool:
        if launch.spec.argv[0] != HELPER_PROGRAM:
            return True
        seen = self.counters(launch.profile, launch.netns, launch.spec.name)
        return seen is not None and seen.state is State.READY

    def _wait_ready(self, launch: Launch, pid: int) -> None:
        """Return once every queue is bound *and* configured, and a native helper says so; else end it and say why."""
        deadline = self.clock.monotonic() + launch.spec.ready_within_s
        log = self.runtime_dir(launch.profile, launch.netns) / f"{launch.spec.name}.log"
        while True:
            ready = {row.queue_num for row in self.queues(launch.netns) if row.is_ready}
            missing = sorted(set(launch.spec.queues) - ready)
            if not missing and self._says_ready(launch) and _is_alive(pid):
                return
            dead = not _is_alive(pid)
            if dead or self.clock.monotonic() >= deadline:
                break
            self.clock.sleep(_POLL_S)
        words = _tail(log, 3)
        self.stop(
            ProcessSeen(launch.profile, launch.netns.identity, launch.spec.name, pid, launch.digest, 0, watched=True)
        )
        queues = ", ".join(map(str, missing)) or "its queues"
        raise HelperProcessError(
            f"{launch.spec.name} {'ended at once' if dead else 'runs, but does not listen on queue ' + queues}",
            where=f"netns {launch.netns}; log {log}",
            hint="its last words: " + words if words else "",
        )


def _command(argv: tuple[str, ...]) -> list[str]:
    """What is executed for the command line of a process. Raises PreflightError if its program is not installed."""
    if argv[0] == HELPER_PROGRAM:
        return [sys.executable, "-I", "-S", str(_HELPER_SCRIPT), *argv[1:]]
    program = shutil.which(argv[0], path=_SEARCH_PATH)
    if program is None:
        raise PreflightError(f"{argv[0]} is not installed", hint="install it, or use engine: kernel")
    return [program, *argv[1:]]


def _converse(process: subprocess.Popen[bytes], order: bytes) -> dict[str, Any]:
    """Give the runner its order and read its one line; the runner itself stays and is not waited for."""
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(order)
            process.stdin.close()
        line = process.stdout.readline()
    process.returncode = 0  # it is meant to outlive us: no warning about a child that was not reaped
    try:
        answer: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return answer


def _scan() -> Iterator[tuple[int, str, _Mark]]:
    """Every live process that carries one of our marks: (pid, which mark, mark)."""
    for entry in os.listdir("/proc"):  # noqa: PTH208 (a Path per process is slow where thousands run)
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:  # noqa: PTH123
                environ = file.read()
        except OSError:
            continue
        if b"ORCH_" not in environ:
            continue
        for kind in (_PROCESS_MARK, _RUNNER_MARK):
            for variable in environ.split(b"\0"):
                name, _, value = variable.partition(b"=")
                mark = _Mark.parse(value.decode(errors="replace")) if name == kind.encode() else None
                if mark is not None:
                    yield int(entry), kind, mark


def _netns_of(pid: int) -> str:
    try:
        status = os.stat(f"/proc/{pid}/ns/net")  # noqa: PTH116
    except OSError:
        return ""
    return f"{status.st_dev}:{status.st_ino}"


def _is_alive(pid: int) -> bool:
    """False for a process that is gone or a zombie that its parent has not noticed yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _age_s(pid: int) -> float:
    """Seconds since a process started; source: proc(5), field 22 of stat in clock ticks since boot."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _signal_and_wait(pid: int, number: int, within_s: float) -> bool:
    """Send a signal; True once the process is gone, False if it is still there after `within_s`."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        gone = bool(select.select([pidfd], [], [], within_s)[0])
    finally:
        os.close(pidfd)
    if gone:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return gone


def _tail(file: Path, count: int) -> str:
    """The last lines of a log as one, fit for a terminal: what came over a network may be quoted in it."""
    try:
        text = " / ".join(file.read_text(errors="replace").strip().splitlines()[-count:])
    except OSError:
        return ""
    return "".join(character if character.isprintable() else "?" for character in text)


def _say_status(status: int | None) -> str:
    if status is None:
        return "ended"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with {status}"


def _say_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
