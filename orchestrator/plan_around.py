"""A plan that spares some of what has drifted: what others fight over is left alone, and the rest is mended."""

from __future__ import annotations

import itertools
from dataclasses import replace

from orchestrator.model import Listing, Status, Target
from orchestrator.plan import plan_apply
from orchestrator.ports import Launch
from orchestrator.state import Action, LoadRules, Observed, Owner, Plan, Scope, UpdateRegistration, rules_name


def plan_around(
    target: Target, launches: tuple[Launch, ...], observed: Observed, owner: Owner, *, spared: frozenset[str]
) -> Plan:
    """What makes `target` true but for the subjects in `spared`, which are those of its changes.

    What cannot be right while those are not is spared as well: a process and its registrations, rules that attach a
    registration that is missing, or enabled where nobody listens, a registration that is made anew when the rules
    cannot be loaded again.
    """
    plan = plan_apply(target, launches, observed, owner)
    drifted = frozenset(change.subject for change in plan.changes)
    while spared:
        spared |= _of_spared_helpers(launches, spared, drifted)
        others = tuple(launch for launch in launches if launch.spec.name not in spared)
        plan = plan_apply(target, others, _as_if_right(target, observed, spared), owner)
        needed = _entangled(plan, target, observed, spared)
        if needed <= spared:
            break
        spared |= needed
    return plan


def parts(
    target: Target, launches: tuple[Launch, ...], observed: Observed, owner: Owner, *, spared: frozenset[str]
) -> tuple[frozenset[str], ...]:
    """The subjects of such a plan in parts to be made right one after the other: each needs earlier ones alone."""

    def changed(spared: frozenset[str]) -> frozenset[str]:
        plan = plan_around(target, launches, observed, owner, spared=spared)
        return frozenset(change.subject for change in plan.changes)

    subjects = changed(spared)
    left_with = {one: subjects - changed(spared | {one}) | {one} for one in subjects}
    needs = {one: sorted(other for other in subjects if one in left_with[other]) for one in subjects}
    ordered = sorted(subjects, key=lambda one: (len(needs[one]), needs[one]))
    return tuple(frozenset(part) for _, part in itertools.groupby(ordered, needs.__getitem__))


def _of_spared_helpers(launches: tuple[Launch, ...], spared: frozenset[str], drifted: frozenset[str]) -> frozenset[str]:
    """Processes of spared registrations; and registrations of spared processes that may not listen."""
    found: set[str] = set()
    for spec in (launch.spec for launch in launches):
        keys = set(map(str, spec.keys))
        if spec.name in spared or keys & spared:
            found |= {spec.name, *(keys if spec.name in drifted else ())}
    return frozenset(found)


def _as_if_right(target: Target, observed: Observed, spared: frozenset[str]) -> Observed:
    """What is spared, as it should be: then a plan does not touch it."""
    wanted = {str(r.key): r for r in (*target.registrations, *target.stock)}
    listings = tuple(x for x in observed.listings if rules_name(x, target.profile) not in spared)
    seen = replace(
        observed,
        registrations=(
            *(r for r in observed.registrations if str(r.key) not in spared),
            *(r for key, r in wanted.items() if key in spared),
        ),
        listings=listings,
        processes=tuple(p for p in observed.processes if p.name not in spared),
        modules=observed.modules | spared.intersection(target.modules),
        reconciles=target.reconcile if "reconcile" in spared else observed.reconciles,
    )
    if rules_name(target.rules) not in spared:
        return seen
    attached = frozenset(attachment.key for attachment in target.attachments)
    right = Listing(target.rules.backend, target.rules.digest, "", attached)
    return replace(seen, listings=(*listings, right), baseline=right, stale=frozenset())


def _entangled(plan: Plan, target: Target, observed: Observed, spared: frozenset[str]) -> frozenset[str]:
    """What else has to be spared, as it needs what is spared; nothing if the plan can be carried out."""
    if any(change.subject in spared for change in plan.changes):
        anew = (Action.CREATE, Action.REPLACE)
        made = [c.subject for c in plan.changes if c.scope is Scope.HOST and c.action in anew]
        return frozenset(made or (change.subject for change in plan.changes))
    if any(isinstance(step, UpdateRegistration) and str(step.after.key) in spared for step in plan.steps):
        # A process stops that nobody knows: whatever it may serve would be disabled, and enabled again.
        return frozenset(change.subject for change in plan.changes if change.scope is Scope.PROCESS)
    bound = {row.queue_num for row in observed.queues}
    harmless = {r.key for r in observed.registrations if r.status is Status.DISABLED or r.queue_num in bound}
    harmful = {a.key for a in target.attachments if str(a.key) in spared} - harmless
    is_loaded = any(isinstance(step, LoadRules) for step in plan.steps)
    return frozenset({rules_name(target.rules)} if harmful and is_loaded else ())
