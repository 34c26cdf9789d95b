"""`explain`: the sentences that people get about services, tasks and nodes that are not as they want them."""

from __future__ import annotations

import pytest

from proto import objects_pb2 as pb
from proto.control_pb2 import Explanation
from swarm.cli.explain import shown
from swarm.explain import explain_node, explain_service, explain_task
from swarm.schedule import why_pending
from tests.simulated import Simulation, node, service


def text_of(found: Explanation) -> str:
    return shown(found)


def explained(sim: Simulation, service_id: str = "web") -> str:
    return shown(explain_service(sim.store, sim.service(service_id), sim.now))


def test_a_pending_task_is_told_what_each_node_lacks_nearest_miss_first() -> None:
    web = service("web", 1)
    web.spec.task.resources.reservations.nano_cpus = 6 * 10**9
    web.spec.task.placement.constraints.append("node.labels.zone==a")
    sim = Simulation(node("big", cpus=8), node("small", cpus=4), node("near", labels={"zone": "a"}), web)
    sim.set_node("small", availability=pb.DRAINED)
    sim.settle()
    [task] = sim.tasks("web")
    assert why_pending(sim.store, task, sim.now) == (
        "big: does not satisfy node.labels.zone==a",
        "near: lacks 2 of 6 CPUs",
        "small: is drained; lacks 2 of 6 CPUs; does not satisfy node.labels.zone==a",
    )
    assert "0 run of 1 replicas" in explained(sim)
    assert "    near: lacks 2 of 6 CPUs" in explained(sim)


def test_a_slot_that_was_given_up_is_told_with_the_reason() -> None:
    web = service("web", 2)
    web.spec.task.restart.max_attempts = 1
    web.spec.task.restart.delay_s = 0
    sim = Simulation(node("n1"), web)
    for _ in range(2):
        sim.settle()
        sim.report(next(task for task in sim.runnable("web") if task.slot == 2), pb.TASK_FAILED, exit_code=3)
    sim.settle()
    assert "  web.2: given up: failed with exit code 3; restarted 1 times: no attempts left\n" in explained(sim)


def test_a_task_that_a_node_would_take_is_not_said_to_be_refused() -> None:
    sim = Simulation(node("n1", cpus=1), service("web", 1))
    web = sim.service("web")
    sim.settle()
    [task] = sim.tasks("web")
    assert why_pending(sim.store, task, sim.now) == ()
    assert web.id in explained(sim)


@pytest.mark.parametrize("port_taken", [True, False])
def test_ports_and_limits_per_node_are_named(port_taken: bool) -> None:
    web = service("web", 2)
    if port_taken:
        web.spec.endpoint.ports.add(target_port=80, published_port=8080, mode=pb.HOST)
    else:
        web.spec.task.placement.max_replicas_per_node = 1
    sim = Simulation(node("n1"), web)
    sim.settle()
    wanted = "n1: has port 8080/tcp in use" if port_taken else "n1: carries 1 tasks of at most 1"
    assert wanted in explained(sim)


def test_a_task_tells_its_node_why_there_and_its_slots_history() -> None:
    sim = Simulation(node("n1"), node("n2"), service("web", 1))
    sim.run()
    [first] = sim.running("web")
    sim.report(first, pb.TASK_FAILED, exit_code=3)
    sim.run()
    [second] = sim.running("web")
    told = text_of(explain_task(sim.store, second, sim.now))
    assert f"reason: replaces {first.id}: failed with exit code 3" in told
    assert "fewest tasks of 2 nodes that may take it (of 2)" in told
    assert f"earlier {first.id}: failed" in told
    assert "1 remembered tasks failed" in explained(sim)
    assert "1 x exit code 3" in explained(sim)


def test_a_paused_update_says_why_and_what_to_do() -> None:
    web = service("web", 2)
    web.spec.update.monitor_s = 5.0
    sim = Simulation(node("n1"), web)
    sim.run()
    sim.set_image("web", "web:2")
    sim.settle()
    while sim.service("web").update_status.state == pb.UpdateStatus.UPDATING:
        for task in sim.runnable("web"):
            if task.spec.container.image == "web:2" and task.status.state >= pb.TASK_ASSIGNED:
                sim.report(task, pb.TASK_FAILED)
            else:
                sim.step(task)
        sim.advance(1)
        sim.settle()
    assert "update paused due to failure" in explained(sim)
    assert "nothing more is replaced until" in explained(sim)


def test_an_update_under_way_says_what_it_waits_for() -> None:
    sim = Simulation(node("n1"), service("web", 2))
    sim.run()
    sim.set_image("web", "web:2")
    sim.settle()
    assert "1 are of an older one" in explained(sim)
    assert "waits for slot" in explained(sim)


def test_a_node_tells_its_state_its_tasks_and_what_is_reserved() -> None:
    web = service("web", 3)
    web.spec.task.resources.reservations.nano_cpus = 10**9
    sim = Simulation(node("n1", cpus=4), web)
    sim.run()
    sim.set_node("n1", availability=pb.PAUSED)
    told = text_of(explain_node(sim.store, sim.node("n1")))
    assert "ready, paused: takes no new tasks" in told
    assert "web: 3" in told
    assert "3 of 4 CPUs" in told
