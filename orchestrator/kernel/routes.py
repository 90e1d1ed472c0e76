"""What the kernel's routing says of an address. Sources: rtnetlink.h, inet_rtm_getroute in net/ipv4/route.c."""

from __future__ import annotations

import ipaddress
import socket
import struct

from orchestrator.kernel.netlink import NLM_F_REQUEST, split
from orchestrator.kernel.netns import entered
from orchestrator.model import Netns
from orchestrator.ports import Route

_NETLINK_ROUTE = 0
_RTM_GETROUTE = 26
_RTM_NEWROUTE = 24
_RTA_DST = 1
_RTA_OIF = 4
_RTN_LOCAL = 2

_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_ATTRIBUTE = struct.Struct("=HH")


def route(netns: Netns, address: str) -> Route:
    """As seen from inside a namespace; nothing is sent to the address. Raises PreflightError, ValueError."""
    packed = ipaddress.ip_address(address).packed
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    body = _ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
    body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST) + packed
    request = _HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, NLM_F_REQUEST, 0, 0) + body
    with entered(netns):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as channel:
            channel.send(request)
            ((kind, _, _, message),) = split(channel.recv(1 << 16))
        return _decode(message) if kind == _RTM_NEWROUTE else Route(is_local=False, interface="")


def _decode(message: bytes) -> Route:
    route_type = _ROUTE.unpack_from(message, _HEADER.size)[7]
    offset = _HEADER.size + _ROUTE.size
    interface = ""
    while offset + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, offset)
        if kind == _RTA_OIF:
            interface = socket.if_indextoname(struct.unpack_from("=I", message, offset + _ATTRIBUTE.size)[0])
        offset += max(length + 3 & ~3, _ATTRIBUTE.size)
    return Route(is_local=route_type == _RTN_LOCAL, interface=interface)
