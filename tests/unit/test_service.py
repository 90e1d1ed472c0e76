"""Laws of a service: what it runs, in which order, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.supervise.service import AGAIN_MAX_S, END_WITHIN_S, Command, Service, Wish

EXIT_CODES = st.sampled_from([0, 1, 3])
FAILED, MIXED = 1, 3


@st.composite
def histories(draw: st.DrawFn) -> tuple[Service, list[tuple[Command, int]]]:
    """A service after wishes, ends and pauses in any order, and the commands that ended, with their exit codes."""
    service = Service()
    started = service.begin()
    now = 0.0
    history: list[tuple[Command, int]] = []
    for event in draw(st.lists(st.sampled_from([*Wish, "ended", "paused"]), max_size=12)):
        assert started == service.running
        now += draw(st.sampled_from([0.0, 10.0]))
        if isinstance(event, Wish):
            before = service.running
            if service.wish(event, now) is None:
                assert service.running == before
        elif event == "paused" and service.pause_s:
            now += service.pause_s
            assert service.again() is not None
        elif event == "ended" and service.running is not None:
            history.append((service.running, draw(EXIT_CODES)))
            service.ended(history[-1][1], now)
        started = service.running
    return service, history


@given(histories())
def test_it_ends_with_a_teardown_or_because_it_never_began(made: tuple[Service, list[tuple[Command, int]]]) -> None:
    service, history = made
    commands = [command for command, _ in history]
    teardowns = [code for command, code in history if command is Command.TEARDOWN]
    assert commands == [Command.APPLY] * commands.count(Command.APPLY) + [Command.TEARDOWN] * len(teardowns)
    assert set(teardowns[:-1]) <= {FAILED}
    if service.is_over:
        command, code = history[-1]
        assert service.running is None
        assert service.exit_code == code
        assert command is Command.TEARDOWN or (len(history) == 1 and code and not service.is_ending)


@given(histories())
def test_it_serves_from_the_first_apply_that_works(made: tuple[Service, list[tuple[Command, int]]]) -> None:
    service, history = made
    if (Command.APPLY, 0) in history:
        assert service.is_serving


@given(histories())
def test_nothing_waits_without_a_reason(made: tuple[Service, list[tuple[Command, int]]]) -> None:
    """A wish is fulfilled at once, or after the command that runs, or is tried again; TERM always leads to the end."""
    service, _ = made
    assert not (service.pause_s and (service.running or service.is_over))
    if not service.running and not service.is_over:
        assert service.pause_s or not service.is_ending
        assert service.wish(Wish.APPLY_AGAIN, 0.0) is (Command.TEARDOWN if service.is_ending else Command.APPLY)
    if not service.is_over:
        service.wish(Wish.END, 0.0)
        while service.running:
            service.ended(0, 0.0)
        assert service.is_over


def serving() -> Service:
    service = Service()
    service.begin()
    service.ended(0, 0.0)
    return service


def test_a_failed_reload_is_told_until_one_works() -> None:
    service = serving()
    assert service.wish(Wish.APPLY_AGAIN, 0.0) is Command.APPLY
    assert service.ended(1, 0.0) is None
    assert service.trouble == "apply failed with exit code 1"
    assert service.is_serving
    service.wish(Wish.APPLY_AGAIN, 0.0)
    service.ended(0, 0.0)
    assert not service.trouble


def pauses_of(service: Service, exit_code: int) -> Iterator[float]:
    """How long it waits after each failure of the command under way, for as long as that is tried again."""
    now = 0.0
    while service.ended(exit_code, now) is None and service.pause_s:
        yield service.pause_s
        now += service.pause_s
        service.again()


def test_a_reload_that_fails_is_tried_again_ever_more_rarely_until_it_works() -> None:
    service = serving()
    service.wish(Wish.APPLY_AGAIN, 0.0)
    assert list(islice(pauses_of(service, FAILED), 7)) == [1, 2, 4, 8, 16, AGAIN_MAX_S, AGAIN_MAX_S]
    assert service.again() is Command.APPLY
    assert service.ended(0, 0.0) is None
    assert (service.pause_s, service.again()) == (0, None)
    service.wish(Wish.APPLY_AGAIN, 0.0)
    service.ended(FAILED, 0.0)
    assert service.pause_s == 1


def test_what_is_wished_anew_does_not_wait_for_the_next_attempt() -> None:
    service = serving()
    service.wish(Wish.APPLY_AGAIN, 0.0)
    assert next(pauses_of(service, FAILED))
    assert service.wish(Wish.APPLY_AGAIN, 0.0) is Command.APPLY
    assert service.wish(Wish.APPLY_AGAIN, 0.0) is None
    assert service.ended(FAILED, 0.0) is Command.APPLY
    assert next(pauses_of(service, FAILED))
    assert service.wish(Wish.END, 0.0) is Command.TEARDOWN
    assert service.ended(0, 0.0) is None
    assert service.is_over


def test_a_teardown_that_is_refused_is_tried_again_while_there_is_time() -> None:
    service = serving()
    service.wish(Wish.END, 0.0)
    pauses = list(pauses_of(service, FAILED))
    assert pauses == [1, 2, 4, 8, 16, AGAIN_MAX_S]
    assert sum(pauses) <= END_WITHIN_S
    assert (service.is_over, service.exit_code) == (True, FAILED)


def test_a_teardown_that_left_something_is_not_tried_again() -> None:
    service = serving()
    service.wish(Wish.END, 0.0)
    assert list(pauses_of(service, MIXED)) == []
    assert (service.is_over, service.exit_code) == (True, MIXED)


def test_who_is_told_to_end_before_it_begins_applies_nothing() -> None:
    service = Service()
    assert service.wish(Wish.END, 0.0) is Command.TEARDOWN
    assert service.begin() is None
    service.ended(0, 0.0)
    assert service.is_over
