"""The watcher of one helper process: starts it, and disables its registrations the moment it dies.

An enabled helper without a listener lets packets pass unconfirmed, so that behind a stateful filter every new
connection is blocked; disabling takes milliseconds, a person does not. Runs as a script with the standard library
alone, is given ready-made netlink messages, and sleeps in poll until something happens.

Standard input: one JSON object {name, argv, cwd, env, log, disable: [hex, ...], adopt: pid or 0}.
Standard output: one JSON line {pid} or {error}, then closed.
SIGTERM: disable, then end the process. SIGUSR1: end the process, the caller has seen to the registrations.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NETLINK_NETFILTER = 12
STOP_WITHIN_S = 5.0


def main() -> int:
    spec = json.load(sys.stdin)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    for wanted in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(wanted, lambda *_: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Opened now: whoever is out of descriptors or memory when the process dies can still disable.
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        try:
            child, pid = _start(spec)
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            _answer({"error": f"{error.strerror}: {error.filename or spec['argv'][0]}"})
            return 1
        _answer({"pid": pid})
        number = _wait(pidfd, wake_read)
        if number != signal.SIGUSR1:
            _disable(netlink, [bytes.fromhex(message) for message in spec["disable"]])
        if number:
            _stop(pid, pidfd)
        _record(spec, pid, child, number)
    return 0


def _start(spec: dict[str, Any]) -> tuple[subprocess.Popen[bytes] | None, int]:
    if spec["adopt"]:
        return None, int(spec["adopt"])
    with Path(spec["log"]).open("ab") as log:
        child = subprocess.Popen(  # (it outlives this function on purpose)
            spec["argv"],
            cwd=spec["cwd"],
            env=spec["env"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return child, child.pid


def _answer(answer: dict[str, Any]) -> None:
    """Tell who started us. It may have been killed meanwhile: then we watch all the same, until the next one comes."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(answer).encode() + b"\n")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    os.close(null)


def _wait(pidfd: int, wake: int) -> int:
    """Sleep until the process is gone (0) or a signal tells us to end it (its number)."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.register(wake, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poller.poll()}
        if pidfd in ready:
            return 0
        for number in os.read(wake, 64):
            if number in (signal.SIGTERM, signal.SIGUSR1):
                return number


def _disable(netlink: socket.socket, messages: list[bytes]) -> None:
    for message in messages:
        with contextlib.suppress(OSError):  # one registration that is gone must not keep us from the next
            netlink.send(message)
            netlink.recv(65536)


def _stop(pid: int, pidfd: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        if select.select([pidfd], [], [], STOP_WITHIN_S)[0]:
            return
    raise SystemExit(f"process {pid} cannot be killed")


def _record(spec: dict[str, Any], pid: int, child: subprocess.Popen[bytes] | None, number: int) -> None:
    status = child.wait() if child is not None else None
    if number:
        return
    record = {"pid": pid, "status": status, "time": time.time()}
    with contextlib.suppress(OSError):  # its directory may have been removed under us
        (Path(spec["log"]).parent / f"{spec['name']}.exit").write_text(json.dumps(record))


if __name__ == "__main__":
    sys.exit(main())
