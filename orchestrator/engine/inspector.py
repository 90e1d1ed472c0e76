"""From a packet to what is done about it: stream order, private data, NAT, limits. No socket but the one it is given.

Every path ends in a verdict that lets the packet go on: whatever a helper or a payload does, traffic is not stopped.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from zlib import crc32

from orchestrator.engine.api import L4, NOTHING, Answer, Bounds, Direction, Expect, Flow, Helper, Source, Tuple
from orchestrator.engine.ctnetlink import SequenceAdjustment, encode_conntrack_update, encode_expect_new
from orchestrator.engine.expectation import PERMANENT, Expectation, Nat
from orchestrator.engine.guard import announced, ends_of, refusal
from orchestrator.engine.nfqueue import ACCEPT, STOP, Change, Packet
from orchestrator.engine.packet import Segment, locate, replace
from orchestrator.engine.stream import STREAM_STATE_LEN, TOO_LONG, Partials, Stream, distance

# Conntrack status bits. Source: include/uapi/linux/netfilter/nf_conntrack_common.h.
CONFIRMED = 1 << 3

_WRITTEN_MAX = 4096
_PORT_ATTEMPTS = 16
_TEXT_MAX = 255  # its length is remembered in one byte
_LONGEST_PORT = 0xFFFF  # has the most digits in every notation
_PAYLOAD_MAX = 0xFFFF - 4  # what an attribute holds besides its header
_SAME_CONNECTION = 1 << 20  # bytes; further from what came last is another connection that got the same id

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

Edit = tuple[int, int, bytes]
"""Bytes first..end of a payload, and what takes their place."""


class Conntrack(Protocol):
    """Requests to ctnetlink that need an answer before the verdict."""

    def request(self, message: bytes) -> int:
        """Send one request and return the errno of the kernel, 0 for done."""


@dataclass(frozen=True, slots=True)
class Duty:
    """What the inspector serves: registrations by name, within bounds; `label` is the bit that makes rules queue.

    `by_rules` says that rules queue the packets and the registration is disabled; `by_triggers` that only payloads come
    which begin with a trigger, so that a gap before a segment means nothing.
    """

    names: frozenset[bytes]
    bounds: Bounds
    by_rules: bool
    by_triggers: bool = False
    label: int | None = None


@dataclass(slots=True)
class Outcome:
    """What becomes of a packet. `after` are requests for ctnetlink once the verdict was given.

    The rest is for counters and people: the expectations that were made, what was rewritten (old, new), why something
    was refused, and what the helper raised.
    """

    verdict: int
    change: Change | None = None
    after: tuple[bytes, ...] = ()
    made: tuple[Expectation, ...] = ()
    rewritten: tuple[tuple[bytes, bytes], ...] = ()
    refused: tuple[str, ...] = ()
    error: BaseException | None = None


_ACCEPTED = Outcome(ACCEPT)
_STOPPED = Outcome(STOP)


@dataclass(slots=True)
class _Findings:
    """What one packet leads to, gathered while its expectations are made. `expectation` goes with the verdict.

    `is_written` says that ctnetlink has the new private data already.
    """

    expectation: Expectation | None = None
    after: list[bytes] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    made: list[Expectation] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    is_finished: bool = False
    is_written: bool = False
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _Context:
    """A packet with what its helper was given. `start` is where `messages` begin in the payload of the packet.

    It is negative if they began in an earlier segment, and `stream` is None on UDP.
    """

    packet: Packet
    segment: Segment
    stream: Stream | None
    messages: bytes
    start: int
    flow: Flow

    @property
    def is_confirmed(self) -> bool:
        return bool(self.packet.status & CONFIRMED)


class Inspector:
    def __init__(self, helper: Helper, duty: Duty, conntrack: Conntrack) -> None:
        self.helper = helper
        self.duty = duty
        self._conntrack = conntrack
        self._partials = Partials()
        # The private data in a packet is a snapshot of when it was queued: two packets of a connection that wait at
        # the same time both carry what was before the first one's verdict. What we wrote counts until the kernel
        # shows it, or until nothing waits.
        self.written: dict[int, bytes] = {}
        self._adjusted: dict[tuple[int, Direction], SequenceAdjustment] = {}

    def drained(self) -> None:
        """No packet waits that was queued before the last verdict: what the kernel shows is true again."""
        self.written.clear()
        self._adjusted.clear()

    def memory(self) -> dict[str, Any]:
        """All that it knows and the kernel does not, for another inspector; JSON can hold it."""
        return {
            "written": [(ct_id, info.hex()) for ct_id, info in self.written.items()],
            "adjusted": [(*key, *now) for key, now in self._adjusted.items()],
            "partials": self._partials.memory(),
        }

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Take over what another one knew. Raises LookupError, TypeError, ValueError for what is none."""
        for ct_id, info in memory["written"]:
            _put(self.written, int(ct_id), bytes.fromhex(info))
        for ct_id, direction, *now in memory["adjusted"]:
            _put(self._adjusted, (int(ct_id), Direction(direction)), SequenceAdjustment(*map(int, now)))
        self._partials.remember(memory["partials"])

    def inspect(self, packet: Packet) -> Outcome:
        """What to do with a packet; raises nothing for any payload."""
        plain = _STOPPED if self.plain_verdict(packet) == STOP else _ACCEPTED
        segment = locate(packet.payload) if packet.helper in self.duty.names else None
        if segment is None or segment.payload == segment.end:
            return plain
        if segment.l4proto is L4.TCP:
            return self._inspect_tcp(packet, segment, plain)
        return self._inspect_udp(packet, segment, plain)

    def plain_verdict(self, packet: Packet) -> int:
        """The code that lets a packet go on.

        In a hook of ours reinjection adjusts sequence numbers and confirms, and after an ACCEPT the kernel does both
        a second time at the end of the hook. But a first packet, and one without a helper, is confirmed only there.
        """
        if self.duty.by_rules and packet.status & CONFIRMED and packet.helper in self.duty.names:
            return STOP
        return ACCEPT

    # -- transports --------------------------------------------------------------------------------------------------

    def _inspect_tcp(self, packet: Packet, segment: Segment, plain: Outcome) -> Outcome:
        private = self._private(packet, segment.seq)
        if len(private) < STREAM_STATE_LEN + self.helper.private_len:
            return plain  # somebody else's registration: without room for its state a connection is not followed
        stream = Stream(private)
        if stream.is_finished:
            return plain
        direction = packet.direction
        payload = bytes(packet.payload[segment.payload : segment.end])
        gap = stream.offset(direction, segment.seq)
        again = self._rewritten_again(packet, segment, stream, payload) if gap < 0 else []
        if -gap >= len(payload):
            # A retransmission: nothing in it is new, but the receiver must get the bytes that it would have got.
            if not again:
                return plain
            return self._outcome(packet, segment, plain.verdict, _Findings(), private, private, again)
        messages, start, is_lost = self._messages(packet.ct_id, stream, direction, segment.seq, payload, gap)
        own = private[STREAM_STATE_LEN:]
        findings, own = self._ask(packet, segment, stream, messages, start, bytes(len(own)) if is_lost else own)
        if findings.is_finished:
            stream.finish()
        if findings.edits and not self._adjusts(packet, segment, findings, again, stream.pack() + own):
            findings.edits.clear()
            stream.forget()
        return self._outcome(packet, segment, plain.verdict, findings, private, stream.pack() + own, again)

    def _inspect_udp(self, packet: Packet, segment: Segment, plain: Outcome) -> Outcome:
        private = packet.info if not packet.status & CONFIRMED else self._private(packet, None)
        if len(private) < self.helper.private_len:
            return plain
        payload = bytes(packet.payload[segment.payload : segment.end])
        findings, own = self._ask(packet, segment, None, payload, 0, private)
        return self._outcome(packet, segment, plain.verdict, findings, private, own, [])

    def _messages(
        self, ct_id: int, stream: Stream, direction: Direction, seq: int, payload: bytes, gap: int
    ) -> tuple[bytes, int, bool]:
        """The whole messages that end in this segment, where in its payload they begin, and whether some were lost.

        What a helper believes about a conversation must not outlive a part of it that it did not hear.
        """
        delimiter = self.helper.delimiter
        start = max(0, -gap)
        data = payload[start:]
        end_seq = seq + len(payload)
        is_lost = gap > 0 and not self.duty.by_triggers
        is_skipped = is_lost
        if not delimiter:
            stream.advance(direction, end_seq, is_partial=False)
            return data, start, is_lost
        if stream.is_partial(direction) and gap <= 0:
            kept = self._partials.take(ct_id, direction, seq=stream.next_seq[direction])
            is_lost = kept is None
            is_skipped = not kept
            if kept:
                data, start = kept + data, start - len(kept)
        if is_skipped:
            found = data.find(delimiter)
            if found < 0:
                self._partials.keep(ct_id, direction, seq=end_seq, data=TOO_LONG)
                stream.advance(direction, end_seq, is_partial=True)
                return b"", start, is_lost
            data, start = data[found + len(delimiter) :], start + found + len(delimiter)
        found = data.rfind(delimiter)
        end = 0 if found < 0 else found + len(delimiter)
        if end < len(data):
            self._partials.keep(ct_id, direction, seq=end_seq, data=data[end:])
        stream.advance(direction, end_seq, is_partial=end < len(data))
        return data[:end], start, is_lost

    def _private(self, packet: Packet, seq: int | None) -> bytes:
        """The private data as it is now, which a packet that waited need not show. `seq` is TCP's sequence number.

        The id of a connection is the same again when its ports are, soon after it ended; but its numbers begin anew.
        """
        written = self.written.get(packet.ct_id)
        if written is None:
            return packet.info
        is_over = (
            seq is not None
            and not any(packet.info)
            and abs(Stream(written).offset(packet.direction, seq)) > _SAME_CONNECTION
        )
        if is_over or written == packet.info:
            del self.written[packet.ct_id]
        if not is_over:
            return written
        for direction in Direction:
            self._adjusted.pop((packet.ct_id, direction), None)
        return packet.info

    # -- the helper --------------------------------------------------------------------------------------------------

    def _ask(
        self,
        packet: Packet,
        segment: Segment,
        stream: Stream | None,
        messages: bytes,
        start: int,
        own: bytes,
    ) -> tuple[_Findings, bytes]:
        """Findings and the helper's new private data; a helper that raises costs its expectations."""
        findings = _Findings()
        helper, direction = self.helper, packet.direction
        if not messages:
            return findings, own
        try:
            context = _Context(packet, segment, stream, messages, start, packet.flow())
            answer = helper.inspect(messages, direction, context.flow, own[: helper.private_len])
            if answer is NOTHING:
                return findings, own
            own = self._new_private(answer, own)
            findings.is_finished = answer.is_finished
            findings.refused += [answer.refused] if answer.refused else []
            for expect in answer.expects:
                self._expect(context, expect, findings)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (anybody's code, and traffic must not depend on it)
            findings.error = error
        return findings, own

    def _new_private(self, answer: Answer, own: bytes) -> bytes:
        if answer.private is None:
            return own
        if len(answer.private) != self.helper.private_len:
            raise ValueError(f"private data of {len(answer.private)} bytes, not {self.helper.private_len}")
        return answer.private + own[self.helper.private_len :]

    # -- expectations ------------------------------------------------------------------------------------------------

    def _expect(self, context: _Context, expect: Expect, findings: _Findings) -> None:
        """Make one expectation, or note why not."""
        reason = refusal(
            expect,
            context.flow,
            context.packet.direction,
            bounds=self.duty.bounds,
            policies=self.helper.policies,
            payload_len=len(context.messages),
        )
        end = announced(expect, context.flow, context.packet.direction)
        if reason:
            findings.refused.append(reason)
        elif (
            expect.text is not None
            and context.flow.is_nated
            and end.address in ends_of(context.flow, context.packet.direction)  # another host is not translated
        ):
            self._expect_and_rewrite(context, expect, expect.text, findings)
        else:
            self._give(context, _expectation(context, expect, end.port), findings)

    def _give(self, context: _Context, expectation: Expectation, findings: _Findings) -> None:
        """Hand an expectation to the kernel: one goes with the verdict, others through ctnetlink, all in their order.

        ctnetlink finds a connection only once it is confirmed, which a first packet is by its verdict.
        """
        findings.made.append(expectation)
        if findings.expectation is None:
            findings.expectation = expectation
        elif not context.is_confirmed:
            findings.after.append(self._request(context, expectation))
        else:
            earlier, findings.expectation = findings.expectation, expectation
            number = self._conntrack.request(self._request(context, earlier))
            if number:
                findings.made.remove(earlier)
                findings.refused.append(_by_kernel(number))

    def _expect_and_rewrite(
        self, context: _Context, expect: Expect, text: tuple[int, int], findings: _Findings
    ) -> None:
        """Make the expectation that NAT needs, then write where it really is into the payload."""
        first, end = context.start + text[0], context.start + text[1]
        old = context.messages[text[0] : text[1]]
        address = ends_of(context.flow, context.packet.direction)[1]
        port = announced(expect, context.flow, context.packet.direction).port
        reason = self._unwritable(context, first, old, address, findings)
        if reason:
            findings.refused.append(f"it cannot be rewritten: {reason}")
            return
        chosen = self._reserve(context, expect, port, findings)
        if chosen is None:
            return
        new = self.helper.announce(old, address, chosen)
        if new == old:
            return
        findings.edits.append((first, end, new))
        if context.stream is not None:
            context.stream.remember(
                context.packet.direction,
                seq=context.segment.seq + first,
                port=chosen,
                old_len=len(old),
                new_len=len(new),
            )

    def _unwritable(self, context: _Context, first: int, old: bytes, address: bytes, findings: _Findings) -> str:
        """Why an announcement cannot be rewritten; empty if it can."""
        if first < 0:
            return "it began in an earlier segment, which has gone"
        if context.stream is not None and not context.is_confirmed:
            return "the connection is not confirmed yet, so its sequence numbers cannot be adjusted"
        if context.stream is not None and findings.edits:
            return "it is the second one of its segment, and the kernel adjusts for one"
        try:
            length = len(self.helper.announce(old, address, _LONGEST_PORT))
        except ValueError as error:
            return str(error)
        return f"a text of {max(length, len(old))} bytes is too long" if max(length, len(old)) > _TEXT_MAX else ""

    def _reserve(self, context: _Context, expect: Expect, port: int, findings: _Findings) -> int | None:
        """Make the expectation at the announced port, or at another one where that is taken; None if it is refused.

        A verdict does not tell what became of its expectation, so a port that others read must come from ctnetlink.
        """
        if not context.is_confirmed:
            self._give(context, _expectation(context, expect, port), findings)
            return port
        number = 0
        for chosen in _candidates(port, context.packet.ct_id, self.duty.bounds):
            expectation = _expectation(context, expect, chosen)
            number = self._conntrack.request(self._request(context, expectation))
            if not number:
                findings.made.append(expectation)
                return chosen
            if number not in (errno.EEXIST, errno.EBUSY):
                break
        findings.refused.append(_by_kernel(number))
        return None

    def _request(self, context: _Context, expectation: Expectation) -> bytes:
        flow = context.flow
        return encode_expect_new(flow.tuples[0], flow.l4proto, context.packet.zone(), expectation)

    # -- rewriting ---------------------------------------------------------------------------------------------------

    def _rewritten_again(self, packet: Packet, segment: Segment, stream: Stream, payload: bytes) -> list[Edit]:
        """The edit that the remembered text gets in this retransmission, if it is in it.

        A packet that was queued a second time (somebody added a base chain while it waited) holds our own text already.
        """
        direction = packet.direction
        if not stream.rewritten(direction):
            return []
        first = stream.offset_of_text(segment.seq)
        if first < 0 or first + stream.old_len > len(payload):
            return []
        address = ends_of(packet.flow(), direction)[1]
        if self._announces(payload[first : first + stream.new_len], address, stream.port, stream.new_len):
            return []
        old = payload[first : first + stream.old_len]
        try:
            new = self.helper.announce(old, address, stream.port)
        except ValueError:
            return []
        return [(first, first + len(old), new)] if len(new) == stream.new_len else []

    def _announces(self, text: bytes, address: bytes, port: int, length: int) -> bool:
        try:
            return len(text) == length and self.helper.announce(text, address, port) == text
        except ValueError:
            return False

    # -- verdicts ----------------------------------------------------------------------------------------------------

    def _outcome(
        self,
        packet: Packet,
        segment: Segment,
        verdict: int,
        findings: _Findings,
        before: bytes,
        private: bytes,
        again: list[Edit],
    ) -> Outcome:
        """The verdict with all that goes along; `again` are edits that an earlier packet of the same bytes got too."""
        info = private if private != before else None
        if info is not None:
            self._note_written(packet.ct_id, info)
        change = Change(
            info=None if findings.is_written else info,
            expectation=findings.expectation,
            clear_label=self.duty.label if findings.is_finished else None,
        )
        edits = again + findings.edits
        if edits:
            change = change._replace(payload=replace(packet.payload, segment, edits))
        if _growth(edits) and segment.l4proto is L4.TCP:
            change = self._bared(packet, change)
        return Outcome(
            verdict,
            None if change == _NO_CHANGE else change,
            after=tuple(findings.after),
            made=tuple(findings.made),
            rewritten=_texts(packet, segment, edits),
            refused=tuple(findings.refused),
            error=findings.error,
        )

    def _note_written(self, ct_id: int, info: bytes) -> None:
        _put(self.written, ct_id, info)

    def _adjusts(
        self, packet: Packet, segment: Segment, findings: _Findings, again: list[Edit], private: bytes
    ) -> bool:
        """Make the kernel adjust the sequence numbers behind new edits of a TCP payload; False if it does not.

        It would do so by itself for a payload in a verdict with NFQA_CT, and finds the position by reading every packet
        as IPv4 (nf_conntrack_seqadj.c, nf_ct_tcp_seqadj_set; Linux 6.1 to 7.3): on IPv6 the connection is reset.
        `private`, the new private data, goes in the same request, as the verdict then has no place for it.
        """
        growth = _growth(findings.edits)
        if len(packet.payload) + growth + _growth(again) > _PAYLOAD_MAX:
            findings.refused.append("it cannot be rewritten: the packet would be too long")
            return False
        if not growth:
            return True
        if packet.is_looped:  # a registration queues it twice, before and after its numbers are adjusted
            findings.refused.append("it cannot be rewritten: on loopback a payload keeps its length")
            return False
        key = packet.ct_id, packet.direction
        now = self._adjusted.get(key) or packet.sequence_adjustment(packet.direction)
        then = _adjustment(now, segment.seq, segment.seq + findings.edits[0][0], growth)
        number = self._update(packet, info=private, sequence_adjustments={packet.direction: then})
        if number:
            findings.refused.append(_by_kernel(number))
            return False
        findings.is_written = True
        _put(self._adjusted, key, then)
        return True

    def _bared(self, packet: Packet, change: Change) -> Change:
        """The verdict for a TCP payload of another length: without NFQA_CT, so that nothing is adjusted twice."""
        if change.info is not None or change.clear_label is not None:
            self._update(packet, info=change.info, clear_label=change.clear_label)
        if change.expectation is not None:
            flow = packet.flow()
            message = encode_expect_new(flow.tuples[0], flow.l4proto, packet.zone(), change.expectation)
            self._conntrack.request(message)
        return Change(payload=change.payload, is_bare=True)

    def _update(
        self,
        packet: Packet,
        *,
        info: bytes | None = None,
        sequence_adjustments: dict[Direction, SequenceAdjustment] | None = None,
        clear_label: int | None = None,
    ) -> int:
        """Change the connection of a packet through ctnetlink; the errno of the kernel."""
        flow = packet.flow()
        return self._conntrack.request(
            encode_conntrack_update(
                flow.tuples[0],
                flow.l4proto,
                packet.zone(),
                helper=packet.helper,
                info=info,
                sequence_adjustments=sequence_adjustments or {},
                clear_label=clear_label,
            )
        )


def _adjustment(now: SequenceAdjustment, seq: int, text_seq: int, growth: int) -> SequenceAdjustment:
    """What the kernel must add to sequence numbers after a text at `text_seq` in a payload at `seq` grew.

    It keeps one position, ours is that of the text: a packet that begins there or before goes on with what was added
    before. That holds too for a retransmission of an earlier text that has this one behind it.
    """
    if now.before == now.after or distance(seq, now.pos) > 0:
        return SequenceAdjustment(text_seq % 2**32, now.after, now.after + growth)
    return SequenceAdjustment(now.pos, now.before, now.after + growth)


def _put(table: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Enter a value as the newest; the oldest makes room."""
    table.pop(key, None)
    if len(table) >= _WRITTEN_MAX:
        del table[next(iter(table))]
    table[key] = value


_NO_CHANGE = Change()


def _expectation(context: _Context, expect: Expect, port: int) -> Expectation:
    """What the kernel is to expect: a connection from the peer to the sender of the packet, as the peer sees it.

    Under NAT it gets the translation of its master; `port` may differ there from the one that was announced.
    """
    direction, flow = context.packet.direction, context.flow
    end = announced(expect, flow, direction)
    own, seen = ends_of(flow, direction)
    peer = flow.tuples[direction.opposite].src
    is_own = end.address in (own, seen)
    return Expectation(
        tuple=Tuple(
            src=peer if expect.source is Source.PEER else bytes(len(peer)),
            dst=seen if is_own else end.address,
            sport=expect.source_port,
            dport=flow.tuples[direction.opposite].dport if expect.port is None else port,
        ),
        mask_src=b"\xff" * len(peer) if expect.source is Source.PEER else bytes(len(peer)),
        mask_sport=0xFFFF if expect.source_port else 0,
        l4proto=expect.l4proto,
        policy=expect.policy,
        flags=PERMANENT if expect.is_permanent else 0,
        helper=expect.helper,
        nat=Nat(direction.opposite, bytes(len(peer)), end.port) if flow.is_nated and is_own else None,
    )


def _candidates(port: int, ct_id: int, bounds: Bounds) -> Iterator[int]:
    """The announced port, then others that are hard to guess and, for one connection and port, always the same."""
    yield port
    first, count = bounds.first_port, bounds.last_port - bounds.first_port + 1
    for attempt in range(1, _PORT_ATTEMPTS):
        yield first + crc32(b"%d/%d/%d" % (ct_id, port, attempt)) % count


def _by_kernel(number: int) -> str:
    return f"the kernel refused it: {errno.errorcode.get(number, number)}"


def _growth(edits: Sequence[Edit]) -> int:
    return sum(len(new) - (end - first) for first, end, new in edits)


def _texts(packet: Packet, segment: Segment, edits: Sequence[Edit]) -> tuple[tuple[bytes, bytes], ...]:
    at = segment.payload
    return tuple((bytes(packet.payload[at + first : at + end]), new) for first, end, new in edits)
