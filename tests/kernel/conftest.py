"""Fixtures on the real kernel: one routed topology with servers for the whole run, a clean host around every test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import topology
from lab.topology import CLIENT, ROUTER, SERVER, inside, run
from orchestrator.app import kernel_system
from tests.hosts import Harness

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
def host() -> Iterator[None]:
    """A host without helpers, rules and helper modules; whatever a test leaves is taken away, and told."""
    _sweep()
    yield
    _sweep()


@pytest.fixture
def orch(routed: None, host: None, tmp_path: Path) -> Iterator[Harness]:
    """orch in this process, on the running kernel, with a state directory of its own."""
    state = tmp_path / "state"
    harness = Harness(kernel_system(state), state)
    yield harness
    harness.answer = True
    harness.teardown(every_netns=True)
    _no_processes()


def _sweep() -> None:
    _no_processes()
    for netns in (CLIENT, ROUTER, SERVER):
        if Path("/run/netns", netns).exists():
            inside(netns, "nft", "flush", "ruleset")
            for table in ("raw", "filter"):
                for program in ("iptables-legacy", "ip6tables-legacy"):
                    if _has_legacy(netns, program, table):
                        inside(netns, program, "-t", table, "-F")
                        inside(netns, program, "-t", table, "-X")
                        inside(
                            netns, program, "-t", table, "-P", "FORWARD" if table == "filter" else "OUTPUT", "ACCEPT"
                        )
            inside(netns, "conntrack", "-F", check=False)
    if Path("/sys/module/nfnetlink_cthelper").exists():
        run("nfct", "helper", "flush", check=False)
    for module in HELPER_MODULES:
        if Path("/sys/module", module).exists():
            run("modprobe", "-r", module)


def _has_legacy(netns: str, program: str, table: str) -> bool:
    family = "ip6" if program.startswith("ip6") else "ip"
    names = inside(netns, "cat", f"/proc/net/{family}_tables_names", check=False).stdout.split()
    return table in names


def _no_processes() -> None:
    run("pkill", "-KILL", "-f", "orchestrator/supervise/runner.py", check=False)
    run("pkill", "-KILL", "-x", "conntrackd", check=False)


def snapshot() -> str:
    """Everything orch touches, as text: registrations, rules, queues and processes of all namespaces."""
    looks = [
        run("nfct", "helper", "list", check=False).stdout if Path("/sys/module/nfnetlink_cthelper").exists() else ""
    ]
    for netns in (CLIENT, ROUTER, SERVER):
        looks.append(inside(netns, "nft", "list", "ruleset").stdout)
        for program in ("iptables-legacy", "ip6tables-legacy"):
            if _has_legacy(netns, program, "raw"):
                saved = inside(netns, f"{program}-save", "-t", "raw").stdout
                looks += [line for line in saved.splitlines() if "orch" in line]
        looks.append(inside(netns, "cat", "/proc/net/netfilter/nfnetlink_queue", check=False).stdout)
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
