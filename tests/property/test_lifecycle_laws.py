"""Laws of a supervised process: whatever happens to it, in whatever order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ports import ProcessState
from orchestrator.supervise import lifecycle
from orchestrator.supervise.lifecycle import LAST_DELAY_S, Act, Acts, Life, Policy, State

policies = st.builds(
    Policy,
    is_restarted=st.booleans(),
    limit=st.integers(1, 5),
    window_s=st.floats(1, 100),
    ready_within_s=st.floats(1, 10),
)
events = st.sampled_from(["ready", "ended", "hung", "passed", "stop"])
histories = st.lists(st.tuples(events, st.floats(0, 40)), max_size=60)


def play(policy: Policy, history: list[tuple[str, float]]) -> list[tuple[str, float, Life, Acts]]:
    """What a supervisor would see and do: (event, time, life after it, acts)."""
    now = 1000.0
    life, acts = lifecycle.begin(policy, now)
    life = lifecycle.spawned(life, 1)
    told = [("begin", now, life, acts)]
    pid = 1
    for event, later in history:
        if Act.FORGET in acts:
            break
        now += later
        if event in ("ready", "ended", "hung") and not life.pid:
            continue
        if event == "passed" and life.deadline is None:
            continue
        match event:
            case "ready":
                life, acts = lifecycle.ready(life)
            case "ended":
                life, acts = lifecycle.ended(life, "killed", now)
            case "hung":
                life, acts = lifecycle.hung(life, "hung", now, can_tell=True)
            case "stop":
                life, acts = lifecycle.stop(life, now)
            case _:
                life, acts = lifecycle.passed(life, now)
        if Act.SPAWN in acts:
            pid += 1
            life = lifecycle.spawned(life, pid)
        told.append((event, now, life, acts))
    return told


@given(policies, histories)
def test_it_is_given_up_only_at_the_limit_and_then_stays_so(policy: Policy, history: list[tuple[str, float]]) -> None:
    told = play(policy, history)
    spawns = [at for _, at, _, acts in told if Act.SPAWN in acts]
    was_ready = any(Act.HEARD in acts for *_, acts in told)
    for event, at, life, acts in told:
        if life.state is not State.FATAL:
            continue
        assert Act.SPAWN not in acts
        if event == "ended" and was_ready and policy.is_restarted:
            restarts = [s for s in spawns[1:] if at - policy.window_s < s <= at]
            assert len(restarts) >= policy.limit
        assert life.reason
    fatal = [life for *_, life, _ in told if life.state is State.FATAL]
    assert len({life.restarts for life in fatal}) <= 1


@given(policies, histories)
def test_there_are_no_more_restarts_in_a_window_than_allowed(policy: Policy, history: list[tuple[str, float]]) -> None:
    restarts = [at for _, at, _, acts in play(policy, history)[1:] if Act.SPAWN in acts]
    for at in restarts:
        assert sum(at - policy.window_s < earlier <= at for earlier in restarts) <= policy.limit


@given(policies, histories)
def test_it_is_disabled_before_it_is_started_again_and_enabled_when_it_is_ready_again(
    policy: Policy, history: list[tuple[str, float]]
) -> None:
    is_deaf = is_first = True
    for event, _, life, acts in play(policy, history):
        for act in acts:
            if act is Act.DISABLE:
                is_deaf = True
            if act is Act.SPAWN:
                assert is_deaf
            if act is Act.HEARD:
                assert event == "ready"
                is_deaf = False
            if act is Act.ENABLE:
                assert not is_deaf
                assert not is_first
        if Act.HEARD in acts:
            assert (Act.ENABLE in acts) != is_first
            is_first = False
        if event == "ended" and not life.is_leaving:
            assert Act.DISABLE in acts


@given(policies, histories)
def test_what_is_alive_has_a_pid_and_what_is_about_to_happen_a_deadline(
    policy: Policy, history: list[tuple[str, float]]
) -> None:
    for _, now, life, acts in play(policy, history):
        assert bool(life.pid) == (
            life.state in (State.STARTING, State.RUNNING, State.STOPPING) and Act.FORGET not in acts
        )
        if life.state in (State.STARTING, State.BACKOFF) and Act.FORGET not in acts:
            assert life.deadline is not None
            assert life.deadline > now
        if life.state in (State.RUNNING, State.FATAL):
            assert life.deadline is None


@given(policies, histories)
def test_whoever_ends_before_its_successor_is_ready_is_deaf_until_that_one_is(
    policy: Policy, history: list[tuple[str, float]]
) -> None:
    for _, now, before, _ in play(policy, history):
        orphan, acts = lifecycle.orphaned(before)
        assert (Act.DISABLE in acts) == (before.state in (State.STARTING, State.RUNNING))
        after, acts = lifecycle.succeeded(orphan, policy, 7)
        assert (after.state, after.pid, acts) == (State.RUNNING, 7, (Act.HEARD, Act.ENABLE))
        if Act.FORGET not in lifecycle.ended(before, "killed", now)[1]:
            assert Act.DISABLE in lifecycle.ended(orphan, "killed", now)[1]


@given(st.integers(0, 10_000))
def test_delays_grow_and_are_bounded(attempts: int) -> None:
    assert lifecycle.delay_s(0) == 0
    assert lifecycle.delay_s(attempts) <= lifecycle.delay_s(attempts + 1) <= LAST_DELAY_S


def test_the_first_restart_is_at_once_and_those_before_the_limit_are_all_made() -> None:
    policy = Policy(limit=10)
    life = lifecycle.adopt(policy, 1)
    now, spawned = 0.0, 0
    life, acts = lifecycle.ended(life, "killed", now)
    assert acts == (Act.DISABLE, Act.SPAWN)
    while life.state is not State.FATAL:
        spawned += Act.SPAWN in acts
        if life.state is State.BACKOFF:
            assert life.deadline is not None
            now = life.deadline
            life, acts = lifecycle.passed(life, now)
        else:
            life, acts = lifecycle.ended(lifecycle.spawned(life, 2), "exited with 1", now)
    assert spawned == 10
    assert life.reason == "restarted 10 times in 600 s, the last time: exited with 1"
    assert now < 30


def test_one_that_hangs_is_told_to_say_where_and_then_killed() -> None:
    life, acts = lifecycle.hung(lifecycle.adopt(Policy(), 1), "hung", 0, can_tell=True)
    assert acts == (Act.DISABLE, Act.ABORT)
    assert life.deadline == lifecycle.ABORT_WITHIN_S
    life, acts = lifecycle.passed(life, lifecycle.ABORT_WITHIN_S)
    assert acts == (Act.KILL,)
    life, acts = lifecycle.ended(life, "killed by SIGKILL", 1)
    assert acts == (Act.DISABLE, Act.SPAWN)
    assert life.reason == "hung"


def test_states_are_those_that_others_know() -> None:
    assert {state.value for state in State} == {state.value for state in ProcessState}
