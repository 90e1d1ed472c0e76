"""`orch replay`: a block of lines for each packet, and the counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.replay import report
from orchestrator.replay.report import Expected, PacketReport, Summary
from orchestrator.views.human import Paint


def packet_text(packet: PacketReport, paint: Paint) -> str:
    time = "-" if packet.time_s is None else f"{packet.time_s:.6f}"
    ends = f"{_end(packet.src, packet.sport)} -> {_end(packet.dst, packet.dport)}"
    heading = f"#{packet.number} {time} {packet.direction} {packet.l4proto} {ends}  {packet.payload}"
    return "\n".join((heading.rstrip(), *(f"    {line}" for line in _news(packet, paint)))) + "\n"


def _news(packet: PacketReport, paint: Paint) -> Iterator[str]:
    yield from (f"{paint('expect', 'ok')} {_expected(expected)}" for expected in packet.expectations)
    yield from (f'rewrite "{old}" -> "{new}"' for old, new in packet.rewritten)
    if packet.private is not None:
        yield f"private {packet.private}"
    yield from (f"{paint('refused', 'warning')}: {reason}" for reason in packet.refused)
    if packet.finished:
        yield "finished: the rest of this connection is not inspected"
    if packet.error:
        yield f"{paint('error', 'error')}: {packet.error}"


def _expected(expected: Expected) -> str:
    source = f"{expected.src or 'any'} {expected.sport or 'any'}"
    parts = [
        f"{expected.l4proto} {source} -> {expected.dst} {expected.dport}",
        f"policy {expected.policy}",
        f"{expected.timeout_s} s",
        "permanent" if expected.permanent else "",
        f"helper {expected.helper}" if expected.helper else "",
        "" if expected.nat_port is None else f"NAT to port {expected.nat_port}",
    ]
    return ", ".join(part for part in parts if part)


def _end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def summary_text(summary: Summary) -> str:
    read = (
        f"{_counted(summary.frames, 'frame')}, {_counted(summary.connections, 'connection')} with the helper, "
        f"{_counted(summary.packets, 'packet')} with a payload"
    )
    made = (
        f"{_counted(summary.expectations, 'expectation')}, {summary.rewritten} rewritten, {summary.refused} refused, "
        f"{_counted(summary.errors, 'error')}"
    )
    return f"{read}: {made}.\n"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def packet_line(packet: PacketReport) -> str:
    """A line of JSON of type `packet`; its keys are those of PacketReport."""
    return report.encode(packet) + "\n"


def value(summary: Summary) -> dict[str, Any]:
    return report.value(summary)
