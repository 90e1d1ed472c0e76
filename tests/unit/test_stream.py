"""Where a connection is in its two streams: wrapping sequence numbers, memory of 17 bytes, and bounded leftovers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engine.api import Direction
from orchestrator.engine.stream import STREAM_STATE_LEN, TOO_LONG, Partials, Stream, distance

SEQS = st.integers(0, 2**32 - 1)
STEPS = st.integers(-(2**31) + 1, 2**31 - 1)
DIRECTIONS = st.sampled_from(Direction)


@given(SEQS, STEPS)
def test_distance_survives_the_wrap(seq: int, step: int) -> None:
    assert distance((seq + step) % 2**32, seq) == step


def test_all_zero_private_data_is_a_connection_of_which_nothing_was_seen() -> None:
    stream = Stream(bytes(STREAM_STATE_LEN))
    assert [stream.offset(d, 4711) for d in Direction] == [0, 0]
    assert not stream.is_finished
    assert not any(stream.rewritten(d) or stream.is_partial(d) for d in Direction)
    assert stream.pack() == bytes(STREAM_STATE_LEN)


@given(st.binary(min_size=STREAM_STATE_LEN, max_size=32))
def test_any_private_data_is_a_state(state: bytes) -> None:
    stream = Stream(state)
    assert Stream(stream.pack()).pack() == stream.pack()


@given(DIRECTIONS, SEQS, SEQS, st.booleans(), SEQS, st.integers(0, 65535))
def test_directions_do_not_touch_each_other(
    direction: Direction,
    seq: int,
    other_seq: int,
    is_partial: bool,  # noqa: FBT001
    text_seq: int,
    port: int,
) -> None:
    stream = Stream(bytes(STREAM_STATE_LEN))
    stream.advance(direction.opposite, other_seq, is_partial=not is_partial)
    stream.advance(direction, seq, is_partial=is_partial)
    stream.remember(direction, seq=text_seq, port=port, old_len=20, new_len=23)
    again = Stream(stream.pack())
    assert again.offset(direction, (seq + 7) % 2**32) == 7
    assert again.offset(direction.opposite, other_seq) == 0
    assert again.is_partial(direction) is is_partial
    assert again.is_partial(direction.opposite) is not is_partial
    assert again.rewritten(direction)
    assert not again.rewritten(direction.opposite)
    assert again.offset_of_text((text_seq - 5) % 2**32) == 5
    assert (again.port, again.old_len, again.new_len) == (port, 20, 23)


def test_the_last_rewritten_text_replaces_the_one_before() -> None:
    stream = Stream(bytes(STREAM_STATE_LEN))
    stream.remember(Direction.ORIGINAL, seq=1, port=2, old_len=3, new_len=4)
    stream.remember(Direction.REPLY, seq=5, port=6, old_len=7, new_len=8)
    assert stream.rewritten(Direction.REPLY)
    assert not stream.rewritten(Direction.ORIGINAL)


def test_a_cut_message_is_given_back_once_and_only_where_it_ended() -> None:
    partials = Partials()
    partials.keep(1, Direction.ORIGINAL, seq=2**32 + 5, data=b"PORT 1,")
    assert partials.take(1, Direction.REPLY, seq=5) is None
    assert partials.take(2, Direction.ORIGINAL, seq=5) is None
    assert partials.take(1, Direction.ORIGINAL, seq=5) == b"PORT 1,"
    assert partials.take(1, Direction.ORIGINAL, seq=5) is None
    partials.keep(1, Direction.ORIGINAL, seq=5, data=b"PORT 1,")
    assert partials.take(1, Direction.ORIGINAL, seq=6) is None


def test_leftovers_are_bounded() -> None:
    partials = Partials(connections=2, bytes_each=4)
    for connection in (1, 2, 3):
        partials.keep(connection, Direction.ORIGINAL, seq=9, data=b"abcd")
    kept = [partials.take(connection, Direction.ORIGINAL, seq=9) for connection in (1, 2, 3)]
    assert kept == [None, b"abcd", b"abcd"]


def test_of_a_message_that_is_too_long_only_the_fact_is_kept() -> None:
    partials = Partials(connections=2, bytes_each=4)
    partials.keep(3, Direction.REPLY, seq=9, data=b"abcde")
    assert partials.take(3, Direction.REPLY, seq=9) == TOO_LONG
    assert partials.take(3, Direction.REPLY, seq=9) is None
