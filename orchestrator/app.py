"""The use cases behind the commands, and the only place that wires adapters to ports."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import OrchError, RollbackError, StalePlanError, VerifyError
from orchestrator.execute import EXPECTED, Execution, lead_back
from orchestrator.journal import Ledger
from orchestrator.launches import launches
from orchestrator.model import Backend, Desired, Document, HelperKey, Listing, Netns, Registration, Status, Target
from orchestrator.observe import Observer, or_nothing
from orchestrator.plan import plan_apply, plan_teardown, relaunchable
from orchestrator.ports import Launch, ProcessSeen, System
from orchestrator.reports import Difference, PlanRefusedError, Report, Talk, TeardownReport
from orchestrator.state import (
    Applied,
    DeleteRegistration,
    DrainQueues,
    HelperSummary,
    Observed,
    Owner,
    Plan,
    Wanted,
)
from orchestrator.status import HostStatus, ProfileStatus, lost_profile, profile_status

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
    return System(
        registry=KernelRegistry(),
        rules={
            Backend.NFTABLES: NftRules(),
            Backend.IPTABLES_LEGACY: IptablesRules(Backend.IPTABLES_LEGACY),
            Backend.IPTABLES_NFT: IptablesRules(Backend.IPTABLES_NFT),
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
    """The use cases. `state_dir` holds the ledger; `netns` overrides the namespace that a profile names."""

    system: System
    state_dir: Path
    boot_id: str
    talk: Talk
    netns: str | None = None
    wait_s: float = 10.0

    # -- diff and apply -----------------------------------------------------------------------------------------------

    def diff(self, desired: Desired, target: Target) -> Difference:
        """What apply would do now; reads only."""
        ledger = self._open(create=False)
        owner = self._owner(desired)
        target = self._concrete(target)
        observed, plan = self._plan(ledger, owner, target)
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

    def apply(self, desired: Desired, target: Target, *, ask: bool) -> Report:
        """Make the target true, or leave everything as it was. Raises PlanRefusedError before the first effect."""
        ledger = self._open(create=True)
        target = self._concrete(target)
        with self._locked(ledger, f"apply {desired.source}"):
            self._settle(ledger)
            helpers = tuple(HelperSummary(h.name, h.engine, h.keys) for h in desired.helpers)
            wanted = Wanted(self._owner(desired), desired.source, target, helpers)
            return self._establish(ledger, wanted, ask=ask)

    def _establish(self, ledger: Ledger, wanted: Wanted, *, ask: bool) -> Report:
        """Plan, ask, carry out, verify; under the lock, with nothing unsettled."""
        observed, plan = self._plan(ledger, wanted.owner, wanted.target)
        if plan.refusals:
            raise PlanRefusedError(plan.refusals)
        if not plan.is_empty and (ask or plan.cut) and not self.talk.confirm(plan, _what_is_cut(plan)):
            return Report(plan, declined=True)
        if ask or plan.cut:
            again = self._plan(ledger, wanted.owner, wanted.target)[1]
            if (again.steps, again.refusals) != (plan.steps, plan.refusals):
                raise StalePlanError("plan is stale: the system changed meanwhile", hint="run it again")
        if plan.is_empty:
            self._remember(ledger, wanted, observed)
            return Report(plan, notes=plan.kept)
        plan = relaunchable(plan, lambda p: _launch_of(p, observed))
        tx = ledger.begin("apply", wanted.owner)
        execution = Execution(self.system, ledger, plan, tx, self.talk.step, self.talk.interrupted)
        self._run(execution, ledger, tx)
        self._verify(execution, ledger, tx, wanted)
        netns = wanted.owner.netns
        return Report(plan, notes=(*plan.kept, *self._filter_notes(netns), *self._queue_notes(netns, wanted.target)))

    def _plan(self, ledger: Ledger, owner: Owner, target: Target) -> tuple[Observed, Plan]:
        observer = Observer(self.system, ledger)
        wanted = launches(owner.profile, owner.netns, target.processes, target.documents)
        observed = observer.observe(owner, target)
        plan = plan_apply(target, wanted, observed, owner)
        if plan.adopted or any(isinstance(step, DeleteRegistration) for step in plan.steps):
            observed = observer.observe(owner, target, is_thorough=True)
            plan = plan_apply(target, wanted, observed, owner)
        return observed, plan

    def _run(self, execution: Execution, ledger: Ledger, tx: int) -> None:
        try:
            execution.run()
        except RollbackError:
            raise  # the journal keeps what is half-done: the next command takes it up
        except OrchError:
            ledger.settle(tx)
            raise
        except (OSError, ValueError) as error:
            ledger.settle(tx)
            raise OrchError(str(error)) from error

    def _verify(self, execution: Execution, ledger: Ledger, tx: int, wanted: Wanted) -> None:
        """Only an empty plan is success; what differs now, or cannot be looked at, is undone."""
        try:
            applied, problems = self._look_again(ledger, wanted)
        except EXPECTED as error:
            applied, problems = None, (str(error),)
        if applied is not None and not problems:
            ledger.settle_applied(tx, applied, live=self._live_keys())
            return
        leftovers = execution.undo()
        failure = VerifyError("the system is not as declared after all steps: " + "; ".join(problems))
        if leftovers:
            raise RollbackError(failure, leftovers)
        ledger.settle(tx)
        raise failure

    def _look_again(self, ledger: Ledger, wanted: Wanted) -> tuple[Applied, tuple[str, ...]]:
        """What the ledger will say, and what is not as it should be."""
        owner, target = wanted.owner, wanted.target
        applied = self._applied(wanted)
        observed = Observer(self.system, ledger).observe(owner, target, applied=applied)
        again = plan_apply(
            target, launches(owner.profile, owner.netns, target.processes, target.documents), observed, owner
        )
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

    def _remember(self, ledger: Ledger, wanted: Wanted, observed: Observed) -> None:
        """Write down what is there already but the ledger does not know: it was lost, or another version wrote it."""
        applied = observed.applied
        same = applied is not None and applied.target == wanted.target and applied.source == wanted.source
        listing = _own_listing(observed, wanted.target)
        if same and applied and listing and applied.baseline == listing:
            return
        ledger.settle_applied(None, self._applied(wanted), live=self._live_keys())

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
        ledger = self._open(create=True)
        with self._locked(ledger, f"teardown {wanted}".strip()):
            self._settle(ledger)
            owners = (*ledger.owners(), *Observer(self.system, ledger).strays())
            everything = {(o.profile, o.netns.identity): o for o in owners}
            if desired is not None and not every_netns:
                owner = self._owner(desired)
                everything.setdefault((owner.profile, owner.netns.identity), owner)
            here = None if every_netns else self._here(desired)
            mine = [o for o in everything.values() if here in (None, o.netns.identity) and wanted in ("", o.profile)]
            others = tuple(o for o in everything.values() if o not in mine)
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
        """A namespace whose name was deleted lives on while a process of ours runs in it: go in through that one."""
        if Observer(self.system, ledger).is_there(owner.netns):
            return owner
        inside = [p.pid for p in self.system.processes.running() if p.netns == owner.netns.identity]
        path = f"/proc/{inside[0]}/ns/net" if inside else owner.netns.path
        return replace(owner, netns=replace(owner.netns, path=path))

    def _plan_removal(self, ledger: Ledger, owner: Owner, target: Target | None) -> tuple[Observed, Plan]:
        observed = Observer(self.system, ledger).observe(owner, None, is_thorough=True)
        mine = _mine(observed, target if target and target.profile == owner.profile else None)
        return observed, plan_teardown(observed, owner, mine)

    def _teardown_one(self, ledger: Ledger, owner: Owner, target: Target | None) -> Report:
        observed, plan = self._plan_removal(ledger, owner, target)
        for sentence in self._drop_warnings(plan, owner):
            self.talk.warn(sentence)
        plan = relaunchable(plan, lambda p: _launch_of(p, observed))
        tx = ledger.begin("teardown", owner)
        execution = Execution(self.system, ledger, plan, tx, self.talk.step, self.talk.interrupted)
        try:
            leftovers = execution.run_all()
        except RollbackError:
            raise
        except OrchError:
            ledger.settle(tx)
            raise
        if leftovers:
            ledger.settle(tx)  # the profile stays in the ledger: status shows what is left, and teardown tries again
            return Report(plan, leftovers=leftovers, notes=plan.kept)
        ledger.settle_removed(tx, owner, live=self._live_keys())
        self.system.processes.cleanup(owner.profile, owner.netns)
        return Report(plan, notes=plan.kept, is_forgotten=plan.is_empty and observed.applied is not None)

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

    # -- status -------------------------------------------------------------------------------------------------------

    def applied(self, wanted: str = "") -> tuple[Applied, ...]:
        """What the ledger remembers of every namespace (or one, if it was named) and every profile (or one)."""
        with contextlib.closing(self._open(create=False)) as ledger:
            return tuple(applied for applied in ledger.applied() if self._is_asked_for(applied.owner, wanted))

    def status(self, wanted: str = "") -> HostStatus:
        """Every namespace (or one, if it was named), every profile (or one), and what is not as it was applied."""
        ledger = self._open(create=False)

        def is_wanted(owner: Owner) -> bool:
            return self._is_asked_for(owner, wanted)

        # The table of connections is long, and several profiles may share it.
        connections = functools.cache(self._connections)
        return HostStatus(
            profiles=tuple(
                self._profile_status(ledger, applied, connections)
                for applied in ledger.applied()
                if is_wanted(applied.owner)
            ),
            unknown=tuple(filter(is_wanted, Observer(self.system, ledger).strays())),
            unsettled=() if ledger.is_locked() else tuple(f"{u.command} of {u.owner}" for u in ledger.unsettled()),
            working=ledger.is_locked(),
        )

    def _is_asked_for(self, owner: Owner, wanted: str) -> bool:
        only = None if self.netns is None else self.system.host.find_netns(self.netns).identity
        return wanted in ("", owner.profile) and only in (None, owner.netns.identity)

    def _profile_status(
        self, ledger: Ledger, applied: Applied, connections: Callable[[Netns], Mapping[str, int] | None]
    ) -> ProfileStatus:
        owner = applied.owner
        try:
            if not Observer(self.system, ledger).is_there(owner.netns):
                raise OrchError("it is gone; orch teardown --all takes away what is left of it")
            observed, plan = self._plan(ledger, owner, applied.target)
        except OrchError as error:
            return lost_profile(applied, str(error))
        return profile_status(applied, observed, plan, self.system, connections(owner.netns))

    def _connections(self, netns: Netns) -> Mapping[str, int] | None:
        """Live connections by helper name; None where the kernel did not list them."""
        try:
            return self.system.host.connections(netns)
        except OrchError:
            return None

    # -- shared -------------------------------------------------------------------------------------------------------

    def _open(self, *, create: bool) -> Ledger:
        return Ledger.open(self.state_dir, boot_id=self.boot_id, create=create)

    def _live_keys(self) -> tuple[HelperKey, ...]:
        return tuple(r.key for r in self.system.registry.dump())

    def _forget_replaced(self, ledger: Ledger) -> None:
        """The kernel gives the inode of a deleted namespace to the next one: that one has nothing of ours.

        The same namespace under another name is told by our rules or processes in it.
        """
        observer = Observer(self.system, ledger)
        there = {netns.identity: netns for netns in self.system.host.known_netns()}
        for owner in ledger.owners():
            netns = there.get(owner.netns.identity)
            if netns is None or netns.path == owner.netns.path or observer.is_there(owner.netns):
                continue
            look = observer.observe(replace(owner, netns=netns), None)
            if look.processes or look.listings:
                continue
            ledger.settle_removed(None, owner, live=self._live_keys())
            self.talk.warn(f"netns {owner.netns} is gone, and profile {owner.profile} with it")

    def _locked(self, ledger: Ledger, command: str) -> AbstractContextManager[None]:
        clock, interrupted = self.system.clock, self.talk.interrupted
        return ledger.locked(command, wait_s=self.wait_s, clock=clock, interrupted=interrupted)

    def _owner(self, desired: Desired) -> Owner:
        name = desired.netns if self.netns is None else self.netns
        return Owner(desired.profile, self.system.host.find_netns(name))

    def _concrete(self, target: Target) -> Target:
        """Plain `iptables` is whatever the host's alternatives make of it: decided here, once."""
        if target.rules.backend is not Backend.IPTABLES:
            return target
        return replace(target, rules=replace(target.rules, backend=self.system.host.iptables_variant()))

    def _settle(self, ledger: Ledger) -> None:
        """Undo what a killed command had begun, and forget profiles of namespaces whose identity is another's now."""
        self._forget_replaced(ledger)
        for unsettled in ledger.unsettled():
            self.talk.warn(f"{unsettled.command} of {unsettled.owner} was not finished: undoing it")
            steps = [(n, step) for n, (step, _) in enumerate(unsettled.begun)]
            netns = unsettled.owner.netns
            leftovers = lead_back(steps, self.system, netns, self.talk.step, undone=lambda _: None)
            ledger.settle(unsettled.id)
            for sentence in leftovers:
                self.talk.warn(sentence)


def _mine(observed: Observed, target: Target | None) -> tuple[Registration, ...]:
    """The live registrations that belong to a profile: by the ledger; else by its file and its own rules.

    Without either, a stock registration of ours is known by carrying, disabled, the queue number of an attached one.
    """
    if observed.applied is not None:
        # With those that no profile uses any more: an earlier teardown had to leave them.
        unused = [r for key, r in observed.recorded.items() if key not in observed.users]
        return tuple({r.key: r for r in (*unused, *observed.applied.registrations)}.values())
    attached = {key for listing in observed.listings for key in listing.helpers}
    ours = [r for r in observed.registrations if r.key in attached]
    served = {(r.queue_num, r.key.l3proto, r.key.l4proto) for r in ours}
    stock = [
        r
        for r in observed.registrations
        if r.status is Status.DISABLED
        and r.key not in attached
        and (r.queue_num, r.key.l3proto, r.key.l4proto) in served
    ]
    wanted = {r.key: r for r in (*target.registrations, *target.stock)} if target else {}
    exact = [
        r
        for r in observed.registrations
        if r.key in wanted and replace(r, status=Status.DISABLED) == replace(wanted[r.key], status=Status.DISABLED)
    ]
    return tuple({r.key: r for r in (*ours, *stock, *exact)}.values())


def _launch_of(process: ProcessSeen, observed: Observed) -> Launch | None:
    """How a running process was started, from the ledger."""
    if observed.applied is None:
        return None
    known = launches(
        process.profile, observed.netns, observed.applied.target.processes, observed.applied.target.documents
    )
    return next((launch for launch in known if launch.digest == process.digest), None)


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
