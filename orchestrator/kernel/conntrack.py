"""Connections and expectations of a namespace, counted by helper through ctnetlink."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import DecodeError, KernelError
from orchestrator.kernel.modules import module_present
from orchestrator.kernel.netlink import HEADER_BYTES, dump, dump_request
from orchestrator.kernel.netns import entered
from orchestrator.kernel.procfs import parse_expectations
from orchestrator.model import Netns

MODULE = "nf_conntrack_netlink"

_EXPECTATION_FILE = Path("/proc/thread-self/net/nf_conntrack_expect")  # of this thread: it follows setns

_GET = 1
_CONNECTIONS = dump_request(subsystem=1, command=_GET)
_EXPECTATIONS = dump_request(subsystem=2, command=_GET)
_CTA_PROTOINFO, _CTA_PROTOINFO_TCP, _CTA_PROTOINFO_TCP_STATE = 4, 1, 1
_TCP_LAST_ACK = 6  # with TIME_WAIT and CLOSE behind it: no data comes any more
_CTA_HELP = 5
_CTA_HELP_NAME = 1
_CTA_EXPECT_HELP_NAME = 6
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

_ATTRIBUTE = struct.Struct("=HH")


def connections(netns: Netns) -> dict[str, int]:
    """Live connections by helper name; empty, and nothing is loaded, if ctnetlink is not there. Raises KernelError."""
    return _count("list connections", netns, _CONNECTIONS, connection_helper) if module_present(MODULE) else {}


def expectations(netns: Netns) -> dict[str, int]:
    """Expectations by helper name. Without ctnetlink out of procfs, which older kernels fill from all namespaces."""
    if module_present(MODULE):
        return _count("list expectations", netns, _EXPECTATIONS, expectation_helper)
    with entered(netns):
        try:
            return parse_expectations(_EXPECTATION_FILE.read_text(encoding="utf-8", errors="backslashreplace"))
        except FileNotFoundError:
            return {}


def connection_helper(message: bytes) -> str:
    """Helper of one live connection in a dump, empty if it has none or is over; raises DecodeError."""
    if is_over(message):
        return ""
    nest = _attribute(message, _CTA_HELP, HEADER_BYTES, len(message))
    name = _attribute(message, _CTA_HELP_NAME, *nest) if nest else None
    return _text(message, name)


def is_over(message: bytes) -> bool:
    """True for a TCP connection of a dump that carries no data any more: it has lost its helper, or will."""
    return _tcp_state(message) >= _TCP_LAST_ACK


def _tcp_state(message: bytes) -> int:
    """State of a TCP connection, 0 for other protocols; source: nf_conntrack_tcp.h, enum tcp_conntrack."""
    span: tuple[int, int] | None = (HEADER_BYTES, len(message))
    for kind in (_CTA_PROTOINFO, _CTA_PROTOINFO_TCP, _CTA_PROTOINFO_TCP_STATE):
        span = _attribute(message, kind, *span) if span else None
    return message[span[0]] if span and span[0] < span[1] else 0


def expectation_helper(message: bytes) -> str:
    """Helper of the connection that one expectation in a dump belongs to, empty if it has none; raises DecodeError."""
    return _text(message, _attribute(message, _CTA_EXPECT_HELP_NAME, HEADER_BYTES, len(message)))


def _count(operation: str, netns: Netns, request: bytes, helper: Callable[[bytes], str]) -> dict[str, int]:
    with entered(netns):
        try:
            counts = dump(request, lambda messages: Counter(map(helper, messages)))
        except OSError as error:
            raise KernelError(operation, f"of {netns}", error.errno or 0, detail=error.strerror or "") from error
    del counts[""]
    return dict(counts)


def _attribute(message: bytes, wanted: int, start: int, end: int) -> tuple[int, int] | None:
    """Where the value of the first attribute of a type begins and ends; a busy firewall has 100,000 to walk through."""
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(message, start)
        if not 4 <= length <= end - start:
            raise DecodeError(f"attribute {kind & _TYPE_MASK} of a wrong length")
        if kind & _TYPE_MASK == wanted:
            return start + 4, start + length
        start += (length + 3) & ~3
    return None


def _text(message: bytes, span: tuple[int, int] | None) -> str:
    return message[span[0] : span[1]].rstrip(b"\0").decode(errors="backslashreplace") if span else ""
