"""The codec of NFQUEUE: a queue's configuration, packets with their conntrack attributes, and verdicts.

Sources: nfqnl_build_packet_message, nfqnl_recv_verdict and nfqnl_recv_config in nfnetlink_queue.c, and
ctnetlink_glue_build and ctnetlink_glue_parse in nf_conntrack_netlink.c.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from orchestrator.engine import ctnetlink, netlink, tuples
from orchestrator.engine.api import Direction, Flow
from orchestrator.engine.ctnetlink import SequenceAdjustment
from orchestrator.engine.expectation import Expectation, encode_expectation
from orchestrator.engine.netlink import ATTRIBUTE_HEADER_LEN, HEADER_LEN, DecodeError, attribute, nest, walk

ACCEPT = 1
STOP = 5  # ACCEPT that also ends the traversal of the hook

_PACKET = 3 << 8
_VERDICT = 3 << 8 | 1
_CONFIG = 3 << 8 | 2

_NFQA_PACKET_HDR = 1
_NFQA_VERDICT_HDR = 2
_NFQA_TIMESTAMP = 4
_NFQA_IFINDEX_INDEV = 5
_NFQA_IFINDEX_OUTDEV = 6
_NFQA_PAYLOAD = 10
_NFQA_CT = 11
_NFQA_CT_INFO = 12
_NFQA_EXP = 15

_NFQA_CFG_CMD = 1
_NFQA_CFG_PARAMS = 2
_NFQA_CFG_QUEUE_MAXLEN = 3
_NFQA_CFG_MASK = 4
_NFQA_CFG_FLAGS = 5
_NFQNL_CFG_CMD_BIND = 1
_NFQNL_CFG_CMD_UNBIND = 2
_NFQNL_COPY_PACKET = 2
_NFQA_CFG_F_FAIL_OPEN = 1
_NFQA_CFG_F_CONNTRACK = 2

_IP_CT_IS_REPLY = 3  # CT_INFO from here on is of the reply direction
_IPS_NAT_MASK = 0x30  # IPS_SRC_NAT | IPS_DST_NAT

_NUMBER = struct.Struct(">I")
_QUEUE_NUM = struct.Struct(">H")
_PACKET_HEADER = struct.Struct(">IHB")
_PORT_LEN = 2
_LOOPBACK = 1  # in every namespace; source: loopback.c, loopback_net_init
_NO_ADJUSTMENT = SequenceAdjustment(0, 0, 0)
_LAYOUTS_MAX = 16
_SEQUENCE_ADJUSTMENTS = {
    Direction.ORIGINAL: ctnetlink.CTA_SEQ_ADJ_ORIG,
    Direction.REPLY: ctnetlink.CTA_SEQ_ADJ_REPLY,
}


class Places(NamedTuple):
    """Where things are in a message: offsets of data, or first and end.

    `headers` are those that say so; `transient` differs between packets of a connection and means nothing here.
    """

    packet_header: int
    device: int
    ct_info: int
    ct: tuple[int, int]
    ct_id: int
    status: int
    helper: tuple[int, int]
    info: tuple[int, int]
    payload: int
    headers: tuple[tuple[int, int], ...]
    transient: tuple[tuple[int, int], ...]


class Packet(NamedTuple):
    """A packet that waits for its verdict; its views are valid as long as the buffer it was read into.

    `protocol` is the Ethernet type, `hook` 1 (input) or 4 (postrouting). `ct` holds the contents of NFQA_CT, empty for
    a packet without connection; `ct_id` and `status` (IPS_* bits) are 0 then. `helper` is the name of the attached
    helper, empty if there is none, and `info` its private data as it was when the packet was queued. `payload` is the
    packet from its IP header on, without what exceeds 65531 bytes. `places` tell where all this was in its message.
    `device` is the index of the interface that it leaves by, or came by if it does not leave.
    """

    packet_id: int
    queue_num: int
    hook: int
    protocol: int
    direction: Direction
    ct: memoryview
    ct_id: int
    status: int
    helper: bytes
    info: bytes
    payload: memoryview
    places: Places | None = None
    device: int = 0

    @property
    def is_looped(self) -> bool:
        """True between two ends on this host."""
        return self.device == _LOOPBACK

    def flow(self) -> Flow:
        """Raises DecodeError for a connection that is neither TCP nor UDP, and for a packet without one."""
        original = reply = None
        for kind, start, end in walk(self.ct, 0, len(self.ct)):
            if kind == ctnetlink.CTA_TUPLE_ORIG:
                original = tuples.decode(self.ct[start:end])
            elif kind == ctnetlink.CTA_TUPLE_REPLY:
                reply = tuples.decode(self.ct[start:end])
                break
        if original is None or reply is None:
            raise DecodeError("no connection, or not with both tuples")
        return Flow((original[0], reply[0]), original[1], bool(self.status & _IPS_NAT_MASK))

    def zone(self) -> int:
        """The zone of both directions, 0 by default. Raises DecodeError."""
        data = self._attribute(ctnetlink.CTA_ZONE)
        return int.from_bytes(data, "big")

    def sequence_adjustment(self, direction: Direction) -> SequenceAdjustment:
        """What the kernel adds to sequence numbers of a direction; zeros if nothing. Raises DecodeError."""
        data = self._attribute(_SEQUENCE_ADJUSTMENTS[direction])
        return ctnetlink.decode_sequence_adjustment(data) if data else _NO_ADJUSTMENT

    def _attribute(self, wanted: int) -> bytes:
        for kind, start, end in walk(self.ct, 0, len(self.ct)):
            if kind == wanted:
                return bytes(self.ct[start:end])
        return b""


class Change(NamedTuple):
    """What a verdict changes, None where nothing.

    `info` is the private data of the connection, `clear_label` the bit (0..127) of a connection label, `payload` a
    whole packet with right lengths and checksums. Where sequence numbers must be adjusted the kernel does so by
    itself, unless the verdict is bare: `is_bare` goes with a payload alone.
    """

    info: bytes | None = None
    expectation: Expectation | None = None
    payload: bytes | None = None
    clear_label: int | None = None
    is_bare: bool = False


# -- configuration -----------------------------------------------------------------------------------------------------


def encode_config(
    queue_num: int,
    *,
    is_fail_open: bool,
    max_len: int,
    sequence: int = 0,
    is_bound: bool = False,
    is_answered: bool = True,
) -> bytes:
    """Bind a queue that holds `max_len` packets and copies whole ones, with their conntrack attributes.

    In one message, because a bound queue without copy mode drops packets. Never with GSO: that would merge segments.
    One that `is_bound` by this socket is only configured: a second bind of it is EBUSY (nfqnl_recv_config). A request
    that is not `is_answered` has an answer only if it fails.
    """
    flags = _NFQA_CFG_F_CONNTRACK | (_NFQA_CFG_F_FAIL_OPEN if is_fail_open else 0)
    body = b"".join(
        (
            b"" if is_bound else _command(_NFQNL_CFG_CMD_BIND),
            attribute(_NFQA_CFG_PARAMS, _NUMBER.pack(0) + bytes((_NFQNL_COPY_PACKET,))),  # a range of 0 is everything
            attribute(_NFQA_CFG_QUEUE_MAXLEN, _NUMBER.pack(max_len)),
            attribute(_NFQA_CFG_MASK, _NUMBER.pack(_NFQA_CFG_F_CONNTRACK | _NFQA_CFG_F_FAIL_OPEN)),
            attribute(_NFQA_CFG_FLAGS, _NUMBER.pack(flags)),
        )
    )
    asked = netlink.NLM_F_REQUEST | (netlink.NLM_F_ACK if is_answered else 0)
    return netlink.message(_CONFIG, body, flags=asked, resource=queue_num, sequence=sequence)


def encode_unbind(queue_num: int) -> bytes:
    """Let go of a queue, whose packets are dropped; the kernel answers only if it is not ours."""
    command = _command(_NFQNL_CFG_CMD_UNBIND)
    return netlink.message(_CONFIG, command, flags=netlink.NLM_F_REQUEST, resource=queue_num)


def _command(command: int) -> bytes:
    return attribute(_NFQA_CFG_CMD, bytes((command, 0, 0, 0)))


# -- packets -----------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Messages whose headers are the same have everything in the same place, which one `unpack` each finds out.

    `headers` takes all attribute headers and the name of the helper, which must be `expected`; `fields` the values.
    """

    headers: struct.Struct
    expected: tuple[bytes, ...]
    fields: struct.Struct
    ct: slice
    helper: bytes
    payload: slice
    places: Places


class Decoder:
    """Decodes packets; a queue's are nearly all of one or two layouts, which it remembers."""

    def __init__(self) -> None:
        self._layouts: list[_Layout] = []

    def decode(self, message: memoryview) -> Packet:
        """The packet in one whole message, which its payload ends. Raises DecodeError."""
        for layout in self._layouts:
            try:
                if layout.headers.unpack_from(message) != layout.expected:
                    continue
            except struct.error:
                continue  # too short
            values = layout.fields.unpack_from(message)
            queue_num, packet_id, protocol, hook, device, ct_id, status, info, ct_info = values
            return Packet(
                packet_id,
                queue_num,
                hook,
                protocol,
                _REPLY if ct_info >= _IP_CT_IS_REPLY else _ORIGINAL,
                message[layout.ct],
                ct_id,
                status,
                layout.helper,
                info,
                message[layout.payload],
                layout.places,
                device,
            )
        places = find_places(message)
        self._remember(message, places)
        return _decode_at(message, places)

    def _remember(self, message: memoryview, places: Places) -> None:
        layout = _layout(message, places)
        if layout is None:
            return
        if len(self._layouts) == _LAYOUTS_MAX:
            self._layouts.clear()  # what still comes is back at once
        self._layouts.append(layout)


_ORIGINAL, _REPLY = Direction.ORIGINAL, Direction.REPLY
_NOWHERE = (0, 0)
_MESSAGE_TYPE = (4, 6)

_Index = dict[int, tuple[int, int]]
"""Where the data of attributes begins and ends, by type."""


def find_places(message: memoryview) -> Places:
    if len(message) < HEADER_LEN or message[slice(*_MESSAGE_TYPE)] != _PACKET_TYPE:
        raise DecodeError("not a packet of NFQUEUE")
    headers = [_MESSAGE_TYPE]
    top = _index(message, (HEADER_LEN, len(message)), headers)
    ct = top.get(_NFQA_CT, _NOWHERE)
    inner = _index(message, ct, headers)
    helper = _index(message, inner.get(ctnetlink.CTA_HELP, _NOWHERE), headers)
    name = helper.get(ctnetlink.CTA_HELP_NAME, _NOWHERE)
    if _NFQA_PACKET_HDR not in top:
        raise DecodeError("packet without its header")
    return Places(
        packet_header=_place(top, _NFQA_PACKET_HDR, _PACKET_HEADER.size),
        device=_place(top, _NFQA_IFINDEX_OUTDEV, _NUMBER.size) or _place(top, _NFQA_IFINDEX_INDEV, _NUMBER.size),
        ct_info=_place(top, _NFQA_CT_INFO, _NUMBER.size),
        ct=ct,
        ct_id=_place(inner, ctnetlink.CTA_ID, _NUMBER.size),
        status=_place(inner, ctnetlink.CTA_STATUS, _NUMBER.size),
        helper=name,
        info=helper.get(ctnetlink.CTA_HELP_INFO, (name[1], name[1])),
        payload=top[_NFQA_PAYLOAD][0] if _NFQA_PAYLOAD in top else len(message),
        headers=(*sorted(headers), name),
        transient=tuple(
            index[kind]
            for index, kind in (
                (top, _NFQA_TIMESTAMP),
                (inner, ctnetlink.CTA_TIMEOUT),
                (inner, ctnetlink.CTA_PROTOINFO),
            )
            if kind in index
        ),
    )


def _index(message: memoryview, area: tuple[int, int], headers: list[tuple[int, int]]) -> _Index:
    """The attributes of a message or nest, and where their headers are. The payload reaches to the end."""
    is_top = area[0] == HEADER_LEN
    found: _Index = {}
    for kind, start, end in walk(message, *area):
        if is_top and kind == _NFQA_PAYLOAD:
            found[kind] = (start, area[1])
            headers.append((start - 2, start))  # its type; the length before it is another in each packet
            break
        found[kind] = (start, end)
        headers.append((start - ATTRIBUTE_HEADER_LEN, start))
    return found


def _place(index: _Index, kind: int, size: int) -> int:
    start, end = index.get(kind, (0, size))
    if end - start < size:
        raise DecodeError(f"attribute {kind} of {end - start} bytes")
    return start


def _decode_at(message: memoryview, places: Places) -> Packet:
    packet_id, protocol, hook = _PACKET_HEADER.unpack_from(message, places.packet_header)
    return Packet(
        packet_id,
        _QUEUE_NUM.unpack_from(message, HEADER_LEN - _QUEUE_NUM.size)[0],
        hook,
        protocol,
        _REPLY if _number(message, places.ct_info) >= _IP_CT_IS_REPLY else _ORIGINAL,
        message[slice(*places.ct)],
        _number(message, places.ct_id),
        _number(message, places.status),
        _helper_name(message, places),
        bytes(message[slice(*places.info)]),
        message[places.payload :],
        places,
        _number(message, places.device),
    )


def _number(message: memoryview, place: int) -> int:
    return int(_NUMBER.unpack_from(message, place)[0]) if place else 0


def _helper_name(message: memoryview, places: Places) -> bytes:
    return bytes(message[slice(*places.helper)]).partition(b"\0")[0]


def _layout(message: memoryview, places: Places) -> _Layout | None:
    """None for a packet without device, helper or payload, and for an order of attributes that no kernel has."""
    gaps = (
        places.packet_header - HEADER_LEN,
        places.device - places.packet_header - _PACKET_HEADER.size,
        places.ct_id - places.device - _NUMBER.size,
        places.status - places.ct_id - _NUMBER.size,
        places.info[0] - places.status - _NUMBER.size,
        places.ct_info - places.info[1],
        places.payload - places.ct_info - _NUMBER.size,
    )
    if min(gaps) < 0 or places.helper == _NOWHERE or places.payload == len(message):
        return None
    info_len = places.info[1] - places.info[0]
    headers = spans(places.headers)
    return _Layout(
        headers=headers,
        expected=headers.unpack_from(message),
        fields=struct.Struct(">18xH {}x IHB {}x I {}x I {}x I {}x {}s {}x I".format(*gaps[:5], info_len, gaps[5])),
        ct=slice(*places.ct),
        helper=_helper_name(message, places),
        payload=slice(places.payload, None),
        places=places,
    )


def spans(areas: Iterable[tuple[int, int]]) -> struct.Struct:
    """A struct of the bytes in each of these areas, those that touch in one piece."""
    form, at = "=", 0
    for start, end in _joined(areas):
        form += f" {start - at}x {end - start}s"
        at = end
    return struct.Struct(form)


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def identify(message: memoryview) -> tuple[int, int] | None:
    """Packet id and queue number of a packet that cannot be decoded; None if not even these can be read."""
    if len(message) < _IDENTITY.size:
        return None
    kind, queue_num, header, packet_id = _IDENTITY.unpack_from(message)
    if kind != _PACKET_TYPE or header != _PACKET_HEADER_HEADER:
        return None
    return packet_id, queue_num


_IDENTITY = struct.Struct(">4x 2s 12x H 4s I")  # the kernel puts the packet header first
_PACKET_TYPE = _PACKET.to_bytes(2, sys.byteorder)
_PACKET_HEADER_HEADER = netlink.attribute_header(_NFQA_PACKET_HDR, _PACKET_HEADER.size)


# -- verdicts ----------------------------------------------------------------------------------------------------------


_VERDICT_LAYOUT = struct.Struct(">16s 2x H 4s I I")  # netlink header; family, version and queue number; one attribute
_MESSAGE_HEADER = struct.Struct("=IHHII")
_VERDICT_HEADER = netlink.attribute_header(_NFQA_VERDICT_HDR, 8)


def _message_header(kind: int, length: int) -> bytes:
    return _MESSAGE_HEADER.pack(_VERDICT_LAYOUT.size + length, kind, netlink.NLM_F_REQUEST, 0, 0)


_PLAIN = _message_header(_VERDICT, 0)


def encode_plain_verdict(packet_id: int, queue_num: int, verdict: int) -> bytes:
    """A verdict that changes nothing."""
    return _VERDICT_LAYOUT.pack(_PLAIN, queue_num, _VERDICT_HEADER, verdict, packet_id)


def encode_verdict(packet: Packet, verdict: int, change: Change | None = None) -> bytes:
    """The kernel applies a change of a connection and its expectation first, then the payload.

    Raises ValueError for a payload above 65531 bytes, and private data above 32.
    """
    if change is None:
        return _VERDICT_LAYOUT.pack(_PLAIN, packet.queue_num, _VERDICT_HEADER, verdict, packet.packet_id)
    info, expectation, payload, clear_label, _ = change
    if info is not None and expectation is None and payload is None and clear_label is None:
        header, before, after = _info_frame(packet.helper, len(info))
        plain = _VERDICT_LAYOUT.pack(header, packet.queue_num, _VERDICT_HEADER, verdict, packet.packet_id)
        return b"".join((plain, before, info, after))
    body = _encode_change(packet, change)
    header = _message_header(_VERDICT, len(body))
    return _VERDICT_LAYOUT.pack(header, packet.queue_num, _VERDICT_HEADER, verdict, packet.packet_id) + body


@lru_cache(maxsize=64)
def _info_frame(helper: bytes, info_len: int) -> tuple[bytes, bytes, bytes]:
    """All of a verdict around its private data: the message header, and what precedes and follows the data."""
    body = nest(_NFQA_CT, ctnetlink.encode_help(helper, bytes(info_len)))
    padding = -info_len % 4
    end = len(body) - padding
    return _message_header(_VERDICT, len(body)), body[: end - info_len], body[end:]


def verdict_form(packet: Packet, verdict: int, change: Change) -> tuple[bytes, bytes, bytes, bytes]:
    """What surrounds the blanks of a verdict: packet id, private data, destination port of the expectation.

    `change` has no payload. A blank for something that it has not is empty.
    """
    whole = encode_verdict(packet, verdict, change)
    first = _VERDICT_LAYOUT.size
    info_at, info_len, port_at = first, 0, len(whole)
    if change.info is not None:
        info_len = len(change.info)
        info_at = first + 3 * ATTRIBUTE_HEADER_LEN + len(attribute(ctnetlink.CTA_HELP_NAME, packet.helper + b"\0"))
    if change.expectation is not None:
        port_at = len(whole) - len(encode_expectation(change.expectation)) + tuples.dport_at(change.expectation.tuple)
    return (
        whole[: first - _NUMBER.size],
        whole[first:info_at],
        whole[info_at + info_len : port_at],
        whole[port_at + _PORT_LEN :],
    )


def _encode_change(packet: Packet, change: Change) -> bytes:
    """The kernel looks at NFQA_EXP, and adjusts sequence numbers, only where there is an NFQA_CT, be it empty."""
    parts: list[bytes] = []
    if packet.ct and not change.is_bare:
        connection = [] if change.info is None else [ctnetlink.encode_help(packet.helper, change.info)]
        if change.clear_label is not None:
            connection.append(ctnetlink.encode_label_cleared(change.clear_label))
        parts.append(nest(_NFQA_CT, *connection))
        if change.expectation is not None:
            parts.append(nest(_NFQA_EXP, encode_expectation(change.expectation)))
    if change.payload is not None:
        parts.append(attribute(_NFQA_PAYLOAD, change.payload))
    return b"".join(parts)
