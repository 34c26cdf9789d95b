"""Networks through the control API: what a spec may say, what services may ask of networks, removal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import pytest

from proto import control_pb2 as pb
from proto import objects_pb2 as objects
from proto.objects_pb2 import IpamConfig, Network, NetworkSpec, Node, NodeStatus, ServiceSpec, Task
from swarm.api.validate_network import network_spec
from swarm.errors import Invalid
from swarm.store.changes import Remove
from tests.managing import Managers, a_cluster, a_network, a_node, a_spec, managing
from tests.test_api_services import create, refused
from tests.waiting import until

# ---------------------------------------------------------------- specs


def a_network_spec(driver: str = "overlay", **ipam: str) -> NetworkSpec:
    spec = NetworkSpec(driver=driver)
    spec.annotations.name = "front"
    for key, value in ipam.items():
        field, _, version = key.partition("_v")
        setattr(spec.ipam6 if version else spec.ipam, field, value)
    return spec


def a_macvlan(**options: str) -> NetworkSpec:
    spec = a_network_spec("macvlan", subnet="192.168.9.0/24")
    spec.options.update({"parent": "eth0", **options})
    return spec


def test_good_networks() -> None:
    network_spec(a_network_spec())
    network_spec(a_network_spec(subnet="10.9.0.0/16", gateway="10.9.0.1", ip_range="10.9.5.0/24"))
    network_spec(a_network_spec(subnet_v6="fd00::/64", gateway_v6="fd00::1", ip_range_v6="fd00::/96"))
    network_spec(a_macvlan(macvlan_mode="private"))
    made = a_network_spec()
    made.ingress = True
    made.annotations.name = "ingress"
    made.options.update({"encrypted": "", "com.docker.network.driver.overlay.vxlanid_list": "777"})
    network_spec(made)


@pytest.mark.parametrize(
    ("ipam", "message"),
    [
        ({"subnet": "10.0.0.1/24"}, "has host bits set"),
        ({"subnet": "banana"}, "invalid subnet 'banana'"),
        ({"subnet_v6": "10.0.0.0/24"}, "write it like fd00:9::/64"),
        ({"subnet": "10.0.0.0/30"}, "from /8 to /29"),
        ({"subnet_v6": "fd00::/120"}, "from /16 to /104"),
        ({"subnet": "224.0.0.0/24"}, "reserved"),
        ({"subnet_v6": "fe80::/64"}, "reserved"),
        ({"gateway": "10.0.0.1"}, "need a subnet"),
        ({"subnet": "10.0.0.0/24", "gateway": "10.0.1.1"}, "not a host address"),
        ({"subnet": "10.0.0.0/24", "gateway": "10.0.0.255"}, "not a host address"),
        ({"subnet_v6": "fd00::/64", "gateway_v6": "fd00::"}, "not a host address"),
        ({"subnet": "10.0.0.0/24", "ip_range": "10.0.1.0/25"}, "not within"),
        ({"subnet_v6": "fd00::/64", "ip_range_v6": "fd00::/112"}, "up to /104"),
    ],
)
def test_bad_addresses_of_networks(ipam: dict[str, str], message: str) -> None:
    with pytest.raises(Invalid, match=message):
        network_spec(a_network_spec(**ipam))


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        ({"r": "10.0.0.1"}, "aux address r=10.0.0.1 is the gateway"),
        ({"r": "10.0.1.9"}, "aux address r 10.0.1.9 is not a host address"),
        ({"r": "router"}, "invalid aux address r 'router'"),
        ({f"h{number}": "10.0.0.9" for number in range(1001)}, "use at most 1000"),
    ],
)
def test_bad_reserved_addresses(aux: dict[str, str], message: str) -> None:
    spec = a_network_spec()
    spec.ipam.CopyFrom(IpamConfig(subnet="10.0.0.0/24", gateway="10.0.0.1", aux_addresses=aux))
    with pytest.raises(Invalid, match=message):
        network_spec(spec)


def ingress(**fields: bool) -> Callable[[NetworkSpec], None]:
    def change(spec: NetworkSpec) -> None:
        spec.ingress = True
        for field, value in fields.items():
            setattr(spec, field, value)

    return change


def option(name: str, value: str, driver: str = "overlay") -> Callable[[NetworkSpec], None]:
    def change(spec: NetworkSpec) -> None:
        spec.CopyFrom(a_network_spec() if driver == "overlay" else a_macvlan())
        spec.options[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: setattr(s, "driver", "ipvlan"), "driver 'ipvlan' is not known: use one of overlay, macvlan"),
        (lambda s: setattr(s, "driver", "bridge"), "exists in every swarm"),
        (lambda s: setattr(s, "driver", "macvlan"), "--opt parent=eth0"),
        (lambda s: s.CopyFrom(a_network_spec("macvlan")), "--opt parent=eth0"),
        (ingress(internal=True), "neither internal nor attachable"),
        (ingress(attachable=True), "neither internal nor attachable"),
        (lambda s: setattr(s.annotations, "name", "host"), "predefined"),
        (lambda s: setattr(s.annotations, "name", "Ingress"), "predefined"),
        (option("com.docker.network.driver.mtu", "12"), "number of bytes"),
        (option("mtu", "1400"), "option mtu is not known to network driver overlay: use one of com.docker"),
        (option("encrypted", "no"), "option encrypted=no: write encrypted alone"),
        (option("com.docker.network.driver.overlay.vxlanid_list", "1,2"), "use one VNI from 1 to 16777215"),
        (option("encrypted", "", "macvlan"), "not known to network driver macvlan"),
        (option("parent", "a link", "macvlan"), "the name of a link"),
        (option("macvlan_mode", "l2", "macvlan"), "use one of bridge, private, vepa, passthru"),
    ],
)
def test_bad_network_specs(change: Callable[[NetworkSpec], object], message: str) -> None:
    spec = a_network_spec()
    change(spec)
    with pytest.raises(Invalid, match=message):
        network_spec(spec)


def test_a_macvlan_network_is_told_the_lans_addresses() -> None:
    spec = a_macvlan()
    spec.ipam.Clear()
    with pytest.raises(Invalid, match="give --subnet, and --ip-range"):
        network_spec(spec)
    spec = a_macvlan()
    spec.ipv6 = True
    with pytest.raises(Invalid, match="IPv6 --subnet"):
        network_spec(spec)


def test_ipv6_needs_a_larger_mtu() -> None:
    spec = a_network_spec(subnet_v6="fd00::/64")
    spec.options["com.docker.network.driver.mtu"] = "1200"
    with pytest.raises(Invalid, match="from 1280"):
        network_spec(spec)


# ---------------------------------------------------------------- services on them


def predefined(name: str) -> Network:
    made = a_network(f"{name}-id", name)
    made.spec.driver, made.vni = name, 0
    return made


def on(*names: str, ports: tuple[objects.PortConfig, ...] = (), aliases: tuple[str, ...] = ()) -> ServiceSpec:
    spec = a_spec()
    for name in names:
        spec.task.networks.add(network_id=name, aliases=aliases)
    spec.endpoint.ports.extend(ports)
    return spec


INGRESS_PORT = objects.PortConfig(target_port=80)
HOST_PORT = objects.PortConfig(target_port=80, published_port=8080, mode=objects.HOST)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (on("host", "front"), "network host excludes every other network"),
        (on("none", "bridge"), "network none excludes every other network"),
        (on("host", aliases=("db",)), "network host has no names"),
        *(
            (on("front", aliases=(bad,)), f"alias {bad!r} on network front: nobody could ask")
            for bad in ("", "a..b", "a b", "x" * 64, "tab\t")
        ),
        (on("host", ports=(INGRESS_PORT,)), "publish it with mode=host"),
        (on("host", ports=(HOST_PORT,)), "published as it is: leave the number out, or use 80"),
        (on("none", ports=(HOST_PORT,)), "no network at all"),
        (on("ingress"), "cannot be attached to network ingress explicitly"),
    ],
)
async def test_what_networks_cannot_do_is_refused(spec: ServiceSpec, message: str) -> None:
    known = [predefined(name) for name in ("host", "none", "bridge")]
    async with managing(a_cluster(), a_network("net1", "front"), *known) as made:
        code, said = await refused(made.stubs["m1"].CreateService(pb.ServiceRequest(spec=spec)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message in said
        assert not list(made.store.services)


async def test_a_port_on_the_hosts_network_is_published_as_it_is() -> None:
    async with managing(a_cluster(), predefined("host")) as made:
        port = objects.PortConfig(target_port=80, mode=objects.HOST)
        service = await create(made, on("host", ports=(port,)))
        assert [each.published_port for each in service.spec.endpoint.ports] == [80]


async def test_addresses_to_publish_on_have_one_spelling_and_any_address_is_none() -> None:
    async with managing(a_cluster()) as made:
        ports = [objects.PortConfig(target_port=80, host_ip=text) for text in ("0.0.0.0", "::", "2001:DB8::0:1")]
        service = await create(made, on(ports=tuple(ports)))
        assert [port.host_ip for port in service.spec.endpoint.ports] == ["", "", "2001:db8::1"]


async def test_warnings_tell_what_the_nodes_cannot_do() -> None:
    at = a_node("n1")
    at.description.balancer = "nftables"
    at.description.underlay_subnets.append("192.0.2.7/24")
    async with managing(a_cluster(), at) as made:
        spec = on(ports=(objects.PortConfig(target_port=80, host_ip="192.0.2.8"),))
        spec.endpoint.balance = objects.LEAST_CONNECTIONS
        reply = await made.stubs["m1"].CreateService(pb.ServiceRequest(spec=spec))
        assert list(reply.warnings) == [
            "these nodes have no IPVS and take turns instead: n1",
            "no node has the address 192.0.2.8 to publish port 80 on",
        ]
        spec.annotations.name = "fine"
        spec.endpoint.balance, spec.endpoint.ports[0].host_ip = objects.SOURCE_HASH, "192.0.2.7"
        assert not (await made.stubs["m1"].CreateService(pb.ServiceRequest(spec=spec))).warnings


async def test_a_port_at_an_ipv6_address_of_a_service_without_ipv6_is_warned_about() -> None:
    dual = a_network("net2", "dual")
    dual.spec.ipv6 = True
    async with managing(a_cluster(), a_network("net1", "front"), dual) as made:
        for name, warnings in (
            ("front", ["port 80 at ::1 refuses connections: network front has no IPv6"]),
            ("dual", []),
        ):
            spec = on(name, ports=(objects.PortConfig(target_port=80, host_ip="::1"),))
            spec.annotations.name = f"web-{name}"
            assert list((await made.stubs["m1"].CreateService(pb.ServiceRequest(spec=spec))).warnings) == warnings


async def test_a_service_that_is_read_says_on_which_nodes_clients_are_hidden_from_it() -> None:
    nodes = [Node(id=name) for name in ("n1", "n2", "n3")]
    for at, answers in zip(nodes, (True, False, False), strict=True):
        at.description.hostname, at.description.answers_through_ingress = f"host-{at.id}", answers
        at.status.state = NodeStatus.READY
    async with managing(a_cluster(), *nodes) as made:
        service = await create(made, on())
        for at in nodes[:2]:
            task = Task(id=f"task-{at.id}", service_id=service.id, node_id=at.id)
            task.status.state = objects.TASK_RUNNING
            made.store.tasks.put(task)
        stub = made.stubs["m1"]
        assert not (await stub.GetService(pb.GetRequest(ref="web"))).masquerading_nodes
        stored = made.store.services.get(service.id)
        assert stored is not None
        stored.endpoint.spec.ports.add(target_port=80, published_port=8080)
        assert list((await stub.GetService(pb.GetRequest(ref="web"))).masquerading_nodes) == ["host-n2"]
        assert not stored.masquerading_nodes


async def test_a_network_that_is_read_names_the_nodes_with_tasks_on_it_and_tasks_are_found_by_network() -> None:
    nodes = [a_node(name, f"host-{name}") for name in ("n1", "n2", "n3")]
    for at in nodes:
        at.data_path_addr = f"192.0.2.{at.id[1]}"
    tasks = [Task(id=f"t{number}", node_id=f"n{number}") for number in (1, 2, 3)]
    for task, state, network_id in zip(tasks, (512, 704, 512), ("net1", "net1", "ingress0"), strict=True):
        task.status.state = objects.TaskState.ValueType(state)
        task.networks.add(network_id=network_id, address="10.0.1.2/24")
    async with managing(a_cluster(), a_network("net1", "front"), *nodes, *tasks) as made:
        stub = made.stubs["m1"]
        found = await stub.GetNetwork(pb.GetRequest(ref="front"))
        assert [(node.name, node.addr) for node in found.nodes] == [("host-n1", "192.0.2.1")]
        stored = made.store.networks.get("net1")
        assert stored is not None
        assert not stored.nodes
        listed = await stub.ListTasks(pb.ListRequest(filter=pb.Filter(network_ids=["net1"])))
        assert [task.id for task in listed.tasks] == ["t1", "t2"]


# ---------------------------------------------------------------- creation and removal


async def test_networks_are_created_refused_while_used_and_removed() -> None:
    async with managing(a_cluster(), predefined("host")) as made:
        stub = made.stubs["m1"]
        spec = a_network("", "wpnet").spec
        network = await stub.CreateNetwork(pb.NetworkRequest(spec=spec))
        assert network.spec.driver == "overlay"
        code, message = await refused(stub.CreateNetwork(pb.NetworkRequest(spec=spec)))
        assert (code, message) == (grpc.StatusCode.ALREADY_EXISTS, "network with name wpnet already exists")
        web = a_spec("wpinst")
        web.task.networks.add(network_id="wpnet")
        await create(made, web)
        code, message = await refused(stub.RemoveNetwork(pb.RemoveRequest(ref="wpnet")))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert message.startswith("network wpnet is in use by service wpinst: remove or update it first")
        code, message = await refused(stub.RemoveNetwork(pb.RemoveRequest(ref="host")))
        assert (code, "predefined" in message) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        code, message = await refused(stub.RemoveNetwork(pb.RemoveRequest(ref="nope")))
        assert (code, message) == (grpc.StatusCode.NOT_FOUND, "network nope not found")
        await stub.RemoveService(pb.RemoveRequest(ref="wpinst"))
        removing = asyncio.ensure_future(_removed(made, "wpnet"))
        await until(lambda: _marked(made, network.id))
        marked = made.store.networks.get(network.id)
        assert marked is not None
        await made["m1"].service._backend.writer.commit((Remove(marked),))  # the reaper's part
        assert await removing == network.id


async def test_the_ingress_network_goes_when_nothing_needs_it_and_comes_back_with_another_subnet() -> None:
    async with managing(a_cluster(), a_network("net1", "front")) as made:
        stub = made.stubs["m1"]
        again = a_network("", "edge", ingress=True).spec
        again.ipam.subnet = "10.20.0.0/20"
        code, message = await refused(stub.CreateNetwork(pb.NetworkRequest(spec=again)))
        assert (code, "ingress network ingress already exists" in message) == (grpc.StatusCode.ALREADY_EXISTS, True)
        for spec, why in (
            (on("front", ports=(INGRESS_PORT,)), "by service web, which publishes ports"),
            (on(), "by service web, which is attached to no other network"),
        ):
            service = await create(made, spec)
            code, message = await refused(stub.RemoveNetwork(pb.RemoveRequest(ref="ingress")))
            assert (code, why in message) == (grpc.StatusCode.FAILED_PRECONDITION, True), message
            await stub.RemoveService(pb.RemoveRequest(ref="web"))
            stored = made.store.services.get(service.id)
            assert stored is not None
            await made["m1"].service._backend.writer.commit((Remove(stored),))
        removing = asyncio.ensure_future(_removed(made, "ingress"))
        await until(lambda: _marked(made, "ingress0"))
        marked = made.store.networks.get("ingress0")
        assert marked is not None
        await made["m1"].service._backend.writer.commit((Remove(marked),))
        await removing
        code, message = await refused(stub.CreateService(pb.ServiceRequest(spec=on())))
        assert (code, "network create --ingress" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        assert (await stub.CreateNetwork(pb.NetworkRequest(spec=again))).spec.ingress
        assert await create(made, on())


async def _removed(made: Managers, ref: str) -> str:
    return (await made.stubs["m1"].RemoveNetwork(pb.RemoveRequest(ref=ref))).id


def _marked(made: Managers, network_id: str) -> bool:
    return (made.store.networks.get(network_id) or Network()).pending_delete
