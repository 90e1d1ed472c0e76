"""The one place that says when two loaded rulesets are equal: what is taken out of a listing, and what is put in order.

Left out: packet and byte counters of chains, the order in which the elements of one concatenated set are listed (it
is arbitrary, as soon as they are intervals of more than eight bytes), and the order of the chains and objects of a
table (that of their making: what is added in place comes last). Nothing else: order of rules, policies,
priorities, flags, comments, foreign rules, sets and objects in our table, all of it counts. Handles, counters of rules
and timers are not in the listings to begin with, which are made stateless.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from orchestrator.model import Backend, HelperKey, L3Proto, L4Proto, Listing

# A quoted string, to be left alone, or the elements of a set or map on one line.
_BRACES = re.compile(r'"[^"]*"|(?P<map>map )?\{ (?P<elements>(?:[^{}"]+|"[^"]*")*+)\}')
_ELEMENT = re.compile(r'(?:[^,"]+|"[^"]*")+')
_DIGEST = re.compile(r'comment "orch profile=[a-z0-9-]+ digest=([0-9a-f]+)"')
_OBJECT = re.compile(
    r'^\tct helper \S+ \{\n\t\ttype "([^"]+)" protocol (tcp|udp)\n\t\tl3proto (ip6?|inet)$', re.MULTILINE
)
_SAVED_CHAIN = re.compile(r"(:\S+ \S+) \[\d+:\d+\]")
_CT_RULE = re.compile(r"-A \S+ .*-p (tcp|udp) .*-j CT .*--helper (\S+)")


def nft_listing(text: str) -> Listing:
    """A stateless `nft list table` as a Listing, one element of a map or a concatenated set per line."""
    ordered = _blocks_in_order(_BRACES.sub(_in_order, text))
    digests = _DIGEST.findall(ordered)
    return Listing(
        backend=Backend.NFTABLES,
        digest=digests[0] if len(digests) == 1 else "",
        text=ordered,
        helpers=frozenset(key for m in _OBJECT.finditer(text) for key in _object_keys(*m.groups())),
    )


def iptables_listing(backend: Backend, profile: str, saved: Mapping[L3Proto, str]) -> Listing | None:
    """What `iptables-save -t raw` of both families says of a profile; None if nothing. A missing family is empty."""
    lines = {family: own_lines(text, profile) for family, text in saved.items()}
    lines = {family: own for family, own in lines.items() if own}
    if not lines:
        return None
    digests = {tuple(_DIGEST.findall("\n".join(own))) for own in lines.values()}
    only = digests.pop() if len(digests) == 1 else ()
    return Listing(
        backend=backend,
        digest=only[0] if len(only) == 1 else "",
        text="".join(f"# {family}\n" + "".join(f"{line}\n" for line in lines[family]) for family in sorted(lines)),
        helpers=frozenset(key for family, own in lines.items() for key in attached_helpers(own, family)),
    )


def own_lines(saved: str, profile: str) -> tuple[str, ...]:
    """The chains of a profile, their rules, and every rule that leads to them, from a saved table."""
    chain = rf"orch-{re.escape(profile)}-(?:pre|out)"
    own = re.compile(rf":{chain} .*|-A {chain} .*|-A .* -[jg] {chain}(?: .*)?")
    lines = (_SAVED_CHAIN.sub(r"\1", line) for line in saved.splitlines())
    return tuple(line for line in lines if own.fullmatch(line))


def attached_helpers(lines: tuple[str, ...], l3proto: L3Proto) -> frozenset[HelperKey]:
    """The registrations that saved iptables rules of one family attach."""
    found = (_CT_RULE.match(line) for line in lines)
    return frozenset(key for m in found if m and (key := _key(m[2], l3proto, m[1])))


def _blocks_in_order(text: str) -> str:
    head, start, rest = text.partition("{\n")
    body, end, tail = rest.rpartition("\n}\n")
    return "".join((head, start, "\n\n".join(sorted(body.split("\n\n"))), end, tail))


def _in_order(match: re.Match[str]) -> str:
    if match["elements"] is None:
        return match.group()
    elements = [e.strip() for e in _ELEMENT.findall(match["elements"])]
    is_concatenated = " . " in match["elements"]
    if is_concatenated:
        elements.sort()
    if match["map"] or is_concatenated:
        return (match["map"] or "") + "{\n\t\t\t" + ",\n\t\t\t".join(elements) + "\n\t\t}"
    return "{ " + ", ".join(elements) + " }"


def _object_keys(name: str, l4proto: str, family: str) -> tuple[HelperKey, ...]:
    families = tuple(L3Proto) if family == "inet" else (L3Proto(family),)
    return tuple(key for f in families if (key := _key(name, f, l4proto)))


def _key(name: str, l3proto: L3Proto, l4proto: str) -> HelperKey | None:
    """None for a name that none of our registrations can have."""
    try:
        return HelperKey(name.strip('"'), l3proto, L4Proto(l4proto))
    except ValueError:
        return None
