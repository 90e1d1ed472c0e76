"""The adapters of a system, wrapped for tests: a call of those named here goes by way of `around`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from orchestrator.ports import System

CHANGES = {
    "registry": ("create", "update", "delete"),
    "rules": ("load", "flush", "remove"),
    "processes": ("start", "stop", "watch", "succeed", "serve", "set_reconcile", "cleanup"),
    "modules": ("load",),
}
LOOKS = {
    "registry": ("dump",),
    "rules": ("listing", "profiles", "expected", "foreign_references"),
    "host": ("loaded_modules", "find_netns", "known_netns", "inhabited_path", "netns_cookie", "queues", "connections"),
    "processes": ("running", "reconciles", "supervised"),
}
OTHERS = {
    "registry": ("is_present",),
    "rules": ("version",),
    "host": (
        *("kernel_release", "available_modules", "program", "process_name", "iptables_variant", "machine"),
        *("expectations", "unrelated_filters", "foreign_queues", "foreign_labels", "interfaces", "module_ports"),
        *("probe", "sysctl", "flowtables", "helper_rules", "earlier_rules", "route"),
        *("live_connections", "live_expectations"),
    ),
    "processes": ("settle", "counters", "lifetimes", "last_words"),
    "clock": ("monotonic", "boottime", "sleep"),
}
"""What changes nothing, and is not made to fail: it waits, or tells what people want to know."""

Around = Callable[[str, Callable[[], Any]], Any]
"""Gets `PORT.METHOD` and the call itself, and gives back what that gives."""


def wrapped(system: System, around: Around, *kinds: Mapping[str, Collection[str]]) -> System:
    """The same system, whose calls of these kinds go through `around`."""

    def wrap(port: str, adapter: object) -> Any:
        names = frozenset(name for kind in kinds for name in kind.get(port, ()))
        return cast("Any", _Wrapped(adapter, port, names, around)) if names else adapter

    return replace(
        system,
        registry=wrap("registry", system.registry),
        rules={backend: wrap("rules", rules) for backend, rules in system.rules.items()},
        host=wrap("host", system.host),
        processes=wrap("processes", system.processes),
        modules=wrap("modules", system.modules),
    )


@dataclass(frozen=True, slots=True)
class _Wrapped:
    adapter: object
    port: str
    names: frozenset[str]
    around: Around

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.adapter, name)
        if name not in self.names:
            return attribute
        return lambda *args, **options: self.around(f"{self.port}.{name}", lambda: attribute(*args, **options))
