"""What is said of expectations: laws of the decoder and of the tracker."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engine import netlink, tuples
from orchestrator.engine.api import L4, Tuple
from orchestrator.engine.netlink import attribute
from orchestrator.supervise.lifetimes import Expected, Fate, Tracker, decode

ENDS = (Fate.USED, Fate.EXPIRED, Fate.CANCELLED)

ports = st.integers(0, 0xFFFF)
numbers = st.integers(0, 0xFFFFFFFF)


@st.composite
def a_tuple(draw: st.DrawFn, version: Literal[4, 6]) -> Tuple:
    length = 4 if version == 4 else 16
    addresses = st.binary(min_size=length, max_size=length)
    return Tuple(draw(addresses), draw(addresses), draw(ports), draw(ports))


@st.composite
def an_event(draw: st.DrawFn, ids: st.SearchStrategy[int] = numbers) -> Expected:
    versions: tuple[Literal[4, 6], ...] = (4, 6)
    version = draw(st.sampled_from(versions))
    is_new = draw(st.booleans())
    return Expected(
        is_new=is_new,
        id=draw(ids),
        helper=draw(st.sampled_from(("", "ftp-us", "tns"))),
        policy=draw(st.integers(0, 3)),
        l4proto=draw(st.sampled_from(L4)),
        tuple=draw(a_tuple(version)),
        mask=draw(a_tuple(version)),
        master=draw(a_tuple(version)),
        master_l4proto=draw(st.sampled_from(L4)),
        timeout_s=draw(st.integers(0, 300)),
        is_permanent=draw(st.booleans()),
        is_requested=not is_new and draw(st.booleans()),
    )


few = st.lists(an_event(st.integers(0, 5)), max_size=20)


def encoded(event: Expected) -> bytes:
    """As ctnetlink_exp_dump_expect writes it."""

    def number(kind: int, value: int) -> bytes:
        return attribute(kind, value.to_bytes(4, "big"))

    body = tuples.encode(2, event.tuple, event.l4proto) + tuples.encode(3, event.mask, event.l4proto)
    body += tuples.encode(1, event.master, event.master_l4proto)
    body += number(4, event.timeout_s) + number(5, event.id)
    body += number(8, int(event.is_permanent)) + number(9, event.policy)
    body += attribute(6, event.helper.encode() + b"\0") if event.helper else b""
    made = netlink.message(0x200 if event.is_new else 0x202, body, flags=0)
    return made[:12] + int(event.is_requested).to_bytes(4, "little") + made[16:]


@given(st.lists(an_event(), max_size=3))
def test_what_the_kernel_says_is_read(events: list[Expected]) -> None:
    assert list(decode(b"".join(map(encoded, events)))) == events


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_left_out(data: bytes) -> None:
    assert all(isinstance(event, Expected) for event in decode(data))


@given(an_event(), st.data())
def test_a_damaged_message_is_read_or_left_out(event: Expected, data: st.DataObject) -> None:
    message = bytearray(encoded(event))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] = data.draw(st.integers(0, 255))
    assert len(list(decode(bytes(message)))) <= 1


@given(st.lists(few), st.booleans())
def test_each_that_was_made_ends_once_at_most(drains: list[list[Expected]], is_there: bool) -> None:  # noqa: FBT001
    tracker = Tracker()
    made: Counter[int] = Counter()
    for drain in drains:
        for fate, event in tracker.follow(drain, lambda _: is_there):
            made[event.id] += 1 if fate is Fate.MADE else -1
            assert made[event.id] >= 0


@given(few)
def test_an_end_whose_beginning_nobody_saw_counts_nothing(events: list[Expected]) -> None:
    gone = [event for event in events if not event.is_new]
    assert list(Tracker().follow(gone, lambda _: True)) == []


@given(few, st.booleans())
def test_each_fate_has_its_reason(events: list[Expected], is_there: bool) -> None:  # noqa: FBT001
    for fate, event in Tracker().follow(events, lambda _: is_there):
        assert (fate is Fate.MADE) == event.is_new
        if fate is Fate.EXPIRED:
            assert event.timeout_s == 0
        if fate is Fate.USED:
            assert is_there
            assert event.timeout_s
            assert not event.is_requested
            assert not event.is_permanent


@given(few, st.integers(1, 5))
def test_what_is_remembered_is_bounded(events: list[Expected], limit: int) -> None:
    tracker = Tracker(limit)
    for _ in tracker.follow(events, lambda _: True):
        assert len(tracker) <= limit


def ends(*events: Expected, is_there: bool = True) -> list[Fate]:
    return [fate for fate, _ in Tracker().follow(events, lambda _: is_there) if fate in ENDS]


PEER, SERVER = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
NEW = Expected(
    is_new=True,
    id=1,
    helper="ftp-us",
    policy=0,
    l4proto=L4.TCP,
    tuple=Tuple(PEER, SERVER, 0, 40001),
    mask=Tuple(b"\xff" * 4, b"\xff" * 4, 0, 0xFFFF),
    master=Tuple(PEER, SERVER, 50000, 21),
    master_l4proto=L4.TCP,
    timeout_s=300,
    is_permanent=False,
    is_requested=False,
)
GONE = NEW._replace(is_new=False, timeout_s=299)


def test_the_reason_of_an_end() -> None:
    assert ends(NEW, GONE) == [Fate.USED]
    assert ends(NEW, GONE, is_there=False) == [Fate.CANCELLED]
    assert ends(NEW, GONE._replace(timeout_s=0)) == [Fate.EXPIRED]
    assert ends(NEW, GONE._replace(is_requested=True)) == [Fate.CANCELLED]
    assert ends(NEW, GONE._replace(is_permanent=True)) == [Fate.CANCELLED]


def test_one_that_makes_room_for_the_next_of_its_master_was_not_used() -> None:
    assert ends(NEW, GONE, NEW._replace(id=2)) == [Fate.CANCELLED]
    assert ends(NEW, GONE, NEW._replace(id=2, policy=1)) == [Fate.USED]
    assert ends(NEW, GONE, NEW._replace(id=2, master=NEW.master._replace(sport=50001))) == [Fate.USED]
