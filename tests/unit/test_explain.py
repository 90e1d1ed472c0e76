"""`orch explain`: it agrees with a plain reading of every attachment, and each reason has its golden file.

ORCH_UPDATE_GOLDEN=1 renews them.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import app as app_module
from orchestrator import cli, explain
from orchestrator.commands.explain import parse_ends
from orchestrator.engine.counters import Counters, Snapshot, State
from orchestrator.errors import UsageError
from orchestrator.explain import Question, Reason, Sight, Way, misfits, ways
from orchestrator.fake import HOST, FakeKernel
from orchestrator.model import (
    Attachment,
    Backend,
    Engine,
    HelperKey,
    L3Proto,
    L4Proto,
    Listing,
    PortRange,
    Rules,
    Status,
    Target,
)
from orchestrator.model import Path as Side
from orchestrator.ports import (
    EarlierRule,
    Ends,
    HelperRule,
    LiveConnection,
    LiveExpectation,
    ProcessState,
    Route,
    Supervised,
)
from orchestrator.state import Applied, HelperSummary, Owner
from orchestrator.status import HelperState, HelperStatus, ProfileStatus
from tests.hosts import Harness

GOLDEN = Path(__file__).parents[1] / "golden" / "explain"
CLIENT, SERVER = "10.0.0.2", "192.0.2.1"
PROFILE = """
profile: office
helpers:
  ftp:
    engine: native
    attach:
      - {path: [incoming], iif: lan0, ports: [21, 2121-2125], saddr: [10.0.0.0/8, fd00::/8]}
  tftp: {engine: native, attach: [{path: [outgoing], ports: [69], daddr: [192.0.2.0/24]}]}
"""
ASKING = "profile: ask\nhelpers:\n  ftp: {engine: native, queueing: registration}\n"
MODULES = {"nf_conntrack_ftp": (("ftp", L4Proto.TCP),), "nf_nat_ftp": ()}

# -- laws --------------------------------------------------------------------------------------------------------------

INTERFACES = ("", "lan0", "lan1")
PREFIXES = ("10.0.0.0/8", "10.0.0.0/30", "192.0.2.1", "0.0.0.0/0", "fd00::/8", "fd00::1", "2001:db8::/32")
ADDRESSES = ("10.0.0.1", "10.0.0.9", "192.0.2.1", "fd00::1", "fd00::2", "2001:db8::7")
numbers = st.integers(1, 6)


@st.composite
def attachments(draw: st.DrawFn) -> Attachment:
    spans = [sorted((draw(numbers), draw(numbers))) for _ in range(draw(st.integers(1, 2)))]
    prefixes = st.lists(st.sampled_from(PREFIXES), max_size=2).map(tuple)
    return Attachment(
        key=HelperKey("x", draw(st.sampled_from(L3Proto)), draw(st.sampled_from(L4Proto))),
        path=draw(st.sampled_from(Side)),
        ports=tuple(PortRange(first, last) for first, last in spans),
        interface=draw(st.sampled_from(INTERFACES)),
        saddr=draw(prefixes),
        daddr=draw(prefixes),
    )


@st.composite
def questions(draw: st.DrawFn) -> Question:
    saddr = draw(st.sampled_from(ADDRESSES))
    daddr = draw(st.sampled_from([a for a in ADDRESSES if (":" in a) == (":" in saddr)]))
    through = st.builds(Way, st.sampled_from(Side), st.sampled_from(INTERFACES))
    return Question(
        draw(st.sampled_from(L4Proto)),
        Ends(saddr, draw(st.integers(0, 9)), daddr, draw(numbers)),
        tuple(draw(st.lists(through, min_size=1, max_size=2))),
        "judged",
    )


def takes(attachment: Attachment, question: Question) -> bool:
    """What the rule of an attachment says, read word by word, with addresses as bits."""
    ends = question.ends

    def is_covered(address: str, prefixes: tuple[str, ...]) -> bool:
        wanted = ipaddress.ip_address(address)
        for prefix in prefixes:
            base, _, length = prefix.partition("/")
            other = ipaddress.ip_address(base)
            shift = other.max_prefixlen - int(length or other.max_prefixlen)
            if other.version == wanted.version and int(other) >> shift == int(wanted) >> shift:
                return True
        return not prefixes

    return (
        attachment.key.l4proto == question.l4proto
        and (attachment.key.l3proto == "ip") == ("." in ends.saddr)
        and any(ends.dport in range(span.first, span.last + 1) for span in attachment.ports)
        and any(w.path == attachment.path and attachment.interface in ("", w.interface) for w in question.ways)
        and is_covered(ends.saddr, attachment.saddr)
        and is_covered(ends.daddr, attachment.daddr)
    )


@given(attachments(), questions())
def test_an_attachment_takes_what_its_rule_takes(attachment: Attachment, question: Question) -> None:
    assert (not misfits(attachment, question)) is takes(attachment, question)


@given(st.sampled_from([Route(is_local, name) for is_local in (True, False) for name in ("", "lan0")]), st.booleans())
def test_a_connection_of_this_host_goes_out_and_any_other_comes_in(source: Route, is_local: bool) -> None:  # noqa: FBT001
    through, judged = ways(source, Route(is_local, "wan0"))
    assert judged
    assert (through[0].path is Side.OUTGOING) is source.is_local
    assert [way.path for way in through] == list(dict.fromkeys(way.path for way in through))
    if source.is_local and is_local:
        assert through == (Way(Side.OUTGOING, "lo"), Way(Side.INCOMING, "lo"))
    elif not source.is_local:
        assert through == (Way(Side.INCOMING, source.interface),)


@given(st.lists(attachments(), max_size=6), questions())
def test_matches_are_those_that_take_it_and_else_the_nearest_is_named(
    found: list[Attachment], question: Question
) -> None:
    explanation = explain.explain(question, sight_of(found))
    assert [m.attachment for m in explanation.matches] == [a for a in found if takes(a, question)]
    if explanation.matches:
        assert explanation.is_helped
        assert not explanation.nearest
        return
    assert not explanation.is_helped
    assert explanation.cure
    assert bool(explanation.nearest) is bool(found)
    assert len(explanation.nearest) <= 3
    if found:
        fewest = min(len(misfits(a, question)) for a in found)
        assert {len(misfits(m.attachment, question)) for m in explanation.nearest} == {fewest}
        assert explanation.reason in misfits(explanation.nearest[0].attachment, question)
    else:
        assert explanation.reason is Reason.NO_PROFILE


def sight_of(found: list[Attachment]) -> Sight:
    """A namespace with one healthy profile that has these attachments, all of one helper of the kernel."""
    owner = Owner("law", HOST)
    rules = Rules(Backend.NFTABLES, "law", "", ())
    target = Target("law", (), (), (), rules, (), (), tuple(found))
    keys = tuple(dict.fromkeys(attachment.key for attachment in found))
    baseline = Listing(Backend.NFTABLES, "", "", frozenset())
    applied = Applied(owner, "law.yaml", 0.0, target, baseline, "", (HelperSummary("x", Engine.KERNEL, keys),))
    helper = HelperStatus("x", "kernel", "", (), (), 0, 0, 0.0, "", HelperState.IN_KERNEL)
    status = ProfileStatus(owner, "law.yaml", Backend.NFTABLES, 0.0, (helper,), ())
    return Sight(HOST, ((applied, status),), (), (), (), ())


# -- goldens -----------------------------------------------------------------------------------------------------------


class Host:
    """A fake host with two profiles, of which one thing after the other can be broken."""

    def __init__(self, directory: Path) -> None:
        self.kernel = FakeKernel(modules_available=MODULES)
        self.space = self.kernel.at(self.kernel.add_netns("blue"))
        self.space.routes = {"10.0.0.254": Route(is_local=True, interface="lo")}
        self.orch = Harness(self.kernel.system(), directory)

    def apply(self, *profiles: str) -> Host:
        for text in profiles:
            self.orch.apply(text, netns="blue")
        return self

    def live(self, helper: str) -> Host:
        ends = Ends(CLIENT, 40000, SERVER, 21)
        self.space.live_connections = [(L4Proto.TCP, LiveConnection(ends, helper))]
        return self

    def expects(self) -> Host:
        master = Ends(CLIENT, 40000, SERVER, 21)
        other = Ends(CLIENT, 40001, SERVER, 21)
        data = Ends(CLIENT, 0, SERVER, 50000)
        self.space.live_expectations = [LiveExpectation(m, L4Proto.TCP, data, "ftp-us", 298) for m in (master, other)]
        return self

    def counts(self) -> Host:
        note = "refused: port 22 is outside 1024-65535"
        counters = Counters(packets=9, expectations=1, refused=1)
        self.kernel.counters["ftp"] = Snapshot(1, State.READY, 1, 0, counters, note)
        return self

    def says(self, state: ProcessState, reason: str) -> Host:
        processes = [seen for seen, _ in self.kernel.running_processes.values()]
        self.kernel.supervised = {
            (p.profile, p.netns): (Supervised(p.name, state, p.pid, 3, 0.0, reason),) for p in processes
        }
        return self

    def kills(self, *, watched: bool) -> Host:
        for pid in list(self.kernel.running_processes):
            self.kernel.kill(pid, watched=watched)
        self.kernel.last_words["ftp"] = "pid 7 was killed by SIGKILL"
        return self

    def tampers(self) -> Host:
        self.space.rules.clear()
        return self

    def unregisters(self) -> Host:
        self.kernel.registrations.clear()
        return self

    def disables(self) -> Host:
        for key, registration in self.kernel.registrations.items():
            self.kernel.registrations[key] = replace(registration, status=Status.DISABLED)
        return self

    def unbinds(self) -> Host:
        self.space.queues.clear()
        return self

    def foreign(self) -> Host:
        hooks = (("prerouting", -150),)
        self.space.foreign_rules = (
            HelperRule("inet mine pre", "other", (L3Proto.IP,), L4Proto.TCP, Backend.NFTABLES, hooks, is_ours=False),
        )
        return self

    def earlier(self, *, is_partial: bool) -> Host:
        text = f"-p tcp {'-m limit ' if is_partial else ''}-j ACCEPT"
        place = "ip raw PREROUTING (iptables-nft)"
        rule = EarlierRule(
            "office", place, text, "ACCEPT", L3Proto.IP, Side.INCOMING, L4Proto.TCP, is_partial=is_partial
        )
        others = (replace(rule, profile="other"), replace(rule, path=Side.OUTGOING), replace(rule, l4proto=L4Proto.UDP))
        self.space.earlier_rules = (*(replace(one, text="-j DROP") for one in others), rule)
        return self


TO = f"{CLIENT} {SERVER}:21"
THIS = f"{CLIENT}:40000 {SERVER}:21"

# Name of the golden file -> how the host is, the words of the command, and the reason.
CASES: dict[str, tuple[Callable[[Host], object], str, Reason]] = {
    "helped": (lambda h: h.apply(PROFILE).live("ftp-us").expects(), THIS, Reason.HELPED),
    "nothing-expected": (lambda h: h.apply(PROFILE).live("ftp-us").counts(), THIS, Reason.HELPED),
    "ipv6": (lambda h: h.apply(PROFILE), "[fd00::2]:40000 [2001:db8::1]:2121", Reason.HELPED),
    "outgoing": (lambda h: h.apply(PROFILE), "10.0.0.254 192.0.2.1:69 udp --oif wan0", Reason.HELPED),
    "in-kernel": (lambda h: h.apply(ASKING.replace("native, queueing: registration", "kernel")), TO, Reason.HELPED),
    "no-profile": (lambda h: h, TO, Reason.NO_PROFILE),
    "protocol": (lambda h: h.apply(ASKING), f"{CLIENT} {SERVER}:21 udp", Reason.PROTOCOL),
    "family": (lambda h: h.apply(PROFILE), "fd00::254 [fd00::1]:69 udp --oif wan0", Reason.FAMILY),
    "port": (lambda h: h.apply(PROFILE), f"{CLIENT} {SERVER}:8021", Reason.PORT),
    "port-expected": (lambda h: h.apply(PROFILE).expects(), f"{CLIENT} {SERVER}:50000", Reason.PORT),
    "path": (lambda h: h.apply(PROFILE), "10.0.0.254 192.0.2.1:21", Reason.PATH),
    "interface": (lambda h: h.apply(PROFILE), f"{TO} --iif wan0", Reason.INTERFACE),
    "address": (lambda h: h.apply(PROFILE), f"172.16.0.1 {SERVER}:21", Reason.ADDRESS),
    "rules": (lambda h: h.apply(PROFILE).tampers(), TO, Reason.RULES),
    "earlier-rule": (lambda h: h.apply(PROFILE).earlier(is_partial=False), TO, Reason.EARLIER),
    "earlier-than-this": (lambda h: h.apply(PROFILE).live("").earlier(is_partial=False), THIS, Reason.EARLIER),
    "earlier-without-port": (lambda h: h.apply(PROFILE).live("").earlier(is_partial=False), TO, Reason.EARLIER),
    "earlier-but-later": (lambda h: h.apply(PROFILE).live("ftp-us").earlier(is_partial=False), THIS, Reason.HELPED),
    "earlier-perhaps": (lambda h: h.apply(PROFILE).earlier(is_partial=True), TO, Reason.HELPED),
    "registration": (lambda h: h.apply(PROFILE).unregisters(), TO, Reason.REGISTRATION),
    "disabled": (lambda h: h.apply(ASKING).disables(), TO, Reason.DISABLED),
    "queue": (lambda h: h.apply(PROFILE).unbinds(), TO, Reason.QUEUE),
    "process": (lambda h: h.apply(PROFILE).kills(watched=False), TO, Reason.PROCESS),
    "backoff": (lambda h: h.apply(ASKING).says(ProcessState.BACKOFF, "killed by SIGSEGV"), TO, Reason.PROCESS),
    "older": (lambda h: h.apply(PROFILE).live(""), THIS, Reason.OLDER),
    "older-without-port": (lambda h: h.apply(PROFILE).live(""), TO, Reason.HELPED),
    "other-helper": (lambda h: h.apply(PROFILE).live("other").foreign(), THIS, Reason.OTHER),
}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path)
    monkeypatch.setattr(app_module, "kernel_system", lambda _state: host.kernel.system())
    monkeypatch.setattr(app_module, "boot_id", lambda: "boot-1")
    monkeypatch.setenv("ORCH_STATE_DIR", str(tmp_path))
    return host


@pytest.mark.parametrize("name", CASES)
def test_golden(host: Host, capsys: pytest.CaptureFixture[str], name: str) -> None:
    prepare, words, reason = CASES[name]
    prepare(host)
    code = cli.run(["explain", *words.split(), "--netns", "blue"])
    text, errors = capsys.readouterr()
    text = text.replace(str(host.orch.state_dir), "STATE")
    assert (code, errors) == (0 if reason is Reason.HELPED else 2, "")
    cli.run(["explain", *words.split(), "--netns", "blue", "--json"])
    said = json.loads(capsys.readouterr().out)["explanation"]
    assert (said["reason"], said["helped"]) == (reason, code == 0)
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_every_reason_has_a_golden_file() -> None:
    assert {reason for _, _, reason in CASES.values()} == set(Reason)
    assert {file.stem for file in GOLDEN.iterdir()} == set(CASES)


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ("10.0.0.1", "10.0.0.2:21", Ends("10.0.0.1", 0, "10.0.0.2", 21)),
        ("10.0.0.1:9", "10.0.0.2:21", Ends("10.0.0.1", 9, "10.0.0.2", 21)),
        ("fd00::1", "[fd00::2]:21", Ends("fd00::1", 0, "fd00::2", 21)),
        ("[fd00::1]", "[fd00:0::2]:21", Ends("fd00::1", 0, "fd00::2", 21)),
        ("[fd00::1]:9", "[::1]:21", Ends("fd00::1", 9, "::1", 21)),
    ],
)
def test_ends(source: str, destination: str, expected: Ends) -> None:
    assert parse_ends(source, destination) == expected


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("10.0.0.1", "10.0.0.2"),
        ("10.0.0.1", "fd00::1"),
        ("10.0.0.1", "[fd00::1]:21"),
        ("10.0.0.1:70000", "10.0.0.2:21"),
        ("10.0.0.1:x", "10.0.0.2:21"),
        ("10.0.0.1:+5", "10.0.0.2:21"),
        ("10.0.0.1", "10.0.0.2:2_1"),
        ("10.0.0.1", "10.0.0.2: 21"),
        ("10.0.0.1", "10.0.0.2:٢١"),
        ("10.0.0.1", "[fd00::1]:"),
        ("nobody", "10.0.0.2:21"),
        ("", "10.0.0.2:21"),
    ],
)
def test_what_is_no_end_is_refused(source: str, destination: str) -> None:
    with pytest.raises(UsageError):
        parse_ends(source, destination)


@pytest.mark.parametrize("words", [f"{TO} icmp", f"{TO} --iif lan0 --oif wan0", f"{TO} --iif lan9", f"{TO} --oif x"])
def test_wrong_usage(host: Host, words: str) -> None:
    assert cli.run(["explain", *words.split()]) == 64


def test_an_interface_that_is_not_there_is_told_with_those_that_are(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run(["explain", *TO.split(), "--iif", "lan9", "--netns", "blue"])
    said = capsys.readouterr().err
    assert "there is no interface 'lan9' in netns blue" in said
    assert "lan0, lo, wan0" in said
