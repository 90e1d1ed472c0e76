"""Linux 6.1 makes iptables rules idle when a helper is unregistered: none is while such rules are loaded."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import drift, render
from orchestrator.app import boot_id
from orchestrator.doctor.findings import Verdict, examine
from orchestrator.doctor.gather import gather
from orchestrator.doctor.host_probes import HOST_PROBES
from orchestrator.doctor.place_probes import PLACE_PROBES
from orchestrator.errors import KernelError
from orchestrator.fake import FakeKernel
from orchestrator.model import HelperKey, L3Proto, L4Proto, Policy, QueueRow, Registration, Status
from orchestrator.reports import PlanRefusedError, TeardownReport
from orchestrator.verify import trials
from orchestrator.verify.disguise import disguised
from tests.adapters import CHANGES, LOOKS, wrapped
from tests.faults import KILL, Scenario, apply, prepare, run
from tests.hosts import Harness, both

FTP = HelperKey("ftp", L3Proto.IP, L4Proto.TCP)
FTP_OWN = HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP)
TFTP_OWN = HelperKey("tftp-us", L3Proto.IP, L4Proto.UDP)
ASKING_TFTP = "tftp: {queueing: registration}"


def profile(*helpers: str, name: str = "p", backend: str = "iptables-nft") -> str:
    return f"profile: {name}\nbackend: {backend}\nhelpers:\n" + "".join(f"  {helper}\n" for helper in helpers)


ONE = profile("ftp: {queueing: registration}")
BOTH = profile("ftp: {queueing: registration}", ASKING_TFTP)
CONNTRACKD = profile("ftp: {engine: conntrackd}")
OTHER = profile(ASKING_TFTP, name="q", backend="nftables")


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel()
    for name in ("blue", "red"):
        kernel.add_netns(name)
    return kernel


@pytest.fixture
def orch(kernel: FakeKernel, tmp_path: Path) -> Harness:
    return Harness(kernel.system(), tmp_path / "state")


def is_unharmed(kernel: FakeKernel) -> bool:
    return not (kernel.idle() or kernel.leaked)


def resting(kernel: FakeKernel) -> set[str]:
    return {key.name for key, one in kernel.registrations.items() if one.status is Status.DISABLED}


def test_the_fake_does_as_linux_6_1_does(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(ONE, "blue")
    one = kernel.registrations[FTP_OWN]
    kernel.registrations[TFTP_OWN] = replace(one, key=TFTP_OWN)
    orch.system.registry.delete(TFTP_OWN)
    assert [place for place, *_ in kernel.idle()] == ["blue"]
    assert any("rules still refer to it" in line for line in orch.teardown("p", "blue").reports[0].leftovers)
    assert {key.name for key in kernel.leaked} == {"ftp-us"}


def test_what_an_apply_drops_rests_until_the_rules_go(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(BOTH, "blue")
    kept = orch.apply(ONE, "blue").notes
    assert [note.partition(",")[0] for note in kept] == ["tftp-us/ip/udp stays", "tftp-us/ip6/udp stays"]
    assert "those of this profile;" in kept[0]
    assert resting(kernel) == {"tftp-us"}
    assert orch.status().is_right
    assert orch.apply(ONE, "blue").plan.is_empty
    assert orch.apply(BOTH, "blue").plan.adopted == (), "they are ours all the time"
    orch.apply(ONE, "blue")
    orch.teardown("p", "blue")
    assert (kernel.registrations, is_unharmed(kernel)) == ({}, True)


@pytest.mark.parametrize("release", ["6.12.1", "7.3.0"])
def test_elsewhere_it_goes_at_once(orch: Harness, kernel: FakeKernel, release: str) -> None:
    kernel.release = release
    orch.apply(BOTH, "blue")
    assert orch.apply(ONE, "blue").notes == ()
    assert {key.name for key in kernel.registrations} == {"ftp-us"}


@pytest.mark.parametrize("is_lost", [False, True])
def test_the_rules_of_other_profiles_count(orch: Harness, kernel: FakeKernel, *, is_lost: bool) -> None:
    orch.apply(ONE, "blue")
    if is_lost:
        shutil.rmtree(orch.state_dir)
    orch.apply(OTHER, "red")
    (report,) = orch.teardown("q", "red").reports
    assert report.leftovers == ()
    assert "those of profile p in netns blue;" in report.notes[0]
    assert resting(kernel) == {"tftp-us"}
    orch.teardown(every_netns=True)
    assert is_unharmed(kernel)
    assert not resting(kernel)


def test_rules_of_others_count_and_what_rested_goes_with_any_teardown(orch: Harness, kernel: FakeKernel) -> None:
    kernel.namespaces["blue"].foreign_iptables.add("theirs")
    orch.apply(OTHER, "red")
    (report,) = orch.teardown("q", "red").reports
    assert "those of somebody else in netns blue;" in report.notes[0]
    orch.teardown(every_netns=True)
    assert resting(kernel) == {"tftp-us"}
    assert is_unharmed(kernel)
    kernel.namespaces["blue"].foreign_iptables.clear()
    orch.teardown(every_netns=True)
    assert kernel.registrations == {}


def test_what_cannot_be_unregistered_after_all_is_told(orch: Harness, kernel: FakeKernel) -> None:
    kernel.namespaces["blue"].foreign_iptables.add("theirs")
    orch.apply(OTHER, "red")
    orch.teardown("q", "red")
    kernel.namespaces["blue"].foreign_iptables.clear()
    kernel.fail_at(0, errno.EPERM)
    orch.teardown(every_netns=True)
    assert orch.warnings[-1].startswith("what no profile uses any more stays registered: cannot unregister helper")
    orch.teardown(every_netns=True)
    assert kernel.registrations == {}


def test_a_registration_is_not_made_anew_beside_the_rules_of_others(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(ONE, "blue")
    orch.apply(OTHER, "red")
    wider(kernel, TFTP_OWN)
    before = kernel.dump_text()
    with pytest.raises(PlanRefusedError, match="iptables rules idle: those of profile p in netns blue"):
        orch.apply(OTHER, "red")
    assert kernel.dump_text() == before
    orch.teardown("p", "blue")
    orch.apply(OTHER, "red")
    assert orch.status().is_right


def test_the_own_rules_are_unloaded_meanwhile(orch: Harness, kernel: FakeKernel) -> None:
    """They do not attach it: it is one that conntrackd insists on."""
    orch.apply(CONNTRACKD, "blue")
    wider(kernel, FTP)
    orch.apply(CONNTRACKD, "blue")
    assert is_unharmed(kernel)
    assert orch.status().is_right


def wider(kernel: FakeKernel, key: HelperKey) -> None:
    """Somebody registered it with other private data: that cannot be changed in place."""
    seen = kernel.registrations[key]
    kernel.registrations[key] = replace(seen, priv_data_len=seen.priv_data_len + 4)


def test_rules_of_a_namespace_that_is_gone_may_be_there_still(orch: Harness, kernel: FakeKernel) -> None:
    """Some other process runs in it: nobody finds the way there, and the kernel tells of it only by a refusal."""
    orch.apply(CONNTRACKD, "blue")
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    kernel.gone.append(kernel.namespaces.pop("blue"))
    kernel.inhabited.add(kernel.gone[0].netns.identity)
    (report,) = orch.teardown(every_netns=True).reports
    assert report.leftovers == (
        "unregister helper ftp-us/ip/tcp: cannot unregister helper ftp-us/ip/tcp: rules still refer to it",
        "unregister helper ftp/ip/tcp: not tried, as rules still refer to another one, and could be idle after it",
    )
    assert is_unharmed(kernel)
    kernel.inhabited.clear()
    orch.teardown(every_netns=True)
    assert (kernel.registrations, is_unharmed(kernel)) == ({}, True)


def test_rules_of_a_namespace_without_a_name_count(orch: Harness, kernel: FakeKernel) -> None:
    """`ip netns del`: they are there as long as the helper process runs."""
    orch.apply(ONE, "blue")
    orch.apply(OTHER, "red")
    kernel.gone.append(kernel.namespaces.pop("blue"))
    assert "those of profile p in netns blue;" in orch.teardown("q", "red").reports[0].notes[0]
    assert is_unharmed(kernel)
    orch.teardown(every_netns=True)
    assert (kernel.registrations, is_unharmed(kernel)) == ({}, True)


def test_and_where_the_ledger_is_lost(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(ONE, "blue")
    shutil.rmtree(orch.state_dir)
    orch.apply(OTHER, "red")
    kernel.gone.append(kernel.namespaces.pop("blue"))
    (pid,) = (pid for pid, (seen, _) in kernel.running_processes.items() if seen.profile == "p")
    assert f"those of profile p in netns /proc/{pid}/ns/net;" in orch.teardown("q", "red").reports[0].notes[0]
    assert is_unharmed(kernel)


def test_a_killed_apply_whose_namespace_is_gone(orch: Harness, kernel: FakeKernel) -> None:
    """Its rules may be there, and nobody can look."""
    text = profile("ftp: {engine: conntrackd, name: aaa}")
    run(orch, kernel, apply(text), {len(events_of(text)): KILL})
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    kernel.gone.append(kernel.namespaces.pop("blue"))
    kernel.inhabited.add(kernel.gone[0].netns.identity)
    orch.teardown("nobody", "red")
    assert is_unharmed(kernel)
    kernel.inhabited.clear()
    orch.teardown(every_netns=True)
    assert (kernel.registrations, is_unharmed(kernel)) == ({}, True)


def events_of(text: str) -> tuple[str, ...]:
    """Everything that a first apply does, but for the last commit."""
    return prepare(Scenario("first", (), apply(text))).events[:-1]


def test_what_somebody_else_registered_is_not_ours(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(ONE, "blue")
    run(orch, kernel, apply(OTHER, "red"), {prepare(Scenario("q", (), apply(OTHER))).events.index("start"): KILL})
    theirs = Registration(TFTP_OWN, 7, Status.ENABLED, (Policy("mine", 3, 30),), 16)
    kernel.registrations[TFTP_OWN] = theirs
    for _ in range(2):
        orch.teardown("nobody")
        orch.teardown("p", "blue")
    assert kernel.registrations == {TFTP_OWN: theirs}


@pytest.mark.parametrize("release", ["6.1.0", "6.12.1"])
def test_nor_what_somebody_made_of_what_rested(orch: Harness, kernel: FakeKernel, release: str) -> None:
    kernel.release = release
    kernel.namespaces["blue"].foreign_references.add("tftp-us")
    orch.apply(OTHER, "red")
    orch.teardown("q", "red")
    assert resting(kernel) == {"tftp-us"}
    orch.teardown("nobody")
    assert (resting(kernel), orch.warnings) == ({"tftp-us"}, []), "rules of somebody attach it"
    kernel.namespaces["blue"].foreign_references.clear()
    mine = kernel.registrations[TFTP_OWN]
    for theirs in (replace(mine, status=Status.ENABLED), replace(mine, priv_data_len=16)):
        kernel.registrations = {TFTP_OWN: theirs}
        orch.teardown("nobody")
        assert kernel.registrations == {TFTP_OWN: theirs}


def test_nor_what_rules_of_ours_attach_that_the_ledger_has_lost(orch: Harness, kernel: FakeKernel) -> None:
    kernel.release, kernel.delete_ignores_references = "7.3.0", True
    for name in ("blue", "red"):
        orch.apply(OTHER, name)
    shutil.rmtree(orch.state_dir)
    orch.apply(OTHER, "blue")
    orch.teardown("q", "blue")
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    orch.teardown("nobody")
    assert kernel.dangling() == []


def test_what_others_use_is_not_disabled(orch: Harness, kernel: FakeKernel) -> None:
    """They are such as the ledger has lost, in another namespace."""
    orch.apply(BOTH, "blue")
    orch.apply(OTHER, "red")
    shutil.rmtree(orch.state_dir)
    orch.apply(BOTH, "blue")
    assert "tftp-us/ip/udp stays: used by profile q in netns red" in orch.apply(ONE, "blue").notes
    assert resting(kernel) == set()


def test_an_apply_removes_what_rested(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(BOTH, "blue")
    orch.apply(ONE, "blue")
    without = ONE.replace("iptables-nft", "nftables")
    kernel.namespaces["red"].queues[9] = QueueRow(9, 4711, 0, 0, 0, 0)
    orch.apply(without, "blue")
    assert {key.name for key in kernel.registrations} == {"ftp-us"}
    assert "queue 9 of port id 4711 in netns red" in orch.warnings[-1], "the kernel drops what waits there"


def test_but_not_one_that_is_declined(orch: Harness, kernel: FakeKernel) -> None:
    kernel.namespaces["blue"].foreign_iptables.add("theirs")
    orch.apply(OTHER, "red")
    orch.teardown("q", "red")
    kernel.namespaces["blue"].foreign_iptables.clear()
    orch.answer = False
    assert orch.app("red").apply(*both(ONE), ask=True).declined
    assert resting(kernel) == {"tftp-us"}


def test_one_command_for_all_leaves_nothing(orch: Harness, kernel: FakeKernel) -> None:
    """Whatever their names: those with iptables rules go first."""
    orch.apply(OTHER.replace("profile: q", "profile: a"), "blue")
    orch.apply(ONE, "blue")
    assert [report.notes for report in orch.teardown(netns="blue").reports] == [(), ()]
    assert kernel.registrations == {}


def test_rules_that_are_left_alone_stay_as_they_are(orch: Harness, kernel: FakeKernel) -> None:
    """To make a registration anew they would have to be loaded again."""
    orch.apply(CONNTRACKD, "blue")
    space, (applied,) = kernel.namespaces["blue"], orch.app().applied()
    for _ in range(6):
        space.tampered = dict.fromkeys(space.rules, "somebody was here")
        report = drift.mend(orch.app(), applied.owner, drift.Limits())
        kernel.now += 5
    assert report.outcome is drift.Outcome.GIVEN_UP
    wider(kernel, FTP)
    calls = len(kernel.calls)
    drift.mend(orch.app(), applied.owner, drift.Limits())
    assert (kernel.calls[calls:], bool(space.tampered)) == ([], True)


def test_who_waits_costs_no_look_into_other_namespaces(orch: Harness, kernel: FakeKernel) -> None:
    """Only where the ledger has lost somebody does one have to look who else uses a registration."""
    for name in ("blue", "red"):
        orch.apply(OTHER, name)
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    looks: list[str] = []

    def around(name: str, call: Callable[[], Any]) -> Any:
        looks.append(name)
        return call()

    system, orch.system = orch.system, wrapped(orch.system, around, LOOKS, CHANGES)
    orch.diff(OTHER, "blue")
    assert "rules.profiles" not in looks
    orch.system = system
    shutil.rmtree(orch.state_dir)
    orch.apply(OTHER, "blue")
    orch.system = wrapped(system, around, LOOKS, CHANGES)
    orch.diff(OTHER, "blue")
    assert "rules.profiles" in looks


def test_doctor_knows_why_it_stays(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(BOTH, "blue")
    orch.apply(ONE, "blue")
    found = [f for f in examine(gather(orch.app()), HOST_PROBES, PLACE_PROBES) if "tftp-us" in f.cause]
    assert {(f.probe, f.verdict) for f in found} == {("registrations", Verdict.OK)}
    assert "stays registered while iptables rules are loaded" in found[0].cause


def test_what_a_failed_apply_made_rests_and_is_ours(
    orch: Harness, kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    orch.apply(ONE, "blue")
    rules = kernel.namespaces["blue"].rules.copy()
    failing(kernel)
    with pytest.raises(KernelError):
        orch.apply(BOTH, "blue")
    assert kernel.namespaces["blue"].rules == rules
    assert resting(kernel) == {"tftp-us"}
    assert "tftp-us/ip/udp stays, disabled: this kernel would make" in caplog.text
    assert orch.status().is_right
    kernel.on_modify = None
    assert orch.apply(BOTH, "blue").plan.adopted == ()
    failing(kernel)
    with pytest.raises(KernelError):
        orch.apply(OTHER, "red")
    kernel.on_modify = None
    orch.teardown(every_netns=True)
    assert (kernel.registrations, is_unharmed(kernel)) == ({}, True)


def failing(kernel: FakeKernel) -> None:
    """The last thing that an apply does fails once it was begun."""

    def on_modify(operation: str, key: str) -> None:
        if operation == "load rules":
            kernel.on_modify = None
            raise KernelError(operation, key, errno.ENOSPC)

    kernel.on_modify = on_modify


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    monkeypatch.setattr(trials, "RUNTIME", path)
    return path


def try_out(orch: Harness, text: str, place: trials.Place) -> TeardownReport:
    """What `orch verify` does with a profile, in red."""
    desired, _ = both(text)
    tried = disguised(desired, prefix=place.prefix)
    app = Harness(orch.system, place.state_dir, boot_id=boot_id()).app("red")
    app.apply(tried, render.target(tried), ask=False)
    return app.teardown(desired.profile, every_netns=False)


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_a_trial_leaves_what_would_harm(orch: Harness, kernel: FakeKernel, runtime: Path, backend: str) -> None:
    orch.apply(profile(ASKING_TFTP), "blue")
    with trials.place(orch.state_dir) as place:
        (report,) = try_out(orch, profile("ftp: {engine: conntrackd}", backend=backend), place).reports
    assert len(report.plan.kept) == 2
    assert {key.name for key in kernel.registrations} > {"ftp", f"{place.prefix}-0"}
    (reason,) = trials.remove_abandoned(nullcontext(), lambda _: kernel.system()).values()
    assert "those of profile p in netns blue; the next orch verify" in reason
    orch.teardown("p", "blue")
    assert list(trials.remove_abandoned(nullcontext(), lambda _: kernel.system()).values()) == [""]
    assert (kernel.registrations, is_unharmed(kernel), list(runtime.iterdir())) == ({}, True, [])


def test_a_killed_trial_whose_namespace_is_taken_apart(orch: Harness, kernel: FakeKernel, runtime: Path) -> None:
    """What its rules attach comes first: as long as that is refused they are there."""
    state = runtime / "orch-verify-00000001"
    state.mkdir()
    desired, _ = both(CONNTRACKD)
    tried = disguised(desired, prefix="v00000001")
    Harness(orch.system, state, boot_id=boot_id()).app("red").apply(tried, render.target(tried), ask=False)
    kernel.gone.append(kernel.namespaces.pop("red"))
    kernel.inhabited.add(kernel.gone[0].netns.identity)
    (reason,) = trials.remove_abandoned(nullcontext(), lambda _: kernel.system()).values()
    assert reason == "cannot unregister helper v00000001-0/ip/tcp: rules still refer to it"
    assert is_unharmed(kernel)
    kernel.inhabited.clear()
    assert list(trials.remove_abandoned(nullcontext(), lambda _: kernel.system()).values()) == [""]
    assert (kernel.registrations, is_unharmed(kernel)) == ({}, True)
