"""Real servers and clients of every sort through a stateful router, with and without NAT: what they ask for works.

Each row checks that the client asked for the mode it is there for: some fall back to another without a word.
To know whether a row that fails is our fault, run the same with the kernel's helpers: LAB_ENGINE=kernel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import filterfalse, product

import pytest

from lab import software
from lab.nat import Nat, load_nat
from lab.software import (
    FTP_CLIENTS,
    FTP_SERVERS,
    TFTP_CLIENTS,
    TFTP_SERVERS,
    TFTP_SERVERS_IP6,
    TLS_CLIENTS,
    TLS_DATA_PORTS,
    TLS_PORT,
)
from lab.topology import CONTENT, ROUTER, ROUTER_FILTER, load_filter
from orchestrator.verify.expectations import Events, expectations_made
from tests.kernel.conftest import clean_orch, turns

ENGINE = os.environ.get("LAB_ENGINE", "native")


@dataclass(frozen=True, slots=True)
class Row:
    """One client against one server."""

    client: str
    server: str
    nat: Nat
    ip6: bool
    mode: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.client, self.server, self.mode, "ip6" if self.ip6 else "ip", self.nat)))

    @property
    def host(self) -> str:
        return self.nat.server(ip6=self.ip6)


def ftp_rows() -> Iterator[Row]:
    """Every client in every mode, without NAT and with both kinds, and curl with every server and every NAT."""
    ways = [
        (client, mode, ip6)
        for client, told in FTP_CLIENTS.items()
        for ip6 in (False, True)
        for mode in told.modes(ip6=ip6)
    ]
    servers = list(FTP_SERVERS)
    for number, (client, mode, ip6) in enumerate(ways):
        yield Row(client, servers[number % 3], Nat.NONE, ip6, mode)
        yield Row(client, servers[(number + 1) % 3], Nat.BOTH, ip6, mode)
        if client == "curl":
            yield Row(client, servers[(number + 1) % 3], Nat.NONE, ip6, mode)
            yield Row(client, servers[(number + 2) % 3], Nat.NONE, ip6, mode)
            yield Row(client, servers[(number + 2) % 3], Nat.SOURCE, ip6, mode)
            yield Row(client, servers[number % 3], Nat.DESTINATION, ip6, mode)


def tftp_rows() -> Iterator[Row]:
    """Every client with every server, without NAT and with one kind or both, which go round."""
    ways = [(server, False) for server in TFTP_SERVERS] + [(server, True) for server in TFTP_SERVERS_IP6]
    for number, (client, (server, ip6)) in enumerate(product(TFTP_CLIENTS, ways)):
        yield Row(client, server, Nat.NONE, ip6)
        yield Row(client, server, (Nat.SOURCE, Nat.DESTINATION, Nat.BOTH)[(number + number // 3) % 3], ip6)


def is_refused_by_server(row: Row) -> bool:
    """pyftpdlib compares addresses as text, and the kernel's helper writes those of IPv6 in full."""
    is_rewritten = row.ip6 and row.mode == "EPRT" and row.nat.hides_client
    return ENGINE == "kernel" and row.server == "pyftpdlib" and is_rewritten


FTP_ROWS = turns(sorted(filterfalse(is_refused_by_server, ftp_rows()), key=lambda row: list(Nat).index(row.nat)))
TFTP_ROWS = turns(sorted(tftp_rows(), key=lambda row: list(Nat).index(row.nat)))


@dataclass(slots=True)
class Scene:
    """The router with an engine at work."""

    expectations: Events
    verbs: software.Verbs
    nat: Nat = Nat.NONE

    def translate(self, nat: Nat) -> None:
        if nat is not self.nat:
            load_nat(nat)
            self.nat = nat


@pytest.fixture(scope="module")
def servers(routed: None) -> Iterator[None]:
    with software.more_servers():
        yield


@pytest.fixture(scope="module")
def scene(servers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    ftp_ports = ", ".join(map(str, (*FTP_SERVERS.values(), TLS_PORT)))
    tftp_ports = ", ".join(map(str, TFTP_SERVERS.values()))
    with clean_orch(tmp_path_factory.mktemp("state")) as orch, expectations_made(ROUTER) as made:
        load_filter(ROUTER, ROUTER_FILTER)
        load_filter(ROUTER, f"add rule inet filter forward ct state new tcp dport {TLS_DATA_PORTS} accept")
        orch.apply(
            "profile: software\nhelpers:\n"
            f"  ftp: {{engine: {ENGINE}, attach: [{{path: [incoming], ports: [{ftp_ports}]}}]}}\n"
            f"  tftp: {{engine: {ENGINE}, attach: [{{path: [incoming], ports: [{tftp_ports}]}}]}}\n",
            ROUTER,
        )
        with software.verbs_heard() as verbs:
            yield Scene(made, verbs)


@pytest.fixture
def quiet(scene: Scene) -> Scene:
    """The scene with everything read that tests before have left."""
    scene.expectations.take()
    scene.verbs.take()
    return scene


@pytest.mark.parametrize("row", FTP_ROWS, ids=str)
def test_ftp(quiet: Scene, row: Row) -> None:
    quiet.translate(row.nat)
    argv = FTP_CLIENTS[row.client].modes(ip6=row.ip6)[row.mode]
    assert software.fetch(argv, row.host, FTP_SERVERS[row.server]) == CONTENT
    assert quiet.verbs.take() == {row.mode}
    assert quiet.expectations.take()


@pytest.mark.parametrize("row", TFTP_ROWS, ids=str)
def test_tftp(quiet: Scene, row: Row) -> None:
    """A file is written, and read back."""
    quiet.translate(row.nat)
    assert software.exchange(TFTP_CLIENTS[row.client], row.host, TFTP_SERVERS[row.server]) == CONTENT
    assert len(quiet.expectations.take()) == 2


@pytest.mark.parametrize("ip6", [False, True], ids=["ip", "ip6"])
@pytest.mark.parametrize("client", TLS_CLIENTS)
def test_ftp_over_tls(quiet: Scene, client: str, *, ip6: bool) -> None:
    """After AUTH TLS the rest is opaque: nothing is expected, nothing spoilt. The filter lets the data ports pass."""
    quiet.translate(Nat.NONE)
    assert software.fetch(TLS_CLIENTS[client], Nat.NONE.server(ip6=ip6), TLS_PORT) == CONTENT
    assert quiet.expectations.take() == ()
