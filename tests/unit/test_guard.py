"""The guard: each bound refuses by itself, and what is within all of them passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engine.api import L4, Bounds, Direction, Expect, Flow, Policy, Source, Tuple
from orchestrator.engine.guard import refusal, show_address

CLIENT, SERVER, PUBLIC = b"\x0a\x00\x00\x01", b"\x0a\x00\x00\x02", b"\xc0\x00\x02\x01"
PLAIN = Flow((Tuple(CLIENT, SERVER, 40000, 21), Tuple(SERVER, CLIENT, 21, 40000)), L4.TCP)
SNATED = Flow((Tuple(CLIENT, SERVER, 40000, 21), Tuple(SERVER, PUBLIC, 21, 50000)), L4.TCP, is_nated=True)
POLICIES = (Policy("ftp", 1, 300),)
STRICT = Bounds()
LOOSE = Bounds(first_port=1, is_any_source=True, is_any_destination=True, is_permanent=True)
GOOD = Expect(L4.TCP, port=2000, address=CLIENT, text=(5, 20))


def ask(expect: Expect, flow: Flow = PLAIN, direction: Direction = Direction.ORIGINAL, bounds: Bounds = STRICT) -> str:
    return refusal(expect, flow, direction, bounds=bounds, policies=POLICIES, payload_len=22)


def test_what_is_within_all_bounds_passes() -> None:
    assert ask(GOOD) == ""
    assert ask(GOOD._replace(address=None, text=None)) == ""
    assert ask(Expect(L4.UDP)) == ""


@pytest.mark.parametrize(
    ("change", "words", "loosened"),
    [
        ({"address": SERVER}, "10.0.0.2 is not the sender's address", {"is_any_destination": True}),
        ({"address": bytes(16)}, "another family", {}),
        ({"address": b""}, "another family", {}),
        ({"port": 1023}, "port 1023 is outside 1024-65535", {"first_port": 1}),
        ({"port": 0}, "port 0 is outside", {}),
        ({"port": 65536}, "port 65536 is outside", {}),
        ({"port": -1}, "port -1 is outside", {}),
        ({"source": Source.ANY}, "any source", {"is_any_source": True}),
        ({"is_permanent": True}, "permanent", {"is_permanent": True}),
        ({"policy": 1}, "policy 1 does not exist", {}),
        ({"policy": -1}, "policy -1 does not exist", {}),
        ({"source_port": 65536}, "source port 65536", {}),
        ({"text": (5, 23)}, "not within the payload", {}),
        ({"text": (5, 5)}, "not within the payload", {}),
        ({"text": (-1, 5)}, "not within the payload", {}),
    ],
)
def test_each_bound_refuses_and_says_why(change: dict[str, object], words: str, loosened: dict[str, object]) -> None:
    expect = GOOD._replace(**change)  # type: ignore[arg-type]
    assert words in ask(expect)
    if loosened:
        assert ask(expect, bounds=replace(Bounds(), **loosened)) == ""  # type: ignore[arg-type]
    else:
        assert words in ask(expect, bounds=LOOSE)


def test_under_nat_both_addresses_of_the_sender_are_its_own() -> None:
    assert ask(GOOD, SNATED) == ""
    assert ask(GOOD._replace(address=PUBLIC), SNATED) == ""
    assert ask(GOOD._replace(address=PUBLIC)) != ""
    assert ask(GOOD._replace(address=PUBLIC), SNATED, Direction.REPLY) != ""
    assert ask(GOOD._replace(address=SERVER), SNATED, Direction.REPLY) == ""


@given(st.integers(-1, 70000), st.integers(1, 65535), st.integers(1, 65535))
def test_no_port_outside_the_range_ever_passes(port: int, first: int, last: int) -> None:
    passes = ask(GOOD._replace(port=port), bounds=Bounds(first_port=first, last_port=last)) == ""
    assert passes == (first <= port <= last)


def test_addresses_are_shown_as_people_write_them() -> None:
    assert show_address(CLIENT) == "10.0.0.1"
    assert show_address(bytes(15) + b"\1") == "::1"
    assert show_address(b"\1\2\3") == "010203"
