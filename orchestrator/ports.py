"""What the rest of orch asks of the system; kernel/, supervise/ and fake.py are the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from orchestrator.engine.counters import Snapshot
from orchestrator.model import (
    Backend,
    HelperKey,
    L3Proto,
    L4Proto,
    Listing,
    Netns,
    Path,
    PortRange,
    ProcessSpec,
    QueueRow,
    Registration,
    Rules,
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a host has: `programs` and `libnftables` are versions, empty where missing; `modules_dir` is of this kernel.

    `is_initial_userns`: whether root here is root of the host. `lsm` are the active security modules.
    """

    release: str
    python: tuple[int, int]
    has_net_admin: bool
    is_initial_userns: bool
    modules_dir: bool
    is_loading_allowed: bool
    libnftables: str
    programs: Mapping[str, str]
    has_seccomp: bool
    lsm: tuple[str, ...]
    has_systemd: bool


@dataclass(frozen=True, slots=True)
class HelperRule:
    """A rule, whoever wrote it, that attaches a helper; `place` is its table and chain.

    `hooks` are those from which it is reached, each with its priority. `is_late`: it sees no connection that is new.
    """

    place: str
    helper: str
    families: tuple[L3Proto, ...]
    l4proto: L4Proto
    backend: Backend
    hooks: tuple[tuple[str, int], ...]
    is_ours: bool
    is_late: bool = False


@dataclass(frozen=True, slots=True)
class EarlierRule:
    """An iptables rule of somebody else after which the jump to the rules of a profile does nothing for what it takes.

    `place` is its table and chain, `text` the rest as iptables-save lists it, `verdict` its target. Conditions that are
    empty mean any; `interface` is that of the path. `is_partial`: it has others, or it cannot be told which.
    """

    profile: str
    place: str
    text: str
    verdict: str
    l3proto: L3Proto
    path: Path
    l4proto: L4Proto | None = None
    ports: tuple[PortRange, ...] = ()
    interface: str = ""
    saddr: str = ""
    daddr: str = ""
    is_partial: bool = False

    def __str__(self) -> str:
        return f"{self.place} {self.text}"


@dataclass(frozen=True, slots=True)
class Route:
    """What the kernel's routing says of an address: whether it is of this host, and the interface that leads there."""

    is_local: bool
    interface: str


@dataclass(frozen=True, slots=True)
class Ends:
    """The two ends of a connection, as its first packet has them; addresses as text, port 0 is any."""

    saddr: str
    sport: int
    daddr: str
    dport: int


@dataclass(frozen=True, slots=True)
class LiveConnection:
    """An entry of the connection table, with the name of its helper, or none."""

    ends: Ends
    helper: str


@dataclass(frozen=True, slots=True)
class LiveExpectation:
    """What the kernel expects now, because of the connection `master`, for another `timeout_s`."""

    master: Ends
    l4proto: L4Proto
    ends: Ends
    helper: str
    timeout_s: int


class Registry(Protocol):
    """The host-wide helper registry. Every method raises KernelError with the errno of the kernel."""

    def is_present(self) -> bool:
        """False if the subsystem is not loaded; asking loads nothing."""

    def dump(self) -> tuple[Registration, ...]:
        """All user-space registrations of the host, sorted by key; empty, without loading anything, if not present."""

    def create(self, registration: Registration) -> None:
        """Register; EEXIST if the key is there already, EBUSY if an in-kernel helper has it. Loads the module."""

    def update(self, registration: Registration, *, keeps_status: bool = False) -> None:
        """Change queue, policy values and, unless it is kept, status.

        ENOENT if it is not there, EBUSY if identity would change.
        """

    def delete(self, key: HelperKey) -> None:
        """Unregister; ENOENT if not there, EBUSY (before 7.3) while rules refer to it."""


class RuleBackend(Protocol):
    """One way of writing rules; works in the namespace it is given. Loading is atomic per document."""

    def load(self, netns: Netns, rules: Rules) -> None:
        """Replace the rules of this profile in place.

        Raises KernelError if nothing was done, and HalfDoneError if some of it was, and stays.
        """

    def listing(self, netns: Netns, profile: str) -> Listing | None:
        """What is loaded for a profile, None if nothing; loads no kernel module."""

    def profiles(self, netns: Netns) -> tuple[str, ...]:
        """Names of the profiles that have rules in the namespace; loads no kernel module."""

    def flush(self, netns: Netns, profile: str) -> None:
        """Take all rules out and leave the empty table: nothing is attached any more, no waiting packet is dropped."""

    def remove(self, netns: Netns, profile: str) -> None:
        """Take the rules and their table away; nothing to do if there are none."""

    def expected(self, rules: Rules) -> Listing:
        """What `listing` would say right after `load`: loaded into a namespace made for this and removed again."""

    def version(self) -> str:
        """Version of the program that lists; listings of different versions are not compared."""

    def foreign_references(self, netns: Netns) -> frozenset[str]:
        """Names of helpers that rules *not* written by orch attach in the namespace; loads no kernel module."""


@dataclass(frozen=True, slots=True)
class LabelRule:
    """A rule that sets or matches a bit (0..127) of the connection label; `place` is family, table and chain."""

    place: str
    bit: int


class Host(Protocol):
    """Everything else that is looked at: modules, queues, namespaces, connections. Nothing here changes anything.

    Only `probe` may load modules.
    """

    def kernel_release(self) -> str: ...
    def loaded_modules(self, names: tuple[str, ...]) -> frozenset[str]:
        """Those of `names` that are loaded or built in."""

    def available_modules(self, names: tuple[str, ...]) -> frozenset[str]:
        """Those of `names` that modprobe could load, or that are loaded or built in."""

    def find_netns(self, name: str) -> Netns:
        """Resolve a name, a path, or "" for the caller's own; raises PreflightError if it does not exist."""

    def known_netns(self) -> tuple[Netns, ...]:
        """The caller's namespace and all named ones."""

    def inhabited_path(self, identity: str) -> str:
        """The path of a namespace by a process that lives in it, whoever's; empty if none can be seen."""

    def netns_cookie(self, netns: Netns) -> int:
        """What tells a namespace from a later one that got its identity; raises PreflightError if it is gone."""

    def queues(self, netns: Netns) -> tuple[QueueRow, ...]:
        """Bound queues; empty if nfnetlink_queue is not loaded."""

    def expectations(self, netns: Netns) -> Mapping[str, int]:
        """Expectations that exist now, by helper name."""

    def connections(self, netns: Netns) -> Mapping[str, int]:
        """Live connections with a helper, by helper name."""

    def iptables_variant(self) -> Backend:
        """Which of iptables-legacy and iptables-nft the plain `iptables` is on this host."""

    def program(self, name: str) -> str | None:
        """Full path of a program, None if it is not installed."""

    def process_name(self, port_id: int) -> str:
        """Name of the process with a netlink port id, as far as it can be told; else `port id N`."""

    def unrelated_filters(self, netns: Netns) -> tuple[str, ...]:
        """Base chains that drop by default and have no rule that accepts `ct state related`."""

    def foreign_queues(self, netns: Netns) -> tuple[str, ...]:
        """Base chains, not written by orch, that lead to a queue before source NAT."""

    def foreign_labels(self, netns: Netns) -> tuple[LabelRule, ...]:
        """Rules, not written by orch, that set or match connection labels; loads no kernel module."""

    def interfaces(self, netns: Netns) -> Mapping[str, str]:
        """Names of all interfaces, each with the VRF that it belongs to, empty for none."""

    def module_ports(self, module: str) -> tuple[int, ...]:
        """What a module was loaded with as `ports=`; it takes a name of its own for each port but its usual one."""

    def machine(self) -> Machine: ...
    def probe(self) -> Mapping[str, str]:
        """Ask the kernel for each module that is needed; the answer is empty if it is there. This may load modules."""

    def sysctl(self, netns: Netns, name: str) -> str:
        """A setting by its path below /proc/sys, as the namespace has it; empty if there is none of that name."""

    def flowtables(self, netns: Netns) -> tuple[str, ...]:
        """Family, table and name of flowtables; loads no kernel module."""

    def helper_rules(self, netns: Netns) -> tuple[HelperRule, ...]:
        """Every rule of the namespace that attaches a helper, whoever wrote it; loads no kernel module."""

    def earlier_rules(self, netns: Netns) -> tuple[EarlierRule, ...]:
        """Rules of others that stand before ours in table raw of iptables; loads no kernel module."""

    def route(self, netns: Netns, address: str) -> Route:
        """What the kernel's routing says of an address in the namespace."""

    def live_connections(self, netns: Netns, l3proto: L3Proto, l4proto: L4Proto) -> tuple[LiveConnection, ...]:
        """The connection table, of one family and protocol; empty, and nothing is loaded, without ctnetlink."""

    def live_expectations(self, netns: Netns, l3proto: L3Proto) -> tuple[LiveExpectation, ...]:
        """Everything that is expected now, of TCP and UDP; empty, and nothing is loaded, without ctnetlink."""


@dataclass(frozen=True, slots=True)
class ProcessSeen:
    """A process of ours that runs now, or waits for its restart (`pid` 0).

    `digest` identifies the documents it was started with; `since_s` is its age.

    `watched` is false when nobody is left who would disable its registrations should it die. Age does not compare.
    `hands_over`: another process can take over from it. `queues` are those that it was started for.
    """

    profile: str
    netns: str
    name: str
    pid: int
    digest: str
    since_s: float = field(compare=False)
    watched: bool
    hands_over: bool = False
    queues: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        return f"pid {self.pid}" if self.pid else "waits for its restart"


class ProcessState(StrEnum):
    """What a supervisor says of a process; the meanings are those of Supervisor (supervisord.org)."""

    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class Supervised:
    """A process as its supervisor sees it: `restarts` since it was first started, `reason` for the last of them.

    `since` is when it came into this state, in seconds of the wall clock. A supervisor that is gone says nothing.
    """

    name: str
    state: ProcessState
    pid: int
    restarts: int
    since: float
    reason: str


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How expectations of one helper ended, since its supervisor started to count.

    `used` were opened by a connection, `expired` were not in time, `cancelled` went away with their master, made room
    for another, or were deleted.
    """

    made: int = 0
    used: int = 0
    expired: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """A process to start: in which namespace, from which directory, with which files written there first."""

    profile: str
    netns: Netns
    spec: ProcessSpec
    files: Mapping[str, str]
    digest: str


class Processes(Protocol):
    """Helper processes: found by looking at the running processes, never by a pid file."""

    def running(self) -> tuple[ProcessSeen, ...]: ...
    def start(self, launch: Launch) -> int:
        """Start detached and watched, wait until every queue is bound and a native helper is ready; returns the pid.

        Raises HelperProcessError, with the last lines of its log, if it ends or is not ready in time; then it is gone.
        """

    def succeed(self, launch: Launch) -> int:
        """Let a new process take over the queues of the one that runs under its name; returns the pid.

        The new one listens on queues of both then. Raises HelperProcessError if it does not; the other one goes on.
        That is a NoHandoverError where the other one is to blame: it `hands_over` no more, but can be restarted.
        """

    def settle(self, launch: Launch) -> None:
        """Wait until no process is about to take over under that name, as a killed orch may have asked one to."""

    def serve(self, launch: Launch, queues: tuple[int, ...]) -> None:
        """Let the process of that name serve just these queues: what waits in others is dropped.

        Raises HelperProcessError.
        """

    def stop(self, process: ProcessSeen) -> None:
        """End the process; its supervisor does not start it again."""

    def watch(self, launch: Launch, process: ProcessSeen) -> None:
        """Give a running process a new supervisor."""

    def counters(self, profile: str, netns: Netns, name: str) -> Snapshot | None:
        """What a native helper process counts, None if there is none of that name or it has not begun to count."""

    def supervised(self, profile: str, netns: Netns) -> tuple[Supervised, ...]:
        """What the supervisor of a profile says of its processes, sorted by name; empty if it is gone."""

    def lifetimes(self, profile: str, netns: Netns) -> Mapping[str, Lifetimes]:
        """How expectations ended, by helper name; empty if nobody counts."""

    def last_words(self, profile: str, netns: Netns, name: str) -> str:
        """How the process of that name ended last, or the last line it wrote; empty if unknown."""

    def reconciles(self, profile: str, netns: Netns) -> bool:
        """Whether the supervisor of a profile is told to have drift mended."""

    def set_reconcile(self, profile: str, netns: Netns, *, is_on: bool) -> None:
        """Tell it that, or that it is not."""

    def cleanup(self, profile: str, netns: Netns) -> None:
        """Remove the runtime directory of a profile."""


class Modules(Protocol):
    def load(self, name: str) -> None:
        """Load a kernel module; raises PreflightError if there is none of that name."""


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since some start, never set back."""

    def boottime(self) -> float:
        """Seconds since the boot, those that the host slept through included; the same in every process."""

    def sleep(self, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class System:
    """All adapters together, as app.py wires them."""

    registry: Registry
    rules: Mapping[Backend, RuleBackend]
    host: Host
    processes: Processes
    modules: Modules
    clock: Clock
