"""IP packets: layouts that are read, and those that are left alone."""

from __future__ import annotations

import time
import timeit

import pytest

from orchestrator.engine.api import L4
from orchestrator.engine.packet import Segment, locate, replace
from tests.packets import TCP, UDP, header_sum, ipv4, ipv6, tcp, transport_sum, udp

HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION = 0, 43, 44, 51, 60


def patched(packet: bytes, offset: int, new: bytes) -> bytes:
    return packet[:offset] + new + packet[offset + len(new) :]


@pytest.mark.parametrize(
    ("packet", "segment"),
    [
        (ipv4(TCP, tcp(b"NOOP\r\n", seq=2**32 - 1)), Segment(L4.TCP, 20, 40, 46, 2**32 - 1)),
        (ipv4(TCP, tcp(b"")), Segment(L4.TCP, 20, 40, 40, 1)),
        (ipv4(TCP, tcp(b"x", options=bytes(40)), options=b"\1" * 40), Segment(L4.TCP, 60, 120, 121, 1)),
        (ipv4(UDP, udp(b"\0\1a\0octet\0")), Segment(L4.UDP, 20, 28, 38, 0)),
        (ipv4(UDP, udp(b""), fragment=0), Segment(L4.UDP, 20, 28, 28, 0)),
        (ipv6(TCP, tcp(b"NOOP\r\n", seq=7)), Segment(L4.TCP, 40, 60, 66, 7)),
        (ipv6(UDP, udp(b"abc")), Segment(L4.UDP, 40, 48, 51, 0)),
        (ipv6(UDP, udp(b""), extensions=[(HOP_BY_HOP, bytes(6))]), Segment(L4.UDP, 48, 56, 56, 0)),
        (ipv6(UDP, udp(b""), extensions=[(ROUTING, bytes(22))]), Segment(L4.UDP, 64, 72, 72, 0)),
        (ipv6(UDP, udp(b""), extensions=[(FRAGMENT, bytes(6))]), Segment(L4.UDP, 48, 56, 56, 0)),
        (ipv6(UDP, udp(b""), extensions=[(AUTHENTICATION, bytes(22))]), Segment(L4.UDP, 64, 72, 72, 0)),
        (ipv6(TCP, tcp(b"x"), extensions=[(DESTINATION, bytes(2046))]), Segment(L4.TCP, 2088, 2108, 2109, 1)),
        (ipv6(TCP, tcp(b"x"), extensions=[(DESTINATION, bytes(6))] * 7), Segment(L4.TCP, 96, 116, 117, 1)),
    ],
)
def test_a_segment_is_found(packet: bytes, segment: Segment) -> None:
    assert locate(packet) == segment
    assert locate(memoryview(packet)) == segment
    assert locate(packet + b"padding of the link") == segment


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        ipv4(1, udp(b"abc")),
        ipv4(TCP, tcp(b"abc"), fragment=0x2000),
        ipv4(TCP, tcp(b"abc"), fragment=1),
        patched(ipv4(TCP, tcp(b"abc")), 0, b"\x55"),
        patched(patched(ipv4(UDP, udp(b"abc")), 0, b"\x44"), 20, b"\0\x0f"),
        patched(ipv4(TCP, tcp(b"abc")), 2, b"\0\x2c"),
        patched(ipv4(TCP, tcp(b"abc")), 2, b"\0\x27"),
        patched(ipv4(TCP, tcp(b"abc")), 2, b"\0\0"),
        patched(ipv4(TCP, tcp(b"abc")), 32, b"\x40"),
        patched(ipv4(TCP, tcp(b"abc")), 32, b"\x60"),
        patched(ipv4(UDP, udp(b"abc")), 24, b"\0\x0a"),
        patched(ipv4(UDP, udp(b"abc")), 24, b"\0\x0c"),
        patched(ipv6(UDP, udp(b"abc")), 4, b"\0\0"),
        patched(ipv6(UDP, udp(b"abc")), 4, b"\xff\xff"),
        ipv6(58, udp(b"abc")),
        ipv6(UDP, udp(b"abc"), extensions=[(FRAGMENT, b"\0\1" + bytes(4))]),
        ipv6(UDP, udp(b"abc"), extensions=[(FRAGMENT, b"\0\x08" + bytes(4))]),
        ipv6(UDP, udp(b"abc"), extensions=[(DESTINATION, bytes(6))] * 8),
        patched(ipv6(UDP, udp(b"abc"), extensions=[(DESTINATION, bytes(6))]), 41, b"\xff"),
        ipv6(UDP, b"", extensions=[(DESTINATION, bytes(6))])[:44],
    ],
)
def test_what_cannot_be_read_with_certainty_is_not_read(packet: bytes) -> None:
    assert locate(packet) is None


def test_a_port_command_is_rewritten_longer_and_shorter() -> None:
    packet = ipv4(TCP, tcp(b"PORT 10,0,0,1,4,5\r\n"))
    segment = locate(packet)
    assert segment is not None
    longer = replace(packet, segment, [(5, 17, b"203,0,113,254,255,255")])
    assert longer == ipv4(TCP, tcp(b"PORT 203,0,113,254,255,255\r\n"))
    again = locate(longer)
    assert again is not None
    assert replace(longer, again, [(5, 26, b"10,0,0,1,4,5")]) == packet


@pytest.mark.parametrize("edits", [[(-1, 0, b"")], [(2, 1, b"")], [(0, 4, b"")], [(0, 2, b""), (1, 3, b"")]])
def test_edits_outside_the_payload_or_out_of_order_are_refused(edits: list[tuple[int, int, bytes]]) -> None:
    packet = ipv4(UDP, udp(b"abc"))
    segment = locate(packet)
    assert segment is not None
    with pytest.raises(ValueError, match="no bytes"):
        replace(packet, segment, edits)


@pytest.mark.parametrize("packet", [ipv4(TCP, tcp(bytes(65000))), ipv6(UDP, udp(bytes(65000)))])
def test_a_packet_grows_to_65535_bytes_and_no_further(packet: bytes) -> None:
    segment = locate(packet)
    assert segment is not None
    largest = replace(packet, segment, [(0, 0, bytes(65535 - len(packet)))])
    assert len(largest) == 65535
    assert locate(largest) == segment._replace(end=65535)
    with pytest.raises(ValueError, match="65536"):
        replace(packet, segment, [(0, 0, bytes(65536 - len(packet)))])


@pytest.mark.parametrize("whole", [ipv4(UDP, udp(b"ab")), ipv6(UDP, udp(b"ab"))])
def test_an_absent_udp_checksum_stays_absent(whole: bytes) -> None:
    segment = locate(whole)
    assert segment is not None
    packet = patched(whole, segment.transport + 6, b"\0\0")
    assert replace(packet, segment, [(0, 1, b"cd")])[segment.transport + 6 :] == b"\0\0cdb"


def test_a_udp_checksum_that_comes_out_as_zero_is_written_as_ffff() -> None:
    packet = ipv4(UDP, udp(b"\0\0"))
    segment = locate(packet)
    assert segment is not None
    replaced = replace(packet, segment, [(0, 2, packet[26:28])])  # the sum grows by what it lacked
    assert replaced[26:28] == b"\xff\xff"
    assert transport_sum(replaced, UDP, 20) == 0xFFFF


def test_a_tcp_checksum_that_comes_out_as_zero_stays_zero() -> None:
    packet = ipv4(TCP, tcp(b"\0\0"))
    segment = locate(packet)
    assert segment is not None
    replaced = replace(packet, segment, [(0, 2, packet[36:38])])
    assert replaced[36:38] == b"\0\0"
    assert transport_sum(replaced, TCP, 20) == 0xFFFF


def test_a_wrong_checksum_stays_wrong() -> None:
    packet = ipv4(TCP, tcp(b"abc"))
    packet = patched(packet, 42, b"C")
    segment = locate(packet)
    assert segment is not None
    replaced = replace(packet, segment, [(0, 1, b"xyz")])
    assert header_sum(replaced) == 0xFFFF
    assert transport_sum(replaced, TCP, 20) == transport_sum(packet, TCP, 20) != 0xFFFF


def test_64_kib_are_summed_without_a_loop_over_words() -> None:
    packet = ipv4(TCP, tcp(bytes(range(250)) * 260))
    segment = locate(packet)
    assert segment is not None
    replaced = timeit.timeit(lambda: replace(packet, segment, [(0, 1, b"ab")]), timer=time.process_time, number=20)
    looped = timeit.timeit(lambda: transport_sum(packet, TCP, 20), timer=time.process_time, number=20)
    assert replaced * 3 < looped
