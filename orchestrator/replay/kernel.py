"""The kernel as the inspector sees it: packets with conntrack attributes, verdicts, and requests that all succeed."""

from __future__ import annotations

from orchestrator.engine import netlink, tuples
from orchestrator.engine.api import Direction
from orchestrator.engine.ctnetlink import CTA_HELP, CTA_HELP_INFO, CTA_TUPLE_ORIG, CTA_TUPLE_REPLY
from orchestrator.engine.nfqueue import Change, Packet
from orchestrator.engine.packet import Segment
from orchestrator.replay.capture import IpPacket
from orchestrator.replay.connections import Connection

NAME = b"replay"
"""The registration that every connection of a replay has."""

# Source: include/uapi/linux/netfilter/nf_conntrack_common.h, nf_inet_hooks in netfilter.h.
_CONFIRMED = 1 << 3
_SRC_NAT = 1 << 4
_DST_NAT = 1 << 5
_POSTROUTING = 4


class Kernel:
    """Holds the private data of the connection that was queued last, and takes whatever it is told."""

    def __init__(self) -> None:
        self._queued: Connection | None = None
        self._packets = 0

    def queue(self, connection: Connection, direction: Direction, packet: IpPacket, segment: Segment) -> Packet:
        """The packet as NFQUEUE would deliver it, without what follows it in its frame."""
        self._queued = connection
        self._packets += 1
        original, reply = connection.tuples
        return Packet(
            packet_id=self._packets,
            queue_num=0,
            hook=_POSTROUTING,
            protocol=packet.protocol,
            direction=direction,
            ct=memoryview(
                tuples.encode(CTA_TUPLE_ORIG, original, connection.l4proto)
                + tuples.encode(CTA_TUPLE_REPLY, reply, connection.l4proto)
            ),
            ct_id=connection.number,
            status=_status(connection),
            helper=NAME,
            info=connection.private,
            payload=packet.data[: segment.end],
        )

    def give(self, connection: Connection, change: Change | None) -> None:
        """Take the private data of a verdict."""
        if change is not None and change.info is not None:
            connection.private = change.info

    def request(self, message: bytes) -> int:
        """Answer a request of the inspector to ctnetlink; private data may come this way, too."""
        help_ = netlink.attributes(message[netlink.HEADER_LEN :]).get(CTA_HELP)
        info = netlink.attributes(help_).get(CTA_HELP_INFO) if help_ else None
        if info is not None and self._queued is not None:
            self._queued.private = info
        return 0


def _status(connection: Connection) -> int:
    original, reply = connection.tuples
    return (
        (_CONFIRMED if connection.is_confirmed else 0)
        | (_SRC_NAT if reply.dst != original.src else 0)
        | (_DST_NAT if reply.src != original.dst else 0)
    )
