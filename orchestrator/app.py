"""The use cases behind the commands, and the only place that wires adapters to ports."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import NoHandoverError, OrchError, RefusedError, RollbackError, StalePlanError, VerifyError
from orchestrator.execute import EXPECTED, Execution
from orchestrator.journal import Ledger, note_child
from orchestrator.launches import launches
from orchestrator.model import Backend, Desired, Document, HelperKey, Listing, Netns, Status, Target
from orchestrator.observe import Observer, or_nothing
from orchestrator.plan import plan_apply, plan_teardown, relaunchable
from orchestrator.plan_around import parts, plan_around
from orchestrator.plan_registrations import registrations_of
from orchestrator.ports import Launch, ProcessSeen, System
from orchestrator.reports import (
    Difference,
    PlanRefusedError,
    Report,
    Talk,
    TeardownReport,
    Trial,
    worth_trying,
)
from orchestrator.settle import Settling
from orchestrator.state import (
    Applied,
    CreateRegistration,
    DeleteRegistration,
    DrainQueues,
    HelperSummary,
    LoadRules,
    Observed,
    Owner,
    Pending,
    Plan,
    Unsettled,
    Wanted,
)
from orchestrator.status import HostStatus, ProfileStatus, Waiting, lost_profile, profile_status

if TYPE_CHECKING:
    from orchestrator.supervise.launcher import LocalProcesses


def kernel_system(state_dir: Path) -> System:
    """The adapters of the running kernel."""
    from orchestrator.kernel.cthelper import KernelRegistry
    from orchestrator.kernel.host import KernelHost
    from orchestrator.kernel.iptables import IptablesRules
    from orchestrator.kernel.modules import KernelModules
    from orchestrator.kernel.nft import NftRules

    host = KernelHost()
    processes = local_processes(state_dir)
    note = functools.partial(note_child, state_dir)
    return System(
        registry=KernelRegistry(),
        rules={
            Backend.NFTABLES: NftRules(),
            Backend.IPTABLES_LEGACY: IptablesRules(Backend.IPTABLES_LEGACY, note),
            Backend.IPTABLES_NFT: IptablesRules(Backend.IPTABLES_NFT, note),
        },
        host=host,
        processes=processes,
        modules=KernelModules(),
        clock=processes.clock,
    )


def local_processes(state_dir: Path) -> LocalProcesses:
    """The adapter for processes, as all commands on this state directory use it."""
    from orchestrator.kernel import netns
    from orchestrator.kernel.clock import MonotonicClock
    from orchestrator.kernel.cthelper_codec import encode_status
    from orchestrator.supervise.launcher import LocalProcesses

    return LocalProcesses(
        state_dir=state_dir,
        clock=MonotonicClock(),
        encode_disable=lambda key: encode_status(key, Status.DISABLED),
        encode_enable=lambda key: encode_status(key, Status.ENABLED),
        entered=netns.entered,
    )


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class App:
    """The use cases. `state_dir` holds the ledger; `netns` overrides the namespace that a profile names.

    `guard` starts somebody who undoes what is not confirmed; it raises OrchError or OSError.
    """

    system: System
    state_dir: Path
    boot_id: str
    talk: Talk
    netns: str | None = None
    wait_s: float = 10.0
    guard: Callable[[], None] = lambda: None

    # -- diff and apply -----------------------------------------------------------------------------------------------

    def diff(self, desired: Desired, target: Target) -> Difference:
        """What apply would do now; reads only."""
        ledger = self._open(create=False)
        for unsettled in ledger.left_alone():
            self.talk.warn(f"{unsettled.sentence}: the next apply or teardown {unsettled.remedy}")
        for pending in ledger.pending():
            self.talk.warn(f"{pending.owner} waits for its confirmation: until then nothing is applied")
        owner = self._owner(desired)
        target = self._concrete(target)
        observed, plan = self.plan(ledger, owner, target)
        listing = _own_listing(observed, target)
        applied = observed.applied
        shown = applied.target.rules if applied and listing and applied.target.rules.digest == listing.digest else None
        drifted = listing is not None and observed.baseline is not None and listing.text != observed.baseline.text
        return Difference(
            owner=owner,
            source=desired.source,
            plan=plan,
            loaded_documents=_text(shown.documents if shown else ()),
            wanted_documents=_text(target.rules.documents),
            baseline_listing=observed.baseline.text if drifted and observed.baseline else "",
            live_listing=listing.text if drifted and listing else "",
        )

    def apply(self, desired: Desired, target: Target, *, ask: bool, trial: Trial | None = None) -> Report:
        """Make the target true, or leave everything as it was. Raises PlanRefusedError before the first effect."""
        target = self._concrete(target)
        owner = self._owner(desired)
        with self.settled(f"apply {desired.source}", renewed=owner) as ledger:
            self.refuse_while_pending(ledger, owner)
            helpers = tuple(HelperSummary(h.name, h.engine, h.keys) for h in desired.helpers)
            wanted = Wanted(owner, desired.source, target, helpers)
            ledger.forget_mending(wanted.owner)
            return self.establish(ledger, wanted, ask=ask, trial=trial)

    def establish(
        self,
        ledger: Ledger,
        wanted: Wanted,
        *,
        ask: bool,
        trial: Trial | None = None,
        is_rollback: bool = False,
        spared: frozenset[str] = frozenset(),
    ) -> Report:
        """Plan, ask, carry out, verify; under the lock, with nothing unsettled. A rollback ends a trial.

        `spared` are subjects of changes, of what is applied already, that are left as they are (plan_around). A process
        that turns out to hand over nothing is restarted: that is another plan, which a note tells of.
        """
        self._recognise(ledger, wanted.owner.netns)
        observed, plan = self.plan(ledger, wanted.owner, wanted.target, spared)
        if plan.refusals:
            raise PlanRefusedError(plan.refusals)
        trial = worth_trying(trial, wanted, plan, observed)
        if not plan.is_empty and (ask or plan.cut) and not self.talk.confirm(plan, _what_is_cut(plan)):
            return Report(plan, declined=True)
        if ask or plan.cut:
            again = self.plan(ledger, wanted.owner, wanted.target, spared)[1]
            if (again.steps, again.refusals) != (plan.steps, plan.refusals):
                raise StalePlanError("plan is stale: the system changed meanwhile", hint="run it again")
        if plan.is_empty:
            if not spared:
                self._remember(ledger, wanted, observed, is_rollback=is_rollback)
            return Report(plan, notes=plan.kept)
        plan = relaunchable(plan, lambda p: _launch_of(p, observed))
        now_s = self.system.clock.boottime()
        pending = trial.begin(wanted, observed.applied, now_s=now_s) if trial else None
        tx = ledger.begin("rollback" if is_rollback else "apply", wanted.owner, plan.steps, pending=pending)
        if trial is not None:
            self._guard(ledger, tx, trial)
        execution = Execution(self.system, ledger, plan, tx, self.talk.step, self.talk.interrupted)
        try:
            self._run(execution, ledger, tx)
        except NoHandoverError as error:  # known to who plans from now on, so this is not repeated
            report = self.establish(ledger, wanted, ask=ask, trial=trial, is_rollback=is_rollback, spared=spared)
            note = f"{error}: restarted instead, and nothing is inspected meanwhile"
            return replace(report, notes=(str(error) if report.declined else note, *report.notes))
        self._verify(execution, ledger, tx, wanted, is_rollback=is_rollback, spared=spared)
        netns = wanted.owner.netns
        notes = (*plan.kept, *self._filter_notes(netns), *self._queue_notes(netns, wanted.target))
        return Report(plan, notes=notes, pending=pending)

    def _guard(self, ledger: Ledger, tx: int, trial: Trial) -> None:
        """Nothing is done before somebody is there who undoes it."""
        try:
            trial.guard()
        except EXPECTED:
            _settle_undone(ledger, tx)
            raise

    def plan(
        self, ledger: Ledger, owner: Owner, target: Target, spared: frozenset[str] = frozenset()
    ) -> tuple[Observed, Plan]:
        """What is there, and what would make the target true but for what is spared; reads only."""
        observer = Observer(self.system, ledger)
        wanted = launches(owner.profile, owner.netns, target.processes, target.documents)
        observed = observer.observe(owner, target)
        plan = plan_apply(target, wanted, observed, owner)
        if plan.adopted or any(isinstance(step, DeleteRegistration) for step in plan.steps):
            observed = observer.observe(owner, target, is_thorough=True)
            plan = plan_apply(target, wanted, observed, owner)
        return observed, plan_around(target, wanted, observed, owner, spared=spared) if spared else plan

    def parts(self, ledger: Ledger, owner: Owner, target: Target, spared: frozenset[str]) -> tuple[frozenset[str], ...]:
        """The subjects of a plan in parts that can be made right one after the other; reads only."""
        wanted = launches(owner.profile, owner.netns, target.processes, target.documents)
        return parts(target, wanted, self.plan(ledger, owner, target)[0], owner, spared=spared)

    def _run(self, execution: Execution, ledger: Ledger, tx: int) -> None:
        try:
            execution.run()
        except RollbackError:
            raise  # the journal keeps what is half-done: the next command takes it up
        except OrchError:
            _settle_undone(ledger, tx)
            raise
        except (OSError, ValueError) as error:
            _settle_undone(ledger, tx)
            raise OrchError(str(error)) from error

    def _verify(
        self,
        execution: Execution,
        ledger: Ledger,
        tx: int,
        wanted: Wanted,
        *,
        is_rollback: bool,
        spared: frozenset[str],
    ) -> None:
        """Only an empty plan is success; what differs now, or cannot be looked at or written down, is undone."""
        try:
            is_known = bool(spared) and not any(isinstance(step, LoadRules) for step in execution.plan.steps)
            applied, problems = self._look_again(ledger, wanted, spared, is_known=is_known)
        except EXPECTED as error:
            applied, problems = None, (str(error),)
        failure: OrchError = VerifyError("the system is not as declared after all steps: " + "; ".join(problems))
        if applied is not None and not problems:
            try:
                if is_known:
                    ledger.settle(tx)
                    return
                half_done = ledger.unsettled(wanted.owner)
                ledger.settle_applied(
                    tx, applied, live=self._live_keys(), is_rollback=is_rollback, instead_of=half_done
                )
                return
            except OrchError as error:
                failure = error
        leftovers = execution.undo()
        if leftovers:
            raise RollbackError(failure, leftovers)
        _settle_undone(ledger, tx)
        raise failure

    def _look_again(
        self, ledger: Ledger, wanted: Wanted, spared: frozenset[str], *, is_known: bool
    ) -> tuple[Applied, tuple[str, ...]]:
        """What the ledger will say, and what is not as it should be.

        It says that already where rules were spared: how they list now is not how they should.
        """
        owner, target = wanted.owner, wanted.target
        known = ledger.find(owner) if is_known else None
        applied = known or self._applied(wanted)
        observed = Observer(self.system, ledger).observe(owner, target, applied=None if known else applied)
        started = launches(owner.profile, owner.netns, target.processes, target.documents)
        again = plan_around(target, started, observed, owner, spared=spared)
        attached = {a.key for a in target.attachments}
        missing = sorted(attached - applied.baseline.helpers)
        problems = [f"{c.subject}: {c.detail} {c.reason}".strip(": ") for c in again.changes]
        problems += [f"rules do not attach {key}" for key in missing]
        return applied, tuple(problems)

    def _applied(self, wanted: Wanted) -> Applied:
        """What the ledger is to remember, with how the rules list now."""
        backend = self.system.rules[wanted.target.rules.backend]
        listing = backend.listing(wanted.owner.netns, wanted.owner.profile)
        return Applied(
            owner=wanted.owner,
            source=wanted.source,
            applied_at=time.time(),
            target=wanted.target,
            baseline=listing or Listing(wanted.target.rules.backend, "", "", frozenset()),
            tool=backend.version(),
            helpers=wanted.helpers,
        )

    def _remember(self, ledger: Ledger, wanted: Wanted, observed: Observed, *, is_rollback: bool) -> None:
        """Write down what is there already but the ledger does not know: it was lost, or another version wrote it."""
        applied = observed.applied
        same = applied is not None and applied.target == wanted.target and applied.source == wanted.source
        listing, half_done = _own_listing(observed, wanted.target), ledger.unsettled(wanted.owner)
        if same and applied and listing and applied.baseline == listing and not (is_rollback or half_done):
            return
        ledger.settle_applied(
            None, self._applied(wanted), live=self._live_keys(), is_rollback=is_rollback, instead_of=half_done
        )

    def _filter_notes(self, netns: Netns) -> tuple[str, ...]:
        try:
            missing = self.system.host.unrelated_filters(netns)
        except EXPECTED as error:
            return (f"the filter rules could not be looked at: {error}",)
        return tuple(f"{chain} drops, and has no rule that accepts what helpers expect" for chain in missing)

    def _queue_notes(self, netns: Netns, target: Target) -> tuple[str, ...]:
        if not target.registrations:
            return ()
        try:
            foreign = self.system.host.foreign_queues(netns)
        except EXPECTED as error:
            return (f"the rules of others could not be looked at: {error}",)
        return tuple(
            f"{chain} queues packets too: helped connections that it queues lose source NAT" for chain in foreign
        )

    # -- teardown -----------------------------------------------------------------------------------------------------

    def teardown(
        self, wanted: str, *, every_netns: bool, desired: Desired | None = None, target: Target | None = None
    ) -> TeardownReport:
        """Take away what orch owns: one profile by name, all of this namespace (empty name), or of every namespace.

        `desired` and `target` are what the profile's file says, for its namespace and for when the ledger is lost.
        """
        here = None if every_netns else self._here(desired)

        def is_asked_for(owner: Owner) -> bool:
            return here in (None, owner.netns.identity) and wanted in ("", owner.profile)

        with self.settled(f"teardown {wanted}".strip(), is_forgiven=is_asked_for) as ledger:
            half_done = (unsettled.owner for unsettled in ledger.unsettled())
            owners = (*half_done, *ledger.owners(), *Observer(self.system, ledger).strays())
            everything = {(o.profile, o.netns.identity): o for o in owners}
            if desired is not None and not every_netns:
                owner = self._owner(desired)
                everything.setdefault((owner.profile, owner.netns.identity), owner)
            mine = [owner for owner in everything.values() if is_asked_for(owner)]
            others = tuple(o for o in everything.values() if o not in mine)
            if any(Observer(self.system, ledger).is_there(owner.netns) for owner in mine):
                self.refuse_while_pending(ledger)
            mine = [self._reachable(ledger, owner) for owner in mine]
            # Every question comes before the first effect; each plan is made when those before it are carried out,
            # as two profiles may share what the last of them takes away.
            plans = [self._plan_removal(ledger, owner, target)[1] for owner in mine]
            if not all(not plan.cut or self.talk.confirm(plan, _what_is_cut(plan)) for plan in plans):
                return TeardownReport(tuple(Report(plan, declined=True) for plan in plans), others)
            return TeardownReport(tuple(self._teardown_one(ledger, owner, target) for owner in mine), others)

    def _here(self, desired: Desired | None) -> str:
        name = (desired.netns if desired else "") if self.netns is None else self.netns
        return self.system.host.find_netns(name).identity

    def _reachable(self, ledger: Ledger, owner: Owner) -> Owner:
        """A namespace whose name was deleted lives on while orch, or a process of ours, runs in it: go in there."""
        if Observer(self.system, ledger).is_there(owner.netns):
            return owner
        path = owner.netns.path
        inside = [p.pid for p in self.system.processes.running() if p.pid and p.netns == owner.netns.identity]
        if (here := self.system.host.find_netns("")).identity == owner.netns.identity:
            path = here.path
        elif inside:
            path = f"/proc/{inside[0]}/ns/net"
        return replace(owner, netns=replace(owner.netns, path=path))

    def _plan_removal(self, ledger: Ledger, owner: Owner, target: Target | None) -> tuple[Observed, Plan]:
        observed = Observer(self.system, ledger).observe(owner, None, is_thorough=True)
        half_done = [r for unsettled in ledger.unsettled(owner) for r in unsettled.registrations]
        mine = registrations_of(observed, target if target and target.profile == owner.profile else None, half_done)
        return observed, plan_teardown(observed, owner, mine)

    def _teardown_one(self, ledger: Ledger, owner: Owner, target: Target | None = None) -> Report:
        observed, plan = self._plan_removal(ledger, owner, target)
        for sentence in self._drop_warnings(plan, owner):
            self.talk.warn(sentence)
        plan = relaunchable(plan, lambda p: _launch_of(p, observed))
        half_done = ledger.unsettled(owner)
        tx = ledger.begin("teardown", owner, plan.steps, instead_of=half_done)
        # Undone, it would be half-done as before, and nobody would know: so what was begun is finished.
        interrupted = (lambda: 0) if half_done else self.talk.interrupted
        execution = Execution(self.system, ledger, plan, tx, self.talk.step, interrupted)
        try:
            leftovers = execution.run_all()
        except RollbackError:
            raise
        except OrchError:
            _settle_undone(ledger, tx)
            raise
        # Before the ledger forgets the profile: what a command that is killed here leaves is taken up by the next.
        leftovers = leftovers or self._clean_up(owner)
        if leftovers:
            if observed.applied is not None:
                ledger.settle(tx)  # the ledger knows the profile: status shows what is left, and teardown tries again
            return Report(plan, leftovers=leftovers, notes=plan.kept)
        ledger.settle_removed(tx, owner, live=self._live_keys())
        return Report(plan, notes=plan.kept, is_forgotten=plan.is_empty and observed.applied is not None)

    def _clean_up(self, owner: Owner) -> tuple[str, ...]:
        """End the supervisor, and take its files away; a sentence if that fails."""
        try:
            self.system.processes.cleanup(owner.profile, owner.netns)
        except EXPECTED as error:
            return (f"clean up after {owner}: {error}",)
        return ()

    def _drop_warnings(self, plan: Plan, owner: Owner) -> tuple[str, ...]:
        """Before 7.3, unregistering a helper makes the kernel drop every packet that waits in any queue of the host."""
        if not any(isinstance(step, DeleteRegistration) for step in plan.steps):
            return ()
        release = self.system.host.kernel_release()
        if _version(release) >= (7, 3):
            return ()
        ours = {step.registration.queue_num for step in plan.steps if isinstance(step, DeleteRegistration)}
        ours |= {number for step in plan.steps if isinstance(step, DrainQueues) for number in step.queues}
        foreign = [
            f"queue {row.queue_num} of {self.system.host.process_name(row.port_id)} in netns {netns}"
            for netns in self.system.host.known_netns()
            for row in or_nothing(self.system.host.queues, netns)
            if not (netns.identity == owner.netns.identity and row.queue_num in ours)
        ]
        if not foreign:
            return ()
        return (f"kernel {release} drops the packets that wait in other queues of the host now: {'; '.join(foreign)}",)

    # -- what has to be confirmed -------------------------------------------------------------------------------------

    def roll_back(self, ledger: Ledger, pending: Pending) -> Report:
        """Make true again what was before an apply that nobody confirmed; nobody is asked, and no signal stops it.

        Under the lock, with nothing unsettled. Where the name of the namespace is gone nothing is to return there.
        """
        willing = replace(self, talk=replace(self.talk, confirm=lambda _plan, _reason: True, interrupted=lambda: 0))
        netns = pending.owner.netns
        is_gone = netns.path != "" and not Observer(self.system, ledger).is_there(netns)
        if pending.prior is None or is_gone:
            report = willing._teardown_one(ledger, self._reachable(ledger, pending.owner))
        else:
            report = willing._return(ledger, pending.prior.wanted)
        if report.leftovers:
            ledger.reject(pending)
        return report

    def _return(self, ledger: Ledger, wanted: Wanted) -> Report:
        """Take every step back, although some fail: what is not confirmed may have locked somebody out.

        The ledger goes on to say what was applied on trial, and the next way back is planned from what is there then.
        """
        self._recognise(ledger, wanted.owner.netns)
        observed, plan = self.plan(ledger, wanted.owner, wanted.target)
        if plan.refusals:
            raise PlanRefusedError(plan.refusals)
        if plan.is_empty:
            self._remember(ledger, wanted, observed, is_rollback=True)
            return Report(plan, notes=plan.kept)
        plan = relaunchable(plan, lambda p: _launch_of(p, observed))
        tx = ledger.begin("rollback", wanted.owner, plan.steps)
        leftovers = Execution(self.system, ledger, plan, tx, self.talk.step).run_all()
        if not leftovers:
            leftovers = self._settle_returned(ledger, tx, wanted)
        if leftovers:
            live = self._live_keys()
            made = (step.registration for step in plan.steps if isinstance(step, CreateRegistration))
            ledger.claim(registration for registration in made if registration.key in live)
            ledger.settle(tx)
        return Report(plan, leftovers=leftovers, notes=plan.kept)

    def _settle_returned(self, ledger: Ledger, tx: int, wanted: Wanted) -> tuple[str, ...]:
        """What differs from what was applied before; if nothing does, that is written down."""
        try:
            applied, problems = self._look_again(ledger, wanted, frozenset(), is_known=False)
        except EXPECTED as error:
            return (str(error),)
        if not problems:
            half_done = ledger.unsettled(wanted.owner)
            ledger.settle_applied(tx, applied, live=self._live_keys(), is_rollback=True, instead_of=half_done)
        return problems

    def _roll_back_overdue(self, ledger: Ledger, is_forgiven: Callable[[Owner], bool]) -> None:
        """Do what a watchdog should have done; what fails is tried again by the next command."""
        for pending in ledger.pending():
            if pending.left_s(self.system.clock.boottime()) > 0 or is_forgiven(pending.owner):
                continue
            why = "could not be undone as a whole" if pending.is_rejected else "was not confirmed in time"
            self.talk.warn(f"the apply of {pending.owner} {why}: undoing it")
            try:
                left = self.roll_back(ledger, pending).leftovers
            except EXPECTED as error:
                left = (str(error),)
            for sentence in left:
                self.talk.warn(f"it could not be undone: {sentence}")

    def refuse_while_pending(self, ledger: Ledger, renewed: Owner | None = None) -> None:
        """What is done meanwhile might stand in the way back.

        What should have been undone by now, and cannot be, is in nobody's way but in that of its own profile.
        """
        for pending in ledger.waiting():
            name = pending.owner.profile
            if pending.left_s(self.system.clock.boottime()) > 0:
                raise RefusedError(
                    f"{pending.owner} waits for its confirmation", hint=f"orch confirm {name}, or orch rollback {name}"
                )
            if renewed and (renewed.profile, renewed.netns.identity) == (name, pending.owner.netns.identity):
                raise RefusedError(
                    f"{pending.owner} was not confirmed, and could not be undone",
                    hint=f"orch teardown {name} takes it away, orch confirm {name} keeps what there is",
                )

    def _guard_what_waits(self, ledger: Ledger) -> None:
        """Somebody may have killed who would undo it."""
        try:
            if ledger.pending() and not ledger.is_watched():
                self.guard()
        except EXPECTED as error:
            self.talk.warn(f"nobody is there who would undo what is not confirmed: {error}")

    # -- status -------------------------------------------------------------------------------------------------------

    def applied(self, wanted: str = "") -> tuple[Applied, ...]:
        """What the ledger remembers of every namespace (or one, if it was named) and every profile (or one)."""
        with self.reading() as ledger:
            return tuple(applied for applied in ledger.applied() if self.is_asked_for(applied.owner, wanted))

    def status(self, wanted: str = "") -> HostStatus:
        """Every namespace (or one, if it was named), every profile (or one), and what is not as it was applied."""
        ledger = self._open(create=False)

        def is_wanted(owner: Owner) -> bool:
            return self.is_asked_for(owner, wanted)

        # The table of connections is long, and several profiles may share it.
        connections = functools.cache(self._connections)
        trials = self._trials(ledger)
        return HostStatus(
            profiles=tuple(
                replace(
                    self._profile_status(ledger, applied, connections),
                    trial=trials.get((applied.owner.profile, applied.owner.netns.identity)),
                )
                for applied in ledger.applied()
                if is_wanted(applied.owner)
            ),
            unknown=tuple(filter(is_wanted, Observer(self.system, ledger).strays())),
            unsettled=ledger.left_alone(),
            working=ledger.is_locked(),
        )

    def is_asked_for(self, owner: Owner, wanted: str) -> bool:
        only = None if self.netns is None else self.system.host.find_netns(self.netns).identity
        return wanted in ("", owner.profile) and only in (None, owner.netns.identity)

    def _profile_status(
        self, ledger: Ledger, applied: Applied, connections: Callable[[Netns], Mapping[str, int] | None]
    ) -> ProfileStatus:
        owner = applied.owner
        try:
            if not Observer(self.system, ledger).is_there(owner.netns):
                raise OrchError("it is gone; orch teardown --all takes away what is left of it")
            observed, plan = self.plan(ledger, owner, applied.target)
        except OrchError as error:
            return lost_profile(applied, str(error))
        seen = profile_status(applied, observed, plan, self.system, connections(owner.netns))
        now_s, drifted = self.system.clock.monotonic(), {change.subject for change in plan.changes}
        return replace(seen, mending=ledger.mending(owner).trouble(now_s, drifted))

    def _trials(self, ledger: Ledger) -> Mapping[tuple[str, str], Waiting]:
        now_s, is_watched = self.system.clock.boottime(), ledger.is_watched()
        return {
            (p.owner.profile, p.owner.netns.identity): Waiting(p.left_s(now_s), is_watched) for p in ledger.pending()
        }

    def _connections(self, netns: Netns) -> Mapping[str, int] | None:
        """Live connections by helper name; None where the kernel did not list them."""
        try:
            return self.system.host.connections(netns)
        except OrchError:
            return None

    # -- shared -------------------------------------------------------------------------------------------------------

    def reading(self) -> AbstractContextManager[Ledger]:
        """The ledger, for those that only look."""
        return contextlib.closing(self._open(create=False))

    @contextlib.contextmanager
    def settled(
        self, command: str, *, is_forgiven: Callable[[Owner], bool] = lambda _: False, renewed: Owner | None = None
    ) -> Iterator[Ledger]:
        """The ledger, locked for `command`, with nothing unfinished in it: how every command that writes begins.

        What a killed command left is undone or finished first; raises RollbackError if half an apply cannot be undone
        now, but for those owners who are forgiven, as they are torn down anyway, and for the one who is applied anew.
        """
        with contextlib.closing(self._open(create=True)) as ledger, self._locked(ledger, command):
            try:
                stuck = self._settle(ledger, is_forgiven, renewed)
                self._roll_back_overdue(ledger, is_forgiven)
                self._forget_history(ledger)
                if stuck and any(not unsettled.is_teardown for unsettled in ledger.unsettled()):
                    raise stuck
                yield ledger
            finally:
                self._guard_what_waits(ledger)

    def _open(self, *, create: bool) -> Ledger:
        return Ledger.open(self.state_dir, boot_id=self.boot_id, create=create)

    def _live_keys(self) -> tuple[HelperKey, ...]:
        return tuple(r.key for r in self.system.registry.dump())

    def _forget_replaced(self, ledger: Ledger, places: Iterable[Netns]) -> None:
        """The kernel gives the inode of a deleted namespace to another one: that one has nothing of ours."""
        for netns in filter(Observer(self.system, ledger).is_another, places):
            for owner in ledger.owners():
                if owner.netns.identity != netns.identity:
                    continue
                for sentence in self._clean_up(owner):
                    self.talk.warn(sentence)
                ledger.settle_removed(None, owner, live=self._live_keys())
                self.talk.warn(f"netns {owner.netns} is gone, and profile {owner.profile} with it")

    def _forget_history(self, ledger: Ledger) -> None:
        """Where a namespace is gone nothing can be applied again."""
        applied = {(owner.profile, owner.netns.identity) for owner in ledger.owners()}
        observer = Observer(self.system, ledger)
        for owner in ledger.remembered():
            if (owner.profile, owner.netns.identity) not in applied and not observer.is_there(owner.netns):
                ledger.forget_history(owner)

    def _recognise(self, ledger: Ledger, netns: Netns) -> None:
        self._forget_replaced(ledger, (netns,))
        ledger.recognise(netns, self.system.host.netns_cookie(netns))

    def _locked(self, ledger: Ledger, command: str) -> AbstractContextManager[None]:
        clock, interrupted = self.system.clock, self.talk.interrupted
        return ledger.locked(command, wait_s=self.wait_s, clock=clock, interrupted=interrupted, say=self.talk.warn)

    def _owner(self, desired: Desired) -> Owner:
        name = desired.netns if self.netns is None else self.netns
        return Owner(desired.profile, self.system.host.find_netns(name))

    def _concrete(self, target: Target) -> Target:
        """Plain `iptables` is whatever the host's alternatives make of it: decided here, once."""
        if target.rules.backend is not Backend.IPTABLES:
            return target
        return replace(target, rules=replace(target.rules, backend=self.system.host.iptables_variant()))

    def _settle(
        self, ledger: Ledger, is_forgiven: Callable[[Owner], bool], renewed: Owner | None
    ) -> RollbackError | None:
        """Take up what killed commands left, and forget profiles of namespaces whose identity is another's now."""

        def reach(owner: Owner) -> Netns | None:
            netns = self._reachable(ledger, owner).netns
            return netns if Observer(self.system, ledger).is_there(netns) else None

        def finish(unsettled: Unsettled) -> tuple[str, ...]:
            return self._teardown_one(ledger, self._reachable(ledger, unsettled.owner)).leftovers

        stuck = Settling(self.system, ledger, self.talk, reach, finish, is_forgiven, renewed).run()
        self._forget_replaced(ledger, self.system.host.known_netns())
        return stuck


def _settle_undone(ledger: Ledger, tx: int) -> None:
    """Nothing is left of a transaction. If that cannot be written (a full disk), the next command undoes it again."""
    with contextlib.suppress(OrchError):
        ledger.settle(tx)


def _launch_of(process: ProcessSeen, observed: Observed) -> Launch | None:
    """How a running process was started, from the ledger; with another digest where an earlier orch started it."""
    if observed.applied is None:
        return None
    known = launches(
        process.profile, observed.netns, observed.applied.target.processes, observed.applied.target.documents
    )
    exactly = next((launch for launch in known if launch.digest == process.digest), None)
    return exactly or next((launch for launch in known if launch.spec.name == process.name), None)


def _own_listing(observed: Observed, target: Target) -> Listing | None:
    return next((seen for seen in observed.listings if seen.backend is target.rules.backend), None)


def _text(documents: tuple[Document, ...]) -> str:
    return "\n".join(document.text for document in documents)


def _what_is_cut(plan: Plan) -> str:
    if plan.cut == 1:
        return "1 live connection loses its helper."
    return f"{plan.cut} live connections lose their helper." if plan.cut else ""


def _version(release: str) -> tuple[int, int]:
    major, _, rest = release.partition(".")
    minor = "".join(ch for ch in rest.split(".")[0].split("-")[0] if ch.isdigit())
    return (int(major) if major.isdigit() else 0, int(minor or 0))
