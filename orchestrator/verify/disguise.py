"""A profile as it is tried: under names of its own, for traffic of any address, and what is to be tried of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from orchestrator import catalogue
from orchestrator.model import Desired, Engine, Helper, HelperKey, L3Proto, L4Proto, Path, ProcessSpec, Registration
from orchestrator.overlap import find_overlaps
from orchestrator.verify.dialogues import DIALOGUES, Dialogue

_FAMILIES = {L3Proto.IP: "IPv4", L3Proto.IP6: "IPv6"}


@dataclass(frozen=True, slots=True)
class Case:
    """Something to try with a helper: a dialogue on a server port, None where there is none that fits.

    `skipped` says why it is not tried, `unserved` why it fails without a trial.
    """

    helper: str
    l3proto: L3Proto
    l4proto: L4Proto
    path: Path
    port: int
    dialogue: Dialogue | None
    skipped: str = ""
    unserved: str = ""


def left_out(desired: Desired, registered: Iterable[HelperKey]) -> Mapping[str, str]:
    """Helpers that cannot be tried on this host, and why. `registered` are the helper registrations that exist."""
    taken = {(key.name, key.l4proto): key for key in registered}
    found: dict[str, str] = {}
    for helper in desired.helpers:
        fixed = (taken.get((key.name, key.l4proto)) for key in _fixed_keys(helper))
        if key := next((key for key in fixed if key), None):
            found[helper.name] = f"{key} is in use on this host, and engine {helper.engine} takes no other name"
    kept = [helper for helper in desired.helpers if helper.name not in found]
    attachments = [
        (helper.name, attachment) for helper in map(_for_any_address, kept) for attachment in helper.attachments
    ]
    for first, second in find_overlaps([attachment for _, attachment in attachments]):
        one, other = attachments[first][0], attachments[second][0]
        if one not in found and other not in found:
            found[other] = (
                f"only interfaces or addresses, which are not tried, tell its connections from those of {one}"
            )
    return found


def disguised(desired: Desired, *, prefix: str, without: Iterable[str] = ()) -> Desired:
    """The profile without some of its helpers, without interfaces and addresses, with registrations PREFIX-NUMBER.

    Names that an engine insists on stay. Queue numbers stay too: queues belong to a namespace.
    """
    names = set(without)
    kept = tuple(_for_any_address(helper) for helper in desired.helpers if helper.name not in names)
    fixed = {key for helper in kept for key in _fixed_keys(helper)}
    needed = fixed.union(*(helper.keys for helper in kept))
    own = sorted({key.name for key in needed - fixed})
    disguise = _Disguise({name: f"{prefix}-{number}" for number, name in enumerate(own)}, frozenset(fixed))
    queues = {r.key: r.queue_num for r in (*desired.registrations, *desired.stock) if r.key in needed}
    processes = (_reduced(process, queues) for process in desired.processes if process.name not in names)
    return replace(
        desired,
        netns="",
        helpers=tuple(map(disguise.helper, kept)),
        registrations=tuple(
            sorted((disguise.registration(r) for r in desired.registrations if r.key in needed), key=lambda r: r.key)
        ),
        stock=tuple(r for r in desired.stock if r.key in needed),
        processes=tuple(disguise.process(process) for process in processes if process is not None),
        rule_queues=tuple(
            replace(queue, keys=disguise.keys(queue.keys)) for queue in desired.rule_queues if queue.helper not in names
        ),
        natives=tuple(
            replace(native, names=tuple(disguise.called[name] for name in native.names))
            for native in desired.natives
            if native.name not in names
        ),
        warnings=(),
    )


@dataclass(frozen=True, slots=True)
class _Disguise:
    """What registrations are called, by their names; those of `fixed` keep theirs."""

    called: Mapping[str, str]
    fixed: frozenset[HelperKey]

    def key(self, key: HelperKey) -> HelperKey:
        return key if key in self.fixed else replace(key, name=self.called[key.name])

    def keys(self, keys: Iterable[HelperKey]) -> tuple[HelperKey, ...]:
        return tuple(map(self.key, keys))

    def registration(self, registration: Registration) -> Registration:
        return replace(registration, key=self.key(registration.key))

    def helper(self, helper: Helper) -> Helper:
        attachments = tuple(replace(a, key=self.key(a.key)) for a in helper.attachments)
        return replace(helper, keys=self.keys(helper.keys), attachments=attachments)

    def process(self, process: ProcessSpec) -> ProcessSpec:
        keys, enables = (tuple(sorted(self.keys(keys))) for keys in (process.keys, process.enables))
        return replace(process, keys=keys, enables=enables)


def cases(desired: Desired, without: Mapping[str, str]) -> tuple[Case, ...]:
    """Everything to try of a profile, in the order of the profile; `without` are helpers that are left out, and why."""
    return tuple(
        replace(case, skipped=without.get(helper.name, ""))
        for helper in desired.helpers
        for case in dict.fromkeys((*_attached_cases(helper), *_unserved_cases(helper, desired.families)))
    )


def narrowed(desired: Desired) -> bool:
    """True if the profile has interfaces or addresses, which cannot be tried."""
    return any(a.interface or a.saddr or a.daddr for a in desired.attachments)


def _attached_cases(helper: Helper) -> Iterator[Case]:
    """The first port of each attachment stands for all of them."""
    for attachment in helper.attachments:
        key, path = attachment.key, attachment.path
        port = attachment.ports[0].first
        fitting: list[Dialogue | None] = [d for d in _dialogues(helper) if d.fits(key.l3proto, key.l4proto, path)]
        yield from (Case(helper.name, key.l3proto, key.l4proto, path, port, d) for d in fitting or [None])


def _unserved_cases(helper: Helper, families: tuple[L3Proto, ...]) -> Iterator[Case]:
    """What the profile and the protocol have and the engine has not: nothing is attached there, and nothing helped."""
    entry = catalogue.helpers().get(helper.use)
    engine = entry.engine(helper.engine) if entry else None
    if entry is None or engine is None:  # a helper of one's own serves what it says
        return
    for family in (f for f in families if f in entry.families and f not in engine.families):
        why = f"engine {helper.engine} does not serve {_FAMILIES[family]}"
        for case in _attached_cases(helper):
            if any(d.fits(family, case.l4proto, case.path) for d in _dialogues(helper)):
                yield replace(case, l3proto=family, dialogue=None, unserved=why)


def _dialogues(helper: Helper) -> tuple[Dialogue, ...]:
    """Those of what the helper is, or else of what the profile calls it: a helper of one's own may be another ftp."""
    return DIALOGUES.get(helper.use, DIALOGUES.get(helper.name, ()))


def _for_any_address(helper: Helper) -> Helper:
    neutral = (replace(a, interface="", saddr=(), daddr=()) for a in helper.attachments)
    return replace(helper, attachments=tuple(dict.fromkeys(neutral)))


def _fixed_keys(helper: Helper) -> tuple[HelperKey, ...]:
    """Registrations whose name is not ours to choose: the kernel's, and those that conntrackd insists on."""
    if helper.engine is Engine.KERNEL:
        return helper.keys
    insisted = tuple(key for key in helper.keys if helper.engine is Engine.CONNTRACKD and key.name == helper.use)
    return (*insisted, *helper.stock_keys)


def _reduced(process: ProcessSpec, queues: Mapping[HelperKey, int]) -> ProcessSpec | None:
    """A process that several helpers share loses the queues of those left out, and goes with the last of them."""
    if not process.keys:
        return process
    keys, enables = (tuple(key for key in keys if key in queues) for keys in (process.keys, process.enables))
    if not keys:
        return None
    return replace(process, keys=keys, enables=enables, queues=tuple(sorted({queues[key] for key in keys})))
