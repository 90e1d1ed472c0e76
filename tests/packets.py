"""IP packets made and checked in the plainest way, and not with the code under test."""

from __future__ import annotations

import struct
from collections.abc import Sequence

TCP, UDP = 6, 17
CLIENT, SERVER = bytes((10, 0, 0, 1)), bytes((192, 0, 2, 7))
CLIENT6, SERVER6 = bytes.fromhex("20010db8" + "00" * 11 + "01"), bytes.fromhex("20010db8" + "ff" * 11 + "02")


def fold(*parts: bytes | bytearray) -> int:
    """The one's complement sum of all 16-bit words (RFC 1071), 0xffff over what carries a right checksum."""
    total = 0
    for part in parts:
        for (word,) in struct.iter_unpack("!H", part + b"\0" * (len(part) % 2)):
            total += word
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def transport_sum(packet: bytes, protocol: int, transport: int) -> int:
    """The sum over pseudo header, transport header and payload; an IP packet that ends where its buffer does."""
    addresses = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    return fold(addresses, struct.pack("!II", len(packet) - transport, protocol), packet[transport:])


def header_sum(packet: bytes) -> int:
    """The sum over an IPv4 header."""
    return fold(packet[: (packet[0] & 15) * 4])


def tcp(payload: bytes, *, seq: int = 1, options: bytes = b"") -> bytes:
    """A segment without checksum; options are a multiple of 4 bytes."""
    offset = (20 + len(options)) // 4 << 4
    return struct.pack("!HHIIBBHHH", 40000, 21, seq, 1, offset, 0x18, 1024, 0, 0) + options + payload


def udp(payload: bytes) -> bytes:
    """A datagram without checksum."""
    return struct.pack("!HHHH", 40000, 69, 8 + len(payload), 0) + payload


def ipv4(protocol: int, segment: bytes, *, options: bytes = b"", fragment: int = 0x4000) -> bytes:
    """A whole packet with its checksums; options are a multiple of 4 bytes."""
    transport = 20 + len(options)
    header = bytearray(
        struct.pack("!BBHHHBBH", 0x40 | transport // 4, 0, transport + len(segment), 1, fragment, 64, protocol, 0)
        + CLIENT
        + SERVER
        + options
    )
    struct.pack_into("!H", header, 10, 0xFFFF - fold(header))
    return with_checksum(bytes(header) + segment, protocol, transport)


def ipv6(protocol: int, segment: bytes, *, extensions: Sequence[tuple[int, bytes]] = ()) -> bytes:
    """A whole packet with its checksums; each extension is its number, and its bytes from the third on."""
    numbers = [number for number, _ in extensions] + [protocol]
    chain = b""
    for (number, body), following in zip(extensions, numbers[1:], strict=True):
        units = len(body) + 2 >> 2 if number == 51 else len(body) + 2 >> 3
        length = 0 if number == 44 else units - (2 if number == 51 else 1)
        chain += bytes((following, length)) + body
    head = struct.pack("!IHBB", 6 << 28, len(chain) + len(segment), numbers[0], 64) + CLIENT6 + SERVER6
    return with_checksum(head + chain + segment, protocol, len(head) + len(chain))


def with_checksum(packet: bytes, protocol: int, transport: int) -> bytes:
    offset = transport + (16 if protocol == TCP else 6)
    empty = packet[:offset] + b"\0\0" + packet[offset + 2 :]
    checksum = 0xFFFF - transport_sum(empty, protocol, transport)
    if protocol == UDP and not checksum:
        checksum = 0xFFFF
    return packet[:offset] + checksum.to_bytes(2, "big") + packet[offset + 2 :]
