"""A plan -> its effects, in order, each recorded before it is taken, and undone in reverse when one fails."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.errors import Interrupted, KernelError, OrchError, RollbackError
from orchestrator.journal import Ledger
from orchestrator.model import Netns, Registration, Rules, Status
from orchestrator.ports import ProcessSeen, System
from orchestrator.state import (
    CreateRegistration,
    DeleteRegistration,
    DrainQueues,
    FlushRules,
    KeepRegistrations,
    LoadModule,
    LoadRules,
    Plan,
    RemoveRules,
    StartProcess,
    Step,
    StopProcess,
    UpdateRegistration,
    WatchProcess,
    describe,
    inverse,
)

# What a step may raise: our own errors, the system's, and what a kernel says that nobody understands (DecodeError).
EXPECTED = (OrchError, OSError, ValueError)

_POLL_S = 0.02
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one step ended; `error` is empty when it went well. `is_undo` steps lead back after a failure."""

    step: Step
    seconds: float
    error: str = ""
    is_undo: bool = False


@dataclass(slots=True)
class Execution:
    """One run of a plan. `report` is told of every step as it ends; `interrupted` returns a signal number or 0."""

    system: System
    ledger: Ledger
    plan: Plan
    tx: int
    report: Callable[[Outcome], None]
    interrupted: Callable[[], int] = lambda: 0
    _done: list[tuple[int, Step]] = field(default_factory=list)

    def run(self) -> None:
        """Take every step; on the first failure or signal undo what was done and raise that first cause.

        Raises RollbackError, with what is left, if the way back fails as well.
        """
        for sequence, step in enumerate(self.plan.steps):
            self._stop_if_interrupted()
            try:
                self._take(sequence, step)
            except EXPECTED as error:
                if isinstance(step, StartProcess | StopProcess):  # the others do all or nothing
                    self._done.append((sequence, step))
                self._fail(error)
        self._stop_if_interrupted()

    def run_all(self) -> tuple[str, ...]:
        """Take every step although some fail, as teardown does; returns one sentence for each that was not done.

        What would do harm after a failure is left out: a process stays while its registration could not be disabled,
        a registration while rules that name it could not be removed.
        """
        failures: list[str] = []
        is_enabled = has_rules = False
        for sequence, step in enumerate(self.plan.steps):
            self._stop_if_interrupted()
            if (is_enabled and isinstance(step, StopProcess)) or (
                (is_enabled or has_rules) and isinstance(step, DeleteRegistration)
            ):
                failures.append(f"{describe(step)}: not tried, as an earlier step failed")
                continue
            try:
                self._take(sequence, step)
            except EXPECTED as error:
                failures.append(f"{describe(step)}: {error}")
                is_enabled = is_enabled or isinstance(step, UpdateRegistration)
                has_rules = has_rules or isinstance(step, RemoveRules)
        return tuple(failures)

    def undo(self) -> tuple[str, ...]:
        """Lead back from everything done so far, newest first; returns a sentence for each step that could not be."""
        done, self._done = self._done, []
        return lead_back(done, self.system, self.plan.netns, self.report, lambda n: self.ledger.undone(self.tx, n))

    def _take(self, sequence: int, step: Step) -> None:
        self.ledger.intend(self.tx, sequence, step)
        _timed(step, self.system, self.plan.netns, self.report)
        self._done.append((sequence, step))
        self.ledger.done(self.tx, sequence)

    def _stop_if_interrupted(self) -> None:
        if number := self.interrupted():
            self._fail(Interrupted(number))

    def _fail(self, cause: Exception) -> None:
        leftovers = self.undo()
        if leftovers:
            raise RollbackError(cause, leftovers) from cause
        raise cause


def lead_back(
    done: Sequence[tuple[int, Step]],
    system: System,
    netns: Netns,
    report: Callable[[Outcome], None],
    undone: Callable[[int], None],
) -> tuple[str, ...]:
    """Undo steps, newest first; returns a sentence for each that could not be undone.

    Where a process does not come back, its registrations are not enabled again: without a listener they would block.
    """
    leftovers: list[str] = []
    is_deaf = False
    for sequence, step in reversed(done):
        back = inverse(step, netns)
        if isinstance(step, StopProcess) and back is None:
            leftovers.append(f"start {step.process.name}: the ledger does not know how it was started")
            is_deaf = True
        if back is None:
            continue
        if is_deaf and isinstance(back, UpdateRegistration) and back.after.status is Status.ENABLED:
            leftovers.append(f"{describe(back)}: not tried, as nobody would listen")
            continue
        try:
            _timed(back, system, netns, report, is_undo=True)
            undone(sequence)
        except EXPECTED as error:
            leftovers.append(f"{describe(back)}: {error}")
            is_deaf = is_deaf or isinstance(back, StartProcess)
    return tuple(leftovers)


def _timed(
    step: Step, system: System, netns: Netns, report: Callable[[Outcome], None], *, is_undo: bool = False
) -> None:
    """Take one step and tell how it ended. Telling may fail (a closed terminal); that is no reason to stop."""
    start = system.clock.monotonic()

    def tell(error: str) -> None:
        with contextlib.suppress(OSError):
            report(Outcome(step, system.clock.monotonic() - start, error, is_undo))

    try:
        has_acted = perform(step, system, netns, is_undo=is_undo)
    except EXPECTED as error:
        tell(str(error))
        raise
    if has_acted:
        tell("")


def perform(step: Step, system: System, netns: Netns, *, is_undo: bool = False) -> bool:
    """Take one step; False if there was nothing to do, and nothing to tell.

    On the way back a step may find its work done already, or never begun; both are fine then.
    """
    match step:
        case LoadModule(name):
            system.modules.load(name)
        case CreateRegistration(registration):
            _create(system, registration, is_undo=is_undo)
        case UpdateRegistration(_, after):
            _update(system, after, is_undo=is_undo)
        case DeleteRegistration(registration):
            _delete(system, registration, is_undo=is_undo)
        case KeepRegistrations(registrations):
            return _put_back(system, registrations)
        case StartProcess(launch):
            if not (is_undo and _running(system, netns, launch.profile, launch.spec.name)):
                system.processes.start(launch)
        case StopProcess(process, _):
            for seen in _running(system, netns, process.profile, process.name):
                system.processes.stop(seen)
        case WatchProcess(launch, process):
            system.processes.watch(launch, process)
        case DrainQueues(queues, within_s):
            _drain(system, netns, queues, within_s)
        case LoadRules(_, after):
            _load(system, netns, after)
        case FlushRules(before):
            system.rules[before.backend].flush(netns, before.profile)
        case RemoveRules(before):
            system.rules[before.backend].remove(netns, before.profile)
    return True


def _put_back(system: System, registrations: tuple[Registration, ...]) -> bool:
    live = {r.key: r for r in system.registry.dump()}
    changed = [r for r in registrations if live.get(r.key, r) != r]
    for registration in changed:
        system.registry.update(registration)
    return bool(changed)


def _load(system: System, netns: Netns, rules: Rules) -> None:
    if not rules.documents:
        raise OrchError(
            f"the earlier rules of profile {rules.profile} are not known any more and cannot be loaded again",
            hint="apply its profile again",
        )
    system.rules[rules.backend].load(netns, rules)


def _create(system: System, registration: Registration, *, is_undo: bool) -> None:
    if is_undo and any(r.key == registration.key for r in system.registry.dump()):
        return
    system.registry.create(registration)


def _update(system: System, registration: Registration, *, is_undo: bool) -> None:
    if is_undo and all(r.key != registration.key for r in system.registry.dump()):
        return
    system.registry.update(registration)


def _delete(system: System, registration: Registration, *, is_undo: bool) -> None:
    """Unregister, and look again: a delete that is refused for one entry answers 0 for another (or none at all)."""
    live = {r.key: r for r in system.registry.dump()}
    seen = live.get(registration.key)
    if seen is None:
        return
    if is_undo and replace(seen, status=Status.DISABLED) != replace(registration, status=Status.DISABLED):
        return
    system.registry.delete(registration.key)
    if any(r.key == registration.key for r in system.registry.dump()):
        raise KernelError("unregister helper", str(registration.key), errno.EBUSY)


def _running(system: System, netns: Netns, profile: str, name: str) -> list[ProcessSeen]:
    wanted = (netns.identity, profile, name)
    return [p for p in system.processes.running() if (p.netns, p.profile, p.name) == wanted]


def _drain(system: System, netns: Netns, queues: tuple[int, ...], within_s: float) -> None:
    """Wait for the last verdicts. A hanging process gives none: its packets are lost with it, and that is said."""
    clock = system.clock
    deadline = clock.monotonic() + within_s
    while waiting := [q.queue_num for q in system.host.queues(netns) if q.queue_num in queues and q.waiting]:
        if clock.monotonic() >= deadline:
            _log.warning(
                "packets still wait in queue %s after %g s: its process does not answer; they are dropped with it",
                ", ".join(map(str, waiting)),
                within_s,
            )
            return
        clock.sleep(_POLL_S)
