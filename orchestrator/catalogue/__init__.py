"""What is known about each helper: protocols, limits, and who can run it. Data in helpers.yaml, typed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from orchestrator.catalogue.description import Description as Description
from orchestrator.catalogue.description import Protocol as Protocol
from orchestrator.catalogue.description import parse
from orchestrator.engine import loading
from orchestrator.engine.describe import declaration
from orchestrator.engine.stream import STREAM_STATE_LEN
from orchestrator.model import Bounds, Engine, L3Proto, L4Proto, Path, Policy, PortRange

MULTICAST_HARM = (
    "queueing keeps the first multicast packet of a connection that this host makes from programs on this host; "
    "hosts on the network get it"
)


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """How one engine serves a helper. `names` are the kernel's, by protocol.

    `private_len` are the bytes of private data that are the helper's own. `description` is that of the class, for the
    native engine. `harm` is what queueing by registration does to traffic besides helping.
    """

    engine: Engine
    families: tuple[L3Proto, ...]
    policies: tuple[Policy, ...]
    private_len: int
    names: tuple[tuple[L4Proto, str], ...] = ()
    modules: tuple[str, ...] = ()
    attaches_stock_key: bool = False
    broken: str = ""
    harm: str = ""
    caveats: str = ""
    description: Description | None = None

    def name_for(self, l4proto: L4Proto) -> str:
        """The stock name of the registration for a protocol."""
        return dict(self.names)[l4proto]

    def priv_data_len(self, l4proto: L4Proto) -> int:
        """Bytes of private data that the registration for a protocol needs: on TCP the native engine has a part."""
        is_stream = self.engine is Engine.NATIVE and l4proto is L4Proto.TCP
        return self.private_len + (STREAM_STATE_LEN if is_stream else 0)


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One helper. `engines` come in order of preference; the first is the default. `guard` bounds its expectations."""

    name: str
    summary: str
    protocols: tuple[Protocol, ...]
    families: tuple[L3Proto, ...]
    paths: tuple[Path, ...]
    guard: Bounds
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


def described(name: str, description: Description) -> CatalogueEntry:
    """The entry of a helper that is not ours, known by what its class declares."""
    return CatalogueEntry(
        name=name,
        summary=description.summary,
        protocols=description.protocols,
        families=description.families,
        paths=(Path.OUTGOING,) if description.is_outgoing_only else tuple(Path),
        guard=description.bounds,
        engines=(_native(name, description),),
    )


def _native(name: str, description: Description) -> EngineEntry:
    return EngineEntry(
        engine=Engine.NATIVE,
        families=description.families,
        policies=description.policies,
        private_len=description.private_len,
        names=tuple((protocol.l4proto, name) for protocol in description.protocols),
        harm=MULTICAST_HARM if description.is_outgoing_only else "",
        description=description,
    )


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
        guard=Bounds(
            ports=_ports(guard.get("ports", "1024-65535")),
            is_any_source=guard.get("source", "peer") == "any",
            is_permanent=guard.get("permanent", False),
        ),
        engines=tuple(
            _native(name, parse(declaration(loading.builtin(name))))
            if engine == Engine.NATIVE
            else _engine(Engine(engine), entry, name=name, protocols=protocols, families=families)
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
        policies=tuple(Policy(policy, **limits) for policy, limits in data.get("policies", {}).items()),
        private_len=data.get("priv_data_len", 0),
        names=tuple((p.l4proto, names.get(p.l4proto, name)) for p in protocols),
        modules=tuple(data.get("modules", ())),
        attaches_stock_key=data.get("attaches_stock_key", False),
        broken=data.get("broken", ""),
        harm=MULTICAST_HARM if data.get("harms_multicast") else "",
        caveats=data.get("caveats", ""),
    )


def _ports(text: str) -> PortRange:
    first, _, last = text.partition("-")
    return PortRange(int(first), int(last or first))
