"""A router in memory: it queues packets of one connection to an inspector as the kernel does, and obeys its verdicts.

It keeps what the kernel keeps (private data, expectations, sequence adjustment), so that laws about a whole session can
be stated on the bytes that arrive and on the expectations that exist.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from orchestrator.engine.api import L4, Direction, Helper, Tuple
from orchestrator.engine.expectation import Expectation
from orchestrator.engine.inspector import Duty, Inspector, Outcome
from orchestrator.engine.nfqueue import Decoder, Packet
from orchestrator.engine.stream import STREAM_STATE_LEN, distance

CLIENT, SERVER, OUTSIDE = (socket.inet_aton(a) for a in ("10.0.0.1", "10.0.0.2", "192.0.2.1"))
CLIENT6, SERVER6, OUTSIDE6 = (socket.inet_pton(socket.AF_INET6, a) for a in ("fd00:1::1", "fd00:2::2", "2001:db8::1"))
NAME = b"ftp-us"
CONFIRMED, SEEN_REPLY, SNAT, DNAT = 8, 2, 16, 32

_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_STATUS, _CTA_PROTOINFO, _CTA_HELP, _CTA_TIMEOUT = 1, 2, 3, 4, 5, 7
_CTA_ID, _CTA_SEQ_ADJ_ORIG = 12, 15
_NFQA_PACKET_HDR, _NFQA_TIMESTAMP, _NFQA_OUTDEV, _NFQA_PAYLOAD, _NFQA_CT, _NFQA_CT_INFO = 1, 4, 6, 10, 11, 12
_NESTED = 0x8000


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset < len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        assert length >= 4
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def tree(data: bytes, *path: int) -> bytes:
    """The contents of an attribute inside attributes."""
    for kind in path:
        data = dict(attributes(data))[kind]
    return data


def checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = int(sum(struct.unpack(f"!{len(data) // 2}H", data)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip_packet(src: bytes, dst: bytes, protocol: int, transport: bytes) -> bytes:
    """An IPv4 or IPv6 packet around a transport header and payload whose checksum field is still zero."""
    pseudo = src + dst + struct.pack("!IHBB", len(transport), 0, 0, protocol)
    if len(src) == 4:
        pseudo = src + dst + struct.pack("!BBH", 0, protocol, len(transport))
    at = 16 if protocol == socket.IPPROTO_TCP else 6
    transport = transport[:at] + struct.pack("!H", checksum(pseudo + transport)) + transport[at + 2 :]
    if len(src) == 16:
        return struct.pack("!IHBB", 6 << 28, len(transport), protocol, 64) + src + dst + transport
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(transport), 1, 0x4000, 64, protocol, 0) + src + dst
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + transport


def payload_of(packet: bytes) -> bytes:
    """The transport payload of a packet that `ip_packet` made, or of one mangled; its checksums must be right."""
    is_ipv6 = packet[0] >> 4 == 6
    start = 40 if is_ipv6 else 20
    protocol = packet[6 if is_ipv6 else 9]
    src, dst = (packet[8:24], packet[24:40]) if is_ipv6 else (packet[12:16], packet[16:20])
    transport = packet[start:]
    length = struct.unpack_from("!H", packet, 4 if is_ipv6 else 2)[0]
    assert length == len(packet) - (40 if is_ipv6 else 0)
    at = 16 if protocol == socket.IPPROTO_TCP else 6
    blank = transport[:at] + bytes(2) + transport[at + 2 :]
    assert ip_packet(src, dst, protocol, blank)[start:] == transport
    assert is_ipv6 or checksum(packet[:20]) == 0
    return transport[transport[12] >> 4 << 2 :] if protocol == socket.IPPROTO_TCP else transport[8:]


@dataclass
class Router:
    """One connection through one inspector; `tuples` are those of conntrack, NAT included."""

    helper: Helper
    duty: Duty
    tuples: tuple[Tuple, Tuple]
    l4proto: L4 = L4.TCP
    status: int = CONFIRMED | SEEN_REPLY
    taken_ports: set[int] = field(default_factory=set)
    refuses_updates: bool = False
    info: bytes = b""
    expectations: list[Expectation] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    adjustments: dict[Direction, tuple[int, int, int]] = field(default_factory=dict)
    ct_id: int = 77
    is_labelled: bool = True
    device: int = 2
    packets: int = 0

    def __post_init__(self) -> None:
        original, reply = self.tuples
        if (reply.dst, reply.dport) != (original.src, original.sport):
            self.status |= SNAT
        if (reply.src, reply.sport) != (original.dst, original.dport):
            self.status |= DNAT
        self.info = self.info or bytes(self.helper.private_len + (STREAM_STATE_LEN if self.l4proto is L4.TCP else 0))
        self.restart()

    def restart(self) -> None:
        """Another process takes over: all that the first one knew is gone."""
        self.inspector = Inspector(self.helper, self.duty, self)
        self.decoder = Decoder()

    def hand_over(self) -> None:
        """Another process goes on with what this one knows."""
        memory = json.loads(json.dumps(self.inspector.memory()))
        self.restart()
        self.inspector.remember(memory)

    # -- what the kernel queues --------------------------------------------------------------------------------------

    def queue(self, direction: Direction, seq: int, payload: bytes) -> Packet:
        """The packet as it waits in the queue, after NAT, with a snapshot of the connection."""
        return self.decoder.decode(memoryview(self.message(direction, seq, payload)))

    def message(self, direction: Direction, seq: int, payload: bytes) -> bytes:
        """The same as the kernel sends it."""
        seen = self.tuples[direction.opposite]
        ports = struct.pack("!HH", seen.dport, seen.sport)
        if self.l4proto is L4.TCP:
            transport = ports + struct.pack("!IIBBHHH", seq % 2**32, 1, 0x50, 0x18, 500, 0, 0) + payload
        else:
            transport = ports + struct.pack("!HH", 8 + len(payload), 0) + payload
        data = ip_packet(seen.dst, seen.src, self.l4proto, transport)
        self.packets += 1
        protocol = 0x86DD if len(seen.src) == 16 else 0x0800
        body = (
            attribute(_NFQA_PACKET_HDR, struct.pack("!IHB", self.packets, protocol, 4))
            + attribute(_NFQA_OUTDEV, struct.pack("!I", self.device))
            + attribute(_NFQA_TIMESTAMP, struct.pack("!QQ", self.packets, 0))
            + attribute(_NFQA_CT | _NESTED, self._conntrack())
            + attribute(_NFQA_CT_INFO, struct.pack("!I", 3 if direction is Direction.REPLY else 0))
            + struct.pack("=HH", 4 + len(data), _NFQA_PAYLOAD)
            + data  # the kernel does not pad it
        )
        header = struct.pack("=IHHII", 20 + len(body), 3 << 8, 0, 0, 0) + struct.pack("!BBH", 2, 0, 5)
        return header + body

    def _conntrack(self) -> bytes:
        helper = attribute(1, NAME + b"\0") + attribute(2 | _NESTED, self.info)
        adjustments = b"".join(
            attribute(
                (_CTA_SEQ_ADJ_ORIG + direction) | _NESTED,
                b"".join(attribute(i, struct.pack("!i" if i > 1 else "!I", v)) for i, v in enumerate(values, 1)),
            )
            for direction, values in self.adjustments.items()
        )
        return (
            attribute(_CTA_TUPLE_ORIG | _NESTED, self._tuple(self.tuples[0]))
            + attribute(_CTA_TUPLE_REPLY | _NESTED, self._tuple(self.tuples[1]))
            + attribute(_CTA_STATUS, struct.pack("!I", self.status))
            + attribute(_CTA_TIMEOUT, struct.pack("!I", 432000 - self.packets))
            + attribute(_CTA_PROTOINFO | _NESTED, attribute(1, bytes([self.packets % 256])))
            + attribute(_CTA_HELP | _NESTED, helper)
            + adjustments
            + attribute(_CTA_ID, struct.pack("!I", self.ct_id))
        )

    def _tuple(self, one: Tuple) -> bytes:
        first = 1 if len(one.src) == 4 else 3
        addresses = attribute(first, one.src) + attribute(first + 1, one.dst)
        ports = struct.pack("!H", one.sport), struct.pack("!H", one.dport)
        protocol = attribute(1, bytes([self.l4proto])) + attribute(2, ports[0]) + attribute(3, ports[1])
        return attribute(1 | _NESTED, addresses) + attribute(2 | _NESTED, protocol)

    # -- what it does with the verdict -------------------------------------------------------------------------------

    def send(self, direction: Direction, seq: int, payload: bytes) -> bytes:
        """Queue a packet and obey at once; the payload that goes on."""
        return self.answer(self.queue(direction, seq, payload))

    def answer(self, packet: Packet) -> bytes:
        outcome = self.inspector.inspect(packet)
        self.outcomes.append(outcome)
        change = outcome.change
        if change is None:
            return payload_of(bytes(packet.payload))
        if change.info is not None:
            self.info = change.info
        if change.expectation is not None:
            assert not change.is_bare
            self.expectations.append(change.expectation)
        if change.clear_label is not None:
            self.is_labelled = False
        return payload_of(bytes(packet.payload) if change.payload is None else change.payload)

    def adjusted(self, direction: Direction, seq: int) -> int:
        """The sequence number with which a packet goes on. Source: nf_ct_seqadj.c, nf_ct_seq_offset."""
        pos, before, after = self.adjustments.get(direction, (0, 0, 0))
        return (seq + (after if distance(seq, pos) > 0 else before)) % 2**32

    # -- ctnetlink ---------------------------------------------------------------------------------------------------

    def request(self, message: bytes) -> int:
        """What the inspector asks of ctnetlink; expectations at a port that somebody has are refused."""
        self.requests.append(message)
        subsystem = struct.unpack_from("=H", message, 4)[0] >> 8
        body = message[20:]
        if subsystem == 1:
            return errno.ENOENT if self.refuses_updates else self._update(body)
        port = struct.unpack("!H", tree(body, 2, 2, 3))[0]
        if port in self.taken_ports:
            return errno.EEXIST
        self.taken_ports.add(port)
        return 0

    def _update(self, body: bytes) -> int:
        found = dict(attributes(body))
        for direction in Direction:
            if _CTA_SEQ_ADJ_ORIG + direction in found:
                values = dict(attributes(found[_CTA_SEQ_ADJ_ORIG + direction]))
                position = struct.unpack("!I", values[1])[0]
                self.adjustments[direction] = (position, *(struct.unpack("!i", values[i])[0] for i in (2, 3)))
        if _CTA_HELP in found:
            helper = dict(attributes(found[_CTA_HELP]))
            assert helper[1] == NAME + b"\0"
            self.info = helper.get(2, self.info)
        return 0
