"""Laws of rule grouping: whatever the grouping, the rules attach the same helper to the same connections."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.model import Attachment, HelperKey, L3Proto, L4Proto, Path, PortRange, RuleQueue
from orchestrator.ruleset import (
    MULTIPORT_SLOTS,
    Element,
    IptablesRule,
    QueueRule,
    iptables_rules,
    merged_ports,
    queue_rules,
    rule_groups,
)

PREFIXES = {
    L3Proto.IP: ("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3", "10.128.0.0/9", "192.0.2.0/24"),
    L3Proto.IP6: ("::/0", "fd00::/8", "fd00:1::/32", "fd00:1::5", "2001:db8::/32"),
}
ADDRESSES = {
    L3Proto.IP: ("10.0.0.1", "10.1.0.1", "10.1.2.1", "10.1.2.3", "10.200.0.1", "192.0.2.9", "203.0.113.1"),
    L3Proto.IP6: ("fd00::1", "fd00:1::1", "fd00:1::5", "2001:db8::1", "2a00::1"),
}
PORTS = range(1, 12)


@dataclass(frozen=True)
class Connection:
    path: Path
    l3proto: L3Proto
    l4proto: L4Proto
    interface: str
    saddr: str
    daddr: str
    port: int


port_ranges = st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS)).map(lambda p: PortRange(min(p), max(p)))


@st.composite
def attachments(draw: st.DrawFn) -> Attachment:
    family = draw(st.sampled_from(L3Proto))
    addresses = st.lists(st.sampled_from(PREFIXES[family]), max_size=3).map(tuple)
    return Attachment(
        key=HelperKey(draw(st.sampled_from(["ftp", "tns"])), family, draw(st.sampled_from(L4Proto))),
        path=draw(st.sampled_from(Path)),
        ports=tuple(draw(st.lists(port_ranges, min_size=1, max_size=3))),
        interface=draw(st.sampled_from(["", "lan0", "lan1"])),
        saddr=draw(addresses),
        daddr=draw(addresses),
    )


@st.composite
def profiles(draw: st.DrawFn) -> tuple[Attachment, ...]:
    """Attachments of which those that overlap name the same helper, as profile.py demands."""
    accepted: list[Attachment] = []
    for candidate in draw(st.lists(attachments(), max_size=12)):
        rivals = {a.key.name for a in accepted if overlaps(a, candidate)}
        if len(rivals) <= 1:
            name = rivals.pop() if rivals else candidate.key.name
            accepted.append(replace(candidate, key=replace(candidate.key, name=name)))
    return tuple(accepted)


@st.composite
def connections(draw: st.DrawFn) -> Connection:
    family = draw(st.sampled_from(L3Proto))
    return Connection(
        path=draw(st.sampled_from(Path)),
        l3proto=family,
        l4proto=draw(st.sampled_from(L4Proto)),
        interface=draw(st.sampled_from(["lan0", "lan1", "wan0"])),
        saddr=draw(st.sampled_from(ADDRESSES[family])),
        daddr=draw(st.sampled_from(ADDRESSES[family])),
        port=draw(st.sampled_from(PORTS)),
    )


def contains(prefixes: tuple[str, ...], address: str) -> bool:
    return not prefixes or any(ipaddress.ip_address(address) in ipaddress.ip_network(p) for p in prefixes)


def meet(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    networks = [[ipaddress.ip_network(p) for p in side] for side in (left, right)]
    return not left or not right or any(a.overlaps(b) for a in networks[0] for b in networks[1])


def overlaps(a: Attachment, b: Attachment) -> bool:
    return (
        (a.path, a.key.l3proto, a.key.l4proto) == (b.path, b.key.l3proto, b.key.l4proto)
        and ("" in (a.interface, b.interface) or a.interface == b.interface)
        and meet(a.saddr, b.saddr)
        and meet(a.daddr, b.daddr)
        and any(p.first <= q.last and q.first <= p.last for p in a.ports for q in b.ports)
    )


def attached(a: Attachment, c: Connection) -> bool:
    return (
        (a.path, a.key.l3proto, a.key.l4proto) == (c.path, c.l3proto, c.l4proto)
        and a.interface in ("", c.interface)
        and contains(a.saddr, c.saddr)
        and contains(a.daddr, c.daddr)
        and any(p.first <= c.port <= p.last for p in a.ports)
    )


def wanted(attachments: tuple[Attachment, ...], c: Connection) -> set[str]:
    return {a.key.name for a in attachments if attached(a, c)}


def labels_of(attachments: tuple[Attachment, ...], labelled: set[str]) -> dict[HelperKey, int]:
    """Labels of the helpers with these names; one label for all families and protocols of a name."""
    return {a.key: sorted(labelled).index(a.key.name) for a in attachments if a.key.name in labelled}


def by_nft(attachments: tuple[Attachment, ...], labels: dict[HelperKey, int], c: Connection) -> set[tuple[str, int]]:
    """The helper and label that the groups give to a connection (-1: none): a small model of nft's rules."""
    found: set[tuple[str, int]] = set()
    for group in rule_groups(attachments, labels):
        if (group.path, group.l3proto, group.l4proto) != (c.path, c.l3proto, c.l4proto):
            continue
        label = -1 if group.label is None else group.label
        if group.single is not None and attached(group.single, c):
            found.add(((group.key or group.single.key).name, label))
        found |= {((group.key or e.helper).name, label) for e in group.elements if matches(e, c)}
    return found


def matches(e: Element, c: Connection) -> bool:
    return (
        e.interface in ("", c.interface)
        and contains(tuple(filter(None, (e.saddr,))), c.saddr)
        and contains(tuple(filter(None, (e.daddr,))), c.daddr)
        and e.ports.first <= c.port <= e.ports.last
    )


def by_iptables(rule: IptablesRule, c: Connection) -> bool:
    ranges = [r.split(":") for r in rule.dports.split(",")]
    return (
        rule.l4proto is c.l4proto
        and rule.interface in ("", c.interface)
        and contains(tuple(filter(None, (rule.saddr,))), c.saddr)
        and contains(tuple(filter(None, (rule.daddr,))), c.daddr)
        and any(int(r[0]) <= c.port <= int(r[-1]) for r in ranges)
    )


labelled_names = st.sets(st.sampled_from(["ftp", "tns"]))


@given(profiles(), labelled_names, st.lists(connections(), min_size=1, max_size=20))
def test_nft_groups_attach_and_label_what_the_attachments_say(
    attachments: tuple[Attachment, ...], labelled: set[str], seen: list[Connection]
) -> None:
    labels = labels_of(attachments, labelled)
    for connection in seen:
        mine = {a.key for a in attachments if attached(a, connection)}
        assert by_nft(attachments, labels, connection) == {(key.name, labels.get(key, -1)) for key in mine}


@given(profiles(), st.lists(connections(), min_size=1, max_size=20))
def test_iptables_rules_attach_what_the_attachments_say(
    attachments: tuple[Attachment, ...], seen: list[Connection]
) -> None:
    for c in seen:
        mine = (a for a in attachments if (a.path, a.key.l3proto) == (c.path, c.l3proto))
        assert {r.helper for r in iptables_rules(mine) if by_iptables(r, c)} == wanted(attachments, c)


@given(profiles(), labelled_names)
def test_entries_of_one_set_or_map_never_overlap(attachments: tuple[Attachment, ...], labelled: set[str]) -> None:
    for group in rule_groups(attachments, labels_of(attachments, labelled)):
        as_attachments = [
            Attachment(
                e.helper,
                group.path,
                (e.ports,),
                e.interface,
                tuple(filter(None, (e.saddr,))),
                tuple(filter(None, (e.daddr,))),
            )
            for e in group.elements
        ]
        assert not any(overlaps(a, b) for a, b in combinations(as_attachments, 2))


@given(profiles(), labelled_names)
def test_an_entry_has_a_value_for_each_selector(attachments: tuple[Attachment, ...], labelled: set[str]) -> None:
    for group in rule_groups(attachments, labels_of(attachments, labelled)):
        assert all(len(e.values) == len(group.selectors) for e in group.elements)
        assert group.single is None or len(group.conditions) == len(group.selectors)


@given(profiles(), labelled_names)
def test_the_order_of_attachments_does_not_matter(attachments: tuple[Attachment, ...], labelled: set[str]) -> None:
    labels = labels_of(attachments, labelled)
    forwards, backwards = rule_groups(attachments, labels), rule_groups(reversed(attachments), labels)
    assert [g.elements for g in forwards] == [g.elements for g in backwards]


triggers = st.lists(st.binary(min_size=1, max_size=4), max_size=6).map(tuple)


def is_queued_by(rule: QueueRule, l4proto: L4Proto, payload: bytes, *, is_adjusted: bool) -> bool:
    """What a queue rule does with a packet of a labelled connection: a small model of nft's matches."""
    for match in rule.matches:
        if match.startswith("meta l4proto "):
            is_met = match.split()[-1] == l4proto
        elif match == "ct status & 64 == 64":
            is_met = is_adjusted
        elif match == "@ih,0,8 >= 0":
            is_met = bool(payload)
        else:
            bits, values = match.removeprefix("@ih,0,").split(" ", 1)
            is_met = f"0x{payload[: int(bits) // 8].hex()}" in values.strip("{} ").split(", ")
        if not is_met:
            return False
    return True


@given(
    st.sets(st.sampled_from(L4Proto), min_size=1),
    triggers,
    st.sampled_from(L4Proto),
    st.binary(max_size=6),
    st.booleans(),
)
def test_queue_rules_queue_payloads_and_only_those_with_a_trigger_if_there_are_any(
    served: set[L4Proto],
    begins: tuple[bytes, ...],
    l4proto: L4Proto,
    rest: bytes,
    is_adjusted: bool,  # noqa: FBT001
) -> None:
    """The triggers are TCP's; only TCP's sequence numbers can have been adjusted."""
    keys = tuple(HelperKey("x", L3Proto.IP, served_l4) for served_l4 in sorted(served))
    is_tcp = l4proto is L4Proto.TCP
    queue = RuleQueue("x", keys, 5, 10, 11 if L4Proto.TCP in served else None, begins)
    for payload in {rest, *(begin + rest for begin in begins)}:
        hit = next(
            (
                r.queue_num
                for r in queue_rules(queue)
                if is_queued_by(r, l4proto, payload, is_adjusted=is_adjusted and is_tcp)
            ),
            None,
        )
        if l4proto not in served:
            continue
        wanted_queue = 11 if is_adjusted and is_tcp else 10
        is_wanted = bool(payload) and (not is_tcp or not begins or payload.startswith(begins))
        assert hit == (wanted_queue if is_wanted else None)


@given(st.lists(port_ranges, max_size=8))
def test_merged_ports_are_the_same_ports_and_disjoint(ports: list[PortRange]) -> None:
    merged = merged_ports(ports)
    assert {n for p in merged for n in range(p.first, p.last + 1)} == {
        n for p in ports for n in range(p.first, p.last + 1)
    }
    assert all(a.last < b.first for a, b in pairwise(merged))


@given(st.lists(st.integers(1, 60000).map(lambda n: PortRange(n, n + n % 2)), min_size=1, max_size=80))
def test_a_multiport_match_holds_what_it_can(ports: list[PortRange]) -> None:
    key = HelperKey("ftp", L3Proto.IP, L4Proto.TCP)
    for rule in iptables_rules([Attachment(key, Path.INCOMING, tuple(ports))]):
        assert 1 <= sum(1 + (":" in p) for p in rule.dports.split(",")) <= MULTIPORT_SLOTS
