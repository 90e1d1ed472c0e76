"""Fixtures on the real kernel: one routed topology with servers for the whole run, a clean host around every test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import topology
from lab.topology import CLIENT, ROUTER, SERVER, run
from orchestrator.app import kernel_system
from orchestrator.kernel.cthelper import KernelRegistry
from orchestrator.kernel.netns import entered, find
from tests.hosts import Harness

NAMESPACES = (CLIENT, ROUTER, SERVER)
HELPER_MODULES = (
    *("nf_nat_ftp", "nf_nat_tftp", "nf_nat_sip", "nf_nat_irc", "nf_nat_h323", "nf_nat_pptp", "nf_nat_amanda"),
    *("nf_conntrack_ftp", "nf_conntrack_tftp", "nf_conntrack_sip", "nf_conntrack_irc", "nf_conntrack_h323"),
    *("nf_conntrack_pptp", "nf_conntrack_amanda", "nf_conntrack_sane", "nf_conntrack_snmp"),
    *("nf_conntrack_netbios_ns", "nf_conntrack_broadcast"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(scope="session")
def routed() -> Iterator[None]:
    """Client, router and server with vsftpd and tftpd; what is on top of it is each test's own."""
    with topology.routed(), topology.servers():
        yield


@pytest.fixture
def orch(routed: None, tmp_path: Path) -> Iterator[Harness]:
    """orch in this process, on a clean host, with a state directory of its own."""
    _sweep()
    state = tmp_path / "state"
    harness = Harness(kernel_system(state), state)
    yield harness
    harness.answer = True
    harness.teardown(every_netns=True)
    _kill_processes()


def _sweep() -> None:
    """Take away whatever the test before left: processes, rules, connections, registrations, helper modules."""
    _kill_processes()
    for name in NAMESPACES:
        with entered(find(name)):
            run("nft", "flush", "ruleset")
            for program, table in _legacy_tables():
                run(program, "-t", table, "-F")
                run(program, "-t", table, "-X")
            run("conntrack", "-F", check=False)
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
    run("pkill", "-KILL", "-f", "orchestrator/supervise/runner.py", check=False)
    run("pkill", "-KILL", "-x", "conntrackd", check=False)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except FileNotFoundError:
        return ""


def snapshot() -> str:
    """Everything orch touches, as text: registrations, rules, queues and processes of all namespaces.

    The empty tables that every iptables leaves behind are nothing.
    """
    looks = [str(registration) for registration in KernelRegistry().dump()]
    for name in NAMESPACES:
        looks.append(topology.ruleset(name))
        with entered(find(name)):
            saved = [run(f"{program}-save", "-t", table).stdout for program, table in _legacy_tables()]
            looks += [line for text in saved for line in text.splitlines() if "orch" in line]
            looks.append(_read("/proc/thread-self/net/netfilter/nfnetlink_queue"))
    looks.append(run("pgrep", "-f", "conntrackd|supervise/runner", check=False).stdout)
    return "\n".join(look for look in looks if look.strip())


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
