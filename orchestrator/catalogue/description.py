"""What a helper class says of itself, from plain values that may come from code nobody has looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.engine.stream import STREAM_STATE_LEN
from orchestrator.model import (
    POLICIES_MAX,
    PRIV_DATA_MAX,
    TRIGGER_MAX_BYTES,
    Bounds,
    L3Proto,
    L4Proto,
    Policy,
    PortRange,
)

T = TypeVar("T")

_SUMMARY_MAX = 200


@dataclass(frozen=True, slots=True)
class Protocol:
    """A transport of a helper and the usual ports of its server; no port means that no rule attaches it."""

    l4proto: L4Proto
    ports: tuple[PortRange, ...]


@dataclass(frozen=True, slots=True)
class Description:
    """A helper as its class declares it. `private_len` are the bytes of private data that are its own.

    `file` is the absolute path of a user's own and `source` what it contained, both empty for any other.
    """

    summary: str
    protocols: tuple[Protocol, ...]
    policies: tuple[Policy, ...]
    families: tuple[L3Proto, ...]
    is_outgoing_only: bool
    private_len: int
    bounds: Bounds
    triggers: tuple[bytes, ...]
    file: str = ""
    source: str = ""


def parse(declared: object) -> Description:
    """A description from the values that engine/describe.py gives. Raises ValueError that says what cannot be."""
    if not isinstance(declared, dict):
        raise ValueError("it declares nothing")
    description = Description(
        summary=_take(declared, "summary", str),
        protocols=tuple(_protocol(item) for item in _items(declared, "serves", dict)),
        policies=tuple(_policy(item) for item in _items(declared, "policies", dict)),
        families=tuple(L3Proto(family) for family in _items(declared, "families", str)),
        is_outgoing_only=_take(declared, "outgoing_only", bool),
        private_len=_take(declared, "private_len", int),
        bounds=_bounds(_take(declared, "bounds", dict)),
        triggers=tuple(bytes.fromhex(trigger) for trigger in _items(declared, "triggers", str)),
    )
    fault = _fault(description)
    if fault:
        raise ValueError(fault)
    return description


def private_max(l4proto: L4Proto) -> int:
    """How much private data a helper may have, in bytes: of 32, the engine takes its part on TCP."""
    return PRIV_DATA_MAX - (STREAM_STATE_LEN if l4proto is L4Proto.TCP else 0)


def _fault(description: Description) -> str:
    protocols = [protocol.l4proto for protocol in description.protocols]
    policies = [policy.name for policy in description.policies]
    if not description.summary.isprintable() or len(description.summary) > _SUMMARY_MAX:
        return f"summary: one line of at most {_SUMMARY_MAX} characters"
    if not any(protocol.ports for protocol in description.protocols):
        return "serves: at least one transport with a usual port is needed"
    if len(set(protocols)) < len(protocols):
        return "serves: one entry for each transport, with all its ports"
    if not 1 <= len(policies) <= POLICIES_MAX or len(set(policies)) < len(policies):
        return f"policies: 1 to {POLICIES_MAX}, of different names"
    if not description.families:
        return "families: ip, ip6, or both"
    most = min(private_max(l4proto) for l4proto in protocols)
    if not 0 <= description.private_len <= most:
        return f"private_len: 0 to {most} bytes, not {description.private_len}"
    if not all(1 <= len(trigger) <= TRIGGER_MAX_BYTES for trigger in description.triggers):
        return f"triggers: 1 to {TRIGGER_MAX_BYTES} bytes each"
    return ""


def _protocol(values: Mapping[str, Any]) -> Protocol:
    ports = _items(values, "ports", int)
    return Protocol(L4Proto(_take(values, "l4proto", str)), tuple(PortRange(port, port) for port in sorted(set(ports))))


def _policy(values: Mapping[str, Any]) -> Policy:
    return Policy(_take(values, "name", str), _take(values, "expect_max", int), _take(values, "expect_timeout_s", int))


def _bounds(values: Mapping[str, Any]) -> Bounds:
    return Bounds(
        ports=PortRange(_take(values, "first_port", int), _take(values, "last_port", int)),
        is_any_source=_take(values, "is_any_source", bool),
        is_any_destination=_take(values, "is_any_destination", bool),
        is_permanent=_take(values, "is_permanent", bool),
    )


def _take(values: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = values.get(key)
    if type(value) is not kind:  # not isinstance: a bool is no number here
        raise ValueError(f"{key}: {kind.__name__} expected, not {value!r}"[:_SUMMARY_MAX])
    return value


def _items(values: Mapping[str, Any], key: str, kind: type[T]) -> tuple[T, ...]:
    items = _take(values, key, list)
    if not all(type(item) is kind for item in items):
        raise ValueError(f"{key}: {kind.__name__} expected, not {items!r}"[:_SUMMARY_MAX])
    return tuple(items)
