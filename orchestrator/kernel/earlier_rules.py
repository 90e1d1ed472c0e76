"""Rules of others in table raw of iptables that stand before the jump to ours, and leave nothing to do for it.

Either they end the way through the table, or they decide how a connection is tracked: the first `-j CT` wins, and so
does `--notrack`. Source: xt_CT.c, xt_ct_target. In nftables no rule of another chain can do that.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_network

from orchestrator.kernel.iptables import families_with, saved_table
from orchestrator.kernel.netns import entered
from orchestrator.model import Backend, L3Proto, L4Proto, Netns, Path, PortRange
from orchestrator.ports import EarlierRule

_HOOKS = {"PREROUTING": Path.INCOMING, "OUTPUT": Path.OUTGOING}
_VARIANTS = {"nft": Backend.IPTABLES_NFT, "legacy": Backend.IPTABLES_LEGACY}
_PROGRAMS = {L3Proto.IP: "iptables", L3Proto.IP6: "ip6tables"}
_DECIDES = {"ACCEPT", "DROP", "QUEUE", "NFQUEUE", "CT", "NOTRACK"}
_OWN = re.compile(r"orch-([a-z0-9-]+)-(?:pre|out)")
_MATCHES = {"tcp", "udp", "multiport", "comment"}  # those whose options are known here

_Option = tuple[bool, str, list[str]]  # whether inverted, name, values
_Chains = Mapping[str, Sequence[tuple[str, list[_Option]]]]  # the rules of each chain: text, and options


def earlier_rules(netns: Netns) -> tuple[EarlierRule, ...]:
    """All of a namespace, by hook and in their order, once for each profile behind them; loads no kernel module."""
    with entered(netns):
        return tuple(_in_tables())


def saved_earlier_rules(text: str, family: L3Proto, backend: Backend) -> Iterator[EarlierRule]:
    """The same from what `iptables-save -t raw` prints of one family."""
    chains: dict[str, list[tuple[str, list[_Option]]]] = {}
    for line in text.splitlines():
        if line.startswith(":"):
            chains[line[1:].split()[0]] = []
        elif line.startswith("-A "):
            _, chain, said = line.split(" ", 2)
            chains[chain].append((said, _options(shlex.split(said))))
    for hook, path in _HOOKS.items():
        before: list[EarlierRule] = []
        told = set()
        for rule in chains.get(hook, ()):
            if own := _OWN.fullmatch(_target(rule[1])):
                yield from (replace(one, profile=own[1]) for one in before if own[1] not in told)
                told.add(own[1])
                continue
            for chain, said, options in _deciding(chains, hook, rule, frozenset()):
                place = f"{family} raw {chain} ({backend})"
                found = EarlierRule("", place, said, _target(options), family, path, is_partial=chain != hook)
                before += _judged(found, options)


def _in_tables() -> Iterator[EarlierRule]:
    for variant, backend in _VARIANTS.items():
        for family in families_with("raw", variant):
            text = saved_table(f"{_PROGRAMS[family]}-{variant}", "raw") or ""
            yield from saved_earlier_rules(text, family, backend)


def _options(words: list[str]) -> list[_Option]:
    found: list[_Option] = []
    is_inverted = False
    for word in words:
        if word == "!":
            is_inverted = True
        elif word.startswith("-") or not found:
            found.append((is_inverted, word, []))
            is_inverted = False
        else:
            found[-1][2].append(word)
    return found


def _target(options: list[_Option]) -> str:
    return next((values[0] for _, name, values in options if name in ("-j", "-g") and values), "")


def _deciding(
    chains: _Chains, chain: str, rule: tuple[str, list[_Option]], above: frozenset[str]
) -> Iterator[tuple[str, str, list[_Option]]]:
    """Where a rule decides, or leads to one that does: chain, text, and the options on the way there.

    What returns goes on behind the rule of the base chain; there, it leaves the table.
    """
    said, options = rule
    target = _target(options)
    is_base = not above
    if target in _DECIDES or (is_base and (target == "RETURN" or any(name == "-g" for _, name, _ in options))):
        yield chain, said, options
    elif target in chains and target not in above | {chain}:
        way = [option for option in options if option[1] not in ("-j", "-g")]
        for inner, further in chains[target]:
            yield from _deciding(chains, target, (inner, [*way, *further]), above | {chain})


def _judged(rule: EarlierRule, options: list[_Option]) -> Iterator[EarlierRule]:
    """The rule with its conditions; nothing if it is about another protocol."""
    for is_inverted, name, values in options:
        if name in ("-j", "-g"):
            break
        value = values[0] if len(values) == 1 and not is_inverted else ""
        if name == "-p" and value and value not in set(L4Proto):
            return
        if name == "--comment" or (name == "-m" and value in _MATCHES):
            continue
        known = _condition(rule, name, value)
        rule = replace(rule, is_partial=True) if known is None else known
    yield rule


def _condition(rule: EarlierRule, name: str, value: str) -> EarlierRule | None:
    """The rule with one more condition, None for one that cannot be told."""
    match name:
        case "-p" if value and rule.l4proto in (None, value):
            return replace(rule, l4proto=L4Proto(value))
        case "-i" | "-o" if value and not value.endswith("+") and rule.interface in ("", value):
            return replace(rule, interface=value)
        case "-s" if _is_prefix(value) and not rule.saddr:
            return replace(rule, saddr=value)
        case "-d" if _is_prefix(value) and not rule.daddr:
            return replace(rule, daddr=value)
        case "--dport" | "--dports" if value and not rule.ports and (ports := tuple(_ports(value))):
            return replace(rule, ports=ports)
    return None


def _is_prefix(text: str) -> bool:
    with suppress(ValueError):
        return bool(ip_network(text))
    return False


def _ports(text: str) -> Iterator[PortRange]:
    """Those of `21,2121:2125`; port 0 is nobody's."""
    for part in text.split(","):
        first, _, last = part.partition(":")
        if int(last or first):
            yield PortRange(max(int(first), 1), int(last or first))
