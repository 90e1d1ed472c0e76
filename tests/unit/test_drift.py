"""Drift on the fake kernel: named by status and diff, mended by apply and by watching, and never fought over."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.app import App
from orchestrator.drift import Limits, MendReport, Outcome, mend, wait_s
from orchestrator.errors import KernelError, RollbackError
from orchestrator.fake import FakeClock, FakeKernel
from orchestrator.model import Backend, HelperKey, L3Proto, L4Proto, QueueRow
from orchestrator.ports import ProcessState, Supervised
from orchestrator.reports import PlanRefusedError, Trial
from orchestrator.state import LoadRules, Mending, Owner, Repair
from tests.hosts import FTP, Harness, both

OWN = HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP)
STOCK = HelperKey("ftp", L3Proto.IP, L4Proto.TCP)
RULES = (Backend.NFTABLES, "ftp")
TABLE = "inet orch-ftp"
QUEUE = 36160
LOAD = f"load rules {TABLE}"
ENABLE = f"enable helper {OWN}"
LIMITS = Limits()
SECONDS = st.floats(0, 300)


class Killed(BaseException):
    """What nobody catches."""


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel(modules_available={"nf_conntrack_ftp": (("ftp", L4Proto.TCP),), "nf_nat_ftp": ()})


def pid(kernel: FakeKernel) -> int:
    (found,) = kernel.running_processes
    return found


def flush_ruleset(kernel: FakeKernel) -> None:
    kernel.namespaces[""].rules.clear()


def empty_table(kernel: FakeKernel) -> None:
    kernel.namespaces[""].flushed.add(RULES)


def edit_table(kernel: FakeKernel) -> None:
    kernel.namespaces[""].tampered[RULES] = "somebody's"


def delete_registration(kernel: FakeKernel) -> None:
    del kernel.registrations[OWN]


def change_registration(kernel: FakeKernel) -> None:
    kernel.registrations[OWN] = replace(kernel.registrations[OWN], queue_num=9)


def take_registration_over(kernel: FakeKernel) -> None:
    kernel.registrations[OWN] = replace(kernel.registrations[OWN], priv_data_len=8)


def load_module(kernel: FakeKernel) -> None:
    del kernel.registrations[STOCK]
    kernel.modules_loaded.add("nf_conntrack_ftp")


def kill_process(kernel: FakeKernel) -> None:
    kernel.kill(pid(kernel))


def bind_queue(kernel: FakeKernel) -> None:
    kernel.kill(pid(kernel))
    kernel.namespaces[""].queues[QUEUE] = QueueRow(QUEUE, 4711, 0, 0, 0, 0)


def kill_supervisor(kernel: FakeKernel) -> None:
    seen, launch = kernel.running_processes[pid(kernel)]
    kernel.running_processes[seen.pid] = (replace(seen, watched=False), launch)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of drift: what somebody does, what status says of it, and the steps that mend it."""

    do: Callable[[FakeKernel], None]
    says: str
    steps: tuple[str, ...] = ()
    refusal: str = ""


KINDS = {
    "the ruleset is flushed": Kind(flush_ruleset, f"{TABLE}: missing: 2 rules", (LOAD,)),
    "our table is emptied": Kind(empty_table, f"{TABLE}: somebody emptied them", (LOAD,)),
    "our table is edited": Kind(edit_table, f"{TABLE}: somebody changed them", (LOAD,)),
    "a registration is deleted": Kind(
        delete_registration,
        f"{OWN}: missing: queue {QUEUE}; policy ftp: expect_max 1, expect_timeout 300 s",
        (f"register helper {OWN}", ENABLE, f"remove rules {TABLE}", LOAD),
    ),
    "a registration is changed": Kind(change_registration, f"{OWN}: queue 9 -> {QUEUE}", (f"update helper {OWN}",)),
    "a registration is taken over": Kind(
        take_registration_over,
        f"{OWN}: priv_data_len 8 -> 24",
        (
            *(f"disable helper {OWN}", f"drain queue {QUEUE}", f"remove rules {TABLE}"),
            *(f"unregister helper {OWN}", f"register helper {OWN}", ENABLE, LOAD),
        ),
    ),
    "a kernel module has the name": Kind(
        load_module,
        f"cannot register helper {STOCK}: the in-kernel helper of that name is loaded",
        refusal=f"cannot register helper {STOCK}: the in-kernel helper of that name is loaded",
    ),
    "a process is killed": Kind(
        kill_process, f"conntrackd: missing: queue {QUEUE}", ("start conntrackd", "put back registrations", ENABLE)
    ),
    "somebody else binds our queue": Kind(
        bind_queue,
        f"queue {QUEUE} is held by port id 4711",
        refusal=f"queue {QUEUE} is held by port id 4711",
    ),
    "the supervisor is gone": Kind(kill_supervisor, "conntrackd: its supervisor is gone", ("watch conntrackd",)),
}
MENDABLE = {name: kind for name, kind in KINDS.items() if kind.steps}


def app(orch: Harness) -> App:
    """As `orch watch` asks: nobody answers."""
    made = orch.app()
    return replace(made, talk=replace(made.talk, confirm=lambda _plan, _reason: False))


def owner(orch: Harness) -> Owner:
    return orch.status().profiles[0].owner


def look(orch: Harness, limits: Limits = LIMITS) -> MendReport:
    return mend(app(orch), owner(orch), limits)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_named_and_mended_and_nothing_else(orch: Harness, kernel: FakeKernel, name: str) -> None:
    kind = KINDS[name]
    orch.apply(FTP)
    before = kernel.dump_text()
    kind.do(kernel)
    assert kind.says in orch.status().profiles[0].drift
    assert not orch.status().is_right
    plan = orch.diff(FTP).plan
    assert plan.changes
    assert [refusal.what for refusal in plan.refusals] == [kind.refusal] * bool(kind.refusal)
    orch.steps.clear()
    if kind.refusal:
        drifted = kernel.dump_text()
        with pytest.raises(PlanRefusedError, match=kind.refusal):
            orch.apply(FTP)
        assert kernel.dump_text() == drifted
        return
    orch.apply(FTP)
    assert tuple(orch.steps) == kind.steps
    assert kernel.dump_text() == before
    assert orch.status().profiles[0].drift == ()


@pytest.mark.parametrize("name", MENDABLE)
def test_watching_mends_each_kind(orch: Harness, kernel: FakeKernel, name: str) -> None:
    orch.apply(FTP)
    before = kernel.dump_text()
    MENDABLE[name].do(kernel)
    changes = orch.diff(FTP).plan.changes
    report = look(orch)
    assert (report.outcome, report.changes) == (Outcome.MENDED, changes)
    assert kernel.dump_text() == before
    assert look(orch).outcome is Outcome.RIGHT


def test_a_process_that_waits_for_its_restart_while_others_have_its_queue(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    seen, launch = kernel.running_processes[pid(kernel)]
    bind_queue(kernel)
    kernel.running_processes[0] = (replace(seen, pid=0), launch)
    assert f"queue {QUEUE} is held by port id 4711" in orch.status().profiles[0].drift


def test_what_is_right_is_left_alone(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    calls = len(kernel.calls)
    assert look(orch) == MendReport(owner(orch), Outcome.RIGHT)
    assert len(kernel.calls) == calls


def test_a_dry_run_says_and_does_nothing(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    edit_table(kernel)
    ledger = (orch.state_dir / "ledger.sqlite").read_bytes()
    report = mend(app(orch), owner(orch), Limits(), is_dry_run=True)
    assert (report.outcome, [c.subject for c in report.changes]) == (Outcome.DIFFERS, [TABLE])
    assert (orch.state_dir / "ledger.sqlite").read_bytes() == ledger
    assert kernel.namespaces[""].tampered


def test_a_profile_that_is_gone_is_right(orch: Harness) -> None:
    orch.apply(FTP)
    gone = owner(orch)
    orch.teardown()
    assert mend(app(orch), gone, Limits()).outcome is Outcome.RIGHT


def test_what_cannot_be_mended_is_said_once(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    bind_queue(kernel)
    first, second = look(orch), look(orch)
    assert first.outcome is second.outcome is Outcome.FAILED
    assert (first.is_news, second.is_news) == (True, False)
    assert orch.status().profiles[0].mending == f"queue {QUEUE} is held by port id 4711"
    del kernel.namespaces[""].queues[QUEUE]
    assert look(orch).outcome is Outcome.MENDED
    assert orch.status().profiles[0].mending == ""


def test_trouble_that_went_away_by_itself_is_forgotten(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    rows = dict(kernel.registrations)
    load_module(kernel)
    assert look(orch).outcome is Outcome.FAILED
    kernel.modules_loaded.clear()
    kernel.registrations = rows
    assert look(orch).outcome is Outcome.RIGHT
    assert orch.status().profiles[0].mending == ""


def test_live_connections_are_not_cut_without_a_person(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    kernel.namespaces[""].connections["ftp-us"] = 2
    take_registration_over(kernel)
    drifted = kernel.dump_text()
    report = look(orch)
    assert (report.outcome, report.reason) == (
        Outcome.FAILED,
        "2 live connections would lose their helper: orch apply asks first",
    )
    for _ in range(2 * LIMITS.repairs):  # what was never done is not done too often
        assert look(orch) == replace(report, is_news=False)
    assert kernel.dump_text() == drifted
    kernel.namespaces[""].connections.clear()
    assert look(orch).outcome is Outcome.MENDED


def test_nor_are_those_of_another_namespace_that_uses_the_same_registration(tmp_path: Path) -> None:
    """7.3 unregisters what rules refer to, wherever they are."""
    kernel = FakeKernel(delete_ignores_references=True)
    orch = Harness(kernel.system(), tmp_path)
    for name in ("blue", "red"):
        kernel.add_netns(name)
        orch.apply(FTP, name)
    kernel.namespaces["red"].connections["ftp-us"] = 2
    take_registration_over(kernel)
    blue = next(applied.owner for applied in orch.app().applied() if applied.owner.netns.label == "blue")
    report = mend(app(orch), blue, LIMITS)
    assert (report.outcome, report.reason) == (
        Outcome.FAILED,
        "2 live connections would lose their helper: orch apply asks first",
    )
    kernel.namespaces["red"].connections.clear()
    assert mend(app(orch), blue, LIMITS).outcome is Outcome.MENDED


@pytest.mark.parametrize("state", [ProcessState.STARTING, ProcessState.BACKOFF, ProcessState.STOPPING])
def test_a_supervisor_at_work_is_waited_for(orch: Harness, kernel: FakeKernel, state: ProcessState) -> None:
    orch.apply(FTP)
    kill_process(kernel)
    at = ("ftp", owner(orch).netns.identity)
    kernel.supervised[at] = (Supervised("conntrackd", state, 0, 1, 0.0, "killed by SIGKILL"),)
    report = look(orch)
    assert report.outcome is Outcome.WAITING
    assert report.again_in_s > 0
    assert not kernel.running_processes
    kernel.supervised[at] = (Supervised("conntrackd", ProcessState.FATAL, 0, 10, 0.0, "killed by SIGKILL"),)
    assert look(orch).outcome is Outcome.MENDED


def test_it_never_fights(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    limits = Limits()
    mended = 0
    for _ in range(1000):
        edit_table(kernel)
        report = look(orch)
        kernel.now += report.again_in_s or 0.1
        mended += report.outcome is Outcome.MENDED
        if report.outcome is Outcome.GIVEN_UP:
            break
    assert (report.outcome, report.is_news, mended) == (Outcome.GIVEN_UP, True, limits.repairs)
    assert f"{TABLE} was mended 5 times within 60 s" in orch.status().profiles[0].mending
    assert not orch.status().is_right
    given_up_at = kernel.now
    assert look(orch) == replace(report, is_news=False)
    kernel.now = given_up_at + limits.quiet_s
    assert look(orch).outcome is Outcome.MENDED


def test_what_could_not_be_mended_as_often_is_left_alone_with_the_reason(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    kernel.dying_programs = {"conntrackd"}
    edit_table(kernel)
    kill_process(kernel)
    first = look(orch)
    assert (first.outcome, first.is_partial, first.again_in_s > 0) == (Outcome.MENDED, True, True)
    assert [change.subject for change in first.changes] == [TABLE]
    while (report := look(orch)).outcome is not Outcome.GIVEN_UP:
        kernel.now += report.again_in_s or 0.1
    said = "conntrackd was to be mended 5 times within 60 s, and is not right (conntrackd ended at once)"
    assert said in report.reason
    assert TABLE not in report.reason
    assert look(orch).reason == report.reason
    assert orch.status().profiles[0].mending == report.reason


RULES_KINDS = ("the ruleset is flushed", "our table is emptied", "our table is edited")
HELPER_KINDS = ("a registration is changed", "a process is killed", "the supervisor is gone")


def fight_over(orch: Harness, kernel: FakeKernel, name: str) -> MendReport:
    """Somebody does it again and again, until it is left alone."""
    for _ in range(2):
        MENDABLE[name].do(kernel)
        report = look(orch, Limits(repairs=1))
    return report


@pytest.mark.parametrize(
    ("fought", "other"),
    [
        pair
        for rules in RULES_KINDS
        for helper in HELPER_KINDS
        for pair in ((rules, helper), (helper, rules))
        if pair != ("a registration is changed", rules)
    ],
)
def test_what_is_fought_over_is_left_alone_and_the_rest_is_mended(
    orch: Harness, kernel: FakeKernel, fought: str, other: str
) -> None:
    orch.apply(FTP)
    before = kernel.dump_text()
    given_up = fight_over(orch, kernel, fought)
    assert (given_up.outcome, given_up.is_news) == (Outcome.GIVEN_UP, True)
    left, drift = kernel.dump_text(), orch.status().profiles[0].drift
    MENDABLE[other].do(kernel)
    assert orch.status().profiles[0].drift != drift
    orch.steps.clear()
    report = look(orch)
    assert (report.outcome, report.is_partial) == (Outcome.MENDED, True)
    assert tuple(orch.steps) == MENDABLE[other].steps
    assert (kernel.dump_text(), orch.status().profiles[0].drift) == (left, drift)
    assert look(orch).outcome is Outcome.GIVEN_UP
    assert orch.status().profiles[0].mending == given_up.reason
    kernel.now += LIMITS.quiet_s
    assert look(orch).outcome is Outcome.MENDED
    assert kernel.dump_text() == before
    assert orch.status().is_right


def test_trouble_that_went_away_is_forgotten_also_beside_what_is_left_alone(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    given_up = fight_over(orch, kernel, "our table is edited")
    rows = dict(kernel.registrations)
    load_module(kernel)
    assert look(orch).outcome is Outcome.FAILED
    kernel.modules_loaded.clear()
    kernel.registrations = rows
    report = look(orch)
    assert (report.outcome, report.reason) == (Outcome.GIVEN_UP, given_up.reason)
    assert orch.status().profiles[0].mending == given_up.reason


@pytest.mark.parametrize(
    ("fought", "other"),
    [
        *(("a registration is deleted", other) for other in (*RULES_KINDS, "the supervisor is gone")),
        *(("a registration is changed", other) for other in RULES_KINDS),
    ],
)
def test_what_cannot_be_right_without_what_is_fought_over_is_left_as_well(
    orch: Harness, kernel: FakeKernel, fought: str, other: str
) -> None:
    """Rules that name a helper that is missing would have the kernel load a module of that name; attached to a queue
    where nobody listens, it would block new connections.
    """
    orch.apply(FTP)
    before = kernel.dump_text()
    assert fight_over(orch, kernel, fought).outcome is Outcome.GIVEN_UP
    MENDABLE[other].do(kernel)
    left = kernel.dump_text()
    assert look(orch).outcome is Outcome.GIVEN_UP
    assert kernel.dump_text() == left
    kernel.now += LIMITS.quiet_s
    assert look(orch).outcome is Outcome.MENDED
    assert kernel.dump_text() == before


TWO = "profile: ftp\nhelpers:\n  ftp: {queueing: registration}\n  tftp: {queueing: registration}\n"
THINGS = ("rules", "process ftp", "process tftp", *(f"{name}/{l3}" for name in ("ftp", "tftp") for l3 in ("ip", "ip6")))


def disturb(kernel: FakeKernel, thing: str) -> None:
    """Somebody flushes the rules, kills a process, or changes a registration; what is gone is gone."""
    if thing == "rules":
        return flush_ruleset(kernel)
    word, _, name = thing.partition(" ")
    if word == "process":
        for found in [p for p, (seen, _) in kernel.running_processes.items() if seen.name == name]:
            kernel.kill(found)
        return None
    name, _, l3proto = thing.partition("/")
    for key, seen in kernel.registrations.items():
        if (key.name.removesuffix("-us"), key.l3proto) == (name, l3proto):
            kernel.registrations[key] = replace(seen, policies=tuple(replace(p, expect_max=9) for p in seen.policies))
    return None


@contextlib.contextmanager
def two_applied() -> Iterator[tuple[Harness, FakeKernel]]:
    """A host of its own for each example of a law."""
    kernel = FakeKernel()
    with tempfile.TemporaryDirectory() as directory:
        orch = Harness(kernel.system(), Path(directory))
        orch.apply(TWO)
        yield orch, kernel


def helper_of(thing: str) -> str:
    return thing.removeprefix("process ").split("/")[0].removesuffix("-us")


@settings(max_examples=25, deadline=None)
@given(fought=st.sets(st.sampled_from(THINGS), min_size=1), others=st.sets(st.sampled_from(THINGS)))
@pytest.mark.slow
def test_whatever_is_left_alone_nothing_is_blocked_and_all_else_is_mended(fought: set[str], others: set[str]) -> None:
    with two_applied() as (orch, kernel):
        for _ in range(2):
            for thing in fought:
                disturb(kernel, thing)
            given_up = look(orch, Limits(repairs=1))
        assert given_up.outcome is Outcome.GIVEN_UP
        left = orch.status().profiles[0].drift
        for thing in others:
            disturb(kernel, thing)
        reports = [look(orch) for _ in range(4)]
        assert reports[-1].outcome is Outcome.GIVEN_UP
        assert (kernel.deaf(), kernel.dangling()) == ([], [])
        now = orch.status().profiles[0].drift
        assert {line.partition(": ")[0] for line in left} <= {line.partition(": ")[0] for line in now}
        if not set(map(helper_of, fought)) & set(map(helper_of, others)):
            assert now == left
        orch.apply(TWO)
        assert orch.status().is_right


@settings(max_examples=25, deadline=None)
@given(drifted=st.sets(st.sampled_from(THINGS)))
@pytest.mark.slow
def test_the_first_parts_can_be_made_right_without_the_others(drifted: set[str]) -> None:
    with two_applied() as (orch, kernel):
        for thing in drifted:
            disturb(kernel, thing)
        at, target = owner(orch), both(TWO)[1]
        with app(orch).reading() as ledger:
            parts = app(orch).parts(ledger, at, target, frozenset())
            subjects = {change.subject for change in app(orch).plan(ledger, at, target)[1].changes}
            assert sorted(subject for part in parts for subject in part) == sorted(subjects)
            for count in range(len(parts)):
                others = frozenset().union(*parts[count:])
                plan = app(orch).plan(ledger, at, target, others)[1]
                assert {change.subject for change in plan.changes} == subjects - others


def refuse(things: set[str]) -> Callable[[str, str], None]:
    """What the kernel does not do: load the rules, start a process, or change a registration."""

    def on_modify(operation: str, key: str) -> None:
        name, _, l3proto = key.partition("/")
        thing = {
            "load rules": "rules",
            "start": f"process {key}",
            "update helper": f"{name.removesuffix('-us')}/{l3proto.partition('/')[0]}",
        }.get(operation)
        if thing in things:
            raise KernelError(operation, key, errno.EINVAL)

    return on_modify


@settings(max_examples=50, deadline=None)
@given(drifted=st.sets(st.sampled_from(THINGS), min_size=1), hopeless=st.sets(st.sampled_from(THINGS)))
@pytest.mark.slow
def test_what_fails_keeps_nothing_else_from_being_mended(drifted: set[str], hopeless: set[str]) -> None:
    with two_applied() as (orch, kernel):
        for thing in drifted:
            disturb(kernel, thing)
        kernel.on_modify = refuse(hopeless)
        while (report := look(orch)).again_in_s:
            kernel.now += report.again_in_s
        # The registrations of a dead process are disabled, so a new one cannot do without them.
        parts = {
            thing: {thing, *(part for part in THINGS if thing == f"process {helper_of(part)}")} for thing in THINGS
        }
        left = {thing for thing in drifted if parts[thing] & hopeless}
        assert report.outcome is (Outcome.FAILED if left else Outcome.MENDED)
        assert (kernel.deaf(), kernel.dangling()) == ([], [])
        names = {helper_of(line.partition(": ")[0]) for line in orch.status().profiles[0].drift}
        assert names - {TABLE} <= {helper_of(thing) for thing in left}
        assert TABLE not in names or "rules" in left or any(thing.startswith("process") for thing in left)
        kernel.on_modify = None
        kernel.now += LIMITS.within_s
        assert look(orch).outcome is (Outcome.MENDED if left else Outcome.RIGHT)
        assert orch.status().is_right


BROKEN = "conntrackd ended at once"


def kill_and_edit(kernel: FakeKernel) -> None:
    """Two parts, of which one cannot be mended."""
    kernel.dying_programs = {"conntrackd"}
    edit_table(kernel)
    kill_process(kernel)


def test_what_fails_beside_what_is_mended_is_said_at_once_and_once(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    kill_and_edit(kernel)
    first = look(orch)
    assert (first.outcome, first.reason, first.is_partial) == (Outcome.MENDED, f"not the rest: {BROKEN}", True)
    assert orch.status().profiles[0].mending == BROKEN
    kernel.now += first.again_in_s
    second = look(orch)
    assert (second.outcome, second.reason, second.is_news) == (Outcome.FAILED, BROKEN, False)


def test_what_never_was_mended_is_not_said_to_change_again(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    kill_and_edit(kernel)
    assert look(orch, Limits(repairs=1)).outcome is Outcome.MENDED
    given_up = look(orch, Limits(repairs=1))
    assert given_up.outcome is Outcome.GIVEN_UP
    assert f"conntrackd was to be mended 1 times within 60 s, and is not right ({BROKEN})" in given_up.reason


def test_all_parts_that_are_right_are_the_whole(orch: Harness, kernel: FakeKernel) -> None:
    """What failed was a matter of the moment."""
    orch.apply(FTP)
    edit_table(kernel)
    kill_process(kernel)
    kernel.fail_at(len(MENDABLE["a process is killed"].steps) - 1, errno.ENOMEM)
    report = look(orch)
    assert (report.outcome, report.is_partial, report.reason) == (Outcome.MENDED, False, "")
    assert orch.status().is_right
    assert orch.status().profiles[0].mending == ""


def on_sleep(orch: Harness, kernel: FakeKernel, act: Callable[[], None]) -> None:
    """Something happens while orch waits."""
    orch.system = replace(orch.system, clock=FakeClock(kernel, act))


def test_others_have_their_turn_between_the_parts(orch: Harness, kernel: FakeKernel) -> None:
    """A process that is not ready takes half a minute each time: who wants the lock does not wait for all of them."""
    orch.apply(TWO)
    disturb(kernel, "process ftp")
    disturb(kernel, "process tftp")
    kernel.on_modify = refuse({"process ftp", "process tftp"})
    was_locked: list[bool] = []
    with app(orch).reading() as ledger:
        on_sleep(orch, kernel, lambda: was_locked.append(ledger.is_locked()))
        report = look(orch)
    assert (report.outcome, was_locked) == (Outcome.FAILED, [False, False])
    assert report.reason.count("EINVAL") == 2, "each is said"


def test_what_is_applied_between_the_parts_stays(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(TWO)
    disturb(kernel, "process ftp")
    disturb(kernel, "rules")
    kernel.on_modify = refuse({"process ftp"})
    other = TWO.replace("  tftp:", "  tftp2: {use: tftp}\n  #")

    def apply_another() -> None:
        kernel.on_modify = None
        orch.apply(other)

    on_sleep(orch, kernel, apply_another)
    report = look(orch)
    assert (report.outcome, report.again_in_s > 0) == (Outcome.WAITING, True)
    assert orch.diff(other).plan.is_empty
    assert orch.status().is_right


def test_rules_that_were_emptied_can_be_undone(orch: Harness, kernel: FakeKernel) -> None:
    """Nobody knows what there was of them: killed on its way, a repair would keep every other command waiting."""
    orch.apply(FTP)
    before = kernel.dump_text()
    empty_table(kernel)

    def kill(operation: str, _key: str) -> None:
        if operation == "load rules":
            raise Killed

    kernel.on_modify = kill
    with pytest.raises(Killed):
        look(orch)
    kernel.on_modify = None
    assert orch.teardown("nobody").reports == ()
    assert not orch.status().unsettled
    kernel.now += LIMITS.within_s
    assert look(orch).outcome is Outcome.MENDED
    assert kernel.dump_text() == before


def leave_half_done(orch: Harness) -> None:
    """A killed apply whose rules of before nobody knows any more."""
    rules = both(FTP)[1].rules
    with app(orch).settled("test") as ledger:
        tx = ledger.begin("apply", owner(orch), (LoadRules(replace(rules, digest="0ld", documents=()), rules),))
        ledger.intend(tx, 0)


@pytest.mark.parametrize("drifts", [True, False])
def test_what_cannot_be_undone_is_over_once_all_is_right(orch: Harness, kernel: FakeKernel, *, drifts: bool) -> None:
    orch.apply(FTP)
    before = kernel.dump_text()
    leave_half_done(orch)
    with pytest.raises(RollbackError):
        orch.teardown("nobody")
    if drifts:
        kill_process(kernel)
    assert look(orch).outcome is (Outcome.MENDED if drifts else Outcome.RIGHT)
    assert not orch.status().unsettled
    assert kernel.dump_text() == before


def test_an_apply_makes_it_mend_again(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    limits = Limits(repairs=1)
    for _ in range(2):
        edit_table(kernel)
        report = look(orch, limits)
    assert report.outcome is Outcome.GIVEN_UP
    orch.apply(FTP)
    assert orch.status().profiles[0].mending == ""
    edit_table(kernel)
    assert look(orch, limits).outcome is Outcome.MENDED


def test_a_killed_command_is_settled_by_watching(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    before = kernel.dump_text()
    with app(orch).settled("test") as ledger:
        ledger.begin("apply", owner(orch), ())
    assert orch.status().unsettled
    assert look(orch).outcome is Outcome.RIGHT
    assert not orch.status().unsettled
    assert kernel.dump_text() == before


def test_who_holds_the_lock_is_waited_for(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP)
    edit_table(kernel)
    with app(orch).settled("test"):
        report = look(orch)
    assert report.outcome is Outcome.WAITING
    assert report.again_in_s > 0
    assert look(orch).outcome is Outcome.MENDED


@given(events=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 30)), max_size=60), repairs=st.integers(1, 8))
def test_nothing_is_mended_more_often_than_it_may_be(events: list[tuple[str, float]], repairs: int) -> None:
    limits = Limits(repairs)
    now_s, mending = 1000.0, Mending()
    for subject, pause_s in events:
        now_s += pause_s
        if wait_s(mending, subject, now_s, limits) == 0.0:
            mending = replace(mending, repairs=(*mending.repairs, Repair(subject, now_s)))
        recent = Counter(r.subject for r in mending.repairs if now_s - r.at < limits.within_s)
        assert max(recent.values(), default=0) <= repairs


@given(ago_s=st.lists(SECONDS, max_size=20), repairs=st.integers(1, 8))
def test_who_waits_as_long_as_told_may_mend(ago_s: list[float], repairs: int) -> None:
    limits, now_s = Limits(repairs), 1000.0
    mending = Mending(tuple(Repair("a", now_s - seconds) for seconds in ago_s))
    told = wait_s(mending, "a", now_s, limits)
    assert wait_s(mending, "b", now_s, limits) == 0.0
    if told is not None:
        assert 0.0 <= told <= limits.within_s
        assert wait_s(mending, "a", now_s + told + 1e-6, limits) == 0.0


RECONCILED = f"{FTP}reconcile: true\n"


def test_reconciling_is_turned_on_and_off_without_a_restart(orch: Harness, kernel: FakeKernel) -> None:
    empty = kernel.dump_text()
    orch.apply(FTP)
    before = kernel.dump_text()
    orch.steps.clear()
    orch.apply(RECONCILED)
    assert orch.steps == ["have drift mended"]
    assert orch.apply(RECONCILED).plan.is_empty
    orch.apply(FTP)
    assert orch.steps == ["have drift mended", "leave drift alone"]
    assert kernel.dump_text() == before
    orch.apply(RECONCILED)
    orch.teardown()
    assert kernel.dump_text() == empty


def test_a_supervisor_that_was_told_otherwise_is_drift(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(RECONCILED)
    kernel.reconciled.clear()
    assert orch.status().profiles[0].drift == ("reconcile: false -> true",)
    assert look(orch).outcome is Outcome.MENDED
    assert kernel.reconciled


def test_a_profile_without_a_supervisor_is_warned_of() -> None:
    told = both("profile: k\nreconcile: true\nhelpers: {ftp: {engine: kernel}}\n")[0].warnings
    assert told == ("no helper here has a process, so drift is mended only while orch run or orch watch runs",)
    assert both(RECONCILED)[0].warnings == both(FTP)[0].warnings


def test_a_confirmation_is_waited_for(orch: Harness, kernel: FakeKernel) -> None:
    desired, target = both(FTP)
    orch.app().apply(desired, target, ask=False, trial=Trial(60.0, lambda: None))
    edit_table(kernel)
    report = look(orch)
    assert (report.outcome, report.reason) == (Outcome.WAITING, "it has to be confirmed first")
    assert kernel.namespaces[""].tampered


def test_rules_elsewhere_that_hold_on_to_a_registration_that_was_made_again(orch: Harness, kernel: FakeKernel) -> None:
    """From 7.3 on a registration can be deleted while rules name it; those of other namespaces do not see a new one."""
    kernel.delete_ignores_references = True
    kernel.add_netns("blue")
    orch.apply(FTP)
    orch.apply(FTP, "blue")
    assert not kernel.dead()
    assert not (orch.state_dir / "remade").exists()
    before = kernel.dump_text()
    delete_registration(kernel)
    orch.apply(FTP)
    assert kernel.dead() == [OWN]
    assert (orch.state_dir / "remade").exists()
    here, blue = orch.status().profiles
    assert (here.owner.netns.label, here.drift) == ("host", ())
    assert blue.drift == (f"{TABLE}: they would go on attaching a helper that is gone",)
    report = mend(app(orch), blue.owner, LIMITS)
    assert report.outcome is Outcome.MENDED
    assert not kernel.dead()
    assert kernel.dump_text() == before
    assert orch.status().is_right
    assert orch.apply(FTP).plan.is_empty


@pytest.mark.parametrize("first", ["", "blue"])
@pytest.mark.parametrize("call", range(6))
def test_a_registration_that_a_killed_command_made_again(
    orch: Harness, kernel: FakeKernel, call: int, first: str
) -> None:
    """Whoever is next, and wherever the other one was killed: in the end all rules attach the registration there is."""
    kernel.delete_ignores_references = True
    kernel.add_netns("blue")
    orch.apply(FTP)
    orch.apply(FTP, "blue")
    before = kernel.dump_text()
    delete_registration(kernel)
    ends_at = len(kernel.calls) + call

    def kill(_operation: str, _key: str) -> None:
        if len(kernel.calls) > ends_at:
            raise Killed

    kernel.on_modify = kill
    with contextlib.suppress(Killed):
        orch.apply(FTP)
    kernel.on_modify = None
    for netns in (first, "blue", ""):
        orch.apply(FTP, netns or None)
    assert not kernel.dead()
    assert kernel.dump_text() == before
    assert orch.status().is_right
