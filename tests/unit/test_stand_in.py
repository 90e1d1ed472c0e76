"""conntrackd is replaced behind a stand-in: what a connection brings is inspected at every moment."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import launches, render
from orchestrator.errors import KernelError, OrchError
from orchestrator.fake import FakeKernel
from orchestrator.model import HelperKey, Status
from orchestrator.plan_standin import STAND_IN
from orchestrator.state import Scope
from tests.hosts import Harness, both

FTP = HelperKey.parse("ftp-us/ip/tcp")


def profile(*helpers: str) -> str:
    lines = "".join(f"  {helper.replace('{', '{engine: conntrackd, ', 1)}\n" for helper in helpers)
    return f"profile: p\nfamilies: ip\nhelpers:\n{lines}"


BEFORE = profile("ftp: {queue: 77}")
CHANGES = {
    "another queue": profile("ftp: {queue: 78}"),
    "its queue for another helper": profile("ftp: {queue: 78}", "tftp: {queue: 77}"),
    "another helper besides": profile("ftp: {queue: 77}", "tftp: {queue: 78}"),
    "a helper whose stock name is attached": profile("ftp: {queue: 77}", "ssdp: {queue: 80}"),
    "queue and policies": profile("ftp: {queue: 78, policies: {ftp: {expect_max: 3}}}"),
}
changes = pytest.mark.parametrize("after", CHANGES.values(), ids=CHANGES)


def is_inspected(kernel: FakeKernel) -> bool:
    """But for a stock name that is attached: conntrackd takes it for itself before it listens."""
    ftp = kernel.registrations[FTP]
    is_served = ftp.status is Status.ENABLED and ftp.queue_num in kernel.namespaces[""].queues
    return is_served and {key.name for key in kernel.deaf()} <= {"ssdp"}


def effects(orch: Harness, text: str) -> dict[str, str]:
    changes = orch.diff(text).plan.changes
    return {change.detail.partition(",")[0]: change.effect for change in changes if change.scope is Scope.PROCESS}


@changes
def test_it_is_inspected_before_and_after_each_call_there_and_back(
    orch: Harness, kernel: FakeKernel, after: str
) -> None:
    gaps: list[str] = []

    def look(operation: str, key: str) -> None:
        if not is_inspected(kernel):
            gaps.append(f"{operation} {key}")

    for text in (after, BEFORE):
        kernel.on_modify = None
        orch.apply(BEFORE if text == after else after)
        assert effects(orch, text) == {"replace behind a stand-in": ""}
        kernel.on_modify = look
        orch.apply(text)
        assert orch.diff(text).plan.is_empty
        assert is_inspected(kernel)
        assert kernel.deaf() == []
        assert [seen.name for seen, _ in kernel.running_processes.values()] == ["conntrackd"]
    assert gaps == []


@changes
def test_one_that_fails_anywhere_leaves_all_as_it_was(orch: Harness, kernel: FakeKernel, after: str) -> None:
    orch.apply(BEFORE)
    before, failed = kernel.dump_text(), 0
    for call in range(40):
        kernel.fail_at(call, errno.ENOMEM)
        try:
            orch.apply(after)
        except KernelError:
            assert kernel.dump_text() == before, call
            assert is_inspected(kernel)
            failed += 1
        else:
            break
    assert failed >= 6
    assert orch.diff(after).plan.is_empty


def test_a_stand_in_is_told_the_same_but_for_free_numbers(orch: Harness, kernel: FakeKernel) -> None:
    both_queues = profile("ftp: {queue: 77}", "tftp: {queue: 49152}")
    orch.apply(both_queues)
    told: list[tuple[str, tuple[int, ...]]] = []

    def look(operation: str, key: str) -> None:
        for seen, launch in kernel.running_processes.values():
            if seen.name == STAND_IN:
                told.append((launch.files[launch.spec.argv[-1]], launch.spec.queues))

    kernel.on_modify = look
    orch.apply(profile("ftp: {queue: 49153}", "tftp: {queue: 49152}"))
    ((text, queues),) = set(told)
    assert queues == (49154, 49155)
    (document,) = [d for d in both(both_queues)[1].documents if d.name == "conntrackd.conf"]
    assert text.replace("49154", "77").replace("49155", "49152") == document.text


def test_a_program_that_was_upgraded_is_replaced(
    orch: Harness, kernel: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "conntrackd"
    program.touch(mode=0o755)
    monkeypatch.setattr(launches, "SEARCH_PATH", str(tmp_path))
    orch.apply(BEFORE)
    assert orch.diff(BEFORE).plan.is_empty
    os.utime(program, ns=(0, 10**9))
    assert effects(orch, BEFORE) == {"replace behind a stand-in": ""}
    assert [change.reason for change in orch.diff(BEFORE).plan.changes] == ["its program changes"]
    orch.apply(BEFORE)
    assert orch.diff(BEFORE).plan.is_empty
    assert is_inspected(kernel)


def test_where_another_namespace_uses_it_it_is_restarted(orch: Harness, kernel: FakeKernel) -> None:
    """Nobody listens on the queues of a stand-in there."""
    for name in ("blue", "red"):
        kernel.add_netns(name)
        orch.apply(profile("ftp: {queue: 77}"), name)
    after = profile("ftp: {queue: 77}", "tftp: {queue: 78}")
    (change,) = [c for c in orch.app("blue").diff(*both(after)).plan.changes if c.subject == "conntrackd"]
    assert change.effect == "nothing is inspected meanwhile"
    kernel.on_modify = lambda operation, key: pytest.fail(f"{operation} {key}: deaf") if kernel.deaf() else None
    orch.apply(after, "blue")
    assert not any(STAND_IN in step for step in orch.steps)


def test_queues_that_are_not_the_profiles_are_left_alone(orch: Harness, tmp_path: Path) -> None:
    """Nobody knows what a template of one's own does with them."""
    (tmp_path / "conntrackd.conf.j2").write_text("Helper {\n\tType ftp inet tcp {\n\t\tQueueNum 9\n\t}\n}\n")
    desired, _ = both(BEFORE)
    orch.app().apply(desired, render.target(desired, template_dir=tmp_path), ask=False)
    assert effects(orch, BEFORE) == {"restart": "nothing is inspected meanwhile"}


@pytest.mark.parametrize("trouble", ["dead", "deaf", "disabled", "redirected", "stock name gone", "a stand-in is left"])
def test_one_that_does_not_do_its_work_is_restarted(orch: Harness, kernel: FakeKernel, trouble: str) -> None:
    orch.apply(BEFORE)
    (pid,) = kernel.running_processes
    ftp = kernel.registrations[FTP]
    match trouble:
        case "dead":
            kernel.kill(pid)
        case "deaf":
            del kernel.namespaces[""].queues[77]
        case "disabled":
            kernel.registrations[FTP] = replace(ftp, status=Status.DISABLED)
        case "redirected":
            kernel.registrations[FTP] = replace(ftp, queue_num=99)
        case "a stand-in is left":
            _, launch = kernel.running_processes[pid]
            spec = replace(launch.spec, name=STAND_IN, queues=(49152,))
            kernel.system().processes.start(replace(launch, spec=spec))
        case _:
            del kernel.registrations[HelperKey.parse("ftp/ip/tcp")]
    orch.steps.clear()
    after = CHANGES["another queue"]
    orch.apply(after)
    assert f"start {STAND_IN}" not in orch.steps
    assert orch.diff(after).plan.is_empty


def test_a_stand_in_that_does_not_start_changes_nothing(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(BEFORE)
    before = kernel.dump_text()
    kernel.dying_programs.add("conntrackd")
    with pytest.raises(OrchError, match=f"{STAND_IN} ended at once"):
        orch.apply(CHANGES["another queue"])
    assert kernel.dump_text() == before
    assert is_inspected(kernel)


def test_a_stand_in_goes_on_where_nothing_else_starts(orch: Harness, kernel: FakeKernel) -> None:
    """What stands in is left, and the next command that can settles it."""
    orch.apply(BEFORE)
    before = kernel.dump_text()

    def refuse(operation: str, key: str) -> None:
        if (operation, key) == ("start", "conntrackd"):
            raise KernelError("start", key, errno.ENOMEM)

    kernel.on_modify = refuse
    with pytest.raises(OrchError) as caught:
        orch.apply(CHANGES["another queue"])
    assert "start conntrackd" in "\n".join(getattr(caught.value, "leftovers", ()))
    assert is_inspected(kernel)
    kernel.on_modify = None
    orch.apply(BEFORE)
    assert kernel.dump_text() == before


def test_one_that_is_left_stays_while_conntrackd_is_left_alone(orch: Harness, kernel: FakeKernel) -> None:
    """What nobody knows may serve anything: to end it would disable the registrations, and enable them again."""
    orch.apply(BEFORE)
    (pid,) = kernel.running_processes
    _, launch = kernel.running_processes[pid]
    stand_in = replace(launch, spec=replace(launch.spec, name=STAND_IN, queues=(49152,)))
    kernel.system().processes.start(stand_in)
    kernel.kill(pid)
    mend_around(orch, "conntrackd")
    assert not kernel.deaf()
    assert [seen.name for seen, _ in kernel.running_processes.values()] == [STAND_IN]


@pytest.mark.parametrize("spared, queue_num", [("conntrackd", 77), (str(FTP), 9)])
def test_rules_are_not_loaded_where_they_would_attach_a_helper_that_nobody_listens_for(
    orch: Harness, kernel: FakeKernel, spared: str, queue_num: int
) -> None:
    orch.apply(BEFORE)
    kernel.namespaces[""].queues.clear()
    kernel.registrations[FTP] = replace(kernel.registrations[FTP], queue_num=queue_num)
    kernel.namespaces[""].rules.clear()
    mend_around(orch, spared)
    assert not kernel.deaf()


def mend_around(orch: Harness, spared: str) -> None:
    with orch.app().settled("mend") as ledger:
        (owner,) = ledger.owners()
        applied = ledger.find(owner)
        assert applied is not None
        orch.app().establish(ledger, applied.wanted, ask=False, spared=frozenset({spared}))
