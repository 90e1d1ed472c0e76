"""Start, find and stop helper processes by way of their supervisor; all are found by a mark in their environment."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.engine import counters
from orchestrator.engine.counters import Snapshot
from orchestrator.engine.names import NEXT, handover_socket
from orchestrator.errors import HelperProcessError, NoHandoverError, PreflightError
from orchestrator.model import HELPER_PROGRAM, SEARCH_PATH, HelperKey, Netns, ProcessSpec, Restart, is_profile_name
from orchestrator.ports import Clock, Launch, Lifetimes, ProcessSeen, ProcessState, Supervised
from orchestrator.supervise import control, filters, logs, order, place, supervisor, traces, trust, watching
from orchestrator.supervise.control import EndedError, SilentError
from orchestrator.supervise.deafness import Marks, key_name
from orchestrator.supervise.lifecycle import STOP_WITHIN_S
from orchestrator.supervise.order import Order

_PROGRAM_WITHIN_S = 0.05  # a process is between two programs for some 100 us of processor time
_PROCESS_MARK = "ORCH_PROCESS"
_TAKEN_WITHIN_S = 10.0
_STARTED_WITHIN_S = 60.0  # one that dies meanwhile is noticed at once: its socket closes
_DONE_WITHIN_S = 3 * STOP_WITHIN_S + 5.0
_CONFINE_SCRIPT = Path(__file__).parents[1] / "engine" / "confine.py"
_HELPER_SCRIPT = Path(__file__).parents[1] / "engine" / "process.py"


@dataclass(frozen=True, slots=True)
class _Mark:
    """What we write into the environment of a process: whose it is, and which documents it was started with."""

    state_dir: str
    profile: str
    name: str = ""
    digest: str = ""

    def __str__(self) -> str:
        return "\x1f".join((self.state_dir, self.profile, self.name, self.digest))

    @classmethod
    def parse(cls, text: str) -> _Mark | None:
        """None for what is no mark; anybody may write one, and its names are shown, and part of commands and paths."""
        parts = text.split("\x1f")
        if len(parts) != 4 or not is_profile_name(parts[1]) or "/" in parts[2] or not parts[2].isprintable():
            return None
        return cls(*parts)


def supervisor_mark(state_dir: Path, profile: str) -> str:
    """The value of supervisor.MARK in the environment of a supervisor."""
    return str(_Mark(str(state_dir), profile))


@dataclass(frozen=True, slots=True)
class LocalProcesses:
    """Processes of this host. `encode_disable` and `encode_enable` make the netlink messages that a supervisor sends
    when a process ends and when its successor is ready; `entered` runs code in a namespace.
    """

    state_dir: Path
    clock: Clock
    encode_disable: Callable[[HelperKey], bytes]
    encode_enable: Callable[[HelperKey], bytes]
    entered: Callable[[Netns], AbstractContextManager[None]]

    def runtime_dir(self, profile: str, netns: Netns) -> Path:
        return self._directory(profile, netns.identity)

    def running(self) -> tuple[ProcessSeen, ...]:
        marked = list(self._scan())
        supervised = {
            (netns, mark.profile): self._told(mark.profile, netns, pid)
            for pid, kind, mark in marked
            if kind == supervisor.MARK and (netns := _netns_of(pid)) and not traces.is_stopped(pid)
        }
        seen = []
        for pid, kind, mark in marked:
            netns = _netns_of(pid)
            if kind == _PROCESS_MARK and netns:
                told = supervised.get((netns, mark.profile), {}).get(mark.name, {})
                if _is_successor(pid) and told.get("pid") != pid and traces.born(told.get("pid", 0)):
                    continue  # it has not taken over yet
                seen.append(self._seen(pid, netns, mark, is_watched=told.get("pid") == pid))
        for (netns, profile), told in supervised.items():
            waiting = [name for name, one in told.items() if one["state"] == ProcessState.BACKOFF]
            marks = (self._ordered(profile, netns, name) for name in waiting)
            seen += [ProcessSeen(profile, netns, mark.name, 0, mark.digest, 0, watched=True) for mark in marks if mark]
        return tuple(sorted(seen, key=lambda p: (p.netns, p.profile, p.name, p.pid)))

    def _seen(self, pid: int, netns: str, mark: _Mark, *, is_watched: bool) -> ProcessSeen:
        door = self._directory(mark.profile, netns) / handover_socket(mark.name)
        return ProcessSeen(
            mark.profile,
            netns,
            mark.name,
            pid,
            mark.digest,
            _age_s(pid),
            watched=is_watched,
            hands_over=is_watched and door.exists(),
            queues=tuple(self._order_of(mark.profile, netns, mark.name).get("queues", ())),
        )

    def start(self, launch: Launch) -> int:
        directory = self._prepare(launch)
        self._write_documents(directory, launch)
        name = launch.spec.name
        (directory / f"{name}.exit").unlink(missing_ok=True)
        log = directory / logs.file_name(name)
        with contextlib.suppress(FileNotFoundError):  # what it says from now on is its own, not its predecessor's
            log.replace(f"{log}.old")
        within_s = launch.spec.ready_within_s + _DONE_WITHIN_S
        answer = self._ask(launch.profile, launch.netns, {"do": "start", "name": name}, within_s=within_s)
        if "pid" in answer:
            return int(answer["pid"])
        words = _tail(log, 3)
        self._ask(launch.profile, launch.netns, {"do": "stop", "name": name})
        raise HelperProcessError(
            f"{name} does not start: {answer.get('error')}",
            where=f"netns {launch.netns}; log {log}",
            hint="its last words: " + words if words else "",
        )

    def succeed(self, launch: Launch) -> int:
        self.settle(launch)
        directory = self._prepare(launch, NEXT)
        self._write_documents(directory, launch, NEXT)
        request = {"do": "succeed", "name": launch.spec.name}
        within_s = launch.spec.ready_within_s + _DONE_WITHIN_S
        answer = self._ask(launch.profile, launch.netns, request, within_s=within_s)
        if "pid" in answer:
            return int(answer["pid"])
        log = directory / logs.file_name(launch.spec.name)
        words = _tail(log, 1)
        if answer.get("is_refused"):
            (directory / handover_socket(launch.spec.name)).unlink(missing_ok=True)  # nobody is to ask there again
            why = f" ({words})" if words else ""
            raise NoHandoverError(
                f"{launch.spec.name} hands over nothing{why}", where=f"netns {launch.netns}; log {log}"
            )
        raise HelperProcessError(
            f"{launch.spec.name} goes on as it was, and its successor does not start: {answer.get('error')}",
            where=f"netns {launch.netns}; log {log}",
            hint="its last words: " + words if words else "",
        )

    def settle(self, launch: Launch) -> None:
        if not self.runtime_dir(launch.profile, launch.netns).exists():
            return
        request = {"do": "settle", "name": launch.spec.name}
        within_s = launch.spec.ready_within_s + _DONE_WITHIN_S
        self._ask(launch.profile, launch.netns, request, within_s=within_s)

    def serve(self, launch: Launch, queues: tuple[int, ...]) -> None:
        from orchestrator.engine import handover  # with the whole engine: only this needs it

        try:
            with handover.reached(self.runtime_dir(launch.profile, launch.netns), launch.spec.name) as process:
                process.serve(queues)
        except OSError as error:
            where = f"netns {launch.netns}"
            raise HelperProcessError(f"{launch.spec.name} does not change its queues: {error}", where=where) from error

    def watch(self, launch: Launch, process: ProcessSeen) -> None:
        self._prepare(launch)
        request = {"do": "adopt", "name": launch.spec.name, "pid": process.pid}
        answer = self._ask(launch.profile, launch.netns, request)
        if "pid" not in answer:
            raise HelperProcessError(f"cannot look after {process.name}: {answer.get('error')}")

    def stop(self, process: ProcessSeen) -> None:
        is_told = False
        if self.supervisors(process.profile, process.netns):
            directory = self._directory(process.profile, process.netns)
            try:
                _ask(directory, {"do": "stop", "name": process.name})
                is_told = True
            except SilentError:
                self._end_supervisors(process.profile, process.netns)
        if self._is_there(process) and not _end(process.pid):
            raise HelperProcessError(f"{process.name} (pid {process.pid}) does not end, not even by SIGKILL")
        if not is_told:
            self._forget(process)

    def _forget(self, process: ProcessSeen) -> None:
        """It was stopped, and no supervisor heard of it: the next one is not to start it again."""
        directory = self._directory(process.profile, process.netns)
        keys = self._order_of(process.profile, process.netns, process.name).get("keys", ())
        Marks(str(self.state_dir), directory.name).clear(keys)
        (directory / order.file_name(process.name)).unlink(missing_ok=True)

    def counters(self, profile: str, netns: Netns, name: str) -> Snapshot | None:
        try:
            return counters.read(str(self.runtime_dir(profile, netns) / f"{name}.stats"))
        except (OSError, ValueError):
            return None

    def supervised(self, profile: str, netns: Netns) -> tuple[Supervised, ...]:
        told = self._report(profile, netns).get("processes", {})
        return tuple(
            Supervised(
                name=name,
                state=ProcessState(one["state"]),
                pid=one["pid"],
                restarts=one["restarts"],
                since=one["since"],
                reason=one["reason"],
            )
            for name, one in sorted(told.items())
        )

    def lifetimes(self, profile: str, netns: Netns) -> Mapping[str, Lifetimes]:
        told = self._report(profile, netns).get("lifetimes", {})
        return {helper: Lifetimes(**counts) for helper, counts in told.items()}

    def last_words(self, profile: str, netns: Netns, name: str) -> str:
        directory = self.runtime_dir(profile, netns)
        try:
            record = json.loads((directory / f"{name}.exit").read_text())
        except (OSError, ValueError):
            return _tail(directory / logs.file_name(name), 1)
        return f"pid {record['pid']} {record['how']} at {_say_time(record['time'])}"

    def reconciles(self, profile: str, netns: Netns) -> bool:
        return (self.runtime_dir(profile, netns) / watching.FILE).exists()

    def set_reconcile(self, profile: str, netns: Netns, *, is_on: bool) -> None:
        file = self.runtime_dir(profile, netns) / watching.FILE
        if is_on:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch()
        else:
            file.unlink(missing_ok=True)

    def cleanup(self, profile: str, netns: Netns) -> None:
        directory = self.runtime_dir(profile, netns)
        is_kept = False
        if there := self.supervisors(profile, netns.identity):
            with contextlib.suppress(SilentError):
                is_kept = bool(_ask(directory, {"do": "end"}).get("kept"))
            for pid in [] if is_kept else there:
                _signal_and_wait(pid, signal.SIGKILL, STOP_WITHIN_S)
        Marks(str(self.state_dir), directory.name).clear_all()
        if is_kept:  # a service: it is there for the next apply
            self._empty(directory)
            return
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)

    def take_over(self, profile: str, netns: Netns) -> tuple[Path, socket.socket]:
        """The runtime directory and the socket of a supervisor in the foreground, which this process becomes.

        To be called under the lock of the host, from the end of which on this process counts as that supervisor. One in
        the background goes, its processes stay. Raises PreflightError if there is one in the foreground already.
        """
        report = self._report(profile, netns)
        if report.get("service"):
            raise PreflightError(f"profile {profile} is a service already: pid {report['pid']}", where=f"netns {netns}")
        self._end_supervisors(profile, netns.identity)
        directory = self.runtime_dir(profile, netns)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        listener = control.listen(str(directory))
        supervisor.claim(str(directory))
        return directory, listener

    # -- supervisors --------------------------------------------------------------------------------------------------

    def _ask(
        self, profile: str, netns: Netns, request: Mapping[str, Any], *, within_s: float = _DONE_WITHIN_S
    ) -> dict[str, Any]:
        """The answer of the supervisor. One that is not there is started; one that does not answer, or that an orch
        before this one started and that does not understand, is replaced, but for a service.
        """
        directory = self.runtime_dir(profile, netns)
        with contextlib.suppress(SilentError):
            answer = _ask(directory, request, within_s)
            if not answer.get("is_outdated") or self._report(profile, netns).get("service"):
                return answer
        self._end_supervisors(profile, netns.identity)
        self._start_supervisor(profile, netns)
        try:
            return _ask(directory, request, within_s, taken_within_s=_STARTED_WITHIN_S)
        except SilentError as error:
            words = _tail(directory / supervisor.OWN_LOG, 1)
            raise HelperProcessError(f"{error}{': ' if words else ''}{words}", where=f"netns {netns}") from error

    def _start_supervisor(self, profile: str, netns: Netns) -> None:
        directory = self.runtime_dir(profile, netns)
        with (
            control.listen(str(directory)) as listener,
            (directory / supervisor.OWN_LOG).open("ab") as log,
            self.entered(netns),
        ):
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(directory), str(self.state_dir)],
                stdin=listener.fileno(),
                stdout=log,
                stderr=log,
                cwd="/",
                env={
                    "LANG": "C.UTF-8",
                    supervisor.MARK: supervisor_mark(self.state_dir, profile),
                    place.VARIABLE: netns.path,
                },
                start_new_session=True,
            )
        process.returncode = 0  # it is meant to outlive us: no warning about a child that was not reaped

    def _end_supervisors(self, profile: str, netns: str) -> None:
        for pid in self.supervisors(profile, netns):
            _signal_and_wait(pid, signal.SIGKILL, STOP_WITHIN_S)

    def supervisors(self, profile: str, netns: str) -> list[int]:
        """Their pids: one, or none; two where somebody removed the directory of the first."""
        return [pid for pid, at in self.all_supervisors().items() if at == (profile, netns)]

    def all_supervisors(self) -> dict[int, tuple[str, str]]:
        """Whose each is, by pid: a profile, and the identity of its namespace."""
        return {
            pid: (mark.profile, _netns_of(pid))
            for pid, kind, mark in self._scan()
            if kind == supervisor.MARK and mark == _Mark(str(self.state_dir), mark.profile)
        }

    def _report(self, profile: str, netns: Netns) -> dict[str, Any]:
        """supervisor.json, if who wrote it is still there."""
        try:
            report: dict[str, Any] = json.loads((self.runtime_dir(profile, netns) / supervisor.STATE_FILE).read_text())
            marks = dict(self._marks_of(report["pid"]))
            is_claimed = traces.born(report["pid"]) == report.get("claimed_by")
        except (OSError, ValueError, LookupError):
            return {}
        return report if is_claimed or marks.get(supervisor.MARK) == _Mark(str(self.state_dir), profile) else {}

    def _scan(self) -> Iterator[tuple[int, str, _Mark]]:
        """Every live process of ours: (pid, which mark, mark)."""
        # A Path per process is slow where thousands run.
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208
        deadline = time.monotonic() + _PROGRAM_WITHIN_S
        while pids:
            unclear = []
            for pid in pids:
                try:
                    yield from ((pid, kind, mark) for kind, mark in self._marks_of(pid))
                except traces.BetweenProgramsError:
                    unclear.append(pid)
            pids = unclear if time.monotonic() < deadline else []

    def _marks_of(self, pid: int) -> list[tuple[str, _Mark]]:
        """The marks of a process that can be ours; none if it is gone, or somebody else wrote them.

        Raises BetweenProgramsError.
        """
        return [(kind, mark) for kind, mark in _marks_of(pid) if self._is_believed(pid, kind, mark)]

    def _is_believed(self, pid: int, kind: str, mark: _Mark) -> bool:
        if mark.state_dir != str(self.state_dir):
            return False
        if kind == supervisor.MARK:
            return trust.is_root(pid)
        return trust.is_helper(pid, str(self._directory(mark.profile, _netns_of(pid))), mark.name)

    def _is_there(self, process: ProcessSeen) -> bool:
        """False for one that is gone, a zombie that its parent has not noticed yet, and another that has its pid."""
        try:
            marks = [mark for kind, mark in self._marks_of(process.pid) if kind == _PROCESS_MARK]
        except traces.BetweenProgramsError:
            return True
        return any((mark.profile, mark.name) == (process.profile, process.name) for mark in marks)

    def _told(self, profile: str, netns: str, pid: int) -> dict[str, dict[str, Any]]:
        """What the supervisor with a pid says of its processes."""
        try:
            report = json.loads((self._directory(profile, netns) / supervisor.STATE_FILE).read_text())
            return dict(report["processes"]) if report["pid"] == pid else {}
        except (OSError, ValueError, LookupError):
            return {}

    def _ordered(self, profile: str, netns: str, name: str) -> _Mark | None:
        """The mark that a process has when it is started; None if it was stopped meanwhile."""
        orders = self._order_of(profile, netns, name)
        return _Mark.parse(orders["env"][_PROCESS_MARK]) if orders else None

    def _order_of(self, profile: str, netns: str, name: str) -> dict[str, Any]:
        """How a process is run; empty if it was stopped meanwhile."""
        try:
            return dict(json.loads((self._directory(profile, netns) / order.file_name(name)).read_text()))
        except (OSError, ValueError):
            return {}

    def _directory(self, profile: str, netns: str) -> Path:
        return self.state_dir / f"{profile}@{netns.replace(':', '-')}"

    def _empty(self, directory: Path) -> None:
        for entry in directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)  # what confine.py made
            elif not entry.name.startswith("supervisor."):
                entry.unlink()

    def _prepare(self, launch: Launch, suffix: str = "") -> Path:
        """The runtime directory, with the order for a process in it."""
        directory = self.runtime_dir(launch.profile, launch.netns)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / f"{order.file_name(launch.spec.name)}{suffix}").write_bytes(self._order(launch).encode())
        return directory

    def _write_documents(self, directory: Path, launch: Launch, suffix: str = "") -> None:
        for name, text in launch.files.items():
            (directory / f"{name}{suffix}").write_bytes(text.encode())
        if launch.spec.argv[0] == HELPER_PROGRAM:
            filters.write(directory)

    def _order(self, launch: Launch) -> Order:
        spec = launch.spec
        mark = _Mark(str(self.state_dir), launch.profile, spec.name, launch.digest)
        return Order(
            name=spec.name,
            argv=_command(spec),
            env={"PATH": SEARCH_PATH, "LANG": "C", _PROCESS_MARK: str(mark)},
            queues=list(spec.queues),
            has_page=spec.argv[0] == HELPER_PROGRAM,
            keys=[key_name(key) for key in spec.keys],
            disable=[self.encode_disable(key).hex() for key in spec.keys],
            keep_disabled=[self.encode_disable(key).hex() for key in spec.keys if key not in spec.enables],
            enable={key_name(key): self.encode_enable(key).hex() for key in spec.enables},
            is_restarted=spec.restart is Restart.ON_FAILURE,
            restart_limit=spec.restart_limit,
            restart_window_s=spec.restart_window_s,
            ready_within_s=spec.ready_within_s,
        )


def _ask(
    directory: Path,
    request: Mapping[str, Any],
    within_s: float = _DONE_WITHIN_S,
    *,
    taken_within_s: float = _TAKEN_WITHIN_S,
) -> dict[str, Any]:
    """The answer of a supervisor; one that ended over the request may have begun anew, and is asked again, once."""
    ask = partial(control.ask, str(directory), request, taken_within_s=taken_within_s, done_within_s=within_s)
    with contextlib.suppress(EndedError):
        return ask()
    return ask()


def _command(spec: ProcessSpec) -> list[str]:
    """What is executed for the command line of a process. Raises PreflightError if its program is not installed."""
    program, *arguments = spec.argv
    if program == HELPER_PROGRAM:
        return [sys.executable, "-I", "-S", str(_HELPER_SCRIPT), *arguments]
    found = shutil.which(program, path=SEARCH_PATH)
    if found is None:
        raise PreflightError(f"{program} is not installed", hint="install it, or use engine: kernel")
    return [sys.executable, "-I", "-S", str(_CONFINE_SCRIPT), spec.name, found, *arguments]


def _marks_of(pid: int) -> list[tuple[str, _Mark]]:
    """The marks of a process, whoever wrote them; none if it is gone. Raises BetweenProgramsError."""
    try:
        variables = traces.variables(pid)
    except traces.BetweenProgramsError:
        raise
    except (*traces.GONE, PermissionError):
        return []
    found = []
    for variable in variables:
        if not variable.startswith(b"ORCH_"):
            continue
        name, _, value = variable.decode(errors="replace").partition("=")
        mark = _Mark.parse(value) if name in (_PROCESS_MARK, supervisor.MARK) else None
        if mark is not None:
            found.append((name, mark))
    return found


def _netns_of(pid: int) -> str:
    """Device and inode of a process's network namespace, as kernel/netns.py writes them; empty if it is gone."""
    try:
        status = os.stat(f"/proc/{pid}/ns/net")  # noqa: PTH116
    except OSError:
        return ""
    return f"{status.st_dev}:{status.st_ino}"


def _is_successor(pid: int) -> bool:
    """Whether a process was started to take over from another one."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").endswith(NEXT.encode())
    except OSError:
        return False


def _age_s(pid: int) -> float:
    """Seconds since a process started; 0 if it is gone."""
    ticks = traces.born(pid)
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")) if ticks else 0.0


def _signal_and_wait(pid: int, number: int, within_s: float) -> bool:
    """Send a signal; True once the process is gone, False if it is still there after `within_s`. Raises OSError."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
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


def _end(pid: int) -> bool:
    """End a process by a signal; False if even the last one does not do that in time. Raises OSError."""
    return any(_signal_and_wait(pid, number, STOP_WITHIN_S) for number in (signal.SIGTERM, signal.SIGKILL))


def _tail(file: Path, count: int) -> str:
    """The last lines of a log as one, fit for a terminal: what came over a network may be quoted in it."""
    try:
        text = " / ".join(file.read_text(errors="replace").strip().splitlines()[-count:])
    except OSError:
        return ""
    return "".join(character if character.isprintable() else "?" for character in text)


def _say_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
