"""Networks as people see them: Docker's JSON."""

from __future__ import annotations

import pytest

from proto import objects_pb2 as pb
from swarm.cli.network_shape import network_json, services_on
from tests.test_cli_render import node, service


def test_network_json_has_both_families_peers_and_with_verbose_the_services_on_it() -> None:
    network = pb.Network(id="n", ipam=pb.IpamConfig(subnet="10.0.1.0/24", gateway="10.0.1.1"), vni=4097)
    network.ipam6.CopyFrom(pb.IpamConfig(subnet="fd00::/64", gateway="fd00::1", aux_addresses={"r": "fd00::9"}))
    network.spec.ipv6 = True
    web = service()
    web.spec.task.networks.add(network_id="n")
    web.endpoint.virtual_ips.add(network_id="n", address="10.0.1.2/24", address6="fd00::2/64")
    task = pb.Task(id="t1", service_id=web.id, slot=1, node_id="w", service_annotations=web.spec.annotations)
    task.networks.add(network_id="n", address="10.0.1.3/24", address6="fd00::3/64")
    task.status.state = pb.TASK_RUNNING
    at = node("w")
    at.data_path_addr = "192.0.2.7"
    network.nodes.add(name="w1", addr="192.0.2.7")
    shape = network_json(network)
    assert shape["EnableIPv6"] is True
    assert shape["IPAM"]["Config"] == [
        {"Subnet": "10.0.1.0/24", "Gateway": "10.0.1.1"},
        {"Subnet": "fd00::/64", "Gateway": "fd00::1", "AuxiliaryAddresses": {"r": "fd00::9"}},
    ]
    assert shape["Options"] == {"com.docker.network.driver.overlay.vxlanid_list": "4097"}
    assert shape["Peers"] == [{"Name": "w1", "IP": "192.0.2.7"}]
    assert "Services" not in shape
    shown = network_json(network, [web], [task], [at])["Services"][web.spec.annotations.name]
    assert (shown["VIP"], shown["VIPv6"]) == ("10.0.1.2", "fd00::2")
    assert [(each["EndpointIP"], each["EndpointIPv6"], each["Info"]) for each in shown["Tasks"]] == [
        ("10.0.1.3", "fd00::3", {"Host IP": "192.0.2.7"})
    ]


def test_services_that_name_no_network_are_on_the_one_that_their_tasks_joined() -> None:
    ingress, web, other = pb.Network(id="in"), service(), pb.Service(id="other")
    task = pb.Task(service_id=web.id, networks=[pb.NetworkAttachment(network_id="in")])
    assert services_on(ingress, [web, other]) == []
    assert services_on(ingress, [web, other], [task]) == []
    task.status.state = pb.TASK_RUNNING
    assert services_on(ingress, [web, other], [task]) == [web]


@pytest.mark.parametrize("name", ["host", "none", "bridge"])
def test_predefined_networks_are_shown_in_dockers_words(name: str) -> None:
    network = pb.Network(spec=pb.NetworkSpec(driver=name))
    shape = network_json(network)
    assert (shape["Driver"], shape["Scope"]) == ("null" if name == "none" else name, "local")
    assert shape["IPAM"]["Config"] == []
