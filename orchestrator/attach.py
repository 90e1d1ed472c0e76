"""Attach entries of a profile to attachments: every default taken, one per path, family and protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Network, collapse_addresses
from typing import Any

from orchestrator.catalogue import CatalogueEntry, Protocol
from orchestrator.model import Attachment, HelperKey, L3Proto, L4Proto, Path, PortRange
from orchestrator.profile_schema import AttachDoc, Prefix
from orchestrator.yamltext import Path as TreePath
from orchestrator.yamltext import Tree

FAMILY_NAMES = {L3Proto.IP: "IPv4", L3Proto.IP6: "IPv6"}

_SIDES = (("iif", Path.INCOMING), ("oif", Path.OUTGOING))


@dataclass(frozen=True, slots=True)
class Scope:
    """What the entries of one helper may attach: families of the profile, those `served` by the engine, its keys."""

    entry: CatalogueEntry
    families: tuple[L3Proto, ...]
    served: tuple[L3Proto, ...]
    keys: dict[tuple[L3Proto, L4Proto], HelperKey]


def expand(tree: Tree, path: TreePath, doc: AttachDoc, scope: Scope) -> Iterator[Attachment]:
    """Attachments of one entry; problems are reported to the tree at `path`, and what they concern is left out."""
    paths = _paths(tree, path, doc, scope)
    protocols = _protocols(tree, path, doc, scope)
    addresses = {
        family: (_texts(doc.saddr, family), _texts(doc.daddr, family)) for family in _families(tree, path, doc, scope)
    }
    interfaces = {Path.INCOMING: doc.iif, Path.OUTGOING: doc.oif}
    for side in paths:
        for family, (saddr, daddr) in addresses.items():
            for protocol in protocols:
                key = scope.keys[family, protocol.l4proto]
                yield Attachment(key, side, protocol.ports, interfaces[side], saddr, daddr)


def _paths(tree: Tree, path: TreePath, doc: AttachDoc, scope: Scope) -> tuple[Path, ...]:
    if not doc.path:
        return tuple(side for name, side in _SIDES if getattr(doc, name)) or scope.entry.paths
    for name, side in _SIDES:
        if getattr(doc, name) and side not in doc.path:
            other = "oif" if name == "iif" else "iif"
            message = f"{name} is for {side} connections, and path is {' and '.join(doc.path)}"
            tree.report((*path, name), message, f"use {other}, or change path")
    return tuple(dict.fromkeys(doc.path))


def _protocols(tree: Tree, path: TreePath, doc: AttachDoc, scope: Scope) -> tuple[Protocol, ...]:
    """The protocols of the entry with the ports to attach; one without usual ports only where it is asked for."""
    ports = _merge(doc.ports)
    spoken = scope.entry.protocols
    if doc.l4proto is None:
        return tuple(Protocol(p.l4proto, ports or p.ports) for p in spoken if p.ports)
    chosen = [p for p in spoken if p.l4proto == doc.l4proto]
    if not chosen:
        hint = f"it speaks {', '.join(p.l4proto for p in spoken)}"
        tree.report((*path, "l4proto"), f"{scope.entry.name} does not speak {doc.l4proto}", hint)
    elif not (ports or chosen[0].ports):
        tree.report((*path, "l4proto"), f"{scope.entry.name} has no usual port for {doc.l4proto}", "give ports")
        return ()
    return tuple(Protocol(p.l4proto, ports or p.ports) for p in chosen)


def _merge(ports: Sequence[PortRange]) -> tuple[PortRange, ...]:
    """Sorted, and what overlaps made one: nft refuses overlapping ranges in a set."""
    if len(ports) < 2:
        return tuple(ports)
    merged: list[PortRange] = []
    for port in sorted(ports):
        if merged and port.first <= merged[-1].last:
            merged[-1] = PortRange(merged[-1].first, max(port.last, merged[-1].last))
        else:
            merged.append(port)
    return tuple(merged)


def _families(tree: Tree, path: TreePath, doc: AttachDoc, scope: Scope) -> tuple[L3Proto, ...]:
    """The families the entry attaches: those that are served and that every address list of the entry has."""
    if not (doc.saddr or doc.daddr):
        return scope.served
    lists = {name: prefixes for name in ("saddr", "daddr") if (prefixes := getattr(doc, name))}
    has = {name: {_family(prefix) for prefix in prefixes} for name, prefixes in lists.items()}
    for name, prefixes in lists.items():
        for index, prefix in enumerate(prefixes):
            reason = _why_never(prefix, name, has, scope)
            if reason:
                tree.report((*path, name, index), f"{_text(prefix)} never matches: {reason}", "remove it")
    families = tuple(f for f in scope.served if all(f in found for found in has.values()))
    wanted = set(scope.families).intersection(scope.entry.families, *has.values())
    if wanted and not families:
        lacking = " and ".join(FAMILY_NAMES[f] for f in sorted(wanted))
        tree.report(path, f"this entry attaches nothing: it is for {lacking} only, which the engine does not serve")
    return families


def _why_never(prefix: Prefix, name: str, has: dict[str, set[L3Proto]], scope: Scope) -> str:
    family = _family(prefix)
    if family not in scope.families:
        return f"the profile has families: [{', '.join(scope.families)}]"
    if family not in scope.entry.families:
        return f"{scope.entry.name} is {' and '.join(FAMILY_NAMES[f] for f in scope.entry.families)} only"
    lacking = next((other for other, found in has.items() if other != name and family not in found), "")
    return f"{lacking} has no {FAMILY_NAMES[family]} address" if lacking else ""


def _family(prefix: Prefix) -> L3Proto:
    return L3Proto.IP if isinstance(prefix, IPv4Network) else L3Proto.IP6


def _texts(prefixes: Sequence[Prefix], family: L3Proto) -> tuple[str, ...]:
    """The prefixes of a family, sorted and disjoint; none if one of them is all addresses."""
    if not prefixes:
        return ()
    wanted: Any = [prefix for prefix in prefixes if _family(prefix) is family]
    disjoint: Iterable[Prefix] = wanted if len(wanted) < 2 else collapse_addresses(wanted)
    return () if any(p.prefixlen == 0 for p in wanted) else tuple(_text(p) for p in disjoint)


@cache
def _text(prefix: Prefix) -> str:
    is_host = prefix.prefixlen == prefix.max_prefixlen
    return str(prefix.network_address) if is_host else str(prefix)
