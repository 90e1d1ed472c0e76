"""Law of the short way: with lanes and without, every packet gets the same verdict, and the same is remembered."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engine.api import L4, Bounds, Direction, Helper, Tuple
from orchestrator.engine.counters import Counters
from orchestrator.engine.inspector import Duty, Inspector
from orchestrator.engine.lane import Lanes
from orchestrator.engine.nfqueue import Decoder, encode_verdict
from orchestrator.helpers.ftp import Ftp
from orchestrator.helpers.tftp import Tftp
from tests.router import CLIENT, CLIENT6, CONFIRMED, NAME, OUTSIDE, SEEN_REPLY, SERVER, SERVER6, Router

C, S = Direction.ORIGINAL, Direction.REPLY
TUPLES = {
    "ip": (Tuple(CLIENT, SERVER, 50000, 21), Tuple(SERVER, CLIENT, 21, 50000)),
    "snat": (Tuple(CLIENT, SERVER, 50000, 21), Tuple(SERVER, OUTSIDE, 21, 60000)),
    "ip6": (Tuple(CLIENT6, SERVER6, 50000, 21), Tuple(SERVER6, CLIENT6, 21, 50000)),
}
LINES = (
    *((C, b"NOOP\r\n"), (C, b"PORT 10,0,0,1,156,64\r\n"), (C, b"PORT 10,0,0,1,0,64\r\n"), (C, b"PASV\r\n")),
    *((C, b"EPRT |2|fd00:1::1|40001|\r\n"), (C, b"EPSV\r\n"), (C, b"EPSV ALL\r\n"), (C, b"AUTH TLS\r\n")),
    *((C, b"PORT 10,0,0,9,156,64\r\n"), (C, b"USER x\r\nPORT 10,0,0,1,156,65\r\nPORT 10,0,0,1,156,66\r\n")),
    *((S, b"200 ok\r\n"), (S, b"227 Entering (10,0,0,2,78,32)\r\n"), (S, b"229 ok (|||30001|)\r\n")),
    *(
        (S, b"234 go\r\n"),
        (S, b"211-two\r\n"),
        (S, b"211 lines\r\n"),
        (S, b"  text\r\n"),
        (S, b"\xff\0\r\n"),
        (C, b""),
        (S, b""),
    ),
)
DATAGRAMS = (b"\0\1file\0octet\0", b"\0\2x\0netascii\0", b"\0\1file", b"\0\4\0\1", b"\0\3\0\1data", b"", b"\0")


@dataclass
class Replayed:
    """Answers of ctnetlink that were given before."""

    answers: list[int] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)

    def request(self, message: bytes) -> int:
        self.requests.append(message)
        return self.answers.pop(0)


class Noted(Router):
    """A router that hands the answers of its ctnetlink on."""

    replayed: Replayed

    def request(self, message: bytes) -> int:
        number = super().request(message)
        self.replayed.answers.append(number)
        return number


class Both:
    """A router, and beside it an inspector with lanes that is asked the same."""

    def __init__(self, helper: Helper, duty: Duty, tuples: tuple[Tuple, Tuple], **more: object) -> None:
        self.router = Noted(helper, duty, tuples, **more)  # type: ignore[arg-type]
        self.router.replayed = self.replayed = Replayed()
        self.inspector = Inspector(helper, duty, self.replayed)
        self.counters = Counters()
        self.lanes = Lanes(self.inspector, self.counters)
        self.decode = Decoder().decode
        self.quick = 0

    def answer(self, message: bytes) -> None:
        router, view = self.router, memoryview(message)
        packet = router.decoder.decode(view)
        router.answer(packet)
        outcome = router.outcomes[-1]
        verdict = encode_verdict(packet, outcome.verdict, outcome.change)
        assert self.answer_with_lanes(view) == verdict
        assert self.inspector.written == router.inspector.written
        assert self.counters.expectations == sum(len(outcome.made) for outcome in router.outcomes)
        assert self.replayed.requests == router.requests

    def answer_with_lanes(self, message: memoryview) -> bytes:
        verdict = self.lanes.answer(message)
        if verdict is not None:
            self.quick += 1
            return verdict
        packet = self.decode(message)
        outcome = self.inspector.inspect(packet)
        self.counters.expectations += len(outcome.made)
        self.lanes.learn(message, packet)
        return encode_verdict(packet, outcome.verdict, outcome.change)

    def drained(self) -> None:
        self.router.inspector.drained()
        self.inspector.drained()


def both(name: str, *, by_rules: bool, by_triggers: bool = False, **more: object) -> Both:
    duty = Duty(frozenset({NAME}), Bounds(), by_rules=by_rules, by_triggers=by_triggers, label=70 if by_rules else None)
    return Both(Ftp(), duty, TUPLES[name], **more)


@given(
    st.sampled_from(sorted(TUPLES)),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from(LINES), max_size=40),
    st.data(),
)
def test_sessions_in_any_disorder(
    name: str,
    by_rules: bool,  # noqa: FBT001
    by_triggers: bool,  # noqa: FBT001
    lines: list[tuple[Direction, bytes]],
    data: st.DataObject,
) -> None:
    one = both(name, by_rules=by_rules, by_triggers=by_triggers)
    next_seq = {C: 2**32 - 40, S: 1000}
    waiting: list[bytes] = []
    for direction, line in lines:
        length = data.draw(st.sampled_from([len(line)] * 6 + [max(1, len(line) // 2)]))
        shift = data.draw(st.sampled_from([0] * 12 + [-8, 8]))
        payload = line[:length] if data.draw(st.integers(0, 5)) == 0 else line
        waiting.append(one.router.message(direction, next_seq[direction] + shift, payload))
        next_seq[direction] += shift + len(payload)
        if data.draw(st.integers(0, 3)):
            for message in waiting:
                one.answer(message)
            waiting.clear()
            if data.draw(st.booleans()):
                one.drained()


@given(st.lists(st.tuples(st.sampled_from(Direction), st.sampled_from(DATAGRAMS)), max_size=20), st.booleans())
def test_datagrams(packets: list[tuple[Direction, bytes]], by_rules: bool) -> None:  # noqa: FBT001
    duty = Duty(frozenset({NAME}), Bounds(), by_rules=by_rules)
    for tuples in TUPLES.values():
        one = Both(Tftp(), duty, tuples, l4proto=L4.UDP)
        for direction, payload in packets:
            one.answer(one.router.message(direction, 0, payload))


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3), st.sampled_from([LINES[0], LINES[1], LINES[10]]))
def test_a_damaged_packet_is_read_as_without_lanes(at: int, junk: bytes, line: tuple[Direction, bytes]) -> None:
    one = both("ip", by_rules=True)
    next_seq = {C: 1, S: 1}
    for direction, text in (LINES[0], LINES[10], LINES[1], LINES[10], line):
        whole = one.router.message(direction, next_seq[direction], text)
        next_seq[direction] += len(text)
        if text is not line[1]:
            one.answer(whole)
    first = len(whole) - 40 - len(line[1]) + at % 41
    view = memoryview(whole[:first] + junk + whole[first + len(junk) :])
    packet = one.router.decoder.decode(view)
    outcome = one.router.inspector.inspect(packet)
    assert one.answer_with_lanes(view) == encode_verdict(packet, outcome.verdict, outcome.change)


@pytest.mark.parametrize("name", sorted(TUPLES))
@pytest.mark.parametrize("by_rules", [True, False])
def test_a_session_takes_the_short_way(name: str, by_rules: bool) -> None:  # noqa: FBT001
    one = both(name, by_rules=by_rules)
    seqs = {C: 1, S: 1}
    for direction, line in 10 * ((C, b"NOOP\r\n"), (S, b"200 ok\r\n"), (C, b"EPSV\r\n"), (S, b"229 (|||30001|)\r\n")):
        one.answer(one.router.message(direction, seqs[direction], line))
        seqs[direction] += len(line)
    # The first packet of each direction opens its lane. Under NAT every expectation goes the general way, and the first
    # one changes what the kernel says of the connection.
    assert one.quick == (30 - 2 - 2 if name == "snat" else 40 - 2)


def test_a_first_packet_opens_no_lane() -> None:
    one = both("ip", by_rules=True, status=SEEN_REPLY)
    for number in range(3):
        one.answer(one.router.message(C, 1 + 6 * number, b"NOOP\r\n"))
    assert one.quick == 0
    one.router.status |= CONFIRMED
    for number in range(3, 6):
        one.answer(one.router.message(C, 1 + 6 * number, b"NOOP\r\n"))
    assert one.quick == 2
