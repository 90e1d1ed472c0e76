"""Queue numbers: one per (plugin, family, protocol), because conntrackd finds the plugin by nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

from orchestrator.model import L3Proto, L4Proto

AUTO_FIRST = 16384
AUTO_COUNT = 32768
"""`queue: auto` takes numbers from here: away from 0 and the small numbers that other software uses."""


@dataclass(frozen=True, slots=True)
class Service:
    """What one queue carries: packets for one plugin, of one family and protocol."""

    use: str
    l3proto: L3Proto
    l4proto: L4Proto

    def __str__(self) -> str:
        return f"{self.use}/{self.l3proto}/{self.l4proto}"


@dataclass(frozen=True, slots=True)
class Block:
    """The services of the helper `label`; `first` is the number of the first one in order, None for automatic."""

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
    """A number for each service, and what is wrong with the numbers asked for: they collide or run past 65535.

    Automatic numbers are a hash of the service, so that every profile of a host has the same without asking.
    """
    numbers: dict[Service, int] = {}
    holders: dict[int, tuple[Service, str]] = {}
    asked = [(block, block.first) for block in blocks if block.first is not None]
    faults = tuple(fault for block, first in asked for fault in _take(block, first, numbers, holders))
    automatic = {service for block in blocks for service in block.services} - numbers.keys()
    for service in sorted(automatic, key=str):
        numbers[service] = _free(service, set(numbers.values()))
    return numbers, faults


def _take(
    block: Block, first: int, numbers: dict[Service, int], holders: dict[int, tuple[Service, str]]
) -> Iterator[Fault]:
    """Enter the numbers of a block; gives the first fault, if there is one."""
    services = sorted(block.services, key=lambda s: (s.l4proto, s.l3proto))
    if first + len(services) - 1 > 0xFFFF:
        message = f"queue {first} is the first of {len(services)}, and the last would be above 65535"
        yield Fault(block.label, message, f"at most {0x10000 - len(services)}")
        return
    for number, service in enumerate(services, first):
        holder, label = holders.setdefault(number, (service, block.label))
        if holder != service:
            message = f"queue {number} would carry {service}, and it carries {holder} of helper {label}"
            row = "another number" if len(services) == 1 else f"{len(services)} free numbers in a row"
            yield Fault(block.label, message, f"{row}, or auto")
            return
        if numbers.setdefault(service, number) != number:
            message = f"queue {number} would carry {service}, which has queue {numbers[service]} in another helper"
            yield Fault(block.label, message, "conntrackd takes one number for both: write it here too, or auto")
            return


def _free(service: Service, taken: set[int]) -> int:
    offset = crc32(f"conntrackd/{service}".encode())
    candidates = (AUTO_FIRST + (offset + step) % AUTO_COUNT for step in range(AUTO_COUNT))
    return next(number for number in candidates if number not in taken)
