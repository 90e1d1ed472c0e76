"""Laws of the engine's codec: any bytes are a packet or refused, and nothing is lost on the way."""

from __future__ import annotations

import contextlib
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.engine import ctnetlink, netlink, nfqueue, tuples
from orchestrator.engine.api import L4, Direction, Tuple
from orchestrator.engine.ctnetlink import SequenceAdjustment
from orchestrator.engine.expectation import PERMANENT, Expectation, Nat, encode_expectation
from orchestrator.engine.netlink import DecodeError
from orchestrator.engine.nfqueue import Change, Decoder, Packet
from tests.examples import many
from tests.unit.test_nfqueue_codec import GOLDEN, golden

MESSAGES = {path.stem: golden(path.stem) for path in sorted(GOLDEN.iterdir())}

ports = st.integers(0, 0xFFFF)
numbers = st.integers(0, 0xFFFFFFFF)
lengths = st.sampled_from((4, 16))
transports = st.sampled_from(L4)


def tuples_of(length: int) -> st.SearchStrategy[Tuple]:
    addresses = st.binary(min_size=length, max_size=length)
    return st.builds(Tuple, addresses, addresses, ports, ports)


def expectations_of(length: int) -> st.SearchStrategy[Expectation]:
    addresses = st.binary(min_size=length, max_size=length)
    return st.builds(
        Expectation,
        tuples_of(length),
        addresses,
        ports,
        transports,
        st.integers(0, 3),
        st.sampled_from((0, PERMANENT)),
        st.just("") | st.from_regex(r"[a-z][a-z0-9-]{0,14}", fullmatch=True),
        st.none() | st.builds(Nat, st.sampled_from(Direction), addresses, ports),
    )


changes = st.builds(
    Change,
    st.none() | st.binary(max_size=32),
    st.none() | lengths.flatmap(expectations_of),
    st.none() | st.binary(max_size=100),
    st.none() | st.integers(0, 127),
    st.booleans(),
)


def decoded(message: bytes, decoder: Decoder) -> Packet | None:
    """None if it is refused."""
    try:
        return decoder.decode(memoryview(message))
    except DecodeError:
        return None


def question(packet: Packet) -> None:
    """Everything that is decoded only when it is asked for."""
    for ask in (packet.flow, packet.zone, *(lambda d=d: packet.sequence_adjustment(d) for d in Direction)):
        with contextlib.suppress(DecodeError):
            ask()


@given(lengths.flatmap(tuples_of), transports, st.integers(1, 30))
def test_a_tuple_is_decoded_as_it_was_encoded(value: Tuple, l4proto: L4, kind: int) -> None:
    ((found, start, end),) = netlink.walk(data := tuples.encode(kind, value, l4proto), 0, len(data))
    assert found == kind
    assert tuples.decode(data[start:end]) == (value, l4proto)


@given(lengths.flatmap(tuples_of), transports, st.binary(max_size=4))
def test_a_tuple_with_more_in_it_is_decoded(value: Tuple, l4proto: L4, zone: bytes) -> None:
    data = tuples.encode(1, value, l4proto)[4:] + netlink.attribute(3, zone)
    assert tuples.decode(data) == (value, l4proto)


@given(numbers, st.integers(-(1 << 31), (1 << 31) - 1), st.integers(-(1 << 31), (1 << 31) - 1))
def test_a_sequence_adjustment_is_decoded_as_it_was_encoded(pos: int, before: int, after: int) -> None:
    adjustment = SequenceAdjustment(pos, before, after)
    tuple_ = Tuple(bytes(4), bytes(4), 0, 0)
    message = ctnetlink.encode_conntrack_update(
        tuple_, L4.TCP, 0, helper=b"x", sequence_adjustments={Direction.ORIGINAL: adjustment}
    )
    data = netlink.attributes(message[netlink.HEADER_LEN :])[ctnetlink.CTA_SEQ_ADJ_ORIG]
    assert ctnetlink.decode_sequence_adjustment(data) == adjustment


@given(lengths.flatmap(expectations_of))
def test_every_expectation_has_a_whole_tuple_and_a_whole_mask(expectation: Expectation) -> None:
    attributes = netlink.attributes(encode_expectation(expectation))
    mask, _ = tuples.decode(attributes[3])
    assert tuples.decode(attributes[2]) == (expectation.tuple, expectation.l4proto)
    assert (mask.src, mask.sport) == (expectation.mask_src, expectation.mask_sport)
    assert (set(mask.dst), mask.dport) == ({0xFF}, 0xFFFF)
    assert struct.unpack(">II", attributes[9] + attributes[8]) == (expectation.policy, expectation.flags)
    assert attributes.get(6, b"\0")[:-1].decode() == expectation.helper
    assert (10 in attributes) == (11 in attributes) == (expectation.nat is not None)


@given(st.sampled_from(sorted(MESSAGES)), st.sampled_from((nfqueue.ACCEPT, nfqueue.STOP)), changes)
def test_a_verdict_says_what_changes_and_no_more(name: str, verdict: int, change: Change) -> None:
    packet = Decoder().decode(memoryview(MESSAGES[name]))
    message = nfqueue.encode_verdict(packet, verdict, change)
    attributes = netlink.attributes(message[netlink.HEADER_LEN :])
    assert struct.unpack_from("=IHH", message) == (len(message), 0x0301, netlink.NLM_F_REQUEST)
    assert attributes.pop(2) == struct.pack(">II", verdict, packet.packet_id)
    assert attributes.pop(10, None) == change.payload
    if change.is_bare and (change.info is None or change != Change(info=change.info, is_bare=True)):
        assert not attributes
        return
    connection = netlink.attributes(attributes.pop(11))
    info = netlink.attributes(connection.get(ctnetlink.CTA_HELP, b"")).get(ctnetlink.CTA_HELP_INFO)
    assert info == change.info
    assert (ctnetlink.CTA_LABELS_MASK in connection) == (change.clear_label is not None)
    expected = attributes.pop(15, None)
    assert expected == (None if change.expectation is None else encode_expectation(change.expectation))
    assert not attributes


@settings(max_examples=many(2000), deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_packet_or_refused(data: bytes) -> None:
    packet = decoded(bytes(4) + b"\0\3" + data, Decoder())
    if packet is not None:
        question(packet)
    nfqueue.identify(memoryview(data))
    netlink.answer(data)


@settings(max_examples=many(2000), deadline=None)
@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_a_damaged_message_means_the_same_to_a_decoder_that_knows_its_layout(name: str, data: st.DataObject) -> None:
    """Unless only a length or type that nobody needs was damaged: then it is refused by the one that looks at it."""
    message = bytearray(MESSAGES[name])
    for position in data.draw(st.lists(st.integers(0, len(message) - 1), min_size=1, max_size=4)):
        message[position] = data.draw(st.integers(0, 255))
    knowing = Decoder()
    knowing.decode(memoryview(MESSAGES[name]))
    fresh = decoded(bytes(message), Decoder())
    known = decoded(bytes(message), knowing)
    assert known == fresh or fresh is None
    if known is not None:
        question(known)


@settings(max_examples=many(500), deadline=None)
@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_a_cut_message_is_refused_or_has_less_payload(name: str, data: st.DataObject) -> None:
    message = MESSAGES[name]
    whole = Decoder().decode(memoryview(message))
    end = data.draw(st.integers(0, len(message) - 1))
    for decoder in (Decoder(), knowing := Decoder()):
        knowing.decode(memoryview(message))
        packet = decoded(message[:end], decoder)
        if packet is not None:
            question(packet)
            assert bytes(whole.payload).startswith(packet.payload)
