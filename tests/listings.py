"""Tables as libnftables lists them in JSON, for what reads such listings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FROM_LAN = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "lan0"}}


Rules = Sequence[list[Any]]


def table(
    name: str, rules: Rules, others: Mapping[str, Rules], *, policy: str, hook: str = "forward", prio: int = 0
) -> list[Any]:
    """A table of the family inet with a base chain of these rules, and other chains, by name."""
    place = {"family": "inet", "table": name}
    base = {"chain": {**place, "name": "base", "type": "filter", "hook": hook, "prio": prio, "policy": policy}}
    chains = [{"chain": {**place, "name": chain}} for chain in others]
    listed = [
        {"rule": {**place, "chain": chain, "expr": rule}}
        for chain, them in {"base": rules, **others}.items()
        for rule in them
    ]
    return [base, *chains, *listed]
