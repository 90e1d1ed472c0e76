"""A matrix of faults, made from plans: every kind of plan x every call that changes something x what can happen there.

A run is a list of events: modifying calls of the fake kernel, the parts of those that are several transactions, and
commits of the ledger. At each event in turn orch is killed (a kill after an event is one before the next) or told to
stop, its supervisor is killed, the event fails as it can fail on a real host, once or from then on, or it is done and
the answer is lost. Beside that, at each look at the host, and each statement of the ledger, that fails. The laws are
those of `Point.try_it`. `python -m tests.faults` tries everything and prints how many points.
"""

from __future__ import annotations

import collections
import errno
import gc
import itertools
import logging
import pickle
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from orchestrator import confirm, drift
from orchestrator.errors import HelperProcessError, KernelError, OrchError, RollbackError
from orchestrator.fake import FakeKernel, references
from orchestrator.model import HELPER_PROGRAM, HelperKey, L3Proto, L4Proto, Policy, QueueRow, Registration, Status
from orchestrator.release import idles_iptables
from orchestrator.reports import TeardownReport, Trial
from orchestrator.status import HostStatus, ProfileStatus
from tests.adapters import CHANGES, LOOKS, wrapped
from tests.hosts import Harness, both

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # as /run is: a ledger on a disk is many times slower
_STATE_DIR = re.compile(r" --state-dir \S+")
MODULES = {
    "nf_conntrack_ftp": (("ftp", L4Proto.TCP),),
    "nf_nat_ftp": (),
    "nf_conntrack_tftp": (("tftp", L4Proto.UDP),),
    "nf_nat_tftp": (),
}
FOREIGN = Registration(
    HelperKey("theirs", L3Proto.IP, L4Proto.TCP), 9, Status.ENABLED, (Policy("theirs", 3, 60),), priv_data_len=4
)

# What each call can answer; all others may lack a privilege, or fail for a reason that nobody foresaw.
ERRNOS = {
    "register helper": (errno.EEXIST, errno.EBUSY, errno.ENOMEM, errno.EPERM, errno.EINVAL),
    "update helper": (errno.ENOENT, errno.EBUSY, errno.EPERM),
    "unregister helper": (errno.ENOENT, errno.EBUSY, errno.EPERM),
    "load module": (errno.ENOENT, errno.EPERM),
    "load rules": (errno.ENOENT, errno.ENOMEM, errno.ENOSPC, errno.EPERM),
    "flush rules": (errno.ENOMEM, errno.EPERM),
    "remove rules": (errno.EBUSY, errno.ENOMEM, errno.EPERM),
}
OTHERS = (errno.EPERM, errno.EIO)
COMMIT = "commit"
READING, WRITING = "reading the ledger", "writing the ledger"
STARTS = ("start", "hand over")
OF_SUPERVISORS = (*STARTS, "stop", "watch", "serve queues")
OF_FILES = ("reconcile", "do not reconcile", "clean up")
UNWATCHED, GONE = " unwatched", "its supervisor is gone"
AMONG = "of another family"
PARTS = (f"load rules {AMONG}", f"flush rules {AMONG}", f"remove rules {AMONG}", "put back rules", "wait for")
LOOKS_FAIL = {
    "registry": (errno.EINTR, errno.ENOBUFS, errno.EPERM),
    "rules": (errno.EINTR, errno.ENOBUFS, errno.EPERM),
    "host": (errno.EIO, errno.EMFILE, errno.ENOMEM),
    "processes": (errno.EMFILE, errno.EIO),
}
LOOKS_ALIKE = 7  # each seventh look of a run: many are the same, at another moment
ALIKE = 5  # each fifth point of a scenario that differs little from another one
PROGRAMS = ("conntrackd", HELPER_PROGRAM)


class Killed(BaseException):
    """SIGKILL: nothing catches it, and whatever still changes something after it is a mistake of the test."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, once or from then on: an errno, or one of the words that `Events` knows."""

    what: str | int
    is_lasting: bool = False

    def __str__(self) -> str:
        name = errno.errorcode[self.what] if isinstance(self.what, int) else self.what
        return f"{name}, from then on" if self.is_lasting else name


KILL = Fault("kill")
SIGNAL = Fault("signal")
ORPHAN = Fault("supervisor killed")
LOST = Fault("answer lost")


@dataclass(slots=True)
class Events:
    """What one command did, and the faults to come, by the place of their event.

    `looks` are looks at the host and statements of the ledger, and `blind` is the one that fails.
    """

    orch: Harness
    kernel: FakeKernel
    faults: Mapping[int, Fault] = field(default_factory=dict)
    blind: Blind | None = None
    names: list[str] = field(default_factory=list)
    looks: list[str] = field(default_factory=list)
    lost: Exception | None = None
    is_dead: bool = False

    def happen(self, operation: str, key: str = "") -> None:
        if self.is_dead:
            if operation != COMMIT:
                raise AssertionError(f"{operation} {key} after SIGKILL")
            raise Killed
        self.kernel.dying_programs = self.kernel.deaf_programs = set()
        place = len(self.names)
        self.names.append(operation)
        begun = (fault for n, fault in self.faults.items() if n < place and self.names[n] == operation)
        fault = self.faults.get(place) or next((fault for fault in begun if fault.is_lasting), None)
        if fault is not None:
            self._strike(fault, operation, key)

    def look(self, name: str) -> None:
        """A look at the host, or a statement of the ledger, is about to be taken."""
        place = len(self.looks)
        self.looks.append(name)
        blind = self.blind
        if blind and (place == blind.place or (blind.is_lasting and place > blind.place)) and name == blind.name:
            raise blind.error()

    def around(self, name: str, call: Callable[[], Any]) -> Any:
        """A call of an adapter."""
        port, _, method = name.partition(".")
        if method in LOOKS.get(port, ()):
            self.look(name)
        result = call()
        lost, self.lost = self.lost, None
        if lost:
            raise lost
        return result

    def _strike(self, fault: Fault, operation: str, key: str) -> None:
        match fault.what:
            case "answer lost":
                self.lost = lost_answer(operation, key)
            case "supervisor killed":
                lose_supervisors(self.orch, self.kernel)
            case "silent":
                raise HelperProcessError(f"{key}: its supervisor does not answer")
            case "dies" | "never ready" if operation == "hand over":
                raise HelperProcessError(f"{key} goes on as it was: its successor ended at once")
            case "kill":
                self.is_dead = True
                raise Killed
            case "signal":
                self.orch.signal_number = signal.SIGTERM
            case "missing":
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", key)
            case "dies":
                self.kernel.dying_programs = set(PROGRAMS)
            case "never ready":
                self.kernel.deaf_programs = set(PROGRAMS)
            case "disk full":
                raise sqlite3.OperationalError("database or disk is full")
            case int(number):
                raise KernelError(operation, key, number)


def lost_answer(operation: str, key: str) -> Exception:
    """What a call says that has done its work, and does not know it."""
    if operation in OF_SUPERVISORS:
        return HelperProcessError(f"{key}: its supervisor does not answer")
    return OSError(errno.EIO, key) if operation in OF_FILES else KernelError(operation, key, errno.ENOBUFS)


@dataclass(frozen=True, slots=True)
class Blind:
    """A look, or a statement of the ledger, that fails, once or all of its name from then on."""

    place: int
    name: str
    number: int = 0
    is_lasting: bool = False

    def __str__(self) -> str:
        number = errno.errorcode[self.number] if self.number else "disk I/O error"
        return f"{self.name} fails with {number}{', from then on' if self.is_lasting else ''}"

    def error(self) -> Exception:
        if self.name in (READING, WRITING):
            return sqlite3.OperationalError("disk I/O error")
        if self.name.startswith(("registry", "rules", "host.connections")):
            return KernelError("list", self.name, self.number)
        return OSError(self.number, "cannot look", self.name)


class Connection(sqlite3.Connection):
    """A connection to a ledger whose commits are events, and other statements like looks at a host."""

    events: Events | None = None

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        if sql == "COMMIT" and Connection.events is not None:
            Connection.events.happen(COMMIT)
        self._look(sql)
        return super().execute(sql, *parameters)

    def executemany(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        self._look(sql)
        return super().executemany(sql, *parameters)

    @staticmethod
    def _look(sql: str) -> None:
        if Connection.events is not None and not sql.startswith(("COMMIT", "ROLLBACK")):
            Connection.events.look(READING if sql.startswith("SELECT") else WRITING)


@contextmanager
def recording(events: Events) -> Iterator[None]:
    """Commits of every ledger that is opened meanwhile, and modifying calls, happen in `events`."""
    Connection.events, events.kernel.on_modify = events, events.happen
    system, events.orch.system = events.orch.system, wrapped(events.orch.system, events.around, LOOKS, CHANGES)
    try:
        with patch.object(sqlite3, "connect", Connection):
            yield
    finally:
        Connection.events, events.kernel.on_modify = None, None
        events.orch.system = system
        events.kernel.dying_programs = events.kernel.deaf_programs = set()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A host and its ledger, to begin from again and again."""

    kernel: bytes
    files: Mapping[str, bytes]

    @contextmanager
    def host(self) -> Iterator[tuple[Harness, FakeKernel]]:
        kernel: FakeKernel = pickle.loads(self.kernel)
        with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
            state = Path(directory) / "state"
            state.mkdir()
            for name, content in self.files.items():
                (state / name).write_bytes(content)
            yield Harness(kernel.system(), state), kernel


def snapshot(orch: Harness, kernel: FakeKernel) -> Snapshot:
    files = {file.name: file.read_bytes() for file in orch.state_dir.iterdir() if file.is_file()}
    return Snapshot(pickle.dumps(kernel), files)


Knowledge = tuple[object, ...]
Act = Callable[[Harness, FakeKernel], object]


@dataclass(frozen=True, slots=True)
class Ran:
    """What happened in a command, whether it came to its end, and whether it said that it left something."""

    events: tuple[str, ...]
    looks: tuple[str, ...]
    is_done: bool
    is_partial: bool


@dataclass(frozen=True, slots=True)
class Scenario:
    """A kind of plan: what was there, what is done to it, and what has already gone wrong while it is done.

    `between` leads from what was there to further states that it may end in, as several profiles are several changes.
    `is_one_way`: the kernel refuses the state that was there, so it cannot always be brought back; that is said then.
    `killed_before`: the command was run before, and killed at its event of that place (negative: from its end).
    `fails_at` is an event of the command that fails, so that it is on its way back when the next fault comes; with
    `is_hopeless` all of its name fail from then on.
    `every`: only each n-th point is tried, as another scenario is alike; of looks it is each n-th of `looks_alike`.
    """

    name: str
    before: tuple[Act, ...]
    act: Act
    is_new: bool = False
    between: tuple[Act, ...] = ()
    is_one_way: bool = False
    killed_before: int | None = None
    fails_at: str = ""
    is_hopeless: bool = False
    every: int = 1
    looks_alike: int = LOOKS_ALIKE

    @property
    def has_aftermath(self) -> bool:
        """Not where nobody knows any more what there was, or nobody looks after a process, or it cannot come back."""
        return not (self.is_one_way or {forget, lose_supervisors, change_identity} & set(self.before))


@dataclass(frozen=True, slots=True)
class Case:
    """A scenario, ready to be tried: where it begins, what its events are, and the two states that it may end in."""

    scenario: Scenario
    start: Snapshot
    given: Mapping[int, Fault]
    events: tuple[str, ...]
    looks: tuple[str, ...]
    new: str
    known: Mapping[str, list[Knowledge]]

    def points(self) -> list[Point | Aftermath]:
        return [*list(self._points())[:: self.scenario.every], *self._blind_points(), *self._aftermaths()]

    def _aftermaths(self) -> Iterator[Aftermath]:
        """After each kill all processes die, and another thing happens in turn."""
        if self.given or self.scenario.killed_before is not None or not self.scenario.has_aftermath:
            return
        others = itertools.cycle((remove_rules, empty, lose_supervisors, rename))
        for place in range(len(self.events) + 1)[:: self.scenario.every]:
            yield Aftermath(self, place, kill_processes)
            yield Aftermath(self, place, next(others))

    def _blind_points(self) -> Iterator[Point]:
        """Looks take turns: some fail, each fourth of these from then on, with one of its errnos."""
        every = self.scenario.looks_alike * self.scenario.every
        first = sum(map(ord, self.scenario.name)) % every  # not always the same ones of scenarios that are alike
        for turn, (place, name) in enumerate(list(enumerate(self.looks))[first::every]):
            numbers = LOOKS_FAIL.get(name.partition(".")[0], (0,))
            yield Point(self, place, Blind(place, name, numbers[turn % len(numbers)], is_lasting=turn % 4 == 0))

    def _points(self) -> Iterator[Point]:
        first = max(self.given, default=-1) + 1
        for place in range(first, len(self.events) + 1):
            yield Point(self, place, KILL)
            operation = self.events[place] if place < len(self.events) else ""
            for fault in faults_of(operation):
                yield Point(self, place, fault)


def faults_of(operation: str) -> Iterator[Fault]:
    if operation == COMMIT:
        yield from (Fault("disk full"), Fault("disk full", is_lasting=True))
        return
    if operation:
        yield SIGNAL
    if operation in (*OF_SUPERVISORS, "wait for", "load rules", "update helper"):
        yield ORPHAN
    if operation == "wait for":
        yield Fault("silent")
        return
    if operation and operation not in (*PARTS, "load module"):
        yield LOST
    if operation in STARTS:
        yield from (Fault("missing"), Fault("dies"), Fault("never ready"), Fault(errno.ENOMEM))
        yield from (Fault("missing", is_lasting=True), Fault("never ready", is_lasting=True))
    elif operation:
        numbers = ERRNOS.get(operation.removesuffix(AMONG).strip(), OTHERS)
        yield from map(Fault, numbers)
        yield Fault(numbers[-1], is_lasting=True)


@dataclass(frozen=True, slots=True)
class Point:
    """One fault at one event of one case, or at one look."""

    case: Case
    place: int
    fault: Fault | Blind

    def __str__(self) -> str:
        events = self.case.events
        if isinstance(self.fault, Blind):
            return f"{self.case.scenario.name}: {self.fault} at look {self.place} of {len(self.case.looks)}"
        where = f"{self.place} ({events[self.place]})" if self.place < len(events) else f"{self.place} (the end)"
        return f"{self.case.scenario.name}: {self.fault} at event {where}"

    def try_it(self) -> None:
        """Raises AssertionError if a law does not hold.

        Right after the fault nothing is blocked and no rule names a missing helper. Looking changes nothing, and says
        what is unsettled. Whatever command comes next, the host is then as it was before, or as it should become; and
        everything can be taken away. What others have is as it was all the time.
        """
        start: FakeKernel = pickle.loads(self.case.start.kernel)
        with self.case.start.host() as (orch, kernel):
            ran = self._run(orch, kernel)
            check(kernel, start)
            kernel.become_ready()
            check(kernel, start)
            after = snapshot(orch, kernel)
            is_partial = ran.is_partial or (self._is_cut_short(ran) and state(kernel) not in self.case.known)
            is_clean = self._look(orch, kernel, is_partial=is_partial)
        for follow in self._follows(is_clean=is_clean, is_partial=is_partial):
            with after.host() as (orch, kernel):
                follow(orch, kernel)
                check(kernel, start)

    def _run(self, orch: Harness, kernel: FakeKernel) -> Ran:
        if isinstance(self.fault, Blind):
            return run(orch, kernel, self.case.scenario.act, self.case.given, self.fault)
        return run(orch, kernel, self.case.scenario.act, {**self.case.given, self.place: self.fault})

    def _is_cut_short(self, ran: Ran) -> bool:
        """Whether a teardown could not look at the second of two: what it left of the first, it told before."""
        is_lasting = isinstance(self.fault, Blind) and self.fault.is_lasting
        has_second = self.case.scenario.between or self.case.scenario.killed_before is not None
        return is_lasting and bool(has_second) and not ran.is_done

    def _follows(self, *, is_clean: bool, is_partial: bool) -> list[Act]:
        """What is done next: everything after a first kill, else by turns; little where all is as without faults.

        Commits and calls take turns as well, so the turns of both must not be the same.
        """
        follows: list[Act] = (
            [self._again, self._teardown] if is_partial else [self._settle, self._again, self._teardown]
        )
        if self.fault == KILL and not is_clean and self.case.scenario.killed_before is None:
            return follows
        return [] if is_clean and self.place % 5 else [follows[self.place // 2 % len(follows)]]

    def _look(self, orch: Harness, kernel: FakeKernel, *, is_partial: bool) -> bool:
        """True if host and ledger are as they were before, or as they should become.

        A teardown may leave something; then status says what, and the ledger knows whose it is.
        """
        before, ledger = kernel.dump_text(), orch.state_dir / "ledger.sqlite"
        content = ledger.read_bytes() if ledger.exists() else b""
        status = orch.status()
        assert kernel.dump_text() == before
        assert (ledger.read_bytes() if ledger.exists() else b"") == content
        seen = self._state(kernel)
        assert status.unsettled or is_partial or seen in self.case.known, "unsettled, and nobody says so"
        assert not (is_partial and status.is_right), "something is left, and nobody says so"
        assert seen == state(kernel) or not status.is_right, "nobody looks after a process, and nobody says so"
        return seen == state(kernel) and self._knowledge(status) in self.case.known.get(seen, [])

    def _state(self, kernel: FakeKernel) -> str:
        """Where a supervisor was killed its processes may go on without one; nothing else may differ."""
        return state(kernel).replace(UNWATCHED, "") if self.fault == ORPHAN else state(kernel)

    def _drift(self, profile: ProfileStatus) -> tuple[str, ...]:
        """The same of what is not as it was applied."""
        return tuple(line for line in profile.drift if not (self.fault == ORPHAN and line.endswith(GONE)))

    def _knowledge(self, status: HostStatus) -> Knowledge:
        return knowledge(replace(status, profiles=tuple(replace(p, drift=self._drift(p)) for p in status.profiles)))

    def _settle(self, orch: Harness, kernel: FakeKernel) -> None:
        """Any command settles: this one does nothing else."""
        try:
            orch.teardown("nobody")
        except RollbackError:
            assert self.case.scenario.is_one_way
            return
        seen = self._state(kernel)
        assert seen in self.case.known, "neither the old nor the new state"
        assert self._knowledge(orch.status()) in self.case.known[seen], "the ledger says something else"

    def _again(self, orch: Harness, kernel: FakeKernel) -> None:
        self.case.scenario.act(orch, kernel)
        assert self._state(kernel) == self.case.new, "not the new state"
        assert not any(self._drift(profile) for profile in orch.status().profiles)

    def _teardown(self, orch: Harness, kernel: FakeKernel) -> None:
        take_everything_away(orch, kernel)


def run(orch: Harness, kernel: FakeKernel, act: Act, faults: Mapping[int, Fault], blind: Blind | None = None) -> Ran:
    """Run a command with faults."""
    events, report = Events(orch, kernel, faults, blind), None
    with recording(events), suppress(Killed, OrchError, OSError):
        report = act(orch, kernel)
    orch.signal_number = 0
    return Ran(tuple(events.names), tuple(events.looks), report is not None, _is_partial(orch, report))


def _is_partial(orch: Harness, report: object) -> bool:
    """Whether a teardown, or an undoing that is one, said that it left something."""
    if isinstance(report, confirm.Rollback):
        return report.report is not None and bool(report.report.leftovers)
    leftovers = [one for one in report.reports if one.leftovers] if isinstance(report, TeardownReport) else []
    return bool(leftovers) or any("could not be undone" in sentence for sentence in orch.warnings)


@dataclass(frozen=True, slots=True)
class Aftermath:
    """A kill at one event of a case, and something that happens before the next command."""

    case: Case
    place: int
    meanwhile: Act

    def __str__(self) -> str:
        return f"{self.case.scenario.name}: kill at event {self.place}, then {self.meanwhile.__name__}"

    def try_it(self) -> None:
        """Raises AssertionError if a law does not hold.

        The old state and the new one may both be out of reach. But the next command settles what was killed, nothing is
        blocked then and no rule names a missing helper, and everything can be taken away.
        """
        start: FakeKernel = pickle.loads(self.case.start.kernel)
        with self.case.start.host() as (orch, kernel):
            run(orch, kernel, self.case.scenario.act, {self.place: KILL})
            for each in (kernel, start):
                self.meanwhile(orch, each)
            orch.teardown("nobody")
            check(kernel, start)
            assert not orch.status().unsettled
            take_everything_away(orch, kernel)


def take_everything_away(orch: Harness, kernel: FakeKernel) -> None:
    let_time_pass(orch, kernel)  # what has to be confirmed stands in the way until then
    report = orch.teardown(every_netns=True)
    assert not any(one.leftovers for one in report.reports), "something could not be taken away"
    rest = [line for line in kernel.dump_text().splitlines() if not line.startswith("module ")]
    assert sorted(rest) == of_others(kernel), "something is left"


def check(kernel: FakeKernel, start: FakeKernel) -> None:
    assert kernel.deaf() == [], "a registration is enabled where nobody listens"
    assert set(kernel.dangling()) <= set(start.dangling()), "a rule names a helper that is not registered"
    assert of_others(kernel) == of_others(start), "something of others was touched"
    assert kernel.idle() == [], "rules attach nothing any more"
    assert not kernel.leaked, "a registration cannot be removed until the next boot"


def state(kernel: FakeKernel) -> str:
    """The dump but for loaded modules, which stay by design, and registrations that must stay and do nothing."""
    resting = {f"registration {registration}" for registration in at_rest(kernel)}
    lines = kernel.dump_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("module ") and line not in resting)


def at_rest(kernel: FakeKernel) -> Iterator[Registration]:
    """Disabled registrations that nothing uses, where the kernel would make iptables rules idle if one went."""
    rules = [rules for space in kernel.namespaces.values() for rules in space.rules.values()]
    if not idles_iptables(kernel.release) or all(one.backend.is_nftables for one in rules):
        return
    used = {key for one in rules for key in references(one)}
    used |= {key for _, launch in kernel.running_processes.values() for key in launch.spec.keys}
    for key, registration in kernel.registrations.items():
        if registration.status is Status.DISABLED and key not in used:
            yield registration


def knowledge(status: HostStatus) -> Knowledge:
    """What orch knows of the host, wherever its ledger is."""
    profiles = tuple(
        (str(profile.owner), tuple(_STATE_DIR.sub("", line) for line in profile.drift), profile.trial is not None)
        for profile in status.profiles
    )
    return (profiles, status.unknown, status.unsettled)


def of_others(kernel: FakeKernel) -> list[str]:
    """What is on the host of others than orch."""
    return [line for line in kernel.dump_text().splitlines() if "theirs" in line or line.endswith("queue 9")]


def prepare(scenario: Scenario) -> Case:
    """Run a scenario without the fault that is to come, for its events and its states."""
    with _new_host(scenario).host() as (orch, kernel):
        for act in scenario.before:
            act(orch, kernel)
        start, old = snapshot(orch, kernel), state(kernel)
        known = {old: [knowledge(orch.status())]}
    with start.host() as (orch, kernel):
        events = run(orch, kernel, scenario.act, {}).events
        new = state(kernel)
        known.setdefault(new, []).append(knowledge(orch.status()))
    for act in scenario.between:
        with start.host() as (orch, kernel):
            act(orch, kernel)
            known.setdefault(state(kernel), []).append(knowledge(orch.status()))
    if scenario.killed_before is not None:
        place = range(len(events))[scenario.killed_before]
        with start.host() as (orch, kernel):
            run(orch, kernel, scenario.act, {place: KILL})
            start = snapshot(orch, kernel)
    given = {}
    if scenario.fails_at:
        last = max(n for n, name in enumerate(events) if name == scenario.fails_at)
        given = {last: Fault(errno.EPERM, is_lasting=scenario.is_hopeless)}
    with start.host() as (orch, kernel):
        ran = run(orch, kernel, scenario.act, given)
    return Case(scenario, start, given, ran.events, ran.looks, new, known)


def _new_host(scenario: Scenario) -> Snapshot:
    kernel = FakeKernel(modules_available=dict(MODULES), delete_ignores_references=scenario.is_new)
    kernel.registrations[FOREIGN.key] = FOREIGN
    for name in ("blue", "red"):
        kernel.add_netns(name)
    for space in kernel.namespaces.values():
        space.queues[FOREIGN.queue_num] = QueueRow(FOREIGN.queue_num, 4711, 0, 0, 0, 0)
        space.foreign_references.add(FOREIGN.key.name)
    return Snapshot(pickle.dumps(kernel), {})


def apply(text: str, netns: str = "blue") -> Act:
    return lambda orch, _: orch.apply(text, netns)


def teardown(name: str = "", netns: str = "blue", *, every_netns: bool = False) -> Act:
    return lambda orch, _: orch.teardown(name, None if every_netns else netns, every_netns=every_netns)


teardown_all = teardown(every_netns=True)


def go_back(orch: Harness, _: FakeKernel) -> None:
    """Return to what was applied before, unless that is so already: going back twice leads forth again."""
    if not (orch.status().is_right and orch.diff(profile(ASKING), "blue").plan.is_empty):
        confirm.roll_back(orch.app("blue"), "p", to=None, ask=False)


def forget(orch: Harness, _: FakeKernel) -> None:
    """The ledger is lost."""
    shutil.rmtree(orch.state_dir)
    orch.state_dir.mkdir()


def kill_processes(_: Harness, kernel: FakeKernel) -> None:
    for pid in list(kernel.running_processes):
        kernel.kill(pid)


def hand_over_nothing(_: Harness, kernel: FakeKernel) -> None:
    kernel.keeping = {"ftp"}


def lose_supervisors(_: Harness, kernel: FakeKernel) -> None:
    for pid, (seen, launch) in kernel.running_processes.items():
        kernel.running_processes[pid] = (replace(seen, watched=False), launch)


def change_identity(_: Harness, kernel: FakeKernel) -> None:
    """Somebody registered ours with another length of private data: only a replace makes it right."""
    for key, registration in kernel.registrations.items():
        if key != FOREIGN.key and registration.priv_data_len:
            kernel.registrations[key] = replace(registration, priv_data_len=registration.priv_data_len - 4)


def delete_registrations(_: Harness, kernel: FakeKernel) -> None:
    for key in [key for key in kernel.registrations if key != FOREIGN.key]:
        del kernel.registrations[key]


def replace_one_and_delete_others(orch: Harness, kernel: FakeKernel) -> None:
    """Rules that name all of them cannot be loaded again, and have to go before one is replaced."""
    before = dict(kernel.registrations)
    change_identity(orch, kernel)
    one = min(key for key, registration in kernel.registrations.items() if registration != before[key])
    kernel.registrations = {key: kernel.registrations[key] for key in before if key in (one, FOREIGN.key)}


def tamper(_: Harness, kernel: FakeKernel) -> None:
    for space in kernel.namespaces.values():
        for at in space.rules:
            space.tampered[at] = "somebody was here"


def empty(_: Harness, kernel: FakeKernel) -> None:
    """Somebody empties what we loaded: what there was of it is not known any more."""
    for space in kernel.namespaces.values():
        space.flushed |= set(space.rules)


def remove_rules(_: Harness, kernel: FakeKernel) -> None:
    for space in kernel.namespaces.values():
        space.rules.clear()
        space.flushed.clear()


def rename(_: Harness, kernel: FakeKernel) -> None:
    """blue gets another name."""
    if space := kernel.namespaces.pop("blue", None):
        space.netns = replace(space.netns, label="azure", path="/run/netns/azure")
        kernel.namespaces["azure"] = space


def lose_namespace(_: Harness, kernel: FakeKernel) -> None:
    """`ip netns del blue`: it lives on while a process runs in it, and its rules with it."""
    kernel.gone.append(kernel.namespaces.pop("blue"))


def profile(*helpers: str, name: str = "p", backend: str = "nftables") -> str:
    return f"profile: {name}\nbackend: {backend}\nhelpers:\n" + "".join(f"  {helper}\n" for helper in helpers)


CONNTRACKD = "ftp: {engine: conntrackd}"
NATIVE = "ftp: {}"
ASKING = "ftp: {queueing: registration}"
ATTACHED = "ftp: {queueing: registration, attach: [{ports: [21, 2121]}]}"
IN_KERNEL = "ftp: {engine: kernel}"
ENGINES = {"conntrackd": CONNTRACKD, "native": NATIVE, "registration": ASKING, "kernel": IN_KERNEL}
BOTH = (CONNTRACKD, "tftp: {queueing: registration}")


def scenarios() -> Iterator[Scenario]:
    for name, helper in ENGINES.items():
        for backend in ("nftables", "iptables-nft"):
            text = profile(helper, backend=backend)
            every = 1 if backend == "nftables" or name == "native" else ALIKE
            yield Scenario(f"first apply, {name}, {backend}", (), apply(text), every=every)
            yield Scenario(f"teardown, {name}, {backend}", (apply(text),), teardown(), every=every)
        other = "iptables-nft" if name != "registration" else "iptables-legacy"
        yield Scenario(f"other backend, {name}", (apply(profile(helper)),), apply(profile(helper, backend=other)))
    yield from _updates()
    yield from _engines()
    yield from _sharing()
    yield from _drifts()
    yield from _half_done()
    yield from _on_trial()
    yield from _in_parts()
    yield from _beside_iptables()


def _updates() -> Iterator[Scenario]:
    changes = {
        "policies, conntrackd": (CONNTRACKD, "ftp: {engine: conntrackd, policies: {ftp: {expect_max: 9}}}"),
        "policies, registration": (ASKING, "ftp: {queueing: registration, policies: {ftp: {expect_max: 9}}}"),
        "policies, native": (NATIVE, "ftp: {policies: {ftp: {expect_max: 9}}}"),
        "queue, conntrackd": (CONNTRACKD, "ftp: {engine: conntrackd, queue: 77}"),
        "helpers, conntrackd": (CONNTRACKD, f"{CONNTRACKD}\n  tftp: {{engine: conntrackd}}"),
        "queue, registration": (ASKING, "ftp: {queueing: registration, queue: 77}"),
        "queue, native": (NATIVE, "ftp: {queue: 77}"),
        "process, native": (NATIVE, "ftp: {guard: {source: any}}"),
        "process, registration": (ASKING, "ftp: {queueing: registration, guard: {source: any}}"),
        "rules": (ASKING, ATTACHED),
        "name": (ASKING, "ftp: {queueing: registration, name: own}"),
        "queueing": (NATIVE, ASKING),
    }
    for name, (before, after) in changes.items():
        yield Scenario(f"update of {name}", (apply(profile(before)),), apply(profile(after)))
    for name in ("process, native", "queue, registration"):
        before, after = map(profile, changes[name])
        yield Scenario(f"update of {name}, by a restart instead", (apply(before), hand_over_nothing), apply(after))
    yield Scenario("one more helper", (apply(profile(CONNTRACKD)),), apply(profile(*BOTH)))
    yield Scenario("one helper less", (apply(profile(*BOTH)),), apply(profile(CONNTRACKD)))
    other = profile("ftp: {queueing: registration, queue: 77}")
    yield Scenario("rollback to what was before", (apply(profile(ASKING)), apply(other)), go_back)
    reconciled = profile(ASKING).replace("helpers:", "reconcile: true\nhelpers:")
    yield Scenario("drift is to be mended", (apply(profile(ASKING)),), apply(reconciled))
    yield Scenario("nothing changes", (apply(profile(*BOTH)),), apply(profile(*BOTH)))


def _engines() -> Iterator[Scenario]:
    for before in ENGINES:
        for after in ENGINES:
            if before != after and {before, after} != {"conntrackd", "kernel"}:  # these two refuse each other
                texts = profile(ENGINES[before]), profile(ENGINES[after])
                yield Scenario(f"engine, {before} to {after}", (apply(texts[0]),), apply(texts[1]))


def _sharing() -> Iterator[Scenario]:
    for name, helper in (("conntrackd", CONNTRACKD), ("registration", ASKING), ("native", NATIVE)):
        text, shared = profile(helper), (apply(profile(helper)), apply(profile(helper), "red"))
        yield Scenario(f"shared, second apply, {name}", shared[:1], apply(text, "red"))
        looks_alike = 1 if name == "registration" else LOOKS_ALIKE
        yield Scenario(f"shared, first teardown, {name}", shared, teardown(), looks_alike=looks_alike)
        yield Scenario(f"shared, teardown of all, {name}", shared, teardown_all, between=(teardown("p"),))
        yield Scenario(f"shared, own name from now on, {name}", shared, apply(profile(_named(helper))))
        lost = (shared[0], apply(profile(helper, name="q"), "red"), lose_namespace)
        one = teardown("p", every_netns=True)
        yield Scenario(f"shared, teardown where one is gone, {name}", lost, teardown_all, between=(one,))
    for is_new in (False, True):
        unknown = (apply(profile(ASKING, name="q"), "red"), forget, apply(profile(ASKING)))
        yield Scenario(
            f"shared with one that the ledger has lost, {'7.3' if is_new else '6.1'}", unknown, teardown(), is_new
        )
    two = (apply(profile(CONNTRACKD, name="one")), apply(profile("tftp: {queueing: registration}", name="two")))
    yield Scenario("two profiles, teardown of one", two, teardown("one"))
    yield Scenario("two profiles, teardown of both", two, teardown(), between=(teardown("one"),))


def _named(helper: str) -> str:
    return helper.replace("}", ", name: own}").replace("{, ", "{")


def _beside_iptables() -> Iterator[Scenario]:
    """What would unregister a helper while iptables rules are loaded, its own or those of somebody else."""
    less, both = (profile(*helpers, backend="iptables-nft") for helpers in ((CONNTRACKD,), BOTH))
    yield Scenario("iptables, one more helper", (apply(less),), apply(both))
    yield Scenario("iptables, one helper less", (apply(both),), apply(less))
    yield Scenario("iptables, registration replaced", (apply(less), change_identity), apply(less))
    other = apply(profile("ftp: {queueing: registration, name: own}", name="q", backend="iptables-nft"), "red")
    for name, helper in (("conntrackd", CONNTRACKD), ("registration", ASKING)):
        text = profile(helper)
        yield Scenario(f"beside iptables, first apply, {name}", (other,), apply(text))
        yield Scenario(f"beside iptables, teardown, {name}", (other, apply(text)), teardown())
        named = apply(profile(_named(helper).replace("own", "my-own")))
        yield Scenario(f"beside iptables, another name, {name}", (other, apply(text)), named)
    one = (teardown("p", every_netns=True), teardown("q", every_netns=True))
    yield Scenario("beside iptables, teardown of both", (other, apply(text)), teardown_all, between=one)


def _drifts() -> Iterator[Scenario]:
    for name, helper in ENGINES.items():
        text = profile(helper)
        yield Scenario(f"adopted, {name}", (apply(text), forget), apply(text))
        yield Scenario(f"teardown without a ledger, {name}", (apply(text), forget), teardown())
        yield Scenario(f"rules edited, {name}", (apply(text), tamper), apply(text))
        for backend in ("nftables", "iptables-nft"):
            text = profile(helper, backend=backend)
            emptied, gone = (apply(text), empty), (remove_rules,)
            yield Scenario(f"rules emptied, {name}, {backend}", emptied, apply(text), between=gone)
    for is_new in (False, True):
        for name in ("conntrackd", "registration", "native"):
            text, kernel = profile(ENGINES[name]), "7.3" if is_new else "6.1"
            drifts = {
                "process killed": kill_processes,
                "supervisor gone": lose_supervisors,
                "registration replaced": change_identity,
            } | ({"registration deleted": delete_registrations} if is_new else {})
            for what, act in drifts.items():
                one_way = act is delete_registrations
                title, every = f"{what}, {name}, {kernel}", ALIKE if is_new and not one_way else 1
                yield Scenario(title, (apply(text), act), apply(text), is_new, is_one_way=one_way, every=every)
        yield Scenario(f"teardown, {kernel}", (apply(profile(*BOTH)),), teardown(), is_new)
        yield Scenario(f"one helper less, {kernel}", (apply(profile(*BOTH)),), apply(profile(CONNTRACKD)), is_new)


def _half_done() -> Iterator[Scenario]:
    """A command that fails and is killed on its way back, and one that settles what a killed one left."""
    first, changed = profile(*BOTH), profile("ftp: {queue: 77}", "tftp: {engine: conntrackd}")
    for is_new in (False, True):
        kernel = "7.3" if is_new else "6.1"
        kinds: dict[str, tuple[tuple[Act, ...], Act]] = {
            "first apply": ((), apply(first)),
            "update": ((apply(first),), apply(changed)),
            "replace": ((apply(first), change_identity), apply(first)),
        }
        for name, (before, act) in kinds.items():
            for place in (-4,) if is_new else (-1, -4, -8):
                title = f"settling of {name}, killed {-place} events from its end, {kernel}"
                every = 1 if place == -1 else ALIKE  # the later it was killed, the more there is to settle
                yield Scenario(title, before, act, is_new, killed_before=place, every=every)
            every = ALIKE if is_new else 1
            yield Scenario(f"way back of {name}, {kernel}", before, act, is_new, fails_at="load rules", every=every)
        for place in (-1, -4, -8):
            title = f"settling of teardown, killed {-place} events from its end, {kernel}"
            yield Scenario(title, (apply(first),), teardown(), is_new, killed_before=place)
    asking, elsewhere = (profile(helper, backend="iptables-nft") for helper in (ASKING, ATTACHED))
    half = "load rules of another family"
    yield Scenario("way back from half of the first rules", (), apply(asking), fails_at=half)
    yield Scenario("way back from half of other rules", (apply(asking),), apply(elsewhere), fails_at=half)
    text = profile(CONNTRACKD)

    def is_killed(orch: Harness, kernel: FakeKernel) -> None:
        run(orch, kernel, apply(text), {6: KILL})

    gone, settled = (apply(text, "red"), is_killed, lose_namespace), (teardown("nobody", "red"),)
    yield Scenario("settling in a namespace that is gone", gone, teardown_all, between=settled)


def try_out(text: str) -> Act:
    """An apply that has to be confirmed. Once is enough: a second one would be refused.

    What was killed before it was applied is undone by the next command, though.
    """

    def act(orch: Harness, _: FakeKernel) -> object:
        trial = Trial(60, lambda: None, accepts_loss=True)
        is_applied = waits(orch) and not orch.status().unsettled
        return is_applied or orch.app("blue").apply(*both(text), ask=False, trial=trial)

    return act


def waits(orch: Harness) -> bool:
    with orch.app().reading() as ledger:
        return bool(ledger.pending())


def keep(orch: Harness, _: FakeKernel) -> object:
    return not waits(orch) or confirm.confirm(orch.app(), "p")


def undo(orch: Harness, _: FakeKernel) -> object:
    return not waits(orch) or confirm.roll_back(orch.app(), "p", to=None, ask=False)


def let_time_pass(_: Harness, kernel: FakeKernel) -> None:
    kernel.now += 3600


def mend(orch: Harness, kernel: FakeKernel) -> object:
    """As somebody who watches does, once it is no fight any more."""
    let_time_pass(orch, kernel)
    return drift.mend(orch.app(), orch.app().applied("p")[0].owner, drift.Limits())


def mend_without(*hopeless: tuple[str, str]) -> Act:
    """The same where some calls fail, each an operation and its object: the rest is mended."""

    def act(orch: Harness, kernel: FakeKernel) -> None:
        def on_modify(operation: str, key: str) -> None:
            if (operation, key) in hopeless:
                raise KernelError(operation, key, errno.EPERM)

        kernel.on_modify = on_modify
        mend(orch, kernel)
        kernel.on_modify = None

    return act


def _in_parts() -> Iterator[Scenario]:
    """What has drifted cannot be mended as a whole; each part of it is a transaction of its own then."""
    drifted = (apply(profile(*BOTH)), kill_processes, tamper)
    calls = (("start", "conntrackd"), ("start", "tftp"), ("load rules", "p"))
    between = tuple(mend_without(*some) for count in (1, 2) for some in itertools.combinations(calls, count))
    for name in ("start", "load rules"):
        title = f"drift is mended in parts, as {name} fails"
        yield Scenario(title, drifted, mend, between=between, fails_at=name, every=ALIKE)
        yield Scenario(f"{title} for good", drifted, mend, between=between, fails_at=name, is_hopeless=True)


def _on_trial() -> Iterator[Scenario]:
    """What has to be confirmed: tried, kept, undone by somebody or because it is late; and what watching does."""
    first, changed = profile(*BOTH), profile("ftp: {queue: 77}", "tftp: {engine: conntrackd}")
    for name, before in (("first apply", ()), ("update", (apply(first),))):
        tried = (*before, try_out(changed))
        yield Scenario(f"on trial, {name}", before, try_out(changed))
        yield Scenario(f"on trial, {name}, confirmed", tried, keep)
        yield Scenario(f"on trial, {name}, undone", tried, undo)
        yield Scenario(f"on trial, {name}, too late", (*tried, let_time_pass), teardown("nobody"), every=ALIKE)
        yield Scenario(f"on trial, {name}, settled", before, try_out(changed), killed_before=-6, every=ALIKE)
    yield Scenario("drift is mended", (apply(first), kill_processes), mend)
    anew = (apply(first), replace_one_and_delete_others)
    yield Scenario("drift is mended, registrations made anew", anew, mend, is_new=True, is_one_way=True)


def try_all(cases: list[Scenario], *, every: int = 1) -> tuple[int, list[str]]:
    """Try every point of these scenarios, or each n-th; returns how many, and what did not hold."""
    count, failures = 0, []
    for scenario in cases:
        gc.disable()  # as orch does
        for point in prepare(scenario).points()[::every]:
            count += 1
            try:
                point.try_it()
            except (AssertionError, OrchError, OSError, sqlite3.Error) as error:
                failures.append(f"{point}: {type(error).__name__}: {error}")
        gc.enable()
    return count, failures


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    logging.disable()
    total: collections.Counter[str] = collections.Counter()
    for scenario in scenarios():
        if wanted in scenario.name:
            count, failures = try_all([scenario])
            print(
                f"{count:5} points, {len(failures):3} failures: {scenario.name}",
                *failures[:6],
                sep="\n      ",
                flush=True,
            )
            total.update(points=count, failures=len(failures), kinds=1)
    print(f"{total['points']} points of {total['kinds']} kinds of plan, {total['failures']} failures")
    return 1 if total["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
