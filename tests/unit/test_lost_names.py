"""A namespace whose path leads there no more: it has another name, is found by another process, or was made anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import confirm, drift
from orchestrator.fake import FakeKernel
from orchestrator.model import Netns
from orchestrator.reports import Trial
from tests.faults import MODULES, rename
from tests.hosts import Harness, both

BY_KERNEL = "profile: p\nhelpers: {ftp: {engine: kernel}}\n"
ASKING = "profile: p\nhelpers: {ftp: {queueing: registration}}\n"
OTHER = "profile: p\nhelpers: {ftp: {queueing: registration, queue: 77}}\n"
SHARING = "profile: q\nhelpers: {ftp: {queueing: registration}}\n"


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel(modules_available=dict(MODULES))
    kernel.add_netns("blue")
    return kernel


@pytest.fixture
def orch(kernel: FakeKernel, tmp_path: Path) -> Harness:
    return Harness(kernel.system(), tmp_path / "state")


def make_anew(kernel: FakeKernel) -> None:
    """`ip netns del blue; ip netns add blue`."""
    kernel.gone.append(kernel.namespaces.pop("blue"))
    netns = kernel.add_netns("blue")
    kernel.namespaces["blue"].netns = replace(netns, identity="0:77")


def found_by_process(orch: Harness, kernel: FakeKernel, text: str) -> Netns:
    """Applied by the path of a process that has ended; another one lives on there."""
    space = kernel.namespaces.pop("blue")
    space.netns = replace(space.netns, path="/proc/4711/ns/net")
    kernel.namespaces["4711"] = space
    orch.apply(text, "4711")
    del kernel.namespaces["4711"]
    kernel.gone.append(space)
    kernel.inhabited.add(space.netns.identity)
    return space.netns


@pytest.mark.parametrize("text", [BY_KERNEL, ASKING])
def test_by_its_new_name_all_is_as_ever(orch: Harness, kernel: FakeKernel, text: str) -> None:
    orch.apply(text, "blue")
    rename(orch, kernel)
    assert orch.status().is_right
    (applied,) = orch.app().applied()
    assert applied.owner.netns.label == "azure"
    kernel.namespaces["azure"].tampered = dict.fromkeys(kernel.namespaces["azure"].rules, "somebody was here")
    assert drift.mend(orch.app(), applied.owner, drift.Limits()).outcome is drift.Outcome.MENDED
    (report,) = orch.teardown("p", "azure").reports
    assert not report.is_forgotten
    assert kernel.namespaces["azure"].rules == {}
    assert not orch.status().profiles


def test_an_apply_that_changes_nothing_writes_the_new_name_down(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(BY_KERNEL, "blue")
    rename(orch, kernel)
    assert orch.apply(BY_KERNEL, "azure").plan.is_empty
    with orch.app().reading() as ledger:
        assert [owner.netns.label for owner in ledger.owners()] == ["azure"]


def test_a_trial_is_undone_although_the_first_name_is_gone(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(ASKING, "blue")
    rename(orch, kernel)
    before = kernel.dump_text()
    orch.app("azure").apply(*both(OTHER), ask=False, trial=Trial(60, lambda: None))
    kernel.now += 61
    orch.teardown("nobody")
    assert kernel.dump_text() == before
    orch.app("azure").apply(*both(OTHER), ask=False, trial=Trial(60, lambda: None))
    confirm.roll_back(orch.app(), "p", to=None, ask=False)
    assert kernel.dump_text() == before


def test_history_outlives_a_name(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(ASKING, "blue")
    before = kernel.dump_text().replace("'blue'", "'azure'")
    orch.teardown("p", "blue")
    rename(orch, kernel)
    orch.teardown("nobody")
    confirm.roll_back(orch.app(), "p", to=None, ask=False)
    assert kernel.dump_text() == before


def test_any_process_that_lives_there_leads_there(orch: Harness, kernel: FakeKernel) -> None:
    netns = found_by_process(orch, kernel, BY_KERNEL)
    assert orch.status().is_right
    (report,) = orch.teardown(every_netns=True).reports
    assert not report.is_forgotten
    assert kernel.at(netns).rules == {}


def test_one_that_was_named_is_not_kept_by_whoever_lives_there(orch: Harness, kernel: FakeKernel) -> None:
    """A name that was deleted is a namespace that was given up (supervise/place.py)."""
    orch.apply(BY_KERNEL, "blue")
    kernel.gone.append(kernel.namespaces.pop("blue"))
    kernel.inhabited.add(kernel.gone[0].netns.identity)
    assert "it is gone" in str(orch.status().profiles[0].drift)


@pytest.mark.parametrize("text", [BY_KERNEL, ASKING])
def test_what_was_in_one_that_is_made_anew_is_given_back(orch: Harness, kernel: FakeKernel, text: str) -> None:
    """Its supervisor does so; where there is none, the next command."""
    orch.apply(text, "blue")
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    make_anew(kernel)
    (profile,) = orch.status().profiles
    assert "the next apply or teardown takes away what is left of it" in str(profile.drift)
    orch.apply(text, "blue")
    assert any("was made anew" in warning for warning in orch.warnings)
    assert orch.status().is_right
    (one,) = orch.status().profiles
    assert one.owner.netns == kernel.namespaces["blue"].netns


def test_who_watches_gives_it_back(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(ASKING, "blue")
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    (applied,) = orch.app().applied()
    make_anew(kernel)
    assert drift.mend(orch.app(), applied.owner, drift.Limits()).outcome is drift.Outcome.RIGHT
    assert (orch.status().profiles, kernel.registrations) == ((), {})


def test_others_of_the_host_keep_what_they_share(orch: Harness, kernel: FakeKernel) -> None:
    kernel.add_netns("red")
    orch.apply(ASKING, "blue")
    orch.apply(SHARING, "red")
    for pid, (_, launch) in list(kernel.running_processes.items()):
        if launch.netns.label == "blue":
            kernel.kill(pid)
    make_anew(kernel)
    orch.teardown("nobody", "red")
    assert [str(profile.owner) for profile in orch.status().profiles] == ["profile q in netns red"]
    assert kernel.registrations


def test_one_in_which_somebody_lives_is_left_to_its_supervisor(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(ASKING, "blue")
    make_anew(kernel)
    orch.teardown("nobody", "")
    assert [profile.owner.netns.identity for profile in orch.status().profiles] == [kernel.gone[0].netns.identity]
