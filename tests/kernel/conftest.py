"""Fixtures on the real kernel: one routed topology with servers for the whole run, a clean host around every test."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from lab import topology
from lab.layout import TURNS_VARIABLE, Kernel
from lab.topology import CLIENT, ROUTER, SERVER, run
from orchestrator import cli as orchestrator_cli
from orchestrator.app import boot_id, kernel_system
from orchestrator.kernel.cthelper import KernelRegistry
from orchestrator.kernel.netns import entered, find
from orchestrator.kernel.nft import nft_tables
from tests.hosts import Harness

NAMESPACES = (CLIENT, ROUTER, SERVER)
_PROCESSES = re.compile(
    r"/(supervise/supervisor|supervise/foreground|engine/process)\.py\0|(^|/)conntrackd\0|\0-m\0orchestrator[.\0]"
)
HELPER_MODULES = (
    *("nf_nat_ftp", "nf_nat_tftp", "nf_nat_sip", "nf_nat_irc", "nf_nat_h323", "nf_nat_pptp", "nf_nat_amanda"),
    *("nf_conntrack_ftp", "nf_conntrack_tftp", "nf_conntrack_sip", "nf_conntrack_irc", "nf_conntrack_h323"),
    *("nf_conntrack_pptp", "nf_conntrack_amanda", "nf_conntrack_sane", "nf_conntrack_snmp"),
    *("nf_conntrack_netbios_ns", "nf_conntrack_broadcast"),
)

# What systemd does with our unit, who undoes what nobody confirms, and how metrics are told: the same on every kernel,
# and it takes a guest minutes.
_ON_ONE_KERNEL = ["test_boot.py", "test_confirm.py", "test_exporter.py", "test_service.py"]
TURN = list(Kernel).index(Kernel(os.environ.get("LAB_KERNEL", Kernel.V6_1)))
"""The place of this kernel among the others."""
IS_FIRST_KERNEL = TURN == 0
collect_ignore = [] if IS_FIRST_KERNEL else _ON_ONE_KERNEL
collect_ignore += [] if "ORCH_SOAK_S" in os.environ else ["test_soak.py"]  # make soak


_IN_TURNS = ["test_supervision.py"]
"""What our supervisor does is the same on every kernel: each takes what one set of parameters makes."""

Case = TypeVar("Case")


def turns(cases: Sequence[Case], *, first: int = 0) -> list[Case]:
    """What this kernel takes of some cases: in `make test` kernels take turns, and all together take all of them."""
    if TURNS_VARIABLE not in os.environ:
        return list(cases)
    return [case for number, case in enumerate(cases, first) if number % len(Kernel) == TURN]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kernel)
    others = [item for file in _IN_TURNS for item in _of_other_kernels([i for i in items if i.path.name == file])]
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=others)


def _of_other_kernels(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    sets = sorted({_parameters(item) for item in items})
    mine = turns(sets)
    return [item for item in items if _parameters(item) not in mine]


def _parameters(item: pytest.Item) -> str:
    return item.callspec.id if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ""


@pytest.fixture(scope="session")
def routed() -> Iterator[None]:
    """Client, router and server with vsftpd and tftpd; what is on top of it is each test's own."""
    with topology.routed(), topology.servers():
        yield


@pytest.fixture
def orch(routed: None, tmp_path: Path) -> Iterator[Harness]:
    with clean_orch(tmp_path / "state") as harness:
        yield harness


@contextlib.contextmanager
def clean_orch(state: Path) -> Iterator[Harness]:
    """orch in this process, on a clean host, with a state directory of its own; nothing of it stays."""
    _sweep()
    try:
        yield Harness(kernel_system(state), state, boot_id=boot_id())
    finally:
        _sweep()


def _sweep() -> None:
    """Take away whatever is left: processes, rules, connections, registrations, helper modules.

    In a guest a program costs a tenth of a second, so none is run for what is not there.
    """
    _kill_processes()
    for name in NAMESPACES:
        with entered(find(name)):
            if nft_tables():
                topology.nft(name, "flush ruleset")
            for program, table in _legacy_tables():
                run(f"{program}-restore", text=f"*{table}\nCOMMIT\n")
            if int(_read("/proc/sys/net/netfilter/nf_conntrack_count") or 0):
                run("conntrack", "-F")
    registry = KernelRegistry()
    for registration in registry.dump():
        registry.delete(registration.key)
    loaded = [module for module in HELPER_MODULES if Path("/sys/module", module).exists()]
    if loaded:
        run("modprobe", "-r", *loaded)


def _legacy_tables() -> list[tuple[str, str]]:
    """(program, table) of the legacy tables that exist in the namespace of this thread."""
    return [
        (f"{program}-legacy", table)
        for program, names in (("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names"))
        for table in _read(f"/proc/thread-self/net/{names}").split()
    ]


def _kill_processes() -> None:
    """SIGKILL to all that orch started, and wait until the kernel has let go of everything that they held.

    Again until there is none: one may have started another meanwhile.
    """
    while pids := _processes():
        dying = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                dying.append(os.pidfd_open(pid))
                signal.pidfd_send_signal(dying[-1], signal.SIGKILL)
        for pidfd in dying:
            assert select.select([pidfd], [], [], 30)[0]
            os.close(pidfd)


def _processes() -> list[int]:
    """Supervisors, the commands that they run, helper processes and conntrackds."""
    pids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
    return [pid for pid in pids if _PROCESSES.search(_read(f"/proc/{pid}/cmdline"))]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def snapshot() -> str:
    """Everything orch touches, as text: registrations, rules, queues and processes of all namespaces.

    The empty tables that every iptables leaves behind are nothing.
    """
    looks = [str(registration) for registration in KernelRegistry().dump()]
    for name in NAMESPACES:
        with entered(find(name)):
            looks += [topology.ruleset(name)] if nft_tables() else []
            saved = [run(f"{program}-save", "-t", table).stdout for program, table in _legacy_tables()]
            looks += [line for text in saved for line in text.splitlines() if "orch" in line]
            looks.append(_read("/proc/thread-self/net/netfilter/nfnetlink_queue"))
    looks.append(" ".join(map(str, _processes())))
    return "\n".join(look for look in looks if look.strip())


def cli_here(*argv: str, state: Path) -> subprocess.CompletedProcess[str]:
    """`orch` in this process: to start another takes a guest seconds, and few tests are about that."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        patch.setenv("ORCH_STATE_DIR", str(state))
        try:
            code = orchestrator_cli.run(list(argv))
        finally:
            gc.enable()  # a command does without, as it ends soon
    return subprocess.CompletedProcess(argv, code, output.getvalue(), errors.getvalue())


def cli(*argv: str, state: Path) -> subprocess.CompletedProcess[str]:
    """`orch` as a process of its own, with nobody at the terminal."""
    return subprocess.run(
        [".venv/bin/python", "-m", "orchestrator", *argv],
        env={**os.environ, "ORCH_STATE_DIR": str(state)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
