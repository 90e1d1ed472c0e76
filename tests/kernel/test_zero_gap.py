"""Updates under traffic: a client makes expectations all the time, and each is there when its announcement arrives.

ORCH_UPDATES is how many updates there are in each queueing; of conntrackd there are half as many.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab.control import Control, control
from lab.ends import FTP_PORT
from lab.topology import ROUTER, ROUTER_FILTER, load_filter
from orchestrator import launches
from orchestrator.engine.counters import Snapshot
from orchestrator.engine.names import handover_socket
from orchestrator.execute import Outcome
from orchestrator.kernel.netns import find
from orchestrator.model import QueueRow
from orchestrator.ports import ProcessSeen
from orchestrator.state import describe
from orchestrator.verify.expectations import Events, expectations_made
from tests.hosts import Harness
from tests.kernel.conftest import clean_orch
from tests.kernel.native import QUEUEINGS
from tests.reports import REPORTS
from tests.waiting import until

UPDATES = int(os.environ.get("ORCH_UPDATES", "4"))
FIGURES = REPORTS.setdefault("updates without a gap", [])
PORTS = range(20000, 60000)
_EXPECTATIONS_MAX = Path("/proc/sys/net/netfilter/nf_conntrack_expect_max")
"""Of the host: a guest has room for 120, and sessions that have ended keep theirs for two minutes."""

_TRANSFER_EACH = 10
_SESSION_LEN = 25
_WITHIN_S = 30.0
_PAUSE_S = 0.02  # between announcements: a guest has one CPU, and orch needs it too


@dataclass(slots=True)
class Updated(Harness):
    """orch, which looks at queues that are about to be let go: `seen` is what ever came to those that are gone."""

    seen: int = 0

    def _step(self, outcome: Outcome) -> None:
        name = describe(outcome.step)
        self.steps.append(name)
        left = name.removeprefix("drain queue ")
        if left != name:
            numbers = {int(number) for number in left.split(", ")}
            rows = [row for row in self.rows() if row.queue_num in numbers]
            assert not any(row.waiting or row.queue_dropped or row.user_dropped for row in rows)
            self.seen += sum(row.seen for row in rows)

    def rows(self) -> tuple[QueueRow, ...]:
        return self.system.host.queues(find(ROUTER))

    def process(self) -> ProcessSeen:
        (process,) = self.system.processes.running()
        return process

    def page(self) -> Snapshot:
        page = self.system.processes.counters("gap", find(ROUTER), "ftp")
        assert page is not None
        return page


@dataclass(slots=True)
class Client:
    """Announces one port after the other, over a connection that lasts and over others, until `stop`."""

    events: Events
    announced: int = 0
    longest_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    _before: int = 0
    _is_over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        assert self._thread is not None
        self._thread.join(_WITHIN_S)

    def more(self, count: int) -> None:
        """Wait until it has announced some more."""
        wanted = self.announced + count
        until(lambda: self.announced >= wanted or bool(self.failures), f"{count} more announcements")

    def _run(self) -> None:
        ports = itertools.cycle(PORTS)
        try:
            with control() as lasting:
                lasting.chat()  # conntrackd reads no first line
                while not self._is_over.is_set():
                    with control() as brief:
                        brief.chat()
                        for talk in (lasting, brief) * _SESSION_LEN:
                            self._announce(talk, next(ports))
        except (OSError, AssertionError) as error:
            self.failures.append(f"announcement {self.announced}: {type(error).__name__}: {error}")

    def _announce(self, talk: Control, port: int) -> None:
        if self._is_over.wait(_PAUSE_S):
            return
        started = time.monotonic()
        if self.announced % _TRANSFER_EACH:
            assert talk.announce("PORT", port) == talk.announcement("PORT", port)
        else:
            talk.transfer("PORT", port)
        self.longest_s = max(self.longest_s, time.monotonic() - started)
        made = {event.ends.dport for event in self.events.take()}
        assert {port} <= made <= {port, self._before}, f"expected {port}, made {made}"  # that before may be sent again
        self._before = port
        self.announced += 1


def profile(queueing: str, *, queue: int = 500, policies: str = "", guard: str = "1024-65535") -> str:
    return (
        "profile: gap\nfamilies: ip\nhelpers:\n"
        f"  ftp: {{queueing: {queueing}, queue: {queue}, guard: {{ports: {guard}}}, {policies}"
        f" attach: [{{path: incoming, ports: {FTP_PORT}}}]}}\n"
    )


def updates(queueing: str) -> Iterator[tuple[str, str]]:
    """What changes, and the profile then; with `program` the code of the engine counts as another."""
    queue, policies, guard = 500, "", "1024-65535"
    for number in itertools.count():
        match number % 4:
            case 0:
                policies = f"policies: {{ftp: {{expect_max: {2 + number % 3}, expect_timeout: 60}}}},"
                yield "policies", profile(queueing, queue=queue, policies=policies, guard=guard)
            case 1:
                queue = 500 + 10 * (number // 4 % 2 + 1)
                yield "queue", profile(queueing, queue=queue, policies=policies, guard=guard)
            case 2:
                guard = f"{1024 + number}-65535"
                yield "guard", profile(queueing, queue=queue, policies=policies, guard=guard)
            case _:
                yield "program", profile(queueing, queue=queue, policies=policies, guard=guard)


def of_conntrackd(*, queue: int = 500, policies: str = "", has_tftp: bool = False) -> str:
    """With tftp each has the queue that the other one had when the number changes."""
    tftp = f"  tftp: {{engine: conntrackd, queue: {1001 - queue}}}\n" if has_tftp else ""
    return (
        "profile: gap\nfamilies: ip\nhelpers:\n"
        f"  ftp: {{engine: conntrackd, queue: {queue}, {policies} attach: [{{path: incoming, ports: {FTP_PORT}}}]}}\n"
        f"{tftp}"
    )


def updates_of_conntrackd() -> Iterator[tuple[str, str]]:
    """What changes, and the profile then; with `program` conntrackd counts as another."""
    queue, policies, has_tftp = 500, "", False
    for number in itertools.count():
        match number % 4:
            case 0:
                queue = 500 + (number // 4 + 1) % 2
                yield "queue", of_conntrackd(queue=queue, policies=policies, has_tftp=has_tftp)
            case 1:
                has_tftp = not has_tftp
                yield "helpers", of_conntrackd(queue=queue, policies=policies, has_tftp=has_tftp)
            case 2:
                yield "program", of_conntrackd(queue=queue, policies=policies, has_tftp=has_tftp)
            case _:
                policies = f"policies: {{ftp: {{expect_max: {2 + number % 3}, expect_timeout: 60}}}},"
                yield "policies", of_conntrackd(queue=queue, policies=policies, has_tftp=has_tftp)


@contextlib.contextmanager
def updated(first: str, state: Path) -> Iterator[tuple[Updated, Client]]:
    with clean_orch(state) as orch, expectations_made(ROUTER) as events:
        load_filter(ROUTER, ROUTER_FILTER)
        _EXPECTATIONS_MAX.write_text("4096")
        made = Updated(orch.system, orch.state_dir)
        made.apply(first, ROUTER)
        client = Client(events)
        client.start()
        try:
            client.more(5)
            yield made, client
        finally:
            client.stop()
        assert client.failures == []


@pytest.mark.parametrize("queueing", QUEUEINGS)
def test_no_packet_is_missed(routed: None, tmp_path: Path, queueing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with updated(profile(queueing), tmp_path) as (orch, client):
        before = client.announced
        for number, (what, text) in enumerate(itertools.islice(updates(queueing), UPDATES)):
            process = orch.process()
            if what == "program":
                monkeypatch.setattr(launches, "_engine", lambda number=number: f"program {number}")
            orch.steps.clear()
            orch.apply(text, ROUTER)
            assert client.failures == [], what
            assert (orch.process().pid == process.pid) is (what == "policies"), what
            assert not any(step.startswith(("stop", "start", "disable")) for step in orch.steps), orch.steps
            client.more(3)
        client.stop()
        rows = orch.rows()
        assert [(row.queue_dropped, row.user_dropped) for row in rows] == [(0, 0)] * len(rows)
        queued = orch.seen + sum(row.seen for row in rows)
        until(lambda: orch.page().counters.packets == queued, f"{queued} packets counted")
        counters = orch.page().counters
        assert (counters.exceptions, counters.stale, counters.kernel_errors, counters.overruns) == (0, 0, 0, 0)
        assert orch.process().pid == orch.page().pid
        assert orch.diff(text, ROUTER).plan.is_empty
        FIGURES.append(
            f"{queueing}: {UPDATES} updates, {client.announced - before} announcements, {queued} packets queued, "
            f"none missed; one announcement took {client.longest_s * 1e3:.0f} ms at most"
        )


def test_one_that_hands_over_nothing_is_restarted(routed: None, tmp_path: Path) -> None:
    with clean_orch(tmp_path) as host, expectations_made(ROUTER) as events:
        load_filter(ROUTER, ROUTER_FILTER)
        orch = Updated(host.system, host.state_dir)
        orch.apply(profile("registration"), ROUTER)
        before = orch.process()
        (door,) = orch.state_dir.rglob(handover_socket("ftp"))
        door.unlink()
        door.touch()  # nobody listens there, which shows when a successor asks
        changed = profile("registration", guard="2000-65535")
        report = orch.apply(changed, ROUTER)
        assert report.notes[0].startswith("ftp hands over nothing (")
        assert [(c.subject, c.effect) for c in report.plan.changes] == [("ftp", "nothing is inspected meanwhile")]
        assert orch.process().pid != before.pid
        assert orch.diff(changed, ROUTER).plan.is_empty
        with control() as talk:
            assert talk.announce("PORT", PORTS[0]) == talk.announcement("PORT", PORTS[0])
            assert [event.ends.dport for event in events.take()] == [PORTS[0]]


def test_conntrackd_misses_no_packet(routed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with updated(of_conntrackd(), tmp_path) as (orch, client):
        before, count, longest_s = client.announced, max(1, UPDATES // 2), 0.0
        for number, (what, text) in enumerate(itertools.islice(updates_of_conntrackd(), count)):
            process = orch.process()
            if what == "program":
                monkeypatch.setattr(launches, "_program", lambda _, number=number: f"program {number}")
            orch.steps.clear()
            started = time.monotonic()
            orch.apply(text, ROUTER)
            longest_s = max(longest_s, time.monotonic() - started)
            assert client.failures == [], what
            assert (orch.process().pid == process.pid) is (what == "policies"), what
            assert not any("able helper ftp-us/ip/tcp" in step for step in orch.steps), orch.steps
            client.more(3)
        client.stop()
        rows = orch.rows()
        assert [(row.queue_dropped, row.user_dropped) for row in rows] == [(0, 0)] * len(rows)
        assert orch.diff(text, ROUTER).plan.is_empty
        FIGURES.append(
            f"conntrackd: {count} updates of {longest_s:.1f} s at most, {client.announced - before} announcements, "
            f"none missed; one announcement took {client.longest_s * 1e3:.0f} ms at most"
        )
