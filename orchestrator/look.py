"""What is there, and the plan that makes of it what is wanted; reads only."""

from __future__ import annotations

from orchestrator import plan_around
from orchestrator.launches import launches
from orchestrator.model import Listing, Status, Target
from orchestrator.observe import Observer
from orchestrator.plan import plan_apply, plan_teardown, relaunchable
from orchestrator.plan_registrations import registrations_of
from orchestrator.ports import Launch, ProcessSeen
from orchestrator.state import DeleteRegistration, Observed, Owner, Plan


def plan(
    observer: Observer, owner: Owner, target: Target, spared: frozenset[str] = frozenset()
) -> tuple[Observed, Plan]:
    """What is there, and what would make the target true but for what is spared."""
    wanted = launches(owner.profile, owner.netns, target.processes, target.documents)
    observed = observer.observe(owner, target)
    found = plan_apply(target, wanted, observed, owner)
    is_leaving = bool(found.kept) or any(isinstance(step, DeleteRegistration) for step in found.steps)
    if is_leaving or found.adopted or (observer.ledger.has_strays() and _may_wake(target, observed)):
        observed = observer.observe(owner, target, is_thorough=True)
        found = plan_apply(target, wanted, observed, owner)
    return observed, plan_around.plan_around(target, wanted, observed, owner, spared=spared) if spared else found


def _may_wake(target: Target, observed: Observed) -> bool:
    """Whether a registration is to be enabled that is there: others, too, may use it where nobody listens."""
    wanted = {r.key for r in target.registrations if r.status is Status.ENABLED}
    return any(r.status is Status.DISABLED and r.key in wanted for r in observed.registrations)


def parts(observer: Observer, owner: Owner, target: Target, spared: frozenset[str]) -> tuple[frozenset[str], ...]:
    """The subjects of a plan in parts that can be made right one after the other."""
    wanted = launches(owner.profile, owner.netns, target.processes, target.documents)
    return plan_around.parts(target, wanted, plan(observer, owner, target)[0], owner, spared=spared)


def plan_removal(observer: Observer, owner: Owner, target: Target | None) -> tuple[Observed, Plan]:
    """What is there, and what would take away all that is the owner's; `target` is for when the ledger is lost."""
    observed = observer.observe(owner, None, is_thorough=True)
    half_done = [r for unsettled in observer.ledger.unsettled(owner) for r in unsettled.registrations]
    mine = registrations_of(observed, target if target and target.profile == owner.profile else None, half_done)
    return observed, plan_teardown(observed, owner, mine)


def own_listing(observed: Observed, target: Target) -> Listing | None:
    """How the rules list that the target's backend has loaded."""
    return next((seen for seen in observed.listings if seen.backend is target.rules.backend), None)


def undoable(found: Plan, observed: Observed) -> Plan:
    """The same plan, whose steps know from the ledger how to start again what they stop."""
    return relaunchable(found, lambda process: _launch_of(process, observed))


def _launch_of(process: ProcessSeen, observed: Observed) -> Launch | None:
    """How a running process was started, from the ledger; with another digest where an earlier orch started it."""
    if observed.applied is None:
        return None
    target = observed.applied.target
    known = launches(process.profile, observed.netns, target.processes, target.documents)
    exactly = next((launch for launch in known if launch.digest == process.digest), None)
    return exactly or next((launch for launch in known if launch.spec.name == process.name), None)
