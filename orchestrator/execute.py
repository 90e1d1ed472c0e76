"""A plan -> its effects, in order, each recorded before it is taken, and undone in reverse when one fails."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.errors import (
    HalfDoneError,
    HelperProcessError,
    Interrupted,
    KernelError,
    NoHandoverError,
    OrchError,
    RollbackError,
)
from orchestrator.journal import Ledger
from orchestrator.model import HelperKey, Netns, Registration, Rules, Status
from orchestrator.observe import Observer
from orchestrator.ports import Launch, ProcessSeen, System
from orchestrator.release import idles_iptables, stays_for
from orchestrator.state import (
    CreateRegistration,
    DeleteRegistration,
    DrainQueues,
    FlushRules,
    KeepRegistrations,
    LoadModule,
    LoadRules,
    Owner,
    Plan,
    RemoveRules,
    ServeQueues,
    SetReconcile,
    StartProcess,
    Step,
    StopProcess,
    SucceedProcess,
    UpdateRegistration,
    WatchProcess,
    describe,
    inverse,
)

# What a step may raise: our own errors, the system's, and what a kernel says that nobody understands (DecodeError).
EXPECTED = (OrchError, OSError, ValueError)

# Steps that may have done something although they failed; the others do all or nothing.
_IN_PARTS = (StartProcess, StopProcess, SucceedProcess, ServeQueues, FlushRules, RemoveRules, DeleteRegistration)

# What says nothing of what the kernel did: its answer did not come.
_UNANSWERED = (errno.ENOBUFS, errno.EINTR)

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
    """One run of a plan. `report` is told of every step as it ends; `interrupted` returns a signal number or 0.

    `listened` are the registrations for which the plan makes a process of its own listen.
    """

    system: System
    ledger: Ledger
    plan: Plan
    tx: int
    report: Callable[[Outcome], None]
    interrupted: Callable[[], int] = lambda: 0
    listened: frozenset[HelperKey] = frozenset()
    _done: list[tuple[int, Step]] = field(default_factory=list)
    _is_noting: bool = True
    _resting: frozenset[HelperKey] = frozenset()
    _users: Mapping[HelperKey, tuple[Owner, ...]] | None = None

    def run(self) -> None:
        """Take every step; on the first failure or signal undo what was done and raise that first cause.

        Raises RollbackError, with what is left, if the way back fails as well.
        """
        for sequence, step in enumerate(self.plan.steps):
            self._stop_if_interrupted()
            try:
                self._take(sequence, step)
            except EXPECTED as error:
                if _may_have_acted(step, error):
                    self._done.append((sequence, step))
                else:
                    self._note_undone(sequence)
                self._fail(error)
        self._stop_if_interrupted()

    def run_all(self) -> tuple[str, ...]:
        """Take every step although some fail, as teardown and the way back of a trial do; returns one sentence for each
        that was not done.

        What would do harm after a failure is left out: a process stays while its registration could not be disabled,
        a registration while rules that name it could not be removed.
        """
        failures: list[str] = []
        hazards = _Hazards(self._may_idle_unseen())
        for sequence, step in enumerate(self.plan.steps):
            self._stop_if_interrupted()
            if reason := hazards.forbid(step):
                failures.append(f"{describe(step)}: not tried, as {reason}")
                hazards.note(step)
                continue
            try:
                self._take_or_restart(sequence, step)
            except EXPECTED as error:
                failures.append(f"{describe(step)}: {error}")
                hazards.note(step, error)
                if _may_have_acted(step, error):
                    self._done.append((sequence, step))
        return tuple(failures)

    def undo(self) -> tuple[str, ...]:
        """Lead back from everything done so far, newest first; returns a sentence for each step that could not be."""
        done, self._done = self._done, []
        return lead_back(done, self.system, self.ledger, self._owner, self.report, self._note_undone)

    @property
    def _owner(self) -> Owner:
        return Owner(self.plan.profile, self.plan.netns)

    def _may_idle_unseen(self) -> bool:
        is_by_iptables = self.ledger.attaches_by_iptables(self._owner)
        return is_by_iptables and idles_iptables(self.system.host.kernel_release())

    def _take(self, sequence: int, step: Step) -> None:
        self.ledger.intend(self.tx, sequence)
        if isinstance(step, UpdateRegistration) and step.after.key in self._resting:
            step = UpdateRegistration(_disabled(step.before), step.after)
        # What is put back is what others have: one's own process may not listen yet.
        is_own = isinstance(step, UpdateRegistration)
        is_deaf = functools.partial(self._is_deaf, listened=self.listened if is_own else frozenset())
        _take_heard(step, self.system, self.plan.netns, self.report, is_deaf)
        self._done.append((sequence, step))

    def _is_deaf(self, registration: Registration, listened: frozenset[HelperKey]) -> bool:
        if self._users is None:
            self._users = Observer(self.system, self.ledger).others(self._owner)
        here = (self._owner,) if registration.key in listened else ()
        owners = (*self._users.get(registration.key, ()), *here)
        return bool(Observer(self.system, self.ledger).deaf(registration, owners))

    def _take_or_restart(self, sequence: int, step: Step) -> None:
        try:
            self._take(sequence, step)
        except NoHandoverError as error:
            if not isinstance(step, SucceedProcess):
                raise
            self._resting |= _restart(self.system, self.plan.netns, step.after, error)
            self._done.append((sequence, step))

    def _note_undone(self, sequence: int) -> None:
        """A ledger that cannot be written (a full disk) hinders no undoing: what it keeps is undone once more.

        That needs all that was begun before it as well, so nothing is noted after the first failure.
        """
        if self._is_noting:
            try:
                self.ledger.undone(self.tx, sequence)
            except OrchError:
                self._is_noting = False

    def _stop_if_interrupted(self) -> None:
        if number := self.interrupted():
            self._fail(Interrupted(number))

    def _fail(self, cause: Exception) -> None:
        leftovers = self.undo()
        if leftovers:
            raise RollbackError(cause, leftovers) from cause
        raise cause


def _may_have_acted(step: Step, error: Exception) -> bool:
    """Whether a step that failed is to be undone like those that did not."""
    if isinstance(step, _IN_PARTS) or isinstance(error, HalfDoneError):
        return True
    return isinstance(error, KernelError) and error.errno in _UNANSWERED


@dataclass(slots=True)
class _Hazards:
    """What failed so far, and what would do harm after that.

    `may_idle`: where a helper is not let go of, iptables rules that nobody sees would be idle after another one.
    """

    may_idle: bool = False
    is_deaf: bool = False
    is_needed: bool = False
    has_rules: bool = False
    is_torn: bool = False
    is_held: bool = False
    still_there: set[str] = field(default_factory=set)

    def note(self, failed: Step, error: Exception | None = None) -> None:
        match failed:
            case StartProcess() | SucceedProcess() | ServeQueues():
                self.is_deaf = True
            case StopProcess(process):
                self.still_there.add(process.name)
            case UpdateRegistration(before, after):
                is_moved = before.queue_num != after.queue_num
                self.is_needed = self.is_needed or is_moved or after.status is Status.DISABLED
            case RemoveRules() | LoadRules():
                self.has_rules = True
            case CreateRegistration() | DeleteRegistration():
                self.is_torn = True
                is_busy = isinstance(error, KernelError) and error.errno == errno.EBUSY
                self.is_held = self.is_held or (self.may_idle and is_busy)

    def forbid(self, step: Step) -> str:
        """Why a step must not be taken any more; empty if it may.

        An enabled registration without a listener blocks connections. Rules that name one that is gone do nothing, and
        rules that name the wrong one hold it.
        """
        match step:
            case UpdateRegistration(_, after) if self.is_deaf and after.status is Status.ENABLED:
                return "nobody would listen"
            case StopProcess() | SucceedProcess() | ServeQueues() | DeleteRegistration() if self.is_needed:
                return "a registration could not be disabled, or still has the other queue"
            case KeepRegistrations(registrations) if self.is_needed and any(map(_is_enabled, registrations)):
                return "a registration still has the other queue"
            case StartProcess(launch) if launch.spec.name in self.still_there:
                return "the other one of that name did not end"
            case DeleteRegistration() if self.has_rules:
                return "rules could not be removed"
            case DeleteRegistration() if self.is_held:
                return "rules still refer to another one, and could be idle after it"
            case LoadRules() if self.is_torn:
                return "a registration is not as it was"
        return ""


def _is_enabled(registration: Registration) -> bool:
    return registration.status is Status.ENABLED


def lead_back(
    done: Sequence[tuple[int, Step]],
    system: System,
    ledger: Ledger,
    owner: Owner,
    report: Callable[[Outcome], None],
    undone: Callable[[int], None],
    *,
    unseen: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Undo steps, newest first; returns a sentence for each that could not be undone.

    `undone` is told of each step up to the first that could not be: from there all is to be undone once more, as the
    later ones may have found nothing that they could undo.

    A registration that was made stays, disabled and ours, where the kernel would make iptables rules idle after it.
    `unseen` is where there may be some that cannot be looked at. One that was enabled stays disabled where a process
    that listened for it has died meanwhile.
    """
    leftovers: list[str] = []
    netns = owner.netns
    observer = Observer(system, ledger)
    places = functools.cache(lambda: unseen or observer.in_the_way(owner))
    users = functools.cache(ledger.users)

    def is_deaf(registration: Registration) -> bool:
        return bool(observer.deaf(registration, users().get(registration.key, ())))

    hazards = _Hazards()
    for sequence, step in reversed(done):
        back = _way_back(step, netns)
        if isinstance(step, StopProcess) and back is None:
            leftovers.append(f"start {step.process.name}: the ledger does not know how it was started")
            hazards.is_deaf = True
        if isinstance(step, SucceedProcess) and back is None:
            leftovers.append(f"hand over {step.process.name} again: the ledger does not know how it was started")
        if back is None:
            continue
        if reason := hazards.forbid(back):
            leftovers.append(f"{describe(back)}: not tried, as {reason}")
            hazards.note(back)
            continue
        try:
            if isinstance(back, DeleteRegistration) and _is_made(back.registration, system) and places():
                ledger.claim([back.registration])
                _log.warning("%s", stays_for(back.registration.key, places()))
            else:
                _take_heard(back, system, netns, report, is_deaf, is_undo=True)
        except EXPECTED as error:
            leftovers.append(f"{describe(back)}: {error}")
            hazards.note(back, error)
        else:
            if not leftovers:
                undone(sequence)
    return tuple(leftovers)


def _is_made(registration: Registration, system: System) -> bool:
    """Whether it is there, and nobody else's."""
    quiet = _disabled(registration)
    return any(_disabled(seen) == quiet for seen in system.registry.dump())


def _way_back(step: Step, netns: Netns) -> Step | None:
    """The inverse; but rules that somebody had emptied are removed, as nobody knows what there was of them."""
    back = inverse(step, netns)
    if isinstance(back, LoadRules) and not (back.after.digest or back.after.documents):
        return RemoveRules(back.after)
    return back


def _take_heard(
    step: Step,
    system: System,
    netns: Netns,
    report: Callable[[Outcome], None],
    is_deaf: Callable[[Registration], bool],
    *,
    is_undo: bool = False,
) -> None:
    """Take one step, but enable nothing to which anybody is deaf: who dies meanwhile has its supervisor disable it."""
    step = _but_disabled(step, [r for r in _enabled_by(step) if is_deaf(r)])
    timed(step, system, netns, report, is_undo=is_undo)
    try:
        late = [r for r in _enabled_by(step) if is_deaf(r)]
        for registration in late:
            system.registry.update(_disabled(registration))
    except EXPECTED as error:
        number = getattr(error, "errno", 0) or 0
        raise HalfDoneError("look for listeners", describe(step), number, detail=str(error)) from error


def _enabled_by(step: Step) -> tuple[Registration, ...]:
    """Registrations that a step enables, or may enable."""
    match step:
        case UpdateRegistration(before, after) if _is_enabled(after) and not _is_enabled(before):
            return (after,)
        case KeepRegistrations(registrations):
            return tuple(filter(_is_enabled, registrations))
    return ()


def _but_disabled(step: Step, deaf: list[Registration]) -> Step:
    for registration in deaf:
        _log.warning("%s stays disabled: nobody listens on its queue", registration.key)
    match step:
        case UpdateRegistration(before, after) if deaf:
            return UpdateRegistration(before, _disabled(after))
        case KeepRegistrations(registrations) if deaf:
            return KeepRegistrations(tuple(_disabled(r) if r in deaf else r for r in registrations))
    return step


def _disabled(registration: Registration) -> Registration:
    return replace(registration, status=Status.DISABLED)


def timed(
    step: Step, system: System, netns: Netns, report: Callable[[Outcome], None], *, is_undo: bool = False
) -> None:
    """Take one step and tell how it ended. Telling may fail (a closed terminal); that is no reason to stop."""
    start = system.clock.monotonic()

    def tell(error: str) -> None:
        with contextlib.suppress(OSError, ValueError):
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
        case UpdateRegistration(before, after):
            _update(system, before, after, is_undo=is_undo)
        case DeleteRegistration(registration):
            _delete(system, registration, is_undo=is_undo)
        case KeepRegistrations(registrations):
            return _put_back(system, registrations, is_undo=is_undo)
        case StartProcess(launch):
            _start(system, netns, launch, is_undo=is_undo)
        case StopProcess(process, _):
            for seen in _running(system, netns, process.profile, process.name):
                if not (is_undo and seen.digest != process.digest):
                    system.processes.stop(seen)
        case SucceedProcess():
            return _succeed_again(system, netns, step) if is_undo else bool(system.processes.succeed(step.after))
        case ServeQueues(launch, _, after):
            if is_undo and not any(seen.pid for seen in _running(system, netns, launch.profile, launch.spec.name)):
                return False  # it has died meanwhile, and what is undone next starts another
            system.processes.serve(launch, after)
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
        case SetReconcile(profile, is_on):
            system.processes.set_reconcile(profile, netns, is_on=is_on)
    return True


def _put_back(system: System, registrations: tuple[Registration, ...], *, is_undo: bool) -> bool:
    """True if something had to be put back; on the way back one that was there before may be back already."""
    live = {r.key: r for r in system.registry.dump()}
    changed = [r for r in registrations if live.get(r.key, r) != r and not (is_undo and not live[r.key].can_become(r))]
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
    seen = next((r for r in system.registry.dump() if r.key == registration.key), None) if is_undo else None
    if seen is None:
        system.registry.create(registration)
    elif not seen.can_become(registration):
        raise KernelError("register helper", str(registration.key), errno.EEXIST)


def _update(system: System, before: Registration, after: Registration, *, is_undo: bool) -> None:
    """Who changes the values of an enabled one leaves its status alone: a supervisor may have disabled it meanwhile."""
    live = {r.key: r for r in system.registry.dump()} if is_undo else {}
    if is_undo and not (after.key in live and live[after.key].can_become(after)):
        return  # it is gone, or the one that was there before is back already
    system.registry.update(after, keeps_status=_is_enabled(before) and _is_enabled(after))


def _delete(system: System, registration: Registration, *, is_undo: bool) -> None:
    """Unregister, and look again: a delete that is refused for one entry answers 0 for another (or none at all)."""
    live = {r.key: r for r in system.registry.dump()}
    seen = live.get(registration.key)
    if seen is None:
        return
    if is_undo and not _is_made(registration, system):
        return
    system.registry.delete(registration.key)
    if any(r.key == registration.key for r in system.registry.dump()):
        raise KernelError("unregister helper", str(registration.key), errno.EBUSY)


def _start(system: System, netns: Netns, launch: Launch, *, is_undo: bool) -> None:
    """On the way back the process may run still; one that waits for its restart does not."""
    seen = _running(system, netns, launch.profile, launch.spec.name) if is_undo else []
    if any(process.pid and process.digest == launch.digest for process in seen):
        return
    for process in seen:
        if process.pid:
            raise HelperProcessError(f"{process.name} ({process.place}) is in the way")
        system.processes.stop(process)
    system.processes.start(launch)


def _running(system: System, netns: Netns, profile: str, name: str) -> list[ProcessSeen]:
    wanted = (netns.identity, profile, name)
    return [p for p in system.processes.running() if (p.netns, p.profile, p.name) == wanted]


def _succeed_again(system: System, netns: Netns, step: SucceedProcess) -> bool:
    """On the way back: hand over to one that serves no queue but its own, and that is started if none runs.

    Nothing is to do where nobody took over after all: after an upgrade, what can be started is not what ran before. A
    process may have lost its supervisor: to hand over starts another.
    """
    before, after = step.before, step.after
    system.processes.settle(after)
    seen = [p for p in _running(system, netns, after.profile, after.spec.name) if p.pid]
    is_back = any(p.digest == step.process.digest for p in seen)
    if not is_back and not any(p.hands_over or p.digest != after.digest for p in seen):
        _start(system, netns, after, is_undo=True)
        return True
    if not is_back:
        try:
            system.processes.succeed(after)
        except NoHandoverError as error:
            _restart(system, netns, after, error)
    bound = {row.queue_num for row in system.host.queues(netns)}
    surplus = tuple(sorted(bound & set(before.spec.queues).difference(after.spec.queues))) if before else ()
    if surplus:
        perform(DrainQueues(surplus), system, netns)
        system.processes.serve(after, after.spec.queues)
    return bool(surplus) or not is_back


def _restart(system: System, netns: Netns, launch: Launch, why: NoHandoverError) -> frozenset[HelperKey]:
    """What hands over nothing is restarted at once where nobody makes another plan.

    Returns the registrations that stay disabled, as they have a queue that the process does not serve: a step is to
    come that updates them.
    """
    _log.warning("%s: it is restarted, and nothing is inspected meanwhile", why)
    filling = [r for r in system.registry.dump() if r.key in launch.spec.keys and _is_enabled(r)]
    for registration in filling:
        system.registry.update(_disabled(registration))
    if filling:
        perform(DrainQueues(tuple(sorted({r.queue_num for r in filling}))), system, netns)
    for process in _running(system, netns, launch.profile, launch.spec.name):
        system.processes.stop(process)
    system.processes.start(launch)
    for registration in filling:
        if registration.queue_num in launch.spec.queues:
            system.registry.update(registration)
    return frozenset(r.key for r in filling if r.queue_num not in launch.spec.queues)


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
