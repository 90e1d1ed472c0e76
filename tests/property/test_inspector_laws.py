"""Laws of the inspector over whole sessions: cuts, losses, repetitions, restarts and NAT change nothing that counts."""

from __future__ import annotations

import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engine.api import L4, Bounds, Direction, Tuple
from orchestrator.engine.inspector import Duty
from orchestrator.engine.nfqueue import ACCEPT, STOP
from orchestrator.engine.stream import distance
from orchestrator.helpers.ftp import Ftp
from orchestrator.helpers.tftp import Tftp
from tests.router import CLIENT, CLIENT6, CONFIRMED, NAME, OUTSIDE, OUTSIDE6, SERVER, SERVER6, Router

C, S = Direction.ORIGINAL, Direction.REPLY
Turn = tuple[Direction, bytes]

SESSION: tuple[Turn, ...] = (
    (S, b"220-Welcome\r\n227 Entering Passive Mode (10,0,0,2,9,9)\r\n220 ready\r\n"),
    (C, b"USER anonymous\r\n"),
    (S, b"331 go on\r\n"),
    (C, b"PORT 10,0,0,1,156,64\r\n"),
    (S, b"200 ok\r\n"),
    (C, b"NOOP\r\nPASV\r\n"),
    (S, b"200 ok\r\n227 Entering Passive Mode (10,0,0,2,78,32).\r\n"),
    (C, b"EPSV\r\n"),
    (S, b"229 Entering Extended Passive Mode (|||30001|)\r\n"),
    (C, b"EPRT |1|10.0.0.1|40001|\r\n"),
    (S, b"200 ok\r\n"),
)
PORTS = {40000, 20000, 30001, 40001}
SESSION6: tuple[Turn, ...] = (
    (S, b"220 ready\r\n"),
    (C, b"EPRT |2|fd00:1::1|40001|\r\n"),
    (S, b"200 ok\r\n"),
    (C, b"EPSV\r\n"),
    (S, b"229 ok (|||30001|)\r\n"),
)

PLAIN = (Tuple(CLIENT, SERVER, 50000, 21), Tuple(SERVER, CLIENT, 21, 50000))
SNAT = (Tuple(CLIENT, SERVER, 50000, 21), Tuple(SERVER, OUTSIDE, 21, 60000))
DNAT = (Tuple(CLIENT, OUTSIDE, 50000, 21), Tuple(SERVER, CLIENT, 21, 50000))
PLAIN6 = (Tuple(CLIENT6, SERVER6, 50000, 21), Tuple(SERVER6, CLIENT6, 21, 50000))
SNAT6 = (Tuple(CLIENT6, SERVER6, 50000, 21), Tuple(SERVER6, OUTSIDE6, 21, 60000))
STARTS = {C: 2**32 - 30, S: 1000}
"""Sequence numbers of the first bytes; the client's wrap in the middle of the session."""


def router(tuples: tuple[Tuple, Tuple] = PLAIN, *, by_rules: bool = True, **more: object) -> Router:
    duty = Duty(names=frozenset({NAME}), bounds=Bounds(), by_rules=by_rules, label=70 if by_rules else None)
    return Router(Ftp(), duty, tuples, **more)  # type: ignore[arg-type]


def segments(turns: tuple[Turn, ...], cuts: list[int] | None = None) -> list[tuple[Direction, int, bytes]]:
    """The turns as segments with sequence numbers; `cuts` are lengths, taken in turn, into which a turn is cut."""
    at = dict(STARTS)
    found = []
    lengths = list(cuts or [])
    for direction, data in turns:
        while data:
            length = min(len(data), lengths.pop(0)) if lengths else len(data)
            found.append((direction, at[direction], data[:length]))
            at[direction] += length
            data = data[length:]
    return found


def ports_of(one: Router) -> list[int]:
    return [e.tuple.dport for outcome in one.outcomes for e in outcome.made]


def test_a_session_makes_the_expectations_that_it_announces() -> None:
    one = router()
    for segment in segments(SESSION):
        one.send(*segment)
    assert ports_of(one) == [40000, 20000, 30001, 40001]
    active, passive, *_ = one.expectations
    assert (active.tuple, active.mask_src, active.mask_sport) == (Tuple(SERVER, CLIENT, 0, 40000), b"\xff" * 4, 0)
    assert passive.tuple == Tuple(CLIENT, SERVER, 0, 20000)
    assert all((e.l4proto, e.policy, e.flags, e.nat) == (L4.TCP, 0, 0, None) for e in one.expectations)
    assert not any(outcome.rewritten or outcome.refused or outcome.error for outcome in one.outcomes)


@given(st.lists(st.integers(1, 30), max_size=120))
def test_cutting_segments_changes_nothing(cuts: list[int]) -> None:
    one = router()
    for segment in segments(SESSION, cuts):
        assert one.send(*segment) == segment[2]
    assert ports_of(one) == [40000, 20000, 30001, 40001]


@given(st.lists(st.integers(1, 30), max_size=120), st.data())
def test_retransmissions_add_nothing(cuts: list[int], data: st.DataObject) -> None:
    one = router()
    sent: list[tuple[Direction, int, bytes]] = []
    for segment in segments(SESSION, cuts):
        one.send(*segment)
        sent.append(segment)
        if data.draw(st.booleans()):
            direction, seq, payload = data.draw(st.sampled_from(sent))
            one.send(direction, seq, payload)
    assert ports_of(one) == [40000, 20000, 30001, 40001]


@given(st.lists(st.integers(1, 30), max_size=120), st.data())
def test_a_coalesced_retransmission_is_read_from_where_it_is_new(cuts: list[int], data: st.DataObject) -> None:
    one = router()
    last: dict[Direction, bytes] = {C: b"", S: b""}
    for direction, seq, payload in segments(SESSION, cuts):
        back = data.draw(st.integers(0, len(last[direction])))
        again = last[direction][len(last[direction]) - back :]
        one.send(direction, seq - back, again + payload)
        last[direction] += payload
    assert ports_of(one) == [40000, 20000, 30001, 40001]


@given(st.lists(st.integers(1, 30), max_size=120), st.randoms(use_true_random=False))
def test_losing_and_reordering_never_makes_a_wrong_expectation(cuts: list[int], random: object) -> None:
    """Segments that pass unseen, or in another order, may cost an expectation; they never invent one."""
    one = router()
    order = segments(SESSION, cuts)
    order = [s for s in order if random.random() < 0.8]  # type: ignore[attr-defined]
    for i in range(0, len(order) - 1, 2):  # neighbours change places: nothing arrives minutes late
        if random.random() < 0.3:  # type: ignore[attr-defined]
            order[i], order[i + 1] = order[i + 1], order[i]
    for segment in order:
        one.send(*segment)
    assert set(ports_of(one)) <= PORTS


@pytest.mark.parametrize("at", range(len(SESSION)))
def test_another_process_goes_on_where_the_first_one_died(at: int) -> None:
    one = router()
    for i, segment in enumerate(segments(SESSION)):
        if i == at:
            one.restart()
        one.send(*segment)
    assert ports_of(one) == [40000, 20000, 30001, 40001]


@given(st.lists(st.integers(1, 30), max_size=120), st.integers(0, 200))
def test_a_restart_anywhere_costs_at_most_the_message_that_it_cut(cuts: list[int], at: int) -> None:
    one = router()
    for i, segment in enumerate(segments(SESSION, cuts)):
        if i == at:
            one.restart()
        one.send(*segment)
    found = ports_of(one)
    assert set(found) <= PORTS
    # PASV and its answer, or EPSV and its answer, are two messages: losing the first costs the second.
    assert len(found) >= len(PORTS) - 1


@given(st.lists(st.integers(1, 30), max_size=120), st.sets(st.integers(0, 200)))
@pytest.mark.parametrize("waits", [False, True], ids=["one by one", "waiting together"])
def test_handing_over_anywhere_changes_nothing(waits: bool, cuts: list[int], places: set[int]) -> None:  # noqa: FBT001
    """Also while packets wait that show private data of before the last verdict, and in the middle of a message."""
    one, other = router(SNAT), router(SNAT)
    parts = segments(SESSION, cuts)
    packets = [(one.queue(*part), other.queue(*part)) for part in parts] if waits else []
    for place, part in enumerate(parts):
        if place in places:
            other.hand_over()
        if waits:
            one.answer(packets[place][0])
            other.answer(packets[place][1])
        else:
            assert one.send(*part) == other.send(*part)
    assert one.outcomes == other.outcomes
    assert one.expectations == other.expectations


def test_what_a_helper_believes_ends_with_a_part_that_it_did_not_hear() -> None:
    """The end of a multi-line reply passes unseen; without it all later replies would be text of that one."""
    one = router()
    one.send(S, 1, b"230-all that follows is text\r\n227 (10,0,0,2,9,9)\r\n")
    one.send(C, 1, b"NOOP\r\n")
    one.send(S, 100, b"...\r\n200 ok\r\n")
    one.send(C, 7, b"PASV\r\n")
    one.send(S, 113, b"227 Entering Passive Mode (10,0,0,2,78,32)\r\n")
    assert ports_of(one) == [20000]


def test_packets_that_wait_together_are_read_as_one_after_the_other() -> None:
    """Each shows the private data of before the first one's verdict."""
    one = router()
    waiting = [one.queue(*segment) for segment in segments(SESSION, [7] * 60)]
    for packet in waiting:
        one.answer(packet)
    assert ports_of(one) == [40000, 20000, 30001, 40001]


def test_verdicts_in_both_modes() -> None:
    for by_rules, confirmed in ((True, STOP), (False, ACCEPT)):
        one = router(by_rules=by_rules)
        one.send(C, 1, b"NOOP\r\n")
        one.status = 2
        one.send(C, 7, b"NOOP\r\n")
        assert [outcome.verdict for outcome in one.outcomes] == [confirmed, ACCEPT]


# -- NAT -------------------------------------------------------------------------------------------------------------


def announced(text: bytes) -> tuple[bytes, int] | int | None:
    """The endpoint in a line of the receiver, read by other code than ours."""
    comma = re.search(rb"(\d+),(\d+),(\d+),(\d+),(\d+),(\d+)", text)
    if comma:
        numbers = [int(n) for n in comma.groups()]
        return bytes(numbers[:4]), numbers[4] * 256 + numbers[5]
    extended = re.search(rb"\|([12])\|([^|]+)\|(\d+)\|", text)
    if extended:
        family = socket.AF_INET if extended[1] == b"1" else socket.AF_INET6
        return socket.inet_pton(family, extended[2].decode()), int(extended[3])
    short = re.search(rb"\|\|\|(\d+)\|", text)
    return int(short[1]) if short else None


@pytest.mark.parametrize(
    ("tuples", "session"), [(SNAT, SESSION), (DNAT, SESSION), (SNAT6, SESSION6)], ids=["snat", "dnat", "snat6"]
)
@pytest.mark.parametrize("taken", [set[int](), PORTS], ids=["free", "taken"])
def test_under_nat_the_receiver_reads_what_is_expected(
    tuples: tuple[Tuple, Tuple], session: tuple[Turn, ...], taken: set[int]
) -> None:
    one = router(tuples, taken_ports=set(taken))
    for direction, seq, payload in segments(session):
        arrived = one.send(direction, seq, payload)
        made = one.outcomes[-1].made
        endpoint = announced(arrived[-60:]) if made else None
        for expectation in made:
            address, port = endpoint if isinstance(endpoint, tuple) else (expectation.tuple.dst, endpoint)
            assert (expectation.tuple.dst, expectation.tuple.dport) == (address, port)
            assert expectation.tuple.dst == tuples[direction.opposite].dst
            assert expectation.tuple.src == tuples[direction.opposite].src
            assert expectation.nat is not None
            assert expectation.nat.direction is direction.opposite
            assert expectation.nat.port in PORTS
    assert len(ports_of(one)) == (4 if session is SESSION else 2)
    assert not taken or not set(ports_of(one)) & taken


@pytest.mark.parametrize("tuples", [SNAT, SNAT6], ids=["ip", "ip6"])
def test_a_retransmission_of_rewritten_text_gets_the_same_bytes(tuples: tuple[Tuple, Tuple]) -> None:
    session = SESSION if tuples is SNAT else SESSION6
    line = next(s for s in segments(session) if s[2].startswith((b"PORT", b"EPRT")))
    one = router(tuples, taken_ports=set(PORTS))
    first = one.send(*line)
    assert first != line[2]
    adjustments = dict(one.adjustments)
    one.restart()
    count = len(one.requests)
    assert one.send(*line) == first
    assert one.send(line[0], line[1] - 6, b"NOOP\r\n" + line[2]) == b"NOOP\r\n" + first
    assert one.send(line[0], line[1], line[2] + b"NOOP\r\n") == first + b"NOOP\r\n"
    assert len(ports_of(one)) == 1
    assert one.adjustments == adjustments
    assert not [r for r in one.requests[count:] if r[5] == 2], "no second expectation"


@given(st.data())
def test_the_receiver_gets_one_stream_whatever_is_sent_again(data: st.DataObject) -> None:
    """Every byte that arrives twice is the same, and nothing is missing: with it go all lengths and positions.

    Retransmissions reach back to the last rewritten line: the kernel remembers one position, and so do we.
    """
    one = router(SNAT, taken_ports=data.draw(st.sets(st.sampled_from([40000, 40001]))))
    commands = (b"NOOP", b"PORT 10,0,0,1,156,64", b"PORT 10,0,0,1,156,65")
    lines = [line + b"\r\n" for line in data.draw(st.lists(st.sampled_from(commands), max_size=12))]
    start = seq = data.draw(st.sampled_from([1000, 2**32 - 20]))
    received: dict[int, int] = {}
    since: list[bytes] = []  # lines from the last rewritten one on
    for line in lines:
        again = since[data.draw(st.integers(0, len(since))) :]
        sent = b"".join(again)
        # Of an old and a new announcement in one segment the kernel can adjust only one: nobody sends that.
        new_too = data.draw(st.booleans()) and not (b"PORT" in sent and b"PORT" in line)
        for at, payload in ((seq - len(sent), sent + line * new_too), (seq, line * (not new_too))):
            if payload:
                arrived = one.send(C, at, payload)
                first = distance(one.adjusted(C, at % 2**32), start)
                for offset, byte in enumerate(arrived, first):
                    assert received.setdefault(offset, byte) == byte
        since = [line] if line.startswith(b"PORT") else [*since, line]
        seq += len(line)
    assert sorted(received) == list(range(len(received)))
    text = bytes(received[i] for i in range(len(received)))
    assert [announced(t) for t in text.splitlines() if t.startswith(b"PORT")] == [
        (OUTSIDE, port) for port in ports_of(one)
    ]


def test_our_own_output_is_left_alone_when_it_is_queued_a_second_time() -> None:
    one = router(SNAT)
    seq = 100
    arrived = one.send(C, seq, b"PORT 10,0,0,1,156,64\r\n")
    assert one.send(C, seq, arrived) == arrived
    assert len(ports_of(one)) == 1


@pytest.mark.parametrize("tuples", [SNAT, SNAT6], ids=["ip", "ip6"])
def test_a_resized_payload_is_adjusted_through_ctnetlink_alone(tuples: tuple[Tuple, Tuple]) -> None:
    one = router(tuples)
    session = SESSION if tuples is SNAT else SESSION6
    (direction, seq, line), *_ = [s for s in segments(session) if s[2].startswith((b"PORT", b"EPRT"))]
    arrived = one.send(direction, seq, line)
    growth = len(arrived) - len(line)
    assert growth
    change = one.outcomes[-1].change
    assert change is not None
    assert change.is_bare
    assert (change.info, change.expectation, change.clear_label) == (None, None, None)
    text = line.index(b"10,") if tuples is SNAT else line.index(b"|")
    assert one.adjustments[C] == ((seq + text) % 2**32, 0, growth)
    assert one.info != bytes(len(one.info)), "the private data went along"
    assert len(one.requests) == 2, "one for the expectation, one for all the rest"
    second = seq + len(line)
    total = growth + len(one.send(direction, second, line)) - len(line)
    assert one.adjustments[C] == ((second + text) % 2**32, growth, total)
    # A retransmission with new bytes after it: its header counts as before, what follows it grows once more.
    total += len(one.send(direction, second, line + line)) - 2 * len(line) - (total - growth)
    assert one.adjustments[C] == ((second + text) % 2**32, growth, total)


def test_an_announcement_whose_beginning_has_gone_is_not_rewritten() -> None:
    one = router(SNAT)
    one.send(C, 1, b"PORT 10,0,0,")
    assert one.send(C, 13, b"1,156,64\r\n") == b"1,156,64\r\n"
    assert ports_of(one) == []
    assert any("began in an earlier segment" in reason for outcome in one.outcomes for reason in outcome.refused)


def test_a_host_behind_nat_may_announce_its_outer_address() -> None:
    """As servers are configured to do; the kernel's helper expects nothing then."""
    one = router(DNAT)
    one.send(C, 1, b"PASV\r\n")
    line = b"227 Entering Passive Mode (192,0,2,1,78,32)\r\n"
    assert one.send(S, 1, line) == line
    (expectation,) = one.outcomes[-1].made
    assert expectation.tuple == Tuple(CLIENT, OUTSIDE, 0, 20000)
    assert expectation.nat is not None
    assert expectation.nat.port == 20000


# -- the end of inspection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_rules", [True, False])
def test_nothing_is_read_after_tls_began(by_rules: bool) -> None:  # noqa: FBT001
    one = router(by_rules=by_rules)
    one.send(C, 1, b"AUTH TLS\r\n")
    one.send(S, 1, b"234 go on\r\n")
    assert one.is_labelled is not by_rules
    one.restart()
    one.send(C, 11, b"PORT 10,0,0,1,156,64\r\n")
    assert ports_of(one) == []


# -- what somebody might try ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "command", "reply"),
    [
        ((S, b"211-what you uploaded:\r\n"), b"PASV\r\n", b"227 (10,0,0,2,12,234)\r\n211 End\r\n"),
        ((C, b"EPSV ALL\r\n"), b"PORT 10,0,0,1,156,64\r\n", b"200 ok\r\n"),
    ],
    ids=["open-reply", "epsv-all"],
)
def test_a_line_that_is_too_long_makes_nothing_forgotten(first: Turn, command: bytes, reply: bytes) -> None:
    one = router()
    for segment in segments((first, (C, b"X" * 600), (C, b"\r\n" + command), (S, reply))):
        one.send(*segment)
    assert ports_of(one) == []


def test_of_two_announcements_in_a_segment_only_one_is_rewritten() -> None:
    """The kernel adjusts for one, and one can be remembered for a retransmission."""
    one = router(SNAT)
    lines = b"PORT 10,0,0,1,156,64\r\nPORT 10,0,0,1,156,65\r\n"
    arrived = one.send(C, 1, lines)
    assert ports_of(one) == [40000]
    assert any("second one of its segment" in reason for reason in one.outcomes[-1].refused)
    assert one.send(C, 1, lines) == arrived


def test_a_payload_keeps_its_length_where_the_kernel_does_not_adjust() -> None:
    one = router(SNAT, refuses_updates=True)
    line = b"PORT 10,0,0,1,156,64\r\n"
    assert one.send(C, 1, line) == line
    assert any("ENOENT" in reason for reason in one.outcomes[-1].refused)
    assert one.send(C, 1, line) == line, "and nothing of it is remembered"


@pytest.mark.parametrize(
    ("tuples", "session"), [(SNAT, SESSION), (DNAT, SESSION), (SNAT6, SESSION6)], ids=["snat", "dnat", "snat6"]
)
@pytest.mark.parametrize("by_rules", [True, False], ids=["rules", "registration"])
def test_on_loopback_a_payload_keeps_its_length(
    tuples: tuple[Tuple, Tuple],
    session: tuple[Turn, ...],
    by_rules: bool,  # noqa: FBT001
) -> None:
    """Where that takes no other length, it is rewritten; else it is refused, and that is told."""
    one, elsewhere = (router(tuples, by_rules=by_rules, device=device) for device in (1, 2))
    refused = 0
    for direction, seq, payload in segments(session):
        arrived, rewritten = one.send(direction, seq, payload), elsewhere.send(direction, seq, payload)
        is_resized = len(rewritten) != len(payload)
        assert arrived == (payload if is_resized else rewritten)
        assert any("on loopback" in reason for reason in one.outcomes[-1].refused) == is_resized
        assert one.send(direction, seq, payload) == arrived, "and so again"
        refused += is_resized
    assert refused
    assert one.adjustments == {}


def test_an_unconfirmed_connection_is_not_rewritten() -> None:
    """Conntrack was flushed, and a PORT is the first packet that it sees: ctnetlink does not find it yet."""
    one = router(SNAT)
    one.status &= ~CONFIRMED
    line = b"PORT 10,0,0,1,156,64\r\n"
    assert one.send(C, 1, line) == line
    assert ports_of(one) == []


def test_another_host_that_a_profile_allows_is_announced_as_it_is() -> None:
    duty = Duty(names=frozenset({NAME}), bounds=Bounds(is_any_destination=True), by_rules=True, label=70)
    one = Router(Ftp(), duty, SNAT)
    line = b"PORT 10,0,0,9,156,64\r\n"
    assert one.send(C, 1, line) == line
    (expectation,) = one.expectations
    assert (expectation.tuple.dst, expectation.tuple.dport) == (b"\x0a\0\0\x09", 40000)
    assert expectation.nat is None


def test_a_connection_does_not_inherit_from_one_that_had_its_id() -> None:
    """The id is a hash of the ports and of where the kernel keeps it: the same port soon again has the same id."""
    one = router()
    one.send(C, 5000, b"AUTH TLS\r\n")
    one.send(S, 1, b"234 go on\r\n")
    one.info = bytes(len(one.info))
    one.send(C, 2**31, b"PORT 10,0,0,1,156,64\r\n")
    assert ports_of(one) == [40000]


def test_what_is_remembered_of_connections_is_bounded() -> None:
    one = router(SNAT)
    for ct_id in range(5000):
        one.ct_id, one.info, one.adjustments = ct_id, bytes(len(one.info)), {}
        one.taken_ports.clear()
        one.send(C, 1, b"PORT 10,0,0,1,156,64\r\n")
    held = [len(table) for table in vars(one.inspector).values() if isinstance(table, dict)]
    assert max(held) <= 4096
    assert len(held) == 2


def test_the_last_of_several_announcements_is_the_last_for_the_kernel_too() -> None:
    """With `expect_max: 1` the kernel keeps the newest: the one in the verdict must be the last one announced."""
    one = router()
    one.send(C, 1, b"PORT 10,0,0,1,156,64\r\nPORT 10,0,0,1,156,65\r\n")
    assert ports_of(one) == [40000, 40001]
    assert [e.tuple.dport for e in one.expectations] == [40001]
    assert len([r for r in one.requests if r[5] == 2]) == 1


# -- any bytes -------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(Direction), st.integers(0, 60), st.binary(max_size=60)), max_size=20))
def test_any_bytes_get_a_verdict_and_arrive(packets: list[tuple[Direction, int, bytes]]) -> None:
    one = router()
    for direction, seq, payload in packets:
        assert one.send(direction, seq, payload) == payload
        assert one.outcomes[-1].error is None


@given(st.binary(min_size=0, max_size=32), st.sampled_from([PLAIN, SNAT, PLAIN6, SNAT6]))
def test_any_private_data_gets_a_verdict(info: bytes, tuples: tuple[Tuple, Tuple]) -> None:
    one = router(tuples, info=info or b"\0")
    for segment in segments(SESSION if tuples in (PLAIN, SNAT) else SESSION6):
        one.send(*segment)
        assert one.outcomes[-1].error is None


def test_a_helper_that_raises_costs_its_own_message_only() -> None:
    class Moody(Ftp):
        def inspect(self, payload: bytes, direction: Direction, flow: object, private: bytes) -> object:  # type: ignore[override]
            if b"NOOP" in payload:
                raise SystemExit("bad day")
            return super().inspect(payload, direction, flow, private)  # type: ignore[arg-type]

    duty = Duty(names=frozenset({NAME}), bounds=Bounds(), by_rules=True, label=70)
    one = Router(Moody(), duty, PLAIN)
    one.send(C, 1, b"NOOP\r\n")
    assert isinstance(one.outcomes[-1].error, SystemExit)
    one.send(C, 7, b"PORT 10,0,0,1,156,64\r\n")
    assert ports_of(one) == [40000]


# -- UDP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuples", "destination", "nat_port"),
    [
        ((Tuple(CLIENT, SERVER, 5000, 69), Tuple(SERVER, CLIENT, 69, 5000)), (CLIENT, 5000), None),
        ((Tuple(CLIENT, SERVER, 5000, 69), Tuple(SERVER, OUTSIDE, 69, 6000)), (OUTSIDE, 6000), 5000),
        ((Tuple(CLIENT6, SERVER6, 5000, 69), Tuple(SERVER6, CLIENT6, 69, 5000)), (CLIENT6, 5000), None),
    ],
    ids=["ip", "snat", "ip6"],
)
def test_a_tftp_request_expects_the_answer_from_another_port(
    tuples: tuple[Tuple, Tuple], destination: tuple[bytes, int], nat_port: int | None
) -> None:
    duty = Duty(names=frozenset({NAME}), bounds=Bounds(), by_rules=True, label=70)
    one = Router(Tftp(), duty, tuples, l4proto=L4.UDP, status=0)
    request = b"\0\1file\0octet\0blksize\x001428\0"
    assert one.send(C, 0, request) == request
    (expectation,) = one.expectations
    assert (expectation.tuple.dst, expectation.tuple.dport) == destination
    assert (expectation.tuple.src, expectation.tuple.sport, expectation.mask_sport) == (tuples[1].src, 0, 0)
    assert expectation.l4proto is L4.UDP
    assert (expectation.nat.port if expectation.nat else None) == nat_port
    assert one.outcomes[-1].verdict == ACCEPT
    one.send(C, 0, request)
    assert len(one.expectations) == 2, "a repeated request expects again: the first packet's may have been lost"
