"""Replicated and global services, scaling, node loss, removal and history."""

from __future__ import annotations

from collections import Counter

import pytest

from proto import objects_pb2 as pb
from proto.objects_pb2 import NodeStatus
from swarm.store.changes import Remove, copy_of
from tests.simulated import Simulation, network, node, service


def cluster(nodes: int = 3, *records: pb.Service | pb.Network) -> Simulation:
    sim = Simulation(*(node(f"n{i}", labels={"zone": f"z{i}"}) for i in range(nodes)), *records)
    sim.run()
    return sim


def slots(sim: Simulation, name: str = "web") -> list[int]:
    return [task.slot for task in sim.runnable(name)]


def test_slots_are_the_lowest_free_numbers() -> None:
    sim = cluster(1, service("web", 4))
    assert slots(sim) == [1, 2, 3, 4]
    assert sim.runnable("web")[1].reason == "slot 2 of 4"


@pytest.mark.parametrize(
    ("running", "to", "left"),
    [
        ({1: "n0", 2: "n0", 3: "n1"}, 2, {1, 3}),  # the fullest node, there the highest slot
        ({1: "n0", 2: "n1", 3: "n1", 4: "n1"}, 2, {1, 2}),
    ],
)
def test_scaling_down_takes_from_the_fullest_node(running: dict[int, str], to: int, left: set[int]) -> None:
    """The reference's ScaleDown."""
    sim = Simulation(node("n0"), node("n1"))
    web = service("web", len(running))
    sim.create(web)
    for slot, node_id in running.items():
        task = pb.Task(id=f"x{slot}", service_id="web", slot=slot, node_id=node_id, spec_version=1, reason="given")
        task.desired_state = task.status.state = pb.TASK_RUNNING
        task.spec.CopyFrom(web.spec.task)
        sim.create(task)
    sim.scale("web", to)
    sim.settle()
    assert set(slots(sim)) == left
    gone = {task.slot: task.reason for task in sim.tasks("web") if task.desired_state == pb.TASK_REMOVE}
    assert gone == dict.fromkeys(set(running) - left, f"scaled down to {to}")
    sim.run()
    assert {task.slot for task in sim.tasks("web")} == left  # removed once stopped


def test_scaling_down_takes_what_has_no_node_first_and_then_what_does_not_run() -> None:
    """The reference's TaskStateRemoveOnScaledown."""
    web = service("web", 3)
    web.spec.task.resources.reservations.nano_cpus = 2 * 10**9
    sim = Simulation(node("n0", cpus=4), web)
    sim.settle()
    first, second, third = sim.runnable("web")
    assert third.node_id == ""
    sim.report(second, pb.TASK_RUNNING)
    sim.scale("web", 2)
    sim.settle()
    assert slots(sim) == [1, 2]
    sim.scale("web", 1)
    sim.settle()
    assert slots(sim) == [2]  # slot 1 does not run yet
    assert first.node_id == second.node_id


def test_tasks_of_a_down_node_are_replaced_at_once() -> None:
    sim = cluster(3, service("web", 3))
    lost = next(task for task in sim.running("web") if task.node_id == "n1")
    sim.set_node("n1", NodeStatus.DOWN)
    sim.settle()
    new = next(task for task in sim.runnable("web") if task.slot == lost.slot)
    assert new.node_id in ("n0", "n2")
    assert new.desired_state == pb.TASK_RUNNING  # waits for nothing
    assert new.reason == f"replaces {lost.id}: node n1 is down"
    assert sim.task(lost.id).desired_state == pb.TASK_SHUTDOWN
    assert sim.task(lost.id).reason == "node n1 is down"
    sim.set_node("n1", NodeStatus.READY)
    sim.run()
    assert sim.task(lost.id).status.state == pb.TASK_SHUTDOWN
    assert len(sim.running("web")) == 3


@pytest.mark.parametrize("state", [NodeStatus.UNKNOWN, NodeStatus.DISCONNECTED])
def test_nodes_not_heard_of_yet_lose_nothing(state: NodeStatus.State.ValueType) -> None:
    sim = cluster(2, service("web", 4), service("agent", None))
    before = sorted(task.id for task in sim.store.tasks)
    for node_id in ("n0", "n1"):
        sim.set_node(node_id, state)
    sim.settle()
    assert sim.overlooked() == []
    assert sorted(task.id for task in sim.store.tasks) == before


def test_a_removed_nodes_tasks_count_as_dead() -> None:
    sim = cluster(2, service("web", 2), service("agent", None))
    sim.commit((Remove(sim.node("n1")),))
    sim.run()
    assert {task.node_id for task in sim.running("web")} == {"n0"}
    assert [task.node_id for task in sim.tasks("agent")] == ["n0"]


def test_a_drain_moves_tasks_without_delay_but_one_after_the_other() -> None:
    """The reference's Drain."""
    sim = cluster(2, service("web", 2))
    old = next(task for task in sim.running("web") if task.node_id == "n1")
    sim.set_node("n1", availability=pb.DRAINED)
    sim.settle()
    new = next(task for task in sim.runnable("web") if task.slot == old.slot)
    assert new.desired_state == pb.TASK_READY
    now = sim.now
    sim.report(sim.task(old.id), pb.TASK_SHUTDOWN)
    sim.settle()
    assert sim.task(new.id).desired_state == pb.TASK_RUNNING
    assert sim.now == now


def test_a_task_that_was_assigned_just_as_its_node_was_drained_moves_on() -> None:
    """The reference's trap: it checks the node's version only for some of its assignments."""
    sim = Simulation(node("n0"), service("web"))
    sim.settle()
    (assigned,) = sim.runnable("web")
    assert (assigned.node_id, assigned.status.state) == ("n0", pb.TASK_ASSIGNED)
    sim.set_node("n0", availability=pb.DRAINED)
    sim.create(node("n1"))
    sim.run()
    assert [task.node_id for task in sim.running("web")] == ["n1"]


def test_a_node_that_returns_is_told_to_stop_what_was_replaced_meanwhile() -> None:
    """The reference's trap: tasks of a node that is down run twice until it returns, and never longer."""
    sim = cluster(2, service("web", 2))
    (stale,) = (task for task in sim.running("web") if task.node_id == "n1")
    sim.set_node("n1", state=NodeStatus.DOWN)
    sim.run()
    assert Counter(task.node_id for task in sim.running("web")) == {"n0": 2}
    assert (sim.task(stale.id).status.state, sim.task(stale.id).desired_state) == (pb.TASK_RUNNING, pb.TASK_SHUTDOWN)
    sim.set_node("n1", state=NodeStatus.READY)
    sim.run()
    assert sim.task(stale.id).status.state == pb.TASK_SHUTDOWN
    assert Counter(task.node_id for task in sim.running("web")) == {"n0": 2}


def test_a_paused_node_keeps_what_it_has() -> None:
    sim = cluster(2, service("web", 2), service("agent", None))
    before = {task.id for task in sim.store.tasks}
    sim.set_node("n1", availability=pb.PAUSED)
    sim.scale("web", 4)
    sim.run()
    assert {task.id for task in sim.store.tasks} > before
    assert Counter(task.node_id for task in sim.running("web")) == {"n0": 3, "n1": 1}


def test_tasks_leave_a_node_that_no_longer_satisfies_their_constraints() -> None:
    """The reference's ConstraintEnforcer."""
    web = service("web", 2)
    web.spec.task.placement.constraints.append("node.labels.zone!=z9")
    sim = cluster(2, web)
    relabel(sim, "n1", "z9")
    sim.run()
    assert {task.node_id for task in sim.running("web")} == {"n0"}


def relabel(sim: Simulation, node_id: str, zone: str) -> None:
    changed = copy_of(sim.node(node_id))
    changed.spec.annotations.labels["zone"] = zone
    sim.replace(changed)


def test_a_paused_node_that_no_longer_satisfies_constraints_is_left_alone_until_it_is_active() -> None:
    web, agent = service("web", 2), service("agent", None)
    for made in (web, agent):
        made.spec.task.placement.constraints.append("node.labels.zone!=z9")
    sim = cluster(2, web, agent)
    before = {task.id for task in sim.store.tasks}
    sim.set_node("n1", availability=pb.PAUSED)
    relabel(sim, "n1", "z9")
    sim.run()
    assert {task.id for name in ("web", "agent") for task in sim.running(name)} == before
    sim.set_node("n1", availability=pb.ACTIVE)
    sim.run()
    assert {task.node_id for name in ("web", "agent") for task in sim.running(name)} == {"n0"}


def test_a_paused_node_that_goes_down_loses_its_tasks_as_any_other() -> None:
    sim = cluster(2, service("web", 2), service("agent", None))
    sim.set_node("n1", availability=pb.PAUSED)
    sim.set_node("n1", state=NodeStatus.DOWN)
    sim.run()
    assert {task.node_id for name in ("web", "agent") for task in sim.running(name)} == {"n0"}
    assert len(sim.running("web")) == 2
    sim.set_node("n1", state=NodeStatus.READY)
    sim.run()
    assert {task.node_id for name in ("web", "agent") for task in sim.running(name)} == {"n0"}


# ---- global services


def test_a_global_service_follows_the_nodes() -> None:
    """The reference's PreassignedTasks: a global service's tasks come to the scheduler with their node."""
    agent = service("agent", None)
    agent.spec.task.placement.constraints.append("node.labels.zone!=z2")
    sim = cluster(3, agent)
    assert [task.node_id for task in sim.running("agent")] == ["n0", "n1"]
    sim.create(node("n3"))
    sim.set_node("n0", availability=pb.DRAINED)
    sim.set_node("n1", NodeStatus.DOWN)
    sim.run()
    assert [task.node_id for task in sim.running("agent")] == ["n3"]
    sim.set_node("n0", availability=pb.ACTIVE)
    sim.set_node("n1", NodeStatus.READY)
    sim.run()
    assert sorted(task.node_id for task in sim.running("agent")) == ["n0", "n1", "n3"]


def test_a_global_task_that_failed_on_a_paused_node_waits_for_the_node() -> None:
    sim = cluster(1, service("agent", None))
    sim.set_node("n0", availability=pb.PAUSED)
    sim.report(sim.running("agent")[0], pb.TASK_FAILED)
    sim.run()
    assert sim.runnable("agent") == []
    sim.set_node("n0", availability=pb.ACTIVE)
    sim.run()
    assert len(sim.running("agent")) == 1


# ---- removal and history


def test_a_removed_service_goes_with_its_last_task_and_its_network_after_it() -> None:
    """The reference's TaskStateRemoveOnServiceRemoval."""
    sim = cluster(1, network("front"), service("web", 2, ["front"]))
    sim.remove_service("web")
    sim.remove_network("front")
    sim.settle()
    assert {task.desired_state for task in sim.tasks("web")} == {pb.TASK_REMOVE}
    assert sim.store.services.get("web") is not None
    assert sim.store.networks.get("front") is not None
    first, second = sim.tasks("web")
    sim.report(first, pb.TASK_SHUTDOWN)
    sim.settle()
    assert [task.id for task in sim.tasks("web")] == [second.id]
    assert sim.store.services.get("web") is not None
    sim.report(second, pb.TASK_SHUTDOWN)
    sim.settle()
    assert not sim.tasks("web")
    assert sim.store.services.get("web") is None
    assert sim.store.networks.get("front") is None


def test_a_dead_node_does_not_keep_a_removed_service_alive() -> None:
    """The reference's ServiceRemoveDeadTasks."""
    sim = cluster(2, service("web", 2))
    sim.set_node("n1", NodeStatus.DOWN)
    sim.remove_service("web")
    sim.run()
    assert sim.store.services.get("web") is None


def test_a_removed_service_whose_tasks_never_had_a_node_is_gone_at_once() -> None:
    """The reference's ServiceRemoveUnassignedTasks."""
    web = service("web", 3)
    web.spec.task.placement.constraints.append("node.hostname==nowhere")
    sim = cluster(2, web)
    assert len(sim.runnable("web")) == 3
    sim.remove_service("web")
    sim.settle()
    assert sim.store.services.get("web") is None
    assert not sim.tasks("web")


def test_tasks_of_a_vanished_service_are_removed() -> None:
    sim = cluster(1, service("web", 2))
    sim.commit((Remove(sim.service("web")),))
    sim.run()
    assert len(sim.store.tasks) == 0


@pytest.mark.parametrize(("limit", "max_attempts", "kept"), [(0, 0, 5), (2, 0, 2), (2, 6, 7)])
def test_history_is_kept_per_slot(limit: int, max_attempts: int, kept: int) -> None:
    """The reference's TaskHistory."""
    web = service("web", 2)
    web.spec.task.restart.max_attempts = max_attempts
    web.spec.task.restart.window_s = 1.0
    web.spec.task.restart.delay_s = 2.0
    sim = Simulation(node("n0"))
    sim.set_history_limit(limit)
    sim.create(web)
    for _ in range(9):
        sim.run()
        sim.report(sim.running("web")[0], pb.TASK_FAILED)
    sim.run()
    assert Counter(task.slot for task in sim.tasks("web")) == {1: kept, 2: 1}
    ids = [task.id for task in sim.tasks("web") if task.slot == 1]
    assert ids == sorted(ids)
    assert sim.tasks("web")[kept - 1].status.state == pb.TASK_RUNNING  # the oldest went
