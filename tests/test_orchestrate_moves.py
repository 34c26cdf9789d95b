"""Drains within a budget and rebalancing: what moves when, in which order, and that it ends."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from proto import objects_pb2 as pb
from proto.objects_pb2 import Service
from swarm import schedule
from swarm.orchestrate.moves import budget, planned
from swarm.store.changes import copy_of
from tests.simulated import Simulation, node, service


def cluster(nodes: int, replicas: int, *, start_first: bool = False, max_unavailable: int = 0) -> Simulation:
    web = service("web", replicas)
    web.spec.max_unavailable = max_unavailable
    web.spec.update.order = pb.START_FIRST if start_first else pb.STOP_FIRST
    sim = Simulation(*(node(f"n{number}", cpus=64) for number in range(nodes)), web)
    sim.run()
    return sim


def on(sim: Simulation) -> Counter[str]:
    return Counter(task.node_id for task in sim.running("web"))


def step_all(sim: Simulation) -> bool:
    sim.settle()
    moved = [sim.step(task) for task in sim.store.tasks]
    sim.now += 0.1
    return any(moved)


def least_running_until_quiet(sim: Simulation) -> int:
    """How many slots had a running task when there were fewest."""
    least = len(sim.running("web"))
    while step_all(sim):
        least = min(least, len({task.slot for task in sim.running("web")}))
    return least


def test_the_budget_is_what_the_service_says_or_a_quarter() -> None:
    assert [budget(service("web", replicas)) for replicas in (0, 1, 3, 4, 100)] == [1, 1, 1, 1, 25]
    web = service("web", 8)
    web.spec.max_unavailable = 5
    assert budget(web) == 5


def test_a_stop_first_drain_takes_away_no_more_than_the_budget() -> None:
    sim = cluster(2, 12, max_unavailable=2)
    sim.set_node("n0", availability=pb.DRAINED)
    assert least_running_until_quiet(sim) == 10
    sim.run()
    assert on(sim) == {"n1": 12}


def test_a_start_first_drain_never_lacks_a_task() -> None:
    sim = cluster(2, 6, start_first=True)
    sim.set_node("n0", availability=pb.DRAINED)
    sim.settle()
    new = [task for task in sim.runnable("web") if task.replaces]
    assert len(new) == 1
    assert new[0].reason == f"node n0 is drained: starts before {new[0].replaces} stops"
    assert least_running_until_quiet(sim) == 6
    sim.run()
    assert on(sim) == {"n1": 6}
    assert "moved to node n1" in {task.reason for task in sim.tasks("web")}


def test_start_first_falls_back_where_two_tasks_of_a_slot_have_no_room() -> None:
    sim = cluster(3, 2, start_first=True)

    def change(spec: pb.ServiceSpec) -> None:
        spec.task.placement.max_replicas_per_node = 1

    sim.update_spec("web", change)
    sim.run()
    drained = sim.running("web")[0].node_id
    sim.set_node(drained, availability=pb.DRAINED)
    sim.settle()
    assert not any(task.replaces for task in sim.runnable("web"))
    sim.run()
    assert drained not in on(sim)
    assert len(sim.running("web")) == 2


def test_what_lacks_room_elsewhere_stays_where_it_serves() -> None:
    sim = cluster(2, 2, start_first=True)
    sim.set_node("n1", availability=pb.PAUSED)
    sim.set_node("n0", availability=pb.DRAINED)
    sim.run()
    assert on(sim) == {"n0": 1, "n1": 1}, "no node takes the replacement: nothing is stopped"
    assert [task.status.err for task in sim.runnable("web") if task.replaces] != [""]
    sim.set_node("n1", availability=pb.ACTIVE)
    sim.run()
    assert on(sim) == {"n1": 2}


def test_a_drain_that_is_taken_back_leaves_one_task_a_slot() -> None:
    sim = cluster(2, 2, start_first=True)
    sim.set_node("n1", availability=pb.PAUSED)
    sim.set_node("n0", availability=pb.DRAINED)
    sim.settle()
    sim.set_node("n0", availability=pb.ACTIVE)
    sim.run()
    assert Counter(task.slot for task in sim.runnable("web")) == {1: 1, 2: 1}
    assert len(sim.running("web")) == 2


def test_a_replacement_that_fails_is_tried_again_after_the_delay_and_the_old_task_serves_on() -> None:
    sim = cluster(2, 1, start_first=True)
    old = sim.running("web")[0]
    sim.set_node(old.node_id, availability=pb.DRAINED)
    sim.settle()
    new = next(task for task in sim.runnable("web") if task.replaces == old.id)
    while sim.task(new.id).status.state < pb.TASK_STARTING:
        sim.step(sim.task(new.id))
        sim.settle()
    sim.report(sim.task(new.id), pb.TASK_FAILED)
    sim.settle()
    assert [task.id for task in sim.runnable("web")] == [old.id]
    sim.advance(4.9)
    assert [task.id for task in sim.runnable("web")] == [old.id]
    sim.advance(0.2)
    assert len(sim.runnable("web")) == 2
    sim.run()
    assert old.node_id not in on(sim)


def test_a_crash_loop_does_not_hold_up_a_drain() -> None:
    sim = cluster(2, 4, max_unavailable=1)
    victim = next(task for task in sim.running("web") if task.node_id == "n1")
    sim.report(victim, pb.TASK_FAILED)
    sim.settle()
    sim.set_node("n0", availability=pb.DRAINED)
    sim.settle()
    assert len(sim.running("web")) < 3, "one moves although another one waits for its restart"


def rebalanced(sim: Simulation) -> int:
    changed = copy_of(sim.service("web"))
    changed.rebalance_moves = planned(sim.store, changed, schedule.fits)
    sim.replace(changed)
    return changed.rebalance_moves


def test_rebalancing_fills_a_node_that_returned_without_lacking_a_task() -> None:
    sim = cluster(3, 9)
    sim.set_node("n2", availability=pb.DRAINED)
    sim.run()
    sim.set_node("n2", availability=pb.ACTIVE)
    sim.run()
    assert on(sim) == {"n0": 5, "n1": 4} or on(sim) == {"n0": 4, "n1": 5}
    assert rebalanced(sim) == 3
    sim.settle()
    assert sum(bool(task.replaces) for task in sim.runnable("web")) == budget(sim.service("web")) == 2
    assert least_running_until_quiet(sim) == 9
    sim.run()
    assert on(sim) == {"n0": 3, "n1": 3, "n2": 3}
    assert sim.service("web").rebalance_moves == 0
    assert rebalanced(sim) == 0


def test_rebalancing_ends_when_no_node_takes_a_task() -> None:
    web: Service = service("web", 4)
    web.spec.task.resources.reservations.nano_cpus = 10**9
    db = service("db", 4)
    db.spec.task.resources.reservations.nano_cpus = 10**9
    db.spec.task.placement.constraints.append("node.hostname==n1")
    sim = Simulation(node("n0", cpus=4), node("n1", cpus=4), db)
    sim.run()
    sim.create(web)
    sim.run()
    assert on(sim) == {"n0": 4}
    assert rebalanced(sim) == 2
    sim.run()
    assert on(sim) == {"n0": 4}
    assert sim.service("web").rebalance_moves == 0
    assert Counter(task.slot for task in sim.runnable("web")) == {1: 1, 2: 1, 3: 1, 4: 1}


@settings(max_examples=40, deadline=None)
@given(
    replicas=st.integers(1, 12),
    max_unavailable=st.integers(0, 3),
    start_first=st.booleans(),
    gone=st.lists(st.sampled_from(["n0", "n1", "n2", "n3"]), max_size=3, unique=True),
)
def test_any_drain_and_rebalance_keeps_the_budget_and_ends_even(
    replicas: int, max_unavailable: int, start_first: bool, gone: list[str]
) -> None:
    sim = cluster(4, replicas, start_first=start_first, max_unavailable=max_unavailable)
    least = replicas - budget(sim.service("web"))
    for name in gone:
        sim.set_node(name, availability=pb.DRAINED)
    assert least_running_until_quiet(sim) >= least
    sim.run()
    assert not set(gone) & on(sim).keys()
    for name in gone:
        sim.set_node(name, availability=pb.ACTIVE)
    sim.run()
    rebalanced(sim)
    assert least_running_until_quiet(sim) == replicas
    sim.run()
    counts = [on(sim)[f"n{number}"] for number in range(4)]
    assert sum(counts) == replicas
    assert max(counts) - min(counts) <= 1
    assert sim.service("web").rebalance_moves == 0
