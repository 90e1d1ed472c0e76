"""Who changes the rules of a namespace, as nf_tables tells it; and a supervisor that has drift mended.

It runs beside a supervisor, so it imports the standard library and the engine alone. What has drifted, and how that is
mended, is for `orch watch --once` to say: it runs as a child of the supervisor. It is started soon after our table was
changed or a process was given up, and every now and then for what nobody tells of: registrations, modules, and rules of
iptables-legacy; not if a glance tells that those are as they were at the last look, unless that is long ago.
Sources: nf_tables_api.c, nft_commit_notify and nf_tables_gen_notify (the last message of a commit says whose it was).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from struct import Struct
from typing import NamedTuple, Protocol

from orchestrator.engine import netlink
from orchestrator.engine.netlink import HEADER_LEN, DecodeError, attributes
from orchestrator.supervise import errands, inotify
from orchestrator.supervise.deafness import Marks
from orchestrator.supervise.errands import Errands
from orchestrator.supervise.glance import glance
from orchestrator.supervise.inotify import Change
from orchestrator.supervise.lifecycle import Life, State
from orchestrator.supervise.reactor import Tell, Timer

FILE = "reconcile.on"
"""While it is in the runtime directory of a profile, the supervisor has drift mended. No profile can have this name:
our commands run in that directory, where `orch teardown NAME` would take it for a profile's file.
"""

INTERVAL_S = 30.0
_START_SOON_S = 0.02  # to start a child takes long enough for other changes to come

_BUSY_S = 0.25  # between two looks at the lock, while an orch is at work
RESTS = 4
"""Others may change a table of iptables all the time: to look because of that takes a fifth of the time at most."""

_GLANCES_MAX = 20  # between two looks, as long as nothing changes
_OK, _FAILED, _DIFFERS = 0, 1, 2  # how a look ends; what failed in order has been said
_ENDED = 128 + signal.SIGTERM
_NFNLGRP_NFTABLES = 7
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_NEWGEN = 15
_NAME_OF_TABLE = 1  # in messages of every other kind: NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE...
_NFTA_GEN_PROC_PID, _NFTA_GEN_PROC_NAME = 2, 3
_NETLINK_ADD_MEMBERSHIP = 1
_SOL_NETLINK = 270
_RECEIVE_BUFFER = 1 << 20
_DATAGRAM_LEN = 1 << 16
_DATAGRAMS_AT_ONCE = 512  # then whoever polls looks after its other descriptors
_DIRECTORY_CHANGES = inotify.CREATED | inotify.DELETED | inotify.MOVED_IN
_HOLDER = re.compile(r"\(pid (\d+)\)")
_HEADER = Struct("=IHHII")
_NUMBER = Struct(">I")
_WARNING = 4  # a level of sd-daemon(3)


class Commit(NamedTuple):
    """One change of rules: the tables that it touched, and which thread of which program made it.

    With `is_lost` there were too many to tell.
    """

    tables: frozenset[str]
    pid: int = 0
    program: str = ""
    is_lost: bool = False

    def touches(self, profile: str) -> bool:
        """Whether it may have touched the rules of a profile: those of nftables, or the table raw of iptables-nft."""
        return self.is_certain(profile) or "raw" in self.tables

    def is_certain(self, profile: str) -> bool:
        """Whether that is more than a guess: the table raw is everybody's."""
        return self.is_lost or f"orch-{profile}" in self.tables


class CommitReader:
    """Puts commits together from messages; one that is long comes in several datagrams."""

    def __init__(self) -> None:
        self._tables: set[str] = set()

    def read(self, data: bytes) -> Iterator[Commit]:
        """The commits that end in this datagram; what cannot be read is left out."""
        offset = 0
        while offset + HEADER_LEN <= len(data):
            length, kind, *_ = _HEADER.unpack_from(data, offset)
            if not HEADER_LEN <= length <= len(data) - offset:
                return
            if kind >> 8 == _NFNL_SUBSYS_NFTABLES:
                with contextlib.suppress(DecodeError):
                    yield from self._take(kind & 0xFF, attributes(data[offset + HEADER_LEN : offset + length]))
            offset += length + 3 & ~3

    def _take(self, kind: int, parts: dict[int, bytes]) -> Iterator[Commit]:
        if kind != _NFT_MSG_NEWGEN:
            self._tables.add(_text(parts.get(_NAME_OF_TABLE, b"")))
            return
        pid = parts.get(_NFTA_GEN_PROC_PID, b"")
        tables, self._tables = frozenset(self._tables), set()
        program = _text(parts.get(_NFTA_GEN_PROC_NAME, b""))
        yield Commit(tables, _NUMBER.unpack(pid)[0] if len(pid) == _NUMBER.size else 0, program)


class Commits:
    """The commits of the namespace in which this is made. Raises OSError."""

    def __init__(self) -> None:
        self._channel = netlink.open_queue_socket(_RECEIVE_BUFFER)
        try:
            self._channel.bind((0, 0))  # what has no port id of its own is left out of every event from the kernel
            self._channel.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
        except OSError:
            self._channel.close()
            raise
        self._reader = CommitReader()
        self._lost = 0

    def fileno(self) -> int:
        return self._channel.fileno()

    def close(self) -> None:
        self._channel.close()

    def read(self) -> list[Commit]:
        """What has come since the last call; it does not wait. Of very much a part, and it is readable still."""
        found: list[Commit] = []
        for _ in range(_DATAGRAMS_AT_ONCE):
            try:
                found += self._reader.read(self._channel.recv(_DATAGRAM_LEN, socket.MSG_DONTWAIT))
            except BlockingIOError:
                break
        before, self._lost = self._lost, netlink.lost_messages(self._channel)
        return [*found, *([Commit(frozenset(), is_lost=True)] if self._lost > before else [])]


def _text(data: bytes) -> str:
    """A program may call itself anything, and it goes to logs and terminals."""
    return "".join(ch if ch.isprintable() else "?" for ch in data.rstrip(b"\0").decode(errors="replace"))


def is_by_holder(commit: Commit, state_dir: str) -> bool:
    """Whether an orch at work made it, the one that holds the lock of the host, or a program that it runs."""
    try:
        with open(f"{state_dir}/lock", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 (no pathlib here)
            return str(commit.pid) in _HOLDER.findall(file.read())
    except OSError:
        return False


class Supervisor(Protocol):
    """What reconciling needs of orchestrator.supervise.supervisor.Supervisor."""

    on_change: Callable[[], None]

    @property
    def processes(self) -> Mapping[str, Life]: ...
    def watch(self, descriptor: int, callback: Callable[[], None]) -> None: ...
    def unwatch(self, descriptor: int) -> None: ...
    def watch_files(self, directory: str, mask: int, tell: Tell) -> None: ...
    def at(self, deadline: float, callback: Callable[[], None]) -> Timer: ...
    def say(self, text: str, level: int = ...) -> None: ...


class Reconciler:
    """Has drift mended while FILE is there; its working directory is the runtime directory."""

    def __init__(self, supervisor: Supervisor, children: Errands, *, profile: str, state_dir: str) -> None:
        self._supervisor = supervisor
        self._children = children
        self._profile = profile
        self._state_dir = state_dir
        self._marks = Marks(state_dir, "")
        self._commits: Commits | None = None
        self._timer: Timer | None = None
        self._looking = 0  # the pid of a look under way
        self._began = self._rested = 0.0  # when the last look began, and until when there is none for a guess
        self._is_wanted_again = self._is_urgent = False
        self._told: set[str] = set()
        self._patience = 1  # glances until the next look, as long as they find nothing new
        self._glances = 0
        self._known: bytes | None = None
        self._before: bytes | None = None
        self._has_looked = False
        supervisor.watch_files(".", _DIRECTORY_CHANGES, self._directory_changed)
        self._given_up = 0
        self._pass_on = supervisor.on_change
        supervisor.on_change = self._state_changed
        self._toggle()

    def _directory_changed(self, changes: list[Change]) -> None:
        if any(change.name == FILE or change.mask & inotify.LOST for change in changes):
            self._toggle()

    def _toggle(self) -> None:
        is_wanted = os.path.exists(FILE)  # noqa: PTH110
        if is_wanted and self._commits is None:
            try:
                self._commits = Commits()
            except OSError as error:
                self._supervisor.say(f"cannot listen to changes of rules: {error}", _WARNING)
                return
            self._supervisor.watch(self._commits.fileno(), self._rules_changed)
            self._supervisor.say("drift is mended from now on")
            self._soon()
        elif not is_wanted and self._commits is not None:
            self._supervisor.unwatch(self._commits.fileno())
            self._commits.close()
            self._commits = None
            self._supervisor.say("drift is not mended any more")
            self._cancel()
            if self._looking:  # it waits for whoever told us so, and would mend after that
                os.kill(self._looking, signal.SIGTERM)

    def _rules_changed(self) -> None:
        for commit in self._commits.read() if self._commits else ():
            if commit.touches(self._profile) and not is_by_holder(commit, self._state_dir):
                if commit.program not in self._told:
                    who = "somebody" if commit.is_lost else f"{commit.program} (pid {commit.pid})"
                    self._supervisor.say(f"{who} changed rules", _WARNING)
                    self._told.add(commit.program)
                self._soon(is_urgent=commit.is_certain(self._profile))

    def _state_changed(self) -> None:
        self._pass_on()
        before, self._given_up = (
            self._given_up,
            sum(life.state is State.FATAL for life in self._supervisor.processes.values()),
        )
        if self._given_up > before:
            self._soon()

    def _soon(self, *, is_urgent: bool = True) -> None:
        self._is_urgent |= is_urgent
        if self._looking:
            self._is_wanted_again = True
        elif self._commits is not None:
            self._look_in(_START_SOON_S if self._is_urgent else max(_START_SOON_S, self._rested - time.monotonic()))

    def _look_in(self, seconds: float) -> None:
        """One that is due sooner is not put off: whoever goes on changing rules would keep us from looking."""
        deadline = time.monotonic() + seconds
        if self._timer and self._timer.callback == self._look and self._timer.deadline <= deadline:
            return
        self._cancel()
        self._timer = self._supervisor.at(deadline, self._look)

    def _glance_in(self, seconds: float) -> None:
        self._cancel()
        self._timer = self._supervisor.at(time.monotonic() + seconds, self._glance)

    def _glance(self) -> None:
        """Look only if something has changed, or it was not looked for long."""
        self._glances += 1
        if self._glances >= self._patience or self._seen() != self._known:
            self._look()
        else:
            self._glance_in(INTERVAL_S)

    def _cancel(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not os.path.exists(FILE):  # noqa: PTH110
            self._toggle()
            return
        with contextlib.suppress(OSError), self._marks.locked() as is_free:
            if not is_free:
                self._look_in(_BUSY_S)
                return
        self._is_wanted_again = self._is_urgent = False
        self._told.clear()
        self._began = time.monotonic()
        self._glances = 0
        self._before = self._seen()
        quiet = ("--news",) if self._has_looked else ()
        command = errands.orch("watch", self._profile, "--once", *quiet, state_dir=self._state_dir)
        try:
            self._looking = self._children.start(command, self._looked)
        except OSError as error:
            self._supervisor.say(f"cannot look for drift: {error.strerror}", _WARNING)
            self._look_in(INTERVAL_S)

    def _looked(self, exit_code: int) -> None:
        self._looking, self._has_looked = 0, True
        self._rested = time.monotonic() + RESTS * (time.monotonic() - self._began)
        if exit_code not in (_OK, _FAILED, _DIFFERS, _ENDED):
            self._supervisor.say(f"looking for drift ended with {exit_code}", _WARNING)
        now = self._seen()
        self._known = now if now == self._before else None
        self._patience = patience_after(exit_code, self._patience, is_known=self._known is not None)
        if self._commits is None:
            return
        if self._is_wanted_again:
            self._soon(is_urgent=False)
        else:
            self._glance_in(INTERVAL_S)

    def _seen(self) -> bytes | None:
        try:
            return glance(self._state_dir)
        except OSError:
            return None


def patience_after(exit_code: int, patience: int, *, is_known: bool) -> int:
    """How many glances it is until the next look at the latest; a glance that finds something new is followed by one.

    What differs waits for somebody, or was given up for a while: it is looked at every time. What cannot be mended is
    tried ever more seldom. Where all is right a look is needed for what a glance does not see, if it sees anything.
    """
    if exit_code == _OK and is_known:
        return _GLANCES_MAX
    if exit_code in (_OK, _DIFFERS):
        return 1
    return min(2 * patience, _GLANCES_MAX)


def attach(supervisor: Supervisor, children: Errands, *, directory: str, state_dir: str) -> None:
    """Let a supervisor have drift mended, as soon as and as long as it is told to."""
    profile = os.path.basename(directory).partition("@")[0]  # noqa: PTH119
    try:
        Reconciler(supervisor, children, profile=profile, state_dir=state_dir)
    except OSError as error:  # no more of inotify(7) for this user
        supervisor.say(f"cannot have drift mended: {error}", _WARNING)
