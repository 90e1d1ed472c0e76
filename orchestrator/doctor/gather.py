"""Look at a host for the probes. Nothing is changed, and no kernel module is loaded by it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from orchestrator.app import App
from orchestrator.doctor.facts import Facts, Place, Unseen
from orchestrator.doctor.host_probes import MODULES
from orchestrator.errors import OrchError
from orchestrator.journal import Ledger
from orchestrator.model import HelperKey, L4Proto, Netns, QueueRow, Registration
from orchestrator.observe import module_helpers
from orchestrator.ports import Host
from orchestrator.state import Applied
from orchestrator.verify.trials import abandoned

T = TypeVar("T")

_SYSCTLS = {
    "count": "net/netfilter/nf_conntrack_count",
    "max": "net/netfilter/nf_conntrack_max",
    "expect_max": "net/netfilter/nf_conntrack_expect_max",
    "helper": "net/netfilter/nf_conntrack_helper",
    "disable_ipv6": "net/ipv6/conf/all/disable_ipv6",
}
_LEDGER = "ledger.sqlite"
_DEAF = "deaf"


def gather(app: App, *, answers: Mapping[str, str] | None = None) -> Facts:
    """Everything the probes judge; `answers` are what the kernel said when it was asked (--probe)."""
    system, host = app.system, app.system.host
    applied: tuple[Applied, ...] = ()
    recorded: Mapping[HelperKey, Registration] = {}
    with suppress(OrchError), closing(Ledger.open(app.state_dir, boot_id=app.boot_id, create=False)) as ledger:
        applied, recorded = ledger.applied(), ledger.recorded()
    chosen = _all_netns(host, applied) if app.netns is None else (host.find_netns(app.netns),)
    helpers = module_helpers()
    names = (*MODULES, *helpers)
    loaded = host.loaded_modules(names)
    processes = system.processes.running()
    registrations = _look(system.registry.dump)
    registered = () if isinstance(registrations, Unseen) else registrations
    return Facts(
        machine=host.machine(),
        loaded=loaded,
        available=host.available_modules(MODULES),
        kernel_helpers={
            module: _with_ports(taken, host.module_ports(module))
            for module, taken in helpers.items()
            if module in loaded
        },
        registrations=registrations,
        recorded=recorded,
        applied=applied,
        status=_look(app.status),
        processes=processes,
        ledger_trouble=_ledger_trouble(app.state_dir / _LEDGER),
        stale=_stale(
            app.state_dir,
            {(a.owner.profile, a.owner.netns.identity) for a in applied} | {(p.profile, p.netns) for p in processes},
        ),
        trials=_look(lambda: abandoned(r.key for r in registered)),
        places=tuple(_place(host, netns) for netns in chosen),
        is_whole=app.netns is None,
        answers=answers,
        state_dir=app.state_dir,
    )


def _with_ports(taken: frozenset[tuple[str, L4Proto]], ports: tuple[int, ...]) -> frozenset[tuple[str, L4Proto]]:
    """A module has another name for each port but the usual one. Source: nf_ct_helper_init."""
    return taken | {(f"{name}-{port}", l4proto) for name, l4proto in taken for port in ports}


def _all_netns(host: Host, applied: Iterable[Applied]) -> tuple[Netns, ...]:
    """Those that have a name, and those that something is applied in, each once."""
    return tuple({n.identity: n for n in (*(a.owner.netns for a in applied), *host.known_netns())}.values())


def _place(host: Host, netns: Netns) -> Place:
    rules = _look(lambda: host.helper_rules(netns))
    queues = _look(lambda: host.queues(netns))
    rows: tuple[QueueRow, ...] = () if isinstance(queues, Unseen) else queues

    def look_too(look: Callable[[Netns], T]) -> T | Unseen:
        """Where the rules of helpers cannot be listed no others can: libnftables would complain again for each."""
        return rules if isinstance(rules, Unseen) else _look(lambda: look(netns))

    return Place(
        netns=netns,
        rules=rules,
        queues=queues,
        queue_holders={row.queue_num: host.process_name(row.port_id) for row in rows},
        expectations=_look(lambda: sum(host.expectations(netns).values())),
        sysctls=_look(lambda: {short: host.sysctl(netns, path) for short, path in _SYSCTLS.items()}),
        unrelated_filters=look_too(host.unrelated_filters),
        foreign_queues=look_too(host.foreign_queues),
        foreign_labels=look_too(host.foreign_labels),
        earlier_rules=look_too(host.earlier_rules),
        interfaces=_look(lambda: host.interfaces(netns)),
        flowtables=look_too(host.flowtables),
    )


def _look(look: Callable[[], T]) -> T | Unseen:
    try:
        return look()
    except OrchError as error:
        return Unseen("; ".join(filter(None, (error.what, error.hint))))
    except OSError as error:
        return Unseen(f"{error.filename}: {error.strerror}")


def _ledger_trouble(file: Path) -> str | Unseen:
    """Why the ledger cannot be read; empty if it can be, and unseen by who may not."""
    try:
        file.open("rb").close()
    except FileNotFoundError:
        return ""
    except PermissionError:
        return Unseen(f"{file} may be read by root alone")
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db:
            (result,) = db.execute("PRAGMA quick_check(1)").fetchone()
            db.execute("SELECT key, value FROM meta").fetchall()
    except sqlite3.Error as error:
        return str(error)
    return "" if result == "ok" else str(result)


def _stale(directory: Path, owners: set[tuple[str, str]]) -> tuple[str, ...]:
    """Runtime directories, and marks of dead listeners, of profiles that are not applied and have no process.

    While there is a mark of a registration, no supervisor enables it (supervise/deafness.py).
    """
    known = {f"{profile}@{identity.replace(':', '-')}" for profile, identity in owners}
    directories = [path for path in _entries(directory) if "@" in path.name and path.is_dir()]
    marks = _entries(directory / _DEAF)
    stale = [path for path in directories if path.name not in known]
    stale += [path for path in marks if path.name.partition("@")[2] not in known]
    return tuple(sorted(map(str, stale)))


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []
