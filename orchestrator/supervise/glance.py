"""A glance at what nobody tells of: cheap enough for every half minute, and good for one question: is it as it was?

It runs beside a supervisor, so it imports the standard library and the engine alone, and it loads no kernel module.
"""

from __future__ import annotations

import os
from struct import Struct

from orchestrator.engine import netlink

_REMADE = "remade"  # touched by whoever makes a registration anew that others use
_QUEUES = "/proc/self/net/netfilter/nfnetlink_queue"
_REGISTRY = "/sys/module/nfnetlink_cthelper"
_GET_HELPERS = 9 << 8 | 1  # NFNL_SUBSYS_CTHELPER, NFNL_MSG_CTHELPER_GET
_NLM_F_DUMP = 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_ANSWER_LEN = 1 << 16
_HEADER = Struct("=IHHII")
_LEGACY = ("/proc/self/net/ip_tables_names", "/proc/self/net/ip6_tables_names")


def glance(state_dir: str) -> bytes | None:
    """Modules, who has which queue, and registrations, and when one was made anew; None where rules of iptables-legacy
    may matter, too.

    Raises OSError.
    """
    if any("raw" in _lines(path) for path in _LEGACY):
        return None
    modules = sorted(line.split()[0] for line in _lines("/proc/modules"))  # the rest says who uses one just now
    queues = (" ".join(line.split()[:2]) for line in _lines(_QUEUES))  # number and port id; the rest are counts
    has_registry = os.path.exists(_REGISTRY)  # noqa: PTH110 (a supervisor imports no pathlib)
    text = "\n".join((*modules, "", *queues, "", _changed_at(f"{state_dir}/{_REMADE}")))
    return b"\0".join((text.encode(), *(_registrations() if has_registry else ())))


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:  # noqa: PTH123
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def _changed_at(path: str) -> str:
    try:
        return str(os.stat(path).st_mtime_ns)  # noqa: PTH116
    except FileNotFoundError:
        return ""


def _registrations() -> list[bytes]:
    """The bodies of all messages of a dump; the order of a dump is that of the kernel's table."""
    bodies: list[bytes] = []
    with netlink.open_control_socket() as channel:
        channel.send(netlink.message(_GET_HELPERS, b"", flags=netlink.NLM_F_REQUEST | _NLM_F_DUMP))
        while True:
            data = channel.recv(_ANSWER_LEN)
            offset = 0
            while offset + _HEADER.size <= len(data):
                length, kind, *_ = _HEADER.unpack_from(data, offset)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE) or length < _HEADER.size:
                    return sorted(bodies)
                bodies.append(data[offset + netlink.HEADER_LEN : offset + length])
                offset += length + 3 & ~3
