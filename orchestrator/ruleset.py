"""The rules that attach helpers and queue their packets, grouped so that many attachments become few nft rules."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from orchestrator.model import Attachment, HelperKey, L3Proto, L4Proto, Path, PortRange, RuleQueue

_ANY_PAYLOAD = "@ih,0,8 >= 0"
# The first rewriting that changed the length of a payload sets it. Source: nf_conntrack_common.h, IPS_SEQ_ADJUST.
_IS_ADJUSTED = "ct status & 64 == 64"

# Path, family, protocol, and whether interface, source and destination are looked at.
_Shape = tuple[Path, L3Proto, L4Proto, bool, bool, bool]

MULTIPORT_SLOTS = 15  # ports that one multiport match holds; a range takes two. Source: xt_multiport.h, XT_MULTI_PORTS


class Prefix(NamedTuple):
    """An address prefix as a number, so that it sorts and nests; `end` is the first address after it."""

    first: int
    length: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """Read `10.0.0.0/8` or `fd00::1`; raises ValueError or OSError for anything else."""
        address, _, length = text.partition("/")
        packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
        first, bits = int.from_bytes(packed, "big"), 8 * len(packed)
        return cls(first, int(length or bits), first + (1 << (bits - int(length or bits))))


@dataclass(frozen=True, slots=True)
class Element:
    """One entry of a group's set or map: connections from one interface, one prefix each, to one port range."""

    interface: str
    saddr: str
    daddr: str
    ports: PortRange
    helper: HelperKey

    @property
    def values(self) -> tuple[str, ...]:
        """What nft looks up, in the order of `RuleGroup.selectors`."""
        interface = f'"{self.interface}"' if self.interface else ""
        return tuple(v for v in (interface, self.saddr, self.daddr, str(self.ports)) if v)


@dataclass(frozen=True, slots=True)
class RuleGroup:
    """One nft rule: the attachments of one path, family and protocol that look at the same things.

    All get the helper `key`, and the connection label `label` if packets of it are queued by rules; where `key` is
    None, the elements are a map that says which helper. A group of one attachment is `single`, a rule that reads well;
    else no two of `elements` overlap, as nft demands of a map.
    """

    path: Path
    l3proto: L3Proto
    l4proto: L4Proto
    by_interface: bool
    by_saddr: bool
    by_daddr: bool
    key: HelperKey | None
    label: int | None
    single: Attachment | None
    elements: tuple[Element, ...]

    @property
    def selectors(self) -> tuple[str, ...]:
        """The nft expressions that are looked up, as `iifname`, `ip saddr`, `tcp dport`."""
        used = (
            ("iifname" if self.path is Path.INCOMING else "oifname", self.by_interface),
            (f"{self.l3proto} saddr", self.by_saddr),
            (f"{self.l3proto} daddr", self.by_daddr),
            (f"{self.l4proto} dport", True),
        )
        return tuple(name for name, is_used in used if is_used)

    @property
    def guard(self) -> str:
        """A match of the family, where no address implies it."""
        if self.by_saddr or self.by_daddr:
            return ""
        return "meta nfproto ipv4" if self.l3proto is L3Proto.IP else "meta nfproto ipv6"

    @property
    def conditions(self) -> tuple[str, ...]:
        """The matches of a single attachment, one per selector."""
        if self.single is None:
            return ()
        values = (
            (f'"{self.single.interface}"',) if self.by_interface else (),
            self.single.saddr,
            self.single.daddr,
            tuple(str(p) for p in self.single.ports),
        )
        used = (_one_or_set(v) for v in values if v)
        return tuple(f"{selector} {value}" for selector, value in zip(self.selectors, used, strict=True))


@dataclass(frozen=True, slots=True)
class QueueRule:
    """One nft rule of a queue chain: packets that match go to `queue_num`, or on their way if nobody listens there."""

    matches: tuple[str, ...]
    queue_num: int


@dataclass(frozen=True, slots=True)
class IptablesRule:
    """One iptables rule; empty values are left out. `dports` is at most what one multiport match holds."""

    interface: str
    saddr: str
    daddr: str
    l4proto: L4Proto
    dports: str
    helper: str


def rule_groups(attachments: Iterable[Attachment], labels: Mapping[HelperKey, int]) -> tuple[RuleGroup, ...]:
    """Group attachments into nft rules, in a fixed order; time grows with n log n.

    Helpers in `labels` are queued by rules and get groups of their own, because no map of nft says helper and label.
    Attachments that overlap must name the same helper, which profile.py checks. Prefixes within a map must not nest, so
    those that do go to rules of their own, one per depth of nesting: whichever attaches first, it is the same helper.
    """
    buckets: dict[tuple[_Shape, tuple[HelperKey, ...]], list[Attachment]] = {}
    for attachment in map(simplified, attachments):
        a, key = attachment, attachment.key
        shape = (a.path, key.l3proto, key.l4proto, bool(a.interface), bool(a.saddr), bool(a.daddr))
        buckets.setdefault((shape, (key,) if key in labels else ()), []).append(attachment)
    return tuple(
        group
        for shape, keys in sorted(buckets)
        for group in _groups_of(shape, buckets[shape, keys], label=labels.get(keys[0]) if keys else None)
    )


def queue_rules(queue: RuleQueue) -> tuple[QueueRule, ...]:
    """The rules of a helper's queue chain, which only packets of its connections reach. Triggers are for TCP.

    `@ih,0,8 >= 0` reads the first byte of the payload and takes any, NUL too; where there is none to read, in a bare
    ACK or an ICMP error, the rule does not match. Source: nft_payload.c, nft_payload_inner_offset.
    """
    protocols = {key.l4proto for key in queue.keys}
    triggers = _triggers(queue.triggers) if L4Proto.TCP in protocols else ()
    payloads = triggers or (_ANY_PAYLOAD,)
    rules: list[QueueRule] = []
    if queue.adjusted_queue_num is not None:
        rules += [QueueRule((_IS_ADJUSTED, payload), queue.adjusted_queue_num) for payload in payloads]
    scope: tuple[str, ...] = ()
    if triggers and L4Proto.UDP in protocols:
        scope = ("meta l4proto tcp",)
        rules.append(QueueRule(("meta l4proto udp", _ANY_PAYLOAD), queue.queue_num))
    return (*rules, *(QueueRule((*scope, payload), queue.queue_num) for payload in payloads))


def iptables_rules(attachments: Iterable[Attachment]) -> tuple[IptablesRule, ...]:
    """One rule per attachment, pair of addresses and filled multiport match, in the order of the attachments."""
    return tuple(
        IptablesRule(
            interface=a.interface, saddr=saddr, daddr=daddr, l4proto=a.key.l4proto, dports=dports, helper=a.key.name
        )
        for a in map(simplified, attachments)
        for saddr in a.saddr or ("",)
        for daddr in a.daddr or ("",)
        for dports in _multiports(a.ports)
    )


def simplified(attachment: Attachment) -> Attachment:
    """The same traffic without overlap inside: ports merged, nested prefixes dropped, `/0` left out."""
    ports, saddr, daddr = attachment.ports, attachment.saddr, attachment.daddr
    return Attachment(
        attachment.key,
        attachment.path,
        merged_ports(ports) if len(ports) > 1 else ports,
        attachment.interface,
        _outermost(saddr) if saddr else saddr,
        _outermost(daddr) if daddr else daddr,
    )


def merged_ports(ports: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """The same ports, sorted, as ranges that do not overlap; ranges that only touch stay apart."""
    merged: list[PortRange] = []
    for port in sorted(ports):
        if merged and port.first <= merged[-1].last:
            merged[-1] = PortRange(merged[-1].first, max(merged[-1].last, port.last))
        else:
            merged.append(port)
    return tuple(merged)


def _outermost(texts: tuple[str, ...]) -> tuple[str, ...]:
    prefixes = {Prefix.parse(t): t for t in texts}
    kept: list[Prefix] = []
    for prefix in sorted(prefixes):
        if prefix.length == 0:
            return ()
        if not kept or prefix.first >= kept[-1].end:
            kept.append(prefix)
    return tuple(prefixes[p] for p in kept)


def _triggers(triggers: tuple[bytes, ...]) -> tuple[str, ...]:
    """One match per length of trigger, the shortest first; of those that begin alike, the shortest is enough."""
    needed = {t for t in triggers if not any(t != other and t.startswith(other) for other in triggers)}
    return tuple(
        f"@ih,0,{8 * length} " + _one_or_set(tuple(f"0x{t.hex()}" for t in sorted(needed) if len(t) == length))
        for length in sorted({len(t) for t in needed})
    )


def _one_or_set(values: tuple[str, ...]) -> str:
    return values[0] if len(values) == 1 else "{ " + ", ".join(values) + " }"


def _groups_of(shape: _Shape, attachments: list[Attachment], *, label: int | None) -> Iterator[RuleGroup]:
    if len(attachments) == 1:
        yield RuleGroup(*shape, key=attachments[0].key, label=label, single=attachments[0], elements=())
        return
    key = None if label is None else attachments[0].key
    sources = _nested(a.saddr for a in attachments)
    destinations = _nested(a.daddr for a in attachments)
    layers: dict[tuple[int, int], dict[tuple[str, Prefix | None, Prefix | None, HelperKey], list[PortRange]]] = {}
    texts: dict[Prefix | None, str] = {None: ""}
    for a in attachments:
        for saddr in a.saddr or ("",):
            source, source_depth = sources[saddr]
            texts[source] = saddr
            for daddr in a.daddr or ("",):
                destination, destination_depth = destinations[daddr]
                texts[destination] = daddr
                layer = layers.setdefault((source_depth, destination_depth), {})
                layer.setdefault((a.interface, source, destination, a.key), []).extend(a.ports)
    for depth in sorted(layers):
        elements = (
            Element(interface, texts[source], texts[destination], ports, key)
            for (interface, source, destination, key), all_ports in sorted(layers[depth].items(), key=itemgetter(0))
            for ports in merged_ports(all_ports)
        )
        yield RuleGroup(*shape, key=key, label=label, single=None, elements=tuple(elements))


def _nested(addresses: Iterable[tuple[str, ...]]) -> dict[str, tuple[Prefix | None, int]]:
    """Every prefix text with its value and the number of others around it. Equal depth means equal or disjoint."""
    prefixes = {text: Prefix.parse(text) for texts in addresses for text in texts}
    depths: dict[Prefix, int] = {}
    ends: list[int] = []
    for prefix in sorted(set(prefixes.values())):
        while ends and ends[-1] <= prefix.first:
            ends.pop()
        depths[prefix] = len(ends)
        ends.append(prefix.end)
    return {"": (None, 0)} | {text: (prefix, depths[prefix]) for text, prefix in prefixes.items()}


def _multiports(ports: tuple[PortRange, ...]) -> Iterator[str]:
    filled: list[str] = []
    slots = 0
    for port in ports:
        needed = 1 if port.first == port.last else 2
        if slots + needed > MULTIPORT_SLOTS:
            yield ",".join(filled)
            filled, slots = [], 0
        filled.append(str(port).replace("-", ":"))
        slots += needed
    yield ",".join(filled)
