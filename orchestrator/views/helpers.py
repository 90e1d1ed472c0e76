"""`orch helpers`: the catalogue and what installed packages offer, and what of it this host can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator import catalogue
from orchestrator.catalogue import CatalogueEntry, EngineEntry
from orchestrator.model import Engine
from orchestrator.ports import Host


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine of a helper: why it cannot run here, empty if it can; `remark` is what it gets wrong."""

    entry: EngineEntry
    missing: str
    remark: str


@dataclass(frozen=True, slots=True)
class HelperRow:
    entry: CatalogueEntry
    engines: tuple[EngineRow, ...]


def rows(host: Host, others: tuple[CatalogueEntry, ...]) -> tuple[HelperRow, ...]:
    """The catalogue, then the helpers of others."""
    modules = tuple(sorted({m for e in catalogue.helpers().values() for x in e.engines for m in x.modules}))
    available = host.available_modules((*modules, "nfnetlink_cthelper"))
    return tuple(
        HelperRow(
            entry,
            tuple(EngineRow(e, _missing(e, host, available), e.broken or e.caveats) for e in entry.engines),
        )
        for entry in (*catalogue.helpers().values(), *others)
    )


def _missing(engine: EngineEntry, host: Host, available: frozenset[str]) -> str:
    if engine.engine is Engine.KERNEL:
        return ", ".join(f"no module {m}" for m in engine.modules if m not in available)
    lacks = [] if "nfnetlink_cthelper" in available else ["no module nfnetlink_cthelper"]
    if engine.engine is Engine.CONNTRACKD and not host.program("conntrackd"):
        lacks.append("conntrackd is not installed")
    return ", ".join(lacks)


def text(helpers: tuple[HelperRow, ...]) -> str:
    lines = []
    for row in helpers:
        protocols = " ".join(f"{p.l4proto}/{','.join(map(str, p.ports))}" for p in row.entry.protocols if p.ports)
        lines.append(f"{row.entry.name.ljust(11)} {protocols.ljust(20)} {row.entry.summary}")
        for engine in row.engines:
            state = f"not here: {engine.missing}" if engine.missing else "ready"
            families = "+".join(engine.entry.families)
            remark = f"; {' '.join(engine.remark.split())}" if engine.remark else ""
            lines.append(f"  {engine.entry.engine.ljust(11)} {families.ljust(7)} {state}{remark}")
    return "\n".join(lines) + "\n"


def value(helpers: tuple[HelperRow, ...]) -> list[dict[str, Any]]:
    return [
        {
            "name": row.entry.name,
            "summary": row.entry.summary,
            "protocols": {p.l4proto: [str(port) for port in p.ports] for p in row.entry.protocols},
            "paths": list(row.entry.paths),
            "engines": [
                {
                    "engine": e.entry.engine,
                    "families": list(e.entry.families),
                    "ready": not e.missing,
                    "missing": e.missing,
                    "remark": " ".join(e.remark.split()),
                }
                for e in row.engines
            ],
        }
        for row in helpers
    ]
