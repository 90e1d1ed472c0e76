"""Which attachments want different helpers for the same traffic; the first attachment of a connection wins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_network
from itertools import combinations_with_replacement

from orchestrator.model import Attachment, HelperKey, PortRange

_ANY_ADDRESS = (0, 0, 0)

# (first address as a number, prefix length, bits of the family); any address is a prefix of length 0
_Prefix = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Box:
    """One combination of source and destination prefix of the attachment `index`."""

    index: int
    key: HelperKey
    interface: str
    saddr: _Prefix
    daddr: _Prefix

    @property
    def shape(self) -> tuple[bool, int, int]:
        """What the box looks at: the interface or not, and how many bits of each address."""
        return (self.interface != "", self.saddr[1], self.daddr[1])

    def seen_at(self, shape: tuple[bool, int, int]) -> tuple[str, int, int]:
        """The interface and addresses of the box, cut to a shape that is no finer than its own."""
        has_interface, saddr_bits, daddr_bits = shape
        return (
            self.interface if has_interface else "",
            _cut(self.saddr, saddr_bits),
            _cut(self.daddr, daddr_bits),
        )


def first_overlap(mine: Sequence[Attachment], theirs: Sequence[Attachment]) -> tuple[Attachment, Attachment] | None:
    """A pair of attachments, one of each side, that gives the same traffic to different helpers.

    Neither side may overlap in itself (`orch check` has seen to that).
    """
    pairs = find_overlaps((*mine, *theirs))
    return next(((mine[a], theirs[b - len(mine)]) for a, b in pairs if a < len(mine) <= b), None)


def find_overlaps(attachments: Sequence[Attachment]) -> list[tuple[int, int]]:
    """Index pairs, the lower one first, that give the same traffic to different registrations.

    Not every pair is listed, there can be n^2 of them: of any two that overlap, at least one is in a listed pair.

    Prefixes nest or are disjoint. So boxes are grouped by shape; two boxes can only meet if they are equal where both
    shapes look. For each pair of shapes a hash finds the candidates, and a sweep over their ports finds the overlaps:
    n log n for one pair of shapes, and real profiles have few shapes.
    """
    groups: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, attachment in enumerate(attachments):
        groups[attachment.path, attachment.key.l3proto, attachment.key.l4proto].append(index)
    pairs = {
        pair
        for indices in groups.values()
        if len({attachments[i].key for i in indices}) > 1
        for pair in _group_overlaps(attachments, indices)
    }
    return sorted(pairs)


def _group_overlaps(attachments: Sequence[Attachment], indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    shapes: defaultdict[tuple[bool, int, int], list[_Box]] = defaultdict(list)
    for index in indices:
        for box in _boxes(index, attachments[index]):
            shapes[box.shape].append(box)
    for one, other in combinations_with_replacement(sorted(shapes), 2):
        meet = (one[0] and other[0], min(one[1], other[1]), min(one[2], other[2]))
        left = _by_place(shapes[one], meet)
        right = left if one == other else _by_place(shapes[other], meet)
        for place in left.keys() & right.keys():
            yield from _sweep(attachments, left[place], right[place])


def _boxes(index: int, attachment: Attachment) -> Iterator[_Box]:
    for saddr in map(_prefix, attachment.saddr or ("",)):
        for daddr in map(_prefix, attachment.daddr or ("",)):
            yield _Box(index, attachment.key, attachment.interface, saddr, daddr)


@cache
def _prefix(text: str) -> _Prefix:
    if not text:
        return _ANY_ADDRESS
    network = ip_network(text)
    return (int(network.network_address), network.prefixlen, network.max_prefixlen)


def _cut(prefix: _Prefix, bits: int) -> int:
    number, _, width = prefix
    return number >> (width - bits) if bits else 0


def _by_place(boxes: Iterable[_Box], shape: tuple[bool, int, int]) -> dict[tuple[str, int, int], list[_Box]]:
    places: defaultdict[tuple[str, int, int], list[_Box]] = defaultdict(list)
    for box in boxes:
        places[box.seen_at(shape)].append(box)
    return places


@dataclass(slots=True)
class _Reach:
    """The interval that reaches furthest, and the one that does so among those of other helpers than the first."""

    best: tuple[int, HelperKey, int] | None = None
    second: tuple[int, HelperKey, int] | None = None

    def add(self, last: int, box: _Box) -> None:
        entry = (last, box.key, box.index)
        if self.best is None or last > self.best[0]:
            if self.best is not None and self.best[1] != box.key:
                self.second = self.best
            self.best = entry
        elif self.best[1] != box.key and (self.second is None or last > self.second[0]):
            self.second = entry

    def other_than(self, key: HelperKey, port: int) -> int | None:
        """Index of an attachment of another helper that reaches `port`."""
        entry = self.best if self.best is not None and self.best[1] != key else self.second
        return entry[2] if entry is not None and entry[0] >= port else None


def _sweep(attachments: Sequence[Attachment], left: list[_Box], right: list[_Box]) -> Iterator[tuple[int, int]]:
    """Pairs of a left and a right box of different helpers with a port in common; both lists may be the same."""
    sides = ((0, left),) if left is right else ((0, left), (1, right))
    events = [(p.first, p.last, side, box) for side, boxes in sides for box in boxes for p in _ports(attachments, box)]
    reaches = (_Reach(), _Reach())
    for first, last, side, box in sorted(events, key=lambda event: (event[0], event[3].index)):
        met = reaches[len(sides) - 1 - side].other_than(box.key, first)
        if met is not None:
            yield (min(met, box.index), max(met, box.index))
        reaches[side].add(last, box)


def _ports(attachments: Sequence[Attachment], box: _Box) -> tuple[PortRange, ...]:
    return attachments[box.index].ports
