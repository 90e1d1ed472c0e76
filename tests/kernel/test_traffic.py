"""Real servers and clients through stateful filters: what hangs without a helper works with it, on every path.

The other engines and backends; the native engine has its own (test_oracle, test_real_software, test_native). Kernels
take turns: each has every engine in every place, and every backend, and all together have every combination.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from subprocess import CompletedProcess

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
from tests.kernel.conftest import clean_orch, turns

BACKENDS = ("nftables", "iptables-nft", "iptables-legacy")
MODES = {"PASV": PASSIVE, "PORT": ACTIVE, "EPSV": EXTENDED_PASSIVE, "EPRT": EXTENDED_ACTIVE}
PLACES = {"incoming": (ROUTER, ROUTER_FILTER), "outgoing": (CLIENT, HOST_FILTER)}
TIMED_OUT = 28
Fetch = Callable[..., CompletedProcess[str]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a filter is at work and helpers are to be attached."""

    orch: Harness
    path: str
    netns: str

    def apply(self, engine: str, backend: str) -> None:
        attach = f"{{engine: {engine}, attach: [{{path: [{self.path}]}}]}}"
        text = f"profile: t\nbackend: {backend}\nhelpers: {{ftp: {attach}, tftp: {attach}}}\n"
        self.orch.apply(text, self.netns)


@pytest.fixture(scope="module", params=PLACES)
def filtered(routed: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A filter, through which nothing passes before and after."""
    netns, ruleset = PLACES[request.param]
    with clean_orch(tmp_path_factory.mktemp("state")) as orch:
        topology.load_filter(netns, ruleset)
        assert_nothing_passes()
        yield Place(orch, request.param, netns)
        assert_nothing_passes()


@pytest.fixture
def place(filtered: Place) -> Iterator[Place]:
    """Every test of a place begins and ends without a profile."""
    yield filtered
    filtered.orch.teardown(every_netns=True)


def ftp(mode: str, address: str = SERVER_IP, *, within_s: int = 8) -> CompletedProcess[str]:
    return topology.ftp(*MODES[mode], address=address, within_s=within_s)


def assert_nothing_passes() -> None:
    """Transfers hang; all of them at once, for each takes all the time that it may."""
    fetches: list[Fetch] = [
        lambda **how: ftp("PASV", **how),
        lambda **how: ftp("EPSV", SERVER_IP6, **how),
        topology.tftp,
    ]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda fetch: fetch(within_s=3), fetches))
    assert {one.returncode for one in done} == {TIMED_OUT}, done


def assert_passes(done: CompletedProcess[str]) -> None:
    assert (done.stdout, done.stderr) == (CONTENT, ""), done


@pytest.mark.parametrize("backend", turns(BACKENDS))
def test_conntrackd(place: Place, backend: str) -> None:
    """FTP on IPv4 only, and PASV and PORT only: its IPv6 makes no expectation, and its EPSV is broken."""
    place.apply("conntrackd", backend)
    with topology.expectation_events(place.netns) as events:
        for mode in ("PASV", "PORT"):
            assert_passes(ftp(mode))
        for address in (SERVER_IP, SERVER_IP6):
            assert_passes(topology.tftp(address))
    made = [line for line in events if "[NEW]" in line]
    assert [sum(f"helper={name}" in line for line in made) for name in ("ftp-us", "tftp-us")] == [2, 2]


@pytest.mark.parametrize("backend", turns(BACKENDS, first=1))
def test_the_kernels_helpers(place: Place, backend: str) -> None:
    place.apply("kernel", backend)
    for mode, address in [*((mode, SERVER_IP) for mode in MODES), ("EPSV", SERVER_IP6), ("EPRT", SERVER_IP6)]:
        assert_passes(ftp(mode, address))
    for address in (SERVER_IP, SERVER_IP6):
        assert_passes(topology.tftp(address))


@pytest.mark.parametrize("backend", turns(BACKENDS, first=2))
@pytest.mark.parametrize("filtered", ["incoming"], indirect=True)
def test_attachment_is_as_narrow_as_the_profile(place: Place, backend: str) -> None:
    """Interface, source, destination and port each decide: what differs in one of them is not served."""
    fits = {
        "path": ["incoming"],
        "iif": "lan0",
        "saddr": ["10.66.1.0/24"],
        "daddr": ["10.66.2.0/24"],
        "ports": ["20-22"],
    }
    differs = {"iif": "wan0", "saddr": ["10.66.7.0/24"], "daddr": ["10.66.7.0/24"], "ports": [20, 22]}
    others = [fits | {key: value} for key, value in differs.items()]
    for attach, within_s, exit_code in ((others, 3, TIMED_OUT), ([*others, fits], 8, 0)):
        helpers = {"ftp": {"engine": "kernel", "attach": attach}}
        profile = {"profile": "t", "backend": backend, "families": ["ip"], "helpers": helpers}
        place.orch.apply(json.dumps(profile), ROUTER)
        assert ftp("PASV", within_s=within_s).returncode == exit_code
