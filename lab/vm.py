"""Run a command in a virtual machine that boots one of the lab's kernels over the host's own file system."""

import argparse
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from lab.layout import CACHE, INSIDE_VARIABLE, REPOSITORY, SYSROOT, SYSROOT_PACKAGES_FILE, Kernel, LabError

RUNS = CACHE / "vm"
BUSYBOX = SYSROOT / "usr/bin/busybox"
KEPT_RUNS = 20
GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a guest's command inherits of our environment; all else would make runs differ between machines.
INHERITED_VARIABLES = re.compile(r"(ORCH|LAB|PYTEST|HYPOTHESIS|COVERAGE|COV)_\w+|TERM|CI|NO_COLOR|FORCE_COLOR")

EXIT_TIMEOUT = 124
EXIT_GUEST_DIED = 125
EXIT_INTERRUPTED = 130

ORPHAN_GRACE_S = 60
CONSOLE_TAIL = 60

KERNEL_PARAMETERS = (
    "mitigations=off",
    "random.trust_cpu=on",
    "audit=0",
    "apparmor=0",
    "nowatchdog",
    # What only hardens, or only pays on real hardware, is left out: a guest spends half its time in the kernel.
    "init_on_alloc=0",
    "randomize_kstack_offset=off",
    "transparent_hugepage=never",
    "rcupdate.rcu_expedited=1",
    # Warnings and worse go to the console, which is a log file. A guest with an oops is of no use: end it at once.
    "loglevel=5",
    "oops=panic",
)
# The emulator looks at an event of every queue whenever it wakes, and a serial device has 64 of them: that was a fifth
# of all the time of a guest. So there are few, and a guest that has something for one is served at once.
QUIET_QUEUES = (
    *("-global", "virtio-serial-device.max_ports=4"),
    *("-global", "virtio-serial-pci.ioeventfd=off"),
    *("-global", "virtio-9p-pci.ioeventfd=off"),
)
# What the emulator is slow at: copying by bytes (erms), a second view of all memory (smap), longer walks through page
# tables (la57), more registers to save (avx, xsave). Without them a guest needs a fifth less of the processor.
SIMPLE_PROCESSOR = ("-cpu", "max,-erms,-smap,-smep,-umip,-la57,-pku,-xsave,-avx,-avx2")
CONSOLE_TROUBLE = re.compile(r"Kernel panic|Oops|BUG:|WARNING:|Call Trace")


@dataclass(frozen=True, slots=True)
class Machine:
    """The virtual hardware. With icount a virtual clock counts instructions, so that timings repeat; one CPU only.

    Two emulated CPUs wait for each other where two real ones are not idle: one is quicker.
    """

    cpus: int = 1
    memory: str = "1G"
    icount: bool = False

    def __post_init__(self) -> None:
        if self.icount and self.cpus != 1:
            raise ValueError("icount needs a machine with one CPU")


@dataclass(frozen=True, slots=True)
class Run:
    """One boot: a directory that host and guest share, made anew, and kept for whoever looks into a failure."""

    kernel: Kernel
    machine: Machine
    directory: Path = field(default_factory=lambda: RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}")

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def exit_code(self) -> int | None:
        """What the command exited with, or None if the guest did not live to tell."""
        try:
            return int((self.directory / "exit-code").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def prepare(self, argv: Sequence[str], *, interactive: bool) -> None:
        """Write what the guest runs. Scripts, because a kernel command line holds few bytes and odd quoting."""
        self.directory.mkdir(parents=True)
        assignments = [f"{name}={value}" for name, value in sorted(guest_environment(self.kernel).items())]
        self._write_script(
            "command",
            f"cd {shlex.quote(str(REPOSITORY))}\nexec {shlex.join(['/usr/bin/env', '-i', *assignments, *argv])}",
        )
        streams = "terminal" if interactive else "ports"
        guest = (BUSYBOX, "sh", REPOSITORY / "lab/guest.sh", self.directory, REPOSITORY, self.kernel, streams)
        self._write_script("start", f"exec {shlex.join(map(str, guest))}")

    def emulator_argv(self, *, interactive: bool, stderr: int) -> list[str]:
        """How to start the emulator; its stderr is the guest's console, `stderr` the stream of the command."""
        start = str(self.directory / "start")
        argv = [
            str(find_virtme_run()),
            *("--kimg", str(self.kernel.image)),
            *("--mods", "auto"),
            *("--busybox", str(BUSYBOX)),
            *("--name", f"lab-{self.kernel}".replace(".", "-")),
            *("--cpus", str(self.machine.cpus)),
            *("--memory", self.machine.memory),
            *("--rwdir", str(self.directory)),
            # virtme-ng loads the module that guest.sh needs only if it has an overlay of its own to mount.
            *("--overlay-rwdir", "/etc"),
            *("--shell" if interactive else "--script-sh", start),
            # The search for a virtiofsd that suits virtme-ng takes three seconds, and Debian 12 has none.
            "--force-9p",
            *([] if interactive else ["--show-boot-console"]),
            "--disable-microvm",
            # Emulated unless asked otherwise: /dev/kvm often exists in a virtual machine and does not work.
            *([] if os.environ.get("LAB_KVM") else ["--disable-kvm"]),
            *(f"--kopt={parameter}" for parameter in KERNEL_PARAMETERS),
        ]
        return [*argv, "--qemu-opts", *self._qemu_options(stderr=stderr)]

    def _qemu_options(self, *, stderr: int) -> list[str]:
        export = "local,security_model=none,multidevs=remap"
        return [
            *("-virtfs", f"{export},id=lab_host,mount_tag=lab.host,readonly=on,path=/"),
            *("-virtfs", f"{export},id=lab_repository,mount_tag=lab.repository,path={REPOSITORY}"),
            # virtme-ng has such ports as well, and finds them only on a host with udev.
            *("-device", "virtio-serial-pci,id=lab_ports"),
            *port("lab.stdout", "/proc/self/fd/1"),
            *port("lab.stderr", f"/proc/self/fd/{stderr}"),
            *QUIET_QUEUES,
            *([] if os.environ.get("LAB_KVM") else SIMPLE_PROCESSOR),
            *(["-icount", "shift=1,sleep=off"] if self.machine.icount else []),
        ]

    def _write_script(self, name: str, text: str) -> None:
        script = self.directory / name
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)


def port(name: str, path: str) -> list[str]:
    """The qemu options for a serial port that the guest finds by name, and whose bytes go to `path`."""
    identifier = name.replace(".", "_")
    device = f"virtserialport,bus=lab_ports.0,name={name},chardev={identifier}"
    return ["-chardev", f"file,id={identifier},path={path}", "-device", device]


def boot(kernel: Kernel, argv: Sequence[str], *, timeout_s: float = 900, machine: Machine | None = None) -> int:
    """Run `argv` in a guest, in the repository's directory, without stdin, and return its exit code.

    Output streams to ours. 124: the guest was ended after `timeout_s`. 125: the guest died without an exit code, and
    the end of its console was printed. Raises LabError if the lab is not complete; on Ctrl-C ends the guest.
    """
    run = start_run(kernel, machine or Machine(), argv, interactive=False)
    with emulator(run, limit_s=timeout_s + ORPHAN_GRACE_S) as process:
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        else:
            timed_out = False
    if timed_out:
        say(f"timeout: the guest ran for more than {timeout_s:g} s and was ended; console: {run.console}")
        return EXIT_TIMEOUT
    return judge(run)


def shell(kernel: Kernel, *, machine: Machine | None = None) -> int:
    """Give the user a shell in a guest; needs a terminal. Ends with the shell, or with C-a x."""
    if not sys.stdin.isatty():
        raise LabError("a shell needs a terminal; for a single command: python3 -m lab.vm run --kernel KEY -- COMMAND")
    run = start_run(kernel, machine or Machine(), ["bash", "--noprofile"], interactive=True)
    subprocess.call(run.emulator_argv(interactive=True, stderr=2), env=emulator_environment())
    return judge(run)


def start_run(kernel: Kernel, machine: Machine, argv: Sequence[str], *, interactive: bool) -> Run:
    if not kernel.is_fetched or not SYSROOT_PACKAGES_FILE.exists():
        raise LabError(f"kernel {kernel} or the sysroot is not here; run: python3 -m lab.fetch all")
    remove_old_runs()
    run = Run(kernel, machine)
    run.prepare(argv, interactive=interactive)
    return run


def remove_old_runs() -> None:
    """Keep the newest runs only; their names sort by time."""
    for old in sorted(RUNS.glob("*"))[:-KEPT_RUNS]:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def emulator(run: Run, *, limit_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """Run the emulator in a session of its own, and kill that when the block ends, its output passed on.

    The output goes through pipes even where ours is a file or a terminal: qemu opens /proc/self/fd/1 anew, which would
    truncate the one, set the other to non-blocking, and fail on a socket.
    """
    error_reader, error_writer = os.pipe()
    # The inner limit is for a guest that nobody watches any more, because we were killed.
    watchdog = ["timeout", "--signal=KILL", f"{limit_s:g}"]
    process = subprocess.Popen(
        [*watchdog, *run.emulator_argv(interactive=False, stderr=error_writer)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[error_writer],
        env=emulator_environment(),
        start_new_session=True,
    )
    os.close(error_writer)
    assert process.stdout is not None
    assert process.stderr is not None
    with os.fdopen(error_reader, "rb") as errors, run.console.open("wb") as console, process.stdout, process.stderr:
        relays = [
            relay(process.stdout, sys.stdout.fileno()),
            relay(errors, sys.stderr.fileno()),
            relay(process.stderr, console.fileno()),
        ]
        try:
            yield process
        finally:
            # Whatever virtme-run left behind, or could not take along because it was killed.
            kill_session(process.pid)
            process.wait()
            for thread in relays:
                thread.join()


def relay(source: IO[bytes], target: int) -> threading.Thread:
    """Copy bytes as they come, until the last writer is gone; keep reading when nobody takes them any more."""

    def copy() -> None:
        listening = True
        while data := os.read(source.fileno(), 65536):
            try:
                while listening and data:
                    data = data[os.write(target, data) :]
            except OSError:
                listening = False

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def kill_session(leader: int) -> None:
    """Kill every process of the session that `leader` leads or led."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (command) state ppid pgrp session ...; the command may hold blanks and brackets
            session = stat.read_text(errors="replace").rpartition(")")[2].split()[3]
            if int(session) == leader:
                os.kill(int(stat.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


def judge(run: Run) -> int:
    """The exit code of a guest that is gone; tell what its console holds if there was none."""
    log = run.console.read_text(errors="replace") if run.console.exists() else ""
    code = run.exit_code
    if code is None:
        tail = "".join(f"  | {line}\n" for line in log.splitlines()[-CONSOLE_TAIL:])
        say(f"the guest died before the command ended; the end of {run.console}:\n{tail}")
        return EXIT_GUEST_DIED
    if CONSOLE_TROUBLE.search(log):
        say(f"the guest's kernel complained, see {run.console}")
    return code


def guest_environment(kernel: Kernel) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if INHERITED_VARIABLES.fullmatch(name)}
    own = {"PATH": GUEST_PATH, "HOME": "/root", "LANG": "C.UTF-8", "LAB_KERNEL": kernel.value, INSIDE_VARIABLE: "guest"}
    return inherited | own


def emulator_environment() -> dict[str, str]:
    """Ours, with tools in sbin found: virtme-run calls depmod and modprobe."""
    return os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}


def find_virtme_run() -> Path:
    """The program that vng wraps. vng builds an unquoted shell command of its arguments, so we do without it."""
    for directory in (Path(sys.executable).parent, REPOSITORY / ".venv/bin"):
        if (directory / "virtme-run").exists():
            return directory / "virtme-run"
    found = shutil.which("virtme-run")
    if not found:
        raise LabError("virtme-run is not here; run: pip install virtme-ng")
    return Path(found)


def say(message: str) -> None:
    print(f"lab: {message}", file=sys.stderr, flush=True)


def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m lab.vm", description=__doc__)
    standard = Machine()
    commands = parser.add_subparsers(dest="action", required=True)
    run = commands.add_parser("run", help="run one command and exit with its exit code")
    interactive = commands.add_parser("shell", help="a shell in the guest")
    for command in (run, interactive):
        command.add_argument("--kernel", type=Kernel, choices=list(Kernel), required=True)
        command.add_argument("--cpus", type=int, default=standard.cpus)
        command.add_argument("--memory", default=standard.memory, help="as qemu takes it (default: %(default)s)")
        command.add_argument("--icount", action="store_true", help="count instructions, not time; implies one CPU")
    run.add_argument("--timeout", type=float, default=900, metavar="SECONDS")
    run.add_argument("argv", nargs="+", metavar="ARGV", help="command and arguments, after --")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse_arguments()
    machine = Machine(1 if arguments.icount else arguments.cpus, arguments.memory, arguments.icount)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        if arguments.action == "shell":
            return shell(arguments.kernel, machine=machine)
        return boot(arguments.kernel, arguments.argv, timeout_s=arguments.timeout, machine=machine)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_GUEST_DIED
    except KeyboardInterrupt:
        say("interrupted; the guest was ended")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
