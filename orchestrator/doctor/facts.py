"""What was seen of a host, before anybody judges it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from orchestrator.model import HelperKey, L3Proto, L4Proto, Netns, QueueRow, Registration
from orchestrator.ports import EarlierRule, HelperRule, LabelRule, Machine, ProcessSeen
from orchestrator.release import idles_iptables
from orchestrator.state import Applied
from orchestrator.status import HostStatus
from orchestrator.typed import DEFAULT_STATE

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unseen:
    """Stands for what could not be looked at."""

    reason: str


class UnseenError(Exception):
    """A probe needs what could not be looked at; its text is the reason."""


def seen(value: T | Unseen) -> T:
    """A value that was looked at; raises UnseenError for one that was not."""
    if isinstance(value, Unseen):
        raise UnseenError(value.reason)
    return value


@dataclass(frozen=True, slots=True)
class Place:
    """One network namespace. `queue_holders` names who bound each queue, `sysctls` are settings by their short name.

    `interfaces` are those of the namespace, each with the VRF that it belongs to.
    """

    netns: Netns
    rules: tuple[HelperRule, ...] | Unseen
    queues: tuple[QueueRow, ...] | Unseen
    queue_holders: Mapping[int, str]
    expectations: int | Unseen
    sysctls: Mapping[str, str] | Unseen
    unrelated_filters: tuple[str, ...] | Unseen
    foreign_queues: tuple[str, ...] | Unseen
    foreign_labels: tuple[LabelRule, ...] | Unseen
    earlier_rules: tuple[EarlierRule, ...] | Unseen
    interfaces: Mapping[str, str] | Unseen
    flowtables: tuple[str, ...] | Unseen


@dataclass(frozen=True, slots=True)
class Facts:
    """A host. `registrations` are those of all namespaces; `is_whole` is false if only some of them were looked into.

    `kernel_helpers` are the (name, l4proto) that loaded modules have taken, by module. `ledger_trouble` says why the
    ledger could not be read. `stale` are runtime directories that belong to nothing, `trials` those of killed runs of
    `orch verify`, with their registrations. `answers` are those of the kernel
    to --probe by module, None if it was not asked.
    """

    machine: Machine
    loaded: frozenset[str]
    available: frozenset[str]
    kernel_helpers: Mapping[str, frozenset[tuple[str, L4Proto]]]
    registrations: tuple[Registration, ...] | Unseen
    recorded: Mapping[HelperKey, Registration]
    applied: tuple[Applied, ...]
    status: HostStatus | Unseen
    processes: tuple[ProcessSeen, ...]
    ledger_trouble: str | Unseen
    stale: tuple[str, ...]
    trials: Mapping[str, tuple[HelperKey, ...]] | Unseen
    places: tuple[Place, ...]
    is_whole: bool
    answers: Mapping[str, str] | None = None
    state_dir: Path = DEFAULT_STATE

    def applied_at(self, netns: Netns) -> tuple[Applied, ...]:
        return tuple(a for a in self.applied if a.owner.netns.identity == netns.identity)

    def may_become_idle(self, place: Place) -> tuple[str, ...]:
        """Helpers that rules of a place attach which this kernel makes idle when any helper is unregistered."""
        if not idles_iptables(self.machine.release):
            return ()
        return tuple(rule.helper for rule in seen(place.rules) if not rule.backend.is_nftables)

    @property
    def but_when(self) -> str:
        """How a cure ends that unregisters a helper: when that makes no rule idle; empty if at any time."""
        return ", once no iptables rule attaches a helper" if any(map(self.may_become_idle, self.places)) else ""

    @property
    def queued_by_rules(self) -> frozenset[HelperKey]:
        """Registrations whose packets rules of ours queue; they are disabled on purpose."""
        return frozenset(key for a in self.applied for queue in a.target.rule_queues for key in queue.keys)


def attaches(rule: HelperRule, registration: Registration) -> bool:
    """True if the rule names this registration, whether or not it takes effect where it is."""
    key = registration.key
    return (rule.helper, rule.l4proto) == (key.name, key.l4proto) and key.l3proto in rule.families


def nfct(verb: str, key: HelperKey) -> str:
    """The command that does it with a registration of somebody else; nfct knows the names of its own helpers only."""
    return f"nfct helper {verb} {key.name} {'inet' if key.l3proto is L3Proto.IP else 'inet6'} {key.l4proto}"


def listed(words: Iterable[object]) -> str:
    return ", ".join(sorted({str(word) for word in words}))
