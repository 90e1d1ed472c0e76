"""One look at everything that is applied, cheap enough for every scrape: nothing is planned and no rule is listed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import OrchError
from orchestrator.journal import Ledger
from orchestrator.model import HelperKey, Netns, QueueRow, Registration
from orchestrator.ports import ProcessSeen, System
from orchestrator.state import Applied
from orchestrator.status import HelperStatus, Seen, helper_statuses


@dataclass(frozen=True, slots=True)
class ProfileSeen:
    """An applied profile at one instant; `helpers` is None if its namespace cannot be looked into.

    It is undone in `undone_in_s` (below 0: it should have been), None if nothing has to be confirmed. Watching leaves
    `held` things of it alone.
    """

    applied: Applied
    helpers: tuple[HelperStatus, ...] | None
    undone_in_s: float | None = None
    held: int = 0


@dataclass(frozen=True, slots=True)
class HostSeen:
    """All profiles, every registration that orch could have made, and how many transactions were left unfinished."""

    profiles: tuple[ProfileSeen, ...]
    registrations: tuple[Registration, ...]
    unsettled: int


@dataclass(frozen=True, slots=True)
class Scraper:
    """Looks at a host. Several threads may use one at once."""

    system: System
    state_dir: Path
    boot_id: str

    def look(self) -> HostSeen:
        """Raises OrchError if the host as a whole cannot be looked at."""
        with contextlib.closing(Ledger.open(self.state_dir, boot_id=self.boot_id, create=False)) as ledger:
            profiles = ledger.applied()
            unsettled = len(ledger.left_alone())
            clock = self.system.clock
            held = [len(ledger.mending(applied.owner).held_at(clock.monotonic())) for applied in profiles]
            now_s = clock.boottime()
            left = {(p.owner.profile, p.owner.netns.identity): p.left_s(now_s) for p in ledger.pending()}
        registrations = self.system.registry.dump()
        instant = _Instant(self.system, {r.key: r for r in registrations}, self._processes())
        seen = tuple(
            replace(
                instant.profile(applied),
                undone_in_s=left.get((applied.owner.profile, applied.owner.netns.identity)),
                held=count,
            )
            for applied, count in zip(profiles, held, strict=True)
        )
        return HostSeen(seen, registrations, unsettled)

    def _processes(self) -> Mapping[tuple[str, str], tuple[ProcessSeen, ...]]:
        """All of ours that run, by profile and namespace."""
        found: dict[tuple[str, str], tuple[ProcessSeen, ...]] = {}
        for process in self.system.processes.running():
            at = (process.profile, process.netns)
            found[at] = (*found.get(at, ()), process)
        return found


class _Instant:
    """What is looked at once for all profiles, or once for those of a namespace."""

    def __init__(
        self,
        system: System,
        registrations: Mapping[HelperKey, Registration],
        processes: Mapping[tuple[str, str], tuple[ProcessSeen, ...]],
    ) -> None:
        self._system = system
        self._registrations = registrations
        self._processes = processes
        self._namespace = functools.cache(self._look_into)

    def _look_into(self, netns: Netns) -> tuple[tuple[QueueRow, ...], Mapping[str, int]] | None:
        try:
            return self._system.host.queues(netns), self._system.host.expectations(netns)
        except OrchError:
            return None

    def profile(self, applied: Applied) -> ProfileSeen:
        profile, netns = applied.owner.profile, applied.owner.netns
        namespace = self._namespace(netns)
        if namespace is None:
            return ProfileSeen(applied, None)
        queues, expectations = namespace
        live = (self._registrations.get(wanted.key) for wanted in applied.target.registrations)
        seen = Seen(
            registrations=tuple(registration for registration in live if registration),
            processes=self._processes.get((profile, netns.identity), ()),
            queues=queues,
            expectations=expectations,
            connections=None,
            supervised=self._system.processes.supervised(profile, netns),
            lifetimes=self._system.processes.lifetimes(profile, netns),
        )
        return ProfileSeen(applied, helper_statuses(applied, seen, self._system))
