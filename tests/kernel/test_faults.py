"""orch is killed on the running kernel: the next command undoes or finishes it, and nothing is blocked meanwhile.

All kinds of plan and all other faults are tried on the fake (tests/faults.py). Here it is one call of each kind, for
which the kernels take turns; ORCH_FAULTS=all (make soak-all) takes every call, before and after.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

from lab.topology import ROUTER
from orchestrator.kernel.netns import find
from orchestrator.model import Backend, Status
from tests.hosts import Harness
from tests.kernel.conftest import turns
from tests.killed import Death, Moment
from tests.reports import REPORTS
from tests.waiting import until

FIRST = "profile: killed\nhelpers:\n  ftp: {queueing: registration}\n"
CHANGED = "profile: killed\nhelpers:\n  ftp: {queueing: registration, queue: 77, guard: {source: any}}\n"
MORTAL = "registration, process: {restart: never}"
Act = Callable[[Harness], object]
FIGURES = REPORTS.setdefault("fault matrix: SIGKILL on this kernel", [])


def test_what_a_killed_orch_leaves_is_undone_or_finished(orch: Harness) -> None:
    acts: dict[str, Act] = {
        "apply": lambda harness: harness.apply(FIRST, ROUTER),
        "update": lambda harness: harness.apply(CHANGED, ROUTER),
        "teardown": lambda harness: harness.teardown("killed", ROUTER),
    }
    empty, calls, states = dump(orch), {}, {}
    for name, act in acts.items():
        calls[name] = recorded(orch, act)
        states[name] = dump(orch)
    assert states["teardown"] == empty
    for place, moment in points(calls["apply"]):
        killed(orch, acts["apply"], place, moment)
        assert settled(orch) == empty, (calls["apply"][place - 1], moment)
    acts["apply"](orch)
    for place, moment in points(calls["update"]):
        killed(orch, acts["update"], place, moment)
        assert settled(orch) == states["apply"], (calls["update"][place - 1], moment)
    for place, moment in points(calls["teardown"]):
        acts["apply"](orch)
        killed(orch, acts["teardown"], place, moment)
        assert settled(orch) == empty, (calls["teardown"][place - 1], moment)
    assert not orch.status().unsettled
    FIGURES.append(f"{sum(len(list(points(one))) for one in calls.values())} points tried")


def test_a_helper_that_dies_before_a_killed_update_is_settled_blocks_nothing(orch: Harness) -> None:
    """Its supervisor has disabled the registrations, and undoing the update leaves them so."""

    def update(harness: Harness) -> object:
        return harness.apply(FIRST.replace("registration", f"{MORTAL}, policies: {{ftp: {{expect_max: 7}}}}"), ROUTER)

    orch.apply(FIRST.replace("registration", MORTAL), ROUTER)
    before = orch.system.registry.dump()
    killed(orch, update, 1, Moment.AFTER)
    assert orch.system.registry.dump() != before
    (process,) = orch.system.processes.running()
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: all(r.status is Status.DISABLED for r in orch.system.registry.dump()), "disabled")
    orch.teardown("nobody", ROUTER)
    assert orch.system.registry.dump() == tuple(replace(r, status=Status.DISABLED) for r in before)
    orch.apply(FIRST.replace("registration", MORTAL), ROUTER)
    assert orch.system.registry.dump() == before


def points(calls: list[str]) -> Iterator[tuple[int, Moment]]:
    """Where to kill: at the first call of a kind, before and after by turns, or wherever it is possible."""
    if os.environ.get("ORCH_FAULTS") == "all":
        yield from ((place, moment) for place in range(1, len(calls) + 1) for moment in Moment)
        return
    kinds = [(calls.index(name) + 1, list(Moment)[number % 2]) for number, name in enumerate(dict.fromkeys(calls))]
    yield from turns(kinds)


def recorded(orch: Harness, act: Act) -> list[str]:
    """The calls of a command that change something."""
    death = Death()
    act(replace(orch, system=death.awaiting(orch.system)))
    return death.calls


def killed(orch: Harness, act: Act, place: int, moment: Moment) -> None:
    """Run a command in a child of this process, which is killed at that place; right after it nothing is blocked."""
    pid = os.fork()
    if not pid:
        try:
            act(replace(orch, system=Death(place, moment).awaiting(orch.system)))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not deaf(orch)


def settled(orch: Harness) -> str:
    """What there is once any other command has come by, and looking says that nothing is half-done."""
    orch.teardown("nobody", ROUTER)
    return dump(orch)


def deaf(orch: Harness) -> list[str]:
    """Enabled registrations that our rules attach although nobody listens on their queue."""
    netns, system = find(ROUTER), orch.system
    listing = system.rules[Backend.NFTABLES].listing(netns, "killed")
    attached = listing.helpers if listing else frozenset()
    bound = {row.queue_num for row in system.host.queues(netns)}
    return [
        str(registration)
        for registration in system.registry.dump()
        if registration.key in attached
        and registration.status is Status.ENABLED
        and registration.queue_num not in bound
    ]


def dump(orch: Harness) -> str:
    """All that orch makes, without numbers that differ each time."""
    netns, system = find(ROUTER), orch.system
    listings = [backend.listing(netns, "killed") for backend in system.rules.values()]
    lines = [str(registration) for registration in system.registry.dump()]
    lines += [f"{listing.backend}: {listing.text}" for listing in listings if listing is not None]
    lines += [f"queue {row.queue_num}" for row in system.host.queues(netns)]
    lines += [f"{seen.name} of {seen.profile}: {seen.digest}, {seen.watched}" for seen in system.processes.running()]
    return "\n".join(lines)
