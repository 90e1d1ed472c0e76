"""What orch looks at on the host: modules, programs, queues, namespaces, connections."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from orchestrator.kernel import conntrack, modules
from orchestrator.kernel.netns import entered, find, known
from orchestrator.kernel.procfs import parse_queues
from orchestrator.model import Backend, Netns, QueueRow

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
