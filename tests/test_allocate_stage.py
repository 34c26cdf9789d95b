"""Unique numbers: subnets, VNIs, addresses, virtual IPs, published ports, node indexes."""

from __future__ import annotations

import ipaddress

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from proto import objects_pb2 as pb
from proto.objects_pb2 import Cluster, PortConfig, Service
from swarm.allocate import decide, port_conflict, subnet_conflict
from swarm.allocate.subnets import LEGS, VNI_LAST, next_vni
from swarm.store.dirty import Dirty
from swarm.store.released import as_address
from swarm.store.store import Store
from tests.simulated import Simulation, network, node, service


def allocated(sim: Simulation, name: str) -> pb.Network:
    found = sim.store.networks.get(name)
    assert found is not None
    return found


def test_networks_get_the_next_subnet_and_vni() -> None:
    sim = Simulation(network("ingress", ingress=True), network("a"), network("b"))
    sim.settle()
    got = [(n.ipam.subnet, n.ipam.gateway, n.vni) for n in (allocated(sim, name) for name in ("ingress", "a", "b"))]
    assert got == [
        ("10.255.0.0/16", "10.255.0.1", 4096),
        ("10.0.1.0/24", "10.0.1.1", 4097),
        ("10.0.2.0/24", "10.0.2.1", 4098),
    ]


def test_subnets_keep_clear_of_the_hosts_own_networks() -> None:
    at = node("n1")
    at.description.underlay_subnets.extend(["10.0.1.77/24", "10.0.2.9/23", "fe80::1/64", "nonsense"])
    sim = Simulation(at, network("a"))
    sim.settle()
    assert allocated(sim, "a").ipam.subnet == "10.0.4.0/24"


@pytest.mark.parametrize(
    ("subnet", "says"),
    [
        ("10.0.1.128/25", "overlaps 10.0.1.0/24 of network a"),
        ("10.255.3.0/24", "overlaps 10.255.0.0/16 of network ingress"),
        ("192.168.9.0/28", "overlaps 192.168.9.0/24 of node n1"),
        ("198.18.4.0/24", "of the nodes' addresses on overlays"),
        ("10.9.0.1/24", "invalid subnet '10.9.0.1/24'"),
        ("10.9.0.0/31", "too small"),
    ],
)
def test_a_users_subnet_is_honoured_or_refused_with_both_names(subnet: str, says: str) -> None:
    at = node("n1")
    at.description.underlay_subnets.append("192.168.9.11/24")
    sim = Simulation(at, network("a"))
    sim.settle()
    assert says in (subnet_conflict(sim.store, network("mine", subnet=subnet).spec) or "")
    sim.create(network("mine", subnet=subnet), service("web", 1, ["mine"]))
    sim.settle()
    assert says in allocated(sim, "mine").allocation_error
    assert allocated(sim, "mine").vni == 0
    assert says in sim.service("web").allocation_error
    assert says in sim.tasks("web")[0].status.err
    assert sim.settle() == 0


def test_an_overlap_that_goes_away_is_forgotten() -> None:
    sim = Simulation(network("a", subnet="10.7.0.0/24"))
    sim.settle()
    sim.create(network("b", subnet="10.7.0.0/16"))
    sim.settle()
    sim.remove_network("a")
    sim.settle()
    assert sim.store.networks.get("a") is None
    assert allocated(sim, "b").ipam.subnet == "10.7.0.0/16"
    assert not allocated(sim, "b").allocation_error


def test_an_exhausted_pool_says_what_to_do() -> None:
    pool = Cluster(id="c", default_addr_pool=["172.20.0.0/23"], subnet_size=24)
    store = Store.of(pool, *(network(name) for name in "abc"))
    records = [g[0].record for g in decide(store, 0.0, str, Dirty(networks={"a"})).groups]
    nets = [r for r in records if isinstance(r, pb.Network)]
    assert [n.ipam.subnet for n in nets] == ["172.20.0.0/24", "172.20.1.0/24", ""]
    assert "no free /24 is left in the address pools 172.20.0.0/23" in nets[2].allocation_error


@given(
    st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(18, 29)), max_size=12),
    st.integers(22, 28),
)
@settings(max_examples=60)
def test_the_chosen_subnet_is_the_first_that_overlaps_nothing(taken: list[tuple[int, int]], size: int) -> None:
    base = int(ipaddress.IPv4Address("172.16.0.0"))
    at = node("n1")
    at.description.underlay_subnets.extend(f"{ipaddress.IPv4Address(base + low)}/{prefix}" for low, prefix in taken)
    pool = ipaddress.IPv4Network("172.16.0.0/18")
    store = Store.of(Cluster(id="c", default_addr_pool=[str(pool)], subnet_size=size), at, network("a"))
    groups = decide(store, 0.0, str, Dirty()).groups
    used = [ipaddress.ip_interface(text).network for text in at.description.underlay_subnets]
    expected = next((net for net in pool.subnets(new_prefix=size) if not any(net.overlaps(u) for u in used)), None)
    made = groups[0][0].record
    assert isinstance(made, pb.Network)
    assert made.ipam.subnet == (str(expected) if expected else "")


def test_vnis_are_serial_and_return_to_gaps_at_the_end() -> None:
    assert next_vni(set(), (), ingress=True) == 4096
    assert next_vni(set(), (), ingress=False) == 4097
    assert next_vni({4096, 4097}, (4200,), ingress=False) == 4201
    assert next_vni({4096, 4097, 4099, VNI_LAST}, (), ingress=False) == 4098


def test_when_all_vnis_were_given_the_one_that_has_been_free_the_longest_is_given_again() -> None:
    last = 4100
    assert next_vni({4096, 4097, 4100}, (4099, 4098), ingress=False, last=last) == 4099
    assert next_vni(set(range(4096, last + 1)), (), ingress=False, last=last) is None


def test_nodes_are_numbered_from_one_and_gaps_are_filled() -> None:
    first, third = node("b"), node("c")
    first.index, third.index = 1, 3
    sim = Simulation(first, third, node("a"), node("d"))
    sim.settle()
    assert {n.id: n.index for n in sim.store.nodes} == {"b": 1, "c": 3, "a": 2, "d": 4}


# ---- addresses


def test_each_task_and_service_has_one_address_per_network() -> None:
    sim = Simulation(node("n1"), network("ingress", ingress=True), network("a"), network("b"))
    web = service("web", 2, ["a", "b"])
    web.spec.task.networks[0].aliases.append("www")
    sim.create(web)
    sim.settle()
    vips = {vip.network_id: vip.address for vip in sim.service("web").endpoint.virtual_ips}
    assert vips == {"a": "10.0.1.2/24", "b": "10.0.2.2/24"}
    assert [[(leg.network_id, leg.address) for leg in task.networks] for task in sim.tasks("web")] == [
        [("a", "10.0.1.3/24"), ("b", "10.0.2.3/24")],
        [("a", "10.0.1.4/24"), ("b", "10.0.2.4/24")],
    ]
    assert list(sim.tasks("web")[0].networks[0].aliases) == ["www"]


@pytest.mark.parametrize(
    ("own", "port", "joined"),
    [
        ([], 0, ["ingress"]),
        (["a"], 8000, ["a"]),
        (["inner"], 0, ["inner"]),
        (["inner"], 8000, ["inner", "ingress"]),
        (["inner", "a"], 8000, ["inner", "a"]),
    ],
)
def test_a_task_joins_the_ingress_network_only_when_it_must(own: list[str], port: int, joined: list[str]) -> None:
    inner = network("inner", internal=True)
    web = service("web", 1, own)
    if port:
        web.spec.endpoint.ports.add(target_port=80, published_port=port)
    sim = Simulation(node("n1"), network("ingress", ingress=True), network("a"), inner, web)
    sim.settle()
    assert [leg.network_id for leg in sim.tasks("web")[0].networks] == joined
    assert [vip.network_id for vip in sim.service("web").endpoint.virtual_ips] == own


def test_dnsrr_has_no_virtual_ip_and_a_change_of_mode_frees_it() -> None:
    sim = Simulation(node("n1"), network("a"), service("web", 1, ["a"]))
    sim.settle()

    def change(spec: pb.ServiceSpec) -> None:
        spec.endpoint.mode = pb.DNSRR

    sim.update_spec("web", change)
    sim.settle()
    assert not sim.service("web").endpoint.virtual_ips


def test_exhaustion_is_told_and_ends_when_an_address_is_freed() -> None:
    sim = Simulation(node("n1"), network("tiny", subnet="10.9.0.0/29"), service("web", 5, ["tiny"]))
    sim.run()
    assert len(sim.running("web")) == 4  # eight less network, broadcast, gateway, VIP
    stuck = next(task for task in sim.runnable("web") if task.status.state == pb.TASK_NEW)
    assert stuck.status.err.startswith("no free address in 10.9.0.0/29 of network tiny (5 in use): scale down")
    sim.create(service("late", 1, ["tiny"]))
    sim.settle()
    assert sim.service("late").allocation_error.startswith("no virtual IP: no free address in 10.9.0.0/29")
    sim.scale("web", 2)
    sim.run()
    assert len(sim.running("late")) == 1
    assert not sim.service("late").allocation_error


def test_a_freed_address_is_not_given_again_at_once() -> None:
    sim = Simulation(node("n1"), network("a", subnet="10.9.0.0/28"), service("web", 1, ["a"]))
    given = []
    for _ in range(8):
        sim.run()
        task = sim.running("web")[0]
        given.append(task.networks[0].address)
        sim.report(task, pb.TASK_FAILED)
    assert len(set(given)) == 8


@pytest.mark.parametrize("history", [0, 5])
def test_a_freed_address_is_given_last_whoever_leads_and_whether_or_not_its_task_is_remembered(history: int) -> None:
    """10.9.0.0/28 has 13 addresses: one is the VIP, 3 tasks are there, so 9 were never given."""
    sim = Simulation(node("n1"), network("a", subnet="10.9.0.0/28"), service("web", 3, ["a"]))
    sim.set_history_limit(history)
    sim.run()
    first = {task.networks[0].address for task in sim.running("web")}
    sim.scale("web", 0)  # they are forgotten at once
    sim.run()
    assert not sim.tasks("web")
    sim.store.load(list(sim.store.dump()))  # what a manager that starts anew, or gets a snapshot, knows
    sim.scale("web", 12)
    sim.settle()
    given = [task.networks[0].address for task in sorted(sim.tasks("web"), key=lambda task: task.slot)]
    assert len(given) == 12
    assert set(given[:9]).isdisjoint(first)
    assert given[9:] == sorted(first)


def test_what_was_freed_first_is_given_first() -> None:
    sim = Simulation(node("n1"), network("a", subnet="10.9.0.0/29"), service("web", 4, ["a"]))
    sim.run()
    ended = sim.running("web")[2].networks[0].address, sim.running("web")[0].networks[0].address
    for address in ended:
        task = next(task for task in sim.running("web") if task.networks[0].address == address)
        sim.report(task, pb.TASK_SHUTDOWN)
    assert [as_address(number) + "/29" for number in sim.store.released.of("a")] == list(ended)


def test_a_subnet_of_24_bits_holds_250_tasks_without_any_address_for_nodes() -> None:
    nodes = [node(f"n{number}", cpus=100) for number in range(5)]
    sim = Simulation(*nodes, network("a"), service("web", 250, ["a"]))
    sim.run()
    assert len(sim.running("web")) == 250
    assert {task.networks[0].address.rpartition(".")[0] for task in sim.running("web")} == {"10.0.1"}


def test_an_ip_range_bounds_what_is_handed_out() -> None:
    ranged = network("a", subnet="10.9.0.0/24")
    ranged.spec.ipam.ip_range = "10.9.0.128/25"
    sim = Simulation(node("n1"), ranged, service("web", 1, ["a"]))
    sim.settle()
    assert sim.tasks("web")[0].networks[0].address == "10.9.0.129/24"


# ---- ports


def publishing(name: str, *ports: PortConfig) -> Service:
    made = service(name, 1)
    made.spec.endpoint.ports.extend(ports)
    return made


def numbers(sim: Simulation, name: str) -> list[int]:
    return [port.published_port for port in sim.service(name).endpoint.spec.ports]


def test_open_ports_get_the_first_free_number_per_protocol_and_keep_it() -> None:
    sim = Simulation(node("n1"), publishing("a", PortConfig(target_port=80), PortConfig(target_port=81)))
    sim.settle()
    sim.create(
        publishing("b", PortConfig(target_port=80), PortConfig(target_port=53, protocol=pb.UDP)),
        publishing("c", PortConfig(target_port=9, published_port=30003)),
        publishing("d", PortConfig(target_port=80), PortConfig(target_port=81, published_port=30004)),
    )
    sim.settle()
    assert [numbers(sim, name) for name in "abcd"] == [[30000, 30001], [30002, 30000], [30003], [30005, 30004]]
    sim.remove_service("a")
    sim.run()

    def change(spec: pb.ServiceSpec) -> None:
        spec.endpoint.ports.add(target_port=8080)

    sim.update_spec("b", change)
    sim.settle()
    assert numbers(sim, "b") == [30002, 30000, 30000]  # tcp, udp, and the tcp number that "a" freed


def test_a_task_carries_the_numbers_chosen() -> None:
    sim = Simulation(node("n1"), publishing("a", PortConfig(target_port=80)))
    sim.settle()
    assert [port.published_port for port in sim.tasks("a")[0].endpoint.ports] == [30000]


@pytest.mark.parametrize(
    ("first", "second", "conflict"),
    [
        (pb.INGRESS, pb.INGRESS, "port '80' is already in use by service 'a' (a) as an ingress port"),
        (pb.INGRESS, pb.HOST, "port '80' is already in use by service 'a' (a) as an ingress port"),
        (pb.HOST, pb.INGRESS, "port '80' is already in use by service 'a' (a) as a host-published port"),
        (pb.HOST, pb.HOST, None),  # on different nodes both can have it
    ],
)
def test_port_conflicts(
    first: pb.PublishMode.ValueType, second: pb.PublishMode.ValueType, conflict: str | None
) -> None:
    held = PortConfig(target_port=1, published_port=80, mode=first)
    asked = PortConfig(target_port=2, published_port=80, mode=second)
    sim = Simulation(node("n1"), node("n2"), publishing("a", held))
    assert port_conflict(sim.store, "", [asked]) == conflict  # asked for, not given yet: counts as well
    sim.settle()
    assert port_conflict(sim.store, "", [asked]) == conflict
    assert port_conflict(sim.store, "a", [asked]) is None
    udp = PortConfig(target_port=2, published_port=80, protocol=pb.UDP)
    assert port_conflict(sim.store, "", [udp]) is None
    sim.create(publishing("b", asked))  # slipped past validation
    sim.settle()
    assert sim.service("b").allocation_error.startswith(conflict or "")
    if conflict:
        sim.remove_service("a")
        sim.run()
        assert numbers(sim, "b") == [80]
        assert not sim.service("b").allocation_error


def test_ports_on_different_addresses_do_not_meet_and_one_without_an_address_meets_all() -> None:
    sim = Simulation(node("n1"), publishing("a", PortConfig(target_port=1, published_port=80, host_ip="192.0.2.1")))
    sim.settle()
    asked = {
        ip: PortConfig(target_port=2, published_port=80, host_ip=ip) for ip in ("", "192.0.2.1", "192.0.2.2", "::1")
    }
    assert [ip for ip, port in asked.items() if port_conflict(sim.store, "", [port])] == ["", "192.0.2.1"]
    sim.create(publishing("b", asked["192.0.2.2"]), publishing("c", PortConfig(target_port=80, host_ip="192.0.2.9")))
    sim.settle()
    assert (numbers(sim, "b"), numbers(sim, "c")) == ([80], [30000])


def test_balance_and_weights_are_a_part_of_the_endpoint_and_follow_the_spec() -> None:
    web = publishing("web", PortConfig(target_port=80))
    sim = Simulation(node("n1"), web)
    sim.settle()

    def change(spec: pb.ServiceSpec) -> None:
        spec.endpoint.balance, spec.endpoint.weight_label = pb.SOURCE_HASH, "node.labels.size"

    sim.update_spec("web", change)
    sim.settle()
    given = sim.service("web").endpoint.spec
    assert (given.balance, given.weight_label, numbers(sim, "web")) == (pb.SOURCE_HASH, "node.labels.size", [30000])


def test_the_legs_range_is_never_given_to_a_network() -> None:
    store = Store.of(Cluster(id="c", default_addr_pool=[str(LEGS)], subnet_size=24), network("a"))
    made = decide(store, 0.0, str, Dirty()).groups[0][0].record
    assert isinstance(made, pb.Network)
    assert made.allocation_error


def test_the_reason_why_a_service_waits_is_the_present_one() -> None:
    """Found by the machine: its address is not there yet, and meanwhile a younger service takes its port, too."""
    sim = Simulation(node("n1"), network("tiny", subnet="10.0.9.0/29"), service("full", 5, ["tiny"]))
    sim.settle()
    for name, joins in (("s0", ["tiny"]), ("s1", [])):
        made = service(name, 1, joins)
        made.spec.endpoint.ports.add(target_port=80, published_port=8080)
        sim.create(made)
        sim.settle()
    assert sim.service("s1").allocation_error == ""
    assert "8080" in sim.service("s0").allocation_error
    assert sim.overlooked() == []
