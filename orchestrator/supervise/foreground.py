"""The supervisor as a service: `python -I -S foreground.py CONTRACT` in the namespace, which `orch run` becomes.

Standard input is its listening socket, as it is for a supervisor in the background. It runs the commands that apply the
profile and tear it down as its children; they talk to it as all commands talk to a supervisor. Everything that a person
may want to read goes to standard output.

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
import socket
import time
from collections.abc import Mapping
from typing import TypedDict

from orchestrator.supervise import control, lifetimes, place, successor, watching
from orchestrator.supervise import supervisor as background
from orchestrator.supervise.errands import Errands
from orchestrator.supervise.lifecycle import Life, State
from orchestrator.supervise.notify import Manager
from orchestrator.supervise.reactor import Timer
from orchestrator.supervise.service import Command, Service, Wish
from orchestrator.supervise.supervisor import STATE_FILE, Supervisor

_STDOUT = 1
_ERROR, _WARNING = 3, 4  # of the levels of sd-daemon(3)
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
        self._errands = Errands(supervisor, environment)
        self._is_journal = "JOURNAL_STREAM" in environment
        self._service = Service()
        self._child = 0
        self._again: Timer | None = None
        supervisor.is_kept = True
        supervisor.extra["service"] = True
        supervisor.on_signal = self._signalled
        supervisor.on_change = self._tell
        supervisor.relay = self._print
        watching.attach(supervisor, self._errands, directory=contract["directory"], state_dir=contract["state_dir"])
        place.watch(supervisor, environment, self._lost_its_place)

    def run(self) -> int:
        """Apply, serve, tear down; the exit code."""
        self._supervisor.at(time.monotonic(), self._begin)  # not before it hears of signals and children
        self._supervisor.run()
        if self._supervisor.processes:
            names = ", ".join(sorted(self._supervisor.processes))
            self._print("", f"not stopped, and left to a supervisor in the background: {names}", _ERROR)
        else:
            self._leave()
        return self._service.exit_code

    def _begin(self) -> None:
        self._supervisor.changed()
        self._keep_alive()
        self._start(self._service.begin())

    def _lost_its_place(self) -> None:
        self._print("", "its network namespace was deleted: ending", _WARNING)
        self._signalled(signal.SIGTERM)

    def _signalled(self, number: int) -> None:
        wish = _WISHES.get(signal.Signals(number))
        if wish is None:
            return
        if wish is Wish.END:
            self._supervisor.begins_anew = False  # it would apply
            self._manager.stopping(self._status())
            if self._service.running is Command.APPLY:
                os.kill(self._child, signal.SIGTERM)  # it takes back what it has begun
        self._start(self._service.wish(wish, time.monotonic()))

    def _ended(self, exit_code: int) -> None:
        self._child = 0
        following = self._service.ended(exit_code, time.monotonic())
        pause_s = self._service.pause_s
        if self._service.trouble:
            again = f": again in {pause_s:g} s" if pause_s else ""
            self._print("", f"{self._service.trouble}{again}", _ERROR)
        if pause_s:
            self._again = self._supervisor.at(time.monotonic() + pause_s, self._try_again)
        if self._service.is_over:
            self._supervisor.end()
        elif self._service.is_ending:
            self._manager.status(self._status())
        elif following is None:
            self._manager.ready(self._status())
        self._start(following)

    def _try_again(self) -> None:
        self._start(self._service.again())

    def _start(self, command: Command | None) -> None:
        if command is None:
            return
        if self._again:
            self._again.cancel()
        if command is Command.APPLY and self._service.is_serving:
            self._manager.reloading(self._status())
        argv = self._contract["apply"] if command is Command.APPLY else self._contract["teardown"]
        self._child = self._errands.start(argv, self._ended)

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
    environment = dict(os.environ)
    manager = Manager.take(environment)
    listener = control.inherited()
    try:
        supervisor = Supervisor(contract["directory"], contract["state_dir"], listener)
    except OSError as error:
        print(f"cannot supervise profile {contract['profile']}: {error}", file=sys.stderr)
        return 1
    lifetimes.attach(supervisor)
    try:
        return Foreground(contract, supervisor, manager, environment).run()
    finally:
        if supervisor.processes:
            _leave_to_another(contract, listener)


def _leave_to_another(contract: Contract, listener: socket.socket) -> None:
    """Processes that could not be stopped, or that ran before us, need somebody who disables what they leave behind."""
    argv = [sys.executable, "-I", "-S", background.__file__, contract["directory"], contract["state_dir"]]
    kept = {name: os.environ.get(name, "") for name in (background.MARK, place.VARIABLE)}
    environment = {"LANG": "C.UTF-8", **kept}
    successor.leave_to_another(listener, argv, environment, log=f"{contract['directory']}/{background.OWN_LOG}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
