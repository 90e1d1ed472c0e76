"""Connections and expectations, counted by helper: bytes anywhere, and live where the kernel has what it takes."""

from __future__ import annotations

import contextlib
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import DecodeError
from orchestrator.kernel import conntrack, netlink, netns
from orchestrator.kernel.modules import module_present
from tests.examples import many

CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_PROTOINFO, CTA_HELP, CTA_TIMEOUT = 1, 2, 3, 4, 5, 7
SEEN_REPLY_AND_CONFIRMED = 0xE
NESTED = 0x8000
TCP = 6

live = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(module_present, ("nf_conntrack_netlink", "nf_conntrack_ftp"))),
    reason="needs root, nf_conntrack_netlink and nf_conntrack_ftp",
)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def tcp_tuple(*, source: tuple[int, int], destination: tuple[int, int]) -> bytes:
    addresses = attribute(1, struct.pack(">I", source[0])) + attribute(2, struct.pack(">I", destination[0]))
    ports = attribute(2, struct.pack(">H", source[1])) + attribute(3, struct.pack(">H", destination[1]))
    return attribute(1, addresses) + attribute(2, attribute(1, bytes([TCP])) + ports)


def connection(number: int, helper: bytes = b"") -> bytes:
    """A request that makes one established TCP connection from 10.0.0.0 + `number`."""
    client, server = (0x0A000000 + number, 1024), (0xC0000201, 21)
    body = struct.pack("=BBH", 2, 0, 0)
    body += attribute(CTA_TUPLE_ORIG | NESTED, tcp_tuple(source=client, destination=server))
    body += attribute(CTA_TUPLE_REPLY | NESTED, tcp_tuple(source=server, destination=client))
    body += attribute(CTA_STATUS, struct.pack(">I", SEEN_REPLY_AND_CONFIRMED))
    body += attribute(CTA_TIMEOUT, struct.pack(">I", 60))
    body += attribute(CTA_PROTOINFO | NESTED, attribute(1 | NESTED, attribute(1, b"\x03")))
    if helper:
        body += attribute(CTA_HELP | NESTED, attribute(1, helper + b"\0"))
    return struct.pack("=IHHII", 16 + len(body), 1 << 8, 0x405, 0, 0) + body


def test_the_helper_is_found_behind_other_attributes() -> None:
    assert conntrack.connection_helper(connection(1, b"ftp-us")) == "ftp-us"
    assert conntrack.connection_helper(connection(1)) == ""
    assert conntrack.connection_helper(connection(1, b"f\xff")) == "f\\xff"


@pytest.mark.parametrize("length", [0, 3, 0xFFFF])
def test_an_attribute_of_a_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(DecodeError):
        conntrack.connection_helper(bytes(netlink.HEADER_BYTES) + struct.pack("=HH", length, 1))


@settings(max_examples=many(500))
@given(st.binary(max_size=120))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for helper in (conntrack.connection_helper, conntrack.expectation_helper):
        with contextlib.suppress(DecodeError):
            assert isinstance(helper(bytes(netlink.HEADER_BYTES) + data), str)


@live
def test_connections_are_counted_by_helper() -> None:
    with netns.scratch():
        for number in range(600):
            netlink.perform(connection(number, b"ftp" if number % 3 == 0 else b""))
        assert conntrack.connections(netns.own()) == {"ftp": 200}
        assert conntrack.expectations(netns.own()) == {}
    with netns.scratch():
        assert conntrack.connections(netns.own()) == {}
