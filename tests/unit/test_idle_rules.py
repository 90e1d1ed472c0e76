"""Linux 6.1 makes iptables rules idle when a helper is unregistered: none is while such rules are loaded."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.doctor.findings import Verdict, examine
from orchestrator.doctor.gather import gather
from orchestrator.doctor.host_probes import HOST_PROBES
from orchestrator.doctor.place_probes import PLACE_PROBES
from orchestrator.errors import KernelError
from orchestrator.fake import FakeKernel
from orchestrator.model import HelperKey, L3Proto, L4Proto, Policy, Registration, Status
from orchestrator.reports import PlanRefusedError
from orchestrator.verify import trials
from tests.hosts import Harness

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
        "unregister helper ftp/ip/tcp: not tried, as rules still refer to another one, and would be idle",
    )
    assert is_unharmed(kernel)
    kernel.inhabited.clear()
    orch.teardown(every_netns=True)
    assert (kernel.registrations, is_unharmed(kernel)) == ({}, True)


def test_doctor_knows_why_it_stays(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(BOTH, "blue")
    orch.apply(ONE, "blue")
    found = [f for f in examine(gather(orch.app()), HOST_PROBES, PLACE_PROBES) if "tftp-us" in f.cause]
    assert {(f.probe, f.verdict) for f in found} == {("registrations", Verdict.OK)}
    assert "stays registered while iptables rules are loaded" in found[0].cause


def test_what_a_failed_apply_made_rests_and_is_ours(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(ONE, "blue")
    rules = kernel.namespaces["blue"].rules.copy()
    failing(kernel)
    with pytest.raises(KernelError):
        orch.apply(BOTH, "blue")
    assert kernel.namespaces["blue"].rules == rules
    assert resting(kernel) == {"tftp-us"}
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


def test_a_trial_leaves_what_would_harm(orch: Harness, kernel: FakeKernel, tmp_path: Path) -> None:
    orch.apply(ONE, "blue")
    key = HelperKey("v00000001-0", L3Proto.IP, L4Proto.TCP)
    kernel.registrations[key] = Registration(key, 7, Status.DISABLED, (Policy("p", 1, 1),), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "RUNTIME", tmp_path)
        (reason,) = trials.remove_abandoned(lambda _: kernel.system()).values()
        assert "those of profile p in netns blue;" in reason
        orch.teardown("p", "blue")
        assert list(trials.remove_abandoned(lambda _: kernel.system()).values()) == [""]
    assert (kernel.registrations, is_unharmed(kernel)) == ({}, True)
