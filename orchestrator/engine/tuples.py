"""The codec of a conntrack tuple: a nest CTA_TUPLE_IP and a nest CTA_TUPLE_PROTO, always in this order.

Sources: ctnetlink_dump_tuples and ctnetlink_parse_tuple in nf_conntrack_netlink.c.
"""

from __future__ import annotations

import struct

from orchestrator.engine.api import L4, Tuple
from orchestrator.engine.netlink import ATTRIBUTE_HEADER_LEN, DecodeError, attribute_header, attributes

_CTA_TUPLE_IP = 1
_CTA_TUPLE_PROTO = 2
_CTA_IP_V4_SRC = 1
_CTA_IP_V4_DST = 2
_CTA_IP_V6_SRC = 3
_CTA_IP_V6_DST = 4
_CTA_PROTO_NUM = 1
_CTA_PROTO_SRC_PORT = 2
_CTA_PROTO_DST_PORT = 3

_PORT = struct.Struct(">H")
_PROTO_AND_NUM = attribute_header(_CTA_TUPLE_PROTO, 24, is_nest=True) + attribute_header(_CTA_PROTO_NUM, 1)
_SRC_PORT = attribute_header(_CTA_PROTO_SRC_PORT, 2)
_DST_PORT = attribute_header(_CTA_PROTO_DST_PORT, 2)


def _layout(address_len: int) -> struct.Struct:
    """Headers and values of a whole tuple in turn: src, dst, l4proto, sport, dport."""
    return struct.Struct(f">8s {address_len}s 4s {address_len}s 8s B 3x 4s H 2x 4s H 2x")


def _ip_headers(src: int, dst: int, address_len: int) -> tuple[bytes, bytes]:
    nest = attribute_header(_CTA_TUPLE_IP, 2 * (4 + address_len), is_nest=True)
    return nest + attribute_header(src, address_len), attribute_header(dst, address_len)


_LAYOUTS = {4: _layout(4), 16: _layout(16)}
_IP_HEADERS = {4: _ip_headers(_CTA_IP_V4_SRC, _CTA_IP_V4_DST, 4), 16: _ip_headers(_CTA_IP_V6_SRC, _CTA_IP_V6_DST, 16)}
_PORTS_HEADERS = (_PROTO_AND_NUM, _SRC_PORT, _DST_PORT)
_TRANSPORTS = {int(transport): transport for transport in L4}
_ADDRESS_LEN = {layout.size: address_len for address_len, layout in _LAYOUTS.items()}


def encode(kind: int, value: Tuple, l4proto: L4) -> bytes:
    """The tuple as a nest of type `kind`."""
    address_len = len(value.src)
    layout = _LAYOUTS[address_len]
    src, dst = _IP_HEADERS[address_len]
    return attribute_header(kind, layout.size, is_nest=True) + layout.pack(
        src, value.src, dst, value.dst, _PROTO_AND_NUM, l4proto, _SRC_PORT, value.sport, _DST_PORT, value.dport
    )


def dport_at(value: Tuple) -> int:
    """Where the destination port is in what `encode` makes of such a tuple."""
    return ATTRIBUTE_HEADER_LEN + _LAYOUTS[len(value.src)].size - 4


def decode(data: bytes | memoryview) -> tuple[Tuple, L4]:
    """Tuple and transport from the contents of a nest. Raises DecodeError for another transport, or if incomplete."""
    address_len = _ADDRESS_LEN.get(len(data))
    if address_len is None:
        return _decode_any(data)
    ip, src, dst_header, dst, proto, number, sport_header, sport, dport_header, dport = _LAYOUTS[address_len].unpack(
        data
    )
    if (ip, dst_header) != _IP_HEADERS[address_len] or (proto, sport_header, dport_header) != _PORTS_HEADERS:
        return _decode_any(data)
    return Tuple(src, dst, sport, dport), _transport(number)


def _decode_any(data: bytes | memoryview) -> tuple[Tuple, L4]:
    """As `decode`, for attributes in any order and with others between them (CTA_TUPLE_ZONE)."""
    parts = attributes(data)
    address = attributes(parts.get(_CTA_TUPLE_IP, b""))
    proto = attributes(parts.get(_CTA_TUPLE_PROTO, b""))
    src = address.get(_CTA_IP_V4_SRC) or address.get(_CTA_IP_V6_SRC) or b""
    dst = address.get(_CTA_IP_V4_DST) or address.get(_CTA_IP_V6_DST) or b""
    number = proto.get(_CTA_PROTO_NUM, b"")
    sport, dport = proto.get(_CTA_PROTO_SRC_PORT, b""), proto.get(_CTA_PROTO_DST_PORT, b"")
    if len(src) not in _LAYOUTS or len(src) != len(dst):
        raise DecodeError(f"tuple with addresses of {len(src)} and {len(dst)} bytes")
    if (len(number), len(sport), len(dport)) != (1, 2, 2):
        raise DecodeError("tuple without transport or ports")
    return Tuple(src, dst, _PORT.unpack(sport)[0], _PORT.unpack(dport)[0]), _transport(number[0])


def _transport(number: int) -> L4:
    transport = _TRANSPORTS.get(number)
    if transport is None:
        raise DecodeError(f"tuple of IP protocol {number}")
    return transport
