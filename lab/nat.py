"""NAT on the router: clients behind an address of it (source), servers behind an address of it (destination), or both.

The addresses translated to are longer as text than those behind them, so that a rewritten payload changes its length.
Only control connections are translated by rule; what belongs to them follows by expectation, or does not work.
"""

from __future__ import annotations

from enum import StrEnum

from lab.topology import ROUTER, SERVER_IP, SERVER_IP6, load_filter

OUTSIDE_IP, OUTSIDE_IP6 = "10.66.2.101", "fd66:2::101"
"""What servers see instead of the client under source NAT."""
SERVICE_IP, SERVICE_IP6 = "10.66.1.101", "fd66:1::101"
"""What clients see instead of the server under destination NAT."""

_SOURCE = f"""
        oifname "wan0" ip saddr 10.66.1.0/24 snat ip to {OUTSIDE_IP}
        oifname "wan0" ip6 saddr fd66:1::/64 snat ip6 to {OUTSIDE_IP6}
"""
_DESTINATION = "".join(
    f"""
        iifname "lan0" {family} daddr {service} tcp dport {{ 21, 2121-2123 }} dnat {family} to {server}
        iifname "lan0" {family} daddr {service} udp dport {{ 69, 1069 }} dnat {family} to {server}
"""
    for family, service, server in (("ip", SERVICE_IP, SERVER_IP), ("ip6", SERVICE_IP6, SERVER_IP6))
)


class Nat(StrEnum):
    """What the router translates."""

    NONE = "none"
    SOURCE = "snat"
    DESTINATION = "dnat"
    BOTH = "both"

    @property
    def hides_client(self) -> bool:
        return self in (Nat.SOURCE, Nat.BOTH)

    @property
    def hides_server(self) -> bool:
        return self in (Nat.DESTINATION, Nat.BOTH)

    def server(self, *, ip6: bool) -> str:
        """The address by which a client reaches the server."""
        if self.hides_server:
            return SERVICE_IP6 if ip6 else SERVICE_IP
        return SERVER_IP6 if ip6 else SERVER_IP


def load_nat(nat: Nat) -> None:
    """Let the router translate new connections so from now on; connections that exist stay as they are."""
    load_filter(
        ROUTER,
        f"""
table inet nat
flush table inet nat
table inet nat {{
    chain prerouting {{
        type nat hook prerouting priority dstnat
        {_DESTINATION if nat.hides_server else ""}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat
        {_SOURCE if nat.hides_client else ""}
    }}
}}
""",
    )
