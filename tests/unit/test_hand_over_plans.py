"""Updates that restart nothing: who takes over from whom, in which order, and what happens when that fails."""

from __future__ import annotations

import errno
import itertools
from dataclasses import replace

import pytest

from orchestrator import launches
from orchestrator.errors import KernelError, OrchError, RollbackError
from orchestrator.execute import perform
from orchestrator.fake import FakeKernel
from orchestrator.model import HelperKey, Status
from orchestrator.ports import Launch
from orchestrator.reports import Trial
from orchestrator.state import SucceedProcess
from tests.hosts import Harness, both

QUEUEINGS = ("rules", "registration")
queueings = pytest.mark.parametrize("queueing", QUEUEINGS)
FTP = HelperKey.parse("ftp-us/ip/tcp")


def profile(queueing: str, options: str = "", *, tftp: str = "queue: 90") -> str:
    helpers = f"  ftp: {{queueing: {queueing}, {options}}}\n  tftp: {{queueing: {queueing}, {tftp}}}\n"
    return f"profile: p\nfamilies: ip\nhelpers:\n{helpers}"


def applied(orch: Harness, text: str) -> list[str]:
    orch.steps.clear()
    orch.apply(text)
    return orch.steps


@queueings
def test_policies_and_attachments_touch_no_process(orch: Harness, kernel: FakeKernel, queueing: str) -> None:
    orch.apply(profile(queueing, "queue: 77"))
    running = dict(kernel.running_processes)
    steps = applied(orch, profile(queueing, "queue: 77, policies: {ftp: {expect_max: 2, expect_timeout: 60}}"))
    assert [step for step in steps if "rules" not in step] == ["update helper ftp-us/ip/tcp"]
    applied(orch, profile(queueing, "queue: 77, attach: {ports: [21, 2121]}"))
    assert dict(kernel.running_processes).keys() == running.keys()


@queueings
def test_what_a_process_is_told_is_changed_by_a_successor(orch: Harness, kernel: FakeKernel, queueing: str) -> None:
    orch.apply(profile(queueing, "queue: 77"))
    steps = applied(orch, profile(queueing, "queue: 77, guard: {ports: 2000-3000}"))
    assert [step for step in steps if "rules" not in step] == ["hand over to a new ftp"]
    assert not kernel.deaf()


def test_the_program_is_changed_by_a_successor(
    orch: Harness, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade of orch, also on the way back."""
    text = profile("rules", "queue: 77")
    orch.apply(text)
    queues = set(kernel.namespaces[""].queues)
    monkeypatch.setattr(launches, "_engine", lambda: "another")
    changes = orch.diff(text).plan.changes
    assert {(c.subject, c.reason) for c in changes} == {(name, "its program changes") for name in ("ftp", "tftp")}
    kernel.fail_at(1, errno.ENOMEM)
    with pytest.raises(KernelError):
        orch.apply(text)
    assert [step for step in orch.steps if step.startswith("(")] == ["(hand over to a new ftp)"]
    assert set(kernel.namespaces[""].queues) == queues
    applied(orch, text)
    assert orch.diff(text).plan.is_empty


@pytest.mark.parametrize(
    "queueing, wanted",
    [
        (
            "rules",
            [
                "hand over to a new ftp",
                "load rules inet orch-p",
                "drain queue 77, 78",
                "ftp leaves queue 77, 78",
            ],
        ),
        (
            "registration",
            [
                "hand over to a new ftp",
                "update helper ftp-us/ip/tcp",
                "drain queue 77",
                "ftp leaves queue 77",
            ],
        ),
    ],
)
def test_another_queue_is_served_before_anything_comes_to_it(
    orch: Harness, kernel: FakeKernel, queueing: str, wanted: list[str]
) -> None:
    orch.apply(profile(queueing, "queue: 77"))
    steps = applied(orch, profile(queueing, "queue: 80"))
    assert [step for step in steps if not (queueing == "rules" and step.startswith("update"))] == wanted
    assert {n for n in kernel.namespaces[""].queues if n < 90} == ({80, 81} if queueing == "rules" else {80})
    assert kernel.registrations[FTP].status is (Status.DISABLED if queueing == "rules" else Status.ENABLED)
    assert orch.diff(profile(queueing, "queue: 80")).plan.is_empty


def undone_failures(orch: Harness, kernel: FakeKernel, text: str) -> int:
    """How many calls an apply makes: each fails in turn, which leaves all as it was, until the apply succeeds."""
    before = kernel.dump_text()
    for calls in itertools.count():
        for pid, (seen, launch) in kernel.running_processes.items():
            kernel.running_processes[pid] = (replace(seen, hands_over=True), launch)
        kernel.fail_at(calls, errno.ENOMEM)
        try:
            orch.apply(text)
        except KernelError:
            assert kernel.dump_text() == before, calls
            assert not kernel.deaf()
        else:
            return calls
    raise AssertionError


@queueings
def test_an_update_that_fails_anywhere_leaves_the_queues_as_they_were(
    orch: Harness, kernel: FakeKernel, queueing: str
) -> None:
    orch.apply(profile(queueing, "queue: 77"))
    assert undone_failures(orch, kernel, profile(queueing, "queue: 80")) >= 3


def test_an_upgrade_that_does_not_come_up_is_not_tried_again_on_the_way_back(
    orch: Harness, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ran before cannot be started any more: it runs on."""
    text = profile("rules", "queue: 77")
    orch.apply(text)
    before = kernel.dump_text()
    monkeypatch.setattr(launches, "_engine", lambda: "another")
    kernel.dying_successors.add("ftp")
    kernel.calls.clear()
    with pytest.raises(OrchError, match="goes on as it was"):
        orch.apply(text)
    assert kernel.calls == ["hand over ftp"]
    assert kernel.dump_text() == before


@queueings
def test_a_successor_that_does_not_come_up_changes_nothing(orch: Harness, kernel: FakeKernel, queueing: str) -> None:
    orch.apply(profile(queueing, "queue: 77"))
    before = kernel.dump_text()
    kernel.dying_successors.add("ftp")
    with pytest.raises(OrchError, match="goes on as it was"):
        orch.apply(profile(queueing, "queue: 80"))
    assert kernel.dump_text() == before


@pytest.mark.parametrize(
    "after",
    [
        profile("rules", "queue: 90", tftp="queue: 77"),
        profile("rules", "queue: 90", tftp="queue: 100"),
        profile("registration", "queue: 77"),
    ],
    ids=["exchanged", "of another one", "another queueing"],
)
def test_what_cannot_be_handed_over_is_restarted(orch: Harness, kernel: FakeKernel, after: str) -> None:
    orch.apply(profile("rules", "queue: 77"))
    steps = applied(orch, after)
    assert {"stop ftp", "start ftp"} <= set(steps)
    assert not kernel.deaf()


def test_after_orch_and_its_supervisor_were_killed_the_process_before_takes_over_again(
    orch: Harness, kernel: FakeKernel
) -> None:
    """Whoever undoes it starts a supervisor, and what runs goes on until it is taken over from."""
    orch.apply(profile("rules", "queue: 77"))
    before = launch_of(kernel, "ftp")
    process = next(seen for seen, _ in kernel.running_processes.values() if seen.name == "ftp")
    orch.apply(profile("rules", "queue: 80"))
    for pid, (seen, launch) in kernel.running_processes.items():
        kernel.running_processes[pid] = (replace(seen, watched=False, hands_over=False), launch)
    after = launch_of(kernel, "ftp")
    step = SucceedProcess(after, before, process)
    perform(step, orch.system, before.netns, is_undo=True)
    assert launch_of(kernel, "ftp") == before
    assert {number for number in kernel.namespaces[""].queues if number < 90} == {77, 78}


def launch_of(kernel: FakeKernel, name: str) -> Launch:
    return next(launch for seen, launch in kernel.running_processes.values() if seen.name == name)


def test_the_way_back_leaves_no_queue_that_a_registration_has_still(orch: Harness, kernel: FakeKernel) -> None:
    """The old queue could not be bound again, so the registration stays at the new one, and so does its listener."""
    text = profile("registration", "queue: 77")
    orch.apply(text)
    failures = {"reconcile": errno.ENOSPC, "serve queues": 0}

    def fail(operation: str, key: str) -> None:
        number = failures.get(operation, -1)
        if operation == "serve queues" and number == 0:  # the first is on the way there
            failures[operation] = errno.EPERM
        elif number > 0:
            failures.pop(operation)
            raise KernelError(operation, key, number)

    kernel.on_modify = fail
    with pytest.raises(RollbackError):
        orch.apply(profile("registration", "queue: 80") + "reconcile: true\n")
    assert not kernel.deaf()
    kernel.on_modify = None
    orch.apply(text)
    assert orch.diff(text).plan.is_empty
    assert not kernel.deaf()


@pytest.mark.parametrize("after", ["queue: 77, guard: {ports: 2000-3000}", "queue: 80"])
@queueings
def test_one_that_hands_over_nothing_is_restarted_which_is_told(
    orch: Harness, kernel: FakeKernel, queueing: str, after: str
) -> None:
    orch.apply(profile(queueing, "queue: 77"))
    text = profile(queueing, after, tftp="queue: 90, guard: {ports: 2000-3000}")
    kernel.keeping = {"ftp", "tftp"}
    orch.steps.clear()
    report = orch.apply(text)
    told = [note.partition(" (")[0] for note in report.notes[:2]]
    assert told == ["ftp hands over nothing", "tftp hands over nothing"]
    assert {(c.detail.partition(",")[0], c.effect) for c in report.plan.changes if c.subject in kernel.keeping} == {
        ("restart", "nothing is inspected meanwhile")
    }
    assert {"stop ftp", "start ftp", "stop tftp", "start tftp"} <= set(orch.steps)
    assert not kernel.deaf()
    assert orch.diff(text).plan.is_empty


def test_a_restart_instead_is_on_trial_as_the_update_was(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(profile("rules", "queue: 77"))
    kernel.keeping = {"ftp"}
    desired, target = both(profile("rules", "queue: 77, guard: {ports: 2000-3000}"))
    guarded: list[bool] = []
    trial = Trial(60.0, guard=lambda: guarded.append(True))
    report = orch.app().apply(desired, target, ask=False, trial=trial)
    assert report.pending is not None
    assert len(guarded) == 2
    with orch.app().reading() as ledger:
        assert ledger.pending() == (report.pending,)


@queueings
def test_a_restart_instead_that_fails_anywhere_leaves_all_as_it_was(
    orch: Harness, kernel: FakeKernel, queueing: str
) -> None:
    orch.apply(profile(queueing, "queue: 77"))
    kernel.keeping = {"ftp"}
    assert undone_failures(orch, kernel, profile(queueing, "queue: 80")) >= 4


@pytest.mark.parametrize("after", ["queue: 77, guard: {ports: 2000-3000}", "queue: 80"])
@queueings
def test_one_that_hands_over_nothing_on_the_way_back_is_restarted(
    orch: Harness, kernel: FakeKernel, caplog: pytest.LogCaptureFixture, queueing: str, after: str
) -> None:
    """Else every other command would have to wait for it."""
    orch.apply(profile(queueing, "queue: 77"))
    before = kernel.dump_text()

    def fail(operation: str, key: str) -> None:
        assert not kernel.deaf()
        if operation == "reconcile":
            kernel.keeping = {"ftp"}
            raise KernelError(operation, key, errno.ENOSPC)

    kernel.on_modify = fail
    with pytest.raises(KernelError):
        orch.apply(profile(queueing, after) + "reconcile: true\n")
    assert kernel.dump_text() == before
    assert "ftp hands over nothing (it does not answer): it is restarted" in caplog.text


@pytest.mark.parametrize("after", ["queue: 77, guard: {ports: 2000-3000}", "queue: 80"])
@queueings
def test_one_that_hands_over_nothing_when_a_trial_is_undone_is_restarted(
    orch: Harness, kernel: FakeKernel, queueing: str, after: str
) -> None:
    orch.apply(profile(queueing, "queue: 77"))
    before = kernel.dump_text()
    trial = Trial(60.0, guard=lambda: None)
    orch.app().apply(*both(profile(queueing, after)), ask=False, trial=trial)
    kernel.keeping = {"ftp"}
    kernel.on_modify = lambda operation, key: pytest.fail(f"{operation} {key}: deaf") if kernel.deaf() else None
    with orch.app().settled("rollback") as ledger:
        (pending,) = ledger.pending()
        report = orch.app().roll_back(ledger, pending)
    assert report.leftovers == ()
    assert kernel.dump_text() == before


def test_a_restart_instead_that_somebody_declines_is_not_told_of(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(profile("rules", "queue: 77"))
    before = kernel.dump_text()
    kernel.keeping = {"ftp"}
    answers = iter((True, False))
    app = orch.app()
    app = replace(app, talk=replace(app.talk, confirm=lambda _plan, _reason: next(answers)))
    report = app.apply(*both(profile("rules", "queue: 77, guard: {ports: 2000-3000}")), ask=True)
    assert report.declined
    assert report.notes == ("ftp hands over nothing (it does not answer)",)
    assert kernel.dump_text() == before


def test_one_that_nobody_looks_after_is_restarted(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(profile("rules", "queue: 77"))
    for pid, (seen, launch) in kernel.running_processes.items():
        kernel.running_processes[pid] = (replace(seen, watched=False, hands_over=False), launch)
    assert "stop ftp" in applied(orch, profile("rules", "queue: 77, guard: {ports: 2000-3000}"))
