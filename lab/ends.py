"""Sockets of the client and the server of the topology, for sessions that are played without software."""

from __future__ import annotations

import socket

from lab.topology import CLIENT, CLIENT_IP, CLIENT_IP6, SERVER, SERVER_IP, SERVER_IP6
from orchestrator.kernel.netns import entered, find

FTP_PORT, TFTP_PORT = 2121, 1069
"""Where the played servers listen; real ones may run beside them."""

ADDRESSES = {CLIENT: (CLIENT_IP, CLIENT_IP6), SERVER: (SERVER_IP, SERVER_IP6)}

WITHIN_S = 20.0


def listening(netns: str, port: int, *, ip6: bool = False, within_s: float = WITHIN_S) -> socket.socket:
    """A TCP server at the address of a host."""
    with entered(find(netns)):
        listener = socket.create_server((ADDRESSES[netns][ip6], port), family=_family(ip6=ip6))
    listener.settimeout(within_s)
    return listener


def opened(
    netns: str,
    kind: socket.SocketKind = socket.SOCK_STREAM,
    *,
    ip6: bool = False,
    port: int = 0,
    within_s: float = WITHIN_S,
) -> socket.socket:
    """A socket of a host; with a port it is bound to that."""
    with entered(find(netns)):
        made = socket.socket(_family(ip6=ip6), kind)
    made.settimeout(within_s)
    if port:
        made.bind((ADDRESSES[netns][ip6], port))
    return made


def _family(*, ip6: bool) -> socket.AddressFamily:
    return socket.AF_INET6 if ip6 else socket.AF_INET
