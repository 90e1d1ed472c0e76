"""Laws of a service: what it runs, in which order, and how it ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.supervise.service import Command, Service, Wish

EXIT_CODES = st.sampled_from([0, 1, 3])


@st.composite
def histories(draw: st.DrawFn) -> tuple[Service, list[tuple[Command, int]]]:
    """A service after wishes and ends in any order, and the commands that ended, with their exit codes."""
    service = Service()
    started = service.begin()
    history: list[tuple[Command, int]] = []
    for event in draw(st.lists(st.sampled_from([*Wish, "ended"]), max_size=12)):
        assert started == service.running
        if isinstance(event, Wish):
            before = service.running
            if service.wish(event) is None:
                assert service.running == before
        elif service.running is not None:
            history.append((service.running, draw(EXIT_CODES)))
            service.ended(history[-1][1])
        started = service.running
    return service, history


@given(histories())
def test_it_ends_with_a_teardown_or_because_it_never_began(made: tuple[Service, list[tuple[Command, int]]]) -> None:
    service, history = made
    teardowns = [code for command, code in history if command is Command.TEARDOWN]
    assert len(teardowns) <= 1
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
    """A wish is fulfilled at once, or after the command that runs; TERM always leads to the end."""
    service, _ = made
    if not service.running and not service.is_over:
        assert not service.is_ending
        assert service.wish(Wish.APPLY_AGAIN) is Command.APPLY
    if not service.is_over:
        service.wish(Wish.END)
        while service.running:
            service.ended(0)
        assert service.is_over


def test_a_failed_reload_is_told_until_one_works() -> None:
    service = Service()
    service.begin()
    service.ended(0)
    assert service.wish(Wish.APPLY_AGAIN) is Command.APPLY
    assert service.ended(1) is None
    assert service.trouble == "apply failed with exit code 1"
    assert service.is_serving
    service.wish(Wish.APPLY_AGAIN)
    service.ended(0)
    assert not service.trouble


def test_who_is_told_to_end_before_it_begins_applies_nothing() -> None:
    service = Service()
    assert service.wish(Wish.END) is Command.TEARDOWN
    assert service.begin() is None
    service.ended(0)
    assert service.is_over
