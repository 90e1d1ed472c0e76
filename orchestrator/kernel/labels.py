"""Bits of connection labels that rules of others set or ask for.

For a warning, so it errs towards silence: sets of labels are not looked into (nft 1.0.6 cannot list them).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.kernel.iptables import families_with, saved_table
from orchestrator.kernel.netns import entered
from orchestrator.kernel.nft import NftSession, is_own_table, nft_tables
from orchestrator.model import L3Proto, Netns
from orchestrator.ports import LabelRule

# Names of bits, a line `BIT NAME` each: those of nft and those of iptables.
_NAMES = (Path("/etc/connlabel.conf"), Path("/etc/xtables/connlabel.conf"))
_TABLES = ("raw", "mangle", "filter", "nat", "security")
_SAVED = re.compile(r'^-A (\S+) .*-m connlabel (?:! )?--label "?([^\s"]+)', re.MULTILINE)
_PROGRAMS = {L3Proto.IP: "iptables", L3Proto.IP6: "ip6tables"}


def foreign_labels(netns: Netns) -> tuple[LabelRule, ...]:
    """All of a namespace, by place; loads no kernel module. Raises KernelError."""
    bits = _named_bits()
    with entered(netns):
        found = {*_in_nftables(bits), *_in_iptables(bits)}
    return tuple(sorted(found, key=lambda rule: (rule.place, rule.bit)))


def nft_label_rules(items: Iterable[Mapping[str, Any]], bits: Mapping[str, int]) -> Iterator[LabelRule]:
    """Those of one table, from what `nft -j list table` says of it; `bits` are bits by their name."""
    for rule in (item["rule"] for item in items if "rule" in item):
        for statement in rule.get("expr", []):
            bit = _bit(_label_of(statement), bits)
            if bit is not None:
                yield LabelRule(f"{rule['family']} {rule['table']} {rule['chain']}", bit)


def saved_label_rules(text: str, place: str, bits: Mapping[str, int]) -> Iterator[LabelRule]:
    """The same from what `iptables-save` prints of a table, of which `place` is the name."""
    for chain, label in _SAVED.findall(text):
        bit = _bit(label, bits)
        if bit is not None:
            yield LabelRule(f"{place} {chain}", bit)


def _in_nftables(bits: Mapping[str, int]) -> Iterator[LabelRule]:
    foreign = [table for table in nft_tables() if not is_own_table(*table)]
    if not foreign:
        return
    session = NftSession()
    for family, table in foreign:
        yield from nft_label_rules(session.listed(f"list table {family} {table}"), bits)


def _in_iptables(bits: Mapping[str, int]) -> Iterator[LabelRule]:
    for variant in ("nft", "legacy"):
        for table in _TABLES:
            for family in families_with(table, variant):
                saved = saved_table(f"{_PROGRAMS[family]}-{variant}", table) or ""
                yield from saved_label_rules(saved, f"{family} {table} (iptables-{variant})", bits)


def _label_of(statement: Mapping[str, Any]) -> object:
    """What a statement sets a label to, or compares one with; None if it does neither."""
    for kind, key, value in (("mangle", "key", "value"), ("match", "left", "right")):
        inner = statement.get(kind)
        if isinstance(inner, dict) and inner[key] == {"ct": {"key": "label"}}:
            return inner[value]
    return None


def _bit(label: object, bits: Mapping[str, int]) -> int | None:
    text = str(label)
    return int(text) if text.isdecimal() else bits.get(text)


def _named_bits() -> dict[str, int]:
    found: dict[str, int] = {}
    for file in _NAMES:
        with suppress(OSError):
            lines = (line.split() for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
            found |= {words[1]: int(words[0]) for words in lines if len(words) > 1 and words[0].isdecimal()}
    return found
