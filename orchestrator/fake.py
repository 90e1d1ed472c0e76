"""FakeKernel: the ports in memory, with the real errnos, one registry for all namespaces, and a dump people can read.

The contract suite runs the same cases here and on real kernels; what differs between kernels is a constructor argument.
"""

from __future__ import annotations

import errno
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.engine.counters import Snapshot
from orchestrator.errors import (
    HalfDoneError,
    HelperProcessError,
    KernelError,
    NoHandoverError,
    OrchError,
    PreflightError,
)
from orchestrator.model import (
    HELPER_PROGRAM,
    Backend,
    HelperKey,
    L3Proto,
    L4Proto,
    Listing,
    Netns,
    QueueRow,
    Registration,
    Rules,
    Status,
)
from orchestrator.ports import (
    EarlierRule,
    HelperRule,
    LabelRule,
    Launch,
    Lifetimes,
    LiveConnection,
    LiveExpectation,
    Machine,
    ProcessSeen,
    Route,
    Supervised,
    System,
)

HOST = Netns("host", "", "0:1")
MACHINE = Machine(
    release="6.1.0-fake",
    python=(3, 11),
    has_net_admin=True,
    is_initial_userns=True,
    modules_dir=True,
    is_loading_allowed=True,
    libnftables="1.0.6",
    programs=dict.fromkeys(("iptables", "conntrackd", "modprobe"), "fake 1"),
    has_seccomp=True,
    lsm=(),
    has_systemd=True,
)

_OBJECT = re.compile(r'type "([^"]+)" protocol (tcp|udp);?\s*l3proto (ip6?)')
_TARGET = re.compile(r"-p (tcp|udp)\b.*--helper (\S+)")
_TYPE = re.compile(r"Type (\S+) (inet6?) (\S+) \{\s+QueueNum ([0-9]+)")


@dataclass(slots=True)
class FakeNetns:
    """One namespace: its rules by (backend, profile), bound queues by number, and what the tests put in.

    `bound` says which registration of a name the rules found when they were loaded, by how often it had been made.
    `foreign_references` are helpers that nftables rules of others attach, `foreign_iptables` those of iptables rules.
    `idle` are rules that attach nothing any more (release.idles_iptables); those of others have no profile.
    """

    netns: Netns
    rules: dict[tuple[Backend, str], Rules] = field(default_factory=dict)
    flushed: set[tuple[Backend, str]] = field(default_factory=set)
    bound: dict[tuple[Backend, str], dict[HelperKey, int]] = field(default_factory=dict)
    tampered: dict[tuple[Backend, str], str] = field(default_factory=dict)
    queues: dict[int, QueueRow] = field(default_factory=dict)
    foreign_references: set[str] = field(default_factory=set)
    foreign_iptables: set[str] = field(default_factory=set)
    idle: set[tuple[Backend, str]] = field(default_factory=set)
    expectations: dict[str, int] = field(default_factory=dict)
    connections: dict[str, int] = field(default_factory=dict)
    dropping_filters: tuple[str, ...] = ()
    foreign_queues: tuple[str, ...] = ()
    foreign_rules: tuple[HelperRule, ...] = ()
    foreign_labels: tuple[LabelRule, ...] = ()
    earlier_rules: tuple[EarlierRule, ...] = ()
    interfaces: dict[str, str] = field(default_factory=lambda: {"lo": "", "lan0": "", "wan0": ""})
    flowtables: tuple[str, ...] = ()
    sysctls: dict[str, str] = field(default_factory=dict)
    routes: dict[str, Route] = field(default_factory=dict)
    live_connections: list[tuple[L4Proto, LiveConnection]] = field(default_factory=list)
    live_expectations: list[LiveExpectation] = field(default_factory=list)
    cookie: int = field(default_factory=itertools.count(1).__next__)


@dataclass(slots=True)
class FakeKernel:
    """A host. `delete_ignores_references` is how 7.3 deletes; before it a referenced helper answers EBUSY.

    `fail_at(n, errno)` makes the n-th modifying call (from 0) fail; `calls` is the log of them. `on_modify` is told
    of each before it takes effect, and between the parts of one that is no single transaction of the kernel; it may
    raise whatever is to go wrong there. `not_ready` are processes that have not bound their queues yet.
    `gone` are namespaces whose name was deleted, `inhabited` the identities of those where a process of others runs.
    `programs` are those installed; `deaf_programs` start but never bind a queue; `dying_programs` end at once, and so
    do `dying_successors`, which are names of processes; those in `keeping` hand over nothing, which shows when they are
    asked. `counters` and `last_words` are what processes say, by name, `supervised` and `lifetimes` what supervisors
    say, by profile and namespace; `reconciled` are those told to mend. `leaked` are registrations to which idle rules
    referred that were removed: they stay until the next boot.
    """

    delete_ignores_references: bool = False
    release: str = ""
    machine: Machine = MACHINE
    probe_answers: dict[str, str] = field(default_factory=dict)
    has_cthelper: bool = True
    registrations: dict[HelperKey, Registration] = field(default_factory=dict)
    times_made: Counter[HelperKey] = field(default_factory=Counter)
    leaked: set[HelperKey] = field(default_factory=set)
    namespaces: dict[str, FakeNetns] = field(default_factory=dict)
    gone: list[FakeNetns] = field(default_factory=list)
    inhabited: set[str] = field(default_factory=set)
    modules_loaded: set[str] = field(default_factory=set)
    modules_available: dict[str, tuple[tuple[str, L4Proto], ...]] = field(default_factory=dict)
    module_ports: dict[str, tuple[int, ...]] = field(default_factory=dict)
    programs: set[str] = field(default_factory=lambda: {"conntrackd"})
    deaf_programs: set[str] = field(default_factory=set)
    dying_programs: set[str] = field(default_factory=set)
    dying_successors: set[str] = field(default_factory=set)
    keeping: set[str] = field(default_factory=set)
    running_processes: dict[int, tuple[ProcessSeen, Launch]] = field(default_factory=dict)
    not_ready: set[int] = field(default_factory=set)
    counters: dict[str, Snapshot] = field(default_factory=dict)
    last_words: dict[str, str] = field(default_factory=dict)
    supervised: dict[tuple[str, str], tuple[Supervised, ...]] = field(default_factory=dict)
    lifetimes: dict[tuple[str, str], dict[str, Lifetimes]] = field(default_factory=dict)
    reconciled: set[tuple[str, str]] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    on_modify: Callable[[str, str], None] | None = None
    now: float = 0.0
    _fail: dict[int, int] = field(default_factory=dict)
    _next_pid: int = 100

    def __post_init__(self) -> None:
        self.namespaces.setdefault("", FakeNetns(HOST))
        self.release = self.release or ("7.3.0-fake" if self.delete_ignores_references else "6.1.0-fake")

    # -- for tests ----------------------------------------------------------------------------------------------------

    def fail_at(self, call: int, number: int) -> None:
        self._fail = {len(self.calls) + call: number}

    def add_netns(self, name: str) -> Netns:
        netns = Netns(name, f"/run/netns/{name}", f"0:{len(self.namespaces) + 1}")
        self.namespaces[name] = FakeNetns(netns)
        return netns

    def at(self, netns: Netns) -> FakeNetns:
        found = next((n for n in self._spaces() if n.netns.identity == netns.identity), None)
        if found is None:
            raise PreflightError(f"there is no network namespace {netns}")
        return found

    def enter(self, netns: Netns) -> FakeNetns:
        """Where its path leads: one that lost its name, or has no process any more, is not found by it."""
        if FakeHost(self).find_netns(netns.path).identity != netns.identity:
            raise PreflightError(f"network namespace {netns} was replaced by another of that name")
        return self.at(netns)

    def kill(self, pid: int, *, watched: bool = True) -> None:
        """The process dies: its queues go, and its supervisor, if there is one, disables its registrations."""
        seen, launch = self.running_processes[pid]
        queues = self.at(launch.netns).queues
        for number in [row.queue_num for row in queues.values() if row.port_id == pid]:
            del queues[number]
        del self.running_processes[pid]
        if watched and seen.watched:
            self.disable(launch)

    def disable(self, launch: Launch) -> None:
        """What a supervisor does when its process dies, even before that was ready."""
        for key in launch.spec.keys:
            if key in self.registrations:
                self.registrations[key] = replace(self.registrations[key], status=Status.DISABLED)

    def deaf(self) -> list[HelperKey]:
        """Enabled helpers that rules of a namespace attach where nobody listens: they block new connections."""
        return [
            key
            for space in self._spaces()
            for at, rules in space.rules.items()
            if at not in space.flushed
            for key in references(rules)
            if key in self.registrations
            and self.registrations[key].status is Status.ENABLED
            and self.registrations[key].queue_num not in space.queues
        ]

    def dangling(self) -> list[HelperKey]:
        """Helpers that rules of a namespace attach, and that nobody registered."""
        return [
            key
            for space in self._spaces()
            for at, rules in space.rules.items()
            if at not in space.flushed
            for key in references(rules)
            if key not in self.registrations and not self.is_taken_by_kernel(key)
        ]

    def dead(self) -> list[HelperKey]:
        """Helpers that rules of a namespace go on attaching although another one has their name by now."""
        return [
            key
            for space in self._spaces()
            for at in space.rules
            for key, made in space.bound.get(at, {}).items()
            if key in self.registrations and made != self.times_made[key]
        ]

    def idle(self) -> list[tuple[str, Backend, str]]:
        """Rules that attach nothing any more although they are loaded, as (namespace, backend, profile)."""
        return [(space.netns.label, *at) for space in self._spaces() for at in sorted(space.idle)]

    def dump_text(self) -> str:
        """Everything there is, one line each, sorted: equal dumps mean equal hosts."""
        lines = [f"module {name}" for name in self.modules_loaded]
        lines += [f"registration {r}" for r in self.registrations.values()]
        for name, space in self.namespaces.items():
            for (backend, profile), rules in space.rules.items():
                state = " flushed" if (backend, profile) in space.flushed else ""
                state += " tampered" if (backend, profile) in space.tampered else ""
                lines.append(f"netns {name!r}: {backend} {profile} digest {rules.digest}{state}")
            lines += [f"netns {name!r}: queue {number}" for number in space.queues]
        lines += [f"reconciled {profile} in {netns}" for profile, netns in self.reconciled]
        lines += [
            f"process {p.name} of {p.profile} in {p.netns}: {p.digest}{'' if p.watched else ' unwatched'}"
            for p, _ in self.running_processes.values()
        ]
        return "\n".join(sorted(lines))

    def system(self) -> System:
        backends: dict[Backend, FakeRules] = {backend: FakeRules(self, backend) for backend in Backend}
        return System(
            FakeRegistry(self), backends, FakeHost(self), FakeProcesses(self), FakeModules(self), FakeClock(self)
        )

    # -- shared by the adapters ---------------------------------------------------------------------------------------

    def inhabited_ones(self) -> tuple[FakeNetns, ...]:
        """Namespaces in which a process of others runs."""
        return tuple(n for n in (*self.namespaces.values(), *self.gone) if n.netns.identity in self.inhabited)

    def _spaces(self) -> tuple[FakeNetns, ...]:
        """Every namespace that exists: those with a name, and those in which a process still runs."""
        inhabited = {seen.netns for seen, _ in self.running_processes.values()} | self.inhabited
        return (*self.namespaces.values(), *(n for n in self.gone if n.netns.identity in inhabited))

    def modify(self, operation: str, key: str) -> None:
        """Count a modifying call, and fail it if a test wants that."""
        number = self._fail.pop(len(self.calls), 0)
        self.calls.append(f"{operation} {key}")
        if self.on_modify is not None:
            self.on_modify(operation, key)
        if number:
            raise KernelError(operation, key, number)

    def go_on(self, operation: str, key: str) -> None:
        """The next part of a modifying call."""
        if self.on_modify is not None:
            self.on_modify(operation, key)

    def become_ready(self) -> None:
        """What was started binds its queues, whether or not anybody waits for it."""
        for pid in sorted(self.not_ready & set(self.running_processes)):
            _, launch = self.running_processes[pid]
            for number in launch.spec.queues:
                self.at(launch.netns).queues[number] = QueueRow(number, pid, 0, 0, 0, 0)
        self.not_ready.clear()

    def adopt(self, launch: Launch) -> None:
        """A supervisor that is asked for something is there from then on, and looks after all of its profile."""
        for pid, (seen, own) in self.running_processes.items():
            if (seen.profile, seen.netns) == (launch.profile, launch.netns.identity):
                self.running_processes[pid] = (replace(seen, watched=True), own)

    def pid_of(self, launch: Launch) -> int:
        """The process that runs under the name of another one, 0 if none does."""
        wanted = (launch.profile, launch.netns.identity, launch.spec.name)
        running = self.running_processes.items()
        return next((pid for pid, (seen, _) in running if (seen.profile, seen.netns, seen.name) == wanted), 0)

    def idle_iptables(self) -> None:
        """What unregistering a helper does to rules that attach one in a template."""
        if not self.release.startswith("6.1."):
            return
        for space in self._spaces():
            space.idle |= {
                at
                for at, rules in space.rules.items()
                if not at[0].is_nftables and at not in space.flushed and references(rules)
            }
            if space.foreign_iptables:
                space.idle.add((Backend.IPTABLES_LEGACY, ""))

    def unload(self, space: FakeNetns, at: tuple[Backend, str]) -> None:
        """Rules go, or others come in their place: idle ones do not let go of their helpers."""
        if at in space.idle:
            space.idle.discard(at)
            self.leaked |= references(space.rules[at])

    def is_taken_by_kernel(self, key: HelperKey) -> bool:
        return any(
            (key.name, key.l4proto) in helpers
            for module, helpers in self.modules_available.items()
            if module in self.modules_loaded
        )

    def is_referenced(self, key: HelperKey) -> bool:
        return key in self.leaked or any(
            key.name in space.foreign_references | space.foreign_iptables
            or any(key in references(rules) for rules in space.rules.values())
            for space in self._spaces()
        )


def references(rules: Rules) -> frozenset[HelperKey]:
    """The helpers that rule documents name, read from their text as the kernel would."""
    found: set[HelperKey] = set()
    for document in rules.documents:
        if rules.backend.is_nftables:
            found |= {HelperKey(n, L3Proto(l3), L4Proto(l4)) for n, l4, l3 in _OBJECT.findall(document.text)}
        else:
            l3proto = L3Proto.IP6 if "ip6" in document.name else L3Proto.IP
            found |= {HelperKey(n, l3proto, L4Proto(l4)) for l4, n in _TARGET.findall(document.text)}
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class FakeRegistry:
    kernel: FakeKernel

    def is_present(self) -> bool:
        return self.kernel.has_cthelper

    def dump(self) -> tuple[Registration, ...]:
        return tuple(self.kernel.registrations[key] for key in sorted(self.kernel.registrations))

    def create(self, registration: Registration) -> None:
        key = registration.key
        self.kernel.modify("register helper", str(key))
        if not self.kernel.has_cthelper:
            raise KernelError("register helper", str(key), errno.EINVAL)
        if key in self.kernel.registrations:
            raise KernelError("register helper", str(key), errno.EEXIST)
        if self.kernel.is_taken_by_kernel(key):
            raise KernelError("register helper", str(key), errno.EBUSY)
        self.kernel.registrations[key] = registration
        self.kernel.times_made[key] += 1

    def update(self, registration: Registration, *, keeps_status: bool = False) -> None:
        key = registration.key
        self.kernel.modify("update helper", str(key))
        seen = self.kernel.registrations.get(key)
        if seen is None:
            raise KernelError("update helper", str(key), errno.ENOENT)
        if not seen.can_become(registration):
            raise KernelError("update helper", str(key), errno.EBUSY)
        self.kernel.registrations[key] = replace(registration, status=seen.status) if keeps_status else registration

    def delete(self, key: HelperKey) -> None:
        self.kernel.modify("unregister helper", str(key))
        if key not in self.kernel.registrations:
            raise KernelError("unregister helper", str(key), errno.ENOENT)
        if self.kernel.is_referenced(key) and not self.kernel.delete_ignores_references:
            raise KernelError("unregister helper", str(key), errno.EBUSY)
        del self.kernel.registrations[key]
        self.kernel.idle_iptables()


@dataclass(frozen=True, slots=True)
class FakeRules:
    kernel: FakeKernel
    backend: Backend

    def load(self, netns: Netns, rules: Rules) -> None:
        self.kernel.modify("load rules", rules.profile)
        for key in references(rules):
            if key not in self.kernel.registrations and not self.kernel.is_taken_by_kernel(key):
                raise KernelError("load rules", rules.profile, errno.ENOENT)
        space, at = self.kernel.enter(netns), (self.backend, rules.profile)
        # A table that is replaced in place keeps its helper objects, and what those found.
        kept = space.bound.get(at, {}) if at in space.rules and self.backend.is_nftables else {}
        self._load_one_by_one(space, rules)
        self.kernel.unload(space, at)
        space.bound[at] = {key: kept.get(key, self.kernel.times_made[key]) for key in references(rules)}
        space.rules[at] = rules
        space.flushed.discard(at)
        space.tampered.pop(at, None)

    def _load_one_by_one(self, space: FakeNetns, rules: Rules) -> None:
        """Where two families are two commits, come to what is between them; if it fails there, go back."""
        at = (self.backend, rules.profile)
        before = space.rules.get(at)
        half = self._half(before, rules)
        if half is None:
            return
        space.rules[at] = half
        try:
            self.kernel.go_on("load rules of another family", rules.profile)
        except OrchError:
            try:
                self.kernel.go_on("put back rules", rules.profile)
            except KernelError as error:
                raise HalfDoneError(error.operation, error.key, error.errno) from error
            del space.rules[at]
            if before is not None:
                space.rules[at] = before
            raise

    def _take_one_by_one(self, space: FakeNetns, operation: str, profile: str) -> None:
        """The same where rules are taken away; nothing is put back then."""
        at = (self.backend, profile)
        before = space.rules.get(at)
        half = self._half(before, None)
        if half is not None:
            space.rules[at] = half
            self.kernel.go_on(f"{operation} of another family", profile)
            if before is not None:
                space.rules[at] = before

    def _half(self, before: Rules | None, after: Rules | None) -> Rules | None:
        """What there is when the first family is as after a change, and the second as before; None if there is one."""
        documents = [{d.name: d for d in rules.documents} if rules else {} for rules in (before, after)]
        families = sorted({**documents[0], **documents[1]})
        known = before or after
        if self.backend.is_nftables or len(families) < 2 or known is None:
            return None
        found = [documents[1].get(families[0]), *(documents[0].get(name) for name in families[1:])]
        digest = "" if before and after else known.digest  # the two families may not say the same
        return replace(known, digest=digest, documents=tuple(d for d in found if d is not None))

    def listing(self, netns: Netns, profile: str) -> Listing | None:
        space, at = self.kernel.enter(netns), (self.backend, profile)
        if at not in space.rules:
            return None
        listing = self.expected(space.rules[at])
        if at in space.flushed:
            return replace(listing, text="", digest="")
        return replace(listing, text=space.tampered.get(at, listing.text))

    def profiles(self, netns: Netns) -> tuple[str, ...]:
        return tuple(sorted(p for backend, p in self.kernel.enter(netns).rules if backend is self.backend))

    def flush(self, netns: Netns, profile: str) -> None:
        self.kernel.modify("flush rules", profile)
        space, at = self.kernel.enter(netns), (self.backend, profile)
        self._take_one_by_one(space, "flush rules", profile)
        self.kernel.unload(space, at)
        space.flushed.add(at)

    def remove(self, netns: Netns, profile: str) -> None:
        self.kernel.modify("remove rules", profile)
        space, at = self.kernel.enter(netns), (self.backend, profile)
        self._take_one_by_one(space, "remove rules", profile)
        self.kernel.unload(space, at)
        space.rules.pop(at, None)
        space.flushed.discard(at)
        space.tampered.pop(at, None)

    def expected(self, rules: Rules) -> Listing:
        text = "\n".join(document.text for document in rules.documents)
        return Listing(self.backend, rules.digest, text, references(rules))

    def version(self) -> str:
        return "fake 1"

    def foreign_references(self, netns: Netns) -> frozenset[str]:
        space = self.kernel.enter(netns)
        if self.backend.is_nftables:
            return frozenset(space.foreign_references)
        return frozenset(space.foreign_iptables if self.backend is Backend.IPTABLES_LEGACY else ())


@dataclass(frozen=True, slots=True)
class FakeHost:
    kernel: FakeKernel

    def kernel_release(self) -> str:
        return self.kernel.release

    def loaded_modules(self, names: tuple[str, ...]) -> frozenset[str]:
        return frozenset(names) & self.kernel.modules_loaded

    def available_modules(self, names: tuple[str, ...]) -> frozenset[str]:
        there = self.kernel.modules_loaded | set(self.kernel.modules_available)
        return frozenset(names) & (there | ({"nfnetlink_cthelper"} if self.kernel.has_cthelper else set()))

    def find_netns(self, name: str) -> Netns:
        known = {n.netns.path: n.netns for n in self.kernel.namespaces.values()}
        known |= {
            f"/proc/{pid}/ns/net": self.kernel.at(launch.netns).netns
            for pid, (_, launch) in self.kernel.running_processes.items()
        }
        known |= {f"/proc/{n.netns.identity}/ns/net": n.netns for n in self.kernel.inhabited_ones()}
        known |= {label: n.netns for label, n in self.kernel.namespaces.items()}
        if name not in known:
            raise PreflightError(f"there is no network namespace {name!r}", hint="ip netns list")
        return known[name]

    def known_netns(self) -> tuple[Netns, ...]:
        places = (space.netns for space in self.kernel.namespaces.values())
        return tuple(netns for netns in places if not netns.path.startswith("/proc/"))

    def inhabited_path(self, identity: str) -> str:
        pids = (pid for pid, (seen, _) in self.kernel.running_processes.items() if seen.netns == identity)
        others = f"/proc/{identity}/ns/net" if identity in self.kernel.inhabited else ""
        return next((f"/proc/{pid}/ns/net" for pid in pids), others)

    def netns_cookie(self, netns: Netns) -> int:
        return self.kernel.enter(netns).cookie

    def queues(self, netns: Netns) -> tuple[QueueRow, ...]:
        queues = self.kernel.enter(netns).queues
        return tuple(queues[number] for number in sorted(queues))

    def expectations(self, netns: Netns) -> Mapping[str, int]:
        return dict(self.kernel.enter(netns).expectations)

    def connections(self, netns: Netns) -> Mapping[str, int]:
        return dict(self.kernel.enter(netns).connections)

    def iptables_variant(self) -> Backend:
        return Backend.IPTABLES_NFT

    def program(self, name: str) -> str | None:
        return f"/usr/sbin/{name}" if name in self.kernel.programs else None

    def process_name(self, port_id: int) -> str:
        return f"port id {port_id}"

    def unrelated_filters(self, netns: Netns) -> tuple[str, ...]:
        return self.kernel.enter(netns).dropping_filters

    def foreign_queues(self, netns: Netns) -> tuple[str, ...]:
        return self.kernel.enter(netns).foreign_queues

    def probe(self) -> Mapping[str, str]:
        return self.kernel.probe_answers

    def machine(self) -> Machine:
        return self.kernel.machine

    def sysctl(self, netns: Netns, name: str) -> str:
        return self.kernel.enter(netns).sysctls.get(name, "")

    def flowtables(self, netns: Netns) -> tuple[str, ...]:
        return self.kernel.enter(netns).flowtables

    def helper_rules(self, netns: Netns) -> tuple[HelperRule, ...]:
        space = self.kernel.enter(netns)
        own = (
            HelperRule(
                f"{backend} orch-{profile}",
                k.name,
                (k.l3proto,),
                k.l4proto,
                backend,
                (("prerouting", -150),),
                is_ours=True,
            )
            for (backend, profile), rules in space.rules.items()
            if (backend, profile) not in space.flushed
            for k in sorted(references(rules))
        )
        return (*own, *space.foreign_rules)

    def earlier_rules(self, netns: Netns) -> tuple[EarlierRule, ...]:
        return self.kernel.enter(netns).earlier_rules

    def foreign_labels(self, netns: Netns) -> tuple[LabelRule, ...]:
        return self.kernel.enter(netns).foreign_labels

    def interfaces(self, netns: Netns) -> Mapping[str, str]:
        return dict(self.kernel.enter(netns).interfaces)

    def module_ports(self, module: str) -> tuple[int, ...]:
        return self.kernel.module_ports.get(module, ())

    def route(self, netns: Netns, address: str) -> Route:
        return self.kernel.enter(netns).routes.get(address, Route(is_local=False, interface="lan0"))

    def live_connections(self, netns: Netns, l3proto: L3Proto, l4proto: L4Proto) -> tuple[LiveConnection, ...]:
        found = (c for transport, c in self.kernel.enter(netns).live_connections if transport is l4proto)
        return tuple(c for c in found if (":" in c.ends.saddr) == (l3proto is L3Proto.IP6))

    def live_expectations(self, netns: Netns, l3proto: L3Proto) -> tuple[LiveExpectation, ...]:
        found = self.kernel.enter(netns).live_expectations
        return tuple(e for e in found if (":" in e.ends.saddr) == (l3proto is L3Proto.IP6))


@dataclass(frozen=True, slots=True)
class FakeProcesses:
    """Processes. conntrackd takes the stock registrations that it was told to serve for itself at its start."""

    kernel: FakeKernel

    def running(self) -> tuple[ProcessSeen, ...]:
        self.kernel.now += 0.001  # time passes, and with it the age of what runs
        self.kernel.become_ready()
        return tuple(replace(seen, since_s=self.kernel.now) for seen, _ in self.kernel.running_processes.values())

    def start(self, launch: Launch) -> int:
        kernel, program = self.kernel, launch.spec.argv[0]
        kernel.modify("start", launch.spec.name)
        space = kernel.at(launch.netns)
        if program in kernel.dying_programs:
            kernel.disable(launch)
            raise HelperProcessError(f"{launch.spec.name} ended at once")
        if program in kernel.deaf_programs or set(launch.spec.queues) & set(space.queues):
            raise HelperProcessError(f"{launch.spec.name} runs, but does not listen on its queues")
        for key, number in _stock_keys(launch) if program == "conntrackd" else ():
            if key in kernel.registrations:
                stock = kernel.registrations[key]
                kernel.registrations[key] = replace(stock, status=Status.ENABLED, queue_num=number)
        pid, kernel._next_pid = kernel._next_pid, kernel._next_pid + 1
        seen = ProcessSeen(
            launch.profile, launch.netns.identity, launch.spec.name, pid, launch.digest, 0.0, watched=True
        )
        seen = replace(seen, hands_over=program == HELPER_PROGRAM, queues=launch.spec.queues)
        kernel.running_processes[pid] = (seen, launch)
        kernel.adopt(launch)
        kernel.not_ready.add(pid)
        kernel.go_on("wait for", launch.spec.name)
        kernel.become_ready()
        return pid

    def succeed(self, launch: Launch) -> int:
        kernel, spec = self.kernel, launch.spec
        kernel.modify("hand over", spec.name)
        queues = kernel.at(launch.netns).queues
        before = kernel.pid_of(launch)
        taken = [number for number in spec.queues if number in queues and queues[number].port_id != before]
        if not before or spec.name in kernel.dying_successors or taken:
            raise HelperProcessError(f"{spec.name} goes on as it was: its successor ended at once")
        if spec.name in kernel.keeping and kernel.running_processes[before][0].digest != launch.digest:
            self._close_door(before)
            raise NoHandoverError(f"{spec.name} hands over nothing (it does not answer)")
        kernel.adopt(launch)
        seen, _ = kernel.running_processes.pop(before)
        if seen.digest == launch.digest:
            kernel.running_processes[before] = (seen, launch)
            return before
        pid, kernel._next_pid = kernel._next_pid, kernel._next_pid + 1
        kernel.running_processes[pid] = (
            replace(seen, pid=pid, digest=launch.digest, queues=spec.queues),
            launch,
        )
        bound = [row.queue_num for row in queues.values() if row.port_id == before]
        for number in (*bound, *spec.queues):
            queues[number] = replace(queues.get(number) or QueueRow(number, pid, 0, 0, 0, 0), port_id=pid)
        return pid

    def settle(self, launch: Launch) -> None:
        """Who takes over here does so at once."""

    def _close_door(self, pid: int) -> None:
        seen, launch = self.kernel.running_processes[pid]
        self.kernel.running_processes[pid] = (replace(seen, hands_over=False), launch)

    def serve(self, launch: Launch, queues: tuple[int, ...]) -> None:
        self.kernel.modify("serve queues", launch.spec.name)
        rows = self.kernel.at(launch.netns).queues
        pid = self.kernel.pid_of(launch)
        if not pid:
            raise HelperProcessError(f"{launch.spec.name} does not change its queues: nobody is there")
        for number in [row.queue_num for row in rows.values() if row.port_id == pid]:
            if number not in queues:
                del rows[number]
        for number in queues:
            rows.setdefault(number, QueueRow(number, pid, 0, 0, 0, 0))

    def stop(self, process: ProcessSeen) -> None:
        self.kernel.modify("stop", process.name)
        self.kernel.kill(process.pid, watched=False)

    def watch(self, launch: Launch, process: ProcessSeen) -> None:
        self.kernel.modify("watch", process.name)
        self.kernel.running_processes[process.pid] = (process, launch)
        self.kernel.adopt(launch)

    def counters(self, profile: str, netns: Netns, name: str) -> Snapshot | None:
        return self.kernel.counters.get(name)

    def supervised(self, profile: str, netns: Netns) -> tuple[Supervised, ...]:
        return self.kernel.supervised.get((profile, netns.identity), ())

    def lifetimes(self, profile: str, netns: Netns) -> Mapping[str, Lifetimes]:
        return self.kernel.lifetimes.get((profile, netns.identity), {})

    def last_words(self, profile: str, netns: Netns, name: str) -> str:
        return self.kernel.last_words.get(name, "")

    def reconciles(self, profile: str, netns: Netns) -> bool:
        return (profile, netns.identity) in self.kernel.reconciled

    def set_reconcile(self, profile: str, netns: Netns, *, is_on: bool) -> None:
        self.kernel.modify("reconcile" if is_on else "do not reconcile", profile)
        (self.kernel.reconciled.add if is_on else self.kernel.reconciled.discard)((profile, netns.identity))

    def cleanup(self, profile: str, netns: Netns) -> None:
        self.kernel.modify("clean up", profile)
        self.kernel.reconciled.discard((profile, netns.identity))


def _stock_keys(launch: Launch) -> Iterator[tuple[HelperKey, int]]:
    """What conntrackd.conf names, each with its queue."""
    for name, family, l4proto, number in _TYPE.findall("\n".join(launch.files.values())):
        l3proto = L3Proto.IP6 if family == "inet6" else L3Proto.IP
        yield HelperKey(name, l3proto, L4Proto(l4proto)), int(number)


@dataclass(frozen=True, slots=True)
class FakeModules:
    kernel: FakeKernel

    def load(self, name: str) -> None:
        self.kernel.modify("load module", name)
        if name not in self.kernel.modules_available:
            raise PreflightError(f"kernel module {name} does not exist on this host")
        self.kernel.modules_loaded.add(name)


@dataclass(frozen=True, slots=True)
class FakeClock:
    """A clock that moves when somebody sleeps, and only then."""

    kernel: FakeKernel
    on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.kernel.now

    def boottime(self) -> float:
        return self.kernel.now

    def sleep(self, seconds: float) -> None:
        self.kernel.now += seconds
        self.on_sleep()
