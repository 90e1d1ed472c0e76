"""conntrackd cannot hand over its queues. So it is replaced behind a stand-in: another one, told the same as the one
that ends but for its queue numbers, inspects from before that ends until its successor listens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from orchestrator.launches import launches
from orchestrator.model import Document, Engine, Registration, Status, Target
from orchestrator.ports import Launch, ProcessSeen
from orchestrator.queues import AUTO_COUNT, AUTO_FIRST
from orchestrator.state import DrainQueues, Observed, StartProcess, Step, StopProcess, UpdateRegistration

STAND_IN = "conntrackd-standin"
"""Its name as a process: too long for the name of a helper."""

_QUEUE_NUM = re.compile(r"(?m)^(\s*QueueNum\s+)([0-9]+)")
"""How conntrackd.conf(5) names a queue, and nothing else."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """`launch` stands in for the process `name`. `numbers` are its queues, by those that it stands in for, and `served`
    the registrations that fill these, as they are.
    """

    name: str
    launch: Launch
    numbers: Mapping[int, int]
    served: tuple[Registration, ...]

    @property
    def switch(self) -> tuple[UpdateRegistration, ...]:
        return tuple(UpdateRegistration(seen, self._redirected(seen)) for seen in self.served)

    def take_over(self, kept: Iterable[Step]) -> tuple[Step, ...]:
        """Until nothing comes to the other one any more; `kept` are around its start."""
        return (*kept, StartProcess(self.launch), *kept, *self.switch, _drain(self.numbers))

    def switch_back(self, updates: Iterable[tuple[Registration, Registration]]) -> tuple[Step, ...]:
        """To its successor; `updates` are of registrations, from what they are to what they are to be."""
        wanted = {before.key: after for before, after in updates}
        return tuple(UpdateRegistration(self._redirected(seen), wanted.get(seen.key, seen)) for seen in self.served)

    def leave(self) -> tuple[Step, ...]:
        it = self.launch
        process = ProcessSeen(it.profile, it.netns.identity, it.spec.name, 0, it.digest, 0, watched=False)
        return (_drain(self.numbers.values()), StopProcess(process, it))

    def _redirected(self, seen: Registration) -> Registration:
        return replace(seen, queue_num=self.numbers[seen.queue_num])


def plan_stand_in(target: Target, wanted: tuple[Launch, ...], observed: Observed) -> StandIn | None:
    """Who stands in for conntrackd, if it runs and is to change; `wanted` are the processes of the target.

    None if it does not do its work, or if a registration has to be replaced or is used in another namespace, where
    nobody listens on the queues of a stand-in. It is restarted then.
    """
    before, after = _conntrackd(_applied(observed)), _conntrackd(wanted)
    if before is None or after is None or before.spec.name != after.spec.name:
        return None
    running = {p.name: p for p in observed.processes if p.pid}
    seen = running.get(before.spec.name)
    if seen is None or seen.digest == after.digest or STAND_IN in running or not _is_whole(before, observed):
        return None
    served = _served(before, after, target, observed)
    numbers = dict(zip(before.spec.queues, _free_numbers(wanted, observed), strict=False))
    launch = _stand_in(before, numbers)
    return StandIn(before.spec.name, launch, numbers, served) if launch and served else None


def _applied(observed: Observed) -> tuple[Launch, ...]:
    """The processes as the ledger knows them."""
    if observed.applied is None:
        return ()
    applied = observed.applied.target
    return launches(applied.profile, observed.netns, applied.processes, applied.documents)


def _conntrackd(processes: Iterable[Launch]) -> Launch | None:
    return next((launch for launch in processes if launch.spec.argv[0] == Engine.CONNTRACKD), None)


def _is_whole(before: Launch, observed: Observed) -> bool:
    """It listens on all of its queues, and another one like it would start: each of its registrations is there."""
    bound = {row.queue_num for row in observed.queues if row.is_ready}
    live = {r.key: r for r in observed.registrations}
    known = {r.key: r for r in observed.applied.registrations} if observed.applied else {}
    return bound.issuperset(before.spec.queues) and all(
        key in live and key in known and live[key].can_become(known[key]) for key in before.spec.keys
    )


def _served(before: Launch, after: Launch, target: Target, observed: Observed) -> tuple[Registration, ...]:
    """Those whose packets it goes on to inspect; none if one of them does not bring it any, or must not be touched."""
    wanted = {r.key: r for r in target.registrations}
    keys = wanted.keys() & set(before.spec.enables).intersection(after.spec.enables)
    served = tuple(r for r in observed.registrations if r.key in keys)
    is_free = all(
        seen.status is Status.ENABLED
        and seen.queue_num in before.spec.queues
        and seen.can_become(wanted[seen.key])
        and not observed.users.get(seen.key)
        for seen in served
    )
    return served if is_free else ()


def _free_numbers(wanted: tuple[Launch, ...], observed: Observed) -> Iterator[int]:
    """Numbers above those that `queue: auto` takes, which nobody has."""
    neighbours = (spec for applied in observed.neighbours for spec in applied.target.processes)
    specs = (*(launch.spec for launch in wanted), *neighbours)
    taken = {number for spec in specs for number in spec.queues}
    taken |= {row.queue_num for row in observed.queues} | {r.queue_num for r in observed.registrations}
    return (number for number in range(AUTO_FIRST + AUTO_COUNT, 0x10000) if number not in taken)


def _stand_in(before: Launch, numbers: Mapping[int, int]) -> Launch | None:
    """As the one before, on other queues; None if what that was told, by somebody's own template, has others."""
    text = "".join(before.files.values())
    if len(before.files) != 1 or {int(number) for _, number in _QUEUE_NUM.findall(text)} != numbers.keys():
        return None
    told = Document(f"{STAND_IN}.conf", _QUEUE_NUM.sub(lambda found: f"{found[1]}{numbers[int(found[2])]}", text))
    spec = replace(
        before.spec,
        name=STAND_IN,
        argv=tuple(told.name if word in before.spec.files else word for word in before.spec.argv),
        files=(told.name,),
        queues=tuple(numbers.values()),
    )
    (launch,) = launches(before.profile, before.netns, (spec,), (told,))
    return launch


def _drain(queues: Iterable[int]) -> Step:
    return DrainQueues(tuple(sorted(queues)))
