"""The restart policy: when a task is replaced, after which delay, and when no more."""

from __future__ import annotations

import pytest

from proto import objects_pb2 as pb
from proto.objects_pb2 import NodeStatus, Task
from swarm.orchestrate.restart import backoff_s
from tests.simulated import Simulation, node, service

ANY, ON_FAILURE, NONE = pb.RESTART_ANY, pb.RESTART_ON_FAILURE, pb.RESTART_NONE


def started(
    condition: pb.RestartCondition.ValueType = ANY, *, max_attempts: int = 0, window_s: float = 0, delay_s: float = 5.0
) -> Simulation:
    web = service("web", 1)
    web.spec.task.restart.condition = condition
    web.spec.task.restart.max_attempts = max_attempts
    web.spec.task.restart.window_s = window_s
    web.spec.task.restart.delay_s = delay_s
    sim = Simulation(node("n0"), node("n1"), web)
    sim.run()
    return sim


def end(sim: Simulation, state: pb.TaskState.ValueType = pb.TASK_FAILED) -> Task:
    task = sim.running("web")[0]
    sim.report(task, state, exit_code=3)
    sim.settle()
    return sim.task(task.id)


@pytest.mark.parametrize(
    ("condition", "state", "replaced"),
    [
        (ANY, pb.TASK_FAILED, True),
        (ANY, pb.TASK_COMPLETE, True),
        (ANY, pb.TASK_REJECTED, True),
        (ON_FAILURE, pb.TASK_FAILED, True),
        (ON_FAILURE, pb.TASK_COMPLETE, False),
        (NONE, pb.TASK_FAILED, False),
        (NONE, pb.TASK_COMPLETE, False),
    ],
)
def test_conditions(condition: pb.RestartCondition.ValueType, state: pb.TaskState.ValueType, replaced: bool) -> None:
    """The reference's RestartOnAny, RestartOnFailure, RestartOnNone."""
    sim = started(condition)
    old = end(sim, state)
    assert old.desired_state == pb.TASK_SHUTDOWN
    sim.run()
    assert bool(sim.running("web")) is replaced
    assert len(sim.tasks("web")) == 1 + replaced


def test_the_replacement_stands_ready_until_the_delay_is_over() -> None:
    """The reference's RestartDelay."""
    sim = started(delay_s=7.0)
    old = end(sim)
    failed_at = sim.now
    new = sim.runnable("web")[0]
    assert new.desired_state == pb.TASK_READY
    assert new.reason == f"replaces {old.id}: failed with exit code 3"
    while sim.step(sim.task(new.id)):
        sim.settle()
    assert sim.task(new.id).status.state == pb.TASK_READY
    sim.advance(6.9)
    assert sim.task(new.id).desired_state == pb.TASK_READY
    sim.advance(0.2)
    assert sim.task(new.id).desired_state == pb.TASK_RUNNING
    assert sim.now - failed_at == pytest.approx(7.1)


def test_without_a_delay_it_runs_at_once() -> None:
    sim = started(delay_s=0)
    end(sim)
    assert sim.runnable("web")[0].desired_state == pb.TASK_RUNNING


def test_what_is_rejected_while_it_waits_is_replaced_when_the_delay_is_over_and_waits_again() -> None:
    sim = started(delay_s=5.0)
    end(sim)
    sim.advance(3.0)
    rejected = sim.runnable("web")[0]
    sim.report(rejected, pb.TASK_REJECTED)
    sim.settle()
    sim.advance(1.9)
    assert [task.id for task in sim.runnable("web")] == [rejected.id], "else a node that refuses sets the pace"
    sim.advance(0.2)
    new = sim.runnable("web")[0]
    assert new.id != rejected.id
    sim.advance(4.8)
    assert sim.task(new.id).desired_state == pb.TASK_READY
    sim.advance(0.2)
    assert sim.task(new.id).desired_state == pb.TASK_RUNNING


def fail_until_given_up(sim: Simulation, most: int = 20) -> int:
    for count in range(most):
        sim.run()
        if not sim.running("web"):
            return count
        end(sim)
    return most


def test_attempts_are_limited_and_the_slot_is_then_given_up() -> None:
    """The reference's RestartMaxAttempts, InitializationRestartHistory: the store alone is counted."""
    sim = started(max_attempts=3)
    assert fail_until_given_up(sim) == 4  # the first task and three restarts
    assert sim.tasks("web")[-1].reason == "failed with exit code 3; restarted 3 times: no attempts left"
    sim.advance(10_000)
    assert sim.overlooked() == []
    sim.scale("web", 2)
    sim.run()
    assert [task.slot for task in sim.running("web")] == [2]


def test_attempts_older_than_the_window_are_forgiven() -> None:
    """The reference's RestartWindow."""
    patient = started(max_attempts=2, window_s=60)
    for _ in range(6):
        end(patient)
        patient.run()
        patient.advance(40)
    assert len(patient.running("web")) == 1
    hasty = started(max_attempts=2, window_s=60)
    assert fail_until_given_up(hasty) == 3


def test_a_new_spec_brings_a_given_up_slot_back() -> None:
    sim = started(NONE)
    end(sim)
    sim.run()
    assert not sim.runnable("web")
    sim.set_image("web", "web:2")
    sim.run()
    assert [task.spec.container.image for task in sim.running("web")] == ["web:2"]


def test_a_new_spec_has_all_its_attempts() -> None:
    sim = started(max_attempts=2)
    for _ in range(2):
        end(sim)
        sim.run()
    sim.set_image("web", "web:2")
    sim.run()
    assert fail_until_given_up(sim) == 3


def test_moves_do_not_count_as_attempts() -> None:
    sim = started(max_attempts=1)
    for node_id in ("n0", "n1") * 3:
        sim.set_node(node_id, NodeStatus.DOWN)
        sim.run()
        sim.set_node(node_id, NodeStatus.READY)
        sim.run()
    assert len(sim.running("web")) == 1


def test_a_stuck_predecessor_holds_the_slot_for_a_bounded_time() -> None:
    sim = started()
    old = sim.running("web")[0]
    sim.set_node(old.node_id, availability=pb.DRAINED)
    sim.settle()
    new = sim.runnable("web")[0]
    sim.advance(69.0)  # 60 s and the default grace period of 10 s
    assert sim.task(new.id).desired_state == pb.TASK_READY
    sim.advance(1.1)
    assert sim.task(new.id).desired_state == pb.TASK_RUNNING


def test_a_predecessor_whose_node_goes_down_is_not_waited_for() -> None:
    sim = started()
    old = sim.running("web")[0]
    sim.set_node(old.node_id, availability=pb.DRAINED)
    sim.settle()
    sim.set_node(old.node_id, NodeStatus.DOWN)
    sim.settle()
    assert sim.runnable("web")[0].desired_state == pb.TASK_RUNNING


def crash(sim: Simulation) -> Task:
    """The running task fails; what replaces it, and the wait for that is over."""
    sim.run()
    end(sim)
    return sim.runnable("web")[0]


def test_a_crash_loop_is_slowed_down_and_says_so() -> None:
    sim = started(delay_s=5.0)
    waits = []
    for _ in range(12):
        crash(sim)
        replacement, failed_at = sim.runnable("web")[0], sim.now
        sim.run()
        waits.append(round(sim.task(replacement.id).running_at or sim.now - failed_at))
    assert waits == [5, 5, 5, 10, 20, 40, 80, 160, 300, 300, 300, 300]
    assert replacement.reason.endswith("failure 12 in a row: waits 300 s")


def test_a_task_that_lived_long_ends_the_loop() -> None:
    sim = started(delay_s=5.0)
    for _ in range(6):
        assert crash(sim).failures_before
    sim.run()
    sim.now += 400.0
    end(sim)
    assert sim.runnable("web")[0].failures_before == 1


def test_limited_attempts_are_not_slowed_down() -> None:
    policy = pb.RestartPolicy(max_attempts=9, delay_s=5.0)
    assert {backoff_s(policy, failures) for failures in range(9)} == {5.0}


def test_a_move_neither_ends_nor_lengthens_the_loop() -> None:
    sim = started()
    for _ in range(4):
        crash(sim)
    sim.run()
    task = sim.running("web")[0]
    sim.set_node(task.node_id, NodeStatus.DOWN)
    sim.settle()
    moved = sim.runnable("web")[0]
    assert (moved.failures_before, moved.desired_state) == (4, pb.TASK_RUNNING)
