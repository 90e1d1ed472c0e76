"""A typed profile document to desired state: every default is taken, helpers are checked against each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from orchestrator import catalogue
from orchestrator.attach import FAMILY_NAMES, Scope, expand
from orchestrator.catalogue import CatalogueEntry, EngineEntry
from orchestrator.model import (
    NAME_MAX_BYTES,
    Attachment,
    Desired,
    Engine,
    Helper,
    HelperKey,
    L3Proto,
    L4Proto,
    Policy,
    ProcessSpec,
    Registration,
    Status,
    is_helper_name,
)
from orchestrator.overlap import find_overlaps
from orchestrator.profile_schema import AttachDoc, HelperDoc, ProfileDoc, name_hint, nearest, show
from orchestrator.queues import Block, Service, assign
from orchestrator.yamltext import Path as TreePath
from orchestrator.yamltext import Tree


@dataclass(frozen=True, slots=True)
class _Choice:
    """One helper with its catalogue entry, its engine, and the families that the engine serves in this profile."""

    label: str
    doc: HelperDoc
    entry: CatalogueEntry
    engine: EngineEntry
    served: tuple[L3Proto, ...]

    @property
    def path(self) -> TreePath:
        return ("helpers", self.label)

    @property
    def is_kernel(self) -> bool:
        return self.engine.engine is Engine.KERNEL

    def key(self, l3proto: L3Proto, l4proto: L4Proto) -> HelperKey:
        """What rules attach."""
        if self.is_kernel or self.engine.attaches_stock_key:
            return self.stock_key(l3proto, l4proto)
        return HelperKey(self.doc.name or f"{self.label}-us", l3proto, l4proto)

    def stock_key(self, l3proto: L3Proto, l4proto: L4Proto) -> HelperKey:
        return HelperKey(self.engine.name_for(l4proto), l3proto, l4proto)


@dataclass(frozen=True, slots=True)
class _Attached:
    """A choice, its attachments with the places they come from, and the keys that this needs."""

    choice: _Choice
    attachments: tuple[Attachment, ...]
    places: tuple[TreePath, ...]
    keys: tuple[HelperKey, ...]

    def service(self, key: HelperKey) -> Service:
        return Service(self.choice.entry.name, key.l3proto, key.l4proto)

    def stock_key(self, key: HelperKey) -> HelperKey:
        return self.choice.stock_key(key.l3proto, key.l4proto)


def resolve(tree: Tree, document: ProfileDoc, *, incomplete: frozenset[str]) -> Desired | None:
    """Desired state, None if a problem was reported to the tree.

    Helpers named in `incomplete` have lost a part that was wrong: they are not held against the others.
    """
    warnings: list[str] = []
    attached = []
    for label, doc in document.helpers.items():
        choice = _choose(tree, label, doc, document.families)
        if choice is not None:
            warnings += _warnings(choice, document.families)
            attached.append(_attach(tree, choice, document.families))
    whole = [a for a in attached if a.choice.label not in incomplete]
    _check_names(tree, whole)
    _check_overlaps(tree, whole)
    queues = _queues(tree, [a for a in whole if not a.choice.is_kernel])
    return None if tree.problems else _desired(tree.source, document, attached, queues, tuple(warnings))


# -- one helper ------------------------------------------------------------------------------------------------------


def _choose(tree: Tree, label: str, doc: HelperDoc, families: tuple[L3Proto, ...]) -> _Choice | None:
    path = ("helpers", label)
    known = catalogue.helpers()
    if not is_helper_name(label):
        tree.report(path, f"{show(label)} is not a name for a helper", name_hint(label), of_key=True)
        return None
    entry = known.get(doc.use or label)
    if entry is None:
        hint = nearest(doc.use or label, list(known)) or "orch helpers lists them; `use:` takes one under another name"
        place = (*path, "use") if doc.use else path
        tree.report(place, f"there is no helper {show(doc.use or label)}", hint, of_key=not doc.use)
        return None
    engine = entry.engine(doc.engine)
    if engine is None:
        hint = f"it has {', '.join(e.engine for e in entry.engines)}"
        tree.report((*path, "engine"), f"{entry.name} has no engine {show(doc.engine)} in this release", hint)
        return None
    choice = _Choice(label, doc, entry, engine, tuple(f for f in L3Proto if f in families and f in engine.families))
    check_options = _check_kernel_options if choice.is_kernel else _check_options
    check_options(tree, choice)
    has_name, is_served = _check_name(tree, choice), _check_served(tree, choice, families)
    return choice if has_name and is_served else None


def _check_kernel_options(tree: Tree, choice: _Choice) -> None:
    others = [e.engine for e in choice.entry.engines if e.engine is not Engine.KERNEL]
    hint = f"remove it, or use engine: {others[0]}" if others else "remove it"
    for option in ("name", "queueing", "queue", "policies"):
        if option in choice.doc.model_fields_set:
            message = f"the kernel's helper has its own {option}, it cannot be chosen"
            tree.report((*choice.path, option), message, hint, of_key=True)


def _check_name(tree: Tree, choice: _Choice) -> bool:
    """True if the registration has a name; the default adds -us and may become too long."""
    name, stock = choice.doc.name, choice.entry.name
    if choice.engine.attaches_stock_key and name not in ("", stock):
        message = f"{choice.engine.engine} serves {stock} under the name {stock} only"
        tree.report((*choice.path, "name"), message, "remove it")
    if choice.is_kernel or choice.engine.attaches_stock_key or name or is_helper_name(f"{choice.label}-us"):
        return True
    message = f"the registration would be called {choice.label}-us, which is longer than {NAME_MAX_BYTES} bytes"
    tree.report(choice.path, message, "give it a `name:`, or shorten this one", of_key=True)
    return False


def _check_served(tree: Tree, choice: _Choice, families: tuple[L3Proto, ...]) -> bool:
    if choice.served:
        return True
    engine, entry = choice.engine, choice.entry
    serves = " and ".join(FAMILY_NAMES[f] for f in engine.families)
    who = entry.name if engine.families == entry.families else f"{entry.name} by engine {engine.engine}"
    message = f"{who} is for {serves} only, and the profile has families: [{', '.join(families)}]"
    other = _better_engine(choice, families)
    hint = f"engine: {other}, or families: [{', '.join(engine.families)}]" if other else "change families, or remove it"
    tree.report(choice.path, message, hint, of_key=True)
    return False


def _check_options(tree: Tree, choice: _Choice) -> None:
    if choice.doc.queueing not in ("", "registration"):
        message = f"queueing: {show(choice.doc.queueing)} is not available with engine {choice.engine.engine}"
        if choice.doc.queueing == "rules":
            message = "queueing: rules comes with the native engine, in a later release"
        tree.report((*choice.path, "queueing"), message, "remove it: here the registration queues")
    known = [policy.name for policy in choice.engine.policies]
    for name in choice.doc.policies:
        if name not in known:
            message = f"{choice.entry.name} has no policy {show(name)}"
            tree.report((*choice.path, "policies", name), message, f"it has {', '.join(known)}", of_key=True)


def _better_engine(choice: _Choice, families: Iterable[L3Proto]) -> Engine | None:
    """Another engine of the helper that serves all these families, as far as the protocol has them."""
    wanted = set(families) & set(choice.entry.families)
    others = (e for e in choice.entry.engines if e is not choice.engine and not e.broken)
    return next((e.engine for e in others if wanted and wanted <= set(e.families)), None)


def _warnings(choice: _Choice, families: tuple[L3Proto, ...]) -> list[str]:
    engine, other = choice.engine, _better_engine(choice, families)
    if engine.broken:
        advice = f"; engine: {other} works" if other else ""
        return [f"{choice.label}: engine {engine.engine} is broken for {choice.entry.name}: {engine.broken}{advice}"]
    warnings = [f"{choice.label}: {engine.harm}"] if engine.harm else []
    if any(f not in engine.families for f in families if f in choice.entry.families):
        serves = " and ".join(FAMILY_NAMES[f] for f in choice.served)
        advice = f"; engine: {other} serves both" if other else ""
        warnings.append(f"{choice.label}: {engine.engine} serves {serves} only{advice}")
    return warnings


def _attach(tree: Tree, choice: _Choice, families: tuple[L3Proto, ...]) -> _Attached:
    l4protos = [p.l4proto for p in choice.entry.protocols]
    keys = {(l3, l4): choice.key(l3, l4) for l3 in choice.served for l4 in l4protos}
    scope = Scope(choice.entry, families, choice.served, keys)
    entries = [((*choice.path, "attach", i), doc) for i, doc in enumerate(choice.doc.attach)]
    found = [
        (attachment, path)
        for path, doc in entries or [(choice.path, AttachDoc())]
        for attachment in expand(tree, path, doc, scope)
    ]
    used = {attachment.key for attachment, _ in found}
    carried = [p.l4proto for p in choice.entry.protocols if not p.ports]
    used |= {keys[key.l3proto, l4] for key in used for l4 in carried}
    return _Attached(choice, tuple(a for a, _ in found), tuple(p for _, p in found), tuple(sorted(used)))


# -- all helpers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Names:
    """Who uses a registration: as its own, because conntrackd insists on it, or as the kernel's (in every family)."""

    own: Mapping[HelperKey, _Attached]
    insisted: Mapping[HelperKey, _Attached]
    in_kernel: Mapping[tuple[str, L4Proto], _Attached]


def _check_names(tree: Tree, attached: list[_Attached]) -> None:
    """One registration, one meaning; one problem per helper."""
    served = [a for a in attached if not a.choice.is_kernel]
    names = _Names(
        own={key: a for a in reversed(served) for key in a.keys},
        insisted={a.stock_key(key): a for a in served for key in a.keys},
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
    if plugin.choice.entry is not attached.choice.entry:
        yield f"{key} is what conntrackd needs for helper {plugin.choice.label}", "choose another `name:`"
    for needed in (key, attached.stock_key(key)):
        holder = names.in_kernel.get((needed.name, needed.l4proto))
        if holder is not None:
            message = f"conntrackd needs the name {needed.name}, which is the kernel's in helper {holder.choice.label}"
            yield message, "give both the same engine"


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


def _queues(tree: Tree, attached: list[_Attached]) -> Mapping[Service, int]:
    blocks = tuple(Block(a.choice.label, tuple(map(a.service, a.keys)), a.choice.doc.queue) for a in attached)
    numbers, faults = assign(blocks)
    for fault in faults:
        tree.report(("helpers", fault.label, "queue"), fault.message, fault.hint)
    return numbers


# -- result ----------------------------------------------------------------------------------------------------------


def _desired(
    source: str,
    document: ProfileDoc,
    attached: list[_Attached],
    queues: Mapping[Service, int],
    warnings: tuple[str, ...],
) -> Desired:
    served = [a for a in attached if not a.choice.is_kernel]
    own = {key: _registration(a, key, queues) for a in served for key in a.keys}
    stock = {
        a.stock_key(key): replace(
            own[key], key=a.stock_key(key), status=Status.DISABLED, policies=a.choice.engine.policies
        )
        for a in served
        for key in a.keys
        if a.stock_key(key) not in own
    }
    return Desired(
        profile=document.profile,
        source=source,
        netns=document.netns,
        backend=document.backend,
        helpers=tuple(_helper(a, stock) for a in attached),
        registrations=tuple(own[key] for key in sorted(own)),
        stock=tuple(stock[key] for key in sorted(stock)),
        processes=_processes((*own.values(), *stock.values())),
        warnings=warnings,
    )


def _registration(attached: _Attached, key: HelperKey, queues: Mapping[Service, int]) -> Registration:
    engine, doc = attached.choice.engine, attached.choice.doc
    return Registration(
        key=key,
        queue_num=queues[attached.service(key)],
        status=Status.ENABLED,
        policies=tuple(_policy(policy, doc) for policy in engine.policies),
        priv_data_len=engine.priv_data_len,
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
    stock_keys = set() if choice.is_kernel else {attached.stock_key(key) for key in attached.keys}
    return Helper(
        name=choice.label,
        use=choice.entry.name,
        engine=choice.engine.engine,
        keys=attached.keys,
        stock_keys=tuple(sorted(stock_keys & stock.keys())),
        attachments=attached.attachments,
        modules=choice.engine.modules,
    )


def _processes(registrations: tuple[Registration, ...]) -> tuple[ProcessSpec, ...]:
    """One conntrackd for all its helpers: it dispatches by queue number and opens its queues in one namespace."""
    if not registrations:
        return ()
    return (
        ProcessSpec(
            name="conntrackd",
            argv=("conntrackd", "-C", "conntrackd.conf"),
            files=("conntrackd.conf",),
            queues=tuple(sorted({r.queue_num for r in registrations})),
            keys=tuple(sorted(r.key for r in registrations)),
        ),
    )
