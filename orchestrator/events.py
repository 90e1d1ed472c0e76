"""What happens to expectations and helper processes, as it happens, in every namespace with an applied profile."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from orchestrator.errors import OrchError
from orchestrator.kernel.netns import entered, find
from orchestrator.model import Netns
from orchestrator.ports import Processes, ProcessState, Supervised
from orchestrator.state import Applied, Owner
from orchestrator.supervise import inotify
from orchestrator.supervise.inotify import Inotify
from orchestrator.supervise.lifecycle import HUNG
from orchestrator.supervise.lifetimes import Expected, Fate, Listener, Tracker

_RUNTIME_CHANGES = inotify.MOVED_IN | inotify.CREATED | inotify.DELETED
_STATE_CHANGES = _RUNTIME_CHANGES | inotify.MODIFIED


@dataclass(frozen=True, slots=True)
class ExpectationEvent:
    """What became of an expectation; `time_s` is when it was read, in seconds of the wall clock, as in all events."""

    time_s: float
    netns: Netns
    fate: Fate
    expected: Expected


class Life(StrEnum):
    STARTED = "started"
    RESTARTED = "restarted"
    DIED = "died"
    HUNG = "hung"
    STOPPED = "stopped"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class ProcessEvent:
    """What became of a helper process: `process` is what its supervisor said last of it."""

    time_s: float
    owner: Owner
    life: Life
    process: Supervised


@dataclass(frozen=True, slots=True)
class LostEvent:
    """So many events of a namespace came faster than they were read."""

    time_s: float
    netns: Netns
    count: int


Event = ExpectationEvent | ProcessEvent | LostEvent


def lives(before: tuple[Supervised, ...], after: tuple[Supervised, ...]) -> Iterator[tuple[Life, Supervised]]:
    """What became of the processes of one supervisor between two of its reports."""
    known = {process.name: process for process in before}
    for process in after:
        known_as = known.pop(process.name, None)
        if _has_hung(known_as, process):
            yield Life.HUNG, process
        life = _life(known_as, process)
        if life:
            yield life, process
    yield from ((Life.STOPPED, process) for process in known.values() if process.state is not ProcessState.FATAL)


def _life(before: Supervised | None, now: Supervised) -> Life | None:
    """None for what needs no line: a process that is as it was, or is being started or stopped."""
    if before and _mark(before) == _mark(now):
        return None
    if now.state is ProcessState.RUNNING:
        return Life.RESTARTED if now.restarts else Life.STARTED
    return {ProcessState.BACKOFF: Life.DIED, ProcessState.FATAL: Life.FATAL}.get(now.state)


def _has_hung(before: Supervised | None, now: Supervised) -> bool:
    """Its end may be over when it is seen: then its replacement tells why there is one."""
    if before is None or _mark(before) == _mark(now) or not now.reason.startswith(HUNG):
        return False
    return before.state is ProcessState.RUNNING or not before.reason.startswith(HUNG)


def _mark(process: Supervised) -> tuple[ProcessState, int, int]:
    """What changes when something becomes of a process."""
    return process.state, process.pid, process.restarts


@dataclass(slots=True)
class _Ear:
    """One namespace: `names` are the helpers that are asked for, None for all."""

    netns: Netns
    names: frozenset[str] | None
    listener: Listener
    tracker: Tracker

    def read(self) -> Iterator[Event]:
        now_s = time.time()
        for fate, event in self.tracker.follow(self.listener.read(), self.listener.has_master):
            if self.names is None or event.helper in self.names:
                yield ExpectationEvent(now_s, self.netns, fate, event)
        if lost := self.listener.lost():
            yield LostEvent(now_s, self.netns, lost)


class Stream:
    """The events of all that `applied` tells of, from now on; profiles that are applied later come in as they come.

    `is_whole` is false where one profile was asked for: then only expectations of its own helpers are told. `output` is
    a descriptor; when nobody reads what is written there any more, the stream ends with BrokenPipeError.
    """

    def __init__(
        self,
        applied: Callable[[], tuple[Applied, ...]],
        processes: Processes,
        state_dir: Path,
        *,
        is_whole: bool,
        output: int | None = None,
    ) -> None:
        self._applied = applied
        self._processes = processes
        self._state_dir = state_dir
        self._is_whole = is_whole
        self._output = output
        self._poll = select.poll()
        self._ears: dict[int, _Ear] = {}
        self._lives: dict[tuple[str, str], tuple[Owner, tuple[Supervised, ...]]] = {}
        self._files = Inotify()
        self._state_watch = 0

    def close(self) -> None:
        self._files.close()
        for ear in self._ears.values():
            ear.listener.close()

    def open(self) -> None:
        """Listen from now on. Raises OrchError where that is not allowed, or nothing was ever applied."""
        self._poll.register(self._files, select.POLLIN)
        if self._output is not None:
            self._poll.register(self._output, 0)
        try:
            self._state_watch = self._files.add(str(self._state_dir), _STATE_CHANGES)
        except FileNotFoundError:
            raise OrchError("nothing is applied", where=str(self._state_dir), hint="orch apply PROFILE") from None
        for _ in self._rescan():
            pass  # what runs already is no news

    @property
    def places(self) -> tuple[str, ...]:
        """Where it listens now."""
        return tuple(sorted(ear.netns.label for ear in self._ears.values()))

    def events(self) -> Iterator[Event]:
        """Without end, as they come."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._output:
                    raise BrokenPipeError
                ear = self._ears.get(descriptor)
                if ear:
                    yield from ear.read()
                elif descriptor == self._files.fileno():
                    yield from self._changed({change.watch for change in self._files.read()})

    def _changed(self, watches: set[int]) -> Iterator[Event]:
        """What supervisors say is in the runtime directories; above those are the ledger, and new ones."""
        if self._state_watch in watches or any(watch < 0 for watch in watches):  # or there were too many to tell
            yield from self._rescan()
        elif watches:
            yield from self._news({at: owner for at, (owner, _) in self._lives.items()})

    def _rescan(self) -> Iterator[Event]:
        applied = self._applied()
        for directory in [entry for entry in self._state_dir.iterdir() if entry.is_dir()]:
            with contextlib.suppress(FileNotFoundError):
                self._files.add(str(directory), _RUNTIME_CHANGES)
        self._listen(applied)
        yield from self._news({(a.owner.profile, a.owner.netns.identity): a.owner for a in applied})

    def _news(self, owners: Mapping[tuple[str, str], Owner]) -> Iterator[Event]:
        """What became of processes; those of a profile that was taken away are told of once more."""
        now_s = time.time()
        told, self._lives = self._lives, {}
        for at, owner in owners.items():
            _, before = told.get(at, (owner, ()))
            self._lives[at] = (owner, self._report(owner, before))
        for at, (owner, _) in {**told, **self._lives}.items():
            _, before = told.get(at, (owner, ()))
            _, after = self._lives.get(at, (owner, ()))
            for life, process in lives(before, after):
                yield ProcessEvent(now_s, owner, life, process)

    def _report(self, owner: Owner, before: tuple[Supervised, ...]) -> tuple[Supervised, ...]:
        """What the supervisor says; if it is gone, its processes that still run are as they were."""
        report = self._processes.supervised(owner.profile, owner.netns)
        if report or not before:
            return report
        alive = {process.pid for process in self._processes.running()}
        return tuple(process for process in before if process.pid in alive)

    def _listen(self, applied: tuple[Applied, ...]) -> None:
        """One ear for each namespace; those where nothing is applied any more are closed."""
        wanted = {a.owner.netns.identity: a.owner.netns for a in applied}
        for descriptor, ear in list(self._ears.items()):
            if ear.netns.identity in wanted:
                wanted.pop(ear.netns.identity)
                ear.names = self._names(applied)
                continue
            self._poll.unregister(descriptor)
            del self._ears[descriptor]
            ear.listener.close()
        for netns in wanted.values():
            listener = _open(netns)
            if listener:
                self._ears[listener.fileno()] = _Ear(netns, self._names(applied), listener, Tracker())
                self._poll.register(listener, select.POLLIN)

    def _names(self, applied: tuple[Applied, ...]) -> frozenset[str] | None:
        if self._is_whole:
            return None
        return frozenset(key.name for one in applied for helper in one.helpers for key in helper.keys)


def _open(netns: Netns) -> Listener | None:
    """None if the namespace is gone."""
    try:
        if find(netns.path).identity != netns.identity:
            return None
    except OrchError:
        return None
    try:
        with entered(netns):
            return Listener()
    except OSError as error:
        hint = "run as root" if isinstance(error, PermissionError) else ""
        raise OrchError(f"cannot listen in netns {netns}: {error.strerror}", hint=hint) from error
