"""What is known about each helper: protocols, limits, and who can run it. Data in helpers.yaml, typed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from orchestrator.model import Engine, L3Proto, L4Proto, Path, Policy, PortRange


@dataclass(frozen=True, slots=True)
class Protocol:
    """A transport of a helper and the usual ports of its server; no port means that no rule attaches it."""

    l4proto: L4Proto
    ports: tuple[PortRange, ...]


@dataclass(frozen=True, slots=True)
class Guard:
    """Bounds of what an expectation may open: destination ports, and whether the source is the peer or any host."""

    ports: PortRange
    is_any_source: bool
    is_permanent: bool


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """How one engine serves a helper. `priv_data_len` is in bytes; `names` are the kernel's, by protocol."""

    engine: Engine
    families: tuple[L3Proto, ...]
    names: tuple[tuple[L4Proto, str], ...]
    policies: tuple[Policy, ...]
    priv_data_len: int
    modules: tuple[str, ...]
    attaches_stock_key: bool
    broken: str
    harm: str
    caveats: str

    def name_for(self, l4proto: L4Proto) -> str:
        """The stock name of the registration for a protocol."""
        return dict(self.names)[l4proto]


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One helper. `engines` come in order of preference; the first is the default."""

    name: str
    summary: str
    protocols: tuple[Protocol, ...]
    families: tuple[L3Proto, ...]
    paths: tuple[Path, ...]
    guard: Guard
    engines: tuple[EngineEntry, ...]

    def engine(self, name: str) -> EngineEntry | None:
        """The entry of an engine; the default one for an empty name, None if the helper has no such engine."""
        return next((e for e in self.engines if name in ("", e.engine)), None)


@cache
def helpers() -> Mapping[str, CatalogueEntry]:
    """Every known helper by name, in alphabetical order. Reads the data once."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data = yaml.load(files(__name__).joinpath("helpers.yaml").read_text(encoding="utf-8"), Loader=loader)
    return MappingProxyType({name: _entry(name, data[name]) for name in sorted(data)})


def _entry(name: str, data: Mapping[str, Any]) -> CatalogueEntry:
    protocols = tuple(
        Protocol(L4Proto(p["l4proto"]), tuple(_ports(str(port)) for port in p["ports"])) for p in data["protocols"]
    )
    families = tuple(L3Proto(f) for f in data.get("families", L3Proto))
    guard = data.get("guard", {})
    return CatalogueEntry(
        name=name,
        summary=data["summary"],
        protocols=protocols,
        families=families,
        paths=tuple(Path(p) for p in data.get("paths", Path)),
        guard=Guard(
            ports=_ports(guard.get("ports", "1024-65535")),
            is_any_source=guard.get("source", "peer") == "any",
            is_permanent=guard.get("permanent", False),
        ),
        engines=tuple(
            _engine(Engine(engine), entry, name=name, protocols=protocols, families=families)
            for engine, entry in data["engines"].items()
        ),
    )


def _engine(
    engine: Engine,
    data: Mapping[str, Any],
    *,
    name: str,
    protocols: tuple[Protocol, ...],
    families: tuple[L3Proto, ...],
) -> EngineEntry:
    names = data.get("names", {})
    return EngineEntry(
        engine=engine,
        families=tuple(L3Proto(f) for f in data.get("families", families)),
        names=tuple((p.l4proto, names.get(p.l4proto, name)) for p in protocols),
        policies=tuple(Policy(policy, **limits) for policy, limits in data.get("policies", {}).items()),
        priv_data_len=data.get("priv_data_len", 0),
        modules=tuple(data.get("modules", ())),
        attaches_stock_key=data.get("attaches_stock_key", False),
        broken=data.get("broken", ""),
        harm=data.get("harm", ""),
        caveats=data.get("caveats", ""),
    )


def _ports(text: str) -> PortRange:
    first, _, last = text.partition("-")
    return PortRange(int(first), int(last or first))
