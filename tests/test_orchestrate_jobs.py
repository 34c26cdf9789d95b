"""Jobs: as many completions as asked, in each iteration (as in the reference, and its TestReplicatedJob)."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given, settings

from proto import objects_pb2 as pb
from proto.control_pb2 import ServiceUpdateRequest
from proto.objects_pb2 import NodeStatus, Service, Task
from swarm.api.services import updated
from swarm.api.views import counts
from swarm.store import states
from swarm.store.changes import Remove, Update, copy_of
from tests.simulated import Simulation, node, service


def job(total: int | None, at_once: int = 0, **restart: float) -> Service:
    """`total` None = a global job."""
    made = service("job")
    if total is None:
        made.spec.global_job.SetInParent()
    else:
        made.spec.replicated_job.total_completions = total
        made.spec.replicated_job.max_concurrent = at_once
    made.job_status.last_execution = 1000.0
    made.spec.task.restart.CopyFrom(pb.RestartPolicy(**restart))  # type: ignore[arg-type]
    return made


def started(made: Service, nodes: int = 3) -> Simulation:
    sim = Simulation(*(node(f"n{i}") for i in range(nodes)), made)
    sim.settle()
    return sim


def again(sim: Simulation, total: int | None = None) -> None:
    """`service update --force` (or `service scale`), as the control API does it."""
    request = ServiceUpdateRequest(id="job", version=sim.service("job").meta.version)
    request.spec.CopyFrom(sim.service("job").spec)
    request.spec.task.force_update += 1
    if total is not None:
        request.spec.replicated_job.total_completions = total
    changed = updated(sim.store, request, sim.now)
    assert changed is not None
    sim.commit((Update(changed),))


def completions(sim: Simulation) -> Counter[int | str]:
    iteration = sim.service("job").job_status.iteration
    return Counter(
        task.slot or task.node_id
        for task in sim.tasks("job")
        if task.status.state == pb.TASK_COMPLETE and task.job_iteration == iteration
    )


def under_way(sim: Simulation) -> list[Task]:
    return [task for task in sim.runnable("job") if not states.has_stopped(task)]


def test_a_replicated_job_completes_as_often_as_asked_and_then_rests() -> None:
    """The reference's ReplicatedJob."""
    sim = started(job(5, 2))
    assert [task.slot for task in under_way(sim)] == [1, 2]
    assert {task.desired_state for task in under_way(sim)} == {pb.TASK_COMPLETE}
    most = 0
    while len(completions(sim)) < 5:
        sim.settle()
        most = max(most, len(under_way(sim)))
        for task in under_way(sim):
            sim.step(task)
    sim.run()
    assert (most, completions(sim)) == (2, Counter(dict.fromkeys(range(1, 6), 1)))
    shown = counts(sim.store, sim.service("job"))
    assert (shown.running, shown.desired, shown.completed, shown.total) == (0, 0, 5, 5)
    assert len(sim.tasks("job")) == 5


def test_without_a_limit_all_run_at_the_same_time() -> None:
    assert len(under_way(started(job(7)))) == 7


def test_a_failed_execution_is_repeated_after_its_delay_whatever_the_condition_says_but_none() -> None:
    for condition in (pb.RESTART_ANY, pb.RESTART_ON_FAILURE):
        sim = started(job(2, condition=condition, delay_s=3.0))
        failed = under_way(sim)[0]
        sim.report(failed, pb.TASK_FAILED, exit_code=1)
        sim.settle()
        repeated = next(task for task in under_way(sim) if task.slot == failed.slot)
        assert repeated.desired_state == pb.TASK_READY
        sim.advance(3.0)
        assert sim.task(repeated.id).desired_state == pb.TASK_COMPLETE
        sim.run()
        assert completions(sim) == Counter({1: 1, 2: 1})


def test_an_execution_that_is_given_up_makes_room_for_the_others() -> None:
    sim = started(job(3, 1, condition=pb.RESTART_NONE))
    sim.report(under_way(sim)[0], pb.TASK_FAILED, exit_code=1)
    sim.run()
    assert completions(sim) == Counter({2: 1, 3: 1})
    assert sim.tasks("job")[0].reason == "failed with exit code 1; restart condition is none"


def test_attempts_are_limited_in_each_slot() -> None:
    sim = started(job(1, max_attempts=2, delay_s=0.0))
    for _ in range(3):
        sim.report(under_way(sim)[0], pb.TASK_FAILED)
        sim.settle()
    assert under_way(sim) == []
    assert "no attempts left" in sim.tasks("job")[-1].reason


def test_an_update_begins_the_next_iteration_and_former_tasks_go() -> None:
    sim = started(job(3))
    sim.report(under_way(sim)[0], pb.TASK_COMPLETE)
    sim.settle()
    former = {task.id for task in sim.tasks("job")}
    again(sim)
    sim.settle()
    assert {task.job_iteration for task in under_way(sim)} == {1}
    assert {sim.task(task_id).desired_state for task_id in former if sim.store.tasks.get(task_id)} == {pb.TASK_REMOVE}
    sim.run()
    assert completions(sim) == Counter({1: 1, 2: 1, 3: 1})
    assert former.isdisjoint(task.id for task in sim.tasks("job"))


def test_more_completed_than_asked_for_is_no_number_below_zero() -> None:
    """The reference's BUG #42742: an unsigned difference that becomes huge."""
    sim = started(job(5))
    sim.run()
    again(sim, total=2)
    sim.run()
    assert completions(sim) == Counter({1: 1, 2: 1})
    changed = copy_of(sim.service("job"))
    changed.spec.replicated_job.total_completions = 1  # without an iteration: no API does it, but nothing breaks
    sim.commit((Update(changed),))
    sim.run()
    assert (len(sim.tasks("job")), counts(sim.store, sim.service("job")).desired) == (2, 0)


def test_the_history_of_a_failing_job_is_limited_and_what_completed_is_kept() -> None:
    """The reference's BUG #45443: nothing trims the tasks of jobs."""
    sim = started(job(2, delay_s=1.0))
    other = next(task for task in under_way(sim) if task.slot == 2)
    sim.report(other, pb.TASK_COMPLETE)
    for _ in range(12):
        failing = next(task for task in under_way(sim) if task.slot == 1)
        sim.report(failing, pb.TASK_FAILED)
        sim.settle()
        sim.advance(400.0)
        sim.settle()
    assert len([task for task in sim.tasks("job") if task.slot == 1]) <= 6
    assert sim.task(other.id).status.state == pb.TASK_COMPLETE


def test_a_lost_node_repeats_what_was_under_way_and_not_what_had_completed() -> None:
    sim = started(job(6), nodes=2)
    mine = [task for task in under_way(sim) if task.node_id == "n0"]
    sim.report(mine[0], pb.TASK_COMPLETE)
    sim.settle()
    sim.set_node("n0", NodeStatus.DOWN)
    sim.settle()
    repeated = [task for task in under_way(sim) if task.reason.endswith("node n0 is down")]
    assert {task.slot for task in repeated} == {task.slot for task in mine[1:]}
    # The node is back before these run to their end, and had completed one of them meanwhile.
    sim.set_node("n0", NodeStatus.READY)
    sim.report(sim.task(mine[1].id), pb.TASK_COMPLETE)
    sim.settle()
    stopped = next(task for task in repeated if task.slot == mine[1].slot)
    left = sim.store.tasks.get(stopped.id)
    assert left is None or left.desired_state == pb.TASK_SHUTDOWN
    sim.run()
    assert completions(sim) == Counter(dict.fromkeys(range(1, 7), 1))


def test_a_global_job_completes_once_on_each_node_and_on_those_that_come_later() -> None:
    sim = started(job(None))
    sim.set_node("n2", availability=pb.DRAINED)
    sim.run()
    assert completions(sim) == Counter({"n0": 1, "n1": 1, "n2": 0}) + Counter()
    sim.set_node("n2", availability=pb.ACTIVE)
    sim.create(node("n3"))
    sim.run()
    assert completions(sim) == Counter({"n0": 1, "n1": 1, "n2": 1, "n3": 1})
    shown = counts(sim.store, sim.service("job"))
    assert (shown.desired, shown.completed, shown.total) == (0, 4, 4)
    again(sim)
    sim.run()
    assert completions(sim) == Counter({"n0": 1, "n1": 1, "n2": 1, "n3": 1})


def test_a_job_goes_with_its_last_task() -> None:
    sim = started(job(3, 1))
    sim.remove_service("job")
    sim.run()
    assert sim.store.services.get("job") is None
    assert not sim.tasks("job")


events = st.lists(st.tuples(st.sampled_from(("step", "fail", "down", "up", "drain", "again")), st.integers(0, 99)))


@settings(max_examples=60)
@given(st.integers(0, 6), st.integers(0, 3), st.booleans(), events)
def test_whatever_happens_a_job_completes_exactly_as_often_as_asked(
    total: int, at_once: int, is_global: bool, happens: list[tuple[str, int]]
) -> None:
    sim = started(job(None if is_global else total, at_once, delay_s=2.0))
    for what, pick in happens:
        at = f"n{pick % 3}"
        alive = [
            task
            for task in sim.store.tasks
            if task.status.state >= pb.TASK_ASSIGNED
            and not states.has_stopped(task)
            and sim.node(task.node_id).status.state == NodeStatus.READY
        ]
        if what in ("step", "fail") and alive:
            task = alive[pick % len(alive)]
            if what == "step":
                sim.step(task)
            else:
                sim.report(task, pb.TASK_FAILED)
        elif what == "again":
            again(sim)
        elif what in ("down", "up"):
            sim.set_node(at, NodeStatus.DOWN if what == "down" else NodeStatus.READY)
        elif what == "drain":
            sim.set_node(at, availability=pb.DRAINED if pick % 2 else pb.ACTIVE)
        sim.settle()
        assert sim.overlooked() == []
        if not is_global and at_once:
            iteration = sim.service("job").job_status.iteration
            assert sum(task.job_iteration == iteration for task in under_way(sim)) <= at_once
    for name in ("n0", "n1", "n2"):
        sim.set_node(name, NodeStatus.READY, pb.ACTIVE)
    sim.run()
    wanted = {"n0", "n1", "n2"} if is_global else set(range(1, total + 1))
    assert set(completions(sim)) == wanted
    assert not under_way(sim)


def test_a_removed_nodes_execution_is_repeated_elsewhere() -> None:
    sim = started(job(4), nodes=2)
    sim.commit((Remove(sim.node("n1")),))
    sim.run()
    assert completions(sim) == Counter({1: 1, 2: 1, 3: 1, 4: 1})
