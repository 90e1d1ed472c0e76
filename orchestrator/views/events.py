"""`orch events`: a line for each event, in the manner of `conntrack -E expect`, or a line of JSON."""

from __future__ import annotations

import ipaddress
import json
import time
from typing import Any

from orchestrator.engine.api import Tuple
from orchestrator.events import Event, ExpectationEvent, Life, LostEvent, ProcessEvent
from orchestrator.supervise.lifetimes import Expected, Fate
from orchestrator.views.human import Paint

_KIND_WIDTH = len("[CANCELLED]")
_COLOURS = {
    Fate.USED: "ok",
    Fate.EXPIRED: "warning",
    Life.STARTED: "ok",
    Life.RESTARTED: "warning",
    Life.DIED: "error",
    Life.HUNG: "error",
    Life.FATAL: "error",
}


def text(event: Event, paint: Paint) -> str:
    """Time, namespace, what happened, and to what; without an end of line."""
    fraction = int(event.time_s % 1 * 1000)
    when = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event.time_s))}.{fraction:03}"
    if isinstance(event, ExpectationEvent):
        kind = _kind(_word(event.fate), _COLOURS.get(event.fate, ""), paint)
        return f"{when} {event.netns} {kind} {_expectation(event.expected)}"
    if isinstance(event, ProcessEvent):
        kind = _kind(event.life, _COLOURS.get(event.life, ""), paint)
        return f"{when} {event.owner.netns} {kind} {_process(event)}"
    return (
        f"{when} {event.netns} {_kind('lost', 'warning', paint)} {event.count} events came faster than they were read"
    )


def _word(fate: Fate) -> str:
    return "new" if fate is Fate.MADE else str(fate)


def _kind(word: str, colour: str, paint: Paint) -> str:
    return paint(f"[{word.upper()}]".rjust(_KIND_WIDTH), colour)


def _expectation(expected: Expected) -> str:
    value, mask, master = expected.tuple, expected.mask, expected.master
    parts = (
        f"{expected.timeout_s} proto={expected.l4proto.name.lower()}",
        f"src={_address(value.src, mask.src)} dst={_address(value.dst, mask.dst)}",
        f"sport={_port(value.sport, mask.sport)} dport={_port(value.dport, mask.dport)}",
        f"master-src={ipaddress.ip_address(master.src)} master-dst={ipaddress.ip_address(master.dst)}",
        f"master-sport={master.sport} master-dport={master.dport}",
        f"class={expected.policy}{' PERMANENT' if expected.is_permanent else ''} helper={expected.helper}",
    )
    return " ".join(parts)


def _address(value: bytes, mask: bytes) -> str:
    if not any(mask):
        return "any"
    text = str(ipaddress.ip_address(value))
    return text if mask == b"\xff" * len(mask) else f"{text}/{ipaddress.ip_address(mask)}"


def _port(value: int, mask: int) -> str:
    if not mask:
        return "any"
    return str(value) if mask == 0xFFFF else f"{value}/{mask:#x}"


def _process(event: ProcessEvent) -> str:
    process = event.process
    pid = f" pid={process.pid}" if process.pid else ""
    reason = f": {process.reason}" if process.reason and event.life is not Life.STARTED else ""
    return f"process={process.name} profile={event.owner.profile}{pid} restarts={process.restarts}{reason}"


def line(event: Event) -> str:
    """A line of JSON of type `expectation`, `process` or `lost`; without an end of line."""
    return json.dumps(_value(event), ensure_ascii=False)


def _value(event: Event) -> dict[str, Any]:
    if isinstance(event, ExpectationEvent):
        return {"type": "expectation", "event": _word(event.fate), **_where(event), **_expected(event)}
    if isinstance(event, LostEvent):
        return {"type": "lost", **_where(event), "count": event.count}
    process = event.process
    return {
        "type": "process",
        "event": event.life,
        "time": event.time_s,
        "netns": event.owner.netns.label,
        "profile": event.owner.profile,
        "name": process.name,
        "pid": process.pid or None,
        "restarts": process.restarts,
        "reason": process.reason,
    }


def _where(event: ExpectationEvent | LostEvent) -> dict[str, Any]:
    return {"time": event.time_s, "netns": event.netns.label}


def _expected(event: ExpectationEvent) -> dict[str, Any]:
    expected = event.expected
    return {
        "helper": expected.helper,
        "class": expected.policy,
        "timeout_s": expected.timeout_s,
        "permanent": expected.is_permanent,
        "l4proto": expected.l4proto.name.lower(),
        **_ends(expected.tuple),
        "mask": _ends(expected.mask),
        "master": {"l4proto": expected.master_l4proto.name.lower(), **_ends(expected.master)},
    }


def _ends(value: Tuple) -> dict[str, Any]:
    return {
        "src": str(ipaddress.ip_address(value.src)),
        "dst": str(ipaddress.ip_address(value.dst)),
        "sport": value.sport,
        "dport": value.dport,
    }
