"""The bench compares like with like: orch's profile and the recipe by hand attach the same connections, and every
engine gets the same traffic."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench import data, load
from bench.data import BASIS, ENGINES, Engine, Row
from bench.load import PASV, PLAIN_LINE, PORT, RRQ, WORKLOADS, Pair, Timing, Workload
from bench.recipes import by_hand, by_orch
from orchestrator import profile, render

CLIENT, SERVER = "10.66.1.2", "10.66.2.2"
MOST = max(data.CONNECTIONS)


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.parametrize("attachments", [1, 2, 300])
def test_both_ways_attach_as_much_as_was_asked_for(backend: str, attachments: int, tmp_path: Path) -> None:
    orch = by_orch(backend, attachments, orch="orch", directory=tmp_path, netns="bench")
    hand = by_hand(backend, attachments, directory=tmp_path)
    target = render.target(profile.load_file(tmp_path / "profile.yaml"))
    assert len(target.attachments) == attachments
    (rules,) = target.rules.documents
    assert len(orch.attached.findall(rules.text)) == attachments
    assert len(hand.attached.findall((tmp_path / "rules").read_text())) == attachments
    assert [action for action, _ in orch.actions] == [action for action, _ in hand.actions]


@pytest.mark.parametrize("engine", [e for e in ENGINES if e.options], ids=lambda engine: engine.name)
def test_every_engine_attaches_the_same_connections(engine: Engine) -> None:
    desired = profile.load(data.profile_text(engine), "bench.yaml")
    assert {(a.path, a.key.l4proto, a.ports) for a in desired.attachments} == {
        (a.path, a.key.l4proto, a.ports)
        for a in profile.load(data.profile_text(Engine("", "engine: kernel", engine.helpers)), "bench.yaml").attachments
    }


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    with ExitStack() as stack:
        made = [socket.socketpair() for _ in range(3)]
        for end in (end for ends in made for end in ends):
            stack.enter_context(end).settimeout(0)
        yield [Pair(client, server) for client, server in made]


def scripts(workload: Workload, count: int) -> list[tuple[load.Exchange, ...]]:
    return [load.exchanges(workload, number, client=CLIENT, server=SERVER) for number in range(count)]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("transactions", [2, 3, 100])
def test_as_many_transactions_as_were_asked_for(pairs: list[Pair], workload: Workload, transactions: int) -> None:
    timing = load.drive(pairs, scripts(workload, len(pairs)), transactions)
    assert timing.transactions == transactions
    assert 0 < timing.p50_us <= timing.p99_us <= timing.seconds * 1e6
    for pair in pairs:
        with pytest.raises(BlockingIOError):  # nothing is under way when the counters are read
            pair.server.recv(1)


@pytest.mark.parametrize("workload", [PORT, PASV], ids=["PORT", "PASV"])
def test_no_two_connections_announce_the_same_port(workload: Workload) -> None:
    """An expectation is refused while another connection has the same."""
    announced = [e.request + e.answer for script in scripts(workload, MOST) for e in script]
    assert len(set(announced)) == len(announced)


def row(engine: str, *, cpu_us: float, fault: str = "", workload: Workload = PLAIN_LINE) -> Row:
    timing = Timing(transactions=100, seconds=cpu_us / 1000, p50_us=1.0, p99_us=2.0)
    return Row(engine, workload.name, 1, 200, cpu_us, timing, fault)


def test_ratios_are_to_conntrackd_in_the_same_row() -> None:
    rows = [
        row(BASIS, cpu_us=80.0),
        row("native, rules", cpu_us=20.0),
        row(BASIS, cpu_us=10.0, workload=RRQ),
        row("native, rules", cpu_us=20.0, workload=RRQ),
    ]
    lines = data.report("9.9", rows, []).splitlines()
    cells = [line.split("native, rules")[1].split()[:2] for line in lines if "native, rules" in line]
    assert cells == [["20.0", "0.25"], ["20.0", "2.00"]]


def test_a_row_with_a_fault_shows_no_figure_and_is_no_basis() -> None:
    text = data.report("9.9", [row(BASIS, cpu_us=80.0, fault="99 expectations"), row("x", cpu_us=20.0)], [])
    assert "80.0" not in text
    assert "does not count: 99 expectations" in text
    assert "0.25" not in text


def test_a_counter_is_the_sum_over_all_processors() -> None:
    text = "entries  expect_new expect_create\n00000002  00000000 0000000a\n00000002  00000000 00000010\n"
    assert data.summed(text, "expect_create") == 26
