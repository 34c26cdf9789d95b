"""Which node a task gets, and what a task is told that gets none."""

from __future__ import annotations

from collections import Counter

import pytest

from proto import objects_pb2 as pb
from proto.objects_pb2 import NodeStatus, Service
from swarm.consensus.config import PROPOSAL_BYTES_MAX
from swarm.schedule import decide, why_pending
from swarm.store.changes import Change
from swarm.store.dirty import Dirty
from tests.simulated import Simulation, node, service

GIB = 1 << 30


def spread_of(sim: Simulation, name: str) -> Counter[str]:
    return Counter(task.node_id for task in sim.runnable(name) if task.status.state >= pb.TASK_ASSIGNED)


def waiting(sim: Simulation, name: str) -> set[str]:
    return {task.status.err for task in sim.runnable(name) if task.status.state < pb.TASK_ASSIGNED}


def test_tasks_go_where_the_service_has_fewest_then_where_all_have_fewest() -> None:
    """The reference's HA."""
    sim = Simulation(*(node(f"n{i}") for i in range(3)), service("a", 4))
    sim.settle()
    assert sorted(spread_of(sim, "a").values()) == [1, 1, 2]
    busiest = spread_of(sim, "a").most_common(1)[0][0]
    sim.create(service("b", 2))
    sim.settle()
    assert busiest not in spread_of(sim, "b")


@pytest.mark.parametrize(("tasks", "zones"), [(12, {"a": 6, "b": 6}), (3, {"a": 2, "b": 1})])
def test_spread_preferences_level_branches_not_nodes(tasks: int, zones: dict[str, int]) -> None:
    """The reference's Preferences."""
    nodes = [node("a1", labels={"zone": "a"}), *(node(f"b{i}", labels={"zone": "b"}) for i in range(4))]
    web = service("web", tasks)
    web.spec.task.placement.spread.append("node.labels.zone")
    sim = Simulation(*nodes, web)
    sim.settle()
    assert Counter(node_id[0] for node_id in spread_of(sim, "web").elements()) == zones


def test_a_full_branch_leaves_its_share_to_the_others() -> None:
    """A branch without room."""
    web = service("web", 8)
    web.spec.task.placement.spread.append("node.labels.zone")
    web.spec.task.resources.reservations.nano_cpus = 10**9
    sim = Simulation(node("a", cpus=1, labels={"zone": "a"}), node("b", cpus=9), web)
    sim.settle()
    assert spread_of(sim, "web") == {"a": 1, "b": 7}


def test_preferences_are_a_tree_and_stay_level_when_scaled_up() -> None:
    """The reference's MultiplePreferences, MultiplePreferencesScaleUp: zones first, racks within each zone."""
    places = {"a1": ("a", "r1"), "a2": ("a", "r2"), "b1": ("b", "r1"), "b2": ("b", "r1"), "b3": ("b", "r2")}
    web = service("web", 4)
    web.spec.task.placement.spread.extend(["node.labels.zone", "node.labels.rack"])
    sim = Simulation(*(node(name, labels={"zone": z, "rack": r}) for name, (z, r) in places.items()), web)
    for replicas in (4, 8, 16):
        sim.scale("web", replicas)
        sim.settle()
        racks: Counter[tuple[str, str]] = Counter()
        for name, count in spread_of(sim, "web").items():
            racks[places[name]] += count
        assert set(racks.values()) == {replicas // 4}, racks


def test_reservations_are_never_exceeded_and_a_freed_one_is_used() -> None:
    """The reference's ResourceConstraint, ResourceConstraintHA, ResourceConstraintDeadTask."""
    web = service("web", 5)
    web.spec.task.resources.reservations.memory_bytes = 3 * GIB
    sim = Simulation(node("n1"), node("n2"), web)  # 8 GiB each
    sim.run()
    assert spread_of(sim, "web") == {"n1": 2, "n2": 2}
    assert waiting(sim, "web") == {"no suitable node (insufficient resources on 2 nodes)"}
    sim.scale("web", 4)
    sim.create(service("other"))
    sim.scale("web", 5)
    sim.create(node("n3"))
    sim.run()
    assert spread_of(sim, "web") == {"n1": 2, "n2": 2, "n3": 1}


def with_everything(web: Service) -> Service:
    web.spec.task.placement.constraints.append("node.labels.zone==a")
    web.spec.task.placement.max_replicas_per_node = 1
    web.spec.task.resources.reservations.nano_cpus = 2 * 10**9
    return web


def test_the_reason_counts_nodes_by_the_first_filter_that_refuses_them() -> None:
    """The reference's MaxReplicas, UnscheduleableTask."""
    drained, small = node("n1"), node("n5", cpus=1, labels={"zone": "a"})
    drained.spec.availability = pb.DRAINED
    good = node("n4", labels={"zone": "a"})
    sim = Simulation(drained, node("n2"), node("n3"), good, small, with_everything(service("web", 2)))
    sim.settle()
    assert spread_of(sim, "web") == {"n4": 1}
    (why,) = waiting(sim, "web")
    most, *others = why.removeprefix("no suitable node (").removesuffix(")").split("; ")
    assert most == "scheduling constraints not satisfied on 2 nodes"
    assert sorted(others) == [
        "1 node not available for new tasks",
        "insufficient resources on 1 node",
        "max replicas per node limit exceeded on 1 node",
    ]


def test_the_reason_is_written_once() -> None:
    web = service("web")
    web.spec.task.placement.constraints.append("node.role==manager")
    sim = Simulation(node("n1"), web)
    sim.settle()
    version = sim.store.version
    assert decide(sim.store, sim.now + 60, sim.new_id, Dirty(everything=True)).groups == ()
    assert sim.settle() == 0
    assert sim.store.version == version


def test_a_cluster_without_nodes_says_so() -> None:
    sim = Simulation(service("web"))
    sim.settle()
    assert waiting(sim, "web") == {"no suitable node (the cluster has no node)"}


def test_host_ports_allow_one_task_per_node() -> None:
    """The reference's HostPort."""
    web = service("web", 3)
    web.spec.endpoint.ports.add(target_port=80, published_port=8080, mode=pb.HOST)
    sim = Simulation(node("n1"), node("n2"), web)
    sim.settle()
    assert spread_of(sim, "web") == {"n1": 1, "n2": 1}
    assert waiting(sim, "web") == {"no suitable node (host-mode port already in use on 2 nodes)"}


def test_host_ports_on_one_address_go_where_that_address_is_and_meet_only_there() -> None:
    nodes = {name: node(name) for name in ("n1", "n2")}
    nodes["n1"].description.underlay_subnets.extend(["192.0.2.1/24", "192.0.2.2/24"])
    services = []
    for name, host_ip in (("a", "192.0.2.1"), ("b", "192.0.2.2"), ("c", "192.0.2.2"), ("d", ""), ("e", "192.0.2.9")):
        made = service(name)
        made.spec.endpoint.ports.add(target_port=80, published_port=8080, mode=pb.HOST, host_ip=host_ip)
        services.append(made)
    sim = Simulation(*nodes.values(), *services)
    sim.settle()
    assert [spread_of(sim, name) for name in "abde"] == [{"n1": 1}, {"n1": 1}, {"n2": 1}, {}]
    assert waiting(sim, "c") == {"no suitable node (host-mode port already in use on 2 nodes)"}
    assert waiting(sim, "e") == {
        "no suitable node (address of a host-mode port missing on 1 node; host-mode port already in use on 1 node)"
    }
    (line, _) = sorted(why_pending(sim.store, sim.tasks("e")[0], sim.now))
    assert line == "n1: has no address 192.0.2.9"


@pytest.mark.parametrize("state", [NodeStatus.DOWN, NodeStatus.UNKNOWN, NodeStatus.DISCONNECTED])
def test_nodes_that_are_not_ready_get_nothing(state: NodeStatus.State.ValueType) -> None:
    absent = node("n1")
    absent.status.state = state
    sim = Simulation(absent, node("n2"), service("web", 2))
    sim.settle()
    assert spread_of(sim, "web") == {"n2": 2}


def test_a_node_where_the_service_keeps_failing_is_the_last_resort() -> None:
    """The reference's FaultyNode."""
    web = service("web")
    web.spec.task.restart.delay_s = 0
    web.spec.task.restart.max_attempts = 10  # keeps the history that failures are counted from
    web.spec.task.placement.constraints.append("node.hostname==n1")
    sim = Simulation(node("n1"), node("n2"), service("filler", 4), web)
    for _ in range(5):
        sim.settle()
        sim.report(sim.runnable("web")[0], pb.TASK_FAILED)

    def lift(spec: pb.ServiceSpec) -> None:
        del spec.task.placement.constraints[:]

    sim.update_spec("web", lift)
    sim.settle()
    assert spread_of(sim, "web") == {"n2": 1}
    sim.scale("web", 2)
    sim.settle()
    assert spread_of(sim, "web") == {"n2": 2}
    sim.now += 301
    sim.scale("web", 3)
    sim.settle()
    assert spread_of(sim, "web") == {"n2": 2, "n1": 1}


@pytest.mark.parametrize(("image", "nodes"), [("web:1", {"n2"}), ("web:2", {"n1", "n2"})])
def test_what_another_image_did_on_a_node_says_nothing_of_the_new_one(image: str, nodes: set[str]) -> None:
    """The reference's FaultyNodeSpecVersion. Here a change that the containers do not show (a scale, a constraint) does
    not forget the failures."""
    web = service("web")
    web.spec.task.restart.delay_s = 0
    web.spec.task.restart.max_attempts = 10
    sim = Simulation(node("n1"), web)
    for _ in range(5):
        sim.settle()
        sim.report(sim.runnable("web")[0], pb.TASK_FAILED)
    sim.create(node("n2"))
    sim.settle()
    sim.set_image("web", image)
    sim.scale("web", 5)
    sim.settle()
    assert {task.node_id for task in sim.runnable("web") if task.slot > 1} == nodes


class Weighed(Simulation):
    largest_bytes = 0

    def commit(self, *groups: tuple[Change, ...]) -> None:
        sizes = [sum(change.record.ByteSize() for change in group) for group in groups]
        self.largest_bytes = max(self.largest_bytes, *sizes)
        super().commit(*groups)


def test_large_tasks_are_stored_a_few_at_a_time() -> None:
    """An entry of the log holds less than 2 MB: twenty of these at once would never be stored."""
    web = service("web", 30)
    web.spec.task.container.env.append("LARGE=" + "x" * 300_000)
    sim = Weighed(node("n1"), web)
    sim.settle()
    assert spread_of(sim, "web") == {"n1": 30}
    assert sim.largest_bytes < PROPOSAL_BYTES_MAX
