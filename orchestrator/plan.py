"""Desired and observed state -> a plan: pure, total, deterministic, and empty when nothing differs.

The order of steps is the one that lost no packet under load: listeners before enabled registrations, registrations
before the rules that name them; the batch of rules is the commit point, what nothing refers to goes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from orchestrator.model import HelperKey, Registration, Status, Target
from orchestrator.plan_processes import ProcessPlan, plan_processes
from orchestrator.plan_registrations import (
    RegistrationPlan,
    by_key,
    connections_cut,
    leaving_of,
    plan_registrations,
    registration_changes,
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
from orchestrator.ports import Launch, ProcessSeen
from orchestrator.state import (
    Action,
    Change,
    CreateRegistration,
    DeleteRegistration,
    DrainQueues,
    FlushRules,
    LoadModule,
    LoadRules,
    Observed,
    Owner,
    Plan,
    RemoveRules,
    Scope,
    StartProcess,
    Step,
    StopProcess,
    UpdateRegistration,
    WatchProcess,
    rules_name,
)


def plan_apply(target: Target, launches: tuple[Launch, ...], observed: Observed, owner: Owner) -> Plan:
    """What makes `target` true in the observed namespace. `launches` are its processes with their files."""
    registrations = plan_registrations(target, observed)
    processes = plan_processes(launches, observed)
    stale_rules = {r.key for r in registrations.create} | {after.key for _, after in registrations.replace}
    rules_reason = rules_reason_of(target.rules, observed, attached={a.key for a in target.attachments} & stale_rules)
    refusals = (
        *registrations.refusals,
        *processes.refusals,
        *refuse_modules(target, observed),
        *refuse_neighbours(target, observed),
        *refuse_foreign_table(observed),
    )
    modules = tuple(m for m in target.modules if m not in observed.modules)
    steps = _apply_steps(target, observed, registrations, processes, modules, rules_reason)
    cut = connections_cut(observed, [before.key for before, _ in registrations.replace])
    return Plan(
        profile=owner.profile,
        netns=observed.netns,
        changes=(
            *(Change(Action.CREATE, Scope.MODULE, m, "stays loaded") for m in modules),
            *registration_changes(registrations, observed),
            *processes.changes,
            *rules_changes(target.rules, observed, rules_reason),
        ),
        steps=steps,
        refusals=refusals,
        adopted=registrations.adopted,
        cut=cut,
        kept=registrations.leaving.kept,
    )


def plan_teardown(observed: Observed, owner: Owner, mine: Iterable[Registration]) -> Plan:
    """What takes away all that the profile owns here. `mine` are the registrations it uses, as they were applied."""
    live = {r.key: r for r in observed.registrations}
    leaving = leaving_of([live[r.key] for r in sorted(mine, key=by_key) if r.key in live], observed)
    retire = leaving.retire
    before = [loaded_rules(listing, observed, owner.profile) for listing in observed.listings]
    stops = tuple(StopProcess(p, None) for p in observed.processes)
    waiting = tuple(sorted({r.queue_num for r in retire} & {q.queue_num for q in observed.queues}))
    steps: tuple[Step, ...] = (
        *(FlushRules(rules) for rules in before),
        *_disable((*retire, *leaving.disable)),
        *((DrainQueues(waiting),) if waiting and stops else ()),
        *(RemoveRules(rules) for rules in before),
        *(DeleteRegistration(replace(r, status=Status.DISABLED)) for r in retire),
        *stops,
    )
    changes = (
        *(Change(Action.DELETE, Scope.RULES, rules_name(rules), "") for rules in before),
        *(Change(Action.DELETE, Scope.HOST, str(r.key), "") for r in retire),
        *(Change(Action.DELETE, Scope.PROCESS, p.name, f"pid {p.pid}") for p in observed.processes),
    )
    return Plan(
        profile=owner.profile,
        netns=observed.netns,
        changes=changes,
        steps=steps,
        cut=connections_cut(observed, [r.key for r in retire]),
        kept=leaving.kept,
    )


def _apply_steps(
    target: Target,
    observed: Observed,
    registrations: RegistrationPlan,
    processes: ProcessPlan,
    modules: tuple[str, ...],
    rules_reason: str,
) -> tuple[Step, ...]:
    live = {r.key: r for r in observed.registrations}
    stopped = {p.name for p, _ in processes.stop}
    started = {launch.spec.name for launch in processes.start}
    served = _served(target, observed, stopped)
    quiet = [live[key] for key in sorted(served) if key in live]
    quiet += [before for before, _ in registrations.replace if before.key not in served]
    leaving = registrations.leaving
    quiet += [r for r in (*leaving.retire, *leaving.disable) if r.key not in served]
    disabled = {r.key for r in quiet}
    waiting = tuple(sorted({r.queue_num for r in quiet} & {q.queue_num for q in observed.queues}))
    before = live_listing(target.rules, observed)
    loaded = None if before is None else loaded_rules(before, observed, target.profile)
    must_unload = bool(registrations.replace) and loaded is not None
    relaunch = {launch.spec.name: launch for launch in processes.start}

    early: list[Step] = [LoadModule(m) for m in modules]
    early += _disable(quiet)
    early += [DrainQueues(waiting)] if waiting and (stopped or registrations.replace) else []
    early += [RemoveRules(loaded)] if must_unload and loaded is not None else []
    early += [DeleteRegistration(replace(r, status=Status.DISABLED)) for r, _ in registrations.replace]
    fresh = (*registrations.create, *(after for _, after in registrations.replace))
    early += [CreateRegistration(replace(r, status=Status.DISABLED)) for r in fresh]
    early += [StopProcess(p, None) for p, _ in processes.stop if p.name in relaunch]
    held, finals = _value_updates(registrations.update, disabled)
    early += held
    early += [StartProcess(launch) for launch in processes.start]
    early += [WatchProcess(launch, seen) for launch, seen in processes.watch]
    early += _final_statuses(target, {r.key for r in fresh} | disabled | set(finals), started)
    commit: list[Step] = (
        [LoadRules(None if must_unload else loaded, target.rules)] if rules_reason or must_unload else []
    )
    late: list[Step] = [
        RemoveRules(loaded_rules(r, observed, target.profile)) for r in other_listings(target.rules, observed)
    ]
    late += [DeleteRegistration(replace(r, status=Status.DISABLED)) for r in leaving.retire]
    late += [StopProcess(p, None) for p, _ in processes.stop if p.name not in relaunch]
    return (*early, *commit, *late)


def _served(target: Target, observed: Observed, names: set[str]) -> set[HelperKey]:
    """Keys whose listener is stopped by this plan: they are disabled first, or new connections would be blocked."""
    keys = {key for spec in target.processes if spec.name in names for key in spec.keys}
    if names - {spec.name for spec in target.processes}:
        keys |= used_here(observed)
    return keys


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


def _final_statuses(target: Target, pending: set[HelperKey], started: set[str]) -> list[Step]:
    """Enable what must be enabled, now that listeners are there; disable what a starting engine enabled by itself."""
    steps: list[Step] = [
        UpdateRegistration(replace(wanted, status=Status.DISABLED), wanted)
        for wanted in target.registrations
        if wanted.status is Status.ENABLED and wanted.key in pending
    ]
    by_engine = {key for spec in target.processes if spec.name in started for key in spec.keys}
    steps += [
        UpdateRegistration(replace(stock, status=Status.ENABLED), stock)
        for stock in target.stock
        if stock.key in by_engine
    ]
    return steps


def relaunchable(plan: Plan, launch_of: Callable[[ProcessSeen], Launch | None]) -> Plan:
    """The same plan whose stops know how to start the process again, for undoing; `launch_of` asks the ledger."""
    steps = tuple(
        StopProcess(step.process, launch_of(step.process)) if isinstance(step, StopProcess) else step
        for step in plan.steps
    )
    return replace(plan, steps=steps)
