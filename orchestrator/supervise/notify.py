"""Messages to the service manager that started us, as sd_notify(3) describes them; without one they go nowhere."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


@dataclass(frozen=True, slots=True)
class Manager:
    """The service manager: the address that it listens at, and how often it wants to hear of us.

    `watchdog_s` is half of the time after which it takes us for hung, 0 if it does not care.
    """

    address: str = ""
    watchdog_s: float = 0.0

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Manager:
        """What the environment says, and out of it: no process of ours shall speak in our name."""
        address, interval, pid = (environ.pop(name, "") for name in _VARIABLES)
        is_watched = address and interval.isdigit() and pid in ("", str(os.getpid()))
        return cls(address, int(interval) / 2e6 if is_watched else 0.0)

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def reloading(self, status: str) -> None:
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", f"STATUS={status}")

    def stopping(self, status: str) -> None:
        self._send("STOPPING=1", f"STATUS={status}")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        """Never blocks and never fails: who does not listen misses something, and we have other work."""
        if not self.address:
            return
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, address)
