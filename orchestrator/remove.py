"""Take away what orch owns for one profile in one namespace, as far as that goes."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator import look
from orchestrator.errors import Interrupted, OrchError, RollbackError
from orchestrator.execute import EXPECTED, Execution, timed
from orchestrator.model import Netns, Target
from orchestrator.observe import or_nothing
from orchestrator.ports import Host
from orchestrator.release import drops_waiting_packets
from orchestrator.reports import Report
from orchestrator.state import DeleteRegistration, DrainQueues, Owner, Plan
from orchestrator.work import Work


def remove(work: Work, owner: Owner, target: Target | None = None) -> Report:
    """Nobody is asked. `target` is what the profile's file says, for when the ledger is lost."""
    observed, plan = look.plan_removal(work.observer, owner, target)
    for sentence in _dropped(work.system.host, plan):
        work.talk.warn(sentence)
    plan = look.undoable(plan, observed)
    half_done = work.ledger.unsettled(owner)
    tx = work.ledger.begin("teardown", owner, plan.steps, instead_of=half_done)
    # Undone, it would be half-done as before, and nobody would know: so what was begun is finished.
    interrupted = (lambda: 0) if half_done else work.talk.interrupted
    execution = Execution(work.system, work.ledger, plan, tx, work.talk.step, interrupted)
    try:
        leftovers = execution.run_all()
    except RollbackError:
        raise
    except OrchError:
        work.settle_undone(tx)
        raise
    # Before the ledger forgets the profile: what a command that is killed here leaves is taken up by the next.
    leftovers = leftovers or work.clean_up(owner)
    if leftovers:
        if observed.applied is not None:
            work.ledger.settle(tx)  # the ledger knows the profile: status shows what is left, and teardown tries again
        return Report(plan, leftovers=leftovers, notes=plan.kept)
    work.ledger.settle_removed(tx, owner, live=work.live_keys())
    return Report(plan, notes=plan.kept, is_forgotten=plan.is_empty and observed.applied is not None)


def remove_each(work: Work, owners: Sequence[Owner], target: Target | None) -> tuple[Report, ...]:
    """One after the other; each is a transaction of its own. Nobody is asked.

    Raises what the first one raises, and RollbackError, which says what is removed and stays so, from a later one.
    """
    reports: list[Report] = []
    for owner in owners:
        try:
            reports.append(remove(work, owner, target))
        except OrchError as error:
            left = error.leftovers if isinstance(error, RollbackError) else ()
            before = tuple(line for one in zip(owners, reports, strict=False) for line in _became(*one))
            if not before:
                raise
            raise RollbackError(error, (*left, *before)) from error
    return tuple(reports)


def _became(owner: Owner, report: Report) -> tuple[str, ...]:
    if report.leftovers or report.plan.is_empty:
        return report.leftovers
    return (f"{owner} is removed, and stays so",)


def remove_remade(work: Work) -> None:
    """Take away what profiles have on the host whose namespace is gone, and its name another one's by now.

    A supervisor does so as soon as the name is deleted; a profile whose helpers are all the kernel's has none.
    """
    for owner in work.ledger.owners():
        if not work.observer.is_remade(owner.netns):
            continue
        work.talk.warn(f"netns {owner.netns} was made anew, and profile {owner.profile} is gone with the old one")
        try:
            leftovers = remove(work, owner).leftovers
        except Interrupted:
            raise
        except EXPECTED as error:
            leftovers = (str(error),)
        for sentence in leftovers:
            work.talk.warn(f"left: {sentence}")


def remove_unused(work: Work) -> None:
    """Unregister what earlier commands had to leave; what cannot be is warned of, and left to the next one."""
    host = work.system.host
    try:
        unused = work.observer.unused()
        here = host.find_netns("")
        for sentence in _drop_warnings(host, set(), here) if unused else ():
            work.talk.warn(sentence)
        for registration in unused:
            timed(DeleteRegistration(registration), work.system, here, work.talk.step)
        if unused:
            work.ledger.forget_unused(work.live_keys())
    except EXPECTED as error:
        work.talk.warn(f"what no profile uses any more stays registered: {error}")


def _dropped(host: Host, plan: Plan) -> tuple[str, ...]:
    if not any(isinstance(step, DeleteRegistration) for step in plan.steps):
        return ()
    ours = {step.registration.queue_num for step in plan.steps if isinstance(step, DeleteRegistration)}
    ours |= {number for step in plan.steps if isinstance(step, DrainQueues) for number in step.queues}
    return _drop_warnings(host, ours, plan.netns)


def _drop_warnings(host: Host, ours: set[int], there: Netns) -> tuple[str, ...]:
    """Before 7.3, unregistering a helper makes the kernel drop every packet that waits in any queue of the host.

    `ours` are queues of one namespace, which were drained.
    """
    release = host.kernel_release()
    if not drops_waiting_packets(release):
        return ()
    foreign = [
        f"queue {row.queue_num} of {host.process_name(row.port_id)} in netns {netns}"
        for netns in host.known_netns()
        for row in or_nothing(host.queues, netns)
        if not (netns.identity == there.identity and row.queue_num in ours)
    ]
    if not foreign:
        return ()
    return (f"kernel {release} drops the packets that wait in other queues of the host now: {'; '.join(foreign)}",)
