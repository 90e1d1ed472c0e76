"""What was observed of a host, and the steps that change it: the vocabulary between plan, execute and journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.model import (
    Engine,
    HelperKey,
    L4Proto,
    Listing,
    Netns,
    QueueRow,
    Registration,
    Rules,
    Status,
    Target,
)
from orchestrator.ports import Launch, ProcessSeen


@dataclass(frozen=True, slots=True)
class Owner:
    """A profile in a namespace that uses a registration."""

    profile: str
    netns: Netns

    def __str__(self) -> str:
        return f"profile {self.profile} in netns {self.netns}"


@dataclass(frozen=True, slots=True)
class HelperSummary:
    """What `status` tells of a helper without its profile: its name, who runs it, the keys that its rules attach."""

    name: str
    engine: Engine
    keys: tuple[HelperKey, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be made true for a profile in a namespace; `source` is the file that says so."""

    owner: Owner
    source: str
    target: Target
    helpers: tuple[HelperSummary, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """What the ledger keeps of an applied profile: what was made true, and how its rules listed right after loading.

    `applied_at` is in seconds of the wall clock; `tool` is the version of the program that made the listing.
    """

    owner: Owner
    source: str
    applied_at: float
    target: Target
    baseline: Listing
    tool: str
    helpers: tuple[HelperSummary, ...]

    @property
    def registrations(self) -> tuple[Registration, ...]:
        return (*self.target.registrations, *self.target.stock)

    @property
    def wanted(self) -> Wanted:
        """What must be so for this to be true again."""
        return Wanted(self.owner, self.source, self.target, self.helpers)


@dataclass(frozen=True, slots=True)
class Observed:
    """The system as it is, for one profile in one namespace. Registrations are host-wide, the rest is the namespace's.

    `users` are the *other* owners of each key; `deaf` those of them whose namespace has no listener on its queue.
    `neighbours` are other profiles in this namespace. `kernel_helpers` are the (name, l4proto) taken by loaded kernel
    modules. `foreign_references` are helper names that rules not written by orch attach.
    """

    netns: Netns
    registrations: tuple[Registration, ...]
    recorded: Mapping[HelperKey, Registration]
    users: Mapping[HelperKey, tuple[Owner, ...]]
    deaf: Mapping[HelperKey, tuple[Owner, ...]]
    listings: tuple[Listing, ...]
    foreign_table: str
    applied: Applied | None
    baseline: Listing | None
    neighbours: tuple[Applied, ...]
    processes: tuple[ProcessSeen, ...]
    queues: tuple[QueueRow, ...]
    queue_holders: Mapping[int, str]
    modules: frozenset[str]
    loadable: frozenset[str]
    kernel_helpers: frozenset[tuple[str, L4Proto]]
    foreign_references: frozenset[str]
    missing_programs: frozenset[str]
    has_cthelper: bool
    connections: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadModule:
    name: str


@dataclass(frozen=True, slots=True)
class CreateRegistration:
    registration: Registration


@dataclass(frozen=True, slots=True)
class UpdateRegistration:
    before: Registration
    after: Registration


@dataclass(frozen=True, slots=True)
class DeleteRegistration:
    registration: Registration


@dataclass(frozen=True, slots=True)
class KeepRegistrations:
    """Put back what an engine wrote into registrations: conntrackd enables its stock keys before it listens.

    It stands after a start, and, for the way back, before a stop or start; it is its own inverse.
    """

    registrations: tuple[Registration, ...]


@dataclass(frozen=True, slots=True)
class StartProcess:
    launch: Launch


@dataclass(frozen=True, slots=True)
class StopProcess:
    """`launch` starts it again when the step is undone; None where the ledger does not remember how."""

    process: ProcessSeen
    launch: Launch | None


@dataclass(frozen=True, slots=True)
class WatchProcess:
    launch: Launch
    process: ProcessSeen


@dataclass(frozen=True, slots=True)
class DrainQueues:
    """Wait until no packet waits for a verdict in these queues, at most for `within_s`."""

    queues: tuple[int, ...]
    within_s: float = 2.0


@dataclass(frozen=True, slots=True)
class LoadRules:
    before: Rules | None
    after: Rules


@dataclass(frozen=True, slots=True)
class FlushRules:
    before: Rules


@dataclass(frozen=True, slots=True)
class RemoveRules:
    before: Rules


Step = (
    LoadModule
    | CreateRegistration
    | UpdateRegistration
    | DeleteRegistration
    | KeepRegistrations
    | StartProcess
    | StopProcess
    | WatchProcess
    | DrainQueues
    | LoadRules
    | FlushRules
    | RemoveRules
)


def inverse(step: Step, netns: Netns) -> Step | None:
    """The step that leads back, None where there is nothing to undo (a loaded module stays, a drained queue too)."""
    match step:
        case CreateRegistration(registration):
            return DeleteRegistration(registration)
        case UpdateRegistration(before, after):
            return UpdateRegistration(after, before)
        case DeleteRegistration(registration):
            return CreateRegistration(registration)
        case KeepRegistrations():
            return step
        case StartProcess(launch):
            return StopProcess(
                ProcessSeen(launch.profile, netns.identity, launch.spec.name, 0, "", 0, watched=False), None
            )
        case StopProcess(_, launch):
            return None if launch is None else StartProcess(launch)
        case LoadRules(None, after):
            return RemoveRules(after)
        case LoadRules(before, after) if before is not None:
            return LoadRules(after, before)
        case FlushRules(before) | RemoveRules(before):
            return LoadRules(None, before)
        case _:
            return None


def describe(step: Step) -> str:
    """One line for a person: what the step does, in the infinitive."""
    match step:
        case LoadModule(name):
            return f"load module {name}"
        case CreateRegistration(registration):
            return f"register helper {registration.key}"
        case UpdateRegistration(before, after):
            return _describe_update(before, after)
        case DeleteRegistration(registration):
            return f"unregister helper {registration.key}"
        case KeepRegistrations():
            return "put back registrations"
        case StartProcess(launch):
            return f"start {launch.spec.name}"
        case StopProcess(process, _):
            return f"stop {process.name}"
        case WatchProcess(launch, _):
            return f"watch {launch.spec.name}"
        case DrainQueues(queues):
            return f"drain queue {', '.join(map(str, queues))}"
        case LoadRules(_, after):
            return f"load rules {rules_name(after)}"
        case FlushRules(before):
            return f"flush rules {rules_name(before)}"
        case RemoveRules(before):
            return f"remove rules {rules_name(before)}"


def _describe_update(before: Registration, after: Registration) -> str:
    if replace(before, status=after.status) == after:
        return f"{'enable' if after.status is Status.ENABLED else 'disable'} helper {after.key}"
    return f"update helper {after.key}"


def rules_name(rules: Rules | Listing, profile: str = "") -> str:
    """How people call the rules of a profile: `inet orch-NAME` or `raw orch-NAME` (iptables)."""
    name = rules.profile if isinstance(rules, Rules) else profile
    return f"inet orch-{name}" if rules.backend.is_nftables else f"raw orch-{name}"


class Action(StrEnum):
    CREATE = "create"
    UPDATE = "update"
    REPLACE = "replace"
    DELETE = "delete"


class Scope(StrEnum):
    """Where a change takes effect; the order is the order of execution."""

    MODULE = "kernel modules"
    HOST = "host-wide helpers"
    PROCESS = "processes"
    RULES = "rules"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between what is and what is wanted, for a person: `before` and `after` are short texts.

    `reason` says why where it is not obvious, `effect` what it does to live connections. `is_host_wide` is told so.
    """

    action: Action
    scope: Scope
    subject: str
    detail: str
    reason: str = ""
    effect: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reason why the plan must not run: what, where, and the cure."""

    what: str
    hint: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What apply or teardown will do. Empty `steps` means that nothing differs.

    `adopted` are registrations found as they should be that the ledger did not know. `cut` is the number of live
    connections that lose their helper. `kept` names what teardown leaves because others use it.
    """

    profile: str
    netns: Netns
    changes: tuple[Change, ...]
    steps: tuple[Step, ...]
    refusals: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()
    adopted: tuple[HelperKey, ...] = ()
    kept: tuple[str, ...] = ()
    cut: int = 0

    @property
    def is_empty(self) -> bool:
        return not self.steps

    def count(self, action: Action) -> int:
        return sum(change.action is action for change in self.changes)
