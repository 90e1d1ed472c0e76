"""Filters that would drop what a helper expects: base chains that drop by default and never accept `ct state related`.

This is a warning for people, so it errs towards silence: what cannot be understood is taken to accept.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.kernel.iptables import families_with, saved_table
from orchestrator.kernel.netns import entered
from orchestrator.kernel.nft import NftSession, nft_is_present
from orchestrator.model import L3Proto, Netns

_FAMILIES = ("ip", "ip6", "inet")
_HOOKS = ("input", "forward", "output")
_RELATED = "related"
_PROGRAMS = {L3Proto.IP: "iptables", L3Proto.IP6: "ip6tables"}
_BUILT_IN = ("INPUT", "FORWARD", "OUTPUT")
_STATE_OPTIONS = ("--ctstate", "--state")
_WITHOUT_EFFECT = ("-m", "--comment")  # options with a value that narrow nothing

_Rule = list[Mapping[str, Any]]  # statements of one rule, in libnftables' JSON


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known of the packets that reach a statement: a match said `related`, or some match narrowed them."""

    is_related: bool = False
    is_narrowed: bool = False


def unrelated_filters(netns: Netns) -> tuple[str, ...]:
    """Family, table and chain of each such filter in a namespace, sorted; loads no kernel module."""
    with entered(netns):
        return tuple(sorted({*_in_nftables(), *_in_legacy_tables()}))


def unrelated_chains(items: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The same for what `nft -j list table` says of one table. A chain with iptables matches (xt) is not judged."""
    items = tuple(items)
    rules: dict[str, list[_Rule]] = {}
    for item in items:
        if "rule" in item:
            rules.setdefault(item["rule"]["chain"], []).append(item["rule"].get("expr", []))
    chains = (item["chain"] for item in items if "chain" in item)
    return tuple(
        f"{c['family']} {c['table']} {c['name']}"
        for c in chains
        if _drops_by_default(c) and not _accepts(rules, c["name"], _Seen(), set())
    )


def unrelated_saved(text: str, label: str) -> tuple[str, ...]:
    """The same for the text of `iptables-save -t filter`; `label` begins each name."""
    policies = dict(line[1:].split()[:2] for line in text.splitlines() if line.startswith(":"))
    rules: dict[str, list[_Rule]] = {}
    for line in text.splitlines():
        if line.startswith("-A "):
            _, chain, *options = shlex.split(line)
            rules.setdefault(chain, []).append(list(_statements(options, policies)))
    dropping = (c for c in _BUILT_IN if policies.get(c) == "DROP")
    return tuple(f"{label} {c}" for c in dropping if not _accepts(rules, c, _Seen(), set()))


def _in_nftables() -> Iterator[str]:
    if not nft_is_present():
        return
    session = NftSession()
    dropping = (c for c in session.objects("list chains", "chain") if _drops_by_default(c))
    for family, table in sorted({(c["family"], c["table"]) for c in dropping}):
        items = session.listed(f"list table {family} {table}")
        is_iptables = table == "filter" and family in tuple(L3Proto) and any(_has_xt(item) for item in items)
        saved = saved_table(f"{_PROGRAMS[L3Proto(family)]}-nft", "filter") if is_iptables else None
        yield from unrelated_saved(saved, f"{family} filter") if saved else unrelated_chains(items)


def _in_legacy_tables() -> Iterator[str]:
    for family in families_with("filter", "legacy"):
        saved = saved_table(f"{_PROGRAMS[family]}-legacy", "filter")
        if saved:
            yield from unrelated_saved(saved, f"{family} filter (iptables-legacy)")


def _drops_by_default(chain: Mapping[str, Any]) -> bool:
    return (
        chain["family"] in _FAMILIES
        and chain.get("type") == "filter"
        and chain.get("hook") in _HOOKS
        and chain.get("policy") == "drop"
    )


def _has_xt(item: Mapping[str, Any]) -> bool:
    return any("xt" in statement for statement in item.get("rule", {}).get("expr", []))


def _accepts(rules: Mapping[str, list[_Rule]], chain: str, seen: _Seen, visited: set[tuple[str, _Seen]]) -> bool:
    """True if some rule of a chain, or of one that it leads to, accepts related packets, or may."""
    if (chain, seen) in visited:
        return False
    visited.add((chain, seen))
    return any(_rule_accepts(rules, rule, seen, visited) for rule in rules.get(chain, []))


def _rule_accepts(rules: Mapping[str, list[_Rule]], rule: _Rule, seen: _Seen, visited: set[tuple[str, _Seen]]) -> bool:
    for statement in rule:
        if "xt" in statement:
            return True
        if "match" in statement:
            narrowed = _after_match(statement["match"], seen)
            if narrowed is None:
                return False
            seen = narrowed
        elif "vmap" in statement:
            return any(
                _rule_accepts(rules, [verdict], then, visited) for verdict, then in _branches(statement["vmap"], seen)
            )
        elif "accept" in statement or "queue" in statement:
            return seen.is_related or not seen.is_narrowed
        elif target := statement.get("jump") or statement.get("goto"):
            return _accepts(rules, target["target"], seen, visited)
    return False


def _after_match(match: Mapping[str, Any], seen: _Seen) -> _Seen | None:
    """What is known of packets after a match; None if related ones do not pass it."""
    key = match["left"].get("ct", {}).get("key") if isinstance(match["left"], dict) else None
    is_inverted = match["op"] in ("!=", "!")
    if key == "state":
        is_named = _RELATED in _words(match["right"])
        return replace(seen, is_related=True) if is_named != is_inverted else None
    if key == "status" and "expected" in _words(match["right"]) and not is_inverted:
        return replace(seen, is_related=True)
    return replace(seen, is_narrowed=True)


def _branches(vmap: Mapping[str, Any], seen: _Seen) -> Iterator[tuple[Mapping[str, Any], _Seen]]:
    """Verdict of each branch that related packets can take, and what is known there. A named map may do anything."""
    is_state = '"state"' in str(vmap["key"]).replace("'", '"')
    data = vmap["data"]
    if not isinstance(data, dict):
        yield {"accept": None}, _Seen(is_related=is_state, is_narrowed=not is_state)
        return
    for value, verdict in data["set"]:
        if not is_state:
            yield verdict, replace(seen, is_narrowed=True)
        elif _RELATED in _words(value):
            yield verdict, replace(seen, is_related=True)


def _words(value: object) -> set[str]:
    """All words in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {word for item in value for word in _words(item)}
    return {str(value)}


def _statements(options: list[str], chains: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """A saved iptables rule in the terms of nft; whatever is not about states is some other match."""
    is_inverted = False
    verdict: Mapping[str, Any] = {"counter": None}
    words = iter(options)
    for word in words:
        if word in _STATE_OPTIONS:
            right = next(words, "").lower().split(",")
            yield {"match": {"op": "!=" if is_inverted else "in", "left": {"ct": {"key": "state"}}, "right": right}}
        elif word in ("-j", "-g"):
            verdict = _verdict(next(words, ""), chains)
        elif word in _WITHOUT_EFFECT:
            next(words, None)
        elif word != "!":
            yield {"match": {"op": "==", "left": word, "right": None}}
        is_inverted = word == "!"
    yield verdict


def _verdict(target: str, chains: Mapping[str, str]) -> Mapping[str, Any]:
    if target in chains:
        return {"jump": {"target": target}}
    return {"accept": None} if target in ("ACCEPT", "NFQUEUE") else {"drop": None}
