"""The step table: what comes next for each fact, and two properties of every run: observed states only grow, and
every task comes to rest where it is wanted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.interface import ContainerStatus, Phase
from node.steps import (
    TEMPORARY_ATTEMPTS_MAX,
    Action,
    Facts,
    State,
    Step,
    after_exit,
    after_fault,
    after_loss,
    ended,
    next_step,
    retry_delay_s,
)
from proto.objects_pb2 import (
    TASK_ACCEPTED,
    TASK_ASSIGNED,
    TASK_COMPLETE,
    TASK_FAILED,
    TASK_ORPHANED,
    TASK_PREPARING,
    TASK_READY,
    TASK_REJECTED,
    TASK_REMOVE,
    TASK_RUNNING,
    TASK_SHUTDOWN,
    TASK_STARTING,
)

OBSERVED = [
    TASK_ASSIGNED, TASK_ACCEPTED, TASK_PREPARING, TASK_READY, TASK_STARTING, TASK_RUNNING,
    TASK_COMPLETE, TASK_SHUTDOWN, TASK_FAILED, TASK_REJECTED, TASK_ORPHANED,
]  # fmt: skip
DESIRED = [TASK_READY, TASK_RUNNING, TASK_SHUTDOWN, TASK_REMOVE]
NONE, CREATED, RUNNING, EXITED = None, Phase.CREATED, Phase.RUNNING, Phase.EXITED


@pytest.mark.parametrize(
    ("observed", "desired", "phase", "attached", "expected"),
    [
        (TASK_ASSIGNED, TASK_RUNNING, NONE, False, Step(Action.ACCEPT, TASK_ACCEPTED)),
        (TASK_ACCEPTED, TASK_RUNNING, NONE, False, Step(Action.PREPARE, TASK_PREPARING)),
        (TASK_ACCEPTED, TASK_READY, NONE, False, Step(Action.PREPARE, TASK_PREPARING)),
        (TASK_PREPARING, TASK_READY, CREATED, True, Step(Action.PREPARE)),
        (TASK_READY, TASK_READY, CREATED, True, Step(Action.PARK)),
        (TASK_READY, TASK_READY, NONE, False, Step(Action.PREPARE)),  # the host was rebooted
        (TASK_READY, TASK_RUNNING, EXITED, True, Step(Action.PREPARE)),  # its monitor died before the start
        (TASK_READY, TASK_RUNNING, CREATED, True, Step(Action.START, TASK_STARTING)),
        (TASK_STARTING, TASK_RUNNING, RUNNING, True, Step(Action.START)),
        (TASK_STARTING, TASK_RUNNING, EXITED, True, Step(Action.WATCH)),  # never run it twice
        (TASK_STARTING, TASK_RUNNING, NONE, True, Step(Action.LOSE)),
        (TASK_RUNNING, TASK_RUNNING, RUNNING, True, Step(Action.WATCH)),
        (TASK_RUNNING, TASK_RUNNING, EXITED, True, Step(Action.WATCH)),
        (TASK_RUNNING, TASK_RUNNING, NONE, True, Step(Action.LOSE)),
        (TASK_RUNNING, TASK_SHUTDOWN, RUNNING, True, Step(Action.STOP)),
        (TASK_PREPARING, TASK_REMOVE, NONE, False, Step(Action.STOP)),
        (TASK_FAILED, TASK_RUNNING, EXITED, True, Step(Action.RELEASE)),
        (TASK_FAILED, TASK_RUNNING, EXITED, False, Step(Action.PARK)),
        (TASK_ORPHANED, TASK_SHUTDOWN, RUNNING, True, Step(Action.STOP)),
    ],
)
def test_next_step(observed: State, desired: State, phase: Phase | None, attached: bool, expected: Step) -> None:
    assert next_step(Facts(observed, desired, True, phase, attached)) == expected


@pytest.mark.parametrize("observed", OBSERVED)
def test_a_task_that_is_not_assigned_is_removed_whatever_its_state(observed: State) -> None:
    assert next_step(Facts(observed, TASK_RUNNING, False, RUNNING, True)) == Step(Action.REMOVE)


@pytest.mark.parametrize(
    ("status", "state", "err"),
    [
        (ContainerStatus("t", EXITED, exit_code=0), TASK_COMPLETE, ""),
        (ContainerStatus("t", EXITED, exit_code=3), TASK_FAILED, "task: non-zero exit (3)"),
        (ContainerStatus("t", EXITED), TASK_FAILED, "task: non-zero exit (unknown)"),
        (ContainerStatus("t", EXITED, exit_code=0, error="monitor gone"), TASK_FAILED, "task: monitor gone"),
    ],
)
def test_what_an_exit_means(status: ContainerStatus, state: State, err: str) -> None:
    outcome = after_exit(status)
    assert (outcome.state, outcome.err) == (state, err)


@pytest.mark.parametrize(
    ("observed", "state"),
    [(TASK_PREPARING, TASK_REJECTED), (TASK_READY, TASK_REJECTED), (TASK_STARTING, TASK_FAILED)],
)
def test_a_permanent_fault_rejects_before_the_start_and_fails_after(observed: State, state: State) -> None:
    outcome = after_fault(observed, Action.PREPARE, "why", permanent=True, attempts=1)
    assert outcome is not None
    assert (outcome.state, outcome.err) == (state, "why")


def test_temporary_faults_have_a_limit_except_for_cleaning() -> None:
    last = TEMPORARY_ATTEMPTS_MAX
    assert after_fault(TASK_STARTING, Action.START, "busy", permanent=False, attempts=last - 1) is None
    assert after_fault(TASK_STARTING, Action.START, "busy", permanent=False, attempts=last) is not None
    for action in (Action.STOP, Action.RELEASE, Action.REMOVE):
        assert after_fault(TASK_RUNNING, action, "busy", permanent=True, attempts=1000) is None


@given(st.integers(1, 10_000))
def test_retries_are_bounded_both_ways(attempts: int) -> None:
    assert 1.0 <= retry_delay_s(attempts) <= 10.0


@given(
    observed=st.sampled_from(OBSERVED),
    phase=st.sampled_from([NONE, CREATED, RUNNING, EXITED]),
    attached=st.booleans(),
    desires=st.lists(st.sampled_from(DESIRED), min_size=1, max_size=4).map(sorted),
    leaves=st.booleans(),
    luck=st.lists(st.sampled_from(["ok", "fault", "exit", "vanish"]), max_size=12),
)
def test_states_only_grow_and_every_task_comes_to_rest(
    *, observed: State, phase: Phase | None, attached: bool, desires: list[State], leaves: bool, luck: list[str]
) -> None:
    """Any facts at all (a restart after any crash), desired states that rise at any moment, anything that a container
    or an action may do: then the world turns kind and the task must come to rest within a few steps."""
    facts = Facts(observed, desires[0], True, phase, attached)
    for fortune in luck:
        before = facts
        facts = _act(facts, fortune)
        assert facts.observed >= before.observed
        if len(desires) > 1 and fortune == "ok":
            desires.pop(0)
            facts = replace(facts, desired=desires[0])
    facts = replace(facts, desired=desires[-1], assigned=not leaves)
    for _ in range(10):
        step = next_step(facts)
        reclaimed = step.action is Action.REMOVE and facts.phase is None and not facts.attached
        if step.action in (Action.PARK, Action.WATCH) or reclaimed:
            break
        facts = _act(facts, "ok")
    _assert_at_rest(facts, next_step(facts))


def _assert_at_rest(facts: Facts, step: Step) -> None:
    if not facts.assigned:
        assert (step.action, facts.phase, facts.attached) == (Action.REMOVE, None, False)
    elif step.action is Action.WATCH:
        assert facts.desired <= TASK_RUNNING
    elif ended(facts.observed):
        assert step.action is Action.PARK
        assert facts.phase not in (CREATED, RUNNING)
        assert not facts.attached
    else:
        assert (facts.observed, facts.desired, step.action) == (TASK_READY, TASK_READY, Action.PARK)


def _act(facts: Facts, fortune: str) -> Facts:
    """What the runner does with a step, in a world in which `fortune` happens."""
    step = next_step(facts)
    if step.enter is not None:
        assert step.enter > facts.observed
        facts = replace(facts, observed=step.enter)
    if fortune == "vanish":
        return replace(facts, phase=None)
    if fortune == "exit" and facts.phase is RUNNING:
        facts = replace(facts, phase=EXITED)
    if fortune == "fault" and step.action in (Action.PREPARE, Action.START):
        outcome = after_fault(facts.observed, step.action, "why", permanent=True, attempts=1)
        assert outcome is not None
        return replace(facts, observed=outcome.state)
    if fortune == "fault":
        return facts
    match step.action:
        case Action.PREPARE:
            state = max(facts.observed, TASK_READY)
            kept = facts.phase if facts.phase in (CREATED, RUNNING) else CREATED
            return replace(facts, observed=state, phase=kept, attached=True)
        case Action.START:
            if facts.phase is None:
                return replace(facts, observed=TASK_FAILED)
            return replace(facts, observed=TASK_RUNNING, phase=RUNNING if facts.phase is CREATED else facts.phase)
        case Action.WATCH if facts.phase is EXITED:
            return replace(facts, observed=after_exit(ContainerStatus("t", EXITED, exit_code=1)).state, attached=False)
        case Action.LOSE:
            return replace(facts, observed=after_loss(facts.observed).state)
        case Action.STOP:
            state = facts.observed if ended(facts.observed) else TASK_SHUTDOWN
            left = EXITED if facts.phase in (RUNNING, EXITED) else None
            return replace(facts, observed=state, phase=left, attached=False)
        case Action.RELEASE:
            return replace(facts, attached=False)
        case Action.REMOVE:
            return replace(facts, phase=None, attached=False)
    return facts
