"""Real servers and clients through stateful filters: what hangs without a helper works with it, on every path."""

from __future__ import annotations

import pytest

from lab import topology
from lab.topology import (
    ACTIVE,
    CLIENT,
    CONTENT,
    EXTENDED_ACTIVE,
    EXTENDED_PASSIVE,
    HOST_FILTER,
    PASSIVE,
    ROUTER,
    ROUTER_FILTER,
    SERVER_IP,
    SERVER_IP6,
)
from tests.hosts import Harness

BACKENDS = ("nftables", "iptables-nft", "iptables-legacy")
MODES = {"PASV": PASSIVE, "PORT": ACTIVE, "EPSV": EXTENDED_PASSIVE, "EPRT": EXTENDED_ACTIVE}
PLACES = {"incoming": (ROUTER, ROUTER_FILTER), "outgoing": (CLIENT, HOST_FILTER)}


def profile(helper: str, engine: str, backend: str, path: str, families: str) -> str:
    return (
        f"profile: t\nbackend: {backend}\nfamilies: [{families}]\n"
        f"helpers: {{{helper}: {{engine: {engine}, attach: [{{path: [{path}]}}]}}}}\n"
    )


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ftp_by_conntrackd(orch: Harness, backend: str, path: str) -> None:
    """IPv4 only, and PASV and PORT only: its IPv6 makes no expectation, and its EPSV is broken."""
    netns, ruleset = PLACES[path]
    topology.load_filter(netns, ruleset)
    assert topology.ftp(*PASSIVE, within_s=4).returncode != 0
    orch.apply(profile("ftp", "conntrackd", backend, path, "ip"), netns)
    with topology.expectation_events(netns) as events:
        for mode in ("PASV", "PORT"):
            done = topology.ftp(*MODES[mode])
            assert (done.stdout, done.stderr) == (CONTENT, ""), mode
    assert sum("[NEW]" in line and "helper=ftp-us" in line for line in events) == 2
    orch.teardown(netns=netns)
    assert topology.ftp(*PASSIVE, within_s=4).returncode != 0


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ftp_by_the_kernel(orch: Harness, backend: str, path: str) -> None:
    netns, ruleset = PLACES[path]
    topology.load_filter(netns, ruleset)
    assert topology.ftp(address=SERVER_IP6, within_s=4).returncode != 0
    orch.apply(profile("ftp", "kernel", backend, path, "ip, ip6"), netns)
    cases = [(mode, SERVER_IP) for mode in MODES] + [(mode, SERVER_IP6) for mode in ("EPSV", "EPRT")]
    for mode, address in cases:
        done = topology.ftp(*MODES[mode], address=address)
        assert (done.stdout, done.stderr) == (CONTENT, ""), (mode, address)


@pytest.mark.parametrize("engine", ["conntrackd", "kernel"])
@pytest.mark.parametrize("path", PLACES)
def test_tftp(orch: Harness, engine: str, path: str) -> None:
    netns, ruleset = PLACES[path]
    topology.load_filter(netns, ruleset)
    assert topology.tftp(within_s=4).returncode != 0
    orch.apply(profile("tftp", engine, "nftables", path, "ip, ip6"), netns)
    for address in (SERVER_IP, SERVER_IP6):
        done = topology.tftp(address)
        assert (done.stdout, done.stderr) == (CONTENT, ""), address


@pytest.mark.parametrize("backend", BACKENDS)
def test_attachment_is_as_narrow_as_the_profile(orch: Harness, backend: str) -> None:
    """Interface, source, destination and port each decide; curl fetches from an address and port that match, or not."""
    topology.load_filter(ROUTER, ROUTER_FILTER)
    text = (
        f"profile: t\nbackend: {backend}\nfamilies: [ip]\nhelpers: {{ftp: {{engine: kernel, attach: ["
        "{path: [incoming], iif: INTERFACE, saddr: [SOURCE], daddr: [10.66.2.0/24], ports: [20-22]}]}}\n"
    )
    for interface, source, works in (
        ("lan0", "10.66.1.0/24", True),
        ("wan0", "10.66.1.0/24", False),
        ("lan0", "10.66.7.0/24", False),
    ):
        orch.apply(text.replace("INTERFACE", interface).replace("SOURCE", source), ROUTER)
        done = topology.ftp(*PASSIVE, within_s=8 if works else 4)
        assert (done.returncode == 0) is works, (interface, source, done)
