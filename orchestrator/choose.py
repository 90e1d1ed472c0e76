"""One helper of a profile: which it is, who runs it, and whether its options fit."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from orchestrator import catalogue
from orchestrator.attach import FAMILY_NAMES
from orchestrator.catalogue import CatalogueEntry, Description, EngineEntry
from orchestrator.errors import OrchError
from orchestrator.model import (
    NAME_MAX_BYTES,
    Backend,
    Engine,
    HelperKey,
    Inspect,
    L3Proto,
    L4Proto,
    Queueing,
    is_helper_name,
)
from orchestrator.profile_schema import HelperDoc, ProfileDoc, name_hint, nearest, show
from orchestrator.yamltext import Path as TreePath
from orchestrator.yamltext import Tree

Describe = Callable[[str], Description | None]
"""Describes the helper in a file (an absolute path), or one that an installed package offers under a name: None if
there is none. Raises OrchError if there is one and it cannot be used."""

_NATIVE_ONLY = ("label", "inspect", "guard", "process")
_PROCESS_NAMES = ("conntrackd", "supervisor")
"""Taken in the runtime directory of a profile, where a native helper has NAME.log and more."""


@dataclass(frozen=True, slots=True)
class Own:
    """Where helpers that are not ours come from; paths start at `directory`, None if the profile is no file."""

    describe: Describe
    directory: str | None


@dataclass(frozen=True, slots=True)
class Choice:
    """One helper with its catalogue entry, its engine, and the families that the engine serves in this profile."""

    label: str
    doc: HelperDoc
    entry: CatalogueEntry
    engine: EngineEntry
    served: tuple[L3Proto, ...]
    queueing: Queueing

    @property
    def path(self) -> TreePath:
        return ("helpers", self.label)

    @property
    def is_kernel(self) -> bool:
        return self.engine.engine is Engine.KERNEL

    @property
    def is_conntrackd(self) -> bool:
        return self.engine.engine is Engine.CONNTRACKD

    @property
    def is_native(self) -> bool:
        return self.engine.engine is Engine.NATIVE

    @property
    def is_by_rules(self) -> bool:
        return self.queueing is Queueing.RULES

    @property
    def description(self) -> Description:
        """What the class of a native helper declares."""
        assert self.engine.description is not None
        return self.engine.description

    @property
    def name(self) -> str:
        """What its own registrations are called."""
        return self.doc.name or f"{self.label}-us"

    def key(self, l3proto: L3Proto, l4proto: L4Proto) -> HelperKey:
        """What rules attach."""
        if self.is_kernel or self.engine.attaches_stock_key:
            return self.stock_key(l3proto, l4proto)
        return HelperKey(self.name, l3proto, l4proto)

    def stock_key(self, l3proto: L3Proto, l4proto: L4Proto) -> HelperKey:
        return HelperKey(self.engine.name_for(l4proto), l3proto, l4proto)


def choose(tree: Tree, label: str, document: ProfileDoc, own: Own) -> Choice | None:
    """The helper `label` of a profile; problems are reported, None if it cannot be said what it is."""
    doc, path = document.helpers[label], ("helpers", label)
    if not is_helper_name(label):
        tree.report(path, f"{show(label)} is not a name for a helper", name_hint(label), of_key=True)
        return None
    entry = _entry(tree, label, doc, own)
    if entry is None:
        return None
    engine = entry.engine(doc.engine)
    if engine is None:
        hint = f"it has {', '.join(e.engine for e in entry.engines)}"
        tree.report((*path, "engine"), f"{entry.name} has no engine {show(doc.engine)} in this release", hint)
        return None
    served = tuple(f for f in L3Proto if f in document.families and f in engine.families)
    choice = Choice(label, doc, entry, engine, served, _queueing(doc, engine, document.backend))
    check_options = _check_kernel_options if choice.is_kernel else _check_options
    check_options(tree, choice)
    if choice.is_native:
        _check_native_options(tree, choice, document.backend)
    else:
        _refuse_native_options(tree, choice)
    has_name, is_served = _check_name(tree, choice), _check_served(tree, choice, document.families)
    return choice if has_name and is_served else None


def warnings(choice: Choice, families: tuple[L3Proto, ...]) -> list[str]:
    """What a person should know who chooses this."""
    engine, other = choice.engine, _better_engine(choice, families)
    if engine.broken:
        advice = f"; engine: {other} works" if other else ""
        return [f"{choice.label}: engine {engine.engine} is broken for {choice.entry.name}: {engine.broken}{advice}"]
    found = [f"{choice.label}: {engine.harm}"] if engine.harm and not choice.is_by_rules else []
    if any(f not in engine.families for f in families if f in choice.entry.families):
        serves = " and ".join(FAMILY_NAMES[f] for f in choice.served)
        advice = f"; engine: {other} serves both" if other else ""
        found.append(f"{choice.label}: {engine.engine} serves {serves} only{advice}")
    return found


def _entry(tree: Tree, label: str, doc: HelperDoc, own: Own) -> CatalogueEntry | None:
    known = catalogue.helpers()
    use = doc.use or label
    if use in known:
        return known[use]
    place, is_key = (("helpers", label, "use"), False) if doc.use else (("helpers", label), True)
    is_file = use.startswith(("/", "./", "../"))
    if is_file and not use.isprintable():
        tree.report(place, f"{show(use)} is not the path of a file", "no control characters")
        return None
    if is_file and own.directory is None and not use.startswith("/"):
        tree.report(place, f"{use} is relative to the profile, which is no file", "write an absolute path")
        return None
    try:
        description = own.describe(os.path.join(own.directory or "/", use) if is_file else use)  # noqa: PTH118 (text)
    except OrchError as error:
        tree.report(place, f"{use}: {error.what}", error.hint, of_key=is_key)
        return None
    if description is not None:
        return catalogue.described(use, description)
    hint = nearest(use, list(known)) or "orch helpers lists them; `use:` takes one under another name"
    if use.endswith(".py"):
        hint = f"for a file, write ./{use}"
    tree.report(place, f"there is no helper {show(use)}", hint, of_key=is_key)
    return None


def _queueing(doc: HelperDoc, engine: EngineEntry, backend: Backend) -> Queueing:
    if doc.queueing is not None:
        return doc.queueing
    by_rules = engine.engine is Engine.NATIVE and backend.is_nftables
    return Queueing.RULES if by_rules else Queueing.REGISTRATION


def _check_kernel_options(tree: Tree, choice: Choice) -> None:
    others = [e.engine for e in choice.entry.engines if e.engine is not Engine.KERNEL]
    hint = f"remove it, or use engine: {others[0]}" if others else "remove it"
    for option in ("name", "queueing", "queue", "policies"):
        if option in choice.doc.model_fields_set:
            message = f"the kernel's helper has its own {option}, which cannot be chosen"
            tree.report((*choice.path, option), message, hint, of_key=True)


def _check_name(tree: Tree, choice: Choice) -> bool:
    """True if the registration has a name; the default adds -us and may become too long."""
    name, stock = choice.doc.name, choice.entry.name
    if choice.engine.attaches_stock_key and name not in ("", stock):
        message = f"{choice.engine.engine} serves {stock} under the name {stock} only"
        tree.report((*choice.path, "name"), message, "remove it")
    if choice.is_kernel or choice.engine.attaches_stock_key or is_helper_name(choice.name):
        return True
    message = f"the registration would be called {choice.name}, which is longer than {NAME_MAX_BYTES} bytes"
    tree.report(choice.path, message, "give it a `name:`, or shorten this one", of_key=True)
    return False


def _check_served(tree: Tree, choice: Choice, families: tuple[L3Proto, ...]) -> bool:
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


def _check_options(tree: Tree, choice: Choice) -> None:
    known = [policy.name for policy in choice.engine.policies]
    for name in choice.doc.policies:
        if name not in known:
            message = f"{choice.entry.name} has no policy {show(name)}"
            tree.report((*choice.path, "policies", name), message, f"it has {', '.join(known)}", of_key=True)


def _check_native_options(tree: Tree, choice: Choice, backend: Backend) -> None:
    doc = choice.doc
    if choice.label in _PROCESS_NAMES:
        tree.report(choice.path, f"{choice.label} is the name of a process of orch", "choose another", of_key=True)
    if choice.is_by_rules and not backend.is_nftables:
        message, hint = "queueing: rules needs backend: nftables", "queueing: registration, or backend: nftables"
        tree.report((*choice.path, "queueing"), message, hint)
    for option in ("label", "inspect"):
        if option in doc.model_fields_set and not choice.is_by_rules:
            message = f"{option} is for queueing: rules, and here the registration queues"
            tree.report((*choice.path, option), message, "remove it", of_key=True)
    has_tcp = any(protocol.l4proto is L4Proto.TCP for protocol in choice.entry.protocols)
    if doc.inspect is Inspect.TRIGGERS and choice.is_by_rules and not (has_tcp and choice.description.triggers):
        message = f"{choice.entry.name} has no triggers: every payload can matter"
        tree.report((*choice.path, "inspect"), message, "inspect: payload")


def _refuse_native_options(tree: Tree, choice: Choice) -> None:
    hint = "engine: native, or remove it" if choice.entry.engine(Engine.NATIVE) else "remove it"
    for option in _NATIVE_ONLY:
        if option in choice.doc.model_fields_set:
            tree.report((*choice.path, option), f"{option} is for engine native only", hint, of_key=True)
    if choice.is_conntrackd and choice.is_by_rules:
        message = f"queueing: rules is not available with engine {choice.engine.engine}"
        hint = "engine: native" if choice.entry.engine(Engine.NATIVE) else "remove it: here the registration queues"
        tree.report((*choice.path, "queueing"), message, hint)


def _better_engine(choice: Choice, families: Iterable[L3Proto]) -> Engine | None:
    """Another engine of the helper that serves all these families, as far as the protocol has them."""
    wanted = set(families) & set(choice.entry.families)
    others = (e for e in choice.entry.engines if e is not choice.engine and not e.broken)
    return next((e.engine for e in others if wanted and wanted <= set(e.families)), None)
