"""The supervisor as a service: `python -I -S foreground.py CONTRACT` in the namespace, which `orch run` becomes.

It runs the commands that apply the profile and tear it down as its children; they talk to it as all commands talk to a
supervisor. Everything that a person may want to read goes to standard output.

CONTRACT is JSON: {profile, directory, state_dir, apply: [argument, ...], teardown: [argument, ...]}.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # -I and -S leave the standard library alone on the path; it stays first
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120

import contextlib
import json
import select
import signal
import time
from collections.abc import Mapping
from typing import TypedDict

from orchestrator.supervise import control, lifetimes
from orchestrator.supervise.lifecycle import Life, State
from orchestrator.supervise.notify import Manager
from orchestrator.supervise.service import Command, Service, Wish
from orchestrator.supervise.supervisor import STATE_FILE, Supervisor

_STDOUT = 1
_ERROR = 3  # of the levels of sd-daemon(3)
_OURS = "ORCH_"
_WISHES = {signal.SIGHUP: Wish.APPLY_AGAIN, signal.SIGTERM: Wish.END, signal.SIGINT: Wish.END}


class Contract(TypedDict):
    profile: str
    directory: str
    state_dir: str
    apply: list[str]
    teardown: list[str]


class Foreground:
    """A supervisor, the commands of its profile, and the service manager that hears of them."""

    def __init__(
        self, contract: Contract, supervisor: Supervisor, manager: Manager, environment: Mapping[str, str]
    ) -> None:
        self._contract = contract
        self._supervisor = supervisor
        self._manager = manager
        self._environment = environment
        self._is_journal = "JOURNAL_STREAM" in environment
        self._service = Service()
        self._child = 0
        supervisor.is_kept = True
        supervisor.extra["service"] = True
        supervisor.on_signal = self._signalled
        supervisor.on_reaped = self._reaped
        supervisor.on_change = self._tell
        supervisor.relay = self._print

    def run(self) -> int:
        """Apply, serve, tear down; the exit code."""
        self._supervisor.at(time.monotonic(), self._begin)  # not before it hears of signals and children
        self._supervisor.run()
        if not self._supervisor.processes:
            self._leave()
        return self._service.exit_code

    def _begin(self) -> None:
        self._supervisor.changed()
        self._keep_alive()
        self._start(self._service.begin())

    def _signalled(self, number: int) -> None:
        wish = _WISHES.get(signal.Signals(number))
        if wish is None:
            return
        if wish is Wish.END:
            self._manager.stopping(self._status())
            if self._service.running is Command.APPLY:
                os.kill(self._child, signal.SIGTERM)  # it takes back what it has begun
        self._start(self._service.wish(wish))

    def _reaped(self, pid: int, returncode: int) -> None:
        if pid != self._child:
            return  # an orphan that came to us as process 1
        self._child = 0
        following = self._service.ended(returncode if returncode >= 0 else 128 - returncode)
        if self._service.trouble:
            self._print("", self._service.trouble, _ERROR)
        if self._service.is_over:
            self._supervisor.end()
        elif following is None:
            self._manager.ready(self._status())
        self._start(following)

    def _start(self, command: Command | None) -> None:
        if command is None:
            return
        if command is Command.APPLY and self._service.is_serving:
            self._manager.reloading(self._status())
        argv = self._contract["apply"] if command is Command.APPLY else self._contract["teardown"]
        self._child = os.posix_spawn(
            argv[0],
            argv,
            self._environment,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setpgroup=0,  # a terminal's INT is for us: we say when to stop
            setsigdef=[signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGXFSZ],
        )

    def _keep_alive(self) -> None:
        if self._manager.watchdog_s:
            self._manager.alive()
            self._supervisor.at(time.monotonic() + self._manager.watchdog_s, self._keep_alive)

    def _leave(self) -> None:
        """Take our own files away, and the directory if there are no others: those tell why something failed."""
        directory = self._contract["directory"]
        with contextlib.suppress(OSError):
            for name in (control.SOCKET, STATE_FILE):
                os.unlink(f"{directory}/{name}")  # noqa: PTH108 (a supervisor imports no pathlib)
            os.rmdir(directory)  # noqa: PTH106

    def _tell(self) -> None:
        if self._service.is_serving:
            self._manager.status(self._status())

    def _status(self) -> str:
        """One line: the command under way or what went wrong with it, and the state of each process."""
        words = [f"{self._service.running} is running"] if self._service.running else []
        words += [self._service.trouble] if self._service.trouble else []
        words += [_say(name, life) for name, life in sorted(self._supervisor.processes.items())]
        return f"profile {self._contract['profile']}: {', '.join(words) or 'no processes'}"

    def _print(self, name: str, line: str, level: int) -> None:
        """A line for the journal; lost rather than waited for."""
        text = f"{name}: {line}" if name else line
        if self._is_journal:
            text = f"<{level}>{text}"
        with contextlib.suppress(OSError, ValueError):
            if select.select([], [_STDOUT], [], 0)[1]:
                os.write(_STDOUT, text.encode(errors="replace") + b"\n")


def _say(name: str, life: Life) -> str:
    restarts = f" after {life.restarts} restart{'s' * (life.restarts > 1)}" if life.restarts else ""
    reason = f" ({life.reason})" if life.reason and life.state is not State.RUNNING else ""
    return f"{name} {life.state}{restarts}{reason}"


def main(text: str) -> int:
    contract: Contract = json.loads(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    manager = Manager.take(environment)
    try:
        listener = control.listen(contract["directory"])
        supervisor = Supervisor(contract["directory"], contract["state_dir"], listener)
    except OSError as error:
        print(f"cannot supervise profile {contract['profile']}: {error}", file=sys.stderr)
        return 1
    lifetimes.attach(supervisor)
    return Foreground(contract, supervisor, manager, environment).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
