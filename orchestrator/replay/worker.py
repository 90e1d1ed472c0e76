"""The process of a replay: it has no privilege, so that a helper of anybody's and a capture from anywhere may be tried.

The capture is standard input; one line of JSON for each packet, and the summary, go to standard output.
"""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

from orchestrator.engine import loading, privileges
from orchestrator.engine.api import Bounds, Direction, Helper
from orchestrator.engine.expectation import Expectation
from orchestrator.engine.guard import show_address
from orchestrator.engine.inspector import Duty, Inspector, Outcome
from orchestrator.engine.packet import Segment, locate
from orchestrator.replay import capture, report
from orchestrator.replay.capture import CaptureError, Frame, IpPacket, NotACaptureError
from orchestrator.replay.connections import Connection, Connections, Router, ends_of
from orchestrator.replay.kernel import NAME, Kernel
from orchestrator.replay.report import Expected, Failure, Line, PacketReport, Request, Summary

_LABEL = 0  # any bit: that it would be cleared tells that the helper is done with a connection
_ADDRESS_LEN = {"ip": 4, "ip6": 16}
_LINE_MAX = 200
_HINT = "orch helpers lists ours, of engine native; the path of a file of your own has a / in it"


def main(request: str, source_fd: str, program: str) -> NoReturn:
    """Replay what `request` says; `source_fd` is the open file of a helper of the user's own, negative without one.

    `program` is the filter of system calls for code that is loaded, in hexadecimal digits.
    """
    loading.end_after(lambda: _answer(report.decode_request(request), int(source_fd), program))


def _answer(asked: Request, source_fd: int, program: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # `orch` gets it too, and ends this process
    source = b""
    if source_fd >= 0:
        with os.fdopen(source_fd, "rb") as file:
            source = file.read()
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # what a helper prints is no part of the answer
        if os.geteuid() == 0:
            _ours(asked)  # which another user could not read in a home of root's
        privileges.confine_trial(bytes.fromhex(program))
        for line in replay(asked, source, sys.stdin.buffer):
            answer.write(report.encode(line) + "\n")
    return 0


def replay(request: Request, source: bytes, stream: BinaryIO) -> Iterator[Line]:
    """Reports of packets, those without news only if asked for; at last the summary, or why there is none."""
    try:
        replayed = Replay(_load(request, source)(), request)
    except loading.LoadError as error:
        hint = "" if request.kind == "file" else _HINT
        yield Failure(printable(f"cannot load {request.name}: {error}"), hint)
        return
    except Exception as error:  # noqa: BLE001 (anything may be written in a class)
        yield Failure(printable(f"what {request.name} declares cannot be read: {type(error).__name__}: {error}"))
        return
    try:
        yield from replayed.reports(stream if stream.seekable() else io.BytesIO(stream.read()))
    except NotACaptureError as error:
        yield Failure(f"cannot read the capture: {error}", "tcpdump -w FILE writes one", is_of_capture=True)
        return
    yield replayed.summary


def _load(request: Request, source: bytes) -> type[Helper]:
    if request.kind == "file":
        return loading.from_source(source, request.name)
    return _ours(request) or loading.installed(request.name)


def _ours(request: Request) -> type[Helper] | None:
    if request.kind == "file" or not request.name.replace("-", "_").isidentifier():
        return None
    try:
        return loading.builtin(request.name)
    except loading.LoadError:
        return None


class Replay:
    """One helper and the connections of one capture."""

    def __init__(self, helper: Helper, request: Request) -> None:
        self.summary = Summary()
        self._helper = helper
        self._is_verbose = request.is_verbose
        self._services = {(s.l4proto, port) for s in helper.serves for port in request.ports or s.ports}
        lens = {_ADDRESS_LEN[family] for family in helper.families}
        router = Router(frozenset(self._services), frozenset(lens), _packed(request.snat), _packed(request.dnat))
        self._connections = Connections(router, helper.private_len)
        self._kernel = Kernel()
        duty = Duty(frozenset({NAME}), _loosened(helper.bounds, request), by_rules=True, label=_LABEL)
        self._inspector = Inspector(helper, duty, self._kernel)
        self._began_s: float | None = None
        self._cut_short = 0
        self._unknown: set[int] = set()

    def reports(self, stream: BinaryIO) -> Iterator[PacketReport]:
        """Replay a capture; raises NotACaptureError if it is none."""
        try:
            for frame in capture.frames(stream):
                told = self._frame(frame)
                if told is not None and (self._is_verbose or not told.is_quiet):
                    yield told
        except NotACaptureError:
            raise
        except CaptureError as error:
            self.summary.warnings.append(f"the capture is damaged: {error}")
        self._conclude()

    def _conclude(self) -> None:
        self.summary.connections = self._connections.count
        if not self.summary.connections:
            ports = ", ".join(sorted(f"{l4proto.name.lower()}/{port}" for l4proto, port in self._services))
            self.summary.warnings.append(f"no connection to {ports} is in the capture; --port names other ports")
        if self._cut_short:
            self.summary.warnings.append(f"{self._cut_short} packets were captured in part only, and are left out")
        if self._unknown:
            kinds = ", ".join(map(str, sorted(self._unknown)))
            self.summary.warnings.append(f"frames of link type {kinds} cannot be read, and are left out")

    def _frame(self, frame: Frame) -> PacketReport | None:
        self.summary.frames += 1
        if self._began_s is None:
            self._began_s = frame.time_s
        packet = capture.ip_packet(frame)
        if packet is None:
            if not capture.is_known(frame.link_type):
                self._unknown.add(frame.link_type)
            return None
        segment = locate(packet.data)
        if segment is None:
            self._cut_short += packet.is_cut_short
            return None
        found = self._connections.find(packet, segment)
        if found is None:
            return None
        connection, direction = found
        told = None
        if segment.payload < segment.end:
            told = self._inspect(frame, packet, segment, connection, direction)
            self.summary.count(told)
        connection.is_confirmed = True
        return told

    def _inspect(
        self, frame: Frame, packet: IpPacket, segment: Segment, connection: Connection, direction: Direction
    ) -> PacketReport:
        before = self._own(connection)
        outcome = self._inspector.inspect(self._kernel.queue(connection, direction, packet, segment))
        self._kernel.give(connection, outcome.change)
        self._inspector.drained()
        after = self._own(connection)
        src, sport, dst, dport = ends_of(packet, segment)
        payload = bytes(packet.data[segment.payload : segment.end])
        return PacketReport(
            number=frame.number,
            time_s=None if frame.time_s is None or self._began_s is None else round(frame.time_s - self._began_s, 6),
            connection=connection.number,
            direction=direction.name.lower(),
            l4proto=segment.l4proto.name.lower(),
            src=show_address(src),
            sport=sport,
            dst=show_address(dst),
            dport=dport,
            payload=_first_line(payload),
            payload_len=len(payload),
            expectations=tuple(self._expected(made) for made in outcome.made),
            rewritten=tuple((_shown(old), _shown(new)) for old, new in outcome.rewritten),
            private=None if after == before else after.hex(),
            refused=tuple(printable(reason) for reason in outcome.refused),
            finished=outcome.change is not None and outcome.change.clear_label is not None,
            error=_raised(outcome),
        )

    def _own(self, connection: Connection) -> bytes:
        """The helper's part of the private data."""
        return connection.private[connection.engine_len :]

    def _expected(self, made: Expectation) -> Expected:
        policy = self._helper.policies[made.policy]
        return Expected(
            l4proto=made.l4proto.name.lower(),
            src=show_address(made.tuple.src) if any(made.mask_src) else "",
            sport=made.tuple.sport if made.mask_sport else 0,
            dst=show_address(made.tuple.dst),
            dport=made.tuple.dport,
            policy=printable(policy.name),
            timeout_s=policy.expect_timeout_s,
            permanent=made.flags != 0,  # there is no other flag
            helper=printable(made.helper),
            nat_port=None if made.nat is None else made.nat.port,
        )


def _loosened(bounds: Bounds, request: Request) -> Bounds:
    first, last = request.ports_expected or (bounds.first_port, bounds.last_port)
    return dataclasses.replace(
        bounds,
        first_port=first,
        last_port=last,
        is_any_source=bounds.is_any_source or request.is_any_source,
        is_any_destination=bounds.is_any_destination or request.is_any_destination,
        is_permanent=bounds.is_permanent or request.is_permanent,
    )


def _packed(address: str) -> bytes:
    if not address:
        return b""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def _raised(outcome: Outcome) -> str:
    """What a helper raised, and the line of its code."""
    if outcome.error is None:
        return ""
    last = traceback.extract_tb(outcome.error.__traceback__)[-1]
    return printable(f"{type(outcome.error).__name__}: {outcome.error} (line {last.lineno} of {last.filename})")


def _first_line(payload: bytes) -> str:
    return _shown(payload.partition(b"\n")[0][:_LINE_MAX].rstrip(b"\r"))


def _shown(data: bytes) -> str:
    return data.decode("latin-1").encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    """Text of others with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
