"""`orch explain`: what was found about a connection, and the answer in the last lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.explain import Explanation, Match, Question
from orchestrator.model import HelperKey
from orchestrator.ports import Ends, LiveConnection, LiveExpectation
from orchestrator.status import HelperStatus
from orchestrator.views.human import Paint

_WIDTH = 14


def text(explanation: Explanation, paint: Paint) -> str:
    question = explanation.question
    lines = [f"{question.l4proto} {ends_text(question.ends)}, netns {explanation.netns}"]
    lines += [f"  {name.ljust(_WIDTH)}{said}" for name, said in _rows(explanation)]
    if explanation.is_helped:
        lines.append(f"{paint('yes:', 'ok')} {explanation.why}")
    else:
        lines.append(f"{paint('no:', 'error')} {explanation.why}")
        lines.append(f"    cure: {explanation.cure}")
    return "\n".join(lines) + "\n"


def _rows(explanation: Explanation) -> Iterator[tuple[str, str]]:
    yield "path", _path(explanation.question)
    for match in explanation.matches:
        yield "attached by", _match(match)
    for match in explanation.nearest:
        yield "nearest", _match(match)
    for key, helper in {match.attachment.key: match.helper for match in explanation.matches}.items():
        yield from _helper_rows(key, helper)
    for connection in explanation.connections:
        yield "connection", _connection(connection)
    for expectation in explanation.expectations:
        yield "expectation", _expectation(expectation)
    for sentence in explanation.notes:
        yield "note", sentence


def _path(question: Question) -> str:
    ways = (f"{way.path} by {way.interface}" if way.interface else str(way.path) for way in question.ways)
    return f"{', then '.join(ways)} ({question.judged})"


def _match(match: Match) -> str:
    attachment = match.attachment
    side = "iif" if attachment.path == "incoming" else "oif"
    parts = [f"profile {match.owner.profile}: {attachment.path} {attachment.key.l3proto} {attachment.key.l4proto}"]
    parts.append(",".join(map(str, attachment.ports)))
    parts += [f"{side} {attachment.interface}"] if attachment.interface else []
    parts += [f"saddr {','.join(attachment.saddr)}"] if attachment.saddr else []
    parts += [f"daddr {','.join(attachment.daddr)}"] if attachment.daddr else []
    return f"{' '.join(parts)} -> {attachment.key}"


def _helper_rows(key: HelperKey, helper: HelperStatus) -> Iterator[tuple[str, str]]:
    state = dict(helper.registrations).get(key)
    if state:
        yield "registration", f"{key} {state}, queueing by {helper.queueing}"
    pid = f", pid {helper.pid}" if helper.pid else ""
    yield "process", f"{helper.name}: engine {helper.engine}, {helper.state}{pid}"
    for queue in helper.queues:
        said = f"waiting {queue.waiting} dropped {queue.dropped}" if queue.is_bound else "has no listener"
        yield "queue", f"{queue.queue_num} {said}"


def _connection(connection: LiveConnection) -> str:
    return f"{ends_text(connection.ends)} " + (
        f"helper {connection.helper}" if connection.helper else "without a helper"
    )


def _expectation(expectation: LiveExpectation) -> str:
    return f"{expectation.l4proto} {ends_text(expectation.ends)}, for another {expectation.timeout_s} s"


def ends_text(ends: Ends) -> str:
    return f"{_end(ends.saddr, ends.sport)} -> {_end(ends.daddr, ends.dport)}"


def _end(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"{host}:{port}" if port else f"{host}:any"


def value(explanation: Explanation) -> dict[str, Any]:
    question = explanation.question
    return {
        "helped": explanation.is_helped,
        "reason": explanation.reason,
        "why": explanation.why,
        "cure": explanation.cure,
        "netns": explanation.netns.label,
        "l4proto": question.l4proto,
        **_ends_value(question.ends),
        "ways": [{"path": way.path, "interface": way.interface} for way in question.ways],
        "judged": question.judged,
        "matches": [_match_value(match) for match in explanation.matches],
        "nearest": [_match_value(match) for match in explanation.nearest],
        "connections": [{**_ends_value(c.ends), "helper": c.helper} for c in explanation.connections],
        "expectations": [
            {**_ends_value(e.ends), "l4proto": e.l4proto, "helper": e.helper, "timeout_s": e.timeout_s}
            for e in explanation.expectations
        ],
        "notes": list(explanation.notes),
    }


def _ends_value(ends: Ends) -> dict[str, Any]:
    return {"saddr": ends.saddr, "sport": ends.sport or None, "daddr": ends.daddr, "dport": ends.dport or None}


def _match_value(match: Match) -> dict[str, Any]:
    attachment, helper = match.attachment, match.helper
    return {
        "profile": match.owner.profile,
        "key": str(attachment.key),
        "path": attachment.path,
        "ports": [str(ports) for ports in attachment.ports],
        "interface": attachment.interface,
        "saddr": list(attachment.saddr),
        "daddr": list(attachment.daddr),
        "helper": helper.name,
        "engine": helper.engine,
        "queueing": helper.queueing,
        "state": helper.state,
        "pid": helper.pid or None,
    }
