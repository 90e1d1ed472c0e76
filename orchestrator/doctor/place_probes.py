"""What can be wrong in one network namespace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator.doctor.facts import Facts, Place, attaches, listed, nfct, seen
from orchestrator.doctor.findings import Finding, PlaceProbe, note, problem, warning
from orchestrator.earlier import takes
from orchestrator.model import L3Proto, QueueRow, Status
from orchestrator.ports import HelperRule

_CONNTRACK = -200  # nft attaches after it only. Source: netfilter_ipv4.h, NF_IP_PRI_CONNTRACK
_CONFIRM = 2**31 - 1  # NF_IP_PRI_CONNTRACK_CONFIRM: too late to attach
_BEFORE_CONNTRACK = ("prerouting", "output")
_BEFORE_CONFIRM = ("input", "postrouting")
_NEARLY_FULL = 0.9
_RELATED = "ct state established,related accept"


def silent_rules(_: Facts, place: Place) -> Iterable[Finding]:
    """nft rules that load and count, and attach nothing."""
    for rule in seen(place.rules):
        if not rule.backend.is_nftables:
            continue
        what = f"{rule.place} attaches {rule.helper}"
        if rule.is_late:
            yield problem(f"{what} to established connections: only new ones take a helper", "match ct state new")
        elif not rule.hooks:
            yield warning(f"{what}, and no base chain leads there", "jump to it, or remove it")
        elif all(_is_silent(hook, priority) for hook, priority in rule.hooks):
            at = listed(f"{hook} {priority}" for hook, priority in rule.hooks)
            yield problem(
                f"{what} at {at}, where connections are not tracked yet, or confirmed: it counts, and does nothing",
                "use priority mangle (-150) in prerouting and output",
            )


def _is_silent(hook: str, priority: int) -> bool:
    if hook in _BEFORE_CONNTRACK:
        return priority < _CONNTRACK
    return hook in _BEFORE_CONFIRM and priority == _CONFIRM


def takes_effect(rule: HelperRule) -> bool:
    """True if connections can get their helper by this rule."""
    if not rule.backend.is_nftables:
        return True
    return not rule.is_late and any(not _is_silent(*hook) for hook in rule.hooks)


def earlier_rules(facts: Facts, place: Place) -> Iterable[Finding]:
    """Rules of others that leave an attachment nothing. One that drops is meant to; a partial one spares some."""
    found = {
        (str(rule), applied.owner.profile)
        for rule in seen(place.earlier_rules)
        for applied in facts.applied_at(place.netns)
        if rule.profile == applied.owner.profile and rule.verdict != "DROP" and not rule.is_partial
        if any(takes(rule, attachment) for attachment in applied.target.attachments)
    }
    for text, name in sorted(found):
        yield problem(
            f"{text}: it comes before the rules of profile {name}, and leaves them nothing to attach",
            f"move it behind the jump to orch-{name}",
        )


def dead_rules(facts: Facts, place: Place) -> Iterable[Finding]:
    """From 7.3 on, a helper can be unregistered under a rule, which goes on attaching what is dead."""
    registrations = seen(facts.registrations)
    taken = {pair for pairs in facts.kernel_helpers.values() for pair in pairs}
    for rule in seen(place.rules):
        is_there = any(attaches(rule, r) for r in registrations) or (rule.helper, rule.l4proto) in taken
        if not is_there:
            yield problem(
                f"{rule.place} attaches {rule.helper}, which is not registered: connections get a dead helper",
                "register it, then load the rules again: orch apply does both",
            )


def idle_rules(facts: Facts, place: Place) -> Iterable[Finding]:
    """What others do to rules that work: nothing tells of it, and orch itself does not."""
    if helpers := facts.may_become_idle(place):
        yield warning(
            f"iptables rules attach {listed(helpers)}: idle, without a word, once anybody unregisters any helper",
            "use backend: nftables; or unregister none, and unload no module that has one",
        )


def one_family(_: Facts, place: Place) -> Iterable[Finding]:
    """nft takes a helper that is registered for one family into an inet table, and the other is not covered."""
    if not _has_ip6(place):
        return
    rules = [r for r in seen(place.rules) if r.place.startswith("inet ") and not r.is_ours]
    covered: dict[tuple[str, str], set[L3Proto]] = {}
    for rule in rules:
        covered.setdefault((rule.place.split()[1], rule.helper), set()).update(rule.families)
    for (table, helper), families in sorted(covered.items()):
        if len(families) == 1:
            other = next(family for family in L3Proto if family not in families)
            yield warning(
                f"inet {table}: {helper} is for {next(iter(families))} only, and {other} connections get no helper",
                f"register it for {other} too, then make the ct helper object anew",
            )


def listeners(facts: Facts, place: Place) -> Iterable[Finding]:
    """An enabled helper without a listener leaves new connections unconfirmed, and a disabled one expects nothing."""
    bound = {row.queue_num for row in seen(place.queues)}
    rules = [rule for rule in seen(place.rules) if takes_effect(rule)]
    for registration in seen(facts.registrations):
        if not any(attaches(rule, registration) for rule in rules):
            continue
        key, queue = registration.key, registration.queue_num
        is_ours = key in facts.recorded
        if registration.status is Status.ENABLED and queue not in bound:
            yield problem(
                f"{key} is enabled and attached, and nobody listens on queue {queue}: new connections hang",
                "orch apply" if is_ours else f"start its daemon, or {nfct('disable', key)}",
            )
        elif registration.status is Status.DISABLED and key not in facts.queued_by_rules:
            yield problem(
                f"{key} is attached and disabled: connections show the helper, and nothing is ever expected",
                "orch apply" if is_ours else "start its daemon, which enables it",
            )


def queues(facts: Facts, place: Place) -> Iterable[Finding]:
    rows = {row.queue_num: row for row in seen(place.queues)}
    wanted = _unbound(facts, place)
    for number, row in rows.items():
        holder = place.queue_holders.get(number, f"port id {row.port_id}")
        if number in wanted:
            yield problem(
                f"queue {number} of {wanted[number]} is bound by {holder}", "stop that program, then orch apply"
            )
        yield from _queue(row, holder)


def _unbound(facts: Facts, place: Place) -> Mapping[int, str]:
    """Queues that processes of ours should have bound which do not run, each with whom it belongs to."""
    running = {(p.profile, p.name) for p in facts.processes if p.netns == place.netns.identity}
    return {
        number: f"{spec.name} of profile {applied.owner.profile}"
        for applied in facts.applied_at(place.netns)
        for spec in applied.target.processes
        if (applied.owner.profile, spec.name) not in running
        for number in spec.queues
    }


def _queue(row: QueueRow, holder: str) -> Iterable[Finding]:
    if not row.is_ready:
        yield problem(
            f"queue {row.queue_num} of {holder} is bound without a copy mode: every packet is dropped",
            "restart that program",
        )
    dropped = row.queue_dropped + row.user_dropped
    if dropped:
        full = "the queue was full" if row.queue_dropped else "its socket buffer was full"
        yield warning(
            f"queue {row.queue_num} of {holder} has dropped {dropped} packets: {full}",
            "orch status tells whether it hangs; if not, give it more CPU time",
        )


def filters(_: Facts, place: Place) -> Iterable[Finding]:
    if not any(takes_effect(rule) for rule in seen(place.rules)):
        return
    for chain in seen(place.unrelated_filters):
        yield problem(
            f"{chain} drops, and has no rule that accepts what helpers expect", f"add before what drops: {_RELATED}"
        )


def foreign_queues(_: Facts, place: Place) -> Iterable[Finding]:
    if not seen(place.rules):
        return
    for chain in seen(place.foreign_queues):
        yield warning(
            f"{chain} queues packets before source NAT: helped connections that it queues keep their private address",
            "queue elsewhere (postrouting after 100), or leave helped connections out",
        )


def labels(facts: Facts, place: Place) -> Iterable[Finding]:
    """Whoever sets a bit that our rules queue by has us inspect what no helper is attached to."""
    ours = {
        queue.label: f"{queue.helper} of profile {applied.owner.profile}"
        for applied in facts.applied_at(place.netns)
        for queue in applied.target.rule_queues
    }
    if not ours:
        return
    for rule in seen(place.foreign_labels):
        if rule.bit in ours:
            yield problem(
                f"{rule.place} uses bit {rule.bit} of connection labels, by which {ours[rule.bit]} is queued",
                "give that helper another one with label:, then orch apply",
            )


def vrf(facts: Facts, place: Place) -> Iterable[Finding]:
    """Source: vrf_output in drivers/net/vrf.c runs the postrouting hook a first time, for what this host sends."""
    if not any(applied.target.rule_queues for applied in facts.applied_at(place.netns)):
        return
    for name, master in seen(place.interfaces).items():
        if master:
            yield warning(
                f"{name} belongs to the VRF {master}: what this host itself sends there passes postrouting twice, and "
                "is queued twice",
                "attach what comes in only (path: incoming)",
            )


def connection_table(_: Facts, place: Place) -> Iterable[Finding]:
    sysctls = seen(place.sysctls)
    yield from _fill("connection table", _number(sysctls, "count"), _number(sysctls, "max"), "nf_conntrack_max")


def expectation_table(_: Facts, place: Place) -> Iterable[Finding]:
    """When it is full, expectations are refused, and only the kernel's log says so."""
    limit = _number(seen(place.sysctls), "expect_max")
    yield from _fill("table of expectations", seen(place.expectations), limit, "nf_conntrack_expect_max")


def _fill(table: str, count: int, limit: int, setting: str) -> Iterable[Finding]:
    cure = f"raise net.netfilter.{setting} in the initial namespace"
    if limit and count >= limit:
        yield problem(f"the {table} is full: {count} of {limit}", cure)
    elif limit and count >= limit * _NEARLY_FULL:
        yield warning(f"the {table} is nearly full: {count} of {limit}", cure)


def _number(sysctls: Mapping[str, str], name: str) -> int:
    value = sysctls.get(name, "")
    return int(value) if value.isdigit() else 0


def automatic(_: Facts, place: Place) -> Iterable[Finding]:
    if seen(place.sysctls).get("helper") == "1":
        yield warning(
            "net.netfilter.nf_conntrack_helper is 1: the kernel attaches its own helpers to the usual ports",
            "sysctl -w net.netfilter.nf_conntrack_helper=0",
        )


def ip6(facts: Facts, place: Place) -> Iterable[Finding]:
    attached = {a.key.l3proto for one in facts.applied_at(place.netns) for a in one.target.attachments}
    if L3Proto.IP6 in attached and not _has_ip6(place):
        yield note("IPv6 is off here: what is attached for ip6 sees nothing")


def _has_ip6(place: Place) -> bool:
    return seen(place.sysctls).get("disable_ipv6") == "0"


def flowtables(_: Facts, place: Place) -> Iterable[Finding]:
    found = seen(place.flowtables)
    if found:
        yield note(f"flowtable {listed(found)}: connections with a helper are never offloaded")


PLACE_PROBES = (
    PlaceProbe("rules", "every rule that attaches a helper takes effect", silent_rules),
    PlaceProbe("earlier rules", "no rule of others takes what ours attach", earlier_rules),
    PlaceProbe("dead rules", "every attached helper is registered", dead_rules),
    PlaceProbe("idle rules", "no rule can be made idle", idle_rules),
    PlaceProbe("families", "no rule leaves a family out unseen", one_family),
    PlaceProbe("listeners", "every attached helper has its listener", listeners),
    PlaceProbe("queues", "queues have their listeners and have dropped nothing", queues),
    PlaceProbe("filters", "no filter drops what helpers expect", filters),
    PlaceProbe("foreign queues", "nobody queues packets before source NAT", foreign_queues),
    PlaceProbe("labels", "nobody else uses the label bits of our rules", labels),
    PlaceProbe("vrf", "no rule queues in postrouting what a VRF sends", vrf),
    PlaceProbe("connections", "the connection table has room", connection_table),
    PlaceProbe("expectations", "the table of expectations has room", expectation_table),
    PlaceProbe("automatic", "the kernel attaches no helper by itself", automatic),
    PlaceProbe("ip6", "IPv6 is on wherever it is attached", ip6),
    PlaceProbe("flowtables", "there is no flowtable", flowtables),
)
