"""The use cases on the fake kernel: what a user can rely on, without a kernel."""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from orchestrator.errors import Interrupted, KernelError, OrchError, PreflightError, RollbackError, VerifyError
from orchestrator.fake import FakeKernel, FakeNetns, FakeRules
from orchestrator.model import Backend, HelperKey, L3Proto, L4Proto, Netns, QueueRow, Rules, Status
from orchestrator.reports import PlanRefusedError
from orchestrator.views import human
from orchestrator.views.human import Paint
from tests.hosts import FTP, Harness

OWN = HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP)
STOCK = HelperKey("ftp", L3Proto.IP, L4Proto.TCP)


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel(modules_available={"nf_conntrack_ftp": (("ftp", L4Proto.TCP),), "nf_nat_ftp": ()})


def refusal(orch: Harness, text: str, netns: str | None = None) -> str:
    with pytest.raises(PlanRefusedError) as caught:
        orch.apply(text, netns)
    return "; ".join(r.what for r in caught.value.refusals)


def test_apply_registers_disabled_starts_enables_and_loads_rules_last(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    assert orch.steps == [
        "register helper ftp/ip/tcp",
        "register helper ftp-us/ip/tcp",
        "start conntrackd",
        "put back registrations",
        "enable helper ftp-us/ip/tcp",
        "load rules inet orch-ftp",
    ]
    assert kernel.registrations[OWN].status is Status.ENABLED
    assert kernel.registrations[STOCK].status is Status.DISABLED


def test_second_apply_changes_nothing(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    calls = len(kernel.calls)
    assert orch.apply(FTP).plan.is_empty
    assert orch.diff(FTP).plan.is_empty
    assert len(kernel.calls) == calls


def test_diff_changes_nothing(orch: Harness, kernel: FakeKernel, tmp_path: Path) -> None:
    plan = orch.diff(FTP).plan
    assert [c.subject for c in plan.changes] == ["ftp/ip/tcp", "ftp-us/ip/tcp", "conntrackd", "inet orch-ftp"]
    assert kernel.calls == []
    assert not (tmp_path / "state").exists()


def test_teardown_leaves_the_host_as_it_was(orch: Harness, kernel: FakeKernel) -> None:
    before = kernel.dump_text()
    orch.apply(FTP)
    orch.steps.clear()
    orch.teardown()
    assert kernel.dump_text() == before
    assert orch.steps == [
        "flush rules inet orch-ftp",
        "disable helper ftp-us/ip/tcp",
        "drain queue 36160",
        "remove rules inet orch-ftp",
        "stop conntrackd",
        "unregister helper ftp/ip/tcp",
        "unregister helper ftp-us/ip/tcp",
    ]
    assert not orch.teardown().reports


@pytest.mark.parametrize("step", range(6))
def test_a_failing_step_undoes_the_earlier_ones(orch: Harness, kernel: FakeKernel, step: int) -> None:
    before = kernel.dump_text()
    kernel.fail_at(step, errno.ENOMEM)
    with pytest.raises(KernelError) as caught:
        orch.apply(FTP)
    assert caught.value.errno == errno.ENOMEM
    assert kernel.dump_text() == before
    assert not orch.status().profiles
    orch.apply(FTP)


@pytest.mark.parametrize(("step", "left"), [(0, 4), (1, 1), (2, 1), (3, 1)])
def test_a_failing_way_back_says_what_is_left(orch: Harness, kernel: FakeKernel, step: int, left: int) -> None:
    """What cannot be disabled keeps its process: without it, it would block connections."""
    kernel.fail_at(5, errno.ENOMEM)
    kernel._fail |= {6 + step: errno.EIO}
    with pytest.raises(RollbackError) as caught:
        orch.apply(FTP)
    assert len(caught.value.leftovers) == left
    assert caught.value.what == str(KernelError("load rules", "ftp", errno.ENOMEM))
    orch.apply(FTP)  # settles what was left
    assert orch.status().profiles[0].drift == ()


def test_a_signal_undoes(orch: Harness, kernel: FakeKernel) -> None:
    before = kernel.dump_text()
    orch.signal_number = 15
    with pytest.raises(Interrupted):
        orch.apply(FTP)
    assert kernel.dump_text() == before


def test_a_listener_that_does_not_bind_is_a_failure(orch: Harness, kernel: FakeKernel) -> None:
    kernel.deaf_programs.add("conntrackd")
    before = kernel.dump_text()
    with pytest.raises(OrchError, match="does not listen"):
        orch.apply(FTP)
    assert kernel.dump_text() == before


def test_a_missing_program_is_refused_with_the_cure(orch: Harness, kernel: FakeKernel) -> None:
    kernel.programs.clear()
    assert refusal(orch, FTP) == "conntrackd is not installed"
    assert kernel.calls == []


def test_a_kernel_without_the_subsystem_is_refused(orch: Harness, kernel: FakeKernel) -> None:
    kernel.has_cthelper = False
    assert "this kernel lacks nfnetlink_cthelper" in refusal(orch, FTP)


def test_removing_a_helper_with_live_connections_asks(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply("profile: ftp\nhelpers: {ftp: {engine: conntrackd}, tftp: {engine: conntrackd}}\n")
    kernel.namespaces[""].connections["tftp-us"] = 1
    orch.answer = False
    before = kernel.dump_text()
    assert orch.apply(FTP).declined
    assert orch.questions == ["1 live connection loses its helper."]
    assert kernel.dump_text() == before


def test_a_missing_namespace_is_refused(orch: Harness) -> None:
    with pytest.raises(PreflightError, match="no network namespace"):
        orch.apply(FTP, "blue")


def test_a_helper_taken_by_a_kernel_module_is_refused(orch: Harness, kernel: FakeKernel) -> None:
    kernel.modules_loaded.add("nf_conntrack_ftp")
    assert "cannot register helper ftp/ip/tcp: the in-kernel helper of that name is loaded" in refusal(orch, FTP)


def test_a_foreign_registration_is_never_altered(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    foreign = replace(kernel.registrations[OWN], queue_num=7)
    orch.teardown()
    kernel.registrations[OWN] = foreign
    assert "registered already, not by orch, and differs: queue 7 -> 36160" in refusal(orch, FTP)
    assert kernel.registrations[OWN] == foreign


def test_two_namespaces_share_a_registration(orch: Harness, kernel: FakeKernel) -> None:
    for name in ("blue", "red"):
        kernel.add_netns(name)
        orch.apply(FTP, name)
    assert orch.apply(FTP, "blue").plan.is_empty
    report = orch.teardown(netns="blue")
    assert kernel.registrations[OWN].status is Status.ENABLED
    assert [str(o) for o in report.others] == ["profile ftp in netns red"]
    assert report.reports[0].plan.kept == (
        "ftp/ip/tcp stays: used by profile ftp in netns red",
        "ftp-us/ip/tcp stays: used by profile ftp in netns red",
    )
    assert orch.status().profiles[0].drift == ()
    orch.teardown(netns="red")
    assert not kernel.registrations


def test_another_queue_in_a_second_namespace_is_refused(orch: Harness, kernel: FakeKernel) -> None:
    for name in ("blue", "red"):
        kernel.add_netns(name)
    orch.apply(FTP, "blue")
    text = refusal(orch, "profile: other\nhelpers: {ftp: {engine: conntrackd, queue: 9}}\n", "red")
    assert "ftp-us/ip/tcp is shared with profile ftp in netns blue, which wants it otherwise: queue 36160 -> 9" in text


def test_two_profiles_of_a_namespace_cannot_share(orch: Harness) -> None:
    orch.apply(FTP)
    text = refusal(orch, "profile: other\nhelpers: {ftp: {engine: conntrackd, attach: [{ports: [2121]}]}}\n")
    assert "ftp-us/ip/tcp is already used in this namespace by profile ftp" in text


def test_two_profiles_cannot_want_the_same_traffic(orch: Harness) -> None:
    orch.apply(FTP)
    text = refusal(orch, "profile: other\nhelpers: {sane: {attach: [{ports: [20-22]}]}}\n")
    assert "profile ftp here attaches ftp-us/ip/tcp to the same traffic as sane-us/ip/tcp" in text


def test_a_queue_of_somebody_else_is_refused(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    seen, launch = next(iter(kernel.running_processes.values()))
    orch.teardown()
    queue = launch.spec.queues[0]
    kernel.namespaces[""].queues[queue] = replace(_row(), queue_num=queue)
    assert f"queue {queue} is held by port id 4711" in refusal(orch, FTP)
    assert seen


def _row() -> QueueRow:
    return QueueRow(0, 4711, 0, 0, 0, 0)


TFTP = "profile: b\nhelpers: {tftp: {engine: conntrackd}}\n"
BOTH = "profile: ftp\nhelpers: {ftp: {engine: conntrackd}, sane: {engine: conntrackd}}\n"


@pytest.fixture
def refuse_rules(monkeypatch: pytest.MonkeyPatch, kernel: FakeKernel) -> Callable[..., None]:
    """From now on rules are refused; with `and_programs` every program that is started then ends at once."""
    modify = FakeKernel.modify

    def start(*, and_programs: bool = False) -> None:
        def refusing(self: FakeKernel, operation: str, key: str) -> None:
            modify(self, operation, key)
            if operation == "load rules":
                self.dying_programs |= {"conntrackd"} if and_programs else set()
                raise KernelError(operation, key, errno.EIO)

        monkeypatch.setattr(FakeKernel, "modify", refusing)

    return start


def test_undo_restarts_the_right_process_of_two(
    orch: Harness, kernel: FakeKernel, refuse_rules: Callable[..., None]
) -> None:
    orch.apply(FTP)
    orch.apply(TFTP)
    before = kernel.dump_text()
    refuse_rules()
    with pytest.raises(KernelError):
        orch.apply(BOTH)
    assert kernel.dump_text() == before


def test_nothing_is_enabled_again_whose_process_does_not_come_back(
    orch: Harness, kernel: FakeKernel, refuse_rules: Callable[..., None]
) -> None:
    orch.apply(FTP)
    refuse_rules(and_programs=True)
    with pytest.raises(RollbackError) as caught:
        orch.apply(BOTH)
    assert any("nobody would listen" in leftover for leftover in caught.value.leftovers)
    assert kernel.deaf() == []


def test_nothing_is_enabled_again_whose_process_nobody_knows_how_to_start(
    orch: Harness, kernel: FakeKernel, refuse_rules: Callable[..., None]
) -> None:
    orch.apply(FTP)
    shutil.rmtree(orch.state_dir)
    refuse_rules()
    with pytest.raises(RollbackError) as caught:
        orch.apply(BOTH)
    assert any("does not know how it was started" in leftover for leftover in caught.value.leftovers)
    assert kernel.deaf() == []


def test_a_failed_start_does_not_disable_what_another_namespace_uses(orch: Harness, kernel: FakeKernel) -> None:
    for name in ("blue", "red"):
        kernel.add_netns(name)
    orch.apply(FTP, "blue")
    before = kernel.dump_text()
    kernel.dying_programs.add("conntrackd")
    with pytest.raises(OrchError, match="ended at once"):
        orch.apply(FTP, "red")
    assert kernel.dump_text() == before


def test_a_teardown_that_cannot_disable_does_not_take_the_listener(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    kernel.fail_at(1, errno.ENOBUFS)
    report = orch.teardown().reports[0]
    assert len(report.leftovers) == 4
    assert kernel.running_processes
    assert orch.status().profiles[0].drift
    assert orch.teardown().reports[0].leftovers == ()
    assert not kernel.running_processes


def test_a_teardown_that_cannot_remove_rules_keeps_the_registrations(orch: Harness, kernel: FakeKernel) -> None:
    kernel.delete_ignores_references = True
    orch.apply(FTP)
    kernel.fail_at(2, errno.EIO)
    orch.teardown()
    assert OWN in kernel.registrations
    assert orch.teardown().reports[0].leftovers == ()
    assert not kernel.registrations


def test_both_of_two_sharing_namespaces_are_torn_down(orch: Harness, kernel: FakeKernel) -> None:
    before = kernel.dump_text()
    for name in ("blue", "red"):
        kernel.add_netns(name)
        orch.apply(FTP, name)
        kernel.namespaces[name].connections["ftp-us"] = 1
    orch.answer = False
    assert all(report.declined for report in orch.teardown(every_netns=True).reports)
    assert len(kernel.running_processes) == 2
    orch.answer = True
    orch.teardown(every_netns=True)
    assert kernel.dump_text() == before


def test_a_namespace_that_got_the_inode_of_a_deleted_one_is_another(orch: Harness, kernel: FakeKernel) -> None:
    before = kernel.dump_text()
    blue = kernel.add_netns("blue")
    orch.apply(FTP, "blue")
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    del kernel.namespaces["blue"]
    kernel.namespaces["red"] = FakeNetns(replace(blue, label="red", path="/run/netns/red"))
    orch.apply("profile: other\nhelpers: {ftp: {engine: conntrackd}}\n", "red")
    assert orch.warnings == ["netns blue is gone, and profile ftp with it"]
    assert [str(p.owner) for p in orch.status().profiles] == ["profile other in netns red"]
    orch.teardown(every_netns=True)
    assert kernel.dump_text() == before


def test_what_is_left_of_a_deleted_namespace_goes_by_its_name(orch: Harness, kernel: FakeKernel) -> None:
    before = kernel.dump_text()
    for name in ("blue", "red"):
        kernel.add_netns(name)
    orch.apply(FTP, "red")
    orch.apply("profile: own\nhelpers: {tftp: {queueing: registration}}\n", "blue")
    for pid in [pid for pid, (seen, _) in kernel.running_processes.items() if seen.profile == "own"]:
        kernel.kill(pid)
    del kernel.namespaces["blue"]
    (drift,) = orch.status("own").profiles[0].drift
    remedy = f"orch teardown own --netns blue --state-dir {orch.state_dir}"
    assert drift == f"netns blue: it is gone; {remedy} takes away what is left of it"
    orch.teardown("own", "blue")
    assert [str(p.owner) for p in orch.status().profiles] == ["profile ftp in netns red"]
    with pytest.raises(PreflightError, match="blue"):
        orch.teardown("own", "blue")
    orch.teardown("ftp", "red")
    del kernel.namespaces["red"]
    assert kernel.dump_text() == before


def test_a_namespace_made_anew_under_its_name_is_another(orch: Harness, kernel: FakeKernel) -> None:
    blue = kernel.add_netns("blue")
    orch.apply(FTP, "blue")
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    kernel.namespaces["blue"] = FakeNetns(blue)
    (status,) = orch.status().profiles
    remedy = f"orch teardown ftp --netns blue --state-dir {orch.state_dir}"
    assert status.drift == (f"netns blue: it is gone; {remedy} takes away what is left of it",)
    assert not orch.apply(FTP, "blue").plan.is_empty
    assert orch.warnings == ["netns blue is gone, and profile ftp with it"]
    assert orch.apply(FTP, "blue").plan.is_empty


def test_a_namespace_without_a_name_that_got_the_inode_of_a_deleted_one_is_another(
    orch: Harness, kernel: FakeKernel
) -> None:
    blue = kernel.add_netns("blue")
    orch.apply(FTP, "blue")
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    del kernel.namespaces["blue"]
    kernel.namespaces["of a container"] = FakeNetns(replace(blue, label="/proc/7/ns/net", path="/proc/7/ns/net"))
    assert not orch.apply(FTP, "/proc/7/ns/net").plan.is_empty
    assert orch.warnings == ["netns blue is gone, and profile ftp with it"]


def test_a_namespace_without_a_name_is_torn_down_from_inside(orch: Harness, kernel: FakeKernel) -> None:
    blue = kernel.add_netns("blue")
    orch.apply(FTP, "blue")
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    space = kernel.namespaces[""] = kernel.namespaces.pop("blue")
    space.netns = replace(blue, path="")
    orch.teardown("ftp", "")
    assert not space.rules
    assert not kernel.registrations


def test_a_namespace_under_another_name_is_the_same(orch: Harness, kernel: FakeKernel) -> None:
    blue = kernel.add_netns("blue")
    orch.apply(FTP, "blue")
    space = kernel.namespaces.pop("blue")
    space.netns = replace(blue, label="red", path="/run/netns/red")
    kernel.namespaces["red"] = space
    assert orch.apply(FTP, "red").plan.is_empty
    orch.teardown("ftp", "red")
    assert not kernel.registrations


def test_what_had_to_stay_goes_with_the_next_teardown(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    references = kernel.namespaces[""].foreign_references
    references.add("ftp-us")
    orch.teardown()
    references.clear()
    orch.apply(TFTP)
    orch.teardown()
    assert not kernel.registrations


def test_a_look_that_fails_at_the_end_is_undone(
    orch: Harness, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernel.dump_text()
    loaded: list[str] = []
    load = FakeRules.load

    def then_blind(self: FakeRules, netns: Netns, rules: Rules) -> None:
        load(self, netns, rules)
        loaded.append(rules.profile)

    def listing(self: FakeRules, netns: Netns, profile: str) -> None:
        if loaded:
            raise KernelError("list rules", profile, errno.EIO)

    monkeypatch.setattr(FakeRules, "load", then_blind)
    monkeypatch.setattr(FakeRules, "listing", listing)
    with pytest.raises(VerifyError, match="not as declared"):
        orch.apply(FTP)
    assert kernel.dump_text() == before
    loaded.clear()
    assert not orch.status().unsettled


def test_a_signal_during_the_last_step_still_undoes(
    orch: Harness, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernel.dump_text()
    load = FakeRules.load

    def interrupted(self: FakeRules, netns: Netns, rules: Rules) -> None:
        load(self, netns, rules)
        orch.signal_number = 15

    monkeypatch.setattr(FakeRules, "load", interrupted)
    with pytest.raises(Interrupted):
        orch.apply(FTP)
    assert kernel.dump_text() == before


def test_death_of_the_process_disables_and_apply_mends_exactly_that(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    kernel.kill(next(iter(kernel.running_processes)))
    assert kernel.registrations[OWN].status is Status.DISABLED
    assert orch.status().profiles[0].drift == (
        "ftp-us/ip/tcp: status disabled -> enabled",
        "conntrackd: missing: queue 36160",
    )
    orch.steps.clear()
    orch.apply(FTP)
    assert orch.steps == [
        "start conntrackd",
        "put back registrations",
        "enable helper ftp-us/ip/tcp",
    ]


def test_enabling_does_not_block_another_namespace(orch: Harness, kernel: FakeKernel) -> None:
    for name in ("blue", "red"):
        kernel.add_netns(name)
        orch.apply(FTP, name)
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    waits = (
        "ftp-us/ip/tcp stays disabled: profile ftp in netns red uses it, and nobody listens on its queue there; "
        "apply that first, or tear it down"
    )
    assert waits in orch.apply(FTP, "blue").notes
    assert orch.steps[-2:] == ["start conntrackd", "put back registrations"]
    assert orch.status("ftp", "blue").profiles[0].drift == (waits,)
    assert orch.apply(FTP, "blue").notes == (waits,), "there is nothing else to do"
    shown = human.difference_text(orch.diff(FTP, "blue"), Paint(is_on=False), is_full=False)
    assert shown == f"{waits}\nNo changes for now.\n"
    assert kernel.deaf() == []
    orch.apply(FTP, "red")
    assert orch.steps[-1] == "enable helper ftp-us/ip/tcp"
    assert orch.status().is_right


def test_a_teardown_enables_what_waited_for_it(orch: Harness, kernel: FakeKernel) -> None:
    for name in ("blue", "red", "green"):
        kernel.add_netns(name)
        orch.apply(FTP, name)
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    orch.apply(FTP, "blue")
    orch.teardown("ftp", "green")
    assert kernel.registrations[OWN].status is Status.DISABLED, "nobody listens in red"
    orch.teardown("ftp", "red")
    assert orch.steps[-1] == "enable helper ftp-us/ip/tcp"
    assert orch.status().is_right
    assert orch.apply(FTP, "blue").plan.is_empty


def test_nor_one_that_the_ledger_has_lost(orch: Harness, kernel: FakeKernel) -> None:
    for name in ("blue", "red"):
        kernel.add_netns(name)
        orch.apply(FTP, name)
    for pid in list(kernel.running_processes):
        kernel.kill(pid)
    shutil.rmtree(orch.state_dir)
    for _ in range(2):
        assert any("profile ftp in netns red uses it" in note for note in orch.apply(FTP, "blue").notes)
    assert kernel.deaf() == []
    orch.apply(FTP, "red")
    assert orch.status().is_right


def test_a_dead_supervisor_is_drift_and_mended(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    for pid, (seen, launch) in kernel.running_processes.items():
        kernel.running_processes[pid] = (replace(seen, watched=False), launch)
    orch.steps.clear()
    orch.apply(FTP)
    assert orch.steps == ["watch conntrackd"]


def test_flushed_rules_are_drift(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    space = kernel.namespaces[""]
    space.tampered[next(iter(space.rules))] = "somebody was here"
    assert orch.status().profiles[0].drift == ("inet orch-ftp: somebody changed them",)
    difference = orch.diff(FTP)
    assert difference.live_listing == "somebody was here"
    orch.steps.clear()
    orch.apply(FTP)
    assert orch.steps == ["load rules inet orch-ftp"]


def test_a_deleted_registration_is_made_again_and_rules_reloaded(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    del kernel.registrations[OWN]
    orch.steps.clear()
    orch.apply(FTP)
    assert orch.steps == [
        "register helper ftp-us/ip/tcp",
        "enable helper ftp-us/ip/tcp",
        "remove rules inet orch-ftp",
        "load rules inet orch-ftp",
    ]


def test_rules_flushed_by_somebody_are_still_ours(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    orch.system.rules[Backend.NFTABLES].flush(orch.system.host.find_netns(""), "ftp")
    orch.steps.clear()
    orch.apply(FTP)
    assert orch.steps == ["load rules inet orch-ftp"]


def test_a_table_of_our_name_that_is_not_ours_is_refused(orch: Harness) -> None:
    orch.apply(FTP)
    orch.system.rules[Backend.NFTABLES].flush(orch.system.host.find_netns(""), "ftp")
    shutil.rmtree(orch.state_dir)
    assert "inet orch-ftp exists and was not made by orch" in refusal(orch, FTP)


def test_a_replace_takes_the_rules_away_first_and_asks(orch: Harness, kernel: FakeKernel) -> None:
    """Private data length and policy names are the identity of a registration: nothing changes them in place."""
    orch.apply(FTP)
    kernel.registrations[OWN] = replace(kernel.registrations[OWN], priv_data_len=8)
    kernel.namespaces[""].connections["ftp-us"] = 2
    orch.steps.clear()
    plan = orch.apply(FTP).plan
    assert [(c.action, c.detail, c.effect) for c in plan.changes if c.scope == "host-wide helpers"] == [
        ("replace", "priv_data_len 8 -> 24", "2 live connections lose this helper")
    ]
    assert orch.questions == ["2 live connections lose their helper."]
    assert orch.steps == [
        "disable helper ftp-us/ip/tcp",
        "drain queue 36160",
        "remove rules inet orch-ftp",
        "unregister helper ftp-us/ip/tcp",
        "register helper ftp-us/ip/tcp",
        "enable helper ftp-us/ip/tcp",
        "load rules inet orch-ftp",
    ]
    assert kernel.registrations[OWN].priv_data_len == 24


def test_a_policy_is_updated_in_place(orch: Harness) -> None:
    orch.apply(FTP)
    orch.steps.clear()
    plan = orch.apply("profile: ftp\nhelpers: {ftp: {engine: conntrackd, policies: {ftp: {expect_max: 4}}}}\n").plan
    assert [c.detail for c in plan.changes] == ["policy ftp: expect_max 1 -> 4"]
    assert orch.steps == ["update helper ftp-us/ip/tcp"]


def test_another_queue_is_inspected_all_the_time(orch: Harness) -> None:
    orch.apply(FTP)
    orch.steps.clear()
    orch.apply("profile: ftp\nhelpers: {ftp: {engine: conntrackd, queue: 9}}\n")
    assert orch.steps == [
        "start conntrackd-standin",
        "put back registrations",
        "update helper ftp-us/ip/tcp",
        "drain queue 36160",
        "stop conntrackd",
        "start conntrackd",
        "put back registrations",
        "update helper ftp-us/ip/tcp",
        "drain queue 49152",
        "stop conntrackd-standin",
    ]
    assert orch.status().profiles[0].drift == ()


def test_a_removed_helper_is_retired_after_the_rules(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply("profile: ftp\nhelpers: {ftp: {engine: conntrackd}, sane: {engine: conntrackd}}\n")
    orch.steps.clear()
    orch.apply(FTP)
    rules = orch.steps.index("load rules inet orch-ftp")
    assert [s for s in orch.steps[rules:] if s.startswith("unregister")] == [
        "unregister helper sane/ip/tcp",
        "unregister helper sane/ip6/tcp",
        "unregister helper sane-us/ip/tcp",
        "unregister helper sane-us/ip6/tcp",
    ]
    assert sorted(kernel.registrations) == sorted([OWN, STOCK])


def test_the_kernel_engine_needs_no_registration(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply("profile: ftp\nhelpers: {ftp: {engine: kernel}}\n")
    assert orch.steps == ["load module nf_conntrack_ftp", "load module nf_nat_ftp", "load rules inet orch-ftp"]
    assert not kernel.registrations
    assert orch.diff("profile: ftp\nhelpers: {ftp: {engine: kernel}}\n").plan.is_empty


def test_the_backend_can_be_changed(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    orch.steps.clear()
    orch.apply(FTP + "backend: iptables\n")
    assert orch.steps == ["load rules raw orch-ftp", "remove rules inet orch-ftp"]
    assert orch.diff(FTP + "backend: iptables\n").plan.is_empty


def test_a_lost_ledger_adopts_what_matches(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    shutil.rmtree(orch.state_dir)
    assert [o.profile for o in orch.status().unknown] == ["ftp"]
    calls = len(kernel.calls)
    report = orch.apply(FTP)
    assert report.plan.is_empty
    assert report.plan.adopted == (STOCK, OWN)
    assert len(kernel.calls) == calls
    assert orch.status().profiles[0].drift == ()


@pytest.mark.parametrize("by_file", [True, False])
def test_teardown_works_without_the_ledger(orch: Harness, kernel: FakeKernel, *, by_file: bool) -> None:
    before = kernel.dump_text()
    orch.apply(FTP)
    shutil.rmtree(orch.state_dir)
    if by_file:
        orch.teardown_file(FTP)
    else:
        orch.teardown("ftp")
    assert kernel.dump_text() == before


def test_teardown_spares_a_namespace_that_only_its_rules_tell_of(orch: Harness, kernel: FakeKernel) -> None:
    kernel.delete_ignores_references = True
    for name in ("blue", "red"):
        kernel.add_netns(name)
        orch.apply(FTP, name)
    shutil.rmtree(orch.state_dir)
    orch.teardown("ftp", "blue")
    assert OWN in kernel.registrations


def test_teardown_spares_what_foreign_rules_attach(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    kernel.namespaces[""].foreign_references.add("ftp-us")
    report = orch.teardown()
    assert report.reports[0].plan.kept == ("ftp-us/ip/tcp stays, disabled: rules that orch did not write attach it",)
    assert kernel.registrations[OWN].status is Status.DISABLED


def test_teardown_asks_when_connections_lose_their_helper(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    kernel.namespaces[""].connections["ftp-us"] = 3
    orch.answer = False
    before = kernel.dump_text()
    assert orch.teardown().reports[0].declined
    assert orch.questions == ["3 live connections lose their helper."]
    assert kernel.dump_text() == before


def test_a_teardown_of_two_that_is_stopped_at_the_second_says_what_is_gone(orch: Harness, kernel: FakeKernel) -> None:
    """Each is a transaction of its own, so it is neither as before nor done."""
    orch.apply(FTP)
    orch.apply("profile: other\nhelpers: {tftp: {}}\n")

    def on_modify(operation: str, key: str) -> None:
        if (operation, key) == ("flush rules", "other"):
            orch.signal_number = signal.SIGINT

    kernel.on_modify = on_modify
    with pytest.raises(RollbackError) as caught:
        orch.teardown()
    assert caught.value.leftovers == ("profile ftp in netns host is removed, and stays so",)
    orch.signal_number = 0
    assert [str(profile.owner) for profile in orch.status().profiles] == ["profile other in netns host"]
    orch.signal_number = signal.SIGINT
    with pytest.raises(Interrupted):
        orch.teardown()


@pytest.mark.parametrize("release, warns", [("6.1.0-56-amd64", True), ("6.12.1", True), ("7.3.4+deb13", False)])
def test_teardown_names_the_queues_whose_packets_the_kernel_drops(
    orch: Harness, kernel: FakeKernel, release: str, *, warns: bool
) -> None:
    kernel.release = release
    orch.apply(FTP)
    kernel.namespaces[""].queues[5] = replace(_row(), queue_num=5)
    orch.teardown()
    assert any("queue 5 of port id 4711 in netns host" in w for w in orch.warnings) is warns


@dataclass(frozen=True, slots=True)
class GoneMeanwhile(FakeRules):
    """Another namespace is deleted between a look for its profiles and one at their rules."""

    def profiles(self, netns: Netns) -> tuple[str, ...]:
        found = FakeRules.profiles(self, netns)
        if netns.label == "blue":
            self.kernel.namespaces.pop("blue", None)
        return found


def test_a_namespace_that_goes_while_it_is_looked_into_is_in_nobodys_way(orch: Harness, kernel: FakeKernel) -> None:
    kernel.add_netns("blue")
    kernel.add_netns("red")
    for name in ("blue", "red"):
        orch.apply(FTP, name)
    (orch.state_dir / "ledger.sqlite").unlink()
    kernel.running_processes.clear()
    orch.system = replace(orch.system, rules={b: GoneMeanwhile(kernel, b) for b in orch.system.rules})
    assert [owner.netns.label for owner in orch.status().unknown] == ["red"]


def test_a_gone_namespace_is_told_and_released(orch: Harness, kernel: FakeKernel) -> None:
    kernel.add_netns("blue")
    orch.apply(FTP, "blue")
    kernel.gone.append(kernel.namespaces.pop("blue"))
    remedy = f"orch teardown ftp --netns blue --state-dir {orch.state_dir}"
    assert orch.status().profiles[0].drift == (f"netns blue: it is gone; {remedy} takes away what is left of it",)
    orch.teardown(every_netns=True)
    assert not kernel.running_processes
    assert not kernel.registrations
    assert not orch.status().profiles
