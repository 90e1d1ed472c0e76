"""Would a connection get a helper that works, by which attachment, and if not, why: judged from what was seen."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path as FilePath

from orchestrator.earlier import takes
from orchestrator.model import Attachment, HelperKey, L3Proto, L4Proto, Netns, Path, PortRange, Queueing, Status
from orchestrator.ports import EarlierRule, Ends, HelperRule, LiveConnection, LiveExpectation, Route
from orchestrator.state import Applied, Owner
from orchestrator.status import HelperState, HelperStatus, ProfileStatus
from orchestrator.typed import DEFAULT_STATE

_MISSING = "missing"
_RULES = ("inet orch-", "raw orch-")  # how drift begins that is about rules: state.rules_name
_WELL_ENOUGH = (HelperState.RUNNING, HelperState.UNSUPERVISED, HelperState.IN_KERNEL)


class Reason(StrEnum):
    """Why there is no help, or that there is; programs read it."""

    HELPED = "helped"
    NO_PROFILE = "no profile"
    PROTOCOL = "protocol"
    FAMILY = "family"
    PORT = "port"
    PATH = "path"
    INTERFACE = "interface"
    ADDRESS = "address"
    RULES = "rules"
    EARLIER = "earlier rule"
    REGISTRATION = "registration"
    DISABLED = "disabled"
    QUEUE = "queue"
    PROCESS = "process"
    OLDER = "older"
    OTHER = "other helper"


@dataclass(frozen=True, slots=True)
class Way:
    """A path that a connection takes through this host, with the interface that an attachment may ask for."""

    path: Path
    interface: str


@dataclass(frozen=True, slots=True)
class Question:
    """A connection, as its first packet has it; `judged` says how the ways through this host are known."""

    l4proto: L4Proto
    ends: Ends
    ways: tuple[Way, ...]
    judged: str

    @property
    def l3proto(self) -> L3Proto:
        return L3Proto.IP if ipaddress.ip_address(self.ends.saddr).version == 4 else L3Proto.IP6


@dataclass(frozen=True, slots=True)
class Match:
    """An attachment of a profile, and how the helper that it attaches is."""

    owner: Owner
    source: str
    attachment: Attachment
    helper: HelperStatus


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen in a namespace: its profiles, the rules of others, live connections and expectations."""

    netns: Netns
    profiles: tuple[tuple[Applied, ProfileStatus], ...]
    foreign_rules: tuple[HelperRule, ...]
    earlier_rules: tuple[EarlierRule, ...]
    connections: tuple[LiveConnection, ...]
    expectations: tuple[LiveExpectation, ...]
    state_dir: FilePath = DEFAULT_STATE


@dataclass(frozen=True, slots=True)
class Explanation:
    """`matches` are the attachments that take the connection, `nearest` the ones that nearly do, if none does.

    `connections` are the live ones that are meant, `expectations` theirs. `notes` are further sentences.
    """

    question: Question
    netns: Netns
    reason: Reason
    why: str
    cure: str
    matches: tuple[Match, ...]
    nearest: tuple[Match, ...]
    connections: tuple[LiveConnection, ...]
    expectations: tuple[LiveExpectation, ...]
    notes: tuple[str, ...]

    @property
    def is_helped(self) -> bool:
        return self.reason is Reason.HELPED


def ways(source: Route, destination: Route) -> tuple[tuple[Way, ...], str]:
    """Which ways a connection takes, from what routing says of its ends; and a sentence that says so.

    One of this host to itself is seen on both paths, on the way out first.
    """
    if source.is_local and destination.is_local:
        return (Way(Path.OUTGOING, "lo"), Way(Path.INCOMING, "lo")), "both addresses are of this host"
    if source.is_local:
        via = f", the other is reached by {destination.interface}" if destination.interface else ""
        return (Way(Path.OUTGOING, destination.interface),), f"the source is an address of this host{via}"
    ours = "the destination is an address of this host" if destination.is_local else "neither address is of this host"
    via = f", the source is reached by {source.interface}" if source.interface else ""
    return (Way(Path.INCOMING, source.interface),), ours + via


def explain(question: Question, sight: Sight) -> Explanation:
    """Judge one connection."""
    everything = tuple(_attached(sight))
    matches = tuple(m for m in everything if not misfits(m.attachment, question))
    live = tuple(c for c in sight.connections if _is_meant(question.ends, c.ends))
    expectations = tuple(e for e in sight.expectations if any(e.master == c.ends for c in live))
    if matches:
        reason, why, cure = _judge(matches[0], question, sight, live)
        nearest: tuple[Match, ...] = ()
    else:
        nearest = _nearest(everything, question)
        reason, why, cure = _why_unattached(nearest, question, sight)
    return Explanation(
        question=question,
        netns=sight.netns,
        reason=reason,
        why=why,
        cure=cure,
        matches=matches,
        nearest=nearest,
        connections=live,
        expectations=expectations,
        notes=tuple(_notes(matches, question, sight, live, expectations)),
    )


def misfits(attachment: Attachment, question: Question) -> tuple[Reason, ...]:
    """In which respects an attachment does not take a connection, the one that matters most first."""
    judged = {
        Reason.PROTOCOL: attachment.key.l4proto is question.l4proto,
        Reason.FAMILY: attachment.key.l3proto is question.l3proto,
        Reason.PORT: any(ports.first <= question.ends.dport <= ports.last for ports in attachment.ports),
        Reason.PATH: any(way.path is attachment.path for way in question.ways),
        Reason.INTERFACE: any(
            attachment.interface in ("", way.interface) for way in question.ways if way.path is attachment.path
        ),
        Reason.ADDRESS: _is_in(question.ends.saddr, attachment.saddr) and _is_in(question.ends.daddr, attachment.daddr),
    }
    return tuple(reason for reason, is_right in judged.items() if not is_right)


def _is_in(address: str, prefixes: tuple[str, ...]) -> bool:
    return not prefixes or any(ipaddress.ip_address(address) in _network(prefix) for prefix in prefixes)


@cache
def _network(prefix: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(prefix)


def _attached(sight: Sight) -> Iterator[Match]:
    for applied, status in sight.profiles:
        keys = {summary.name: summary.keys for summary in applied.helpers}
        helpers = {key: helper for helper in status.helpers for key in keys[helper.name]}
        for attachment in applied.target.attachments:
            if attachment.key in helpers:
                yield Match(applied.owner, applied.source, attachment, helpers[attachment.key])


def _is_meant(asked: Ends, live: Ends) -> bool:
    same = (asked.saddr, asked.daddr, asked.dport) == (live.saddr, live.daddr, live.dport)
    return same and asked.sport in (0, live.sport)


def _is_expected(asked: Ends, expected: Ends) -> bool:
    """True if an expectation takes a connection; what it leaves open reads as zero."""
    sources = ("0.0.0.0", "::", asked.saddr)
    same = (asked.daddr, asked.dport) == (expected.daddr, expected.dport)
    return same and expected.saddr in sources and (0 in (asked.sport, expected.sport) or asked.sport == expected.sport)


# -- attached: does it work? -------------------------------------------------------------------------------------------


def _judge(match: Match, question: Question, sight: Sight, live: tuple[LiveConnection, ...]) -> tuple[Reason, str, str]:
    """The first thing that is wrong between the rules and the process."""
    apply = match.owner.how_to("apply", match.source, state_dir=sight.state_dir)
    broken = (
        _broken_registration(match.attachment.key, match.helper)
        or _broken_rules(match.owner, sight)
        or _broken_process(match.helper)
    )
    if broken:
        return (*broken, apply)
    earlier = next((rule for rule in _earlier(match, question, sight) if not rule.is_partial), None)
    has_it = question.ends.sport and live and live[0].helper == match.attachment.key.name
    if earlier and not has_it:
        why = f"a rule that is not orch's comes first, and takes it: {earlier}"
        return Reason.EARLIER, why, f"move it behind the jump to the rules of {match.owner}"
    return _judge_live(match, question, live)


def _earlier(match: Match, question: Question, sight: Sight) -> Iterator[EarlierRule]:
    """Rules of others that take the connection, or may, before it comes to the rule of an attachment."""
    ends, attachment = question.ends, match.attachment
    for way in question.ways:
        asked = replace(
            attachment,
            ports=(PortRange(ends.dport, ends.dport),),
            interface=way.interface,
            saddr=(ends.saddr,),
            daddr=(ends.daddr,),
        )
        if way.path is attachment.path:
            rules = (rule for rule in sight.earlier_rules if rule.profile == match.owner.profile)
            yield from (rule for rule in rules if takes(rule, asked))


def _broken_rules(owner: Owner, sight: Sight) -> tuple[Reason, str] | None:
    status = next(status for applied, status in sight.profiles if applied.owner == owner)
    drift = next((line for line in status.drift if line.startswith(_RULES)), "")
    return (Reason.RULES, f"the rules of {owner} are not as they were applied: {drift}") if drift else None


def _broken_registration(key: HelperKey, helper: HelperStatus) -> tuple[Reason, str] | None:
    state = dict(helper.registrations).get(key)
    if state == _MISSING:
        return Reason.REGISTRATION, f"{key} is not registered: what rules attach is dead"
    if state == Status.DISABLED and helper.queueing == Queueing.REGISTRATION:
        return Reason.DISABLED, f"{key} is disabled: connections show the helper, and nothing is ever expected"
    return None


def _broken_process(helper: HelperStatus) -> tuple[Reason, str] | None:
    if helper.state is HelperState.IN_KERNEL:
        return None
    if helper.state not in _WELL_ENOUGH:
        why = f": {helper.reason or helper.last_words}" if helper.reason or helper.last_words else ""
        return Reason.PROCESS, f"the process of {helper.name} does not work ({helper.state}){why}"
    deaf = [str(queue.queue_num) for queue in helper.queues if not queue.is_bound]
    if deaf:
        return Reason.QUEUE, f"nobody listens on queue {', '.join(deaf)} of {helper.name}"
    return None


def _judge_live(match: Match, question: Question, live: tuple[LiveConnection, ...]) -> tuple[Reason, str, str]:
    """What is attached is fixed with the first packet: a connection that is there keeps what it has."""
    key = match.attachment.key
    if question.ends.sport and live and not live[0].helper:
        return Reason.OLDER, "this connection has no helper: it is older than the rules", "connect again"
    if question.ends.sport and live and live[0].helper != key.name:
        why = f"this connection has the helper {live[0].helper}: whoever attaches first wins"
        return Reason.OTHER, why, "remove the other rule, then connect again"
    return Reason.HELPED, f"helper {match.helper.name} sees it", ""


# -- not attached: what is nearest? ------------------------------------------------------------------------------------


def _nearest(everything: tuple[Match, ...], question: Question) -> tuple[Match, ...]:
    """Those that fail in the fewest respects, and in the least of them; no more than a person wants to read."""
    ranked = [(misfits(match.attachment, question), match) for match in everything]
    if not ranked:
        return ()
    rank = min(_rank(failed) for failed, _ in ranked)
    return tuple(match for failed, match in ranked if _rank(failed) == rank)[:3]


def _rank(failed: tuple[Reason, ...]) -> tuple[int, int]:
    order = list(Reason)
    return len(failed), -order.index(failed[0])


def _why_unattached(nearest: tuple[Match, ...], question: Question, sight: Sight) -> tuple[Reason, str, str]:
    if not nearest:
        return Reason.NO_PROFILE, f"nothing is applied in netns {sight.netns}", "orch apply PROFILE"
    reason = misfits(nearest[0].attachment, question)[0]
    ends = question.ends
    path = question.ways[0].path
    whys = {
        Reason.PROTOCOL: f"nothing attaches {question.l4proto}",
        Reason.FAMILY: f"nothing attaches {question.l3proto} connections to port {ends.dport}",
        Reason.PORT: f"port {ends.dport} is not attached",
        Reason.PATH: f"it is {path} here, and nothing attaches {path} connections to port {ends.dport}",
        Reason.INTERFACE: f"its interface ({question.ways[0].interface or 'unknown'}) is not attached",
        Reason.ADDRESS: f"{ends.saddr} or {ends.daddr} is not among the addresses that are attached",
    }
    return reason, whys[reason], f"change attach in {nearest[0].source}, then orch apply"


# -- what else there is to tell ----------------------------------------------------------------------------------------


def _notes(
    matches: tuple[Match, ...],
    question: Question,
    sight: Sight,
    live: tuple[LiveConnection, ...],
    expectations: tuple[LiveExpectation, ...],
) -> Iterable[str]:
    names = {match.attachment.key.name for match in matches}
    if len(names) > 1:
        yield f"attached by several: {', '.join(sorted(names))}; the first rule wins"
    for rule in sight.foreign_rules:
        if rule.l4proto is question.l4proto and question.l3proto in rule.families:
            yield f"a rule that is not orch's may attach {rule.helper}: {rule.place}"
    earlier = tuple(_earlier(matches[0], question, sight)) if matches else ()
    yield from (f"a rule that is not orch's comes first, and may take it: {one}" for one in earlier if one.is_partial)
    for expected in sight.expectations:
        if expected.l4proto is question.l4proto and _is_expected(question.ends, expected.ends):
            master = expected.master
            yield (
                f"the kernel expects it because of {master.saddr} port {master.sport} -> "
                f"{master.daddr} port {master.dport}, helper {expected.helper}"
            )
    if not matches:
        return
    if not live:
        yield "there is no such connection now"
    elif not expectations and any(connection.helper for connection in live):
        yield f"nothing is expected now{_counted(matches[0].helper)}"
    is_older = all(rule.is_partial for rule in earlier)
    if is_older and question.ends.sport == 0 and any(not connection.helper for connection in live):
        yield "connections without a helper are older than the rules: connect again"


def _counted(helper: HelperStatus) -> str:
    if helper.counters is None:
        return ""
    seen = helper.counters.counters
    return (
        f"; since its start the process saw {seen.packets} packets, expected {seen.expectations}, "
        f"refused {seen.refused}" + (f", last: {helper.counters.note}" if helper.counters.note else "")
    )
