"""Requests to ctnetlink: a further expectation, a change of a connection; and the connection attributes they share.

A verdict can carry one expectation, on flows whose sequence numbers the kernel corrects by itself; the rest of what a
helper does goes this way. Sources: ctnetlink_new_expect, ctnetlink_change_conntrack in nf_conntrack_netlink.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping
from typing import NamedTuple

from orchestrator.engine import netlink, tuples
from orchestrator.engine.api import L4, Direction, Tuple
from orchestrator.engine.expectation import Expectation, encode_expectation
from orchestrator.engine.netlink import DecodeError, attribute, attributes, nest

CTA_TUPLE_ORIG = 1
CTA_TUPLE_REPLY = 2
CTA_STATUS = 3
CTA_PROTOINFO = 4
CTA_HELP = 5
CTA_TIMEOUT = 7
CTA_ID = 12
CTA_SEQ_ADJ_ORIG = 15
CTA_SEQ_ADJ_REPLY = 16
CTA_ZONE = 18
CTA_LABELS = 22
CTA_LABELS_MASK = 23
CTA_HELP_NAME = 1
CTA_HELP_INFO = 2

LABEL_BITS = 128
"""Connection labels of a connection. Source: nf_conntrack_labels.h, NF_CT_LABELS_MAX_SIZE."""

HELPER_INFO_MAX_LEN = 32
"""Bytes of private data that a connection has room for. Source: nf_conntrack_helper.h."""

_CT_NEW = 1 << 8
_EXP_NEW = 2 << 8
_CTA_EXPECT_MASTER = 1
_CTA_EXPECT_ZONE = 7
_CTA_SEQADJ_CORRECTION_POS = 1
_CTA_SEQADJ_OFFSET_BEFORE = 2
_CTA_SEQADJ_OFFSET_AFTER = 3
_SEQUENCE_ADJUSTMENT_ATTRIBUTES = {Direction.ORIGINAL: CTA_SEQ_ADJ_ORIG, Direction.REPLY: CTA_SEQ_ADJ_REPLY}

_ZONE = struct.Struct(">H")
_POSITION = struct.Struct(">I")
_OFFSET = struct.Struct(">i")
_LABEL_WORD = struct.Struct("@L")  # the kernel keeps labels as an array of unsigned long
_LABELS_LEN = LABEL_BITS // 8
_ANSWER_LEN = 4096


class SequenceAdjustment(NamedTuple):
    """What is added to sequence numbers of a direction: `before` up to position `pos`, `after` beyond it."""

    pos: int
    before: int
    after: int


def encode_help(name: bytes, info: bytes | None) -> bytes:
    """CTA_HELP with the name of the attached helper, and its private data unless None; what it lacks becomes zero.

    Raises ValueError for more than 32 bytes.
    """
    if info is None:
        return nest(CTA_HELP, attribute(CTA_HELP_NAME, name + b"\0"))
    if len(info) > HELPER_INFO_MAX_LEN:
        raise ValueError(f"private data of {len(info)} bytes, where {HELPER_INFO_MAX_LEN} fit")
    return nest(CTA_HELP, attribute(CTA_HELP_NAME, name + b"\0"), attribute(CTA_HELP_INFO, info))


def encode_label_cleared(bit: int) -> bytes:
    """CTA_LABELS and its mask for one label bit (0..127) to become 0 and all others to stay.

    The kernel computes old & ~mask ^ labels, word by word. Source: replace_u32 in nf_conntrack_labels.c.
    """
    if not 0 <= bit < LABEL_BITS:
        raise ValueError(f"connection label must be 0..{LABEL_BITS - 1}, not {bit}")
    word_bits = _LABEL_WORD.size * 8
    mask = bytearray(_LABELS_LEN)
    _LABEL_WORD.pack_into(mask, bit // word_bits * _LABEL_WORD.size, 1 << bit % word_bits)
    return attribute(CTA_LABELS, bytes(_LABELS_LEN)) + attribute(CTA_LABELS_MASK, bytes(mask))


def decode_sequence_adjustment(data: bytes | memoryview) -> SequenceAdjustment:
    """From the contents of CTA_SEQ_ADJ_ORIG or _REPLY. Raises DecodeError if one of the three numbers is missing."""
    parts = attributes(data)
    try:
        return SequenceAdjustment(
            _POSITION.unpack(parts[_CTA_SEQADJ_CORRECTION_POS])[0],
            _OFFSET.unpack(parts[_CTA_SEQADJ_OFFSET_BEFORE])[0],
            _OFFSET.unpack(parts[_CTA_SEQADJ_OFFSET_AFTER])[0],
        )
    except (KeyError, struct.error):
        raise DecodeError("incomplete sequence adjustment") from None


def encode_expect_new(master: Tuple, l4proto: L4, zone: int, expectation: Expectation) -> bytes:
    """EXP NEW for a confirmed connection with this tuple of the original direction and this transport.

    Exclusive: without NLM_F_EXCL the kernel says 0 to a request for the tuple of another connection's expectation.
    """
    body = tuples.encode(_CTA_EXPECT_MASTER, master, l4proto) + encode_expectation(expectation)
    if zone:
        body += attribute(_CTA_EXPECT_ZONE, _ZONE.pack(zone))
    flags = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK | netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
    return netlink.message(_EXP_NEW, body, flags=flags, family=_family(master))


def encode_conntrack_update(
    original: Tuple,
    l4proto: L4,
    zone: int,
    *,
    helper: bytes,
    info: bytes | None = None,
    sequence_adjustments: Mapping[Direction, SequenceAdjustment] | None = None,
    clear_label: int | None = None,
) -> bytes:
    """A change of an existing connection, found by its tuple of the original direction; None leaves a thing as it is.

    `helper` is the name of the attached helper, `info` its new private data.
    """
    parts = [tuples.encode(CTA_TUPLE_ORIG, original, l4proto)]
    if zone:
        parts.append(attribute(CTA_ZONE, _ZONE.pack(zone)))
    if info is not None:
        parts.append(encode_help(helper, info))
    for direction, adjustment in (sequence_adjustments or {}).items():
        parts.append(_encode_sequence_adjustment(_SEQUENCE_ADJUSTMENT_ATTRIBUTES[direction], adjustment))
    if clear_label is not None:
        parts.append(encode_label_cleared(clear_label))
    flags = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK
    return netlink.message(_CT_NEW, b"".join(parts), flags=flags, family=_family(original))


def _encode_sequence_adjustment(kind: int, adjustment: SequenceAdjustment) -> bytes:
    return nest(
        kind,
        attribute(_CTA_SEQADJ_CORRECTION_POS, _POSITION.pack(adjustment.pos)),
        attribute(_CTA_SEQADJ_OFFSET_BEFORE, _OFFSET.pack(adjustment.before)),
        attribute(_CTA_SEQADJ_OFFSET_AFTER, _OFFSET.pack(adjustment.after)),
    )


def _family(value: Tuple) -> int:
    return socket.AF_INET if len(value.src) == 4 else socket.AF_INET6


class Client:
    """Requests on a socket that nothing else uses."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._sequence = 0

    def request(self, message: bytes) -> int:
        """Send a request that asks for an acknowledgement; the errno of the kernel's answer, 0 for success.

        The kernel answers within send(), so this never waits; ENOBUFS says that the answer was lost.
        """
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        try:
            self._channel.send(message[:8] + struct.pack("=I", self._sequence) + message[12:])
            while True:
                answer = netlink.answer(self._channel.recv(_ANSWER_LEN, socket.MSG_DONTWAIT))
                if answer is not None and answer[0] == self._sequence:
                    return answer[1]
        except BlockingIOError:
            return errno.ENOBUFS
        except OSError as error:
            return error.errno or errno.EIO
