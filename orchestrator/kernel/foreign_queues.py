"""Queues that rules of others fill before source NAT.

A packet that comes back from such a queue and has a user-space helper is confirmed at once, before the kernel chooses
its source address: the connection keeps the private one. Seen on 6.1, 6.12 and 7.3, with enabled and disabled helpers.
This is a warning for people, so it errs towards silence: named verdict maps are not followed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from orchestrator.kernel.iptables import families_with, saved_table
from orchestrator.kernel.netns import entered
from orchestrator.kernel.nft import NftSession, is_own_table, nft_tables
from orchestrator.model import L3Proto, Netns

_FAMILIES = ("ip", "ip6", "inet")
_SRCNAT = 100  # priority in the postrouting hook. Source: netfilter_ipv4.h, NF_IP_PRI_NAT_SRC
_HOOKS = {"prerouting", "forward", "output"}
_LEGACY_PROGRAMS = {L3Proto.IP: "iptables-legacy", L3Proto.IP6: "ip6tables-legacy"}
_LEGACY_TABLES = ("raw", "mangle", "filter", "security")
_LEGACY_HOOKS = {"PREROUTING", "FORWARD", "OUTPUT"}

_QUEUE = "NFQUEUE"  # stands for the way out among names of chains


def foreign_queues(netns: Netns) -> tuple[str, ...]:
    """Family, table and base chain of each way into such a queue, sorted; loads no kernel module."""
    with entered(netns):
        return tuple(sorted({*_in_nftables(), *_in_legacy_tables()}))


def queueing_chains(items: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The same for what `nft -j list table` says of one table."""
    items = tuple(items)
    leads: dict[str, set[str]] = {}
    for item in items:
        if "rule" in item:
            leads.setdefault(item["rule"]["chain"], set()).update(targets(item["rule"].get("expr", [])))
    chains = (item["chain"] for item in items if "chain" in item)
    return tuple(
        f"{c['family']} {c['table']} {c['name']}"
        for c in chains
        if _is_before_srcnat(c) and _QUEUE in reached(leads, c["name"])
    )


def queueing_saved(text: str, label: str) -> tuple[str, ...]:
    """The same for the text of `iptables-save` of one table; `label` begins each name."""
    leads: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("-A "):
            _, chain, *words = shlex.split(line)
            leads.setdefault(chain, set()).update(
                target for option, target in pairwise(words) if option in ("-j", "-g")
            )
    return tuple(f"{label} {chain}" for chain in sorted(_LEGACY_HOOKS) if _QUEUE in reached(leads, chain))


def _in_nftables() -> Iterator[str]:
    foreign = [t for t in nft_tables() if t[0] in _FAMILIES and not is_own_table(*t)]
    if not foreign:
        return
    session = NftSession()
    for family, table in foreign:
        yield from queueing_chains(session.listed(f"list table {family} {table}"))


def _in_legacy_tables() -> Iterator[str]:
    for table in _LEGACY_TABLES:
        for family in families_with(table, "legacy"):
            saved = saved_table(_LEGACY_PROGRAMS[family], table) or ""
            yield from queueing_saved(saved, f"{family} {table} (iptables-legacy)")


def _is_before_srcnat(chain: Mapping[str, Any]) -> bool:
    hook = chain.get("hook")
    return hook in _HOOKS or (hook == "postrouting" and int(chain["prio"]) < _SRCNAT)


def reached(leads: Mapping[str, set[str]], start: str) -> set[str]:
    """All chains that a chain leads to, and `_QUEUE` if packets are queued on some way."""
    found = {start}
    waiting = [start]
    while waiting:
        new = leads.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def targets(value: object) -> Iterator[str]:
    """Where a rule sends packets: chains, and `_QUEUE`. iptables-nft writes its queues as targets of xtables."""
    if isinstance(value, list):
        for item in value:
            yield from targets(item)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in ("jump", "goto"):
                yield str(inner["target"])
            elif key == "queue" or (key == "xt" and isinstance(inner, dict) and inner.get("name") == _QUEUE):
                yield _QUEUE
            else:
                yield from targets(inner)
