"""What tests of faults know of the ports: a call that comes to one has to be told there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args, get_origin, get_type_hints

from orchestrator.ports import System
from tests.adapters import CHANGES, LOOKS, OTHERS


def test_every_call_of_a_port_is_of_one_kind() -> None:
    kinds: tuple[Mapping[str, tuple[str, ...]], ...] = (CHANGES, LOOKS, OTHERS)
    told = {port: [name for kind in kinds for name in kind.get(port, ())] for kind in kinds for port in kind}
    there = {}
    for port, adapter in get_type_hints(System).items():
        protocol = get_args(adapter)[1] if get_origin(adapter) is Mapping else adapter
        there[port] = sorted(name for name in vars(protocol) if not name.startswith("_"))
    assert {port: sorted(names) for port, names in told.items()} == there
