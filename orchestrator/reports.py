"""What the use cases say: how they speak while they work, and what they answer in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.errors import RefusedError
from orchestrator.execute import Outcome
from orchestrator.state import Applied, Observed, Owner, Pending, Plan, Refusal, Wanted

RELATED_RULE = "ct state established,related accept"


class PlanRefusedError(RefusedError):
    """The plan must not run; every reason is in `refusals`."""

    def __init__(self, refusals: tuple[Refusal, ...]) -> None:
        self.refusals = refusals
        first = refusals[0]
        super().__init__(first.what, where=first.where, hint=first.hint)


@dataclass(frozen=True, slots=True)
class Talk:
    """How a use case speaks while it works: steps as they end, warnings, and a question that is answered yes or no.

    `interrupted` returns the number of a signal that asked to stop, or 0.
    """

    step: Callable[[Outcome], None]
    warn: Callable[[str], None]
    confirm: Callable[[Plan, str], bool]
    interrupted: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Trial:
    """An apply that is undone after `within_s` seconds unless somebody confirms it.

    `guard` starts who undoes it then, and raises OrchError if that fails. `accepts_loss` is for connections: nothing
    gives them back their helper.
    """

    within_s: float
    guard: Callable[[], None]
    accepts_loss: bool = False

    def begin(self, wanted: Wanted, prior: Applied | None, *, now_s: float) -> Pending:
        return Pending(wanted.owner, wanted.source, prior, self.within_s, now_s + self.within_s)


def worth_trying(trial: Trial | None, wanted: Wanted, plan: Plan, observed: Observed) -> Trial | None:
    """The trial, None where it would return to the same. Raises RefusedError for what could not be undone."""
    applied = observed.applied
    if trial is None or plan.is_empty or (applied and applied.target == wanted.target):
        return None
    if plan.cut and not trial.accepts_loss:
        raise RefusedError(
            f"live connections would lose their helper ({plan.cut}), which cannot be undone",
            hint="--accept-connection-loss if that is meant",
        )
    if applied is None and (observed.listings or observed.processes):
        raise RefusedError(
            "the ledger does not know what is here already, so it could not be brought back",
            hint="apply without --confirm-within, or tear it down before",
        )
    return trial


@dataclass(frozen=True, slots=True)
class Difference:
    """What diff shows: the plan, the texts of the rules before and after, and what somebody else changed in them."""

    owner: Owner
    source: str
    plan: Plan
    loaded_documents: str
    wanted_documents: str
    baseline_listing: str
    live_listing: str


@dataclass(frozen=True, slots=True)
class Report:
    """How an apply or a teardown ended. `leftovers` is what a teardown could not take away.

    `is_forgotten` tells that the ledger alone still knew the profile, `pending` that it has to be confirmed.
    """

    plan: Plan
    declined: bool = False
    leftovers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_forgotten: bool = False
    pending: Pending | None = None


@dataclass(frozen=True, slots=True)
class TeardownReport:
    """One report per profile, and who else has something applied that was not asked for."""

    reports: tuple[Report, ...]
    others: tuple[Owner, ...]
