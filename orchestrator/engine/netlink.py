"""Messages and attributes of netfilter netlink, and the two sockets of a helper process."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

NLMSG_NOOP = 1
NLMSG_ERROR = 2

HEADER_LEN = 20
"""Length of the netlink header (16) and of the nfgenmsg that follows it; the attributes come next."""

ATTRIBUTE_HEADER_LEN = 4

_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_NO_ENOBUFS = 5
_NETLINK_CAP_ACK = 10
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=9I")  # SK_MEMINFO_*, the last of them DROPS
_NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF  # the rest are NLA_F_NESTED and NLA_F_NET_BYTEORDER
_ATTRIBUTE_MAX_LEN = 0xFFFF

_MESSAGE = struct.Struct("=IHHIIBB2s")
_ATTRIBUTE = struct.Struct("=HH")
_ANSWER = struct.Struct("=IHHIIi")


class DecodeError(ValueError):
    """Bytes that are not the message they should be."""


def message(
    kind: int, attributes: bytes, *, flags: int, family: int = 0, resource: int = 0, sequence: int = 0
) -> bytes:
    """A request: `kind` is subsystem << 8 | command, `family` AF_INET or the like, `resource` a queue number or 0."""
    length = HEADER_LEN + len(attributes)
    return _MESSAGE.pack(length, kind, flags, sequence, 0, family, 0, resource.to_bytes(2, "big")) + attributes


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to 4 bytes. Raises ValueError for data that its 16-bit length cannot count."""
    length = ATTRIBUTE_HEADER_LEN + len(data)
    if length > _ATTRIBUTE_MAX_LEN:
        raise ValueError(f"{len(data)} bytes do not fit into a netlink attribute")
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-len(data) % 4)


def nest(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def attribute_header(kind: int, data_len: int, *, is_nest: bool = False) -> bytes:
    """The header alone, for attributes of a layout that is known beforehand."""
    return _ATTRIBUTE.pack(ATTRIBUTE_HEADER_LEN + data_len, kind | _NLA_F_NESTED if is_nest else kind)


def walk(data: bytes | memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The attributes between two offsets: type without flags, and where their data begins and ends.

    Raises DecodeError for an attribute that is shorter than its header or reaches beyond `end`.
    """
    while end - start >= ATTRIBUTE_HEADER_LEN:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if not ATTRIBUTE_HEADER_LEN <= length <= end - start:
            raise DecodeError(f"netlink attribute of {length} bytes where {end - start} are left")
        yield kind & _NLA_TYPE_MASK, start + ATTRIBUTE_HEADER_LEN, start + length
        start += length + 3 & ~3


def attributes(data: bytes | memoryview) -> dict[int, bytes]:
    """The attributes of a nest by type, the last one of each; raises as `walk`."""
    return {kind: bytes(data[start:end]) for kind, start, end in walk(data, 0, len(data))}


def answer(data: bytes | memoryview) -> tuple[int, int] | None:
    """Sequence number and errno (0 is success) of the answer to a request; None for any other message."""
    if len(data) < _ANSWER.size:
        return None
    _, kind, _, sequence, _, error = _ANSWER.unpack_from(data)
    return (sequence, -error) if kind == NLMSG_ERROR else None


def open_control_socket() -> socket.socket:
    """A socket for requests and their answers. Raises OSError."""
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    channel.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
    return channel


def open_queue_socket(receive_buffer: int) -> socket.socket:
    """A socket that queues are bound to, with room for `receive_buffer` bytes of waiting packets. Raises OSError.

    Without NETLINK_NO_ENOBUFS one lost packet makes the kernel discard all others until the socket has been read empty
    (af_netlink.c, NETLINK_S_CONGESTED). With it a loss costs what did not fit, and `lost_messages` still counts it.
    """
    channel = open_control_socket()
    channel.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
    try:
        channel.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
    except PermissionError:  # root of a user namespace: what net.core.rmem_max allows
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    return channel


def lost_messages(channel: socket.socket) -> int:
    """How many messages have not fitted into the receive buffer since the socket was opened."""
    return int(_MEMINFO.unpack(channel.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))[-1])
