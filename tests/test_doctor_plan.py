"""The doctor's plan: which node tries what, from the state alone."""

from __future__ import annotations

from collections import Counter

import pytest

from proto import objects_pb2 as pb
from proto.objects_pb2 import NodeStatus
from swarm.doctor.checks import Check, Kind
from swarm.doctor.plan import NODES_TIMES_SERVICES, PEERS_EACH_MAX, PROBES_MAX, plan
from swarm.store.store import Store
from tests.doctor_swarm import Record, a_network, a_node, a_service, a_swarm, a_task, vtep


def of(checks: tuple[Check, ...], kind: Kind, node_id: str = "n1") -> list[Check]:
    return [check for check in checks if check.kind is kind and check.node_id == node_id]


def test_each_node_tries_every_other_and_the_service_s_names_and_ports() -> None:
    checks = plan(a_swarm()).checks
    assert {check.address for check in of(checks, Kind.UNDERLAY)} == {vtep("n2"), vtep("n3")}
    assert {check.address for check in of(checks, Kind.OVERLAY)} == {"10.0.1.12", "10.0.1.13"}
    assert {check.task_id for check in of(checks, Kind.OVERLAY)} == {"web1"}
    assert {check.address for check in of(checks, Kind.PUBLISHED)} == {vtep("n1"), vtep("n2"), vtep("n3")}
    assert {check.address for check in of(checks, Kind.BACKEND)} == {"10.0.1.11", "10.0.1.12", "10.0.1.13"}
    assert {(check.port, check.address) for check in of(checks, Kind.VIP)} == {(80, "10.0.1.2")}
    names = {check.name: check.expected for check in of(checks, Kind.NAMES)}
    assert names == {"web": {"10.0.1.2"}, "tasks.web": {"10.0.1.11", "10.0.1.12", "10.0.1.13"}}
    assert Counter(check.kind for check in of(checks, Kind.HOST)) == {Kind.HOST: 1}


def test_a_name_means_what_the_first_of_the_asker_s_networks_says_also_where_that_is_a_lan() -> None:
    lan = pb.Network(id="lan", spec=pb.NetworkSpec(driver="macvlan"), ipam=pb.IpamConfig(subnet="192.0.2.0/24"))
    service, task = a_service("mixed", "lan"), a_task("mixed", 1, "n1", "lan")
    service.spec.task.networks.add(network_id="net")
    service.endpoint.virtual_ips[0].CopyFrom(pb.VirtualIP(network_id="net", address="10.0.1.3/24"))
    task.networks[0].address = "192.0.2.130/24"
    task.networks.add(network_id="net", address="10.0.1.20/24")
    checks = plan(a_swarm(lan, service, task), service).checks
    names = {check.name: check.expected for check in of(checks, Kind.NAMES)}
    assert names == {"mixed": {"192.0.2.130"}, "tasks.mixed": {"192.0.2.130"}}
    assert not any(check.network_id == "lan" for check in checks)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Kind.UNDERLAY, "ping"),
        (Kind.PATH, "ping"),
        (Kind.OVERLAY, "ping"),
        (Kind.FULL, "ping"),
        (Kind.TCP, "connect"),
        (Kind.EGRESS, "ping"),
        (Kind.NAMES, "lookup"),
        (Kind.BACKEND, "connect"),
        (Kind.VIP, "connect"),
        (Kind.PUBLISHED, "connect"),
    ],
)
def test_each_check_is_one_probe(kind: Kind, what: str) -> None:
    check = of(plan(a_swarm()).checks, kind)[0]
    probe = check.probe(7)
    assert (probe.number, probe.task_id, probe.WhichOneof("what")) == (7, check.task_id, what)
    assert bool(probe.ping.full) == (kind in (Kind.PATH, Kind.FULL))


def test_nothing_is_asked_of_a_node_that_is_down_but_others_look_for_it() -> None:
    checks = plan(a_swarm(state_of_n3=NodeStatus.DOWN)).checks
    assert [check.kind for check in checks if check.node_id == "n3"] == [Kind.HOST]
    assert vtep("n3") in {check.address for check in of(checks, Kind.UNDERLAY)}
    assert "10.0.1.13" not in {check.address for check in checks}


def test_only_what_concerns_the_service_is_tried() -> None:
    store = a_swarm(a_network("other", 2), a_service("db", "other"), a_task("db", 4, "n2", "other"))
    checks = plan(store, store.services.get("db")).checks
    assert {check.node_id for check in checks} == {"n2"}
    assert {check.service_id for check in checks if check.service_id} == {"db"}


def test_a_name_has_the_addresses_of_the_first_network_of_the_asking_task_that_knows_it() -> None:
    both = a_task("both", 5, "n1", "other")
    both.networks.add(network_id="net", address="10.0.1.50/24")
    service = a_service("both", "other")
    service.spec.task.networks.add(network_id="net")
    shadow = a_service("shadow", "other")
    shadow.spec.task.networks[0].aliases.append("web")
    shadow.endpoint.virtual_ips[0].address = "10.0.2.9/24"
    store = Store.of(
        a_node("n1"), a_network("other", 2), a_network("net", 1), service, shadow, a_service("web", "net"), both
    )
    checks = plan(store).checks
    assert {check.expected for check in of(checks, Kind.NAMES) if check.name == "web"} == {frozenset({"10.0.2.9"})}


def test_on_a_dual_stack_network_both_families_are_tried() -> None:
    service = a_service("web", "net", (8000, 80))
    service.endpoint.virtual_ips[0].address6 = "fd00::2/64"
    tasks = [a_task("web", 1, "n1"), a_task("web", 2, "n2")]
    for number, task in enumerate(tasks, 1):
        task.networks[0].address6 = f"fd00::1{number}/64"
    checks = plan(Store.of(a_node("n1"), a_node("n2"), a_network("net", 1), service, *tasks)).checks
    assert {check.address for check in of(checks, Kind.OVERLAY)} == {"10.0.1.12", "fd00::12"}
    assert {check.address for check in of(checks, Kind.VIP)} == {"10.0.1.2", "fd00::2"}
    assert "fd00::12" in {check.address for check in of(checks, Kind.BACKEND)}
    names = {(check.name, check.ipv6): check.expected for check in of(checks, Kind.NAMES)}
    assert names["web", True] == {"fd00::2"}
    assert names["tasks.web", True] == {"fd00::11", "fd00::12"}
    assert names["tasks.web", False] == {"10.0.1.11", "10.0.1.12"}


def test_dnsrr_names_have_the_tasks_addresses() -> None:
    service = a_service("rr", "net")
    service.spec.endpoint.mode = pb.DNSRR
    store = Store.of(a_node("n1"), a_network("net", 1), service, a_task("rr", 1, "n1"), a_task("rr", 2, "n1"))
    assert {check.expected for check in of(plan(store).checks, Kind.NAMES)} == {frozenset({"10.0.1.11", "10.0.1.12"})}


def test_on_the_ingress_network_only_tasks_that_are_published_there_are_tried() -> None:
    records: list[Record] = [a_node("n1"), a_node("n2"), a_network("ingress", 1, ingress=True)]
    quiet: list[Record] = [
        a_service("quiet", ""),
        a_task("quiet", 1, "n1", "ingress"),
        a_task("quiet", 2, "n2", "ingress"),
    ]
    store = Store.of(*records, *quiet)
    assert not [check for check in plan(store).checks if check.kind is Kind.OVERLAY]
    loud: list[Record] = [
        a_service("loud", "", (80, 80)),
        a_task("loud", 3, "n1", "ingress"),
        a_task("loud", 4, "n2", "ingress"),
    ]
    checks = plan(Store.of(*records, *quiet, *loud)).checks
    assert {check.address for check in checks if check.kind is Kind.OVERLAY} == {"10.0.1.13", "10.0.1.14"}
    assert not [check for check in checks if check.kind is Kind.NAMES]


def test_a_port_on_one_address_is_tried_where_that_address_is() -> None:
    service = a_service("one", "net", (9000, 80))
    service.endpoint.spec.ports[0].host_ip = "198.51.100.7"
    holder = a_node("n4")
    holder.description.underlay_subnets.append("198.51.100.7/24")
    store = a_swarm(service, holder, a_task("one", 9, "n1"))
    tried = [check for check in plan(store).checks if check.kind is Kind.PUBLISHED and check.service_id == "one"]
    assert {(check.peer_id, check.address) for check in tried} == {("n4", "198.51.100.7")}


def test_ports_in_host_mode_are_tried_at_the_hosts_that_have_a_task() -> None:
    service = a_service("here", "net", (9000, 80))
    service.endpoint.spec.ports[0].mode = pb.HOST
    tried = plan(a_swarm(service, a_task("here", 9, "n2"))).checks
    published = [check for check in tried if check.kind is Kind.PUBLISHED and check.service_id == "here"]
    assert {check.peer_id for check in published} == {"n2"}
    backends = [check for check in tried if check.kind is Kind.BACKEND and check.service_id == "here"]
    assert {check.node_id for check in backends} == {"n2"}


def test_a_service_with_ports_none_of_whose_tasks_runs_is_unserved_unless_none_is_wanted() -> None:
    waiting: list[Record] = [a_service("late", "net", (9000, 80)), a_task("late", 9, "n1", state=pb.TASK_STARTING)]
    assert plan(a_swarm(*waiting)).unserved == {"late"}
    assert plan(a_swarm(a_service("none", "net", (9000, 80)))).unserved == frozenset()


def test_large_swarms_are_examined_in_bounded_parts() -> None:
    nodes = [a_node(f"n{number}") for number in range(1, 41)]
    services = [a_service(f"s{number:03}", "net", (8000 + number, 80)) for number in range(150)]
    tasks = [a_task(each.id, place, f"n{1 + place % 40}") for place, each in enumerate(services)]
    made = plan(Store.of(*nodes, a_network("net", 1), *services, *tasks))
    counts = Counter(check.node_id for check in made.checks)
    assert max(counts.values()) <= PROBES_MAX
    assert made.services_left_out == 150 - NODES_TIMES_SERVICES // 40
    kinds = Counter(check.kind for check in made.checks if check.node_id == "n7")
    assert kinds[Kind.UNDERLAY] == PEERS_EACH_MAX
    assert kinds.keys() == set(Kind), "every kind has its share"
