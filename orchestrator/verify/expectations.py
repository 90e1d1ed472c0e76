"""Expectations as the kernel announces them when they are made (ctnetlink, event EXP NEW), decoded field by field.

Decoding shares nothing with the engine that encodes expectations: an error in both would go unseen.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.kernel.netlink import HEADER_BYTES, split
from orchestrator.kernel.netns import entered, find

_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_ADD_MEMBERSHIP = 1
_GROUP_EXP_NEW = 4  # nfnetlink_compat.h, NFNLGRP_CONNTRACK_EXP_NEW
_RECEIVE_BYTES = 1 << 16

# nfnetlink_conntrack.h: ctattr_expect, ctattr_expect_nat, ctattr_tuple, ctattr_ip, ctattr_l4proto
_MASTER, _TUPLE, _MASK, _TIMEOUT, _HELP_NAME, _ZONE, _FLAGS, _CLASS, _NAT, _FN = 1, 2, 3, 4, 6, 7, 8, 9, 10, 11
_NAT_DIR, _NAT_TUPLE = 1, 2
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_V4_SRC, _V4_DST, _V6_SRC, _V6_DST = 1, 2, 3, 4
_PROTO_NUM, _PROTO_SPORT, _PROTO_DPORT = 1, 2, 3
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER


@dataclass(frozen=True, slots=True)
class Ends:
    """A tuple or a mask, addresses as text."""

    src: str
    sport: int
    dst: str
    dport: int
    l4proto: int

    def __str__(self) -> str:
        return f"{self.src} {self.sport} > {self.dst} {self.dport} proto {self.l4proto}"


@dataclass(frozen=True, slots=True)
class Expectation:
    """All that ctnetlink tells of an expectation but its id; `nat` is the direction and the tuple that NAT goes by."""

    ends: Ends
    mask: Ends
    expect_class: int
    flags: int
    lifetime_s: int
    helper: str
    zone: int
    function: str
    nat: tuple[int, Ends] | None

    def __str__(self) -> str:
        nat = f", nat {self.nat[0]} {self.nat[1]}" if self.nat else ""
        return (
            f"{self.ends}, mask {self.mask}, class {self.expect_class}, flags {self.flags}, {self.lifetime_s} s, "
            f"helper {self.helper}, zone {self.zone}, fn {self.function or 'none'}{nat}"
        )


class Events:
    """The expectations made in a namespace since the last look."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def take(self) -> tuple[Expectation, ...]:
        """What was made since; the kernel tells before the packet that made it goes on. Raises OSError on overrun."""
        found: list[Expectation] = []
        while True:
            try:
                data = self._channel.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return tuple(found)
            found += [decode(message[HEADER_BYTES:]) for _, _, _, message in split(data)]


@contextlib.contextmanager
def expectations_made(netns: str) -> Iterator[Events]:
    """Listen in a namespace until the block ends."""
    with entered(find(netns)):
        channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    with channel:
        channel.bind((0, 0))  # one without an address gets no events
        channel.settimeout(0)
        channel.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_EXP_NEW)
        yield Events(channel)


def decode(attributes: bytes) -> Expectation:
    """The attributes of one event. Raises KeyError if one is missing that the kernel always gives."""
    found = _walk(attributes)
    nat = _walk(found[_NAT]) if _NAT in found else None
    return Expectation(
        ends=_ends(found[_TUPLE]),
        mask=_ends(found[_MASK]),
        expect_class=_number(found[_CLASS]),
        flags=_number(found[_FLAGS]),
        lifetime_s=_number(found[_TIMEOUT]),
        helper=_text(found.get(_HELP_NAME, b"")),
        zone=_number(found.get(_ZONE, b"")),
        function=_text(found.get(_FN, b"")),
        nat=(_number(nat[_NAT_DIR]), _ends(nat[_NAT_TUPLE])) if nat else None,
    )


def _ends(nest: bytes) -> Ends:
    parts = _walk(nest)
    ip, proto = _walk(parts[_TUPLE_IP]), _walk(parts[_TUPLE_PROTO])
    family, src, dst = (socket.AF_INET, _V4_SRC, _V4_DST) if _V4_SRC in ip else (socket.AF_INET6, _V6_SRC, _V6_DST)
    return Ends(
        src=socket.inet_ntop(family, ip[src]),
        sport=_number(proto[_PROTO_SPORT]),
        dst=socket.inet_ntop(family, ip[dst]),
        dport=_number(proto[_PROTO_DPORT]),
        l4proto=_number(proto[_PROTO_NUM]),
    )


def _walk(attributes: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, offset)
        found[kind & _TYPE_MASK] = attributes[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode()
