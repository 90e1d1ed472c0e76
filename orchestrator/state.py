"""What was observed of a host, and the steps that change it: the vocabulary between plan, execute and journal."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

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
from orchestrator.typed import how_to


@dataclass(frozen=True, slots=True)
class Owner:
    """A profile in a namespace that uses a registration."""

    profile: str
    netns: Netns

    def __str__(self) -> str:
        return f"profile {self.profile} in netns {self.netns}"

    def how_to(self, *words: str, state_dir: Path) -> str:
        """`orch WORDS` for its namespace, to be typed in any."""
        return how_to(*words, *(["--netns", str(self.netns)] if self.netns.path else []), state_dir=state_dir)


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
class Pending:
    """An apply that is undone at its deadline unless somebody confirms it; `prior` is what was applied before it.

    `deadline_s` is on the boot clock (CLOCK_BOOTTIME: it goes on while the host sleeps); `within_s` was asked for.
    `is_rejected`: it is to be undone whatever the time, as somebody has begun to.
    """

    owner: Owner
    source: str
    prior: Applied | None
    within_s: float
    deadline_s: float
    is_rejected: bool = False

    def left_s(self, now_s: float) -> float:
        """How long it may still be confirmed; 0 or less when it is overdue."""
        return min(0.0, self.deadline_s - now_s) if self.is_rejected else self.deadline_s - now_s


@dataclass(frozen=True, slots=True)
class Past:
    """A line of the history of a profile in a namespace: what was applied, and which command did it."""

    command: str
    applied: Applied


@dataclass(frozen=True, slots=True)
class Repair:
    """What was mended, and when, in seconds of the monotonic clock."""

    subject: str
    at: float


@dataclass(frozen=True, slots=True)
class Held:
    """What is left alone, and why, until then, in seconds of the monotonic clock: it was mended too often."""

    subject: str
    until: float
    reason: str


@dataclass(frozen=True, slots=True)
class Mending:
    """What watching has done for a profile lately. `failure` is why the rest is not mended, empty if it is."""

    repairs: tuple[Repair, ...] = ()
    held: tuple[Held, ...] = ()
    failure: str = ""

    def held_at(self, now_s: float) -> frozenset[str]:
        return frozenset(held.subject for held in self.held if now_s < held.until)

    def trouble(self, now_s: float, subjects: Collection[str]) -> str:
        """Why it does not mend what has drifted, which is `subjects`; empty if it does."""
        held = (held.reason for held in self.held if now_s < held.until and held.subject in subjects)
        return "; ".join(filter(None, (*held, self.failure)))


@dataclass(frozen=True, slots=True)
class Observed:
    """The system as it is, for one profile in one namespace. Registrations are host-wide, the rest is the namespace's.

    `users` are the *other* owners of each key; `deaf` those of them whose namespace has no listener on its queue.
    `neighbours` are other profiles in this namespace. `kernel_helpers` are the (name, l4proto) taken by loaded kernel
    modules. `foreign_references` are helper names that rules not written by orch attach. `reconciles`: the supervisor
    of the profile has drift mended. `stale` are registrations that were made anew since its rules were loaded.
    `connections` are live ones by helper name, `connections_elsewhere` those in the namespaces of other users.
    `has_strays`: rules of ours are loaded that the ledger has lost; None if nobody looked for such.
    `idles_iptables`: this kernel makes iptables rules idle when any helper is unregistered; `would_idle` says where
    there are some, of anybody but this profile.
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
    reconciles: bool
    stale: frozenset[HelperKey] = frozenset()
    connections: Mapping[str, int] = field(default_factory=dict)
    connections_elsewhere: Mapping[str, int] = field(default_factory=dict)
    has_strays: bool | None = None
    idles_iptables: bool = False
    would_idle: tuple[str, ...] = ()


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
class SucceedProcess:
    """A new process takes over the queues of the one that runs under its name, and binds its own besides.

    `before` is how that was started; None where the ledger does not remember.
    """

    before: Launch | None
    after: Launch
    process: ProcessSeen


@dataclass(frozen=True, slots=True)
class ServeQueues:
    """A process binds the queues in `after` that it has not, and lets go of others; `before` are those it had."""

    launch: Launch
    before: tuple[int, ...]
    after: tuple[int, ...]


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


@dataclass(frozen=True, slots=True)
class SetReconcile:
    """Tell the supervisor of a profile whether to have drift mended."""

    profile: str
    is_on: bool


Step = (
    LoadModule
    | CreateRegistration
    | UpdateRegistration
    | DeleteRegistration
    | KeepRegistrations
    | StartProcess
    | StopProcess
    | SucceedProcess
    | ServeQueues
    | WatchProcess
    | DrainQueues
    | LoadRules
    | FlushRules
    | RemoveRules
    | SetReconcile
)


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A transaction that a killed command left, or one whose failure could not be undone.

    `planned` are all of its steps, `begun` those that may have an effect still, oldest first, each with its place.
    """

    id: int
    command: str
    owner: Owner
    planned: tuple[Step, ...]
    begun: tuple[tuple[int, Step], ...]

    def is_of(self, owner: Owner) -> bool:
        return (self.owner.profile, self.owner.netns.identity) == (owner.profile, owner.netns.identity)

    @property
    def is_teardown(self) -> bool:
        return self.command == "teardown"

    @property
    def sentence(self) -> str:
        """What was not finished, and how far it came."""
        if not self.begun:
            return f"{self.command} of {self.owner} was not finished"
        sequence, step = self.begun[-1]
        place = f"step {sequence + 1} of {len(self.planned)}, {describe(step)}"
        return f"{self.command} of {self.owner} was not finished ({place})"

    @property
    def remedy(self) -> str:
        """What becomes of it: half an apply is undone, half a teardown is finished."""
        return "finishes it" if self.is_teardown else "undoes it"

    @property
    def registrations(self) -> tuple[Registration, ...]:
        """Those that are ours by this transaction, whatever else is known of them."""
        made = (step.registration for _, step in self.begun if isinstance(step, CreateRegistration))
        going = (step.registration for step in self.planned if isinstance(step, DeleteRegistration))
        return (*made, *going)


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
            name, digest = launch.spec.name, launch.digest
            return StopProcess(ProcessSeen(launch.profile, netns.identity, name, 0, digest, 0, watched=False), None)
        case StopProcess(_, launch):
            return None if launch is None else StartProcess(launch)
        case SucceedProcess(before, after, process):
            return None if before is None else SucceedProcess(after, before, process)
        case ServeQueues(launch, before, after):
            return ServeQueues(launch, after, before)
        case LoadRules(None, after):
            return RemoveRules(after)
        case LoadRules(before, after) if before is not None:
            return LoadRules(after, before)
        case FlushRules(before) | RemoveRules(before):
            return LoadRules(None, before)
        case SetReconcile(profile, is_on):
            return SetReconcile(profile, not is_on)
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
        case SucceedProcess(_, after, _):
            return f"hand over to a new {after.spec.name}"
        case ServeQueues(launch, before, after):
            return _describe_queues(launch.spec.name, before, after)
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
        case SetReconcile(_, is_on):
            return "have drift mended" if is_on else "leave drift alone"


def _describe_queues(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> str:
    left = [str(number) for number in before if number not in after]
    if left:
        return f"{name} leaves queue {', '.join(left)}"
    return f"{name} serves queue {', '.join(map(str, after))}"


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
    connections that lose their helper. `kept` names what teardown leaves because others use it, `waiting` what is
    left undone until others have done their part.
    """

    profile: str
    netns: Netns
    changes: tuple[Change, ...]
    steps: tuple[Step, ...]
    refusals: tuple[Refusal, ...] = ()
    adopted: tuple[HelperKey, ...] = ()
    kept: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    cut: int = 0

    @property
    def is_empty(self) -> bool:
        return not self.steps

    def count(self, action: Action) -> int:
        return sum(change.action is action for change in self.changes)
