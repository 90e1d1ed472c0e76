"""The short way of a packet: most messages of one direction of a connection have nearly all their bytes in common.

A lane holds these bytes and what they mean: the flow, its direction, and verdicts with blanks. A message that has just
the same bytes needs no decoding. What a lane cannot answer with certainty goes the general way, through Decoder and
Inspector, which opens lanes and teaches them. Both ways give the same verdicts, byte for byte.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from orchestrator.engine import nfqueue
from orchestrator.engine.api import L4, Expect, Flow, Source, Tuple
from orchestrator.engine.counters import Counters
from orchestrator.engine.expectation import Expectation
from orchestrator.engine.inspector import CONFIRMED, Inspector
from orchestrator.engine.netlink import ATTRIBUTE_HEADER_LEN, DecodeError
from orchestrator.engine.nfqueue import Change, Packet, Places
from orchestrator.engine.packet import Segment, locate
from orchestrator.engine.stream import PART_LEN, STREAM_STATE_LEN, distance, is_followed, parts

_LANES_MAX = 2048  # of one layout
_LAYOUTS_MAX = 8
_CONDITIONS_MAX = 256

_TCP, _PEER = L4.TCP, Source.PEER
_SEQ_MASK = 0xFFFFFFFF
_PORT = struct.Struct(">H")
_PACKET_ID = bytes(4)

_Area = tuple[int, int]
_Match = Callable[[memoryview, int, int], object]
_Form = tuple[bytes, bytes, bytes, bytes]
_nothing_matches: _Match = re.compile(rb"(?!)").fullmatch


class _Header(NamedTuple):
    """An IP header without options and extensions: its size, where things are, and what differs between packets.

    The field at `length` counts from `counted` on.
    """

    size: int
    length: int
    counted: int
    addresses: int
    transient: tuple[_Area, ...]


_HEADERS = {
    4: _Header(20, length=2, counted=0, addresses=12, transient=((2, 6), (10, 12))),  # and identification; checksum
    6: _Header(40, length=4, counted=40, addresses=8, transient=((4, 6),)),
}
_PORTS_LEN = 4
_TCP_NUMBERS, _TCP_REST = (4, 12), 13  # sequence and acknowledgement; from the flags on
_UDP_NUMBERS = (4, 8)  # length and checksum


class _Layout:
    """Messages that have everything in the same place; `lanes` are by addresses and ports.

    `fields` takes packet id, private data, length in the IP header, addresses and ports, and the sequence number of TCP
    or the length of UDP; `common` all that messages of a lane have in common. Offsets are from the message's beginning.
    `dull` is by direction and condition of the connection: payloads that match lead to nothing.
    """

    __slots__ = ("common", "counted", "dull", "fields", "is_tcp", "lanes", "payload", "transport")

    def __init__(self, places: Places, header: _Header, segment: Segment) -> None:
        ip = places.payload
        transport, payload = ip + segment.transport, ip + segment.payload
        packet_id, ends = places.packet_header, (ip + header.addresses, transport + _PORTS_LEN)
        self.is_tcp = segment.l4proto is _TCP
        self.counted, self.transport, self.payload = ip + header.counted, transport, payload
        self.lanes: dict[bytes, _Lane] = {}
        self.dull: tuple[dict[bytes, _Match], ...] = ({}, {})
        self.fields = _values(
            (packet_id, "4s"),
            (places.info[0], f"{places.info[1] - places.info[0]}s"),
            (ip + header.length, "H"),
            (ends[0], f"{ends[1] - ends[0]}s"),
            (transport + 4, "I" if self.is_tcp else "H"),
        ).unpack_from
        numbers, rest = (
            (_TCP_NUMBERS, _TCP_REST) if self.is_tcp else (_UDP_NUMBERS, segment.payload - segment.transport)
        )
        transient = (
            (0, 4),  # length of the message
            (packet_id, packet_id + 4),
            *_joined(places.transient),
            places.info,
            (ip - 4, ip - 2),  # length of the attribute around the packet
            *((ip + start, ip + end) for start, end in header.transient),
            ends,
            (transport + numbers[0], transport + numbers[1]),
            (transport + rest, payload),
        )
        self.common = nfqueue.spans(_between(transient)).unpack_from


def _values(*places: tuple[int, str]) -> struct.Struct:
    """A struct of values, each by its offset and format."""
    form, at = ">", 0
    for offset, code in places:
        form += f"{offset - at}x{code}"
        at = offset + struct.calcsize(f">{code}")
    return struct.Struct(form)


def _between(areas: Iterable[_Area]) -> Iterator[_Area]:
    """What lies between areas, which do not overlap."""
    at = 0
    for start, end in sorted(areas):
        if at < start:
            yield at, start
        at = end


def _joined(areas: Iterable[_Area]) -> Iterator[_Area]:
    """Areas with nothing but an attribute header between them as one: what follows tells whether it was the same."""
    last: _Area | None = None
    for start, end in sorted(areas):
        if last is not None and start - last[1] <= ATTRIBUTE_HEADER_LEN:
            last = last[0], end
            continue
        if last is not None:
            yield last
        last = start, end
    if last is not None:
        yield last


class _Lane:
    """One direction of a connection. Verdicts are in pieces: packet id, private data and port come between them.

    `plain` changes nothing, `advance` writes private data, `announce` makes the usual expectation as well: None until
    it is wanted. `dull` is that of the layout, for the direction; `packet` the one that opened the lane, without bytes.
    """

    __slots__ = (
        "advance",
        "announce",
        "common",
        "ct_id",
        "direction",
        "dull",
        "flow",
        "is_nated",
        "packet",
        "plain",
        "verdict",
    )

    def __init__(
        self, packet: Packet, flow: Flow, *, verdict: int, common: tuple[bytes, ...], dull: dict[bytes, _Match]
    ) -> None:
        self.packet = packet._replace(payload=memoryview(b""))
        self.verdict = verdict
        self.common = common
        self.ct_id = packet.ct_id
        self.direction = packet.direction
        self.flow = flow
        original, reply = flow.tuples
        self.is_nated = flow.is_nated or reply != (original.dst, original.src, original.dport, original.sport)
        self.dull = dull
        self.plain: bytes = nfqueue.encode_verdict(packet, verdict)[: -len(_PACKET_ID)]
        self.advance: _Form = nfqueue.verdict_form(packet, verdict, Change(info=packet.info))
        self.announce: _Form | None = None


class Lanes:
    """The lanes of all connections of a process. What `answer` declines, `learn` is told of."""

    def __init__(self, inspector: Inspector, counters: Counters) -> None:
        bounds = inspector.duty.bounds
        self._duty, self._helper, self._written = inspector.duty, inspector.helper, inspector.written
        self._plain_verdict = inspector.plain_verdict
        self._first_port, self._last_port = max(1, bounds.first_port), min(bounds.last_port, 0xFFFF)
        self._stream = parts(inspector.helper.private_len)
        self._counters = counters
        self._layouts: dict[tuple[Places, L4, int], _Layout] = {}

    def answer(self, message: memoryview) -> bytes | None:
        """The verdict for the packet in a message; None if only the general way can tell."""
        packet_id: bytes
        for layout in self._layouts.values():
            try:
                packet_id, info, length, ends, number = layout.fields(message)
                lane = layout.lanes.get(ends)
                if lane is None or lane.common != layout.common(message):
                    continue
            except struct.error:
                continue  # too short
            start, end = layout.payload, layout.counted + length
            if not start < end <= len(message):
                return lane.plain + packet_id  # no payload, or none that can be read
            written = self._written.get(lane.ct_id)
            if written is not None and written != info:  # the packet waited while it was written
                if not any(info):
                    return None  # or this is another connection
                info = written
            if layout.is_tcp:
                return self._segment(lane, packet_id, info, message, start, end, number)
            if number == end - layout.transport:
                return self._datagram(lane, packet_id, info, message, start, end)
            return lane.plain + packet_id
        return None

    def learn(self, message: memoryview, packet: Packet) -> None:
        """Open the lane of a packet if it has none."""
        if not packet.status & CONFIRMED or packet.helper not in self._duty.names or packet.places is None:
            return  # the first packet of a connection is like no other
        layout = self._layout(packet, packet.places)
        if layout is None:
            return
        ends, common = layout.fields(message)[3], layout.common(message)
        lane = layout.lanes.get(ends)
        if lane is None or lane.common != common:
            try:
                flow = packet.flow()
            except DecodeError:
                return
            lane = _Lane(
                packet, flow, verdict=self._plain_verdict(packet), common=common, dull=layout.dull[packet.direction]
            )
            if len(layout.lanes) >= _LANES_MAX:
                del layout.lanes[next(iter(layout.lanes))]
            layout.lanes[ends] = lane

    def _layout(self, packet: Packet, places: Places) -> _Layout | None:
        """None for packets that are read in the general way alone."""
        segment = locate(packet.payload)
        if segment is None:
            return None
        header = _HEADERS[packet.payload[0] >> 4]
        if segment.transport != header.size:
            return None
        engine_len = STREAM_STATE_LEN if segment.l4proto is _TCP else 0
        if len(packet.info) != engine_len + self._helper.private_len:
            return None
        key = places, segment.l4proto, segment.payload
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _LAYOUTS_MAX:
                self._layouts.clear()
            layout = self._layouts[key] = _Layout(places, header, segment)
        return layout

    # -- payloads ----------------------------------------------------------------------------------------------------

    def _segment(
        self, lane: _Lane, packet_id: bytes, info: bytes, message: memoryview, start: int, end: int, seq: int
    ) -> bytes | None:
        """The verdict for a TCP payload that comes in order and holds whole messages."""
        original_next, reply_next, rest = self._stream.unpack(info)
        is_dull = lane.dull.get(rest)
        if is_dull is None:
            if not is_followed(rest, lane.direction):
                return None
            is_dull = self._dull(lane, rest, rest[PART_LEN:], self._helper.delimiter)
        next_seq = reply_next if lane.direction else original_next
        if seq != next_seq and not (self._duty.by_triggers and distance(seq, next_seq) > 0):
            return None
        port = None
        if not is_dull(message, start, end):
            payload = bytes(message[start:end])
            if not payload.endswith(self._helper.delimiter):
                return None
            found = self._ask(lane, payload, rest[PART_LEN:])
            if found is None:
                return None
            private, port = found
            rest = rest[:PART_LEN] + private
        if lane.direction:
            reply_next = seq + end - start & _SEQ_MASK
        else:
            original_next = seq + end - start & _SEQ_MASK
        info = self._stream.pack(original_next, reply_next, rest)
        self._written.pop(lane.ct_id, None)  # the newest goes last; it is no more than the inspector's and one a lane
        self._written[lane.ct_id] = info
        if port is not None:
            return self._announced(lane, packet_id, info, port)
        head, before, after, _ = lane.advance
        return head + packet_id + before + info + after

    def _datagram(
        self, lane: _Lane, packet_id: bytes, info: bytes, message: memoryview, start: int, end: int
    ) -> bytes | None:
        """The verdict for a UDP payload that leaves the private data as it is."""
        is_dull = lane.dull.get(info) or self._dull(lane, info, info, b"")
        if is_dull(message, start, end):
            return lane.plain + packet_id
        found = self._ask(lane, bytes(message[start:end]), info)
        if found is None or found[0] != info:
            return None
        return lane.plain + packet_id if found[1] is None else self._announced(lane, packet_id, b"", found[1])

    def _dull(self, lane: _Lane, condition: bytes, private: bytes, delimiter: bytes) -> _Match:
        """What the helper need not look at, and what ends with a whole message."""
        pattern = self._helper.dull(lane.direction, private)
        if len(lane.dull) >= _CONDITIONS_MAX:
            lane.dull.clear()
        match = lane.dull[condition] = _nothing_matches if pattern is None else _ending(pattern, delimiter).fullmatch
        return match

    def _ask(self, lane: _Lane, payload: bytes, private: bytes) -> tuple[bytes, bytes | None] | None:
        """The new private data, and the port if there is one usual expectation; None if there is more to do."""
        try:
            expects, new, is_finished, refused = self._helper.inspect(payload, lane.direction, lane.flow, private)
            if new is None:
                new = private
            if is_finished or refused or len(expects) > 1 or len(new) != len(private):
                return None
            if not expects:
                return new, None
            port = self._usual_port(lane, expects[0], len(payload))
        except (Exception, SystemExit):  # noqa: BLE001 (it will raise in the general way too, which tells)
            return None
        return None if port is None else (new, port)

    def _usual_port(self, lane: _Lane, expect: Expect, payload_len: int) -> bytes | None:
        """Where the usual expectation goes; None if it is not the usual one, or for the guard to refuse."""
        l4proto, port, address, text, source, source_port, policy, is_permanent, helper = expect
        if source_port or policy or is_permanent or helper or source is not _PEER or lane.is_nated:
            return None
        sender = lane.flow.tuples[lane.direction]
        if l4proto is not lane.flow.l4proto or not (address is None or address == sender.src):
            return None
        if text is not None and not 0 <= text[0] < text[1] <= payload_len:
            return None
        if port is None:
            port = sender.sport
        return _PORT.pack(port) if self._first_port <= port <= self._last_port else None

    def _announced(self, lane: _Lane, packet_id: bytes, info: bytes, port: bytes) -> bytes:
        self._counters.expectations += 1
        if lane.announce is None:
            lane.announce = _usual_form(lane, info)
        head, before, after, end = lane.announce
        return head + packet_id + before + info + after + port + end


def _ending(pattern: re.Pattern[bytes], delimiter: bytes) -> re.Pattern[bytes]:
    """The pattern for what matches and ends with a delimiter."""
    return re.compile(rb"(?:%b)(?<=%b)" % (pattern.pattern, re.escape(delimiter)), pattern.flags)


def _usual_form(lane: _Lane, info: bytes) -> _Form:
    """For the expectation of a connection from the peer to the sender, from any port, of the first class, without NAT.

    Without private data in it if `info` is empty.
    """
    sender = lane.flow.tuples[lane.direction]
    expectation = Expectation(
        tuple=Tuple(sender.dst, sender.src, 0, 0),
        mask_src=b"\xff" * len(sender.dst),
        mask_sport=0,
        l4proto=lane.flow.l4proto,
        policy=0,
        flags=0,
    )
    return nfqueue.verdict_form(lane.packet, lane.verdict, Change(info=info or None, expectation=expectation))
