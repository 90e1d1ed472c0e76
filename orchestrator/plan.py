"""Desired and observed state -> a plan: pure, total, deterministic, and empty when nothing differs.

The order of steps is the one that lost no packet under load: listeners before enabled registrations, registrations
before the rules that name them; the batch of rules is the commit point, what nothing refers to goes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from orchestrator.model import HelperKey, Registration, Status, Target
from orchestrator.plan_processes import ProcessPlan, held_queues, plan_processes, surplus_queues
from orchestrator.plan_registrations import (
    Leaving,
    RegistrationPlan,
    by_key,
    connections_cut,
    leaving_of,
    plan_registrations,
    registration_changes,
    registrations_waiting,
    say_waiting,
    used_here,
)
from orchestrator.plan_rules import (
    live_listing,
    loaded_rules,
    other_listings,
    refuse_foreign_table,
    refuse_modules,
    refuse_neighbours,
    rules_changes,
    rules_reason_of,
)
from orchestrator.plan_standin import StandIn, plan_stand_in
from orchestrator.ports import Launch, ProcessSeen
from orchestrator.state import (
    Action,
    Change,
    CreateRegistration,
    DeleteRegistration,
    DrainQueues,
    FlushRules,
    KeepRegistrations,
    LoadModule,
    LoadRules,
    Observed,
    Owner,
    Plan,
    RemoveRules,
    Scope,
    ServeQueues,
    SetReconcile,
    StartProcess,
    Step,
    StopProcess,
    SucceedProcess,
    UpdateRegistration,
    WatchProcess,
    rules_name,
)


def plan_apply(target: Target, launches: tuple[Launch, ...], observed: Observed, owner: Owner) -> Plan:
    """What makes `target` true in the observed namespace. `launches` are its processes with their files."""
    waiting = registrations_waiting(target, observed)
    registrations = plan_registrations(target, observed, waiting)
    target = _disabled(target, waiting)
    stand_in = plan_stand_in(target, launches, observed)
    processes = plan_processes(launches, observed, stand_in)
    stale_rules = observed.stale | {r.key for r in (*registrations.create, *(r for _, r in registrations.replace))}
    attached = {a.key for a in target.attachments} & stale_rules
    is_to_go = bool(registrations.replace) and observed.idles_iptables and target.attaches_by_iptables
    rules_reason = rules_reason_of(target.rules, observed, attached=attached, would_idle=is_to_go)
    refusals = (
        *registrations.refusals,
        *processes.refusals,
        *refuse_modules(target, observed),
        *refuse_neighbours(target, observed),
        *refuse_foreign_table(observed),
    )
    modules = tuple(m for m in target.modules if m not in observed.modules)
    steps = _apply_steps(target, observed, registrations, processes, stand_in, modules, rules_reason)
    losing = (*(before for before, _ in registrations.replace), *registrations.leaving.retire)
    cut = connections_cut(observed, [r.key for r in losing])
    return Plan(
        profile=owner.profile,
        netns=observed.netns,
        changes=(
            *(Change(Action.CREATE, Scope.MODULE, m, "stays loaded") for m in modules),
            *registration_changes(registrations, observed),
            *processes.changes,
            *_reconcile_changes(target, observed),
            *rules_changes(target.rules, observed, rules_reason),
        ),
        steps=steps,
        refusals=refusals,
        adopted=registrations.adopted,
        cut=cut,
        kept=registrations.leaving.kept,
        waiting=say_waiting(waiting, observed),
    )


def _disabled(target: Target, keys: frozenset[HelperKey]) -> Target:
    """The same target, but for registrations that are not enabled yet."""
    if not keys:
        return target
    quiet = (replace(r, status=Status.DISABLED) if r.key in keys else r for r in target.registrations)
    return replace(target, registrations=tuple(quiet))


def _reconcile_changes(target: Target, observed: Observed) -> list[Change]:
    if target.reconcile is observed.reconciles:
        return []
    return [Change(Action.UPDATE, Scope.PROCESS, "reconcile", f"{observed.reconciles} -> {target.reconcile}".lower())]


def plan_teardown(observed: Observed, owner: Owner, mine: tuple[Registration, ...]) -> Plan:
    """What takes away all that the profile owns here. `mine` are the registrations it uses, as they were applied."""
    live = {r.key: r for r in observed.registrations}
    leaving = leaving_of([live[r.key] for r in sorted(mine, key=by_key) if r.key in live], observed)
    retire = leaving.retire
    before = [loaded_rules(listing, observed, owner.profile) for listing in observed.listings]
    stops = tuple(StopProcess(p, None) for p in observed.processes)
    stock = tuple(replace(r, status=Status.DISABLED) for r in retire if r.status is Status.DISABLED)
    # All of ours are drained, those that others share too: it is the listener of this namespace that stops.
    queues = ({r.queue_num for r in mine} | held_queues(observed, observed.processes)) & {
        q.queue_num for q in observed.queues
    }
    steps: tuple[Step, ...] = (
        *(FlushRules(rules) for rules in before),
        *_disable((*retire, *leaving.disable)),
        *((DrainQueues(tuple(sorted(queues))),) if queues and stops else ()),
        *(RemoveRules(rules) for rules in before),
        *([KeepRegistrations(stock)] if stops and stock else []),
        *stops,
        *(_delete(r) for r in _attached_first(retire, observed)),
        *_enable_what_waited([live[r.key] for r in mine if r.key in live], observed),
    )
    changes = (
        *(Change(Action.DELETE, Scope.RULES, rules_name(rules), "") for rules in before),
        *(Change(Action.DELETE, Scope.HOST, str(r.key), "") for r in retire),
        *(Change(Action.DELETE, Scope.PROCESS, p.name, p.place) for p in observed.processes),
    )
    return Plan(
        profile=owner.profile,
        netns=observed.netns,
        changes=changes,
        steps=steps,
        cut=sum(observed.connections.get(name, 0) for name in {r.key.name for r in mine}),
        kept=leaving.kept,
    )


def _enable_what_waited(shared: list[Registration], observed: Observed) -> list[Step]:
    """Others may have waited for this profile to listen or to go (registrations_waiting), and for nobody else."""
    return [
        UpdateRegistration(r, replace(r, status=Status.ENABLED))
        for r in sorted(shared, key=by_key)
        if r.status is Status.DISABLED and r.key in observed.users and r.key not in observed.deaf
        if r.key in observed.recorded and observed.recorded[r.key].status is Status.ENABLED
    ]


def _attached_first(retire: tuple[Registration, ...], observed: Observed) -> list[Registration]:
    """The order in which to unregister: rules of a namespace that is gone may be there still, and would be idle then.

    Those that they attach are refused, and after that no other is tried (execute.py, _Hazards).
    """
    target = observed.applied.target if observed.applied else None
    if target is None or not target.attaches_by_iptables or not observed.idles_iptables:
        return list(retire)
    attached = {attachment.key for attachment in target.attachments}
    return sorted(retire, key=lambda registration: registration.key not in attached)


def _apply_steps(
    target: Target,
    observed: Observed,
    registrations: RegistrationPlan,
    processes: ProcessPlan,
    stand_in: StandIn | None,
    modules: tuple[str, ...],
    rules_reason: str,
) -> tuple[Step, ...]:
    leaving = registrations.leaving
    stopped = {p.name for p in processes.stop}
    started = {launch.spec.name for launch in processes.start}
    stood_in = {r.key for r in stand_in.served} if stand_in else set()
    drained_later = stand_in.numbers.keys() if stand_in else set()
    quiet = _to_quieten(target, observed, registrations, stopped, but=stood_in)
    disabled = {r.key for r in quiet}
    waiting = tuple(sorted(({r.queue_num for r in quiet} & {q.queue_num for q in observed.queues}) - drained_later))
    must_drain = bool(waiting) and bool(stopped or registrations.replace)
    fresh = (*registrations.create, *(after for _, after in registrations.replace))
    held, finals = _value_updates(tuple(u for u in registrations.update if u[0].key not in stood_in), disabled)
    switch = stand_in.switch if stand_in else ()
    kept_before = _keep(target, observed, fresh, quiet, [], started | stopped) if stand_in else []
    kept = _keep(target, observed, fresh, quiet, [*held, *switch], started | stopped)
    unload, load = _rules_steps(target, observed, registrations, rules_reason)
    others = [RemoveRules(loaded_rules(x, observed, target.profile)) for x in other_listings(target.rules, observed)]
    is_replacing = bool(registrations.replace)
    surplus = [StopProcess(p, None) for p in processes.stop_last]
    is_told_otherwise = target.reconcile is not observed.reconciles
    unqueued = _drain(_rule_queues(observed) - {n for queue in target.rule_queues for n in queue.queues})
    return (
        *(LoadModule(m) for m in modules),
        *_disable(quiet),
        *([DrainQueues(waiting)] if must_drain else []),
        *(unload if is_replacing else []),
        *(_delete(r) for r, _ in registrations.replace),
        *(CreateRegistration(replace(r, status=Status.DISABLED)) for r in fresh),
        *processes.succeed,
        *(stand_in.take_over(kept_before) if stand_in else ()),
        *held,
        *kept,
        *(StopProcess(p, None) for p in processes.stop_first),
        *(StartProcess(launch) for launch in processes.start),
        *kept,
        *(WatchProcess(launch, seen) for launch, seen in processes.watch),
        *(stand_in.switch_back(registrations.update) if stand_in else ()),
        *_enable(target, {r.key for r in fresh} | disabled | set(finals)),
        *([] if is_replacing else unload),
        *load,
        *(step for step in others if step not in unload),
        *(unqueued if surplus else []),
        *surplus,
        *(step for begun in processes.succeed for step in _leave_queues(begun, observed)),
        *(stand_in.leave() if stand_in else ()),
        *_enable_for_others(target, leaving, quiet),
        *(_delete(r) for r in leaving.retire),
        *([SetReconcile(target.profile, target.reconcile)] if is_told_otherwise else []),
    )


def _leave_queues(begun: SucceedProcess, observed: Observed) -> list[Step]:
    """Let go of the queues that a process served before, now that nothing comes to them any more."""
    left, queues = surplus_queues(begun, observed), begun.after.spec.queues
    return [DrainQueues(left), ServeQueues(begun.after, (*queues, *left), queues)] if left else []


def _enable_for_others(target: Target, leaving: Leaving, quiet: list[Registration]) -> list[Step]:
    """Others go on with what this profile does not need any more: disabled only while its own rules attached it."""
    mine = {r.key for r in (*target.registrations, *target.stock, *leaving.retire, *leaving.disable)}
    others = [r for r in quiet if r.key not in mine and r.status is Status.ENABLED]
    return [UpdateRegistration(replace(r, status=Status.DISABLED), r) for r in others]


def _to_quieten(
    target: Target, observed: Observed, registrations: RegistrationPlan, stopped: set[str], *, but: set[HelperKey]
) -> list[Registration]:
    """Live registrations to disable first: their listener stops, and nobody stands in for it, or they are to go."""
    live = {r.key: r for r in observed.registrations}
    leaving = registrations.leaving
    going = (*(before for before, _ in registrations.replace), *leaving.retire, *leaving.disable)
    served = _served(target, observed, stopped) - but
    return [live[key] for key in sorted(served | {r.key for r in going}) if key in live]


def _rules_steps(
    target: Target, observed: Observed, registrations: RegistrationPlan, reason: str
) -> tuple[list[Step], list[Step]]:
    """How to unload the rules, where they hold on to a helper that was or will be unregistered, and how to load them.

    Replaced in place, a table keeps its helper objects, and on 7.3 those would go on attaching the helper that is gone.
    Rules that another backend wrote hold on as well. Where rules queue, they are flushed first: a table that is removed
    takes the packets that wait with it.
    """
    before = live_listing(target.rules, observed)
    loaded = None if before is None else loaded_rules(before, observed, target.profile)
    made = {r.key for r in (*registrations.create, *(after for _, after in registrations.replace))}
    forgetful = observed.idles_iptables and bool(registrations.replace)
    holding = [
        loaded_rules(listing, observed, target.profile)
        for listing in observed.listings
        if (observed.stale | made) & listing.helpers or (forgetful and not listing.backend.is_nftables)
    ]
    drain = _drain(_rule_queues(observed)) if holding else []
    unload = [*([*map(FlushRules, holding), *drain] if drain else []), *map(RemoveRules, holding)]
    if loaded in holding:
        return unload, [LoadRules(None, target.rules)]
    return unload, [LoadRules(loaded, target.rules)] if reason else []


def _keep(
    target: Target,
    observed: Observed,
    fresh: tuple[Registration, ...],
    quiet: list[Registration],
    held: list[Step],
    names: set[str],
) -> list[Step]:
    """The registrations of processes that are stopped or started, as they are then; none if no process is touched.

    An engine writes into its stock ones; the supervisor of one that fails to start disables all, shared ones too.
    """
    targets = [target, *([observed.applied.target] if observed.applied else [])]
    keys = {key for t in targets for spec in t.processes if spec.name in names for key in spec.keys}
    now = {r.key: r for r in observed.registrations}
    now |= {r.key: replace(r, status=Status.DISABLED) for r in (*quiet, *fresh)}
    now |= {step.after.key: step.after for step in held if isinstance(step, UpdateRegistration)}
    kept = tuple(now[key] for key in sorted(keys) if key in now)
    return [KeepRegistrations(kept)] if kept else []


def _rule_queues(observed: Observed) -> set[int]:
    """Queues with a listener that the rules of this profile fill now."""
    queues = observed.applied.target.rule_queues if observed.applied else ()
    return {number for queue in queues for number in queue.queues} & {row.queue_num for row in observed.queues}


def _drain(queues: set[int]) -> list[Step]:
    return [DrainQueues(tuple(sorted(queues)))] if queues else []


def _delete(registration: Registration) -> Step:
    return DeleteRegistration(replace(registration, status=Status.DISABLED))


def _served(target: Target, observed: Observed, names: set[str]) -> set[HelperKey]:
    """Keys whose listener is stopped by this plan: they are disabled first, or new connections would be blocked."""
    specs = (*target.processes, *(observed.applied.target.processes if observed.applied else ()))
    keys = {key for spec in specs if spec.name in names for key in spec.keys}
    return keys | used_here(observed) if names - {spec.name for spec in specs} else keys


def _disable(registrations: Iterable[Registration]) -> list[Step]:
    return [
        UpdateRegistration(r, replace(r, status=Status.DISABLED)) for r in registrations if r.status is Status.ENABLED
    ]


def _value_updates(
    updates: tuple[tuple[Registration, Registration], ...], disabled: set[HelperKey]
) -> tuple[list[Step], dict[HelperKey, Registration]]:
    """Updates of values: at once in place, or with the status held disabled where a process is about to be replaced."""
    steps: list[Step] = []
    finals: dict[HelperKey, Registration] = {}
    for before, after in updates:
        if before.key in disabled:
            now = replace(before, status=Status.DISABLED)
            then = replace(after, status=Status.DISABLED)
            steps += [UpdateRegistration(now, then)] if now != then else []
            finals[after.key] = after
        elif before.status is Status.DISABLED and after.status is Status.ENABLED:
            finals[after.key] = after
            then = replace(after, status=Status.DISABLED)
            steps += [UpdateRegistration(before, then)] if before != then else []
        else:
            steps.append(UpdateRegistration(before, after))
    return steps, finals


def _enable(target: Target, pending: set[HelperKey]) -> list[Step]:
    """Enable what must be enabled, now that its listener is there."""
    return [
        UpdateRegistration(replace(wanted, status=Status.DISABLED), wanted)
        for wanted in target.registrations
        if wanted.status is Status.ENABLED and wanted.key in pending
    ]


def relaunchable(plan: Plan, launch_of: Callable[[ProcessSeen], Launch | None]) -> Plan:
    """The same plan whose steps know how to start a process again, for undoing; `launch_of` asks the ledger."""

    def known(step: Step) -> Step:
        match step:
            case StopProcess(process, launch):
                return StopProcess(process, launch or launch_of(process))
            case SucceedProcess(_, after, process):
                return SucceedProcess(launch_of(process), after, process)
            case _:
                return step

    return replace(plan, steps=tuple(map(known, plan.steps)))
