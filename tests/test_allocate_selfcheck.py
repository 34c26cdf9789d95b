"""What a new leader does about a state that should not be: the older object keeps what both have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proto import objects_pb2 as pb
from proto.objects_pb2 import Network, PortConfig, Task
from swarm.allocate.selfcheck import check
from swarm.store.changes import copy_of
from swarm.store.dirty import Dirty
from tests.simulated import Simulation, network, node, service


def running() -> Simulation:
    """Two services of two tasks on network a, and network b, which nobody uses."""
    web, db = service("web", 2, ["a"]), service("db", 2, ["a"])
    for made in (web, db):
        made.spec.endpoint.ports.add(target_port=80)
    sim = Simulation(node("n1"), node("n2"), network("a"), network("b"), web)
    sim.run()
    sim.now += 10
    sim.create(db)
    sim.run()
    return sim


def new_leader(sim: Simulation) -> list[str]:
    """The problems that it finds; then everybody works until nothing moves any more."""
    found = check(sim.store)
    sim.is_sound = not found.notes
    sim._dirty = Dirty(everything=True)
    sim.run()
    assert check(sim.store).repairs == ()
    return list(found.notes)


def test_a_sound_state_is_left_alone() -> None:
    sim = running()
    version = sim.store.version
    assert new_leader(sim) == []
    assert sim.store.version == version


def test_of_two_services_with_one_virtual_ip_the_younger_gets_another() -> None:
    sim = running()
    kept, changed = sim.service("web").endpoint.virtual_ips[0].address, copy_of(sim.service("db"))
    changed.endpoint.virtual_ips[0].address = kept
    sim.replace(changed)
    assert new_leader(sim) == [f"service db: address {kept} is also service web's: given another"]
    assert sim.service("web").endpoint.virtual_ips[0].address == kept
    assert sim.service("db").endpoint.virtual_ips[0].address != kept


@pytest.mark.parametrize("wrong", ["10.0.1.2/24", "10.77.0.9/24", "10.0.1.1/24"])
def test_a_task_with_an_address_of_somebody_else_or_of_no_subnet_is_replaced(wrong: str) -> None:
    sim = running()
    victim = copy_of(sim.running("db")[0])
    victim.networks[0].address = wrong
    sim.replace(victim)
    (note,) = new_leader(sim)
    assert note.startswith(f"task db.1 ({victim.id}): address {wrong} is ")
    assert len(sim.running("db")) == 2
    assert victim.id not in {task.id for task in sim.running("db")}
    assert wrong in sim.task(victim.id).reason
    assert len(sim.running("web")) == 2


def test_a_task_that_waits_for_a_node_is_made_anew() -> None:
    sim = running()

    def change(spec: pb.ServiceSpec) -> None:
        spec.replicated.replicas = 3
        spec.task.placement.constraints.append("node.hostname==nowhere")

    sim.update_spec("db", change)
    sim.settle()
    waiting = next(task for task in sim.tasks("db") if task.status.state == pb.TASK_PENDING)
    changed = copy_of(waiting)
    changed.networks[0].address = sim.running("web")[0].networks[0].address
    sim.replace(changed)
    assert len(new_leader(sim)) == 1
    assert waiting.id not in sim.store.tasks


def test_of_two_services_with_one_port_the_younger_gets_another_number_if_it_left_it_open() -> None:
    sim = running()
    changed = copy_of(sim.service("db"))
    changed.endpoint.spec.ports[0].published_port = 30000
    sim.replace(changed)
    (note,) = new_leader(sim)
    assert note.startswith("service db: port '30000' is already in use by service 'web'")
    assert [sim.service(name).endpoint.spec.ports[0].published_port for name in ("web", "db")] == [30000, 30001]


def test_of_two_services_that_insist_on_one_port_the_younger_says_what_is_wrong() -> None:
    sim = running()
    for name in ("web", "db"):
        changed = copy_of(sim.service(name))
        port = PortConfig(target_port=80, published_port=8080)
        for spec in (changed.spec.endpoint, changed.endpoint.spec):
            del spec.ports[:]
            spec.ports.append(port)
        sim.replace(changed)
    new_leader(sim)
    assert not sim.service("web").allocation_error
    assert "already in use by service 'web'" in sim.service("db").allocation_error


def same_vni(one: Network, other: Network) -> None:
    one.vni = other.vni


def same_subnet(one: Network, other: Network) -> None:
    one.ipam.CopyFrom(other.ipam)


@pytest.mark.parametrize("clash", [same_vni, same_subnet])
def test_a_network_that_nobody_uses_is_allocated_anew_and_one_in_use_is_told(
    clash: Callable[[Network, Network], None],
) -> None:
    sim = running()
    a, b = (sim.store.networks.get(name) for name in "ab")
    assert a is not None
    assert b is not None
    changed = copy_of(b)
    clash(changed, a)
    sim.replace(changed)
    assert len(new_leader(sim)) == 1
    after = sim.store.networks.get("b")
    assert after is not None
    assert (after.vni != a.vni, after.ipam.subnet != a.ipam.subnet) == (True, True)
    sim.create(service("user", 1, ["b"]))
    sim.run()
    changed = copy_of(sim.store.networks.get("b") or Network())
    clash(changed, a)
    sim.replace(changed)
    assert len(new_leader(sim)) >= 1
    told = sim.store.networks.get("b")
    assert told is not None
    assert "create it anew" in told.allocation_error
    assert told.vni == changed.vni


def test_what_a_stopped_task_had_is_nobodys() -> None:
    sim = running()
    old = sim.running("db")[0]
    sim.report(old, pb.TASK_FAILED)
    sim.run()
    ended: Task = copy_of(sim.task(old.id))
    ended.networks[0].address = sim.running("web")[0].networks[0].address
    sim.replace(ended)
    assert new_leader(sim) == []
