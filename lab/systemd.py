"""A systemd in a container of its own, inside a guest: what it runs, and its journal.

Process and mount namespaces are its own, everything else is the guest's. It knows only the units that it is given, so
that it boots in a second or two, and whoever runs the tests keeps all its services.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.layout import INSIDE_VARIABLE, LabError

PROGRAM = Path("/lib/systemd/systemd")
SHIPPED_UNITS = Path("/lib/systemd/system")
UNIT_DIR = Path("/etc/systemd/system")
# What a unit with default dependencies refers to; those of Debian pull in udev, tmpfiles and others.
TARGETS = (
    *("sysinit", "basic", "multi-user", "network-pre", "network-online"),
    *("shutdown", "umount", "final", "exit"),
)
JOURNAL_UNITS = ("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket")

_BOOTED_WITHIN_S = 120
_COMMAND_WITHIN_S = 300
_SETTINGS = {
    "system.conf": "[Manager]\nDefaultTimeoutStartSec=300\nDefaultTimeoutStopSec=120\nShowStatus=no\n",
    "journald.conf": "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nRateLimitBurst=0\n",
}


@dataclass(frozen=True, slots=True)
class Systemd:
    """A running one: `pid` is its process 1 as the guest sees it, `units` what it has instead of UNIT_DIR."""

    pid: int
    units: Path

    def run(self, *argv: str, check: bool = True) -> str:
        """Run a command inside and return what it said. Raises LabError if it fails and `check` is asked for."""
        inside = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--", *argv]
        done = subprocess.run(
            inside, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMMAND_WITHIN_S
        )
        if check and done.returncode != 0:
            raise LabError(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, unit: str) -> None:
        """Start a unit and wait until it has. Raises LabError with its journal."""
        try:
            self.run("systemctl", "start", unit)
        except LabError as error:
            raise LabError(f"{error}\n{self.journal(unit)}") from error

    def install(self, name: str, text: str) -> None:
        """Write a unit, or a drop-in such as `orch@.service.d/test.conf`, and have it read."""
        file = self.units / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        self.run("systemctl", "daemon-reload")

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        lines = self.run("systemctl", "show", f"--property={','.join(names)}", unit).splitlines()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def journal(self, unit: str) -> str:
        """The messages of a unit, by whatever process, one a line, after they have all been written."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--output=cat", f"--unit={unit}", "--no-pager")


@contextlib.contextmanager
def booted() -> Iterator[Systemd]:
    """Boot one, and end it with all that it runs. Only in a guest: it takes the control groups. Raises LabError."""
    if os.environ.get(INSIDE_VARIABLE) != "guest":
        raise LabError("systemd is booted in a guest only: python3 -m lab.vm run")
    with tempfile.TemporaryDirectory(prefix="lab-systemd-") as base, contextlib.ExitStack() as stack:
        directory = Path(base)
        directory.chmod(0o755)
        units = directory / "units"
        _write_units(units)
        _write_settings()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:  # it waits for a listener that does not read
            heard.bind(str(directory / "notify"))
            process = stack.enter_context(_spawned(directory))
            _wait_booted(heard, process, directory / "console")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        yield Systemd(int(children), units)


def _write_units(units: Path) -> None:
    units.mkdir()
    for target in TARGETS:
        text = f"[Unit]\nDescription={target}\nDefaultDependencies=no\n"
        (units / f"{target}.target").write_text(text)
    for name in JOURNAL_UNITS:
        (units / name).symlink_to(SHIPPED_UNITS / name)
    (units / "lab.target").write_text(
        f"[Unit]\nDescription=lab\nDefaultDependencies=no\nWants={' '.join(JOURNAL_UNITS)}\n"
        f"After={' '.join(JOURNAL_UNITS)}\n"
    )


def _write_settings() -> None:
    for name, text in _SETTINGS.items():
        directory = Path(f"/run/systemd/{name}.d")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "lab.conf").write_text(text)


@contextlib.contextmanager
def _spawned(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    namespaces = ("--pid", "--mount", "--propagation=slave", "--mount-proc", "--fork", "--kill-child=KILL")
    environment = {
        "container": "lab",
        "LANG": "C.UTF-8",
        "NOTIFY_SOCKET": str(directory / "notify"),
        "PATH": os.environ["PATH"],
        "SYSTEMD_UNIT_PATH": str(UNIT_DIR),
    }
    mounted = 'mount --bind "$1" "$2" && exec "$3" --unit=lab.target --log-target=console'
    with (directory / "console").open("wb") as output:
        process = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", mounted, "sh", str(directory / "units"), str(UNIT_DIR), str(PROGRAM)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()  # unshare takes its child along, and the kernel all in the namespace
        process.wait()
        for left in ("systemd", "log"):
            shutil.rmtree(Path("/run") / left, ignore_errors=True)


def _wait_booted(heard: socket.socket, process: subprocess.Popen[bytes], console: Path) -> None:
    """Return once it has told its manager, as whom it takes us, that it has reached its target."""
    ended = os.pidfd_open(process.pid)
    try:
        while heard.fileno() in select.select([heard.fileno(), ended], [], [], _BOOTED_WITHIN_S)[0]:
            if b"READY=1" in heard.recv(4096).split(b"\n"):
                return
    finally:
        os.close(ended)
    raise LabError(f"systemd did not boot:\n{console.read_text(errors='replace')}")
