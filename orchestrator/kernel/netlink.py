"""One request to the netfilter part of netlink: sent, and read until the kernel has answered it."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300

HEADER_BYTES = 20
"""Length of the netlink header (16) and of the nfgenmsg that follows it; the attributes come next."""

_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLMSGERR_ATTR_MSG = 1
_RECEIVE_BYTES = 1 << 16  # the kernel fills at most 32 KiB at a time, and only for a reader with this much room
_DUMP_ATTEMPTS = 10

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERRNO = struct.Struct("=i")

T = TypeVar("T")


def dump_request(*, subsystem: int, command: int) -> bytes:
    """A request for everything of one subsystem, without a filter."""
    flags = NLM_F_REQUEST | NLM_F_DUMP
    return _HEADER.pack(HEADER_BYTES, subsystem << 8 | command, flags, 0, 0) + bytes(4)


def exchange(request: bytes) -> Generator[bytes, None, None]:
    """Send a request that asks for an acknowledgement or a dump, and yield the messages of its answer.

    Raises OSError with the errno of the kernel, its text being the extended acknowledgement or empty; InterruptedError
    at the end of a dump during which the table changed; OSError ENOBUFS where answers were lost.
    """
    wanted = _HEADER.unpack_from(request)[3]
    interrupted = False
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as channel:
        channel.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        channel.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        channel.send(request)
        while True:
            for kind, flags, sequence, message in split(channel.recv(_RECEIVE_BYTES)):
                if sequence != wanted:
                    continue
                interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    _raise_if_refused(message)
                    if interrupted:
                        raise InterruptedError(errno.EINTR, "the table changed while it was read")
                    return
                yield message


def perform(request: bytes) -> None:
    """Send a request whose acknowledgement is all there is to know; raises as `exchange`."""
    for _ in exchange(request):
        pass


def dump(request: bytes, collect: Callable[[Iterator[bytes]], T]) -> T:
    """What `collect` makes of a complete dump; one that was interrupted or lost messages is read again, 10 times."""
    for _ in range(_DUMP_ATTEMPTS - 1):
        try:
            return collect(exchange(request))
        except OSError as error:
            if error.errno not in (errno.EINTR, errno.ENOBUFS):
                raise
    return collect(exchange(request))


def split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The messages of one datagram: type, flags, sequence number, and the whole message."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= length <= len(data) - offset:
            raise OSError(errno.EBADMSG, "netlink message of a wrong length")
        yield kind, flags, sequence, data[offset : offset + length]
        offset += (length + 3) & ~3


def _raise_if_refused(message: bytes) -> None:
    """Raise what an NLMSG_ERROR or NLMSG_DONE says; an acknowledgement and a plain end say nothing."""
    if len(message) < _HEADER.size + _ERRNO.size:
        return
    number = -_ERRNO.unpack_from(message, _HEADER.size)[0]
    if number > 0:
        raise OSError(number, _extended_text(message))


def _extended_text(message: bytes) -> str:
    """The text of an extended acknowledgement; attributes follow the header that is echoed (NETLINK_CAP_ACK)."""
    offset = _HEADER.size + _ERRNO.size + _HEADER.size
    while offset + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, offset)
        if length < _ATTRIBUTE.size:
            break
        if kind == _NLMSGERR_ATTR_MSG:
            return message[offset + _ATTRIBUTE.size : offset + length].rstrip(b"\0").decode(errors="replace")
        offset += (length + 3) & ~3
    return ""
