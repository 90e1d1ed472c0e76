"""Entries of the connection table and expectations, one by one, through ctnetlink."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

from orchestrator.engine import tuples
from orchestrator.engine.api import L4, Tuple
from orchestrator.engine.netlink import DecodeError, attributes
from orchestrator.errors import KernelError
from orchestrator.kernel.conntrack import MODULE, connection_helper, expectation_helper, is_over
from orchestrator.kernel.modules import module_present
from orchestrator.kernel.netlink import HEADER_BYTES, dump, dump_request
from orchestrator.kernel.netns import entered
from orchestrator.model import L3Proto, L4Proto, Netns
from orchestrator.ports import Ends, LiveConnection, LiveExpectation

_GET = 1
_FAMILY_AT = 16  # of nfgenmsg: the kernel dumps that family alone (ctnetlink_dump_table, ctnetlink_exp_dump_table)
_CONNECTIONS, _EXPECTATIONS = 1, 2
_CTA_TUPLE_ORIG = 1
_CTA_EXPECT_MASTER, _CTA_EXPECT_TUPLE, _CTA_EXPECT_TIMEOUT = 1, 2, 4
_TRANSPORTS = {L4.TCP: L4Proto.TCP, L4.UDP: L4Proto.UDP}

T = TypeVar("T")


def live_connections(netns: Netns, l3proto: L3Proto, l4proto: L4Proto) -> tuple[LiveConnection, ...]:
    """The entries of one family and protocol; TCP connections that ended are left out. Raises KernelError."""
    found = _dump("list connections", netns, _request(_CONNECTIONS, l3proto), decode_connection)
    return tuple(connection for transport, connection in found if transport is l4proto)


def live_expectations(netns: Netns, l3proto: L3Proto) -> tuple[LiveExpectation, ...]:
    """Everything that is expected of one family. Raises KernelError."""
    return tuple(_dump("list expectations", netns, _request(_EXPECTATIONS, l3proto), decode_expectation))


def decode_connection(message: bytes) -> tuple[L4Proto, LiveConnection]:
    """One entry of a dump. Raises DecodeError, also for another transport than TCP and UDP, and for one that ended."""
    orig, transport = tuples.decode(attributes(memoryview(message)[HEADER_BYTES:]).get(_CTA_TUPLE_ORIG, b""))
    if is_over(message):
        raise DecodeError("a connection that ended")
    return _TRANSPORTS[transport], LiveConnection(_ends(orig), connection_helper(message))


def decode_expectation(message: bytes) -> LiveExpectation:
    """One expectation of a dump. Raises DecodeError."""
    parts = attributes(memoryview(message)[HEADER_BYTES:])
    master, _ = tuples.decode(parts.get(_CTA_EXPECT_MASTER, b""))
    expected, transport = tuples.decode(parts.get(_CTA_EXPECT_TUPLE, b""))
    timeout = parts.get(_CTA_EXPECT_TIMEOUT, b"")
    if len(timeout) != 4:
        raise DecodeError("expectation without a timeout")
    (timeout_s,) = struct.unpack(">I", timeout)
    return LiveExpectation(
        master=_ends(master),
        l4proto=_TRANSPORTS[transport],
        ends=_ends(expected),
        helper=expectation_helper(message),
        timeout_s=timeout_s,
    )


def _request(subsystem: int, l3proto: L3Proto) -> bytes:
    request = bytearray(dump_request(subsystem=subsystem, command=_GET))
    request[_FAMILY_AT] = l3proto.number
    return bytes(request)


def _dump(operation: str, netns: Netns, request: bytes, decode: Callable[[bytes], T]) -> list[T]:
    """What can be decoded of a dump: entries of ICMP and the like have no ports and are of no matter here."""
    if not module_present(MODULE):
        return []
    with entered(netns):
        try:
            return dump(request, lambda messages: list(_decoded(messages, decode)))
        except OSError as error:
            raise KernelError(operation, f"of {netns}", error.errno or 0, detail=error.strerror or "") from error


def _decoded(messages: Iterator[bytes], decode: Callable[[bytes], T]) -> Iterator[T]:
    for message in messages:
        with suppress(DecodeError):
            yield decode(message)


def _ends(value: Tuple) -> Ends:
    return Ends(_text(value.src), value.sport, _text(value.dst), value.dport)


def _text(address: bytes) -> str:
    return str(ipaddress.ip_address(address))
