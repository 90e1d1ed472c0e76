"""Laws of IP packets: what is built is found, and what is edited has right lengths and checksums."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.engine.packet import locate, replace
from tests.examples import many
from tests.packets import TCP, UDP, header_sum, ipv4, ipv6, tcp, transport_sum, udp


class Built(NamedTuple):
    """A packet, and where its parts are because we put them there."""

    packet: bytes
    protocol: int
    transport: int
    payload: bytes

    @property
    def first(self) -> int:
        return len(self.packet) - len(self.payload)


@st.composite
def built(draw: st.DrawFn) -> Built:
    payload = draw(st.binary(max_size=80))
    protocol = draw(st.sampled_from((TCP, UDP)))
    options = draw(_words(40))
    segment = tcp(payload, seq=draw(st.integers(0, 2**32 - 1)), options=options) if protocol == TCP else udp(payload)
    packet = (
        ipv4(protocol, segment, options=draw(_words(40))) if draw(st.booleans()) else draw(_ipv6(protocol, segment))
    )
    return Built(packet, protocol, len(packet) - len(segment), payload)


def _words(most: int) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=most).map(lambda data: data[: len(data) // 4 * 4])


@st.composite
def _ipv6(draw: st.DrawFn, protocol: int, segment: bytes) -> bytes:
    numbers = draw(st.lists(st.sampled_from((0, 43, 44, 51, 60)), max_size=5))
    bodies = {44: st.just(bytes(6)), 51: st.sampled_from((bytes(10), bytes(14), bytes(22)))}
    other = st.sampled_from((6, 14, 30)).flatmap(lambda size: st.binary(min_size=size, max_size=size))
    return ipv6(protocol, segment, extensions=[(number, draw(bodies.get(number, other))) for number in numbers])


@st.composite
def edits(draw: st.DrawFn, length: int) -> list[tuple[int, int, bytes]]:
    places = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    pairs = zip(places[::2], places[1::2], strict=False)
    return [(first, end, draw(st.binary(max_size=9))) for first, end in pairs]


def edited(payload: bytes, wanted: list[tuple[int, int, bytes]]) -> bytes:
    for first, end, text in reversed(wanted):
        payload = payload[:first] + text + payload[end:]
    return payload


@settings(max_examples=many(500), deadline=None)
@given(built(), st.binary(max_size=8))
def test_what_is_built_is_found(it: Built, padding: bytes) -> None:
    segment = locate(it.packet + padding)
    assert segment is not None
    found = (segment.l4proto, segment.transport, segment.payload, segment.end)
    assert found == (it.protocol, it.transport, it.first, len(it.packet))


@settings(max_examples=many(500), deadline=None)
@given(built(), st.data())
def test_a_cut_packet_is_not_found(it: Built, data: st.DataObject) -> None:
    assert locate(it.packet[: data.draw(st.integers(0, len(it.packet) - 1))]) is None


@settings(max_examples=many(500), deadline=None)
@given(built())
def test_without_edits_nothing_changes(it: Built) -> None:
    segment = locate(it.packet)
    assert segment is not None
    assert replace(it.packet, segment, []) == it.packet
    assert replace(memoryview(it.packet), segment, [(0, len(it.payload), it.payload)]) == it.packet


@settings(max_examples=many(500), deadline=None)
@given(built(), st.data())
def test_edits_are_made_and_everything_agrees_with_them(it: Built, data: st.DataObject) -> None:
    segment = locate(it.packet)
    assert segment is not None
    wanted = data.draw(edits(len(it.payload)))
    replaced = replace(it.packet, segment, wanted)
    assert replaced[segment.payload :] == edited(it.payload, wanted)
    assert locate(replaced) == segment._replace(end=len(replaced))
    assert transport_sum(replaced, it.protocol, it.transport) == 0xFFFF
    assert it.packet[0] >> 4 == 6 or header_sum(replaced) == 0xFFFF


@settings(max_examples=many(500), deadline=None)
@given(built(), st.data())
def test_edits_can_be_taken_back(it: Built, data: st.DataObject) -> None:
    segment = locate(it.packet)
    assert segment is not None
    first, end = sorted((data.draw(st.integers(0, len(it.payload))), data.draw(st.integers(0, len(it.payload)))))
    text = data.draw(st.binary(max_size=20))
    replaced = replace(it.packet, segment, [(first, end, text)])
    after = locate(replaced)
    assert after is not None
    assert replace(replaced, after, [(first, first + len(text), it.payload[first:end])]) == it.packet
