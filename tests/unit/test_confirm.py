"""Commit-confirm and history on the fake kernel: what is not confirmed is undone, whoever dies, and it is told."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import confirm
from orchestrator.app import App
from orchestrator.commands.confirm import ask, new_trial
from orchestrator.confirm import Verdict
from orchestrator.errors import (
    Interrupted,
    KernelError,
    OrchError,
    OutputError,
    ProfileError,
    RefusedError,
    RollbackError,
    UsageError,
)
from orchestrator.fake import FakeClock, FakeHost, FakeKernel
from orchestrator.journal import Ledger
from orchestrator.model import Netns
from orchestrator.reports import Report, Trial
from orchestrator.serial import from_json, to_json
from orchestrator.session import ExitCode, Session
from orchestrator.state import Owner, Pending
from orchestrator.typed import DEFAULT_STATE
from orchestrator.views import history as view
from orchestrator.views import status as status_view
from orchestrator.views.human import Paint
from orchestrator.watchdog import Watchdog, _Second
from tests.hosts import FTP, Harness, both

WITHIN_S = 60.0
OTHER = "profile: ftp\nhelpers: {ftp: {engine: conntrackd, queue: 9}, tftp: {engine: conntrackd}}\n"
BOTH = "profile: ftp\nhelpers: {ftp: {engine: conntrackd}, tftp: {engine: conntrackd}}\n"
THIRD = "profile: ftp\nhelpers: {tftp: {engine: conntrackd}}\n"
STATES = (FTP, OTHER, THIRD)


class Killed(BaseException):
    """SIGKILL, as near as a test can come: nobody catches it, and the next command is another process."""


@dataclass(slots=True)
class Guard:
    """What was so when the watchdog was asked for."""

    orch: Harness
    kernel: FakeKernel
    seen: list[tuple[tuple[Pending, ...], int]] = field(default_factory=list)

    def __call__(self) -> None:
        self.seen.append((pending(self.orch), len(self.kernel.calls)))


def try_out(
    orch: Harness, text: str, *, guard: Callable[[], None] = lambda: None, accepts_loss: bool = False
) -> Report:
    desired, target = both(text)
    return orch.app().apply(desired, target, ask=False, trial=Trial(WITHIN_S, guard, accepts_loss))


def ledger_of(orch: Harness) -> Ledger:
    return Ledger.open(orch.state_dir, boot_id="boot-1", create=False)


def pending(orch: Harness) -> tuple[Pending, ...]:
    with closing(ledger_of(orch)) as ledger:
        return ledger.pending()


def settle(orch: Harness) -> None:
    """What every command that writes does first."""
    with orch.app().settled("test"):
        pass


def roll_back(orch: Harness, to: int | None = None) -> confirm.Rollback:
    return confirm.roll_back(orch.app(), "", to=to, ask=False)


def lines(orch: Harness) -> list[str]:
    return view.text(confirm.history(orch.app(), "")).splitlines()


def sources(orch: Harness) -> list[tuple[str, bool]]:
    """Queue numbers tell the states apart: which command made each line, and whether it is what is applied."""
    (history,) = confirm.history(orch.app(), "")
    return [(past.command, number == history.current) for number, past in enumerate(history.past)]


# -- an apply on trial -------------------------------------------------------------------------------------------------


def test_the_record_and_the_watchdog_are_there_before_the_first_effect(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    guard, calls = Guard(orch, kernel), len(kernel.calls)
    kernel.now = 100.0
    report = try_out(orch, OTHER, guard=guard)
    (((waiting,), calls_then),) = guard.seen
    assert calls_then == calls
    assert waiting.within_s == WITHIN_S
    assert waiting.deadline_s == pytest.approx(160.0, abs=1)
    assert waiting.prior is not None
    assert waiting.prior.target == both(FTP)[1]
    assert from_json(Pending, to_json(waiting)) == waiting
    assert report.pending == waiting
    assert pending(orch) == (waiting,)


def test_without_a_watchdog_nothing_is_done(orch: Harness, kernel: FakeKernel) -> None:
    def fails() -> None:
        raise OrchError("no room for a process")

    orch.apply(FTP)
    before, calls = kernel.dump_text(), len(kernel.calls)
    with pytest.raises(OrchError, match="no room"):
        try_out(orch, OTHER, guard=fails)
    assert (kernel.dump_text(), len(kernel.calls), pending(orch)) == (before, calls, ())
    assert ledger_of(orch).unsettled() == ()


def test_what_would_return_to_the_same_waits_for_nobody(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    assert try_out(orch, FTP).pending is None
    kernel.namespaces[""].rules.clear()
    assert try_out(orch, FTP).pending is None
    assert kernel.namespaces[""].rules
    assert pending(orch) == ()


@pytest.mark.parametrize("before", ["", FTP])
def test_what_fails_does_not_wait(orch: Harness, kernel: FakeKernel, before: str) -> None:
    if before:
        orch.apply(before)
    dump = kernel.dump_text()
    kernel.fail_at(3, errno.ENOMEM)
    with pytest.raises(OrchError):
        try_out(orch, OTHER)
    assert (kernel.dump_text(), pending(orch)) == (dump, ())


@settings(deadline=None)
@given(
    before=st.sampled_from(("", *STATES)), tried=st.sampled_from(STATES), verdict=st.sampled_from(("yes", "no", "late"))
)
def test_it_is_as_before_or_as_tried(
    tmp_path_factory: pytest.TempPathFactory, before: str, tried: str, verdict: str
) -> None:
    kernel = FakeKernel()
    orch = Harness(kernel.system(), tmp_path_factory.mktemp("state"))
    if before:
        orch.apply(before)
    old = kernel.dump_text()
    report = try_out(orch, tried)
    new = kernel.dump_text()
    if report.pending is None:
        assert before == tried
        return
    if verdict == "yes":
        confirm.confirm(orch.app(), "")
    elif verdict == "no":
        assert roll_back(orch).is_verdict
    else:
        kernel.now += WITHIN_S
        settle(orch)
    assert kernel.dump_text() == (new if verdict == "yes" else old)
    assert pending(orch) == ()
    assert [profile.drift for profile in orch.status().profiles] == ([()] if before or verdict == "yes" else [])
    found = confirm.verdict(orch.app(), report.pending)
    assert found is (Verdict.CONFIRMED if verdict == "yes" else Verdict.ROLLED_BACK)


def killed_at(orch: Harness, kernel: FakeKernel, call: int, act: Callable[[], object]) -> bool:
    """Whether `act` was killed at its n-th modifying call; it leaves the lock to nobody."""
    at = len(kernel.calls) + call

    def kill(_operation: str, _key: str) -> None:
        if len(kernel.calls) > at:
            raise Killed

    kernel.on_modify = kill
    try:
        act()
    except Killed:
        return True
    finally:
        kernel.on_modify = None
    return False


@pytest.mark.parametrize("before", ["", FTP])
def test_a_trial_that_is_killed_anywhere_is_undone_and_waits_for_nobody(tmp_path: Path, before: str) -> None:
    call = 0
    while True:
        kernel = FakeKernel()
        orch = Harness(kernel.system(), tmp_path / str(call))
        if before:
            orch.apply(before)
        dump = kernel.dump_text()
        if not killed_at(orch, kernel, call, lambda orch=orch: try_out(orch, OTHER)):  # type: ignore[misc]
            break
        assert len(pending(orch)) == 1
        settle(orch)
        assert (kernel.dump_text(), pending(orch)) == (dump, ())
        call += 1
    assert call > 4


@pytest.mark.parametrize("before", ["", FTP])
def test_a_rollback_that_is_killed_anywhere_is_carried_out_at_the_deadline(tmp_path: Path, before: str) -> None:
    call = 0
    while True:
        kernel = FakeKernel()
        orch = Harness(kernel.system(), tmp_path / str(call))
        if before:
            orch.apply(before)
        dump = kernel.dump_text()
        try_out(orch, OTHER)
        kernel.now += WITHIN_S
        if not killed_at(orch, kernel, call, lambda orch=orch: settle(orch)):  # type: ignore[misc]
            break
        assert kernel.deaf() == []
        settle(orch)
        assert (kernel.dump_text(), pending(orch)) == (dump, ())
        call += 1
    assert call > 4


def test_nothing_else_is_applied_or_torn_down_meanwhile(orch: Harness, kernel: FakeKernel) -> None:
    try_out(orch, FTP)
    dump = kernel.dump_text()
    for act in (
        lambda: orch.apply(OTHER),
        lambda: orch.apply("profile: other\nhelpers: {tftp: {engine: conntrackd}}\n"),
        orch.teardown,
        lambda: roll_back(orch, to=1),
    ):
        with pytest.raises(RefusedError):
            act()
    assert kernel.dump_text() == dump
    confirm.confirm(orch.app(), "ftp")
    orch.apply(OTHER)


def test_what_waits_in_a_namespace_that_is_gone_can_be_torn_down(orch: Harness, kernel: FakeKernel) -> None:
    kernel.add_netns("blue")
    desired, target = both(FTP)
    orch.app("blue").apply(desired, target, ask=False, trial=Trial(WITHIN_S, lambda: None))
    kernel.gone.append(kernel.namespaces.pop("blue"))
    orch.teardown(every_netns=True)
    assert (kernel.registrations, pending(orch)) == ({}, ())


@pytest.mark.parametrize("is_lived_in", [True, False])
def test_what_waits_in_a_namespace_that_is_gone_does_not_wait_for_ever(
    orch: Harness, kernel: FakeKernel, *, is_lived_in: bool
) -> None:
    """A process of ours may be all that keeps it. What it had on the host is taken away."""
    kernel.add_netns("blue")
    orch.apply(FTP, "blue")
    desired, target = both(OTHER)
    orch.app("blue").apply(desired, target, ask=False, trial=Trial(WITHIN_S, lambda: None))
    kernel.gone.append(kernel.namespaces.pop("blue"))
    if not is_lived_in:
        kernel.running_processes.clear()
    kernel.now += WITHIN_S
    settle(orch)
    assert (kernel.registrations, kernel.running_processes, pending(orch)) == ({}, {}, ())


def test_connections_that_nothing_gives_back_are_refused_unless_accepted(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(OTHER)
    dump = kernel.dump_text()
    kernel.namespaces[""].connections["tftp-us"] = 1
    with pytest.raises(RefusedError, match="cannot be undone") as caught:
        try_out(orch, FTP)
    assert "--accept-connection-loss" in caught.value.hint
    assert (kernel.dump_text(), pending(orch)) == (dump, ())
    assert try_out(orch, FTP, accepts_loss=True).pending is not None
    kernel.namespaces[""].connections["ftp-us"] = 1
    orch.answer = False  # nobody is asked on the way back
    roll_back(orch)
    assert kernel.dump_text() == dump


def test_what_the_ledger_does_not_know_is_refused(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    (orch.state_dir / "ledger.sqlite").unlink()
    with pytest.raises(RefusedError, match="the ledger does not know"):
        try_out(orch, BOTH)
    assert pending(orch) == ()


@pytest.mark.parametrize("before", ["", FTP])
@pytest.mark.parametrize("is_late", [True, False])
def test_what_cannot_be_undone_hinders_nothing_else_and_is_tried_again(
    tmp_path: Path, *, before: str, is_late: bool
) -> None:
    """A step of the way back fails, each in turn: the others are taken, and the next command, whichever, does the rest.

    Nothing is enabled meanwhile that nobody listens to.
    """
    failed = 0
    for event in count():
        kernel = FakeKernel()
        orch = Harness(kernel.system(), tmp_path / str(event))
        if before:
            orch.apply(before)
        dump = plainly(kernel)
        waiting = try_out(orch, OTHER).pending
        assert waiting is not None
        kernel.now += WITHIN_S * is_late
        calls = len(kernel.calls)
        kernel.fail_at(event, errno.EPERM)
        left = late(orch) if is_late else leftovers(roll_back(orch))
        assert kernel.deaf() == []
        if len(kernel.calls) - calls <= event:
            break
        if not left:
            assert plainly(kernel) == dump
            continue
        failed += 1
        (rejected,) = pending(orch)
        assert rejected == replace(waiting, is_rejected=True)
        assert confirm.verdict(orch.app(), waiting) is Verdict.WAITING
        status = orch.status()
        assert all(profile.trial is None or profile.trial.is_overdue for profile in status.profiles)
        assert not status.unsettled
        assert orch.teardown("nobody").reports == ()
        assert (plainly(kernel), pending(orch)) == (dump, ()), event
        assert confirm.verdict(orch.app(), waiting) is Verdict.ROLLED_BACK
        assert orch.status().is_right
    assert failed > 3


def plainly(kernel: FakeKernel) -> str:
    """The dump, but for the queue numbers that conntrackd writes into its own registrations, which stay disabled."""
    return re.sub(r"queue_num=\d+, (?=status=<Status.DISABLED)", "", kernel.dump_text())


def die_at(operation: str) -> Callable[[str, str], None]:
    def strike(called: str, _key: str) -> None:
        if called == operation:
            raise Killed

    return strike


def late(orch: Harness) -> tuple[str, ...]:
    """What the next command could not undo."""
    orch.warnings.clear()
    settle(orch)
    said = "it could not be undone: "
    return tuple(sentence.removeprefix(said) for sentence in orch.warnings if sentence.startswith(said))


def leftovers(ended: confirm.Rollback) -> tuple[str, ...]:
    return ended.report.leftovers if ended.report else ()


def test_rules_come_back_though_a_process_does_not(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(BOTH)
    rules, dump = dict(kernel.namespaces[""].rules), kernel.dump_text()
    try_out(orch, "profile: ftp\nhelpers: {tftp: {}}\n")
    assert kernel.namespaces[""].rules != rules
    kernel.dying_programs.add("conntrackd")
    left = leftovers(roll_back(orch))[0]
    assert left.startswith("start conntrackd: ")
    assert kernel.namespaces[""].rules == rules
    assert kernel.deaf() == []
    kernel.dying_programs.clear()
    settle(orch)
    assert kernel.dump_text() == dump


def test_a_way_back_that_was_killed_goes_on_though_it_could_not_be_undone(orch: Harness, kernel: FakeKernel) -> None:
    """A killed command is undone; here that needs a process that does not start any more."""
    native = "profile: ftp\nhelpers: {tftp: {}}\n"
    orch.apply(native)
    dump = kernel.dump_text()
    try_out(orch, FTP)
    kernel.now += WITHIN_S
    kernel.on_modify = die_at("unregister helper")
    with pytest.raises(Killed):
        settle(orch)
    kernel.on_modify = None
    kernel.dying_programs.add("conntrackd")
    settle(orch)
    assert (kernel.dump_text(), pending(orch)) == (dump, ())
    assert orch.status().is_right


def test_one_that_cannot_be_undone_is_in_the_way_of_its_own_profile_alone(orch: Harness, kernel: FakeKernel) -> None:
    kernel.add_netns("blue")
    orch.apply(FTP)
    try_out(orch, OTHER)
    kernel.now += WITHIN_S
    kernel.programs.clear()
    orch.apply("profile: other\nhelpers: {tftp: {name: own, attach: {ports: [6969]}}}\n")
    orch.apply("profile: ftp\nhelpers: {tftp: {name: blue}}\n", "blue")
    orch.teardown("ftp", "blue")
    orch.teardown("other")
    with pytest.raises(RefusedError, match="was not confirmed, and could not be undone") as caught:
        orch.apply(FTP)
    where = f"--state-dir {orch.state_dir}"
    assert caught.value.hint == f"orch teardown ftp {where} takes it away, orch confirm ftp {where} keeps what there is"
    confirm.confirm(orch.app(), "ftp")
    assert (pending(orch), orch.status().is_right) == ((), True)


def test_its_own_profile_is_known_by_any_name_of_its_namespace(orch: Harness, kernel: FakeKernel) -> None:
    """Else what is applied under another name would be undone by the next command."""
    blue = kernel.add_netns("blue")
    desired, target = both(FTP)
    orch.app("blue").apply(desired, target, ask=False, trial=Trial(WITHIN_S, lambda: None))
    kernel.namespaces["azure"] = replace(
        kernel.namespaces["blue"], netns=replace(blue, label="azure", path="/run/netns/azure")
    )
    kernel.now += WITHIN_S
    kernel.on_modify = refusal
    with pytest.raises(RefusedError, match="was not confirmed, and could not be undone"):
        orch.apply(THIRD, "azure")


def refusal(operation: str, key: str) -> None:
    """No rules can be removed."""
    if operation == "remove rules":
        raise KernelError(operation, key, errno.EBUSY)


@dataclass(frozen=True, slots=True)
class Short(FakeHost):
    """A host that is short of descriptors."""

    def netns_cookie(self, netns: Netns) -> int:
        raise OSError(errno.EMFILE, "Too many open files")


def test_a_host_that_is_short_of_something_leaves_what_waits(orch: Harness, kernel: FakeKernel) -> None:
    try_out(orch, FTP)
    (waiting,) = pending(orch)
    app = orch.app()
    with app.settled("test") as ledger, pytest.raises(RollbackError, match="Too many open files") as caught:
        confirm.undo(replace(app, system=replace(app.system, host=Short(kernel))), ledger, waiting)
    assert caught.value.leftovers == ("what was applied for profile ftp in netns host and not confirmed",)
    assert pending(orch) == (waiting,)


def test_somebody_is_there_again_who_undoes_it(orch: Harness, kernel: FakeKernel) -> None:
    """Every watchdog was killed: the next command that writes starts another, if something waits still."""
    started: list[tuple[Pending, ...]] = []
    app = replace(orch.app(), guard=lambda: started.append(pending(orch)))

    def write(app: App) -> None:
        with app.settled("test"):
            pass

    orch.apply(FTP)
    write(app)
    waiting = try_out(orch, OTHER).pending
    write(app)
    with pytest.raises(RefusedError):
        app.teardown("", every_netns=False)
    assert started == [(waiting,), (waiting,)]
    with closing(Ledger.open(orch.state_dir, boot_id="boot-1", create=True)) as ledger, ledger.watched(lambda: None):
        write(app)
    kernel.now += WITHIN_S
    write(app)
    assert len(started) == 2


def test_a_command_that_fails_at_once_sees_to_it_too(orch: Harness, kernel: FakeKernel) -> None:
    started: list[bool] = []
    try_out(orch, FTP)
    app = orch.app()
    app = replace(app, system=replace(app.system, host=Short(kernel)), guard=lambda: started.append(True))
    with pytest.raises(OSError, match="Too many open files"), app.settled("test"):
        pass
    assert started


def test_where_nobody_can_be_started_who_undoes_it_that_is_told(orch: Harness) -> None:
    def fails() -> None:
        raise OrchError("no room for a process")

    waiting = try_out(orch, FTP).pending
    with replace(orch.app(), guard=fails).settled("test"):
        pass
    assert orch.warnings == ["nobody is there who would undo what is not confirmed: no room for a process"]
    assert pending(orch) == (waiting,)


def test_what_cannot_be_undone_can_be_torn_down(orch: Harness, kernel: FakeKernel) -> None:
    dump = kernel.dump_text()
    orch.apply(FTP)
    try_out(orch, OTHER)
    kernel.now += WITHIN_S
    kernel.programs.clear()
    settle(orch)
    with pytest.raises(RefusedError, match="was not confirmed, and could not be undone"):
        orch.apply(FTP)
    orch.teardown("ftp")
    assert (kernel.dump_text(), pending(orch)) == (dump, ())


@pytest.mark.parametrize("next_one", ["apply", "try out", "teardown"])
def test_a_trial_that_was_killed_and_cannot_be_undone_is_in_nobodys_way(
    orch: Harness, kernel: FakeKernel, next_one: str
) -> None:
    """It never came to wait for its confirmation: its profile can be applied anew or torn down, as after any kill."""
    empty = kernel.dump_text()
    orch.apply(FTP)
    assert killed_at(orch, kernel, 10, lambda: try_out(orch, OTHER))
    kernel.dying_programs.add("conntrackd")
    with pytest.raises(RollbackError):
        settle(orch)
    native = "profile: ftp\nhelpers: {ftp: {}}\n"
    if next_one == "teardown":
        orch.teardown("ftp")
        assert kernel.dump_text() == empty
    else:
        waiting = try_out(orch, native).pending if next_one == "try out" else orch.apply(native).pending
        assert pending(orch) == ((waiting,) if waiting else ())
    assert not orch.status().unsettled
    assert kernel.deaf() == []


def test_a_confirmation_that_comes_too_late_undoes_it(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    dump = kernel.dump_text()
    waiting = try_out(orch, OTHER).pending
    assert waiting is not None
    kernel.now += WITHIN_S
    assert confirm.keep(orch.app(), waiting) is Verdict.ROLLED_BACK
    with pytest.raises(RefusedError, match="nothing waits"):
        confirm.confirm(orch.app(), "")
    assert kernel.dump_text() == dump


def test_what_was_torn_down_meanwhile_was_not_confirmed(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    waiting = try_out(orch, OTHER).pending
    assert waiting is not None
    kernel.now += WITHIN_S
    orch.teardown("ftp")
    assert confirm.verdict(orch.app(), waiting) is Verdict.ROLLED_BACK


def test_a_rollback_that_comes_late_goes_back_once(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    orch.apply(THIRD)
    dump = kernel.dump_text()
    try_out(orch, OTHER)
    kernel.now += WITHIN_S
    ended = roll_back(orch)
    assert (ended.report, ended.is_verdict) == (None, True)
    assert kernel.dump_text() == dump


def test_a_watchdog_says_once_that_it_cannot_read_the_ledger(orch: Harness, caplog: pytest.LogCaptureFixture) -> None:
    """Its log is in the directory that wakes it."""
    try_out(orch, FTP)
    dog = Watchdog(orch.app())
    known = dog._pending()
    ledger = orch.state_dir / "ledger.sqlite"
    content = ledger.read_bytes()
    ledger.write_bytes(b"nonsense" * 1000)
    assert (dog._pending(), dog._pending(), len(caplog.records)) == (known, known, 1)
    ledger.write_bytes(content)
    assert dog._pending() == known
    ledger.write_bytes(b"nonsense" * 1000)
    dog._pending()
    assert len(caplog.records) == 2


def test_a_watchdog_starts_nobody_who_cannot_read_the_ledger_either(orch: Harness) -> None:
    """They would end at once, one a second, and fill the log with it."""
    try_out(orch, FTP)
    (orch.state_dir / "ledger.sqlite").write_bytes(b"nonsense" * 1000)
    dog = Watchdog(orch.app())
    dog._pending()
    assert dog._be_backed(now_s=100.0) == math.inf
    assert dog._second._process is None


def test_one_behind_it_that_ends_at_once_is_started_ever_more_rarely(tmp_path: Path) -> None:
    second, now_s, pauses = _Second(tmp_path, not_before_s=0.0), 0.0, []
    for _ in range(3):
        assert second.be_there(now_s) == math.inf
        assert second._process is not None
        assert second._process.wait() == 0, "there is no ledger here"
        pauses.append(second.be_there(now_s) - now_s)
        now_s += pauses[-1]
    assert pauses == [1.0, 2.0, 4.0]
    assert second.descriptors == []


def test_a_watchdog_leaves_the_ledger_of_a_newer_orch_to_that(orch: Harness, caplog: pytest.LogCaptureFixture) -> None:
    """It would wait for ever: the newer one has its own."""
    try_out(orch, FTP)
    with closing(sqlite3.connect(orch.state_dir / "ledger.sqlite")) as ledger, ledger:
        ledger.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    before = (orch.state_dir / "ledger.sqlite").read_bytes()
    assert Watchdog(orch.app())._pending() == ()
    assert "the ledger is of a newer orch" in caplog.text
    assert (orch.state_dir / "ledger.sqlite").read_bytes() == before


def test_the_log_of_a_watchdog_that_tries_for_days_is_bounded(orch: Harness, kernel: FakeKernel) -> None:
    try_out(orch, FTP)
    log = orch.state_dir / "watchdog.log"
    log.write_bytes(b"x" * (1 << 19))
    kernel.now += WITHIN_S
    Watchdog(orch.app())._undo()
    assert (log.stat().st_size, pending(orch)) == (0, ())


@pytest.mark.parametrize(
    "left_s, is_watched, told",
    [
        (41.5, True, "undone in 41 s, unless confirmed: orch confirm ftp\n"),
        (41.5, False, "nobody is there who would undo it then"),
        (-1.0, True, "not confirmed in time, and not undone yet: orch rollback ftp"),
    ],
)
def test_status_tells_what_waits(
    orch: Harness, kernel: FakeKernel, *, left_s: float, is_watched: bool, told: str
) -> None:
    try_out(orch, FTP)
    kernel.now += WITHIN_S - left_s
    with closing(Ledger.open(orch.state_dir, boot_id="boot-1", create=True)) as ledger:
        watching = ledger.watched(lambda: None)
        if is_watched:
            watching.__enter__()
        status = orch.status()
        if is_watched:
            watching.__exit__(None, None, None)
    assert status.is_right is (left_s > 0 and is_watched)
    assert told in status_view.text(status, Paint(is_on=False), now_s=0.0)


def test_a_diff_tells_that_nothing_else_can_be_applied(orch: Harness) -> None:
    try_out(orch, FTP)
    orch.diff(OTHER)
    assert orch.warnings == [
        "profile ftp in netns host waits for its confirmation: until then nothing else can be applied"
    ]


def test_what_is_to_be_typed_is_quoted() -> None:
    owner = Owner("ftp", Netns("a place", "/run/netns/a place", "4:1"))
    typed = owner.how_to("apply", "my profile.yaml", state_dir=DEFAULT_STATE)
    assert typed == "orch apply 'my profile.yaml' --netns 'a place'"


def test_what_is_to_be_typed_names_the_state_directory(orch: Harness, kernel: FakeKernel) -> None:
    """As a shell takes it; without it the command would say that nothing waits."""
    orch.state_dir = orch.state_dir.with_name("a state")
    typed = f"--state-dir '{orch.state_dir}'"
    waits = try_out(orch, FTP).pending
    assert waits is not None
    assert view.confirm_command(waits, orch.state_dir) == f"orch confirm ftp {typed}"
    assert view.confirm_command(waits, DEFAULT_STATE) == "orch confirm ftp"
    with pytest.raises(RefusedError, match="waits for its confirmation") as caught:
        orch.apply(FTP)
    assert caught.value.hint == f"orch confirm ftp {typed}, or orch rollback ftp {typed}"
    shown = status_view.text(orch.status(), Paint(is_on=False), now_s=0.0, state_dir=orch.state_dir)
    assert f"nobody is there who would undo it then: orch rollback ftp {typed}\n" in shown


def test_a_new_boot_knows_of_nothing_that_waits(orch: Harness) -> None:
    try_out(orch, FTP)
    with closing(Ledger.open(orch.state_dir, boot_id="boot-2", create=True)) as ledger:
        assert (ledger.pending(), ledger.remembered()) == ((), ())


# -- the question ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sitting:
    """Somebody at a terminal who tries something out; `typing` is where the keys go."""

    orch: Harness
    kernel: FakeKernel
    typing: int

    def answer(self, keys: bytes, *, at_work_s: float = 0.0, on_sleep: Callable[[], None] = lambda: None) -> int:
        """The exit code of the apply that is answered so while another orch is at work for so long."""
        desired, target = both(OTHER)
        app = self.orch.app()
        report = app.apply(desired, target, ask=False, trial=Trial(WITHIN_S, lambda: None))
        assert report.pending
        os.write(self.typing, keys)
        with (self.orch.state_dir / "lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX if at_work_s else fcntl.LOCK_UN)
            until_s = self.kernel.now + at_work_s

            def slept() -> None:
                on_sleep()
                if self.kernel.now >= until_s:
                    fcntl.flock(lock, fcntl.LOCK_UN)

            app = replace(app, system=replace(app.system, clock=FakeClock(self.kernel, slept)))
            session = Session("apply", has_worked=True)
            try:
                return ask(session, app, report, report.pending, is_asked=True)
            except OutputError as error:
                return error.exit_code


@pytest.fixture
def sitting(orch: Harness, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sitting]:
    orch.apply(FTP)
    typing, terminal = os.openpty()
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield Sitting(orch, kernel, typing)
    os.close(typing)


def broken_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("keys, code", [(b"yes\n", ExitCode.OK), (b"no\n", ExitCode.DECLINED)])
@pytest.mark.parametrize("opened", [broken_pipe, full_disk])
def test_who_has_nobody_to_read_standard_output_is_asked_all_the_same(
    sitting: Sitting,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    opened: Callable[[], int],
    keys: bytes,
    code: int,
) -> None:
    stdout = os.fdopen(opened(), "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert sitting.answer(keys) == code
    assert "Keep the changes?" in capsys.readouterr().err
    assert not pending(sitting.orch)
    with pytest.raises(OSError, match=r"Broken pipe|No space left"):
        stdout.close()  # what `main` looks at


def test_who_cannot_read_the_question_may_answer_it(sitting: Sitting, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = os.fdopen(broken_pipe(), "w")
    monkeypatch.setattr(sys, "stderr", stderr)
    assert sitting.answer(b"yes\n") == ExitCode.OK
    assert not pending(sitting.orch)
    with pytest.raises(BrokenPipeError):
        stderr.close()


def test_a_yes_waits_for_whoever_is_at_work(sitting: Sitting) -> None:
    assert sitting.answer(b"yes\n", at_work_s=WITHIN_S - 1) == ExitCode.OK
    assert not pending(sitting.orch)
    assert sitting.orch.diff(OTHER).plan.is_empty


def test_a_yes_that_whoever_is_at_work_keeps_waiting_until_the_deadline_is_none(
    sitting: Sitting, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sitting.answer(b"yes\n", at_work_s=WITHIN_S + 1) == ExitCode.DECLINED
    assert "not confirmed in time: undoing it\n" in capsys.readouterr().err
    assert not pending(sitting.orch)
    assert sitting.orch.diff(FTP).plan.is_empty


def test_a_signal_while_a_yes_waits_says_that_it_is_not_confirmed(
    sitting: Sitting, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        sitting.orch.signal_number = signal.SIGTERM

    with pytest.raises(Interrupted):
        sitting.answer(b"yes\n", at_work_s=1, on_sleep=interrupt)
    command = f"orch confirm ftp --state-dir {sitting.orch.state_dir}"
    assert capsys.readouterr().err.endswith(f": not confirmed yet: {command}, or it is undone in time\n")
    assert pending(sitting.orch)


# -- history -----------------------------------------------------------------------------------------------------------


def test_back_and_back_again(orch: Harness) -> None:
    for text in STATES:
        orch.apply(text)
    assert sources(orch) == [("apply", True), ("apply", False), ("apply", False)]
    roll_back(orch)
    assert orch.diff(STATES[1]).plan.is_empty
    assert sources(orch) == [("rollback", True), ("apply", False), ("apply", False)]
    roll_back(orch)
    assert orch.diff(STATES[2]).plan.is_empty
    roll_back(orch, to=3)
    assert orch.diff(STATES[0]).plan.is_empty
    assert orch.status().profiles[0].drift == ()


def test_every_state_is_one_line_and_ten_are_kept(orch: Harness) -> None:
    texts = [FTP.replace("conntrackd", f"conntrackd, queue: {number}") for number in range(100, 112)]
    for text in (*texts, texts[-2], texts[-1]):
        orch.apply(text)
    (history,) = confirm.history(orch.app(), "ftp")
    queues = [past.applied.target.registrations[0].queue_num for past in history.past]
    assert queues == [111, 110, *range(109, 101, -1)]
    assert history.current == 0


def test_what_drifted_and_was_mended_is_no_new_line(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    orch.apply(OTHER)
    kernel.namespaces[""].rules.clear()
    orch.apply(OTHER)
    assert len(sources(orch)) == 2


def test_only_what_was_confirmed_is_history(orch: Harness) -> None:
    orch.apply(FTP)
    try_out(orch, OTHER)
    (history,) = confirm.history(orch.app(), "")
    assert (len(history.past), history.current, history.is_pending) == (1, None, True)
    roll_back(orch)
    assert sources(orch) == [("apply", True)]
    with pytest.raises(RefusedError, match="nothing else"):
        roll_back(orch)
    try_out(orch, OTHER)
    confirm.confirm(orch.app(), "")
    assert sources(orch) == [("apply", True), ("apply", False)]


def test_a_teardown_can_be_taken_back(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    dump = kernel.dump_text()
    orch.teardown()
    assert sources(orch) == [("apply", False)]
    ended = roll_back(orch)
    assert ended.to is not None
    assert kernel.dump_text() == dump


def test_the_history_of_a_namespace_goes_with_it(orch: Harness, kernel: FakeKernel) -> None:
    kernel.add_netns("blue")
    orch.apply(FTP, "blue")
    orch.teardown(netns="blue")
    orch.apply(FTP)
    assert len(confirm.history(orch.app(), "")) == 2
    del kernel.namespaces["blue"]
    orch.apply(OTHER)
    assert [str(history.owner) for history in confirm.history(orch.app(), "")] == ["profile ftp in netns host"]


def test_which_profile_is_asked_and_lines_that_are_not_there_are_refused(orch: Harness) -> None:
    with pytest.raises(RefusedError, match="no history"):
        roll_back(orch)
    orch.apply(FTP)
    orch.apply("profile: other\nhelpers: {tftp: {engine: conntrackd}}\n")
    with pytest.raises(RefusedError, match="which one: profile ftp in netns host, profile other in netns host"):
        roll_back(orch)
    with pytest.raises(UsageError, match="no line 2"):
        confirm.roll_back(orch.app(), "ftp", to=2, ask=False)


def test_reading_changes_nothing(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    try_out(orch, OTHER)
    kernel.now += 2 * WITHIN_S
    calls, files = len(kernel.calls), {f.name: f.read_bytes() for f in orch.state_dir.iterdir() if f.is_file()}
    orch.status()
    lines(orch)
    orch.diff(FTP)
    assert len(kernel.calls) == calls
    assert {f.name: f.read_bytes() for f in orch.state_dir.iterdir() if f.is_file()} == files


def test_the_text_and_the_value_of_a_history(orch: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "say_time", lambda _seconds: "2026-11-22 08:37:43")
    assert lines(orch) == ["Nothing was applied."]
    orch.apply(FTP)
    orch.apply(OTHER)
    roll_back(orch)
    assert lines(orch) == [
        "profile ftp in netns host",
        "   1  2026-11-22 08:37:43  rollback  test.yaml (ftp)  <- applied now",
        "   2  2026-11-22 08:37:43  apply     test.yaml (ftp, tftp)",
    ]
    (value,) = json.loads(json.dumps(view.value(confirm.history(orch.app(), ""))))
    assert [(line["number"], line["command"], line["current"], line["helpers"]) for line in value["lines"]] == [
        (1, "rollback", True, ["ftp"]),
        (2, "apply", False, ["ftp", "tftp"]),
    ]


def test_a_line_names_some_of_many_helpers(orch: Harness) -> None:
    helpers = "".join(f"  t{n}: {{use: tftp, engine: conntrackd, attach: [{{ports: [{n}]}}]}}\n" for n in range(10, 20))
    orch.apply(f"profile: many\nhelpers:\n{helpers}")
    assert (
        lines(orch)[1].partition("test.yaml ")[2]
        == "(t10, t11, t12, t13, t14, t15, t16, t17 and 2 more)  <- applied now"
    )


# -- the key of the profile, and the option ----------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [3601.0, float("inf"), float("nan")])
def test_a_deadline_that_never_comes_is_none(orch: Harness, seconds: float) -> None:
    with pytest.raises(UsageError, match="at most"):
        new_trial(orch.app(), seconds, accepts_loss=False)


@pytest.mark.parametrize(
    "seconds, is_good", [("0", True), ("3600", True), ("3601", False), ("-1", False), ("1m", False)]
)
def test_the_key_of_the_profile(*, seconds: str, is_good: bool) -> None:
    text = f"{FTP}confirm_within_s: {seconds}\n"
    if is_good:
        desired, target = both(text)
        assert desired.confirm_within_s == int(seconds)
        assert target == both(FTP)[1]
        return
    with pytest.raises(ProfileError, match="seconds"):
        both(text)
