"""What happens to each registration: made, changed, replaced, adopted, retired, or left to others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from orchestrator.model import HelperKey, Registration, Status, Target
from orchestrator.release import stays_for
from orchestrator.state import Action, Change, Observed, Refusal, Scope


@dataclass(frozen=True, slots=True)
class Leaving:
    """Registrations that a profile needs no more: those to remove, those to disable only, and why others stay."""

    retire: tuple[Registration, ...]
    disable: tuple[Registration, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RegistrationPlan:
    """What happens to each registration, by kind; every list is in key order."""

    create: tuple[Registration, ...]
    update: tuple[tuple[Registration, Registration], ...]
    replace: tuple[tuple[Registration, Registration], ...]
    leaving: Leaving
    adopted: tuple[HelperKey, ...]
    refusals: tuple[Refusal, ...]


def plan_registrations(target: Target, observed: Observed, waiting: frozenset[HelperKey]) -> RegistrationPlan:
    """`waiting` are registrations that stay disabled (registrations_waiting)."""
    live = {r.key: r for r in observed.registrations}
    create: list[Registration] = []
    update: list[tuple[Registration, Registration]] = []
    replaced: list[tuple[Registration, Registration]] = []
    adopted: list[HelperKey] = []
    refusals: list[Refusal] = []
    stock = {r.key for r in target.stock}
    for wanted in sorted((*target.registrations, *target.stock), key=by_key):
        seen = live.get(wanted.key)
        if seen is None:
            refusals += _refuse_create(wanted, observed)
            create.append(wanted)
            continue
        wanted = _as_seen(wanted, seen) if wanted.key in stock else wanted
        refusal = _refuse_existing(wanted, seen, observed, is_stock=wanted.key in stock)
        if refusal is not None:
            refusals.append(refusal)
            continue
        if wanted.key not in observed.recorded:
            adopted.append(wanted.key)
        if wanted.key in waiting:
            wanted = replace(wanted, status=Status.DISABLED)
        if seen == wanted:
            continue
        (update if seen.can_become(wanted) else replaced).append((seen, wanted))
    wanted_keys = {r.key for r in (*target.registrations, *target.stock)}
    surplus = [live[key] for key in sorted(used_here(observed)) if key in live and key not in wanted_keys]
    refusals += [_refuse_anew(wanted, observed) for _, wanted in replaced if observed.would_idle]
    leaving = leaving_of(surplus, observed, is_by_iptables=target.attaches_by_iptables)
    return RegistrationPlan(tuple(create), tuple(update), tuple(replaced), leaving, tuple(adopted), tuple(refusals))


def registrations_waiting(target: Target, observed: Observed) -> frozenset[HelperKey]:
    """Those that are not to be enabled yet: another namespace uses them, and nobody listens there.

    An enabled helper without a listener blocks every new connection. Whoever is the last to have a listener enables it.
    """
    disabled = {r.key for r in observed.registrations if r.status is Status.DISABLED}
    wanted = {r.key for r in target.registrations if r.status is Status.ENABLED}
    return frozenset(wanted & disabled & observed.deaf.keys())


def say_waiting(waiting: Iterable[HelperKey], observed: Observed) -> tuple[str, ...]:
    """A sentence for each, with what to do."""
    return tuple(
        f"{key} stays disabled: {owner} uses it, and nobody listens on its queue there; "
        "apply that first, or tear it down"
        for key in sorted(waiting)
        for owner in observed.deaf[key]
    )


def by_key(registration: Registration) -> HelperKey:
    return registration.key


def _as_seen(stock: Registration, seen: Registration) -> Registration:
    """A stock registration counts as right with whatever its engine wrote into it, as long as it is disabled."""
    return replace(seen, status=Status.DISABLED) if seen.can_become(stock) else stock


def used_here(observed: Observed) -> set[HelperKey]:
    """Keys that this profile uses in this namespace: from the ledger, and from its own live rules if that is lost."""
    applied = observed.applied
    recorded = {r.key for r in applied.registrations} if applied else set()
    return recorded | {key for listing in observed.listings for key in listing.helpers}


def registrations_of(
    observed: Observed, target: Target | None, half_done: Sequence[Registration]
) -> tuple[Registration, ...]:
    """The live registrations that belong to a profile: by the ledger; else by its file and its own rules.

    Without either, a stock registration of ours is known by carrying, disabled, the queue number of an attached one.
    `half_done` are those that a killed command made, or was about to take away.
    """
    half = _exactly(half_done, observed)
    if observed.applied is not None:
        # With those that no profile uses any more: an earlier teardown had to leave them.
        unused = [r for key, r in observed.recorded.items() if key not in observed.users]
        return tuple({r.key: r for r in (*half, *unused, *observed.applied.registrations)}.values())
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
    exact = _exactly((*target.registrations, *target.stock), observed) if target else []
    return tuple({r.key: r for r in (*half, *ours, *stock, *exact)}.values())


def _exactly(wanted: Sequence[Registration], observed: Observed) -> list[Registration]:
    """Those live registrations that are as wanted, but for their status."""
    quiet = {replace(r, status=Status.DISABLED) for r in wanted}
    return [r for r in observed.registrations if replace(r, status=Status.DISABLED) in quiet]


def leaving_of(candidates: list[Registration], observed: Observed, *, is_by_iptables: bool = False) -> Leaving:
    """What becomes of registrations that this profile needs no more: others may use them, or name them in rules.

    Where any iptables rules would be idle after it, none is unregistered before those are gone.
    """
    idle = (*(["this profile"] if is_by_iptables and observed.idles_iptables else []), *observed.would_idle)
    retire: list[Registration] = []
    disable: list[Registration] = []
    kept: list[str] = []
    for registration in candidates:
        others = observed.users.get(registration.key, ())
        if others:
            kept.append(f"{registration.key} stays: used by {', '.join(map(str, others))}")
        elif registration.key.name in observed.foreign_references:
            kept.append(f"{registration.key} stays, disabled: rules that orch did not write attach it")
            disable.append(registration)
        elif idle:
            kept.append(stays_for(registration.key, idle))
            disable.append(registration)
        else:
            retire.append(registration)
    return Leaving(tuple(retire), tuple(disable), tuple(kept))


def _refuse_anew(wanted: Registration, observed: Observed) -> Refusal:
    return Refusal(
        f"helper {wanted.key} has to be registered anew, which on this kernel would make iptables rules idle: those of "
        + ", ".join(observed.would_idle),
        hint="remove those first, or give the helper another name (name:)",
        where="the helper registry is host-wide",
    )


def _refuse_create(wanted: Registration, observed: Observed) -> list[Refusal]:
    if not observed.has_cthelper:
        return [
            Refusal(
                f"cannot register helper {wanted.key}: this kernel lacks nfnetlink_cthelper",
                hint="boot a kernel that has it (Debian's do), or use engine: kernel",
            )
        ]
    if (wanted.key.name, wanted.key.l4proto) not in observed.kernel_helpers:
        return []
    return [
        Refusal(
            f"cannot register helper {wanted.key}: the in-kernel helper of that name is loaded",
            hint="unload its module (lsmod | grep nf_conntrack), or use engine: kernel"
            " (conntrackd insists on that name even when rules attach another)",
            where="the helper registry is host-wide",
        )
    ]


def _refuse_existing(wanted: Registration, seen: Registration, observed: Observed, *, is_stock: bool) -> Refusal | None:
    others = observed.users.get(wanted.key, ())
    here = [owner for owner in others if owner.netns.identity == observed.netns.identity]
    if here and not is_stock:
        return Refusal(
            f"helper {wanted.key} is already used in this namespace by profile {here[0].profile}",
            hint="one queue has one listener in a namespace: put both into one profile, or tear the other down",
        )
    recorded = observed.recorded.get(wanted.key)
    same = replace(seen, status=wanted.status) == wanted
    if recorded is None and not same:
        return Refusal(
            f"helper {wanted.key} is registered already, not by orch, and differs: {differences(seen, wanted)}",
            hint="whoever registered it must remove it, or give the helper another name (name:)",
            where="the helper registry is host-wide",
        )
    if recorded is not None and others and not is_stock and recorded != wanted:
        return Refusal(
            f"helper {wanted.key} is shared with {others[0]}, which wants it otherwise: "
            f"{differences(recorded, wanted)}",
            hint="give the helper a name of its own in one of the profiles (name:), or make both equal",
            where="the helper registry is host-wide",
        )
    return None


def differences(seen: Registration, wanted: Registration) -> str:
    """What would change in a registration, as `queue 5 -> 6; expect_max 1 -> 4`; empty if nothing."""
    parts: list[str] = []

    def compare(name: str, before: object, after: object) -> None:
        if before != after:
            parts.append(f"{name} {before} -> {after}")

    compare("queue", seen.queue_num, wanted.queue_num)
    compare("status", seen.status, wanted.status)
    compare("priv_data_len", seen.priv_data_len, wanted.priv_data_len)
    names = [p.name for p in seen.policies], [p.name for p in wanted.policies]
    compare("policies", ", ".join(names[0]), ", ".join(names[1]))
    if names[0] == names[1]:
        for before, after in zip(seen.policies, wanted.policies, strict=True):
            compare(f"policy {before.name}: expect_max", before.expect_max, after.expect_max)
            compare(f"policy {before.name}: expect_timeout", before.expect_timeout_s, after.expect_timeout_s)
    return "; ".join(parts)


def registration_changes(registrations: RegistrationPlan, observed: Observed) -> Iterable[Change]:
    for r in registrations.create:
        yield Change(Action.CREATE, Scope.HOST, str(r.key), f"queue {r.queue_num}; {'; '.join(map(str, r.policies))}")
    for before, after in registrations.update:
        yield Change(Action.UPDATE, Scope.HOST, str(after.key), differences(before, after))
    for before, after in registrations.replace:
        yield Change(
            Action.REPLACE, Scope.HOST, str(after.key), differences(before, after), effect=_effect(observed, after.key)
        )
    for r in registrations.leaving.retire:
        yield Change(Action.DELETE, Scope.HOST, str(r.key), "", effect=_effect(observed, r.key))


def _effect(observed: Observed, key: HelperKey) -> str:
    count = _connections(observed, key.name)
    if count == 1:
        return "1 live connection loses this helper"
    return f"{count} live connections lose this helper" if count else ""


def connections_cut(observed: Observed, keys: list[HelperKey]) -> int:
    """Live connections, in all namespaces, that lose their helper when these are unregistered."""
    return sum(_connections(observed, name) for name in {key.name for key in keys})


def _connections(observed: Observed, name: str) -> int:
    return observed.connections.get(name, 0) + observed.connections_elsewhere.get(name, 0)
