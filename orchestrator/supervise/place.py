"""Whether anybody but us still has the namespace of a supervisor.

Our processes keep a namespace alive that everybody else has given up: `ip netns delete` takes the name alone. It is
given up when no name leads to it any more, and, if it was named by a process, when no process that is not ours lives in
it. A name whose file is there but leads nowhere tells nothing: a mount may be out of our sight. That of process 1 is
never given up.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from orchestrator.supervise import inotify, traces
from orchestrator.supervise.errands import Errands, orch
from orchestrator.supervise.pauses import Pauses
from orchestrator.supervise.reactor import Tell

VARIABLE = "ORCH_NETNS_PATH"
"""In the environment of a supervisor: the path that its namespace was found by; empty if it has none."""

GIVEN_UP_FOR_S = 1.0
"""A name may be on its way to another one."""

_OWN = "/proc/self/ns/net"
_INIT = "/proc/1/ns/net"
_NAMES = "/run/netns"
_PROCESSES = "/proc/"
_OUR_MARKS = (b"ORCH_SUPERVISOR=", b"ORCH_PROCESS=")
_NAMES_CHANGE = inotify.DELETED | inotify.MOVED_OUT
_LOOK_EVERY_S = 30.0  # where nobody tells of a change
_AGAIN_S, _AGAIN_MAX_S = 5.0, 300.0
_ERROR, _WARNING = 3, 4  # levels of sd-daemon(3)

Callback = Callable[[], None]


class Reactor(Protocol):
    """What a look-out needs of orchestrator.supervise.reactor.Reactor."""

    def watch(self, descriptor: int, callback: Callback) -> None: ...
    def unwatch(self, descriptor: int) -> None: ...
    def watch_files(self, directory: str, mask: int, tell: Tell) -> None: ...
    def at(self, deadline: float, callback: Callback) -> object: ...


class Supervisor(Reactor, Protocol):
    """What releasing needs of orchestrator.supervise.supervisor.Supervisor."""

    def say(self, text: str, level: int) -> None: ...


class LookOut:
    """Calls `given_up`, once, after the namespace of this process was given up for a second; else it sleeps.

    `path` is what it was found by: a name, whose directory is watched, or that of a process.
    """

    def __init__(self, reactor: Reactor, path: str, given_up: Callback) -> None:
        self._reactor = reactor
        self._path = path = _followed(path)
        self._given_up = given_up
        self._identity = _identity_of(_OWN)
        self._is_by_process = path.startswith(_PROCESSES)
        self._directory = _NAMES if self._is_by_process else os.path.dirname(path)  # noqa: PTH120 (no pathlib here)
        self._pidfd = -1
        self._is_over = False
        self._again_at = 0.0  # when it is looked again at what could not be told
        try:
            reactor.watch_files(self._directory, _NAMES_CHANGE, lambda _changes: self._look())
            reactor.at(time.monotonic(), self._look)
        except OSError:  # no such directory, or no more of these for this user (fs.inotify.max_user_instances)
            self._look_now_and_then()

    def _look_now_and_then(self) -> None:
        if not self._is_over:
            self._look()
            self._reactor.at(time.monotonic() + _LOOK_EVERY_S, self._look_now_and_then)

    def _look(self) -> None:
        if not self._may_be_held():
            self._reactor.at(time.monotonic() + GIVEN_UP_FOR_S, self._look_again)

    def _look_again(self) -> None:
        if self._is_over or self._may_be_held():
            return
        self._is_over = True
        self._given_up()

    def _may_be_held(self) -> bool:
        """True also while that cannot be told, for want of descriptors: it is looked at again."""
        try:
            return self._is_held()
        except OSError:
            now = time.monotonic()
            if now >= self._again_at:
                self._again_at = now + _LOOK_EVERY_S
                self._reactor.at(self._again_at, self._look)
            return True

    def _is_held(self) -> bool:
        is_lived_in = self._is_by_process and self._is_lived_in()  # a name may be a link: nobody tells of its end
        if is_lived_in or has_name(self._directory, self._identity) or is_of_process_1(self._identity):
            return True
        return not self._is_by_process and is_out_of_sight(self._path)

    def _is_lived_in(self) -> bool:
        """Look again when whoever was found to live there ends."""
        if self._pidfd >= 0:
            return True
        for pid in self._holders():
            with contextlib.suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(pid)
                self._reactor.watch(self._pidfd, self._has_ended)
                return True
        return False

    def _holders(self) -> Iterator[int]:
        """Whoever it was found by may live elsewhere, and have it open (/proc/PID/fd/N) or a name for it of its own."""
        _, _, pid, *rest = self._path.split("/")
        if rest != ["ns", "net"] and pid.isdigit() and _identity_of(self._path) == self._identity:
            yield int(pid)
        yield from inhabitants(self._identity)

    def _has_ended(self) -> None:
        self._reactor.unwatch(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._look()


class Release:
    """Take away what a profile has, when its namespace was given up; tried again until nothing is left to supervise."""

    def __init__(self, supervisor: Supervisor, errands: Errands, profile: str, state_dir: str) -> None:
        self._supervisor = supervisor
        self._errands = errands
        self._command = orch("teardown", profile, "--yes", state_dir=state_dir)
        self._pauses = Pauses(_AGAIN_S, _AGAIN_MAX_S)

    def begin(self) -> None:
        self._supervisor.say("its network namespace was deleted: tearing down", _WARNING)
        self._start()

    def _start(self) -> None:
        try:
            self._errands.start(self._command, self._ended)
        except OSError as error:
            self._ended(error.errno or 1)

    def _ended(self, code: int) -> None:
        if code == 0:
            return
        pause_s = self._pauses.take()
        self._supervisor.say(f"teardown failed with exit code {code}: again in {pause_s:g} s", _ERROR)
        self._supervisor.at(time.monotonic() + pause_s, self._start)


def watch(reactor: Reactor, environment: Mapping[str, str], given_up: Callback) -> None:
    """Look out for the namespace of this process, unless it is the host's or nobody has called it anything."""
    path = environment.get(VARIABLE, "")
    if path not in ("", _INIT):
        LookOut(reactor, path, given_up)


def _followed(path: str) -> str:
    """The path of the process that a name is a link to; else the path itself."""
    with contextlib.suppress(OSError):  # it is no link
        target = os.readlink(path)  # noqa: PTH115
        return target if target.startswith(_PROCESSES) else path
    return path


def has_name(directory: str, identity: str) -> bool:
    """Whether a file of a directory leads to a namespace."""
    try:
        names = os.listdir(directory)  # noqa: PTH208
    except FileNotFoundError:
        return False
    return any(_identity_of(f"{directory}/{name}") == identity for name in names)


def is_of_process_1(identity: str) -> bool:
    """Whether it is the host's or the container's; names come and go. Process 1 may be ours, and be where it must."""
    return _identity_of(_INIT) == identity and not _is_ours("1")


def is_out_of_sight(path: str) -> bool:
    """Whether a name is there but leads to no namespace."""
    try:
        return os.stat(path).st_dev != os.stat(_OWN).st_dev  # noqa: PTH116
    except OSError:
        return False


def inhabitants(identity: str) -> Iterator[int]:
    """The processes in a namespace that are not ours."""
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit() and _identity_of(f"/proc/{entry}/ns/net") == identity and not _is_ours(entry):
            yield int(entry)


def _is_ours(pid: str) -> bool:
    try:
        return any(variable.startswith(_OUR_MARKS) for variable in traces.variables(int(pid)))
    except OSError:
        return False


def _identity_of(path: str) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return ""
    return f"{status.st_dev}:{status.st_ino}"
