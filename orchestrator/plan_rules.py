"""Whether rules must be loaded, why, and what speaks against it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from orchestrator import catalogue
from orchestrator.model import Engine, HelperKey, L4Proto, Listing, RuleQueue, Rules, Target
from orchestrator.overlap import first_overlap
from orchestrator.state import Action, Change, Observed, Owner, Refusal, Scope, rules_name


def rules_reason_of(rules: Rules, observed: Observed, *, attached: set[HelperKey], would_idle: bool) -> str:
    """Why the rules must be loaded: a sentence, or empty when they are loaded as they should be."""
    listing = live_listing(rules, observed)
    if listing is None:
        return "not loaded"
    if not listing.digest:
        return "somebody emptied them"
    if listing.digest != rules.digest:
        return "the profile changed"
    if observed.baseline is None or observed.baseline.text != listing.text:
        return "somebody changed them"
    if attached:
        return "they would go on attaching a helper that is gone"
    if would_idle:
        return "a helper is registered anew, after which this kernel would let them do nothing"
    return ""


def live_listing(rules: Rules, observed: Observed) -> Listing | None:
    return next((seen for seen in observed.listings if seen.backend is rules.backend), None)


def other_listings(rules: Rules, observed: Observed) -> list[Listing]:
    return [seen for seen in observed.listings if seen.backend is not rules.backend]


def loaded_rules(listing: Listing, observed: Observed, profile: str) -> Rules:
    """The rules behind a listing, for undoing: the ledger's documents if they are these, else only their name."""
    applied = observed.applied
    if applied and applied.target.rules.backend is listing.backend and applied.target.rules.digest == listing.digest:
        return applied.target.rules
    return Rules(listing.backend, profile, listing.digest, ())


def rules_changes(rules: Rules, observed: Observed, reason: str) -> Iterable[Change]:
    if reason:
        listing = live_listing(rules, observed)
        yield Change(
            Action.CREATE if listing is None else Action.UPDATE,
            Scope.RULES,
            rules_name(rules),
            _line_counts(rules, observed, listing),
            reason="" if listing is None else reason,
        )
    for other in other_listings(rules, observed):
        yield Change(Action.DELETE, Scope.RULES, rules_name(other, rules.profile), "", reason="the backend changed")


def _line_counts(rules: Rules, observed: Observed, listing: Listing | None) -> str:
    after = rule_lines(rules)
    if listing is None:
        return f"{len(after)} rules"
    if (
        observed.applied is None
        or observed.applied.target.rules.digest != listing.digest
        or listing.digest == rules.digest
    ):
        return ""
    before = rule_lines(observed.applied.target.rules)
    added, removed = Counter(after) - Counter(before), Counter(before) - Counter(after)
    return f"+{added.total()} -{removed.total()} rules" if added or removed else ""


def rule_lines(rules: Rules) -> list[str]:
    """The lines of the documents that attach a helper."""
    lines = (line.strip() for document in rules.documents for line in document.text.splitlines())
    return [line for line in lines if "ct helper set" in line or "--helper" in line]


def refuse_foreign_table(observed: Observed) -> list[Refusal]:
    if not observed.foreign_table:
        return []
    return [
        Refusal(
            f"{observed.foreign_table} exists and was not made by orch",
            hint="rename the profile, or remove that table",
            where=f"netns {observed.netns}",
        )
    ]


def refuse_modules(target: Target, observed: Observed) -> list[Refusal]:
    refusals = [
        Refusal(
            f"kernel module {name} does not exist on this host",
            hint="install the kernel's modules" + _or_engine(name),
        )
        for name in target.modules
        if name not in observed.modules and name not in observed.loadable
    ]
    own = {r.key for r in (*target.registrations, *target.stock)}
    live = {(r.key.name, r.key.l4proto) for r in observed.registrations}
    in_kernel = sorted({a.key for a in target.attachments if a.key not in own})
    refusals += [
        Refusal(
            f"cannot use the in-kernel helper {key}: a user-space helper of that name is registered",
            hint="tear the profile down that registered it (orch status)" + _or_engine((key.l4proto, key.name)),
            where="the helper registry is host-wide",
        )
        for key in in_kernel
        if (key.name, key.l4proto) in live
    ]
    return refusals


def _or_engine(kernels: str | tuple[L4Proto, str]) -> str:
    """Which engine does what a module or a helper of the kernel does, as the end of a hint; empty if none does."""
    for entry in catalogue.helpers().values():
        kernel = entry.engine(Engine.KERNEL)
        if kernel is not None and kernels in (*kernel.modules, *kernel.names):
            others = (e.engine for e in entry.engines if e is not kernel and not e.broken)
            return next((f", or use engine: {engine}" for engine in others), "")
    return ""


def refuse_neighbours(target: Target, observed: Observed) -> list[Refusal]:
    refusals: list[Refusal] = []
    for neighbour in observed.neighbours:
        owner = neighbour.owner
        pair = first_overlap(target.attachments, neighbour.target.attachments)
        if pair is not None:
            mine, theirs = pair
            refusals.append(
                Refusal(
                    f"profile {owner.profile} here attaches {theirs.key} to the same traffic as {mine.key}",
                    hint="the first attachment of a connection wins: narrow the ports, interfaces or addresses",
                    where=f"{mine.path} {mine.key.l3proto}/{mine.key.l4proto} port {', '.join(map(str, mine.ports))}",
                )
            )
        refusals += _refuse_rule_queues(target.rule_queues, owner, neighbour.target.rule_queues)
    return refusals


def _refuse_rule_queues(mine: tuple[RuleQueue, ...], owner: Owner, theirs: tuple[RuleQueue, ...]) -> Iterator[Refusal]:
    """Labels and queue numbers are those of a namespace: with one in common, a helper gets packets of another."""
    taken = {what: queue.helper for queue in theirs for what in _numbers_of(queue)}
    for queue in mine:
        for kind, number in _numbers_of(queue):
            if (kind, number) in taken:
                helper = f"helper {taken[kind, number]} of profile {owner.profile} here"
                yield Refusal(
                    f"{kind} {number} of helper {queue.helper} is that of {helper}",
                    hint=f"give one of them another ({kind}:)",
                    where=f"netns {owner.netns}",
                )


def _numbers_of(queue: RuleQueue) -> list[tuple[str, int]]:
    return [("label", queue.label), *(("queue", number) for number in queue.queues)]
