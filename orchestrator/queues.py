"""Numbers that helpers need of their own: NFQUEUE numbers, and bits of the connection label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

from orchestrator.model import LABEL_BITS, Engine

AUTO_FIRST = 16384
AUTO_COUNT = 32768
"""`queue: auto` takes numbers from here: away from 0 and the small numbers that other software uses."""

AUTO_LABELS = LABEL_BITS // 2
"""`label: auto` takes the upper half of the bits first; people number their own from 0."""


@dataclass(frozen=True, slots=True, order=True)
class Service:
    """What needs `count` numbers in a row. Who shares the queue has the same service, and hence the same number.

    conntrackd finds a plugin by nothing but the queue number: `ftp/ip/tcp`, one for each family and protocol. For the
    native engine it is a helper of a profile (queued by rules), or a registration.
    """

    engine: Engine
    what: str
    count: int = 1

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True, slots=True)
class Block:
    """The services of the helper `label`, in order; `first` is the number of the first one, None for automatic."""

    label: str
    services: tuple[Service, ...]
    first: int | None


@dataclass(frozen=True, slots=True)
class Fault:
    """Numbers asked for by helper `label` that it cannot have."""

    label: str
    message: str
    hint: str


def assign(blocks: tuple[Block, ...]) -> tuple[Mapping[Service, int], tuple[Fault, ...]]:
    """The first number of each service, and what is wrong with those asked for: they collide or run past 65535.

    Automatic numbers are a hash of the service, so that every profile of a host has the same without asking.
    """
    numbers: dict[Service, int] = {}
    holders: dict[int, tuple[Service, str]] = {}
    asked = [(block, block.first) for block in blocks if block.first is not None]
    faults = tuple(fault for block, first in asked for fault in _take(block, first, numbers, holders))
    automatic = {service for block in blocks for service in block.services} - numbers.keys()
    taken = set(holders)
    for service in sorted(automatic):
        numbers[service] = _free(service, taken)
        taken.update(_row(numbers[service], service))
    return numbers, faults


def assign_labels(profile: str, wanted: Mapping[str, int | None]) -> tuple[Mapping[str, int], tuple[Fault, ...]]:
    """A bit of the connection label for each helper, None being automatic: a hash of profile and helper."""
    bits: dict[str, int] = {}
    holders: dict[int, str] = {}
    faults: list[Fault] = []
    for helper, bit in wanted.items():
        if bit is None:
            continue
        bits[helper] = bit
        if holders.setdefault(bit, helper) != helper:
            faults.append(Fault(helper, f"label {bit} is that of helper {holders[bit]}", "another one, or auto"))
    for helper in sorted(helper for helper, bit in wanted.items() if bit is None):
        free = next((bit for bit in _label_candidates(f"{profile}/{helper}") if bit not in holders), None)
        if free is None:
            faults.append(Fault(helper, f"all {LABEL_BITS} connection labels are taken", "queueing: registration"))
            continue
        bits[helper] = free
        holders[free] = helper
    return bits, tuple(faults)


def _label_candidates(text: str) -> Iterator[int]:
    """The upper half from the hash on, and then the lower."""
    start = crc32(text.encode())
    yield from (LABEL_BITS - AUTO_LABELS + (start + step) % AUTO_LABELS for step in range(AUTO_LABELS))
    yield from range(LABEL_BITS - AUTO_LABELS)


def _take(
    block: Block, first: int, numbers: dict[Service, int], holders: dict[int, tuple[Service, str]]
) -> Iterator[Fault]:
    """Enter the numbers of a block; gives the first fault, if there is one."""
    count = sum(service.count for service in block.services)
    if first + count - 1 > 0xFFFF:
        message = f"queue {first} is the first of {count}, and the last would be above 65535"
        yield Fault(block.label, message, f"at most {0x10000 - count}")
        return
    rows = [service for service in block.services for _ in range(service.count)]
    for number, service in enumerate(rows, first):
        holder, label = holders.setdefault(number, (service, block.label))
        if holder != service:
            message = f"queue {number} would carry {service}, and it carries {holder} of helper {label}"
            row = "another number" if count == 1 else f"{count} free numbers in a row"
            yield Fault(block.label, message, f"{row}, or auto")
            return
        if numbers.setdefault(service, number) not in range(number - service.count + 1, number + 1):
            message = f"queue {number} would carry {service}, which has queue {numbers[service]} in another helper"
            yield Fault(block.label, message, "conntrackd takes one number for both: write it here too, or auto")
            return


def _free(service: Service, taken: set[int]) -> int:
    offset = crc32(f"{service.engine}/{service}".encode())
    starts = AUTO_COUNT - service.count + 1
    candidates = (AUTO_FIRST + (offset + step) % starts for step in range(starts))
    return next(number for number in candidates if taken.isdisjoint(_row(number, service)))


def _row(first: int, service: Service) -> range:
    return range(first, first + service.count)
