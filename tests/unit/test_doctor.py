"""`orch doctor`: a host with everything wrong and one with nothing wrong, on the fake. ORCH_UPDATE_GOLDEN=1 renews."""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import app as app_module
from orchestrator import cli
from orchestrator.doctor.facts import Facts, Place, Unseen
from orchestrator.doctor.findings import Finding, Verdict, examine
from orchestrator.doctor.gather import gather
from orchestrator.doctor.host_probes import HOST_PROBES, MODULES
from orchestrator.doctor.place_probes import PLACE_PROBES, takes_effect
from orchestrator.fake import FakeKernel
from orchestrator.model import (
    Backend,
    HelperKey,
    L3Proto,
    L4Proto,
    Netns,
    Policy,
    PortRange,
    QueueRow,
    Registration,
    Status,
)
from orchestrator.model import Path as Side
from orchestrator.ports import EarlierRule, HelperRule, LabelRule, Machine
from orchestrator.state import Owner, Unsettled
from orchestrator.status import HelperState, HostStatus
from orchestrator.verify import trials
from orchestrator.views import doctor as view
from orchestrator.views.human import Paint
from tests.hosts import Harness

GOLDEN = Path(__file__).parents[1] / "golden" / "doctor"
NATIVE = "profile: ftp\nhelpers:\n  ftp: {engine: native}\n"
ASKING = """
profile: {0}
helpers:
  ftp: {{engine: native, name: {0}-us, queueing: registration, attach: [{{ports: [{1}]}}]}}
"""
CONNTRACKD = "profile: rpc\nbackend: iptables\nhelpers:\n  rpc: {engine: conntrackd}\n"
SYSCTLS = {
    "net/netfilter/nf_conntrack_count": "10",
    "net/netfilter/nf_conntrack_max": "65536",
    "net/netfilter/nf_conntrack_expect_max": "100",
    "net/ipv6/conf/all/disable_ipv6": "0",
}
TAKEN = (("ftp", L4Proto.TCP),)
MODULE = {"nf_conntrack_ftp": TAKEN}
UNSETTLED = Unsettled(1, "apply", Owner("ftp", Netns("blue", "/run/netns/blue", "0:7")), (), ())


EARLIER = EarlierRule("rpc", "ip raw PREROUTING (iptables-nft)", "-j ACCEPT", "ACCEPT", L3Proto.IP, Side.INCOMING)


def registration(
    name: str, status: Status, *, queue: int = 6, priv: int = 24, l3: L3Proto = L3Proto.IP
) -> Registration:
    key = HelperKey(name, l3, L4Proto.TCP)
    return Registration(key, queue, status, (Policy(name, expect_max=1, expect_timeout_s=300),), priv)


def rule(helper: str, place: str = "inet mine pre", **other: Any) -> HelperRule:
    values: dict[str, Any] = {
        "families": (L3Proto.IP,),
        "l4proto": L4Proto.TCP,
        "backend": Backend.NFTABLES,
        "hooks": (("prerouting", -150),),
        "is_ours": False,
    }
    return HelperRule(place=place, helper=helper, **(values | other))


def examined(facts: Facts) -> tuple[Finding, ...]:
    return examine(facts, HOST_PROBES, PLACE_PROBES)


def causes(facts: Facts, verdict: Verdict) -> list[str]:
    return [f"{finding.probe}: {finding.cause}" for finding in examined(facts) if finding.verdict is verdict]


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel(modules_loaded=set(MODULES))
    kernel.namespaces[""].sysctls.update(SYSCTLS)
    return kernel


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial of this host is looked at."""
    monkeypatch.setattr(trials, "RUNTIME", tmp_path / "run")


@pytest.fixture
def orch(kernel: FakeKernel, tmp_path: Path) -> Harness:
    return Harness(kernel.system(), tmp_path / "state")


@pytest.fixture
def sound(orch: Harness) -> Facts:
    """A host with one profile, on which nothing is wrong."""
    orch.apply(NATIVE)
    return gather(orch.app())


@pytest.fixture
def ailing(orch: Harness, kernel: FakeKernel) -> Facts:
    """A host on which everything is wrong, as far as the fake can be broken; the rest is broken in the facts."""
    kernel.modules_available.update(MODULE)
    netns = kernel.add_netns("blue")
    space = kernel.at(netns)
    orch.apply(ASKING.format("first", 2101), netns="blue")
    orch.apply(ASKING.format("second", 2102), netns="blue")
    orch.apply(NATIVE, netns="blue")
    orch.apply(CONNTRACKD, netns="blue")
    first, second = (pid for pid, (seen, _) in kernel.running_processes.items() if seen.profile in ("first", "second"))
    kernel.kill(first, watched=False)
    kernel.kill(second)
    kernel.modules_loaded.add("nf_conntrack_ftp")
    for broken in (
        registration("ftp", Status.ENABLED, queue=9, priv=0),
        registration("old-us", Status.DISABLED),
        registration("v0123abcd-0", Status.DISABLED),
    ):
        kernel.registrations[broken.key] = broken
    kernel.programs.clear()
    space.sysctls.update(
        SYSCTLS
        | {
            "net/netfilter/nf_conntrack_count": "65536",
            "net/netfilter/nf_conntrack_helper": "1",
            "net/ipv6/conf/all/disable_ipv6": "0",
        }
    )
    space.expectations["ftp-us"] = 95
    space.foreign_rules = (
        rule("first-us", "inet raw pre", hooks=(("prerouting", -300),)),
        rule("first-us", "inet raw late", is_late=True),
        rule("first-us", "inet raw lost", hooks=()),
        rule("gone", families=tuple(L3Proto)),
        rule("first-us", "ip raw PREROUTING", hooks=(), backend=Backend.IPTABLES_LEGACY),
    )
    space.earlier_rules = (EARLIER,)
    space.dropping_filters = ("inet filter forward",)
    space.foreign_queues = ("inet ips forward",)
    space.flowtables = ("inet fw fast",)
    (label,) = (queue.label for applied in orch.app("blue").applied() for queue in applied.target.rule_queues)
    space.foreign_labels = (LabelRule("inet shaper marks", label), LabelRule("inet shaper marks", label + 1))
    space.interfaces["eth1"] = "red"
    space.queues[6] = QueueRow(6, 4000, 0, 0, 0, 0, copy_mode=0)
    space.queues[7] = QueueRow(7, 4000, 3, 12, 5, 100)
    kernel.machine = Machine(
        release="6.0.0-9-amd64",
        python=(3, 10),
        has_net_admin=False,
        is_initial_userns=False,
        modules_dir=True,
        is_loading_allowed=True,
        libnftables="0.9.8",
        programs={},
        has_seccomp=False,
        lsm=("lockdown", "apparmor", "selinux"),
        has_systemd=False,
    )
    return gather(orch.app())


def test_a_sound_host_has_nothing_wrong(sound: Facts) -> None:
    assert {finding.verdict for finding in examined(sound)} == {Verdict.OK}


def beyond_the_fake(facts: Facts, orch: Harness) -> Facts:
    """What supervisors, the kernel and files say, where the fake always says that all is well."""
    status = facts.status
    assert isinstance(status, HostStatus)
    states = (HelperState.FATAL, HelperState.HUNG, HelperState.BACKOFF, HelperState.UNSUPERVISED)
    profiles = tuple(
        replace(one, helpers=tuple(replace(h, state=state, pid=7, reason="killed by SIGKILL") for h in one.helpers))
        for one, state in zip(status.profiles, states, strict=True)
    )
    elsewhere = next(q for a in facts.applied if a.owner.profile == "second" for q in a.target.processes[0].queues)
    blue, host = facts.places
    assert not isinstance(blue.queues, Unseen)
    blue = replace(blue, queues=(*blue.queues, QueueRow(elsewhere, 99, 0, 0, 0, 0)))
    return replace(
        facts,
        status=replace(status, profiles=profiles, unsettled=(UNSETTLED,)),
        answers={"nft_queue": "ENOENT, load rules", "nft_ct": ""},
        ledger_trouble="file is not a database",
        stale=("/run/orch/gone@4-99",),
        trials={"orch-verify-0123abcd": (registration("v0123abcd-0", Status.DISABLED).key,), "orch-verify-4567": ()},
        places=(blue, replace(host, queues=Unseen("run as root"))),
    )


@pytest.mark.parametrize("is_full", [False, True])
def test_a_host_with_everything_wrong(ailing: Facts, orch: Harness, *, is_full: bool) -> None:
    findings = examined(beyond_the_fake(ailing, orch))
    text = view.text(findings, Paint(is_on=False), is_full=is_full).replace(str(orch.state_dir), "STATE")
    file = GOLDEN / ("everything-full.txt" if is_full else "everything.txt")
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_every_probe_can_find_something(ailing: Facts, orch: Harness) -> None:
    probes = (*HOST_PROBES, *PLACE_PROBES)
    ailing = beyond_the_fake(ailing, orch)
    found = {(f.probe, f.cause) for facts in (ailing, without_ip6(ailing)) for f in examined(facts)}
    assert {name for name, _ in found - {(probe.name, probe.ok) for probe in probes}} == {p.name for p in probes}


def without_ip6(facts: Facts) -> Facts:
    return replace(facts, places=tuple(replace(p, sysctls={"disable_ipv6": "1"}) for p in facts.places))


def test_what_cannot_be_looked_at_is_skipped_with_the_reason(sound: Facts) -> None:
    """Whatever was not seen, no probe fails, and none says that all is well."""
    hidden = Unseen("run as root")
    for name in ("registrations", "status"):
        assert causes(replace(sound, **{name: hidden}), Verdict.SKIPPED)  # type: ignore[arg-type]
    (place,) = sound.places
    for field in fields(Place):
        if field.name not in ("netns", "queue_holders"):
            facts = replace(sound, places=(replace(place, **{field.name: hidden}),))  # type: ignore[arg-type]
            skipped = causes(facts, Verdict.SKIPPED)
            # Without a rule that attaches a helper there is no question about filters; here is one.
            assert skipped, field.name
            assert all(line.endswith("run as root") for line in skipped)


def test_with_one_namespace_nothing_is_said_about_the_others(orch: Harness, kernel: FakeKernel) -> None:
    blue = kernel.add_netns("blue")
    kernel.at(blue).sysctls.update(SYSCTLS)
    orch.apply(NATIVE)
    facts = gather(orch.app("blue"))
    assert [str(place.netns) for place in facts.places] == ["blue"]
    assert {finding.verdict for finding in examined(facts)} == {Verdict.OK}
    assert {finding.verdict for finding in examined(gather(orch.app()))} == {Verdict.OK}


def test_modules_without_a_list_cannot_be_judged(sound: Facts) -> None:
    missing = replace(sound, loaded=frozenset(), available=frozenset(MODULES[1:]))
    assert causes(missing, Verdict.PROBLEM) == ["modules: no kernel module nfnetlink_cthelper"]
    bare = replace(missing, machine=replace(missing.machine, modules_dir=False))
    assert causes(bare, Verdict.PROBLEM) == []
    assert "--probe asks the kernel" in causes(bare, Verdict.SKIPPED)[0]
    assert causes(replace(bare, answers=dict.fromkeys(MODULES, "")), Verdict.SKIPPED) == []
    locked = replace(missing, machine=replace(missing.machine, is_loading_allowed=False))
    assert "loading is off" in causes(locked, Verdict.PROBLEM)[0]


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        ([("prerouting", -201)], False),
        ([("prerouting", -200)], True),
        ([("output", -300)], False),
        ([("output", -150)], True),
        ([("forward", -300)], True),
        ([("input", 2**31 - 1)], False),
        ([("postrouting", 2**31 - 2)], True),
        ([("prerouting", -300), ("output", 0)], True),
        ([], False),
    ],
)
def test_which_rules_take_effect(hooks: list[tuple[str, int]], *, expected: bool) -> None:
    assert takes_effect(rule("ftp", hooks=tuple(hooks))) is expected
    assert takes_effect(rule("ftp", hooks=(), backend=Backend.IPTABLES_LEGACY))


def test_what_is_left_over_is_found(orch: Harness) -> None:
    orch.apply(NATIVE)
    (owner,) = (applied.owner for applied in gather(orch.app()).applied)
    name = f"{owner.profile}@{owner.netns.identity.replace(':', '-')}"
    (orch.state_dir / "deaf").mkdir()
    for path in (f"deaf/ftp-us,ip,tcp@{name}", "deaf/ftp-us,ip,tcp@gone@4-99", "file@4-99"):
        (orch.state_dir / path).touch()
    for path in (name, "gone@4-99"):
        (orch.state_dir / path).mkdir()
    stale = [str(Path(path).relative_to(orch.state_dir)) for path in gather(orch.app()).stale]
    assert stale == ["deaf/ftp-us,ip,tcp@gone@4-99", "gone@4-99"]


def test_a_module_that_was_told_its_ports_has_a_name_for_each(orch: Harness, kernel: FakeKernel) -> None:
    kernel.modules_loaded.add("nf_conntrack_ftp")
    kernel.module_ports["nf_conntrack_ftp"] = (21, 2121)
    names = ("ftp", "ftp-2121", "ftp-2122", "tftp-69")
    kernel.namespaces[""].foreign_rules = tuple(rule(name) for name in names)
    dead = [cause for cause in causes(gather(orch.app()), Verdict.PROBLEM) if cause.startswith("dead rules")]
    assert [cause.split(",")[0].split()[-1] for cause in dead] == ["ftp-2122", "tftp-69"]


def test_label_bits_and_vrfs_matter_only_where_rules_queue(orch: Harness, kernel: FakeKernel) -> None:
    space = kernel.namespaces[""]
    space.foreign_labels = tuple(LabelRule("inet shaper marks", bit) for bit in range(128))
    space.interfaces["eth1"] = "red"
    orch.apply(ASKING.format("first", 2101))
    assert not [f for f in examined(gather(orch.app())) if f.probe in ("labels", "vrf") and f.verdict != Verdict.OK]
    orch.apply(NATIVE)
    wrong = [f for f in examined(gather(orch.app())) if f.probe in ("labels", "vrf")]
    assert [(f.probe, f.verdict) for f in wrong] == [("labels", Verdict.PROBLEM), ("vrf", Verdict.WARNING)]


def test_a_rule_before_ours_matters_if_it_takes_all_of_an_attachment_and_does_not_drop(
    orch: Harness, kernel: FakeKernel
) -> None:
    orch.apply(CONNTRACKD)
    space = kernel.namespaces[""]
    for harmless in (
        replace(EARLIER, verdict="DROP"),
        replace(EARLIER, is_partial=True),
        replace(EARLIER, profile="other"),
        replace(EARLIER, saddr="10.0.0.5/32"),
        replace(EARLIER, ports=(PortRange(112, 65535),)),
    ):
        space.earlier_rules = (harmless,)
        assert [f for f in examined(gather(orch.app())) if f.probe == "earlier rules" and f.verdict != Verdict.OK] == []
    space.earlier_rules = (replace(EARLIER, l4proto=L4Proto.UDP, ports=(PortRange(1, 111),)),)
    (found,) = [f for f in examined(gather(orch.app())) if f.probe == "earlier rules"]
    assert found.verdict is Verdict.PROBLEM


@pytest.mark.parametrize("content", [b"", b"garbage" * 200, None])
def test_a_ledger_that_cannot_be_read_is_told(orch: Harness, content: bytes | None) -> None:
    orch.apply(NATIVE)
    file = orch.state_dir / "ledger.sqlite"
    if content is None:
        with sqlite3.connect(file) as db:
            db.execute("DROP TABLE meta")
    else:
        file.write_bytes(content)
    assert "the ledger cannot be read" in "".join(causes(gather(orch.app()), Verdict.PROBLEM))


def test_who_may_not_read_the_ledger_is_not_told_to_move_it_aside(
    orch: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    orch.apply(NATIVE)
    reading = Path.open

    def refuse(file: Path, mode: str = "r") -> Any:
        if file.name == "ledger.sqlite":
            raise PermissionError
        return reading(file, mode)

    monkeypatch.setattr(Path, "open", refuse)
    facts = gather(orch.app())
    assert isinstance(facts.ledger_trouble, Unseen)
    assert [f.verdict for f in examined(facts) if f.probe == "ledger"] == [Verdict.SKIPPED]


def test_every_probe_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    section = page.split("## orch doctor\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `") and " | " in line]
    told = {name for row in rows for name in re.findall(r"`([a-z0-9 ]+)`", row)}
    assert told == {probe.name for probe in (*HOST_PROBES, *PLACE_PROBES)}


def test_a_kernel_that_would_not_answer_is_not_one_that_lacks_something(sound: Facts) -> None:
    asked = replace(
        sound, answers={"nfnetlink_cthelper": "EPERM, list helpers", "nft_ct": "EPERM", "nft_queue": "ENOENT"}
    )
    assert [cause for cause in causes(asked, Verdict.PROBLEM) if "nft_queue" not in cause] == []
    (skipped,) = causes(asked, Verdict.SKIPPED)
    assert "nfnetlink_cthelper, nft_ct" in skipped


@pytest.fixture
def cli_on(kernel: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "kernel_system", lambda _state: kernel.system())
    monkeypatch.setenv("ORCH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def test_the_command(cli_on: None, kernel: FakeKernel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor"]) == 0
    assert capsys.readouterr().out == "0 problems, 0 warnings, 0 skipped, 35 ok (-v shows them).\n"
    kernel.probe_answers = {"nft_queue": "ENOENT"}
    assert cli.run(["doctor", "--probe", "--json"]) == 2
    result = json.loads(capsys.readouterr().out)
    (found,) = [finding for finding in result["findings"] if finding["verdict"] == "problem"]
    assert found["probe"] == "modules"
    assert found["cure"]
    assert not kernel.calls
