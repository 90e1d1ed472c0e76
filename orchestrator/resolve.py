"""A typed profile document to desired state: every default is taken, helpers are checked against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from orchestrator.attach import Scope, expand
from orchestrator.choose import Choice, Own, choose, warnings
from orchestrator.model import (
    HELPER_PROGRAM,
    Attachment,
    Bounds,
    Desired,
    Engine,
    Helper,
    HelperKey,
    Inspect,
    L4Proto,
    NativeHelper,
    Path,
    Policy,
    ProcessSpec,
    Registration,
    RuleQueue,
    Status,
)
from orchestrator.overlap import find_overlaps
from orchestrator.profile_schema import AttachDoc, Destination, GuardDoc, HelperDoc, ProfileDoc, Source
from orchestrator.queues import Block, Service, assign, assign_labels
from orchestrator.yamltext import Path as TreePath
from orchestrator.yamltext import Tree


@dataclass(frozen=True, slots=True)
class _Attached:
    """A choice, its attachments with the places they come from, and the keys that this needs."""

    choice: Choice
    profile: str
    attachments: tuple[Attachment, ...]
    places: tuple[TreePath, ...]
    keys: tuple[HelperKey, ...]

    def service(self, key: HelperKey) -> Service:
        """What the queue number in a registration stands for.

        A registration that is disabled for rules to queue has another number than an enabled one: the two cannot share.
        """
        if self.choice.is_native:
            return Service(Engine.NATIVE, f"{key.name}/{self.choice.queueing}")
        return Service(Engine.CONNTRACKD, f"{self.choice.entry.name}/{key.l3proto}/{key.l4proto}")

    @property
    def rule_service(self) -> Service:
        """What rules queue to: on TCP a second number, for connections whose sequence numbers were adjusted."""
        has_tcp = any(key.l4proto is L4Proto.TCP for key in self.keys)
        return Service(Engine.NATIVE, f"{self.profile}/{self.choice.label}", 2 if has_tcp else 1)

    def stock_key(self, key: HelperKey) -> HelperKey:
        return self.choice.stock_key(key.l3proto, key.l4proto)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Queue numbers by service (the first, of several), and label bits by helper."""

    queues: Mapping[Service, int]
    labels: Mapping[str, int]


def resolve(tree: Tree, document: ProfileDoc, *, incomplete: frozenset[str], own: Own) -> Desired | None:
    """Desired state, None if a problem was reported to the tree.

    Helpers named in `incomplete` have lost a part that was wrong: they are not held against the others.
    """
    told: list[str] = []
    attached = []
    for label in document.helpers:
        choice = choose(tree, label, document, own)
        if choice is not None:
            told += warnings(choice, document.families)
            attached.append(_attach(tree, choice, document))
    if document.reconcile and attached and all(a.choice.is_kernel for a in attached):
        told.append("no helper here has a process, so drift is mended only while orch run or orch watch runs")
    whole = [a for a in attached if a.choice.label not in incomplete]
    _check_names(tree, whole)
    _check_overlaps(tree, whole)
    numbers = _numbers(tree, document.profile, [a for a in whole if not a.choice.is_kernel])
    return None if tree.problems else _desired(tree.source, document, attached, numbers, tuple(told))


# -- one helper ------------------------------------------------------------------------------------------------------


def _attach(tree: Tree, choice: Choice, document: ProfileDoc) -> _Attached:
    l4protos = [p.l4proto for p in choice.entry.protocols]
    keys = {(l3, l4): choice.key(l3, l4) for l3 in choice.served for l4 in l4protos}
    scope = Scope(choice.entry, document.families, choice.served, keys)
    entries = [((*choice.path, "attach", i), doc) for i, doc in enumerate(choice.doc.attach)]
    found = [
        (attachment, path)
        for path, doc in entries or [(choice.path, AttachDoc())]
        for attachment in expand(tree, path, doc, scope)
    ]
    used = {attachment.key for attachment, _ in found}
    carried = [p.l4proto for p in choice.entry.protocols if not p.ports]
    used |= {keys[key.l3proto, l4] for key in used for l4 in carried}
    return _Attached(
        choice, document.profile, tuple(a for a, _ in found), tuple(p for _, p in found), tuple(sorted(used))
    )


# -- all helpers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Names:
    """Who uses a registration: as its own, because conntrackd insists on it, or as the kernel's (in every family).

    A native helper has all registrations of its name: its process looks at packets of that name alone.
    """

    own: Mapping[HelperKey, _Attached]
    native: Mapping[str, _Attached]
    insisted: Mapping[HelperKey, _Attached]
    in_kernel: Mapping[tuple[str, L4Proto], _Attached]


def _check_names(tree: Tree, attached: list[_Attached]) -> None:
    """One registration, one meaning; one problem per helper."""
    served = [a for a in attached if not a.choice.is_kernel]
    names = _Names(
        own={key: a for a in reversed(served) for key in a.keys},
        native={a.choice.name: a for a in reversed(served) if a.choice.is_native},
        insisted={a.stock_key(key): a for a in served if a.choice.is_conntrackd for key in a.keys},
        in_kernel={(key.name, key.l4proto): a for a in attached if a.choice.is_kernel for key in a.keys},
    )
    for a in served:
        clash = next((clash for key in a.keys for clash in _clashes(a, key, names)), None)
        if clash is not None:
            at_name = bool(a.choice.doc.name)
            path = (*a.choice.path, "name") if at_name else a.choice.path
            tree.report(path, *clash, of_key=not at_name)


def _clashes(attached: _Attached, key: HelperKey, names: _Names) -> Iterator[tuple[str, str]]:
    """Message and hint for each reason why a helper cannot have a registration."""
    first, plugin = names.own[key], names.insisted.get(key, attached)
    if first is not attached:
        hint = "choose another `name:`, or put all attach entries in one helper"
        yield f"{key} is the registration of helper {first.choice.label} already", hint
    elif names.native.get(key.name, attached) is not attached and attached.choice.is_native:
        holder = names.native[key.name]
        yield f"{key.name} is the name of helper {holder.choice.label} already", "choose another `name:`"
    if plugin.choice.engine is not attached.choice.engine:
        yield f"{key} is what conntrackd needs for helper {plugin.choice.label}", "choose another `name:`"
    for needed in (key, attached.stock_key(key)) if attached.choice.is_conntrackd else (key,):
        in_kernel = names.in_kernel.get((needed.name, needed.l4proto))
        if in_kernel is None:
            continue
        label = in_kernel.choice.label
        if attached.choice.is_conntrackd:
            message = f"conntrackd needs the name {needed.name}, which is the kernel's in helper {label}"
            yield message, "give both the same engine"
        else:
            yield f"{needed.name} is the name of the kernel's helper {label}", "choose another `name:`"


def _check_overlaps(tree: Tree, attached: list[_Attached]) -> None:
    attachments = [attachment for a in attached for attachment in a.attachments]
    origins = [(a.choice.label, path) for a in attached for path in a.places]
    seen: set[tuple[TreePath, TreePath]] = set()
    for first, second in find_overlaps(attachments):
        (label, path), (_, later_path) = origins[first], origins[second]
        if (path, later_path) in seen:
            continue
        seen.add((path, later_path))
        line, column = tree.place(path, of_key=len(path) == 2)
        message = (
            f"{_traffic(attachments[first], attachments[second])} is attached by helper {label} already,"
            f" at {tree.source}:{line}:{column}"
        )
        hint = "the first helper of a connection wins: narrow ports, interfaces or addresses"
        tree.report(later_path, message, hint, of_key=len(later_path) == 2)


def _traffic(one: Attachment, other: Attachment) -> str:
    """What two attachments have in common, in words."""
    common = next(
        f"{max(p.first, q.first)}" for p in one.ports for q in other.ports if p.first <= q.last and q.first <= p.last
    )
    return f"{one.path} {one.key.l3proto} {one.key.l4proto} port {common}"


def _numbers(tree: Tree, profile: str, attached: list[_Attached]) -> _Numbers:
    queues, queue_faults = assign(tuple(block for a in attached for block in _blocks(a)))
    labels, label_faults = assign_labels(
        profile, {a.choice.label: a.choice.doc.label for a in attached if a.choice.is_by_rules}
    )
    for option, faults in (("queue", queue_faults), ("label", label_faults)):
        for fault in faults:
            tree.report(("helpers", fault.label, option), fault.message, fault.hint)
    return _Numbers(queues, labels)


def _blocks(attached: _Attached) -> Iterator[Block]:
    """The number that the profile gives is of the queue that is listened to."""
    label, first = attached.choice.label, attached.choice.doc.queue
    keys = sorted(attached.keys, key=lambda key: (key.l4proto, key.l3proto))
    services = tuple(dict.fromkeys(attached.service(key) for key in keys))
    if attached.choice.is_by_rules:
        yield Block(label, (attached.rule_service,), first)
        yield Block(label, services, None)
    else:
        yield Block(label, services, first)


# -- result ----------------------------------------------------------------------------------------------------------


def _desired(
    source: str,
    document: ProfileDoc,
    attached: list[_Attached],
    numbers: _Numbers,
    told: tuple[str, ...],
) -> Desired:
    plugins = [a for a in attached if a.choice.is_conntrackd]
    natives = sorted((a for a in attached if a.choice.is_native), key=lambda a: a.choice.label)
    own = {key: _registration(a, key, numbers) for a in (*plugins, *natives) for key in a.keys}
    stock = {
        a.stock_key(key): replace(
            own[key], key=a.stock_key(key), status=Status.DISABLED, policies=a.choice.engine.policies
        )
        for a in plugins
        for key in a.keys
        if a.stock_key(key) not in own
    }
    served = tuple(own[key] for a in plugins for key in a.keys)
    return Desired(
        profile=document.profile,
        source=source,
        netns=document.netns,
        backend=document.backend,
        helpers=tuple(_helper(a, stock) for a in attached),
        registrations=tuple(own[key] for key in sorted(own)),
        stock=tuple(stock[key] for key in sorted(stock)),
        processes=(*_conntrackd(served, tuple(stock.values())), *(_process(a, numbers) for a in natives)),
        warnings=told,
        rule_queues=tuple(_rule_queue(a, numbers) for a in natives if a.choice.is_by_rules),
        natives=tuple(_native(a, numbers) for a in natives),
        families=document.families,
        reconcile=document.reconcile,
        confirm_within_s=document.confirm_within_s,
    )


def _registration(attached: _Attached, key: HelperKey, numbers: _Numbers) -> Registration:
    engine, doc = attached.choice.engine, attached.choice.doc
    return Registration(
        key=key,
        queue_num=numbers.queues[attached.service(key)],
        status=Status.DISABLED if attached.choice.is_by_rules else Status.ENABLED,
        policies=tuple(_policy(policy, doc) for policy in engine.policies),
        priv_data_len=engine.priv_data_len(key.l4proto),
    )


def _policy(policy: Policy, doc: HelperDoc) -> Policy:
    wanted = doc.policies.get(policy.name)
    if wanted is None:
        return policy
    return Policy(
        policy.name,
        wanted.expect_max or policy.expect_max,
        wanted.expect_timeout or policy.expect_timeout_s,
    )


def _helper(attached: _Attached, stock: Mapping[HelperKey, Registration]) -> Helper:
    choice = attached.choice
    stock_keys = {attached.stock_key(key) for key in attached.keys} if choice.is_conntrackd else set()
    return Helper(
        name=choice.label,
        use=choice.entry.name,
        engine=choice.engine.engine,
        keys=attached.keys,
        stock_keys=tuple(sorted(stock_keys & stock.keys())),
        attachments=attached.attachments,
        modules=choice.engine.modules,
        queueing=choice.queueing,
    )


def _conntrackd(served: tuple[Registration, ...], stock: tuple[Registration, ...]) -> tuple[ProcessSpec, ...]:
    """One conntrackd for all its helpers: it dispatches by queue number and opens its queues in one namespace.

    It enables its stock registrations whenever it starts, so they are among those to disable.
    """
    registrations = (*served, *stock)
    if not registrations:
        return ()
    return (
        ProcessSpec(
            name="conntrackd",
            argv=("conntrackd", "-C", "conntrackd.conf"),
            files=("conntrackd.conf",),
            queues=tuple(sorted({r.queue_num for r in registrations})),
            keys=tuple(sorted(r.key for r in registrations)),
            enables=tuple(sorted(r.key for r in served)),
        ),
    )


# -- the native engine -----------------------------------------------------------------------------------------------


def _bound(attached: _Attached, numbers: _Numbers) -> tuple[int, ...]:
    """The queues that the process of a native helper binds."""
    if not attached.choice.is_by_rules:
        return tuple(sorted({numbers.queues[attached.service(key)] for key in attached.keys}))
    service = attached.rule_service
    first = numbers.queues[service]
    return tuple(range(first, first + service.count))


def _process(attached: _Attached, numbers: _Numbers) -> ProcessSpec:
    """When rules queue, its registrations are disabled anyway: there is nothing to disable when it dies."""
    label, doc = attached.choice.label, attached.choice.doc.process
    keys = () if attached.choice.is_by_rules else attached.keys
    file, own = f"helper-{label}.toml", (f"helper-{label}.py",) if attached.choice.description.file else ()
    return ProcessSpec(
        name=label,
        argv=(HELPER_PROGRAM, file),
        files=(file, *own),
        queues=_bound(attached, numbers),
        keys=keys,
        enables=keys,
        restart=doc.restart,
        restart_limit=doc.restart_limit,
        restart_window_s=doc.restart_window,
    )


def _rule_queue(attached: _Attached, numbers: _Numbers) -> RuleQueue:
    choice, queues = attached.choice, _bound(attached, numbers)
    return RuleQueue(
        helper=choice.label,
        keys=attached.keys,
        label=numbers.labels[choice.label],
        queue_num=queues[0],
        adjusted_queue_num=queues[1] if queues[1:] else None,
        triggers=choice.description.triggers if choice.doc.inspect is Inspect.TRIGGERS else (),
        is_multicast=choice.entry.paths == (Path.OUTGOING,),
    )


def _native(attached: _Attached, numbers: _Numbers) -> NativeHelper:
    choice = attached.choice
    return NativeHelper(
        name=choice.label,
        use=choice.entry.name,
        file=choice.description.file,
        source=choice.description.source,
        queueing=choice.queueing,
        inspect=choice.doc.inspect or Inspect.PAYLOAD,
        names=(choice.name,),
        queues=_bound(attached, numbers),
        label=numbers.labels.get(choice.label),
        bounds=_loosened(choice.description.bounds, choice.doc.guard),
        user=choice.doc.process.user,
        memory_bytes=choice.doc.process.memory,
    )


def _loosened(bounds: Bounds, guard: GuardDoc) -> Bounds:
    """The bounds of a helper, but for those that the profile names."""
    return Bounds(
        ports=guard.ports or bounds.ports,
        is_any_source=bounds.is_any_source if guard.source is None else guard.source is Source.ANY,
        is_any_destination=(
            bounds.is_any_destination if guard.destination is None else guard.destination is Destination.ANY
        ),
        is_permanent=bounds.is_permanent if guard.permanent is None else guard.permanent,
    )
