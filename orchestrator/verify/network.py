"""A client, a router and a server in namespaces without a name: they end with this process, whatever ends it.

client 10.66.1.2, fd66:1::2  --  10.66.1.1 router 10.66.2.1  --  server 10.66.2.2, fd66:2::2
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.kernel.netns import entered, scratch
from orchestrator.kernel.nft import NftSession
from orchestrator.model import L3Proto, L4Proto, Netns

LAN, WAN = "lan0", "wan0"
_OUTSIDE = "eth0"
# Ends of a veth that have the same index are told a second late that they are linked, and have no IPv6 before.
# Source: link_watch.c, linkwatch_urgent_event.
_OUTSIDE_INDEX = 100
_SYSCTLS = {
    # No address waits for others to object, and none is left over from autoconfiguration.
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/default/accept_ra": "0",
    # The ports that dialogues name are below: no connection takes one of those for its source.
    "ipv4/ip_local_port_range": "52000 60999",
}
_ROUTER_SYSCTLS = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}


@dataclass(frozen=True, slots=True)
class Host:
    """An end of connections: a namespace, its interface, and an address of each family. Networks are /24 and /64."""

    netns: Netns
    interface: str
    ip: str
    ip6: str

    def address(self, l3proto: L3Proto) -> str:
        return self.ip if l3proto is L3Proto.IP else self.ip6

    @property
    def broadcast(self) -> str:
        return f"{self.ip.rpartition('.')[0]}.255"


@dataclass(frozen=True, slots=True)
class Network:
    """`router` is the router as the server sees it: it makes connections of its own, too."""

    client: Host
    router: Host
    server: Host


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """The three namespaces, linked and routed. Raises PreflightError without the privilege."""
    with contextlib.ExitStack() as stack:
        client, router, server = (_namespace(stack, name) for name in ("client", "router", "server"))
        for netns in (client, router, server):
            _write(netns, _SYSCTLS)
        _write(router, _ROUTER_SYSCTLS)
        made = Network(
            client=Host(client, _OUTSIDE, "10.66.1.2", "fd66:1::2"),
            router=Host(router, WAN, "10.66.2.1", "fd66:2::1"),
            server=Host(server, _OUTSIDE, "10.66.2.2", "fd66:2::2"),
        )
        lan = Host(router, LAN, "10.66.1.1", "fd66:1::1")
        for host, gateway in ((made.client, lan), (made.server, made.router)):
            _link(host, gateway)
        yield made


def load_filter(router: Host, ports: Iterable[tuple[L4Proto, int]]) -> None:
    """Let first connections to some ports through, and what is expected; all else is dropped."""
    accepted = "\n".join(
        ["ct state established,related accept", "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"]
    )
    new = "\n".join(f"ct state new {l4proto} dport {port} accept" for l4proto, port in sorted(set(ports)))
    chains = "\n".join(
        f"chain {hook} {{ type filter hook {hook} priority filter; policy drop;\n{accepted}\n{rules}\n}}"
        for hook, rules in (("forward", new), ("input", ""), ("output", new))
    )
    with entered(router.netns):
        NftSession().text(f"table inet filter {{\n{chains}\n}}", operation="load rules", key="inet filter")


def _namespace(stack: contextlib.ExitStack, name: str) -> Netns:
    with scratch():
        descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    status = os.fstat(descriptor)
    return Netns(name, f"/proc/{os.getpid()}/fd/{descriptor}", f"{status.st_dev}:{status.st_ino}")


def _write(netns: Netns, values: dict[str, str]) -> None:
    with entered(netns):
        for name, value in values.items():
            Path("/proc/sys/net", name).write_text(value)


def _link(host: Host, gateway: Host) -> None:
    from pyroute2 import IPRoute  # all of it, which takes a third of a second: only here

    there = os.open(gateway.netns.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with entered(host.netns), IPRoute() as route:
            peer = {"ifname": gateway.interface, "net_ns_fd": there}
            route.link("add", ifname=host.interface, index=_OUTSIDE_INDEX, kind="veth", peer=peer)
    finally:
        os.close(there)
    for end in (host, gateway):
        with entered(end.netns), IPRoute() as route:
            route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
            index = route.link_lookup(ifname=end.interface)[0]
            route.addr("add", index=index, address=end.ip, prefixlen=24, broadcast=end.broadcast)
            route.addr("add", index=index, address=end.ip6, prefixlen=64)
            route.link("set", index=index, state="up")
    with entered(host.netns), IPRoute() as route:
        for default, address in (("0.0.0.0/0", gateway.ip), ("::/0", gateway.ip6)):
            route.route("add", dst=default, gateway=address)
