"""Which chains of others lead to a queue before source NAT; what cannot be followed is not named."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.kernel.foreign_queues import queueing_chains, queueing_saved
from tests import listings
from tests.listings import FROM_LAN

QUEUE = {"queue": {"num": 3, "flags": "bypass"}}
XT_QUEUE = {"xt": {"type": "target", "name": "NFQUEUE"}}


def table(*rules: list[Any], hook: str = "forward", prio: int = 0, **others: list[list[Any]]) -> list[Any]:
    return listings.table("ips", rules, others, policy="accept", hook=hook, prio=prio)


@pytest.mark.parametrize(
    "items",
    [
        table([QUEUE]),
        table([{"queue": None}]),
        table([FROM_LAN, {"counter": None}, XT_QUEUE]),
        table([QUEUE], hook="prerouting"),
        table([QUEUE], hook="output"),
        table([QUEUE], hook="postrouting", prio=99),
        table([FROM_LAN, {"jump": {"target": "a"}}], a=[[{"goto": {"target": "b"}}]], b=[[QUEUE]]),
        table([{"jump": {"target": "a"}}], a=[[{"jump": {"target": "a"}}], [QUEUE]]),
        table(
            [{"vmap": {"key": {"meta": {"key": "iifname"}}, "data": {"set": [["lan0", {"jump": {"target": "a"}}]]}}}],
            a=[[QUEUE]],
        ),
    ],
)
def test_a_base_chain_that_leads_to_a_queue_is_named(items: list[Any]) -> None:
    assert queueing_chains(items) == ("inet ips base",)


@pytest.mark.parametrize(
    "items",
    [
        table(),
        table([{"accept": None}]),
        table([QUEUE], hook="input"),
        table([QUEUE], hook="postrouting", prio=100),
        table([{"xt": {"type": "target", "name": "CT"}}]),
        table([{"xt": None}]),
        table([FROM_LAN], unused=[[QUEUE]]),
        table([{"vmap": {"key": {"meta": {"key": "iifname"}}, "data": "@named"}}], unused=[[QUEUE]]),
    ],
)
def test_others_are_not_named(items: list[Any]) -> None:
    assert queueing_chains(items) == ()


SAVED = """*mangle
:FORWARD ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:ips - [0:0]
-A FORWARD -i lan0 -m comment --comment "a -j b" -g ips
-A INPUT -j NFQUEUE --queue-num 4
-A ips -p tcp -j NFQUEUE --queue-num 3
COMMIT
"""


def test_chains_of_iptables_are_followed_too() -> None:
    assert queueing_saved(SAVED, "ip mangle") == ("ip mangle FORWARD",)
    assert queueing_saved(SAVED.replace("-j NFQUEUE --queue-num 3", "-j ACCEPT"), "ip mangle") == ()
    assert queueing_saved("", "ip mangle") == ()
