"""Rules that attach helpers, whoever wrote them: where they are, from which hooks they are reached, what they see."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from orchestrator.kernel.foreign_queues import reached, targets
from orchestrator.kernel.iptables import families_with, saved_table
from orchestrator.kernel.netns import entered
from orchestrator.kernel.nft import NftSession, is_own_table, nft_tables
from orchestrator.model import Backend, L3Proto, L4Proto, Netns
from orchestrator.ports import HelperRule

_OBJECT = "ct helper"
_FAMILIES = {"ip": (L3Proto.IP,), "ip6": (L3Proto.IP6,)}
_SAVED = re.compile(r'^-A (\S+) (?=.*-p (tcp|udp)\b).*-j CT .*--helper "?([^\s"]+)', re.MULTILINE)
_VARIANTS = {"nft": Backend.IPTABLES_NFT, "legacy": Backend.IPTABLES_LEGACY}
_PROGRAMS = {L3Proto.IP: "iptables", L3Proto.IP6: "ip6tables"}


def helper_rules(netns: Netns) -> tuple[HelperRule, ...]:
    """All of a namespace, by place; loads no kernel module. Raises KernelError."""
    with entered(netns):
        found = [*_in_nftables(), *_in_iptables()]
    return tuple(sorted(found, key=lambda rule: (rule.place, rule.helper, rule.l4proto)))


def flowtables(netns: Netns) -> tuple[str, ...]:
    """Family, table and name of the flowtables of a namespace; loads no kernel module. Raises KernelError."""
    with entered(netns):
        if not nft_tables():
            return ()
        found = NftSession().objects("list flowtables", "flowtable")
    return tuple(sorted(f"{f['family']} {f['table']} {f['name']}" for f in found))


def nft_helper_rules(items: Iterable[Mapping[str, Any]]) -> tuple[HelperRule, ...]:
    """The rules of one table that attach a helper, from what `nft -j list table` says of it."""
    items = tuple(items)
    objects = {item[_OBJECT]["name"]: item[_OBJECT] for item in items if _OBJECT in item}
    rules = [item["rule"] for item in items if "rule" in item]
    chains = [item["chain"] for item in items if "chain" in item]
    leads: dict[str, set[str]] = {}
    for rule in rules:
        leads.setdefault(rule["chain"], set()).update(targets(rule.get("expr", [])))
    ways = {c["name"]: reached(leads, c["name"]) for c in chains if "hook" in c}
    bases = {c["name"]: (str(c["hook"]), int(c["prio"])) for c in chains if "hook" in c}
    return tuple(
        HelperRule(
            place=f"{rule['family']} {rule['table']} {rule['chain']}",
            helper=str(objects[name]["type"]),
            families=_FAMILIES.get(str(objects[name]["l3proto"]), tuple(L3Proto)),
            l4proto=L4Proto(objects[name]["protocol"]),
            backend=Backend.NFTABLES,
            hooks=tuple(sorted(bases[base] for base, way in ways.items() if rule["chain"] in way)),
            is_ours=is_own_table(rule["family"], rule["table"]),
            is_late=any(_is_late(statement) for statement in rule.get("expr", [])),
        )
        for rule in rules
        for statement in rule.get("expr", [])
        for name in _names(statement.get(_OBJECT))
        if name in objects
    )


def saved_helper_rules(text: str, family: L3Proto, backend: Backend) -> tuple[HelperRule, ...]:
    """The same from what `iptables-save -t raw` prints; `-j CT` works in that table only, and needs `-p`."""
    return tuple(
        HelperRule(
            place=f"{family} raw {chain} ({backend})",
            helper=helper,
            families=(family,),
            l4proto=L4Proto(l4proto),
            backend=backend,
            hooks=(),
            is_ours=chain.startswith("orch-"),
        )
        for chain, l4proto, helper in _SAVED.findall(text)
    )


def _in_nftables() -> Iterator[HelperRule]:
    tables = nft_tables()
    if not tables:
        return
    session = NftSession()
    for family, table in tables:
        if session.objects(f"list ct helpers table {family} {table}", _OBJECT):
            yield from nft_helper_rules(session.listed(f"list table {family} {table}"))


def _in_iptables() -> Iterator[HelperRule]:
    for variant, backend in _VARIANTS.items():
        for family in families_with("raw", variant):
            text = saved_table(f"{_PROGRAMS[family]}-{variant}", "raw") or ""
            yield from saved_helper_rules(text, family, backend)


def _names(value: object) -> list[str]:
    """Objects that a `ct helper` statement may set: one, or those of a map."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict) and "map" in value:
        data = value["map"]["data"]
        return sorted({name for _, name in data["set"]}) if isinstance(data, dict) else []
    return []


def _is_late(statement: Mapping[str, Any]) -> bool:
    """True for a match on states that only connections with packets in both directions have."""
    match = statement.get("match", {})
    left = match.get("left")
    if not isinstance(left, dict) or left.get("ct", {}).get("key") != "state" or match["op"] in ("!=", "!"):
        return False
    states = match["right"]["set"] if isinstance(match["right"], dict) and "set" in match["right"] else match["right"]
    return set([states] if isinstance(states, str) else states) <= {"established", "invalid", "untracked"}
