"""IP packets of a queue: where the payload lies, and the packet with other bytes in it.

Layouts are those of RFC 791, 9293, 768, 8200 and 4302. A packet that cannot be read with certainty is not read at all:
a fragment, a length that lies, a transport other than TCP and UDP.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.engine.api import L4

_TCP, _UDP = L4.TCP, L4.UDP
_MAX_LEN = 65535
_IPV4_HEADER_LEN = 20
_IPV6_HEADER_LEN = 40
_TCP_HEADER_LEN = 20
_UDP_HEADER_LEN = 8

# Offsets from the beginning of their header.
_IPV4_LENGTH = 2
_IPV4_CHECKSUM = 10
_IPV6_LENGTH = 4
_TCP_CHECKSUM = 16
_UDP_LENGTH = 4
_UDP_CHECKSUM = 6

_FRAGMENT = 0x3FFF  # more fragments, or an offset
_HOP_BY_HOP, _ROUTING, _FRAGMENTATION, _AUTHENTICATION, _DESTINATION = 0, 43, 44, 51, 60
_MAX_EXTENSIONS = 8  # a packet of nothing but extension headers would be 8,000 of them

_U16 = struct.Struct("!H")
_IPV4 = struct.Struct("!BxHxxHxB")  # version and header length, total length, fragment, protocol
_IPV6 = struct.Struct("!HB")  # payload length, next header; from offset 4
_EXTENSION = struct.Struct("!BBH")  # next header, length, fragment (of a fragment header)
_TCP_HEADER = struct.Struct("!4xI4xB")  # sequence number, data offset


class Segment(NamedTuple):
    """Where a TCP segment or UDP datagram lies in its packet, in bytes from the beginning of the IP header.

    `transport` is the transport header, `payload` what follows it, `end` the first byte after the payload, by the
    length in the IP header and not by that of the buffer. `seq` is TCP's sequence number, 0 for UDP.
    """

    l4proto: L4
    transport: int
    payload: int
    end: int
    seq: int


def locate(packet: bytes | memoryview) -> Segment | None:
    """The segment of an IPv4 or IPv6 packet; None if it has none that can be read with certainty. Never raises."""
    if len(packet) < _IPV4_HEADER_LEN:
        return None
    version_and_length, length, fragment, protocol = _IPV4.unpack_from(packet)
    version = version_and_length >> 4
    if version == 6:
        return _locate_ipv6(packet)
    transport = (version_and_length & 15) * 4
    if version != 4 or transport < _IPV4_HEADER_LEN or fragment & _FRAGMENT:
        return None
    return _segment(packet, protocol, transport, length)


def _locate_ipv6(packet: bytes | memoryview) -> Segment | None:
    if len(packet) < _IPV6_HEADER_LEN:
        return None
    length, protocol = _IPV6.unpack_from(packet, _IPV6_LENGTH)
    transport, end = _IPV6_HEADER_LEN, _IPV6_HEADER_LEN + length
    for _ in range(_MAX_EXTENSIONS):
        if protocol in (_TCP, _UDP):
            return _segment(packet, protocol, transport, end)
        if transport + _UDP_HEADER_LEN > len(packet):
            return None
        following, units, fragment = _EXTENSION.unpack_from(packet, transport)
        if protocol in (_HOP_BY_HOP, _ROUTING, _DESTINATION):
            transport += (units + 1) * 8
        elif protocol == _AUTHENTICATION:
            transport += (units + 2) * 4
        elif protocol == _FRAGMENTATION and not fragment & 0xFFF9:  # offset 0 and the last: the whole packet
            transport += 8
        else:
            return None
        protocol = following
    return None


def _segment(packet: bytes | memoryview, protocol: int, transport: int, end: int) -> Segment | None:
    if end > len(packet):
        return None
    if protocol == _TCP:
        if transport + _TCP_HEADER_LEN > end:
            return None
        seq, offset = _TCP_HEADER.unpack_from(packet, transport)
        payload = transport + (offset >> 4) * 4
        if not transport + _TCP_HEADER_LEN <= payload <= end:
            return None
        return Segment(_TCP, transport, payload, end, seq)
    if protocol == _UDP:
        payload = transport + _UDP_HEADER_LEN
        if payload > end or _U16.unpack_from(packet, transport + _UDP_LENGTH)[0] != end - transport:
            return None
        return Segment(_UDP, transport, payload, end, 0)
    return None


def replace(packet: bytes | memoryview, segment: Segment, edits: Sequence[tuple[int, int, bytes]]) -> bytes:
    """The packet with parts of its payload replaced: (first, end, new), in ascending order, relative to the payload.

    Lengths and checksums follow. A checksum is adjusted and not made anew (RFC 1624), so one that was wrong stays
    wrong, the absent one of UDP stays absent, and IPv6 routing headers need no special care. Raises ValueError if
    the edits do not lie in order within the payload, or the packet would exceed 65535 bytes.
    """
    old = bytes(packet[segment.payload : segment.end])
    new = _edited(old, edits)
    growth = len(new) - len(old)
    if segment.end + growth > _MAX_LEN:
        raise ValueError(f"a packet cannot have {segment.end + growth} bytes")
    header = bytearray(packet[: segment.payload])
    _set_ip_length(header, growth)
    difference = _sum(new) - _sum(old) + growth  # the pseudo header counts the length too
    if segment.l4proto is _TCP:
        _adjust(header, segment.transport + _TCP_CHECKSUM, difference)
    else:
        _set_udp(header, segment.transport, difference, growth)
    return bytes(header) + new


def _edited(payload: bytes, edits: Sequence[tuple[int, int, bytes]]) -> bytes:
    parts: list[bytes] = []
    position = 0
    for first, end, text in edits:
        if not position <= first <= end <= len(payload):
            raise ValueError(f"no bytes {first} to {end} to replace after {position} of {len(payload)}")
        parts += (payload[position:first], text)
        position = end
    return b"".join((*parts, payload[position:]))


def _set_ip_length(header: bytearray, growth: int) -> None:
    if header[0] >> 4 == 6:
        _add(header, _IPV6_LENGTH, growth)
        return
    _add(header, _IPV4_LENGTH, growth)
    _adjust(header, _IPV4_CHECKSUM, growth)


def _set_udp(header: bytearray, transport: int, difference: int, growth: int) -> None:
    _add(header, transport + _UDP_LENGTH, growth)
    checksum = transport + _UDP_CHECKSUM
    if header[checksum : checksum + 2] == b"\0\0":  # the sender made none
        return
    _adjust(header, checksum, difference + growth)
    if header[checksum : checksum + 2] == b"\0\0":
        header[checksum : checksum + 2] = b"\xff\xff"


def _add(header: bytearray, offset: int, growth: int) -> None:
    _U16.pack_into(header, offset, _U16.unpack_from(header, offset)[0] + growth)


def _adjust(header: bytearray, offset: int, difference: int) -> None:
    """Take what was added to the sum of what a checksum covers from the checksum, in one's complement."""
    _U16.pack_into(header, offset, (_U16.unpack_from(header, offset)[0] - difference) % 0xFFFF)


def _sum(data: bytes) -> int:
    """The one's complement sum of 16-bit words: one division of one large number, as 2**16 is 1 modulo 0xffff."""
    return int.from_bytes(data if len(data) % 2 == 0 else data + b"\0", "big") % 0xFFFF
