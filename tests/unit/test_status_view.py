"""`orch status` as text: golden files for wide, narrow, verbose and coloured. ORCH_UPDATE_GOLDEN=1 renews them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.engine.counters import Counters, Snapshot, State
from orchestrator.model import Backend, HelperKey, L3Proto, L4Proto, Netns
from orchestrator.ports import Lifetimes
from orchestrator.state import Owner, Unsettled
from orchestrator.status import HelperState, HelperStatus, HostStatus, ProfileStatus, QueueStatus
from orchestrator.views import status as view
from orchestrator.views.human import Paint

GOLDEN = Path(__file__).parents[1] / "golden" / "status"
NOW_S = 1_800_000_000.0
COUNTERS = Counters(packets=31_800, expectations=1200, refused=1, busy_ns=1_300_000_000)
NOTE = "refused: port 22 is outside 1024-65535"
REFUSING = Snapshot(204, State.READY, 9, 9, COUNTERS, NOTE)
FAILING = Snapshot(4040, State.READY, 9, 9, Counters(packets=4, exceptions=5, overruns=6), "KeyError: 'port'")


def helper(name: str, state: HelperState, **other: Any) -> HelperStatus:
    values: dict[str, Any] = {
        "engine": "native",
        "queueing": "rules",
        "registrations": ((HelperKey(f"{name}-us", L3Proto.IP, L4Proto.TCP), "disabled"),),
        "queues": (
            QueueStatus(30342, is_bound=True, waiting=0, dropped=0),
            QueueStatus(30343, is_bound=True, waiting=2, dropped=17),
        ),
        "expectations": 3,
        "pid": 204,
        "since_s": 200.0,
        "last_words": "",
    }
    return HelperStatus(name=name, state=state, **(values | other))


WELL = (
    helper(
        "ftp",
        HelperState.RUNNING,
        counters=REFUSING,
        connections=12,
        restarts=0,
        lifetimes=Lifetimes(made=1200, used=1100, expired=90, cancelled=10),
    ),
    helper("amanda", HelperState.IN_KERNEL, engine="kernel", queueing="", queues=(), pid=0, connections=0),
)
ILL = (
    helper("steam", HelperState.RUNNING, pid=4040, counters=FAILING, restarts=2, reason="killed by SIGSEGV"),
    helper(
        "tftp",
        HelperState.FATAL,
        pid=0,
        queues=(QueueStatus(3, is_bound=False, waiting=0, dropped=0),),
        restarts=10,
        reason="exited with 1, 11 times within 10 min: ModuleNotFoundError: No module named 'steamlib'",
        state_since=NOW_S - 7200,
    ),
    helper("sip", HelperState.HUNG, hung_s=75.0, restarts=1, connections=3),
    helper("rpc", HelperState.BACKOFF, pid=0, restarts=3, reason="exited with 3", state_since=NOW_S - 1),
    helper("tns", HelperState.NO_PROCESS, engine="conntrackd", pid=0, last_words="pid 7 was killed by SIGKILL"),
    helper("mdns", HelperState.UNSUPERVISED, engine="conntrackd"),
)


def profile(name: str, helpers: tuple[HelperStatus, ...], *drift: str) -> ProfileStatus:
    owner = Owner(name, Netns("blue", "/run/netns/blue", "4:1"))
    return ProfileStatus(owner, f"profiles/{name}.yaml", Backend.NFTABLES, NOW_S, helpers, drift)


HOST = HostStatus(
    profiles=(
        profile("office", WELL),
        profile("lab", ILL, "tftp: missing: queue 3", "mdns: its supervisor is gone"),
        profile("hung", (helper("sane", HelperState.HUNG, hung_s=5.0),)),
        profile("lost", (), "netns blue: it is gone"),
    ),
    unknown=(Owner("old", Netns("red", "/run/netns/red", "4:2")),),
    unsettled=(Unsettled(1, "apply", Owner("new", Netns("blue", "/run/netns/blue", "0:7")), (), ()),),
    working=True,
)


def text(**options: Any) -> str:
    return view.text(HOST, Paint(is_on=options.pop("is_coloured", False)), now_s=NOW_S, **options)


CASES: dict[str, dict[str, Any]] = {
    "wide": {},
    "columns-160": {"width": 160},
    "columns-80": {"width": 80},
    "columns-40": {"width": 40},
    "verbose": {"is_verbose": True},
    "coloured": {"width": 120, "is_coloured": True},
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_text_is_as_expected(case: str) -> None:
    file = GOLDEN / f"{case}.txt"
    shown = text(**CASES[case])
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        file.write_text(shown)
    assert shown == file.read_text()


def rows(shown: str) -> list[str]:
    return [
        line for line in shown.splitlines() if line.startswith("    ") and not line.startswith(("     ", "    drift"))
    ]


@pytest.mark.parametrize("width", range(10, 240, 5))
def test_no_row_is_wider_than_the_terminal(width: int) -> None:
    shown = rows(text(width=width))
    assert len(shown) == sum(len(p.helpers) + bool(p.helpers) for p in HOST.profiles)
    assert max(map(len, shown)) <= max(width, len("    HELPER"))


@pytest.mark.parametrize("one", [helper("sane", HelperState.RUNNING), HOST.profiles[2].helpers[0]])
def test_the_last_column_and_its_heading_go_together(one: HelperStatus) -> None:
    shown = set()
    for width in range(40, 240):
        alone = replace(HOST, profiles=(profile("alone", (one,)),))
        heading, row = rows(view.text(alone, Paint(is_on=False), now_s=NOW_S, width=width))
        _, last, cut = heading.partition("  LAST")
        assert bool(last) is (len(row) > len(heading) - len(last + cut)), (heading, row)
        shown.add(bool(last))
    assert shown == {True, False} if not one.hung_s else {True}


def test_a_state_begins_at_the_same_place_in_every_row() -> None:
    shown = rows(text())
    at = shown[0].index("STATE")
    states = {str(h.state) for p in HOST.profiles for h in p.helpers} | {"STATE"}
    assert {line[at:].split("  ")[0] for line in shown} == states
