"""Generic resources from the daemon's flag to the container's environment: named and counted ones, given first fit,
free again when the task has stopped, and lost when the node has fewer."""

from __future__ import annotations

import pytest

from node.inputs import generic_env
from proto import objects_pb2 as pb
from proto.objects_pb2 import GenericResource, Service, ServiceSpec, Task
from swarm.api.validate import service_spec
from swarm.cli.docker_shape import node_json, service_spec_json
from swarm.cli.explain import shown
from swarm.cli.generic import parse_offered, parse_wanted
from swarm.cli.pretty import pretty_node, pretty_service
from swarm.cli.spec import build_spec
from swarm.cli.update import updated_spec
from swarm.errors import Invalid
from swarm.explain import explain_node
from swarm.schedule import why_pending
from tests.simulated import Simulation, node, offering, service, wanting

OFFERED = ["gpu=GPU1", "gpu=GPU2", "licence=4"]


def given(sim: Simulation, name: str) -> dict[str, list[str]]:
    """Node -> what the service's live tasks have of it, oldest first."""
    found: dict[str, list[str]] = {}
    for task in sorted(sim.runnable(name), key=lambda task: (task.meta.created_at, task.id)):
        if task.node_id:
            found.setdefault(task.node_id, []).append(",".join(r.id or str(r.count) for r in task.assigned_generic))
    return found


def waiting(sim: Simulation, name: str) -> list[Task]:
    return [task for task in sim.runnable(name) if task.status.state < pb.TASK_ASSIGNED]


def test_named_and_counted_ones_are_given_first_fit_and_never_twice() -> None:
    """The reference's GenericResources."""
    sim = Simulation(
        offering(node("n1"), gpu=["A", "B", "C"], licence=3),
        offering(node("n2"), licence=3),
        wanting(service("web", 2), gpu=1, licence=1),
    )
    sim.run()
    sim.create(wanting(service("db", 2), licence=2))
    sim.run()
    assert given(sim, "web") == {"n1": ["A,1", "B,1"]}
    assert given(sim, "db") == {"n2": ["2"]}
    (left_out,) = waiting(sim, "db")
    assert left_out.status.err == "no suitable node (insufficient resources on 2 nodes)"
    assert why_pending(sim.store, left_out, sim.now) == ("n1: lacks 1 of 2 licence", "n2: lacks 1 of 2 licence")


def test_what_a_stopped_task_had_goes_to_the_next_one_and_not_before_it_has_stopped() -> None:
    sim = Simulation(offering(node("n1"), gpu=["A"]), wanting(service("old"), gpu=1))
    sim.run()
    sim.create(wanting(service("new"), gpu=1))
    sim.scale("old", 0)
    sim.settle()
    assert len(waiting(sim, "new")) == 1, "the old one still runs"
    sim.run()
    assert given(sim, "new") == {"n1": ["A"]}


def test_a_global_service_gets_them_on_each_node_that_has_some() -> None:
    sim = Simulation(offering(node("n1"), gpu=["A"]), node("n2"), wanting(service("all", None), gpu=1))
    sim.run()
    assert given(sim, "all") == {"n1": ["A"], "n2": [""]}
    (alone,) = waiting(sim, "all")
    assert alone.status.err == "no suitable node (insufficient resources on 1 node)"


def test_a_node_that_has_less_than_before_loses_the_youngest_tasks_and_those_whose_own_is_gone() -> None:
    sim = Simulation(offering(node("n1"), gpu=["A", "B"], licence=3), node("n2"), node("n3"))
    sim.create(wanting(service("cards", 2), gpu=1))
    sim.run()
    sim.create(wanting(service("counted", 3), licence=1))
    sim.run()
    before = {task.id: task for task in sim.running("counted")}
    sim.offer("n1", gpu=["B"], licence=1)
    sim.run()
    assert given(sim, "cards") == {"n1": ["B"]}
    (kept,) = sim.running("counted")
    assert kept.id == min(before)
    moved = next(task for task in sim.tasks("cards") if not task.desired_state <= pb.TASK_RUNNING)
    assert moved.reason == "node n1 no longer has the resources that were reserved there"
    assert len(waiting(sim, "cards")) == 1
    assert len(waiting(sim, "counted")) == 2
    sim.offer("n2", gpu=["Z"])
    sim.run()
    assert given(sim, "cards") == {"n1": ["B"], "n2": ["Z"]}


def test_a_node_that_has_less_cpu_or_memory_loses_the_youngest_tasks() -> None:
    """The reference's ConstraintEnforcer: reservations that no longer fit."""
    web = service("web", 2)
    web.spec.task.resources.reservations.memory_bytes = 3 << 30
    sim = Simulation(node("n1"), web)
    sim.run()
    oldest = min(task.id for task in sim.running("web"))
    small = node("n1", memory_bytes=4 << 30)
    small.meta.version = sim.node("n1").meta.version
    sim.replace(small)
    sim.create(node("n2"))
    sim.run()
    assert {task.node_id: task.id == oldest for task in sim.running("web")} == {"n1": True, "n2": False}


def test_explain_tells_who_has_what() -> None:
    sim = Simulation(offering(node("n1"), gpu=["A", "B"], licence=4), wanting(service("web"), gpu=1, licence=2))
    sim.run()
    told = shown(explain_node(sim.store, sim.node("n1")))
    assert "1 of 2 gpu, 2 of 4 licence" in told
    assert "gpu A: web.1" in told


def test_the_daemons_flag_names_or_counts() -> None:
    assert parse_offered([*OFFERED, "fpga=X,fpga=Y"], "f") == [
        GenericResource(kind="gpu", count=1, id="GPU1"),
        GenericResource(kind="gpu", count=1, id="GPU2"),
        GenericResource(kind="licence", count=4),
        GenericResource(kind="fpga", count=1, id="X"),
        GenericResource(kind="fpga", count=1, id="Y"),
    ]


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["gpu"], 'invalid value "gpu" for --f: write KIND=VALUE'),
        (["=2"], "write KIND=VALUE"),
        (["a b=2"], "write KIND=VALUE"),
        (["gpu=A", "gpu=2"], "gpu is either counted"),
        (["gpu=99999999999999999999"], "at most 1000000000"),
        (["gpu=1", "gpu=2"], "gpu is either counted"),
        (["gpu=A", "gpu=A"], "the same name twice"),
        ([f"gpu=G{number}" for number in range(1001)], "a node offers at most 1000"),
    ],
)
def test_an_offer_that_makes_no_sense_is_refused(texts: list[str], why: str) -> None:
    with pytest.raises(Invalid, match=why):
        parse_offered(texts, "f")


def test_a_service_asks_for_numbers_only() -> None:
    assert parse_wanted(["gpu=2,licence=1"], "f") == [
        GenericResource(kind="gpu", count=2),
        GenericResource(kind="licence", count=1),
    ]
    with pytest.raises(Invalid, match='invalid value "gpu=GPU1" for --f: write KIND=NUMBER'):
        parse_wanted(["gpu=GPU1"], "f")


def wanted(spec: ServiceSpec) -> dict[str, int]:
    return {resource.kind: resource.count for resource in spec.task.resources.reservations.generic}


def test_create_and_update_take_the_flags() -> None:
    spec = build_spec("web", (), {"generic-resource": ["gpu=2,licence=1"]}, {}, lambda path: "")
    assert wanted(spec) == {"gpu": 2, "licence": 1}
    changed = updated_spec(
        spec, {"generic-resource-add": ["gpu=3", "fpga=1"], "generic-resource-rm": ["licence"]}, {}, str
    )
    assert wanted(changed) == {"gpu": 3, "fpga": 1}
    with pytest.raises(Invalid, match="the service asks for no tpu"):
        updated_spec(spec, {"generic-resource-rm": ["tpu"]}, {}, str)


@pytest.mark.parametrize(
    ("resources", "why"),
    [
        ([GenericResource(kind="gpu", count=0)], "generic resource gpu=0: use a number of 1 or more"),
        ([GenericResource(kind="gpu", count=-1)], "1 or more"),
        ([GenericResource(kind="", count=1)], "a kind has up to 63"),
        ([GenericResource(kind="gpu", count=1, id="A")], "only ask for a number"),
        ([GenericResource(kind="gpu", count=1)] * 2, "duplicate generic resource 'gpu'"),
    ],
)
def test_the_managers_refuse_what_makes_no_sense(resources: list[GenericResource], why: str) -> None:
    spec = service("web").spec
    spec.task.resources.reservations.generic.extend(resources)
    with pytest.raises(Invalid, match=why):
        service_spec(spec)


def test_they_cannot_be_limited() -> None:
    spec = service("web").spec
    spec.task.resources.limits.generic.add(kind="gpu", count=1)
    with pytest.raises(Invalid, match="they can only be reserved"):
        service_spec(spec)


def test_the_container_finds_in_its_environment_what_it_has() -> None:
    task = Task()
    task.assigned_generic.extend(parse_offered(OFFERED, "f"))
    assert generic_env(task) == ["DOCKER_RESOURCE_GPU=GPU1,GPU2", "DOCKER_RESOURCE_LICENCE=4"]


def test_inspect_shows_them_in_dockers_shape_and_for_people() -> None:
    made = node("n1")
    made.description.generic.extend(parse_offered(OFFERED, "f"))
    assert node_json(made)["Description"]["Resources"]["GenericResources"] == [
        {"NamedResourceSpec": {"Kind": "gpu", "Value": "GPU1"}},
        {"NamedResourceSpec": {"Kind": "gpu", "Value": "GPU2"}},
        {"DiscreteResourceSpec": {"Kind": "licence", "Value": 4}},
    ]
    assert "Generic:              gpu=GPU1, gpu=GPU2, licence=4" in pretty_node(made)
    asking: Service = wanting(service("web"), gpu=2)
    assert service_spec_json(asking.spec)["TaskTemplate"]["Resources"]["Reservations"]["GenericResources"] == [
        {"DiscreteResourceSpec": {"Kind": "gpu", "Value": 2}}
    ]
    assert "Reservations:\n Generic:              gpu=2" in pretty_service(asking, {})
