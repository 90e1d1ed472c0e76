"""A profile becomes text documents, and those documents become what apply makes true."""

from __future__ import annotations

import hashlib
import json
import pathlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.document import (
    parse_helper,
    parse_registrations,
    parse_supervise,
    problems_of_iptables,
    problems_of_nft,
)
from orchestrator.errors import Problem, ProfileError
from orchestrator.model import (
    Desired,
    Document,
    Engine,
    HelperKey,
    L3Proto,
    L4Proto,
    NativeHelper,
    Path,
    Policy,
    ProcessSpec,
    Registration,
    RuleQueue,
    Rules,
    Target,
)
from orchestrator.ruleset import IptablesRule, QueueRule, RuleGroup, iptables_rules, queue_rules, rule_groups

REGISTRATIONS = "registrations.yaml"
SUPERVISE = "supervise.yaml"
CONNTRACKD = "conntrackd.conf"
HELPER = "helper.toml"
NFT = "ruleset.nft"
IPTABLES = {L3Proto.IP: "ruleset.iptables", L3Proto.IP6: "ruleset.ip6tables"}

CONNTRACKD_QUEUE_LEN = 1024  # packets that wait for one helper before the kernel drops

_INT_MAX = 0x7FFFFFFF
# Packets of this host to itself pass postrouting and input: once is enough.
_NOT_LOOPED = 'iifname != "lo"'
_TO_MANY = "fib daddr type { broadcast, multicast }"
_TO_ONE = "fib daddr type != { broadcast, multicast }"

_DIGEST_PLACEHOLDER = "@" * 16
# What the expressions of a user's template can raise besides Jinja's own errors.
_FAILURES = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class QueueChain:
    """The rules that queue the packets of one helper; base chains jump there."""

    name: str
    rules: tuple[QueueRule, ...]


@dataclass(frozen=True, slots=True)
class QueueJump:
    """From a base chain to a queue chain, for connections with a label and packets that meet `condition`, if any."""

    label: int
    condition: str
    chain: str


@dataclass(frozen=True, slots=True)
class NftChain:
    """A base chain. Its name says hook and priority, because neither can be changed in place."""

    name: str
    hook: str
    priority: str
    groups: tuple[RuleGroup, ...] = ()
    jumps: tuple[QueueJump, ...] = ()


@dataclass(frozen=True, slots=True)
class IptablesChain:
    """A chain of ours in table raw, the built-in chain that jumps to it, and the option for its interface."""

    name: str
    hook: str
    interface_option: str
    rules: tuple[IptablesRule, ...]


@dataclass(frozen=True, slots=True)
class ConntrackdType:
    """One `Type` block: what conntrackd does with the packets of one queue. `policies` are of the stock key."""

    plugin: str
    family: str
    l4proto: L4Proto
    queue_num: int
    queue_len: int
    policies: tuple[Policy, ...]


@dataclass(frozen=True, slots=True)
class View:
    """All that a template sees, as `view`; it loops and spaces, and decides nothing."""

    profile: str
    digest: str
    registrations: tuple[Registration, ...]
    stock: tuple[Registration, ...]
    processes: tuple[ProcessSpec, ...]
    reconcile: bool
    objects: tuple[HelperKey, ...]
    queue_chains: tuple[QueueChain, ...]
    chains: tuple[NftChain, ...]
    iptables_chains: tuple[IptablesChain, ...]
    ip6tables_chains: tuple[IptablesChain, ...]
    conntrackd_types: tuple[ConntrackdType, ...]


def render(desired: Desired, *, template_dir: pathlib.Path | None = None) -> tuple[Document, ...]:
    """All documents of a profile, in the order in which they are shown. Same input, same bytes.

    Templates of `template_dir` take the place of ours, file by file. Raises ProfileError for one that does not render
    or whose document is not what it should be.
    """
    return target(desired, template_dir=template_dir).documents


def target(desired: Desired, *, template_dir: pathlib.Path | None = None) -> Target:
    """Render, and read registrations and processes back from the text: nothing else is applied. Raises as `render`."""
    templates = _Templates(template_dir)
    view = view_of(desired)
    registrations = templates.document(REGISTRATIONS, view)
    supervise = templates.document(SUPERVISE, view)
    rules = _rules(desired, templates, view)
    conntrackd = (templates.document(CONNTRACKD, view),) if view.conntrackd_types else ()
    helpers = tuple(document for native in desired.natives for document in _helper(templates, view, native))
    parsed = templates.parsed(registrations, parse_registrations)
    processes, reconcile = templates.parsed(supervise, parse_supervise)
    return Target(
        profile=desired.profile,
        documents=(registrations, *rules.documents, *conntrackd, *helpers, supervise),
        registrations=parsed[0],
        stock=parsed[1],
        rules=rules,
        processes=processes,
        modules=desired.modules,
        attachments=desired.attachments,
        rule_queues=desired.rule_queues,
        reconcile=reconcile,
    )


def view_of(desired: Desired) -> View:
    """What the templates are given for a profile."""
    attachments = desired.attachments
    is_nft = desired.backend.is_nftables
    return View(
        profile=desired.profile,
        digest=_DIGEST_PLACEHOLDER,
        registrations=desired.registrations,
        stock=desired.stock,
        processes=desired.processes,
        reconcile=desired.reconcile,
        objects=tuple(sorted({a.key for a in attachments})) if is_nft else (),
        queue_chains=tuple(QueueChain(_queue_chain(q), queue_rules(q)) for q in desired.rule_queues),
        chains=(*_attach_chains(desired), *_queue_hooks(desired.rule_queues)) if is_nft else (),
        iptables_chains=() if is_nft else _iptables_chains(desired, L3Proto.IP),
        ip6tables_chains=() if is_nft else _iptables_chains(desired, L3Proto.IP6),
        conntrackd_types=_conntrackd_types(desired),
    )


def _attach_chains(desired: Desired) -> tuple[NftChain, ...]:
    """Priority mangle (-150) is after conntrack, which nft needs, and before dstnat: ports are as the client sent."""
    labels = {key: queue.label for queue in desired.rule_queues for key in queue.keys}
    groups = rule_groups(desired.attachments, labels)
    chains = (
        NftChain(f"{hook}-mangle150", hook, "mangle", groups=tuple(g for g in groups if g.path is path))
        for path, hook in ((Path.INCOMING, "prerouting"), (Path.OUTGOING, "output"))
    )
    return tuple(c for c in chains if c.groups)


def _queue_hooks(queues: tuple[RuleQueue, ...]) -> tuple[NftChain, ...]:
    """Where packets are queued: the last place before the confirmation of each path.

    The verdict STOP skips all later chains of the hook, and here there are none of anybody: the confirmation is at
    INT_MAX, but for IPv6 in the input hook at INT_MAX - 1. Source: nf_conntrack_proto.c, ipv6_conntrack_ops.
    What this host sends to many is queued in the output hook, and nowhere else: later, the copy for this host and the
    one for the cable are two packets of one unconfirmed connection, of which the kernel drops one.
    """
    chains = (
        NftChain(f"{hook}-max{below}", hook, str(_INT_MAX - below), jumps=tuple(jumps))
        for hook, below, jumps in (
            ("postrouting", 1, (_jump(q, _TO_ONE if q.is_multicast else "") for q in queues)),
            ("input", 2, (_jump(q, _NOT_LOOPED, _TO_ONE if q.is_multicast else "") for q in queues)),
            ("output", 1, (_jump(q, _TO_MANY) for q in queues if q.is_multicast)),
        )
    )
    return tuple(c for c in chains if c.jumps)


def _jump(queue: RuleQueue, *conditions: str) -> QueueJump:
    return QueueJump(queue.label, " ".join(filter(None, conditions)), _queue_chain(queue))


def _queue_chain(queue: RuleQueue) -> str:
    return f"queue-{queue.helper}"


def _iptables_chains(desired: Desired, l3proto: L3Proto) -> tuple[IptablesChain, ...]:
    mine = tuple(a for a in desired.attachments if a.key.l3proto is l3proto)
    chains = (
        IptablesChain(
            name=f"orch-{desired.profile}-{suffix}",
            hook=hook,
            interface_option=option,
            rules=iptables_rules(a for a in mine if a.path is path),
        )
        for path, suffix, hook, option in (
            (Path.INCOMING, "pre", "PREROUTING", "-i"),
            (Path.OUTGOING, "out", "OUTPUT", "-o"),
        )
    )
    return tuple(c for c in chains if c.rules)


def _conntrackd_types(desired: Desired) -> tuple[ConntrackdType, ...]:
    """One block per plugin, family and protocol; a policy only where the key that is attached is the stock key itself.

    conntrackd finds the plugin by queue number, so own and stock registration of a plugin share it, and it writes the
    policy of the stock key alone.
    """
    registrations = {r.key: r for r in (*desired.registrations, *desired.stock)}
    attached = {r.key for r in desired.registrations}
    types: dict[tuple[str, L3Proto, L4Proto], ConntrackdType] = {}
    for helper in desired.helpers:
        if helper.engine is not Engine.CONNTRACKD:
            continue
        for key in (*helper.keys, *helper.stock_keys):
            stock_key = HelperKey(helper.use, key.l3proto, key.l4proto)
            types[helper.use, key.l3proto, key.l4proto] = ConntrackdType(
                plugin=helper.use,
                family="inet" if key.l3proto is L3Proto.IP else "inet6",
                l4proto=key.l4proto,
                queue_num=registrations[key].queue_num,
                queue_len=CONNTRACKD_QUEUE_LEN,
                policies=registrations[stock_key].policies if stock_key in attached else (),
            )
    return tuple(types[k] for k in sorted(types))


def _helper(templates: _Templates, view: View, native: NativeHelper) -> tuple[Document, ...]:
    """What the process of one native helper is told, and the code that it runs if that is the user's own.

    Only that process reads what it is told, so here it is only checked.
    """
    document = templates.document(f"helper-{native.name}.toml", view, template=HELPER, helper=native)
    templates.parsed(document, parse_helper, template=HELPER)
    return (document, Document(f"helper-{native.name}.py", native.source)) if native.file else (document,)


def _rules(desired: Desired, templates: _Templates, view: View) -> Rules:
    if desired.backend.is_nftables:
        names = [NFT]
        check = problems_of_nft
    else:
        # A profile that attaches nothing still has a place for its digest.
        names = [IPTABLES[p] for p in L3Proto if any(a.key.l3proto is p for a in desired.attachments)]
        names = names or [IPTABLES[L3Proto.IP]]
        check = problems_of_iptables
    drafts = tuple(templates.document(name, view) for name in names)
    problems = [
        templates.problem(draft.name, f"{draft.name} line {line}: {message}" if line else f"{draft.name}: {message}")
        for draft in drafts
        for line, message in check(draft.text, desired.profile, _DIGEST_PLACEHOLDER)
    ]
    if problems:
        raise ProfileError(tuple(problems))
    digest = _digest(drafts)
    documents = tuple(Document(d.name, d.text.replace(_DIGEST_PLACEHOLDER, digest)) for d in drafts)
    return Rules(desired.backend, desired.profile, digest, documents)


def _digest(documents: tuple[Document, ...]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\n{document.text}\0".encode())
    return digest.hexdigest()[:16]


def builtin_templates() -> pathlib.Path:
    """Where our templates are: inside the package in a wheel, beside it in the source tree."""
    package = pathlib.Path(__file__).parent
    installed = package / "data" / "templates"
    return installed if installed.is_dir() else package.parent / "templates"


class _Templates:
    """The templates of one rendering; every failure becomes a ProfileError that names the template and the line."""

    def __init__(self, own: pathlib.Path | None) -> None:
        from jinja2 import FileSystemLoader, StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment

        if own is not None and not own.is_dir():
            raise ProfileError((Problem(str(own), 0, 0, "no such template directory"),))
        self._directories = ([own] if own else []) + [builtin_templates()]
        self._environment = SandboxedEnvironment(
            loader=FileSystemLoader(self._directories),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self._environment.filters["quoted"] = _quoted

    def document(self, name: str, view: View, *, template: str = "", helper: NativeHelper | None = None) -> Document:
        """Render one document; its template has the same name if none is given. `helper` is the one it is about."""
        from jinja2 import TemplateError, TemplateSyntaxError

        template = template or name
        try:
            text = self._environment.get_template(f"{template}.j2").render(view=view, helper=helper)
        except TemplateSyntaxError as error:
            problem = Problem(error.filename or self._path(template), error.lineno, 1, error.message or "syntax error")
            raise ProfileError((problem,)) from error
        except (TemplateError, *_FAILURES) as error:
            source, line = self._place(error, template)
            raise ProfileError((Problem(source, line, 1 if line else 0, str(error)),)) from error
        return Document(name, text)

    def parsed(self, document: Document, parse: Callable[[str], _T], *, template: str = "") -> _T:
        try:
            return parse(document.text)
        except ValueError as error:
            raise ProfileError((self.problem(template or document.name, f"{document.name}: {error}"),)) from error

    def problem(self, name: str, message: str) -> Problem:
        """Something wrong with a document as a whole: no line of its template can be named."""
        return Problem(self._path(name), 0, 0, message)

    def _path(self, name: str) -> str:
        paths = [directory / f"{name}.j2" for directory in self._directories]
        return str(next((p for p in paths if p.is_file()), paths[-1]))

    def _place(self, error: BaseException, name: str) -> tuple[str, int]:
        """The innermost template line that the error passed through; Jinja maps its frames to template lines."""
        prefixes = tuple(str(directory) for directory in self._directories)
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(prefixes)]
        return (frames[-1].filename, frames[-1].lineno or 0) if frames else (self._path(name), 0)


def _quoted(value: object) -> str:
    """Text that neither YAML nor TOML takes for something else: both read JSON strings."""
    return json.dumps(str(value), ensure_ascii=False)
