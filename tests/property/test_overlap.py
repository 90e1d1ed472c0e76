"""Overlaps found by the sweep against overlaps found by comparing every pair."""

from __future__ import annotations

import time
from ipaddress import ip_network
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.model import Attachment, HelperKey, L3Proto, L4Proto, Path, PortRange
from orchestrator.overlap import find_overlaps, first_overlap

PREFIXES = (
    "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3", "10.1.2.4", "10.2.0.0/15", "192.168.0.0/16", "0.0.0.0/0",
)  # fmt: skip


def ports() -> st.SearchStrategy[tuple[PortRange, ...]]:
    pair = st.tuples(st.integers(1, 12), st.integers(0, 4)).map(lambda p: PortRange(p[0], p[0] + p[1]))
    return st.lists(pair, min_size=1, max_size=3, unique=True).map(tuple)


def addresses() -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(PREFIXES), max_size=2, unique=True).map(tuple)


attachments = st.lists(
    st.builds(
        Attachment,
        key=st.sampled_from([HelperKey(n, L3Proto.IP, l4) for n in ("a", "b", "c") for l4 in L4Proto]),
        path=st.sampled_from(list(Path)),
        ports=ports(),
        interface=st.sampled_from(["", "", "lan0", "lan1"]),
        saddr=addresses(),
        daddr=addresses(),
    ),
    max_size=12,
)


def addresses_meet(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    return not a or not b or any(ip_network(x).overlaps(ip_network(y)) for x in a for y in b)


def meet(a: Attachment, b: Attachment) -> bool:
    return (
        a.key != b.key
        and (a.path, a.key.l3proto, a.key.l4proto) == (b.path, b.key.l3proto, b.key.l4proto)
        and (not a.interface or not b.interface or a.interface == b.interface)
        and any(p.first <= q.last and q.first <= p.last for p in a.ports for q in b.ports)
        and addresses_meet(a.saddr, b.saddr)
        and addresses_meet(a.daddr, b.daddr)
    )


def brute_force(items: list[Attachment]) -> set[tuple[int, int]]:
    return {(i, j) for (i, a), (j, b) in combinations(enumerate(items), 2) if meet(a, b)}


@settings(deadline=None)
@given(attachments)
def test_every_listed_pair_overlaps_and_every_overlap_is_in_a_listed_pair(items: list[Attachment]) -> None:
    expected, found = brute_force(items), find_overlaps(items)
    assert set(found) <= expected
    named = {index for pair in found for index in pair}
    assert all(i in named or j in named for i, j in expected)


@settings(deadline=None)
@given(attachments, attachments)
def test_two_profiles_overlap_when_some_pair_does(mine: list[Attachment], theirs: list[Attachment]) -> None:
    mine = [a for a in mine if a.key.name == "a"]
    theirs = [a for a in theirs if a.key.name != "a" and a.key.name == "b"]
    found = first_overlap(mine, theirs)
    assert (found is not None) == any(meet(a, b) for a in mine for b in theirs)
    assert found is None or (meet(*found) and found[0] in mine and found[1] in theirs)


def test_ten_thousand_attachments_do_not_take_a_square_of_time() -> None:
    keys = [HelperKey(name, L3Proto.IP, L4Proto.TCP) for name in ("a", "b")]
    items = [
        Attachment(keys[i % 2], Path.INCOMING, (PortRange(21, 21),), saddr=(f"10.{i >> 8}.{i & 255}.0/24",))
        for i in range(10_000)
    ]
    started = time.process_time()
    assert find_overlaps(items) == []
    assert find_overlaps([*items, Attachment(keys[0], Path.INCOMING, (PortRange(20, 30),))]) != []
    assert time.process_time() - started < 5
