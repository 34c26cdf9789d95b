"""Kinds of networks: predefined, dual stack, macvlan; what tasks and services get on each of them."""

from __future__ import annotations

import ipaddress

import hypothesis.strategies as st
import pytest
from hypothesis import given

from proto import objects_pb2 as pb
from swarm.allocate import decide
from swarm.allocate.addresses import Span
from swarm.allocate.subnets import VNI_OPTION, subnet_conflict, ula_prefix
from swarm.store.dirty import Dirty
from swarm.store.store import Store
from tests.simulated import Simulation, network, node, service


def named(sim: Simulation, name: str) -> pb.Network:
    found = sim.store.networks.by_name(name)
    assert found is not None
    return found


def dual(network_id: str, subnet: str = "", subnet6: str = "") -> pb.Network:
    made = network(network_id, subnet=subnet)
    made.spec.ipv6 = True
    made.spec.ipam6.subnet = subnet6
    return made


def macvlan(network_id: str, subnet: str = "192.168.9.0/24") -> pb.Network:
    made = network(network_id, subnet=subnet)
    made.spec.driver = "macvlan"
    made.spec.options["parent"] = "eth0"
    return made


# ---- predefined


def test_every_swarm_has_the_nodes_own_networks_once() -> None:
    sim = Simulation(node("n1"))
    sim.settle()
    assert {net.spec.annotations.name: net.spec.driver for net in sim.store.networks if not net.spec.ingress} == {
        "bridge": "bridge",
        "host": "host",
        "none": "none",
    }
    known = {net.id for net in sim.store.networks}
    assert sim.overlooked() == []
    assert {net.id for net in sim.store.networks} == known
    assert not any(net.vni or net.ipam.subnet for net in sim.store.networks if not net.spec.ingress)


@pytest.mark.parametrize("name", ["host", "none", "bridge"])
def test_tasks_on_a_nodes_own_network_get_no_address_and_no_ingress_network(name: str) -> None:
    sim = Simulation(node("n1"))
    sim.settle()
    web = service("web", 2, [named(sim, name).id])
    web.spec.endpoint.ports.add(target_port=80, published_port=8080, mode=pb.HOST)
    sim.create(web)
    sim.settle()
    assert not sim.service("web").endpoint.virtual_ips
    assert not sim.service("web").allocation_error
    for task in sim.tasks("web"):
        assert [(leg.network_id, leg.address) for leg in task.networks] == [(named(sim, name).id, "")]


@pytest.mark.parametrize(
    ("own", "mode", "joins_ingress"),
    [
        ("bridge", pb.HOST, False),
        ("bridge", pb.INGRESS, True),
        ("macvlan", None, False),
        ("macvlan", pb.HOST, True),
        ("macvlan", pb.INGRESS, True),
        ("overlay", pb.INGRESS, False),
        ("internal", pb.HOST, True),
        ("host", pb.INGRESS, False),  # the API refuses it; nothing is done that would make it look right
    ],
)
def test_published_traffic_comes_by_the_ingress_network_where_no_own_one_carries_it(
    own: str, mode: pb.PublishMode.ValueType | None, joins_ingress: bool
) -> None:
    sim = Simulation(node("n1"), macvlan("macvlan"), network("overlay"), network("internal", internal=True))
    sim.settle()
    web = service("web", 1, [named(sim, own).id])
    if mode is not None:
        web.spec.endpoint.ports.add(target_port=80, published_port=8080, mode=mode)
    sim.create(web)
    sim.settle()
    joined = [leg.network_id for leg in sim.tasks("web")[0].networks]
    assert joined == [named(sim, own).id, *(["ingress"] if joins_ingress else [])]


def test_without_an_ingress_network_the_services_that_need_it_say_so_and_go_on_when_there_is_one() -> None:
    sim = Simulation(node("n1"), network("a"))
    sim.settle()
    sim.remove_network("ingress")
    sim.settle()
    sim.create(service("alone", 1), service("web", 1, ["a"]))
    sim.run()
    assert sim.store.networks.get("ingress") is None
    assert len(sim.running("web")) == 1
    assert "network create --ingress" in sim.tasks("alone")[0].status.err
    again = network("edge", ingress=True, subnet="10.20.0.0/20")
    sim.create(again)
    sim.run()
    assert [task.networks[0].address for task in sim.running("alone")] == ["10.20.0.2/20"]
    assert named(sim, "edge").vni == 4098  # 4096 was just given back


@pytest.mark.parametrize(
    ("pools", "subnet"),
    [
        (["10.0.0.0/8"], "10.255.0.0/16"),
        (["172.20.0.0/16"], "172.20.0.0/24"),  # whoever gives other pools has other uses for 10.0.0.0/8
        (["172.20.0.0/16", "10.0.0.0/8"], "10.255.0.0/16"),
        (["10.255.0.0/16"], "10.255.0.0/24"),
    ],
)
def test_the_ingress_network_keeps_to_the_swarms_pools(pools: list[str], subnet: str) -> None:
    store = Store.of(pb.Cluster(id="c", default_addr_pool=pools, subnet_size=24), network("in", ingress=True))
    (made,) = (group[0].record for group in decide(store, 0.0, str, Dirty(networks={"in"})).groups)
    assert isinstance(made, pb.Network)
    assert made.ipam.subnet == subnet


def test_networks_may_have_the_pool_that_is_the_ingress_networks_default() -> None:
    store = Store.of(pb.Cluster(id="c", default_addr_pool=["10.255.0.0/16"], subnet_size=24), network("a"))
    (made,) = (group[0].record for group in decide(store, 0.0, str, Dirty(networks={"a"})).groups)
    assert isinstance(made, pb.Network)
    assert made.ipam.subnet == "10.255.0.0/24"


# ---- dual stack


def test_a_dual_stack_network_gives_every_holder_both_addresses_with_one_host_number() -> None:
    sim = Simulation(node("n1"), dual("a"), dual("b"), service("web", 2, ["a"]))
    sim.settle()
    prefix = ula_prefix("cluster")
    subnets = [ipaddress.IPv6Network(named(sim, name).ipam6.subnet) for name in ("a", "b")]
    assert subnets == list(prefix.subnets(new_prefix=64))[:2]
    assert named(sim, "a").ipam6.gateway == str(subnets[0].network_address + 1)
    vip = sim.service("web").endpoint.virtual_ips[0]
    held = [(vip.address, vip.address6)]
    held += [(leg.address, leg.address6) for task in sim.tasks("web") for leg in task.networks]
    assert held == [(f"10.0.1.{n}/24", f"{subnets[0].network_address + n}/64") for n in (2, 3, 4)]


def test_the_prefix_of_a_swarm_is_its_own_and_unique_local() -> None:
    assert ula_prefix("one") != ula_prefix("other")
    for cluster_id in ("", "one", "other"):
        assert ula_prefix(cluster_id).prefixlen == 48
        assert ula_prefix(cluster_id).subnet_of(ipaddress.IPv6Network("fd00::/8"))


def test_ipv6_subnets_that_meet_are_refused_and_ipv4_ones_do_not_meet_them() -> None:
    at = node("n1")
    at.description.underlay_subnets.append("fd01::11/64")
    sim = Simulation(at, dual("a", "10.7.0.0/24", "fd00:7::/64"))
    sim.settle()
    assert "overlaps fd00:7::/64 of network a" in (subnet_conflict(sim.store, dual("b", "", "fd00:7::/96").spec) or "")
    assert "of node n1" in (subnet_conflict(sim.store, dual("b", "", "fd01::/48").spec) or "")
    assert subnet_conflict(sim.store, dual("b", "10.8.0.0/24", "fd00:8::/64").spec) is None


addresses6 = st.integers(1, 14).map(lambda number: f"fd00:7::{number:x}")


@given(st.sets(st.integers(1, 14), max_size=3), st.sets(addresses6, max_size=3), st.booleans(), st.booleans())
def test_gateways_and_reserved_addresses_of_both_families_are_never_given(
    aux: set[int], aux6: set[str], ranged: bool, ranged6: bool
) -> None:
    made = dual("a", "10.9.0.0/28", "fd00:7::/64")
    made.spec.ipam.gateway, made.spec.ipam6.gateway = "10.9.0.14", "fd00:7::5"
    for number in aux:
        made.spec.ipam.aux_addresses[f"h{number}"] = f"10.9.0.{number}"
    for address in aux6:
        made.spec.ipam6.aux_addresses[address] = address
    made.spec.ipam.ip_range = "10.9.0.8/29" if ranged else ""
    made.spec.ipam6.ip_range = "fd00:7::/112" if ranged6 else ""
    sim = Simulation(node("n1", cpus=99), made, service("web", 16, ["a"]))
    sim.settle()
    legs = [leg for task in sim.tasks("web") for leg in task.networks] + list(sim.service("web").endpoint.virtual_ips)
    four = {ipaddress.ip_interface(leg.address).ip for leg in legs if leg.address}
    six = {ipaddress.ip_interface(leg.address6).ip for leg in legs if leg.address6}
    never = {"10.9.0.0", "10.9.0.14", "10.9.0.15", *(f"10.9.0.{number}" for number in aux)}
    never6 = {"fd00:7::", "fd00:7::5", *aux6}
    assert four.isdisjoint(map(ipaddress.ip_address, never))
    assert six.isdisjoint(map(ipaddress.ip_address, never6))
    assert len(four) == len(six)
    assert all(address in ipaddress.ip_network(made.spec.ipam.ip_range or "10.9.0.0/28") for address in four)
    assert all(address in ipaddress.ip_network(made.spec.ipam6.ip_range or "fd00:7::/64") for address in six)
    net = named(sim, "a")
    span = Span.of(net)
    assert len(four) == sum(span.holds(number) for number in range(span.first, span.last + 1))  # all were given


# ---- macvlan


def test_a_macvlan_network_gives_addresses_of_the_lan_but_no_vip_no_vni_and_no_address_of_a_node() -> None:
    at = node("n1")
    at.description.underlay_subnets.append("192.168.9.3/24")
    sim = Simulation(at, macvlan("lan"), network("a"), service("web", 2, ["lan", "a"]))
    sim.settle()
    assert [vip.network_id for vip in sim.service("web").endpoint.virtual_ips] == ["a"]
    assert named(sim, "lan").vni == 0
    given = [leg.address for task in sim.tasks("web") for leg in task.networks if leg.network_id == "lan"]
    assert given == ["192.168.9.2/24", "192.168.9.4/24"]
    assert "of network lan" in (subnet_conflict(sim.store, network("b", subnet="192.168.9.128/25").spec) or "")
    assert "of network lan" in (subnet_conflict(sim.store, macvlan("c").spec) or "")


def test_a_gateway_that_is_chosen_is_none_of_the_addresses_that_are_used_elsewhere() -> None:
    asked = network("a", subnet="10.43.0.0/24")
    asked.spec.ipam.aux_addresses.update({"router": "10.43.0.1", "printer": "10.43.0.2"})
    asked.spec.ipam6.CopyFrom(pb.IpamConfig(subnet="fd00:43::/64", aux_addresses={"router": "fd00:43::1"}))
    sim = Simulation(asked)
    sim.settle()
    assert (named(sim, "a").ipam.gateway, named(sim, "a").ipam6.gateway) == ("10.43.0.3", "fd00:43::2")
    full = network("b", subnet="10.44.0.0/29")
    full.spec.ipam.aux_addresses.update({str(number): f"10.44.0.{number}" for number in range(1, 7)})
    sim.create(full)
    sim.settle()
    assert named(sim, "b").ipam.gateway == "10.44.0.1", "of no use, and harmless"


# ---- VNIs


def test_a_vni_may_be_asked_for_and_is_held_once() -> None:
    asked = network("a")
    asked.spec.options[VNI_OPTION] = "777"
    sim = Simulation(asked, network("b"))
    sim.settle()
    assert (named(sim, "a").vni, named(sim, "b").vni) == (777, 4097)
    assert "network a has this VNI" in (subnet_conflict(sim.store, asked.spec) or "")


def test_the_vni_of_a_removed_network_is_not_the_next_ones() -> None:
    sim = Simulation(network("a"))
    sim.settle()
    assert named(sim, "a").vni == 4097
    sim.remove_network("a")
    sim.settle()
    sim.create(network("b"))
    sim.settle()
    assert named(sim, "b").vni == 4098


def test_a_store_that_was_never_allocated_in_has_nothing_to_say_of_what_was_released() -> None:
    assert Store().released.of("a") == []


def test_a_virtual_ip_that_a_service_gives_up_goes_to_the_one_that_waits() -> None:
    sim = Simulation(node("n1"), network("tiny", subnet="10.0.9.0/29"))
    for number in range(5):
        sim.create(service(f"s{number}", 0, ["tiny"]))
    sim.settle()
    sim.create(service("late", 0, ["tiny"]))
    sim.settle()
    assert "no free address" in sim.service("late").allocation_error
    sim.update_spec("s0", lambda spec: spec.task.ClearField("networks"))
    sim.settle()
    assert sim.service("late").endpoint.virtual_ips[0].address
