"""Which filters would drop expected connections; chains that cannot be judged are not named."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.kernel.filters import unrelated_chains, unrelated_saved
from tests import listings
from tests.listings import FROM_LAN

ACCEPT = {"accept": None}
DROP = {"drop": None}


def state(right: Any, op: str = "in") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"ct": {"key": "state"}}, "right": right}}


def jump(target: str) -> dict[str, Any]:
    return {"jump": {"target": target}}


def vmap(key: Any, *branches: Any) -> dict[str, Any]:
    return {"vmap": {"key": key, "data": {"set": [list(b) for b in branches]}}}


def table(*rules: list[Any], policy: str = "drop", hook: str = "forward", **others: list[list[Any]]) -> list[Any]:
    return listings.table("filter", rules, others, policy=policy, hook=hook)


@pytest.mark.parametrize(
    "items",
    [
        table(policy="accept"),
        table(hook="prerouting"),
        table([state(["established", "related"]), ACCEPT]),
        table([state("related"), ACCEPT]),
        table([state({"set": ["established", "related"]}, "=="), ACCEPT]),
        table([state("new", "!="), ACCEPT]),
        table([FROM_LAN, state("related"), {"counter": {}}, ACCEPT]),
        table([ACCEPT]),
        table([vmap({"ct": {"key": "state"}}, ("invalid", DROP), ("related", ACCEPT))]),
        table([vmap({"ct": {"key": "state"}}, ("related", jump("ok")))], ok=[[ACCEPT]]),
        table([{"vmap": {"key": {"ct": {"key": "state"}}, "data": "@unknown"}}]),
        table([FROM_LAN, jump("ok")], ok=[[state("related"), ACCEPT]]),
        table([state("related"), jump("ok")], ok=[[FROM_LAN, ACCEPT]]),
        table(
            [vmap({"meta": {"key": "iifname"}}, ("lan0", {"goto": {"target": "ok"}}))], ok=[[state("related"), ACCEPT]]
        ),
        table([{"xt": {"type": "match", "name": "conntrack"}}, ACCEPT]),
        table([{"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "expected"}}, ACCEPT]),
        table([state("related"), {"queue": None}]),
    ],
)
def test_a_filter_that_accepts_or_may_accept_related_is_not_named(items: list[Any]) -> None:
    assert unrelated_chains(items) == ()


@pytest.mark.parametrize(
    "items",
    [
        table(),
        table(hook="input"),
        table(hook="output"),
        table([state("established"), ACCEPT]),
        table([state(["new", "related"], "!="), ACCEPT]),
        table([state("related"), DROP]),
        table([FROM_LAN, ACCEPT]),
        table([FROM_LAN, jump("lan")], lan=[[ACCEPT]]),
        table([state("established"), jump("lan")], lan=[[state("related"), ACCEPT]]),
        table([jump("loop")], loop=[[jump("loop")]]),
        table([vmap({"ct": {"key": "state"}}, ("established", ACCEPT), ("related", DROP))]),
        table([vmap({"meta": {"key": "l4proto"}}, ("tcp", ACCEPT))]),
        table(unreached=[[state("related"), ACCEPT]]),
    ],
)
def test_a_filter_that_drops_related_is_named(items: list[Any]) -> None:
    assert unrelated_chains(items) == ("inet filter base",)


SAVED = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:ok - [0:0]
{}
COMMIT
"""


@pytest.mark.parametrize(
    "rules",
    [
        "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A FORWARD -i lan0 -m state --state RELATED -j ACCEPT",
        "-A FORWARD -m conntrack ! --ctstate NEW,INVALID -j ACCEPT",
        '-A FORWARD -p tcp -m comment --comment "to \\"ok\\"" -j ok\n-A ok -m conntrack --ctstate RELATED -j ACCEPT',
        "-A FORWARD -m conntrack --ctstate RELATED -g ok\n-A ok -p tcp -j ACCEPT",
        "-A FORWARD -m comment --comment all -j ACCEPT",
    ],
)
def test_a_saved_filter_that_accepts_related_is_not_named(rules: str) -> None:
    assert unrelated_saved(SAVED.format(rules), "ip filter") == ()


@pytest.mark.parametrize(
    "rules",
    [
        "",
        "-A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT",
        "-A FORWARD -m conntrack ! --ctstate RELATED -j ACCEPT",
        "-A FORWARD -m comment --comment RELATED -p tcp -j ACCEPT",
        "-A FORWARD -m conntrack --ctstate RELATED -j DROP",
        "-A ok -m conntrack --ctstate RELATED -j ACCEPT",
    ],
)
def test_a_saved_filter_that_drops_related_is_named(rules: str) -> None:
    assert unrelated_saved(SAVED.format(rules), "ip filter") == ("ip filter FORWARD",)
