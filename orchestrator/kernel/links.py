"""Interfaces of a namespace, and the VRF that each belongs to. Sources: if_link.h; rtnl_dump_ifinfo in rtnetlink.c."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Mapping

from orchestrator.engine.netlink import attributes
from orchestrator.kernel.netlink import NLM_F_DUMP, NLM_F_REQUEST, split
from orchestrator.kernel.netns import entered
from orchestrator.model import Netns

_NETLINK_ROUTE = 0
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWLINK, _RTM_GETLINK = 16, 18
_IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO = 3, 10, 18
_IFLA_INFO_KIND = 1
_RECEIVE_BYTES = 1 << 16

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")  # family, type, index, flags, change
_NUMBER = struct.Struct("=I")
_ERRNO = struct.Struct("=i")


def interfaces(netns: Netns) -> dict[str, str]:
    """Names of all interfaces, each with the VRF that it belongs to, empty for none. Raises PreflightError, OSError."""
    with entered(netns):
        channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
    with channel:
        length = _HEADER.size + _LINK.size
        channel.send(_HEADER.pack(length, _RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + bytes(_LINK.size))
        links = dict(_links(channel))
    vrfs = {index: _text(link[_IFLA_IFNAME]) for index, link in links.items() if _kind(link) == "vrf"}
    return {_text(link[_IFLA_IFNAME]): vrfs.get(_number(link.get(_IFLA_MASTER)), "") for link in links.values()}


def _links(channel: socket.socket) -> Iterator[tuple[int, Mapping[int, bytes]]]:
    """The attributes of each interface, by its index."""
    while True:
        for kind, _, _, message in split(channel.recv(_RECEIVE_BYTES)):
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                number = -_ERRNO.unpack_from(message, _HEADER.size)[0]
                raise OSError(number, os.strerror(number))
            if kind == _RTM_NEWLINK:
                _, _, index, _, _ = _LINK.unpack_from(message, _HEADER.size)
                yield index, attributes(message[_HEADER.size + _LINK.size :])


def _kind(link: Mapping[int, bytes]) -> str:
    return _text(attributes(link.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND, b""))


def _number(value: bytes | None) -> int:
    return int(_NUMBER.unpack(value)[0]) if value else 0


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="backslashreplace")
