"""What orch looks at on the host: modules, programs, queues, namespaces, connections."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from orchestrator.kernel import conntrack, modules
from orchestrator.kernel.netns import cookie, entered, find, inhabited_path, known
from orchestrator.kernel.procfs import parse_queues, read_text
from orchestrator.model import Backend, L3Proto, L4Proto, Netns, QueueRow
from orchestrator.ports import EarlierRule, HelperRule, LabelRule, LiveConnection, LiveExpectation, Machine, Route

_QUEUE_FILE = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")  # of this thread: it follows setns


class KernelHost:
    """ports.Host of the running kernel; nothing is changed, and no module is loaded."""

    def kernel_release(self) -> str:
        return os.uname().release

    def loaded_modules(self, names: tuple[str, ...]) -> frozenset[str]:
        return frozenset(filter(modules.module_present, names))

    def available_modules(self, names: tuple[str, ...]) -> frozenset[str]:
        return modules.available(names)

    def find_netns(self, name: str) -> Netns:
        return find(name)

    def known_netns(self) -> tuple[Netns, ...]:
        return known()

    def inhabited_path(self, identity: str) -> str:
        return inhabited_path(identity)

    def netns_cookie(self, netns: Netns) -> int:
        return cookie(netns)

    def queues(self, netns: Netns) -> tuple[QueueRow, ...]:
        with entered(netns):
            try:
                return parse_queues(_QUEUE_FILE.read_text(encoding="ascii"))
            except FileNotFoundError:
                return ()

    def expectations(self, netns: Netns) -> Mapping[str, int]:
        return conntrack.expectations(netns)

    def connections(self, netns: Netns) -> Mapping[str, int]:
        return conntrack.connections(netns)

    def iptables_variant(self) -> Backend:
        from orchestrator.kernel.iptables import variant

        return variant()

    def program(self, name: str) -> str | None:
        return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")

    def process_name(self, port_id: int) -> str:
        """The kernel gives a process' first netlink socket its pid as port id, and later ones numbers above any pid."""
        try:
            return Path(f"/proc/{port_id}/comm").read_text(encoding="utf-8", errors="backslashreplace").rstrip("\n")
        except OSError:
            return f"port id {port_id}"

    def unrelated_filters(self, netns: Netns) -> tuple[str, ...]:
        from orchestrator.kernel.filters import unrelated_filters  # libnftables is loaded only for this question

        return unrelated_filters(netns)

    def foreign_queues(self, netns: Netns) -> tuple[str, ...]:
        from orchestrator.kernel.foreign_queues import foreign_queues  # libnftables is loaded only for this question

        return foreign_queues(netns)

    def foreign_labels(self, netns: Netns) -> tuple[LabelRule, ...]:
        from orchestrator.kernel.labels import foreign_labels  # libnftables is loaded only for this question

        return foreign_labels(netns)

    def interfaces(self, netns: Netns) -> Mapping[str, str]:
        from orchestrator.kernel.links import interfaces

        return interfaces(netns)

    def module_ports(self, module: str) -> tuple[int, ...]:
        return modules.ports(module)

    def probe(self) -> Mapping[str, str]:
        from orchestrator.kernel.probing import probe

        return probe()

    def machine(self) -> Machine:
        from orchestrator.kernel.machine import machine

        return machine(self.program)

    def sysctl(self, netns: Netns, name: str) -> str:
        with entered(netns):
            return read_text(f"/proc/sys/{name}")

    def flowtables(self, netns: Netns) -> tuple[str, ...]:
        from orchestrator.kernel.helper_rules import flowtables

        return flowtables(netns)

    def helper_rules(self, netns: Netns) -> tuple[HelperRule, ...]:
        from orchestrator.kernel.helper_rules import helper_rules

        return helper_rules(netns)

    def earlier_rules(self, netns: Netns) -> tuple[EarlierRule, ...]:
        from orchestrator.kernel.earlier_rules import earlier_rules

        return earlier_rules(netns)

    def route(self, netns: Netns, address: str) -> Route:
        from orchestrator.kernel.routes import route

        return route(netns, address)

    def live_connections(self, netns: Netns, l3proto: L3Proto, l4proto: L4Proto) -> tuple[LiveConnection, ...]:
        from orchestrator.kernel.live import live_connections

        return live_connections(netns, l3proto, l4proto)

    def live_expectations(self, netns: Netns, l3proto: L3Proto) -> tuple[LiveExpectation, ...]:
        from orchestrator.kernel.live import live_expectations

        return live_expectations(netns, l3proto)
