"""What the rest of orch asks of the system; kernel/, supervise/ and fake.py are the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.engine.counters import Snapshot
from orchestrator.model import Backend, HelperKey, Listing, Netns, ProcessSpec, QueueRow, Registration, Rules


class Registry(Protocol):
    """The host-wide helper registry. Every method raises KernelError with the errno of the kernel."""

    def is_present(self) -> bool:
        """False if the subsystem is not loaded; asking loads nothing."""

    def dump(self) -> tuple[Registration, ...]:
        """All user-space registrations of the host, sorted by key; empty, without loading anything, if not present."""

    def create(self, registration: Registration) -> None:
        """Register; EEXIST if the key is there already, EBUSY if an in-kernel helper has it. Loads the module."""

    def update(self, registration: Registration) -> None:
        """Change queue, status and policy values; ENOENT if it is not there, EBUSY if identity would change."""

    def delete(self, key: HelperKey) -> None:
        """Unregister; ENOENT if not there, EBUSY (before 7.3) while rules refer to it."""


class RuleBackend(Protocol):
    """One way of writing rules; works in the namespace it is given. Loading is atomic per document."""

    def load(self, netns: Netns, rules: Rules) -> None:
        """Replace the rules of this profile in place."""

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


class Host(Protocol):
    """Everything else that is looked at: modules, queues, namespaces, connections. Nothing here changes anything."""

    def kernel_release(self) -> str: ...
    def loaded_modules(self, names: tuple[str, ...]) -> frozenset[str]:
        """Those of `names` that are loaded or built in."""

    def available_modules(self, names: tuple[str, ...]) -> frozenset[str]:
        """Those of `names` that modprobe could load, or that are loaded or built in."""

    def find_netns(self, name: str) -> Netns:
        """Resolve a name, a path, or "" for the caller's own; raises PreflightError if it does not exist."""

    def known_netns(self) -> tuple[Netns, ...]:
        """The caller's namespace and all named ones."""

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


@dataclass(frozen=True, slots=True)
class ProcessSeen:
    """A process of ours that runs now. `digest` identifies the documents it was started with; `since_s` is its age.

    `watched` is false when nobody is left who would disable its registrations should it die. Age does not compare.
    """

    profile: str
    netns: str
    name: str
    pid: int
    digest: str
    since_s: float = field(compare=False)
    watched: bool


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

    def stop(self, process: ProcessSeen) -> None:
        """End the process and its watcher; returns when both are gone."""

    def watch(self, launch: Launch, process: ProcessSeen) -> None:
        """Give a running process a new watcher."""

    def counters(self, profile: str, netns: Netns, name: str) -> Snapshot | None:
        """What a native helper process counts, None if there is none of that name or it has not begun to count."""

    def last_words(self, profile: str, netns: Netns, name: str) -> str:
        """How the process of that name ended last, or the last line it wrote; empty if unknown."""

    def cleanup(self, profile: str, netns: Netns) -> None:
        """Remove the runtime directory of a profile."""


class Modules(Protocol):
    def load(self, name: str) -> None:
        """Load a kernel module; raises PreflightError if there is none of that name."""


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since some start, never set back."""

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
