"""The status of everything that is applied on this host; reads only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

from orchestrator import look
from orchestrator.errors import OrchError
from orchestrator.model import Netns
from orchestrator.observe import Observer
from orchestrator.state import Applied, Owner
from orchestrator.status import HostStatus, ProfileStatus, Waiting, lost_profile, profile_status

Connections = Callable[[Netns], Mapping[str, int] | None]


def host_status(observer: Observer, is_wanted: Callable[[Owner], bool]) -> HostStatus:
    """Every profile that is wanted, and what is not as it was applied."""
    ledger = observer.ledger
    # The table of connections is long, and several profiles may share it.
    connections = functools.cache(functools.partial(_connections, observer))
    trials = _trials(observer)
    return HostStatus(
        profiles=tuple(
            replace(
                _profile_status(observer, applied, connections),
                trial=trials.get((applied.owner.profile, applied.owner.netns.identity)),
            )
            for applied in ledger.applied()
            if is_wanted(applied.owner)
        ),
        unknown=tuple(filter(is_wanted, observer.strays())),
        unsettled=ledger.left_alone(),
        working=ledger.is_locked(),
    )


def _profile_status(observer: Observer, applied: Applied, connections: Connections) -> ProfileStatus:
    owner = observer.current(applied.owner)
    applied = replace(applied, owner=owner)
    try:
        if not observer.is_there(owner.netns):
            remedy = owner.how_to("teardown", owner.profile, state_dir=observer.ledger.directory)
            if observer.is_remade(owner.netns):
                remedy = "the next apply or teardown"
            raise OrchError(f"it is gone; {remedy} takes away what is left of it")
        observed, plan = look.plan(observer, owner, applied.target)
    except OrchError as error:
        return lost_profile(applied, "; ".join(filter(None, (error.what, error.hint))))
    seen = profile_status(applied, observed, plan, observer.system, connections(owner.netns))
    now_s, drifted = observer.system.clock.monotonic(), {change.subject for change in plan.changes}
    return replace(seen, mending=observer.ledger.mending(owner).trouble(now_s, drifted))


def _trials(observer: Observer) -> Mapping[tuple[str, str], Waiting]:
    now_s, is_watched = observer.system.clock.boottime(), observer.ledger.is_watched()
    pending = observer.ledger.pending()
    return {(p.owner.profile, p.owner.netns.identity): Waiting(p.left_s(now_s), is_watched) for p in pending}


def _connections(observer: Observer, netns: Netns) -> Mapping[str, int] | None:
    """Live connections by helper name; None where the kernel did not list them."""
    try:
        return observer.system.host.connections(netns)
    except OrchError:
        return None
