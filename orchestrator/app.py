"""The use cases behind the commands, and the only place that wires adapters to ports."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import look, survey, unconfirmed
from orchestrator.errors import PreflightError
from orchestrator.establish import Establishing
from orchestrator.execute import EXPECTED
from orchestrator.journal import Ledger, note_child
from orchestrator.model import Backend, Desired, Document, Netns, Status, Target
from orchestrator.observe import Observer
from orchestrator.ports import System
from orchestrator.remove import remove_each, remove_remade, remove_unused
from orchestrator.reports import Difference, Report, Talk, TeardownReport, Trial
from orchestrator.settle import Settling
from orchestrator.state import Applied, HelperSummary, Observed, Owner, Pending, Plan, Wanted
from orchestrator.status import HostStatus
from orchestrator.work import Work

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
        with self.reading() as ledger:
            for unsettled in ledger.left_alone():
                self.talk.warn(f"{unsettled.sentence}: the next apply or teardown {unsettled.remedy}")
            for pending in ledger.pending():
                self.talk.warn(f"{pending.owner} waits for its confirmation: until then nothing else can be applied")
            owner = self._owner(desired)
            target = self._concrete(target)
            observed, plan = self.plan(ledger, owner, target)
        listing = look.own_listing(observed, target)
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
            report = self.establish(ledger, wanted, ask=ask, trial=trial)
            if not report.declined:
                remove_unused(self._work(ledger))
            return report

    # -- teardown -----------------------------------------------------------------------------------------------------

    def teardown(
        self, wanted: str, *, every_netns: bool, desired: Desired | None = None, target: Target | None = None
    ) -> TeardownReport:
        """Take away what orch owns: one profile by name, all of this namespace (empty name), or of every namespace.

        `desired` and `target` are what the profile's file says, for its namespace and for when the ledger is lost.
        """
        places = None if every_netns else self._places(desired)

        def is_asked_for(owner: Owner) -> bool:
            return (places is None or owner.netns.identity in places) and wanted in ("", owner.profile)

        with self.settled(f"teardown {wanted}".strip(), is_forgiven=is_asked_for) as ledger:
            work = self._work(ledger)
            half_done = (unsettled.owner for unsettled in ledger.unsettled())
            owners = (*half_done, *ledger.owners(), *work.observer.strays())
            everything = {(o.profile, o.netns.identity): o for o in owners}
            if desired is not None and not every_netns:
                with contextlib.suppress(PreflightError):  # it is gone
                    owner = self._owner(desired)
                    everything.setdefault((owner.profile, owner.netns.identity), owner)
            asked = [owner for owner in everything.values() if is_asked_for(owner)]
            others = tuple(o for o in everything.values() if o not in asked)
            mine = [self._by_name(owner, places or {}, work.observer) for owner in asked]
            if any(work.observer.is_there(owner.netns) for owner in mine):
                self.refuse_while_pending(ledger)
            # What iptables rules are in the way of goes with the others, when those are gone.
            mine = sorted(map(work.reachable, mine), key=lambda owner: not ledger.attaches_by_iptables(owner))
            # Every question comes before the first effect; each plan is made when those before it are carried out,
            # as two profiles may share what the last of them takes away.
            plans = [look.plan_removal(work.observer, owner, target)[1] for owner in mine]
            if not all(not plan.cut or work.ask(plan) for plan in plans):
                return TeardownReport(tuple(Report(plan, declined=True) for plan in plans), others)
            reports = remove_each(work, mine, target)
            remove_unused(work)
            return TeardownReport(reports, others)

    @staticmethod
    def _by_name(owner: Owner, places: Mapping[str, Netns], observer: Observer) -> Owner:
        """The same, by the name that was given for its namespace, if the path that is known leads there no more."""
        if observer.is_there(owner.netns):
            return owner
        return replace(owner, netns=places.get(owner.netns.identity, owner.netns))

    def _places(self, desired: Desired | None) -> Mapping[str, Netns]:
        """The namespace that is meant, and those that had its name and are gone, by identity."""
        name = (desired.netns if desired else "") if self.netns is None else self.netns
        with self.reading() as ledger:
            observer = Observer(self.system, ledger)
            named = [owner.netns for owner in ledger.owners() if name and name in (owner.netns.label, owner.netns.path)]
            gone = {netns.identity: netns for netns in named if not observer.is_there(netns)}
        try:
            found = self.system.host.find_netns(name)
            return {**gone, found.identity: found}
        except PreflightError:
            if not gone:
                raise
            return gone

    # -- status -------------------------------------------------------------------------------------------------------

    def applied(self, wanted: str = "") -> tuple[Applied, ...]:
        """What the ledger remembers of every namespace (or one, if it was named) and every profile (or one)."""
        with self.reading() as ledger:
            asked = [applied for applied in ledger.applied() if self.is_asked_for(applied.owner, wanted)]
            return tuple(replace(applied, owner=self.current(ledger, applied.owner)) for applied in asked)

    def status(self, wanted: str = "") -> HostStatus:
        """Every namespace (or one, if it was named), every profile (or one), and what is not as it was applied."""
        with self.reading() as ledger:
            return survey.host_status(Observer(self.system, ledger), lambda owner: self.is_asked_for(owner, wanted))

    def is_asked_for(self, owner: Owner, wanted: str) -> bool:
        only = None if self.netns is None else self.system.host.find_netns(self.netns).identity
        return wanted in ("", owner.profile) and only in (None, owner.netns.identity)

    # -- what confirming and mending build on --------------------------------------------------------------------------

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
        """Make true what is wanted but for what is spared; under the lock, with nothing unsettled (Establishing)."""
        return Establishing(self._work(ledger), wanted, is_rollback, spared).run(ask=ask, trial=trial)

    def plan(
        self, ledger: Ledger, owner: Owner, target: Target, spared: frozenset[str] = frozenset()
    ) -> tuple[Observed, Plan]:
        """What is there, and what would make the target true but for what is spared; reads only."""
        return look.plan(Observer(self.system, ledger), owner, target, spared)

    def parts(self, ledger: Ledger, owner: Owner, target: Target, spared: frozenset[str]) -> tuple[frozenset[str], ...]:
        """The subjects of a plan in parts that can be made right one after the other; reads only."""
        return look.parts(Observer(self.system, ledger), owner, target, spared)

    def current(self, ledger: Ledger, owner: Owner) -> Owner:
        """The same, by the name that its namespace has now if the path that is known leads there no more."""
        return Observer(self.system, ledger).current(owner)

    def is_remade(self, ledger: Ledger, owner: Owner) -> bool:
        """Whether the namespace is gone for good, as its name is another one's now."""
        return Observer(self.system, ledger).is_remade(owner.netns)

    def roll_back(self, ledger: Ledger, pending: Pending) -> Report:
        """Undo an apply that nobody confirmed; under the lock, with nothing unsettled."""
        return unconfirmed.roll_back(self._work(ledger), pending)

    def refuse_while_pending(self, ledger: Ledger, renewed: Owner | None = None) -> None:
        """Raises RefusedError while an apply waits for its confirmation."""
        unconfirmed.refuse_while_pending(ledger, self.system.clock.boottime(), renewed)

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
                work = self._work(ledger)
                stuck = Settling(work, is_forgiven, renewed).run()
                work.forget_replaced(self.system.host.known_netns())
                if not stuck:
                    remove_remade(work)
                unconfirmed.roll_back_overdue(work, is_forgiven)
                work.forget_history()
                if stuck and any(not unsettled.is_teardown for unsettled in ledger.unsettled()):
                    raise stuck
                yield ledger
            finally:
                self._guard_what_waits(ledger)

    def _open(self, *, create: bool) -> Ledger:
        return Ledger.open(self.state_dir, boot_id=self.boot_id, create=create)

    def _work(self, ledger: Ledger) -> Work:
        return Work(self.system, ledger, self.talk)

    def _guard_what_waits(self, ledger: Ledger) -> None:
        """Somebody may have killed who would undo it."""
        try:
            if ledger.pending() and not ledger.is_watched():
                self.guard()
        except EXPECTED as error:
            self.talk.warn(f"nobody is there who would undo what is not confirmed: {error}")

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


def _text(documents: tuple[Document, ...]) -> str:
    return "\n".join(document.text for document in documents)
