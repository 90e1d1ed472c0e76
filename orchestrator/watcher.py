"""Watch everything that is applied, and have its drift mended: what `orch watch` does until somebody ends it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial

from orchestrator.app import App
from orchestrator.drift import MendReport, Outcome
from orchestrator.errors import Interrupted, OrchError, PreflightError
from orchestrator.kernel.netns import entered, find
from orchestrator.model import Netns
from orchestrator.state import Owner
from orchestrator.supervise import inotify, watching
from orchestrator.supervise.inotify import Inotify
from orchestrator.supervise.launcher import LocalProcesses
from orchestrator.supervise.reactor import Reactor, Timer
from orchestrator.supervise.watching import Commit, Commits

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LEDGER_CHANGES = inotify.MODIFIED | inotify.CREATED | inotify.DELETED | inotify.MOVED_IN
_LEDGER = "ledger.sqlite"
_SOON_S = 0.1  # after a change: others often come with it

At = tuple[str, str]  # a profile, and the identity of its namespace


class Watcher(Reactor):
    """Looks at each profile when its rules change, when one of its processes or its supervisor ends, and now and then.

    `mend` does the work for one profile, `tell` gets what came of it and who had changed its rules, if that is known.
    """

    def __init__(
        self,
        app: App,
        processes: LocalProcesses,
        *,
        profile: str,
        interval_s: float,
        mend: Callable[[Owner], MendReport],
        tell: Callable[[MendReport, str], None],
    ) -> None:
        super().__init__()
        self._app = app
        self._processes = processes
        self._profile = profile
        self._interval_s = interval_s
        self._mend = mend
        self._tell = tell
        self._owners: dict[At, Owner] = {}
        self._commits: dict[str, Commits] = {}
        self._pidfds: dict[int, tuple[int, At]] = {}
        self._looks: dict[At, Timer] = {}
        self._culprits: dict[At, str] = {}
        self._rested: dict[At, float] = {}
        self._files = Inotify()

    def run(self) -> None:
        """Until TERM, INT or HUP. Raises OrchError where it may not listen, or nothing was ever applied."""
        try:
            self._files.add(str(self._app.state_dir), _LEDGER_CHANGES)
        except FileNotFoundError:
            where = str(self._app.state_dir)
            raise OrchError("nothing is applied", where=where, hint="orch apply PROFILE") from None
        self.watch(self._files.fileno(), self._ledger_changed)
        self._app.applied(self._profile)  # a name that is wrong from the beginning is refused
        self._look_at_all()
        self.loop(_SIGNALS)

    @property
    def owners(self) -> tuple[Owner, ...]:
        return tuple(self._owners.values())

    def heard_signal(self, number: int) -> None:
        del number
        self.end()

    def _ledger_changed(self) -> None:
        if any(change.name == _LEDGER or change.mask & inotify.LOST for change in self._files.read()):
            before = set(self._owners)
            self._rescan()
            for at in self._owners.keys() - before:
                self._look_in(at, _SOON_S)

    def _look_at_all(self) -> None:
        self._rescan()
        for at in self._owners:
            self._look_in(at, 0.0)
        self.at(time.monotonic() + self._interval_s, self._look_at_all)

    # -- what is listened to ------------------------------------------------------------------------------------------

    def _rescan(self) -> None:
        self._owners = {_at(owner): owner for owner in self._asked_for()}
        for at in self._looks.keys() - self._owners.keys():
            self._looks.pop(at).cancel()
        self._listen({owner.netns.identity: owner.netns for owner in self._owners.values()})
        self._follow_processes()

    def _asked_for(self) -> list[Owner]:
        """None while the namespace that was named (--netns) is gone: there may be another one of that name."""
        try:
            return [applied.owner for applied in self._app.applied(self._profile)]
        except PreflightError:
            return []

    def _listen(self, wanted: dict[str, Netns]) -> None:
        for identity in self._commits.keys() - wanted.keys():
            commits = self._commits.pop(identity)
            self.unwatch(commits.fileno())
            commits.close()
        for identity in wanted.keys() - self._commits.keys():
            opened = _open(wanted[identity])
            if opened:
                self._commits[identity] = opened
                self.watch(opened.fileno(), partial(self._rules_changed, identity))

    def _rules_changed(self, identity: str) -> None:
        for commit in self._commits[identity].read():
            touched = [at for at in self._owners if at[1] == identity and commit.touches(at[0])]
            if touched and not self._is_ours(commit):
                for at in touched:
                    self._culprits[at] = _who(commit)
                    rest_s = 0.0 if commit.is_certain(at[0]) else self._rested.get(at, 0.0) - time.monotonic()
                    self._look_in(at, max(_SOON_S, rest_s))

    def _is_ours(self, commit: Commit) -> bool:
        return commit.pid == os.getpid() or watching.is_by_holder(commit, str(self._app.state_dir))

    def _follow_processes(self) -> None:
        """One descriptor for each helper process and each supervisor that runs now; it tells when that ends."""
        helpers = {p.pid: (p.profile, p.netns) for p in self._processes.running() if p.pid}
        alive = {pid: at for pid, at in {**helpers, **self._processes.all_supervisors()}.items() if at in self._owners}
        for pid in self._pidfds.keys() - alive.keys():
            self._ended(pid)
        for pid in alive.keys() - self._pidfds.keys():
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self._look_in(alive[pid], _SOON_S)
                continue
            self._pidfds[pid] = descriptor, alive[pid]
            self.watch(descriptor, partial(self._ended, pid))

    def _ended(self, pid: int) -> None:
        descriptor, at = self._pidfds.pop(pid)
        self.unwatch(descriptor)
        os.close(descriptor)
        self._look_in(at, _SOON_S)

    # -- looking ------------------------------------------------------------------------------------------------------

    def _look_in(self, at: At, seconds: float) -> None:
        """The sooner of two looks counts; one that is due is not put off by another change."""
        deadline = time.monotonic() + seconds
        timer = self._looks.get(at)
        if timer and not timer.is_cancelled and timer.deadline <= deadline:
            return
        if timer:
            timer.cancel()
        self._looks[at] = self.at(deadline, partial(self._look, at))

    def _look(self, at: At) -> None:
        self._looks.pop(at, None)
        owner = self._owners.get(at)
        if owner is None:
            return
        began = time.monotonic()
        try:
            report = self._mend(owner)
        except Interrupted:
            return  # `loop` hears of the signal too, and ends
        self._rested[at] = time.monotonic() + watching.RESTS * (time.monotonic() - began)
        self._tell(report, self._culprits.get(at, ""))
        if report.again_in_s:
            self._look_in(at, report.again_in_s)
        else:
            self._culprits.pop(at, None)
        self._follow_processes()


def look_once(
    owners: Iterable[Owner],
    mend: Callable[[Owner], MendReport],
    tell: Callable[[MendReport], None],
    *,
    within_s: float,
    sleep: Callable[[float], None],
    interrupted: Callable[[], int],
    now: Callable[[], float] = time.monotonic,
) -> list[MendReport]:
    """How each profile is in the end; who is at work already is waited for, all together for `within_s`.

    A look that waits for the lock uses that up as well. `tell` gets what came of every look. Raises Interrupted when
    `interrupted` gives the number of a signal.
    """
    reports = []
    for owner in owners:
        is_over = False
        while not is_over:
            began = now()
            report = mend(owner)
            if report.outcome is Outcome.WAITING:
                within_s -= now() - began
            is_over = not 0.0 < report.again_in_s <= within_s
            if is_over or report.outcome is not Outcome.WAITING:
                tell(report)
            if is_over:
                reports.append(report)
                continue
            sleep(report.again_in_s)
            within_s -= report.again_in_s
            if number := interrupted():
                raise Interrupted(number)
    return reports


def _at(owner: Owner) -> At:
    return owner.profile, owner.netns.identity


def _who(commit: Commit) -> str:
    return "" if commit.is_lost else f"{commit.program} (pid {commit.pid})"


def _open(netns: Netns) -> Commits | None:
    """None if the namespace is gone."""
    try:
        with entered(netns):
            return Commits()
    except OrchError:
        if _is_there(netns):
            raise
        return None
    except OSError as error:
        hint = "run as root" if isinstance(error, PermissionError) else ""
        raise OrchError(f"cannot listen in netns {netns}: {error.strerror}", hint=hint) from error


def _is_there(netns: Netns) -> bool:
    try:
        return find(netns.path).identity == netns.identity
    except OrchError:
        return False
