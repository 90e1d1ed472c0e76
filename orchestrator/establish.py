"""Make true what is wanted, and write it down: as a whole or not at all, or on a way back as far as it goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from orchestrator import look
from orchestrator.errors import NoHandoverError, OrchError, RollbackError, StalePlanError, VerifyError
from orchestrator.execute import EXPECTED, Execution
from orchestrator.launches import launches
from orchestrator.model import HelperKey, Listing
from orchestrator.plan_around import plan_around
from orchestrator.reports import PlanRefusedError, Report, Trial, worth_trying
from orchestrator.state import Applied, CreateRegistration, LoadRules, Observed, Pending, Plan, Wanted
from orchestrator.work import Work


@dataclass(frozen=True, slots=True)
class Establishing:
    """What is wanted, under the lock, with nothing unsettled. A rollback ends a trial.

    `spared` are subjects of changes, of what is applied already, that are left as they are (plan_around).
    """

    work: Work
    wanted: Wanted
    is_rollback: bool = False
    spared: frozenset[str] = frozenset()

    def run(self, *, ask: bool, trial: Trial | None = None) -> Report:
        """Plan, ask, carry out, verify. Raises PlanRefusedError before the first effect.

        A process that turns out to hand over nothing is restarted: that is another plan, which a note tells of.
        """
        observed, plan = self._plan()
        trial = worth_trying(trial, self.wanted, plan, observed)
        if (ask or plan.cut) and not self._is_agreed(plan):
            return Report(plan, declined=True)
        if plan.is_empty:
            if not self.spared:
                self._remember(observed)
            return Report(plan, notes=(*plan.kept, *plan.waiting))
        plan = look.undoable(plan, observed)
        now_s = self.work.system.clock.boottime()
        pending = trial.begin(self.wanted, observed.applied, now_s=now_s) if trial else None
        tx = self._begin(plan, pending)
        if trial is not None:
            self._guard(tx, trial)
        talk = self.work.talk
        execution = Execution(
            self.work.system, self.work.ledger, plan, tx, talk.step, talk.interrupted, self._listened()
        )
        try:
            self._carry_out(execution)
        except NoHandoverError as error:  # known to who plans from now on, so this is not repeated
            report = self.run(ask=ask, trial=trial)
            note = f"{error}: restarted instead, and nothing is inspected meanwhile"
            return replace(report, notes=(str(error) if report.declined else note, *report.notes))
        self._verify(execution)
        return Report(
            plan, notes=(*plan.kept, *plan.waiting, *self._filter_notes(), *self._queue_notes()), pending=pending
        )

    def run_all(self) -> Report:
        """Take every step, although some fail: what is not confirmed may have locked somebody out. Nobody is asked.

        The ledger goes on to say what was applied on trial, and the next way back is planned from what is there then.
        """
        observed, plan = self._plan()
        if plan.is_empty:
            self._remember(observed)
            return Report(plan, notes=(*plan.kept, *plan.waiting))
        plan = look.undoable(plan, observed)
        system, ledger = self.work.system, self.work.ledger
        tx = self._begin(plan)
        execution = Execution(system, ledger, plan, tx, self.work.talk.step, listened=self._listened())
        leftovers = execution.run_all() or self._settle_returned(tx, plan)
        if leftovers:
            live = self.work.live_keys()
            made = (step.registration for step in plan.steps if isinstance(step, CreateRegistration))
            ledger.claim(registration for registration in made if registration.key in live)
            ledger.settle(tx)
        return Report(plan, leftovers=leftovers, notes=(*plan.kept, *plan.waiting))

    def _plan(self) -> tuple[Observed, Plan]:
        self.work.recognise(self.wanted.owner.netns)
        observed, plan = self._look()
        if observed.has_strays is not None:
            self.work.ledger.remember_strays(are_there=observed.has_strays)
        if plan.refusals:
            raise PlanRefusedError(plan.refusals)
        return observed, plan

    def _look(self) -> tuple[Observed, Plan]:
        return look.plan(self.work.observer, self.wanted.owner, self.wanted.target, self.spared)

    def _is_agreed(self, plan: Plan) -> bool:
        """Whether it may run. Raises StalePlanError if it would be another one after the answer."""
        if not plan.is_empty and not self.work.ask(plan):
            return False
        again = self._look()[1]
        if (again.steps, again.refusals) != (plan.steps, plan.refusals):
            raise StalePlanError("plan is stale: the system changed meanwhile", hint="run it again")
        return True

    def _begin(self, plan: Plan, pending: Pending | None = None) -> int:
        command = "rollback" if self.is_rollback else "apply"
        return self.work.ledger.begin(command, self.wanted.owner, plan.steps, pending=pending)

    def _listened(self) -> frozenset[HelperKey]:
        return frozenset(registration.key for registration in self.wanted.target.registrations)

    def _guard(self, tx: int, trial: Trial) -> None:
        """Nothing is done before somebody is there who undoes it."""
        try:
            trial.guard()
        except EXPECTED:
            self.work.settle_undone(tx)
            raise

    def _carry_out(self, execution: Execution) -> None:
        try:
            execution.run()
        except RollbackError:
            raise  # the journal keeps what is half-done: the next command takes it up
        except OrchError:
            self.work.settle_undone(execution.tx)
            raise
        except (OSError, ValueError) as error:
            self.work.settle_undone(execution.tx)
            raise OrchError(str(error)) from error

    def _verify(self, execution: Execution) -> None:
        """Only an empty plan is success; what differs now, or cannot be looked at or written down, is undone."""
        is_known = bool(self.spared) and not any(isinstance(step, LoadRules) for step in execution.plan.steps)
        try:
            applied, problems = self._look_again(execution.plan, is_known=is_known)
        except EXPECTED as error:
            applied, problems = None, (str(error),)
        failure: OrchError = VerifyError("the system is not as declared after all steps: " + "; ".join(problems))
        if applied is not None and not problems:
            try:
                if is_known:
                    self.work.ledger.settle(execution.tx)
                else:
                    self._settle(execution.tx, applied)
                return
            except OrchError as error:
                failure = error
        leftovers = execution.undo()
        if leftovers:
            raise RollbackError(failure, leftovers)
        self.work.settle_undone(execution.tx)
        raise failure

    def _settle_returned(self, tx: int, plan: Plan) -> tuple[str, ...]:
        """What differs from what was applied before; if nothing does, that is written down."""
        try:
            applied, problems = self._look_again(plan, is_known=False)
        except EXPECTED as error:
            return (str(error),)
        if not problems:
            self._settle(tx, applied)
        return problems

    def _look_again(self, plan: Plan, *, is_known: bool) -> tuple[Applied, tuple[str, ...]]:
        """What the ledger will say, and what is not as it should be.

        It says that already where rules were spared: how they list now is not how they should. Those for whom a
        registration waits may be found only where they are.
        """
        owner, target = self.wanted.owner, self.wanted.target
        known = self.work.ledger.find(owner) if is_known else None
        applied = known or self._applied()
        observed = self.work.observer.observe(
            owner, target, applied=None if known else applied, is_thorough=bool(plan.waiting)
        )
        started = launches(owner.profile, owner.netns, target.processes, target.documents)
        again = plan_around(target, started, observed, owner, spared=self.spared)
        missing = sorted({a.key for a in target.attachments} - applied.baseline.helpers)
        problems = [f"{c.subject}: {c.detail} {c.reason}".strip(": ") for c in again.changes]
        problems += [f"rules do not attach {key}" for key in missing]
        return applied, tuple(problems)

    def _applied(self) -> Applied:
        """What the ledger is to remember, with how the rules list now."""
        wanted = self.wanted
        backend = self.work.system.rules[wanted.target.rules.backend]
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

    def _remember(self, observed: Observed) -> None:
        """Write down what is there already but the ledger does not know: it was lost, or another version wrote it."""
        applied, wanted = observed.applied, self.wanted
        same = applied is not None and applied.wanted == wanted
        listing, half_done = look.own_listing(observed, wanted.target), self.work.ledger.unsettled(wanted.owner)
        if same and applied and listing and applied.baseline == listing and not (self.is_rollback or half_done):
            return
        self._settle(None, self._applied())

    def _settle(self, tx: int | None, applied: Applied) -> None:
        half_done = self.work.ledger.unsettled(self.wanted.owner)
        live = self.work.live_keys()
        self.work.ledger.settle_applied(tx, applied, live=live, is_rollback=self.is_rollback, instead_of=half_done)

    def _filter_notes(self) -> tuple[str, ...]:
        try:
            missing = self.work.system.host.unrelated_filters(self.wanted.owner.netns)
        except EXPECTED as error:
            return (f"the filter rules could not be looked at: {error}",)
        return tuple(f"{chain} drops, and has no rule that accepts what helpers expect" for chain in missing)

    def _queue_notes(self) -> tuple[str, ...]:
        if not self.wanted.target.registrations:
            return ()
        try:
            foreign = self.work.system.host.foreign_queues(self.wanted.owner.netns)
        except EXPECTED as error:
            return (f"the rules of others could not be looked at: {error}",)
        return tuple(
            f"{chain} queues packets too: helped connections that it queues lose source NAT" for chain in foreign
        )
