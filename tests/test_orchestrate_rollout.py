"""Rolling updates: what is replaced, how many at a time, in which order, and what failures do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proto import objects_pb2 as pb
from proto.objects_pb2 import ServiceSpec, Task, UpdateConfig, UpdateStatus
from swarm.store import states
from swarm.store.changes import Update, copy_of
from tests.simulated import Simulation, node, service


def started(replicas: int | None = 4, **config: object) -> Simulation:
    web = service("web", replicas)
    web.spec.update.CopyFrom(UpdateConfig(**config))  # type: ignore[arg-type]
    sim = Simulation(node("n0"), node("n1"), web)
    sim.run()
    return sim


def images(sim: Simulation) -> list[str]:
    return [task.spec.container.image for task in sim.running("web")]


def state(sim: Simulation) -> str:
    return UpdateStatus.State.Name(sim.service("web").update_status.state)


def work(sim: Simulation, seconds: float, fate: Callable[[Task], bool] = lambda task: False) -> list[int]:
    """Agents and stages work for a while; tasks that meet their fate fail. Returns how many ran at each moment."""
    running, end = [], sim.now + seconds
    while sim.now < end:
        sim.settle()
        for task in sim.store.tasks:
            if fate(task) and task.node_id and not states.has_stopped(task):
                sim.report(task, pb.TASK_FAILED)
            else:
                sim.step(task)
        running.append(sum(task.status.state == pb.TASK_RUNNING for task in sim.store.tasks))
        sim.now += 0.1
    sim.settle()
    return running


def is_new(task: Task) -> bool:
    return task.spec.container.image == "web:2" and task.status.state >= pb.TASK_STARTING


@pytest.mark.parametrize(("parallelism", "fewest"), [(1, 3), (2, 2), (0, 0)])
def test_stop_first_takes_down_so_many_at_a_time(parallelism: int, fewest: int) -> None:
    """The reference's Updater."""
    sim = started(4, parallelism=parallelism)
    sim.set_image("web", "web:2")
    running = work(sim, 20)
    assert (min(running), max(running)) == (fewest, 4)
    assert images(sim) == ["web:2"] * 4
    assert state(sim) == "COMPLETED"


@pytest.mark.parametrize("replicas", [4, None])
def test_start_first_never_has_fewer_running(replicas: int | None) -> None:
    sim = started(replicas, order=pb.START_FIRST)
    before = len(sim.running("web"))
    sim.set_image("web", "web:2")
    running = work(sim, 20)
    assert (min(running), max(running)) == (before, before + 1)
    assert images(sim) == ["web:2"] * before


def test_a_start_first_task_runs_before_its_predecessor_is_told_to_stop() -> None:
    """The reference's UpdaterOrder."""
    sim = started(1, order=pb.START_FIRST)
    old = sim.running("web")[0]
    sim.set_image("web", "web:2")
    sim.settle()
    new = next(task for task in sim.runnable("web") if task.id != old.id)
    while sim.task(new.id).status.state < pb.TASK_RUNNING:
        assert sim.task(old.id).desired_state == pb.TASK_RUNNING
        assert sim.step(sim.task(new.id))
        sim.settle()
    assert sim.task(old.id).desired_state == pb.TASK_SHUTDOWN


def test_start_first_gives_way_where_two_tasks_of_a_slot_cannot_stand_side_by_side() -> None:
    web = service("web", 2)
    web.spec.update.order = pb.START_FIRST
    web.spec.endpoint.ports.add(target_port=80, published_port=80, mode=pb.HOST)
    sim = Simulation(node("n0"), node("n1"), web)
    sim.run()
    sim.set_image("web", "web:2")
    work(sim, 20)
    assert images(sim) == ["web:2"] * 2


def test_the_delay_lies_between_slots() -> None:
    sim = started(3, delay_s=30.0)
    sim.set_image("web", "web:2")
    began = sim.now
    work(sim, 29)
    assert images(sim).count("web:2") == 1
    work(sim, 31)
    assert images(sim).count("web:2") == 2
    sim.run()
    assert images(sim) == ["web:2"] * 3
    assert sim.now - began > 60


def test_completion_waits_for_the_monitored_time() -> None:
    sim = started(1, monitor_s=20.0)
    sim.set_image("web", "web:2")
    work(sim, 19)
    assert state(sim) == "UPDATING"
    work(sim, 3)
    assert state(sim) == "COMPLETED"
    assert sim.service("web").update_status.message == "update completed"


# ---- what makes a task outdated


def force(spec: ServiceSpec) -> None:
    spec.task.force_update += 1


def publish(mode: pb.PublishMode.ValueType) -> Callable[[ServiceSpec], None]:
    def change(spec: ServiceSpec) -> None:
        spec.endpoint.ports.add(target_port=80, published_port=8080, mode=mode)

    return change


def constrain(text: str) -> Callable[[ServiceSpec], None]:
    def change(spec: ServiceSpec) -> None:
        spec.task.placement.constraints.append(text)

    return change


def relabel(spec: ServiceSpec) -> None:
    spec.annotations.labels["tier"] = "front"


def credentials(spec: ServiceSpec) -> None:
    spec.task.container.registry_auth = "fresh"


def slow_down(spec: ServiceSpec) -> None:
    spec.update.delay_s = 9


@pytest.mark.parametrize(
    ("change", "replaced"),
    [
        (force, 2),
        (publish(pb.HOST), 2),
        (publish(pb.INGRESS), 0),
        (constrain("node.role==worker"), 0),  # both nodes fit
        (constrain("node.hostname==n0"), 1),  # one task is on n1
        (relabel, 0),
        (credentials, 0),
        (slow_down, 0),
    ],
)
def test_only_what_a_container_shows_replaces_it(change: Callable[[ServiceSpec], None], replaced: int) -> None:
    """The reference's UpdaterPlacement, OutdatedTaskPlacementConstraints."""
    sim = started(2)
    before = {task.id for task in sim.running("web")}
    sim.update_spec("web", change)
    work(sim, 30)
    assert len(before - {task.id for task in sim.runnable("web")}) == replaced
    assert state(sim) == ("COMPLETED" if replaced else "NONE")


def test_scaling_is_no_update() -> None:
    sim = started(2)
    sim.scale("web", 5)
    sim.run()
    assert len(sim.running("web")) == 5
    assert state(sim) == "NONE"


# ---- failures


def test_a_failure_pauses_and_a_new_spec_resumes() -> None:
    """The reference's UpdaterFailureAction."""
    sim = started(4)
    sim.set_image("web", "web:2")
    work(sim, 30, fate=is_new)
    assert state(sim) == "PAUSED"
    assert "update paused due to failure or early termination of task" in sim.service("web").update_status.message
    assert images(sim) == ["web:1"] * 3
    sim.set_image("web", "web:3")
    work(sim, 40)
    assert images(sim) == ["web:3"] * 4
    assert state(sim) == "COMPLETED"


def test_a_failure_rolls_back() -> None:
    """The reference's UpdaterRollback."""
    sim = started(4, failure_action=pb.ROLLBACK)
    version = sim.service("web").spec_version
    sim.set_image("web", "web:2")
    work(sim, 60, fate=is_new)
    assert state(sim) == "ROLLBACK_COMPLETED"
    assert images(sim) == ["web:1"] * 4
    assert sim.service("web").spec.task.container.image == "web:1"
    assert sim.service("web").spec_version == version
    assert not sim.service("web").HasField("previous_spec")


def test_a_start_first_rollback_keeps_the_old_tasks_and_loses_none() -> None:
    sim = started(4, failure_action=pb.ROLLBACK, order=pb.START_FIRST)
    before = {task.id for task in sim.running("web")}
    sim.set_image("web", "web:2")
    assert min(work(sim, 60, fate=is_new)) == 4
    assert {task.id for task in sim.running("web")} == before
    assert state(sim) == "ROLLBACK_COMPLETED"


def test_failures_of_the_old_spec_in_its_first_life_do_not_count_against_a_rollback() -> None:
    sim = started(1, failure_action=pb.ROLLBACK)
    sim.report(sim.running("web")[0], pb.TASK_FAILED)
    sim.run()
    sim.set_image("web", "web:2")
    work(sim, 60, fate=is_new)
    assert state(sim) == "ROLLBACK_COMPLETED"


def test_a_failing_rollback_pauses() -> None:
    sim = started(2, failure_action=pb.ROLLBACK)
    sim.set_image("web", "web:2")
    broken_since = sim.now
    work(sim, 60, fate=lambda task: task.meta.created_at > broken_since and task.status.state >= pb.TASK_STARTING)
    assert state(sim) == "ROLLBACK_PAUSED"


def test_continue_goes_on_regardless() -> None:
    sim = started(3, failure_action=pb.CONTINUE)
    sim.set_image("web", "web:2")
    work(sim, 20, fate=is_new)
    assert {task.spec.container.image for task in sim.runnable("web")} == {"web:2"}


def test_the_ratio_tolerates_some_failures() -> None:
    sim = started(4, max_failure_ratio=0.25)
    sim.set_image("web", "web:2")
    sim.settle()
    doomed: set[str] = set()

    def first_one(task: Task) -> bool:
        if is_new(task) and not doomed:
            doomed.add(task.id)
        return task.id in doomed

    work(sim, 40, fate=first_one)
    assert doomed
    assert state(sim) == "COMPLETED"
    assert images(sim) == ["web:2"] * 4


def test_a_late_failure_is_not_the_updates() -> None:
    sim = started(2, delay_s=20.0, monitor_s=5.0)
    sim.set_image("web", "web:2")
    work(sim, 10)
    first = next(task for task in sim.running("web") if task.spec.container.image == "web:2")
    assert first.running_at
    sim.report(first, pb.TASK_FAILED)
    work(sim, 40)
    assert state(sim) == "COMPLETED"


def test_a_new_spec_supersedes_a_running_update() -> None:
    sim = started(6, order=pb.START_FIRST)
    sim.set_image("web", "web:2")
    work(sim, 1)
    assert 0 < images(sim).count("web:2") < 6
    sim.set_image("web", "web:3")
    work(sim, 40)
    assert images(sim) == ["web:3"] * 6
    assert sim.service("web").update_status.spec_version == sim.service("web").spec_version


def test_a_superseded_start_first_update_leaves_no_second_task_behind_though_the_next_one_is_paused() -> None:
    sim = started(3, order=pb.START_FIRST, parallelism=0)
    sim.set_image("web", "web:2")
    sim.settle()
    for task in sim.runnable("web"):
        while task.spec.container.image == "web:2" and sim.task(task.id).status.state < pb.TASK_RUNNING:
            sim.step(sim.task(task.id))
    assert len(sim.running("web")) == 6  # each slot's second one runs, its first one does not know yet

    def next_one(spec: pb.ServiceSpec) -> None:
        spec.task.container.image = "web:3"
        spec.update.parallelism = 1

    sim.update_spec("web", next_one)
    work(sim, 40, fate=lambda task: task.spec.container.image == "web:3")
    assert state(sim) == "PAUSED"
    assert [task.slot for task in sim.running("web")] == [1, 2, 3]


@pytest.mark.parametrize("named", [True, False])  # whether the API said which spec version it rolls back to
def test_a_rollback_that_the_user_asked_for_uses_the_rollback_config(named: bool) -> None:
    sim = started(4)
    sim.set_image("web", "web:2")
    sim.run()
    swapped = copy_of(sim.service("web"))
    swapped.spec.CopyFrom(sim.service("web").previous_spec)
    swapped.previous_spec.CopyFrom(sim.service("web").spec)
    swapped.spec_version = sim.service("web").previous_spec_version
    swapped.update_status.Clear()
    swapped.update_status.state = UpdateStatus.ROLLBACK_STARTED
    swapped.update_status.started_at = sim.now
    swapped.update_status.spec_version = swapped.spec_version if named else 0
    swapped.update_status.message = "manually requested rollback"
    swapped.spec.rollback.parallelism = 0
    swapped.spec.rollback.max_failure_ratio = 0.25
    sim.commit((Update(swapped),))
    sim.settle()
    doomed = next(task.id for task in sim.runnable("web") if task.spec.container.image == "web:1")
    assert min(work(sim, 30, fate=lambda task: task.id == doomed)) == 0  # all at once, and one failure is tolerated
    assert images(sim) == ["web:1"] * 4
    assert state(sim) == "ROLLBACK_COMPLETED"


def test_a_global_service_on_a_paused_node_is_updated_when_the_node_is_back() -> None:
    sim = started(None)
    sim.set_node("n1", availability=pb.PAUSED)
    sim.set_image("web", "web:2")
    sim.run()
    assert sorted(images(sim)) == ["web:1", "web:2"]
    assert state(sim) == "COMPLETED"
    sim.set_node("n1", availability=pb.ACTIVE)
    sim.run()
    assert images(sim) == ["web:2"] * 2


def hopeless(sim: Simulation) -> None:
    """A new spec that no node can take."""

    def change(spec: ServiceSpec) -> None:
        spec.task.resources.reservations.nano_cpus = 100 * 10**9

    sim.update_spec("web", change)


def test_an_update_that_gets_nowhere_fails_at_its_deadline() -> None:
    """The reference's UpdaterTaskTimeout."""
    sim = started(4, progress_deadline_s=30.0)
    hopeless(sim)
    sim.run()
    assert state(sim) == "PAUSED"
    message = sim.service("web").update_status.message
    assert message.startswith("update paused because no task got ready within 30 s; task t")
    assert "no suitable node" in message
    assert len(sim.running("web")) == 3  # stop-first: one was taken down for its replacement


def test_at_the_deadline_a_rollback_brings_everything_back() -> None:
    sim = started(4, progress_deadline_s=30.0, failure_action=pb.ROLLBACK, order=pb.START_FIRST)
    hopeless(sim)
    sim.run()
    assert state(sim) == "ROLLBACK_COMPLETED"
    assert len(sim.running("web")) == 4


@pytest.mark.parametrize(("deadline_s", "ends"), [(0.0, "PAUSED"), (-1.0, "UPDATING")])
def test_the_deadline_is_ten_minutes_unless_switched_off(deadline_s: float, ends: str) -> None:
    sim = started(2, progress_deadline_s=deadline_s)
    began_at = sim.now
    hopeless(sim)
    sim.run()
    assert state(sim) == ends
    assert sim.now - began_at >= (599 if ends == "PAUSED" else 0)  # sums of floats


def test_slots_that_get_ahead_move_the_deadline() -> None:
    sim = started(4, progress_deadline_s=8.0, delay_s=6.0)
    sim.set_image("web", "web:2")
    sim.run()
    assert state(sim) == "COMPLETED"
