"""Look at the system for one profile in one namespace; nothing is changed and no kernel module is loaded by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from orchestrator import catalogue
from orchestrator.errors import PreflightError
from orchestrator.journal import Ledger
from orchestrator.model import (
    HELPER_PROGRAM,
    Backend,
    Engine,
    HelperKey,
    L4Proto,
    Listing,
    Netns,
    QueueRow,
    Registration,
    Status,
    Target,
)
from orchestrator.ports import ProcessSeen, RuleBackend, System
from orchestrator.release import idles_iptables
from orchestrator.state import Applied, Observed, Owner, rules_name

T = TypeVar("T")

_SUBSYSTEM = "nfnetlink_cthelper"
_PROCESSES = "/proc/"
CONCRETE_BACKENDS = (Backend.NFTABLES, Backend.IPTABLES_LEGACY, Backend.IPTABLES_NFT)


@dataclass(frozen=True, slots=True)
class Observer:
    system: System
    ledger: Ledger

    def observe(
        self, owner: Owner, target: Target | None, *, applied: Applied | None = None, is_thorough: bool = False
    ) -> Observed:
        """Everything that a plan for `owner` needs to know.

        A thorough look goes into every namespace, for rules that the ledger does not know, and counts connections:
        dear on a large host, and of no matter as long as nothing is adopted, cut or unregistered.
        `applied` stands in for what the ledger remembers; its baseline was listed just now, and is taken as it is.
        """
        netns = owner.netns
        fresh = applied.baseline if applied and applied.baseline.digest else None
        applied = applied or self.ledger.find(owner)
        registrations = self.system.registry.dump()
        is_there = self.is_there(netns)
        all_listings = self._listings(owner, fresh) if is_there else ()
        # A flush takes the digest with it: then only the ledger tells that the table is ours.
        is_known = applied is not None or bool(self.ledger.unsettled(owner))
        listings = tuple(listing for listing in all_listings if listing.digest or is_known)
        neighbours = self.ledger.neighbours(owner)
        queues = self.system.host.queues(netns) if is_there else ()
        strays = tuple(self.unrecorded()) if is_thorough else ()
        users = self._users(owner, strays)
        modules = tuple(sorted(module_helpers()) if target is None else {*module_helpers(), *target.modules})
        loaded = self.system.host.loaded_modules(modules)
        return Observed(
            netns=netns,
            registrations=registrations,
            recorded=self.ledger.recorded(),
            users=users,
            deaf={r.key: deaf for r in registrations if (deaf := self.deaf(r, users.get(r.key, ())))},
            listings=listings,
            foreign_table=next((rules_name(x, owner.profile) for x in all_listings if x not in listings), ""),
            applied=applied,
            baseline=self._baseline(listings, applied, target, registrations, loaded),
            neighbours=neighbours,
            processes=tuple(
                p for p in self.system.processes.running() if p.profile == owner.profile and p.netns == netns.identity
            ),
            queues=queues,
            queue_holders=self._queue_holders(neighbours, queues),
            modules=loaded,
            loadable=self.system.host.available_modules(target.modules) if target else frozenset(),
            kernel_helpers=_taken(loaded),
            foreign_references=self._foreign_references() if is_thorough else frozenset(),
            missing_programs=frozenset(
                spec.argv[0]
                for spec in (target.processes if target else ())
                if spec.argv[0] != HELPER_PROGRAM and self.system.host.program(spec.argv[0]) is None
            ),
            reconciles=self.system.processes.reconciles(owner.profile, netns),
            stale=frozenset() if fresh else self.ledger.stale(owner),
            has_cthelper=bool(self.system.host.available_modules((_SUBSYSTEM,))),
            connections=self.system.host.connections(netns) if is_thorough and is_there else {},
            connections_elsewhere=self._connections_elsewhere(netns, users) if is_thorough else {},
            has_strays=bool(strays) if is_thorough else None,
            idles_iptables=idles_iptables(self.system.host.kernel_release()),
            would_idle=self.would_idle(owner) if is_thorough else (),
        )

    def _connections_elsewhere(self, netns: Netns, users: Mapping[HelperKey, tuple[Owner, ...]]) -> Mapping[str, int]:
        """Live connections in other namespaces, by the name of a helper that profiles there use."""
        places = {owner.netns.identity: owner.netns for owners in users.values() for owner in owners}
        found: Counter[str] = Counter()
        for identity, place in places.items():
            if identity == netns.identity or not self.is_there(place):
                continue
            names = {key.name for key, owners in users.items() if any(o.netns.identity == identity for o in owners)}
            seen = self.system.host.connections(place)
            found.update({name: seen.get(name, 0) for name in names})
        return found

    def _listings(self, owner: Owner, fresh: Listing | None) -> tuple[Listing, ...]:
        found = (
            fresh if fresh and fresh.backend is b else self.system.rules[b].listing(owner.netns, owner.profile)
            for b in CONCRETE_BACKENDS
        )
        return tuple(listing for listing in found if listing is not None)

    def _users(
        self, owner: Owner, unrecorded: Iterable[tuple[Owner, Listing]]
    ) -> Mapping[HelperKey, tuple[Owner, ...]]:
        """Other owners of each key: those the ledger knows, and those whose rules alone tell of them."""
        users = {key: list(owners) for key, owners in self.ledger.users().items()}
        for other, listing in unrecorded:
            for key in listing.helpers:
                users.setdefault(key, []).append(other)
        me = (owner.profile, owner.netns.identity)
        others = {key: tuple(o for o in owners if (o.profile, o.netns.identity) != me) for key, owners in users.items()}
        return {key: owners for key, owners in others.items() if owners}

    def would_idle(self, *but: Owner) -> tuple[str, ...]:
        """Where iptables rules of anybody but these owners attach helpers, if this kernel makes such rules idle.

        What the ledger knows is enough; where it knows of none, every namespace that can be reached is looked into.
        """
        if not idles_iptables(self.system.host.kernel_release()):
            return ()
        spared = {(owner.profile, owner.netns.identity) for owner in but}
        owners = [applied.owner for applied in self.ledger.applied() if applied.target.attaches_by_iptables]
        known = tuple(str(o) for o in owners if (o.profile, o.netns.identity) not in spared)

        def look(netns: Netns) -> list[str]:
            found = {profile for backend in backends for profile in backend.profiles(netns)}
            ours = [str(Owner(p, netns)) for p in sorted(found) if (p, netns.identity) not in spared]
            is_foreign = any(backend.foreign_references(netns) for backend in backends)
            return [*ours, f"somebody else in netns {netns}"] if is_foreign else ours

        backends = self._iptables()
        return known or tuple(place for netns in self._inhabited() for place in or_nothing(look, netns))

    def in_the_way(self, owner: Owner) -> tuple[str, ...]:
        """Where iptables rules that would be idle are loaded now, those of an owner who is half-way included."""
        found = self.would_idle(owner)
        if found or not idles_iptables(self.system.host.kernel_release()):
            return found
        own = [or_nothing(backend.profiles, owner.netns) for backend in self._iptables()]
        return (str(owner),) if any(owner.profile in names for names in own) else ()

    def _iptables(self) -> list[RuleBackend]:
        return [self.system.rules[backend] for backend in CONCRETE_BACKENDS if not backend.is_nftables]

    def unrecorded(self) -> Iterable[tuple[Owner, Listing]]:
        """Rules of ours in any namespace that can be reached, of profiles that the ledger does not know, each once."""
        recorded = {(o.profile, o.netns.identity) for o in self.ledger.owners()}

        def look(netns: Netns) -> tuple[tuple[Owner, Listing], ...]:
            return tuple(
                (Owner(profile, netns), listing)
                for backend in CONCRETE_BACKENDS
                for profile in self.system.rules[backend].profiles(netns)
                if (profile, netns.identity) not in recorded
                and (listing := self.system.rules[backend].listing(netns, profile)) is not None
            )

        for netns in self._namespaces():
            yield from or_nothing(look, netns)

    def unused(self) -> tuple[Registration, ...]:
        """Registrations of ours that rest, as nobody uses them any more, if nothing stands in the way of their removal.

        Who took one over since has given it other properties, or enabled it.
        """
        users, recorded = self.ledger.users(), self.ledger.recorded()
        mine = {key: r for key, r in recorded.items() if key not in users}
        live = self.system.registry.dump() if mine else ()
        found = [r for r in live if r.key in mine and r.can_become(mine[r.key]) and r.status is Status.DISABLED]
        if not found or self.would_idle():
            return ()
        attached = {key for _, listing in self.unrecorded() for key in listing.helpers}
        foreign = self._foreign_references()
        return tuple(r for r in found if r.key not in attached and r.key.name not in foreign)

    def strays(self) -> tuple[Owner, ...]:
        """Profiles that the ledger does not know, told by rules or processes of ours, each once."""
        found = {(o.profile, o.netns.identity): o for o, _ in self.unrecorded()}
        named = {netns.identity: netns for netns in self._namespaces()}
        recorded = {(o.profile, o.netns.identity) for o in self.ledger.owners()}
        for process in self.system.processes.running():
            if process.pid and (process.profile, process.netns) not in recorded:
                netns = named.get(process.netns) or _of_process(process)
                found.setdefault((process.profile, process.netns), Owner(process.profile, netns))
        return tuple(found.values())

    def _inhabited(self) -> Iterable[Netns]:
        """Every namespace that can be reached by a name, or through a process of ours that runs in it, once each."""
        found = {owner.netns.identity: owner.netns for owner in self.ledger.owners()}
        found |= {p.netns: _of_process(p) for p in self.system.processes.running() if p.pid}
        return (found | {netns.identity: netns for netns in self.system.host.known_netns()}).values()

    def _namespaces(self) -> Iterable[Netns]:
        """Every namespace that can be reached by a name, once each."""
        known = {n.identity: n for n in (*self.system.host.known_netns(), *(o.netns for o in self.ledger.owners()))}
        return known.values()

    def others(self, owner: Owner) -> Mapping[HelperKey, tuple[Owner, ...]]:
        """The other owners that the ledger knows of each registration."""
        return self._users(owner, ())

    def deaf(self, registration: Registration, owners: Iterable[Owner]) -> tuple[Owner, ...]:
        """Those owners in whose namespace nobody listens on the queue of a registration."""
        return tuple(
            owner
            for owner in owners
            if self.is_there(owner.netns)
            and all(row.queue_num != registration.queue_num for row in or_nothing(self.system.host.queues, owner.netns))
        )

    def current(self, owner: Owner) -> Owner:
        """The same, by the name that its namespace has now if the path that is known leads there no more.

        What was found by a process is so by any that lives there.
        """
        netns = owner.netns
        if self.is_there(netns):
            return owner
        found = [n for n in self.system.host.known_netns() if n.identity == netns.identity]
        if not found and netns.path.startswith(_PROCESSES) and (path := self._inhabited_path(netns)):
            found = [replace(netns, path=path)]
        return next((replace(owner, netns=n) for n in found if not self.is_another(n)), owner)

    def is_remade(self, netns: Netns) -> bool:
        """Whether its name leads to another namespace now, and it has no other name, and nobody lives in it."""
        if not netns.path or netns.path.startswith(_PROCESSES):
            return False
        try:
            is_another = self.system.host.find_netns(netns.path).identity != netns.identity
        except PreflightError:
            return False
        known = {n.identity for n in self.system.host.known_netns()} if is_another else {netns.identity}
        return netns.identity not in known and not self._inhabited_path(netns)

    def _inhabited_path(self, netns: Netns) -> str:
        return self.system.host.inhabited_path(netns.identity)

    def is_there(self, netns: Netns) -> bool:
        """Whether the path of a namespace leads to it still, and not to another."""
        try:
            return self.system.host.find_netns(netns.path).identity == netns.identity and not self.is_another(netns)
        except PreflightError:
            return False

    def is_another(self, netns: Netns) -> bool:
        """Whether a namespace only has the identity of one that the ledger knows, which is gone."""
        known = self.ledger.cookie(netns)
        try:
            return known != 0 and known != self.system.host.netns_cookie(netns)
        except PreflightError:
            return False

    def _baseline(
        self,
        listings: tuple[Listing, ...],
        applied: Applied | None,
        target: Target | None,
        registrations: tuple[Registration, ...],
        loaded: frozenset[str],
    ) -> Listing | None:
        """How the live rules should list: as the ledger remembers, else as their document lists if loaded elsewhere."""
        for listing in listings:
            backend = self.system.rules[listing.backend]
            if applied and applied.baseline.digest == listing.digest and applied.tool == backend.version():
                return applied.baseline
            known = [t.rules for t in (applied.target if applied else None, target) if t is not None]
            rules = next((r for r in known if r.digest == listing.digest and r.backend is listing.backend), None)
            if rules is None:
                continue
            there = {r.key for r in registrations}
            taken = _taken(loaded)
            # Naming a helper that is not registered would make the kernel load a module of that name.
            if all(key in there or (key.name, key.l4proto) in taken for key in listing.helpers):
                return backend.expected(rules)
        return None

    def _queue_holders(self, neighbours: tuple[Applied, ...], queues: tuple[QueueRow, ...]) -> Mapping[int, str]:
        names = {
            queue: str(applied.owner)
            for applied in neighbours
            for spec in applied.target.processes
            for queue in spec.queues
        }
        return {row.queue_num: names.get(row.queue_num) or self.system.host.process_name(row.port_id) for row in queues}

    def _foreign_references(self) -> frozenset[str]:
        return frozenset(
            name
            for netns in self._namespaces()
            for backend in CONCRETE_BACKENDS
            for name in or_nothing(self.system.rules[backend].foreign_references, netns)
        )


def _of_process(process: ProcessSeen) -> Netns:
    path = f"/proc/{process.pid}/ns/net"
    return Netns(path, path, process.netns)


def or_nothing(look: Callable[[Netns], Iterable[T]], netns: Netns) -> Iterable[T]:
    """What a look into a namespace gives; nothing where it has gone meanwhile, or may not be entered."""
    try:
        return look(netns)
    except PreflightError:
        return ()


@cache
def module_helpers() -> Mapping[str, frozenset[tuple[str, L4Proto]]]:
    """Which (name, l4proto) each kernel module of the catalogue takes in the helper registry."""
    result: dict[str, set[tuple[str, L4Proto]]] = {}
    for entry in catalogue.helpers().values():
        engine = entry.engine(Engine.KERNEL)
        if engine is None:
            continue
        for module in engine.modules:
            if module.startswith("nf_conntrack_"):
                result.setdefault(module, set()).update(
                    (engine.name_for(p.l4proto), p.l4proto) for p in entry.protocols
                )
    return {module: frozenset(taken) for module, taken in result.items()}


def _taken(loaded: frozenset[str]) -> frozenset[tuple[str, L4Proto]]:
    return frozenset(pair for module, pairs in module_helpers().items() if module in loaded for pair in pairs)
