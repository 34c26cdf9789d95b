"""The mirror as the kernel and the runtime see it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import drivers, inputs, view
from node.interface import ImageConfig, ResolvedImage, RuntimeFault
from node.mirror import Mirror
from node.templates import expand, values_for
from overlay.interface import (
    Attachment,
    BridgeNetwork,
    HostState,
    Interface,
    MacvlanNetwork,
    OverlayNetwork,
    Peer,
    PublishedPort,
    RemoteEndpoint,
    Vip,
)
from proto.dispatch_pb2 import Item, NetworkEndpoint, NetworkPeer, NetworkService
from proto.objects_pb2 import (
    DNSRR,
    HOST,
    INGRESS,
    SOURCE_HASH,
    TASK_FAILED,
    TASK_RUNNING,
    TASK_SHUTDOWN,
    TCP,
    UDP,
    VIP,
    EndpointMode,
    Mount,
    Network,
    NodeDescription,
    Platform,
    PortConfig,
    Task,
    TaskState,
)
from swarm.api import templates

LOCAL = view.Local(node_id="n1", vtep="192.0.2.1", index=7)


def host_state(seen: Mirror, local: view.Local) -> HostState:
    """Drawn without any memory."""
    return view.HostStates().draw(seen, local)


def net(network_id: str, **spec: bool) -> dict[str, Item]:
    made = Network(id=network_id, vni=4096 + int(network_id[-1]))
    made.ipam.subnet, made.ipam.gateway = f"10.0.{network_id[-1]}.0/24", f"10.0.{network_id[-1]}.1"
    made.spec.annotations.name = f"{network_id}-name"
    made.spec.ingress, made.spec.internal = spec.get("ingress", False), spec.get("internal", False)
    return {f"network/{network_id}": Item(network=made)}


def end(
    task_id: str,
    address: str,
    network_id: str = "net1",
    *,
    service: str = "svc1",
    node: str = "n1",
    serving: bool = True,
) -> dict[str, Item]:
    made = NetworkEndpoint(
        task_id=task_id, network_id=network_id, address=address, node_id=node, service_id=service,
        task_name=f"web.{task_id[-1]}.{task_id}", serving=serving,
    )  # fmt: skip
    return {f"endpoint/{network_id}/{task_id}": Item(endpoint=made)}


def svc(
    service_id: str = "svc1",
    vip: str = "10.0.1.2",
    mode: EndpointMode.ValueType = VIP,
    aliases: tuple[str, ...] = (),
    ports: tuple[PortConfig, ...] = (),
) -> dict[str, Item]:
    made = NetworkService(service_id=service_id, name=f"{service_id}-name", mode=mode, ports=ports)
    made.ingress_network_id = "net1"
    made.networks.add(network_id="net1", aliases=aliases)
    if vip:
        made.virtual_ips.add(network_id="net1", address=f"{vip}/24")
    return {f"service/{service_id}": Item(service=made)}


def mirror(*items: dict[str, Item]) -> Mirror:
    return Mirror(known=True, items={key: item for part in items for key, item in part.items()})


def port(published: int, target: int, **more: int | str) -> PortConfig:
    made = PortConfig(published_port=published, target_port=target, protocol=TCP, mode=INGRESS)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_a_node_that_is_down_is_a_peer_unless_its_address_has_another_node() -> None:
    def peer(node_id: str, vtep: str, index: int, down: bool) -> Item:
        return Item(peer=NetworkPeer(node_id=node_id, vtep_addr=vtep, index=index, down=down))

    seen = mirror(
        {
            "peer/n2": peer("n2", "192.0.2.2", 2, True),  # cut off from the managers: no more is known
            "peer/n3": peer("n3", "192.0.2.3", 3, True),
            "peer/n4": peer("n4", "192.0.2.3", 4, False),  # n3's host, joined again
            "peer/n5": peer("n5", "192.0.2.1", 5, True),  # this host's own earlier life
        }
    )
    assert [found.node_id for found in host_state(seen, LOCAL).peers] == ["n2", "n4"]


def test_networks_peers_and_remote_endpoints() -> None:
    own = Item(peer=NetworkPeer(node_id="n1", vtep_addr="192.0.2.1", index=7))
    other = Item(peer=NetworkPeer(node_id="n2", vtep_addr="192.0.2.2", index=8))
    seen = mirror(
        net("net1", internal=True),
        {"network/net9": Item(network=Network(id="net9"))},  # without a VNI: not allocated yet
        {"peer/n1": own, "peer/n2": other},
        end("t1", "10.0.1.5"),
        end("t2", "10.0.1.6", node="n2", serving=False),
        end("t3", "10.0.9.6", network_id="net9", node="n2"),
    )
    state = host_state(seen, LOCAL)
    assert (state.vtep, state.index, state.vxlan_port) == ("192.0.2.1", 7, 4789)
    assert state.networks == (OverlayNetwork("net1", 4097, "10.0.1.0/24", "10.0.1.1", internal=True),)
    assert state.peers == (Peer("n2", "192.0.2.2", 8),)
    assert state.endpoints == (RemoteEndpoint("net1", "10.0.1.6", "n2"),), "reachable before it serves"


def test_ipv6_of_networks_and_endpoints() -> None:
    items = net("net1") | end("t2", "10.0.1.6", node="n2")
    items["network/net1"].network.ipam6.subnet, items["network/net1"].network.ipam6.gateway = "fd00::/64", "fd00::1"
    items["endpoint/net1/t2"].endpoint.address6 = "fd00::6"
    state = host_state(mirror(items), LOCAL)
    assert (state.networks[0].subnet6, state.networks[0].gateway6) == ("fd00::/64", "fd00::1")
    assert state.endpoints == (RemoteEndpoint("net1", "10.0.1.6", "n2", "fd00::6"),)


def test_the_mtu_of_a_network_is_its_option() -> None:
    items = net("net1")
    items["network/net1"].network.spec.options[drivers.MTU_OPTIONS[0]] = "1400"
    assert host_state(mirror(items), LOCAL).networks[0].mtu_bytes == 1400


def test_vip_backends_are_the_serving_endpoints_in_numeric_order() -> None:
    seen = mirror(
        net("net1"),
        svc(),
        end("t1", "10.0.1.10", node="n2"),
        end("t2", "10.0.1.9"),
        end("t3", "10.0.1.3", serving=False),
        end("t4", "10.0.1.4", service="svc2"),
    )
    assert host_state(seen, LOCAL).vips == (Vip("net1", "10.0.1.2", ("10.0.1.9", "10.0.1.10")),)


def test_a_vip_without_backends_stays_so_that_it_is_refused_at_once() -> None:
    assert host_state(mirror(net("net1"), svc()), LOCAL).vips == (Vip("net1", "10.0.1.2", ()),)


def test_both_families_have_their_vip_and_their_backends_with_weights() -> None:
    items = net("net1") | svc() | end("t1", "10.0.1.5") | end("t2", "10.0.1.6", node="n2")
    service = items["service/svc1"].service
    service.balance, service.virtual_ips[0].address6 = SOURCE_HASH, "fd00::2/64"
    for task_id, weight, address6 in (("t1", 0, ""), ("t2", 500, "fd00::6")):
        endpoint = items[f"endpoint/net1/{task_id}"].endpoint
        endpoint.weight, endpoint.address6 = weight, address6
    assert host_state(mirror(items), LOCAL).vips == (
        Vip("net1", "10.0.1.2", ("10.0.1.5", "10.0.1.6"), (1, 100), "sh"),
        Vip("net1", "fd00::2", ("fd00::6",), (), "sh"),
    )


def test_a_published_port_has_backends_of_both_families_at_the_address_it_names() -> None:
    ports = (port(8000, 80, host_ip="192.0.2.7"), port(8000, 81, host_ip="192.0.2.8"))
    items = net("net1") | svc(ports=ports) | end("t1", "10.0.1.5") | end("t2", "10.0.1.6")
    items["endpoint/net1/t2"].endpoint.address6 = "fd00::6"
    items["endpoint/net1/t2"].endpoint.weight = 3
    first, second = host_state(mirror(items), LOCAL).published
    assert first.backends == (("10.0.1.5", 80), ("10.0.1.6", 80), ("fd00::6", 80))
    assert (first.weights, first.host_ip) == ((1, 3, 3), "192.0.2.7")
    assert second.host_ip == "192.0.2.8"


def test_a_peer_that_cannot_answer_through_other_hosts_is_marked() -> None:
    items = {"peer/n2": Item(peer=NetworkPeer(node_id="n2", vtep_addr="192.0.2.2", index=8, masquerade=True))}
    assert host_state(mirror(items), LOCAL).peers == (Peer("n2", "192.0.2.2", 8, masquerade=True),)


def test_dnsrr_services_have_no_vip() -> None:
    assert host_state(mirror(net("net1"), svc(mode=DNSRR), end("t1", "10.0.1.3")), LOCAL).vips == ()


def test_a_local_task_that_ended_leaves_the_balancers_before_the_managers_know() -> None:
    seen = mirror(net("net1"), svc(ports=(port(8000, 80),)), end("t1", "10.0.1.3"), end("t2", "10.0.1.4"))
    local = view.Local("n1", "192.0.2.1", 7, states={"t1": TASK_FAILED, "t2": TASK_RUNNING})
    state = host_state(seen, local)
    assert state.vips[0].backends == ("10.0.1.4",)
    assert state.published[0].backends == (("10.0.1.4", 80),)


def test_published_ports_reach_the_tasks_of_the_whole_cluster() -> None:
    ports = (port(8000, 80), port(53, 5353, protocol=UDP))
    seen = mirror(net("net1"), svc(ports=ports), end("t1", "10.0.1.3", node="n2"))
    assert host_state(seen, LOCAL).published == (
        PublishedPort("tcp", 8000, (("10.0.1.3", 80),)),
        PublishedPort("udp", 53, (("10.0.1.3", 5353),)),
    )


@pytest.mark.parametrize(
    ("state", "desired", "published"),
    [
        (TASK_RUNNING, TASK_RUNNING, (PublishedPort("tcp", 8080, (("10.0.2.5", 80),)),)),
        (TASK_RUNNING, TASK_SHUTDOWN, ()),
        (TASK_FAILED, TASK_RUNNING, ()),
    ],
)
def test_host_ports_lead_to_the_running_local_task_on_a_network_with_an_outside(
    state: int, desired: int, published: tuple[PublishedPort, ...]
) -> None:
    made = Task(id="t1")
    made.desired_state = desired  # type: ignore[assignment]
    made.networks.add(network_id="net1", address="10.0.1.5/24")
    made.networks.add(network_id="net2", address="10.0.2.5/24")
    made.endpoint.ports.append(port(8080, 80, mode=HOST))
    seen = mirror(net("net1", internal=True), net("net2"), {"task/t1": Item(task=made)})
    local = view.Local("n1", "192.0.2.1", 7, states={"t1": state})  # type: ignore[dict-item]
    assert host_state(seen, local).published == published


# ---------------------------------------------------------------- what the runtime and the network are told


def full_task(slot: int = 3) -> Task:
    made = Task(id="abcdefghijklmnopqrstuvwxy", service_id="svc1", slot=slot, node_id="n1")
    made.service_annotations.name = "web"
    made.service_annotations.labels["tier"] = "gold"
    spec = made.spec.container
    spec.image = "web"
    spec.env.extend(["SLOT={{.Task.Slot}}", "ON={{ .Node.Hostname }}", 'T={{index .Service.Labels "tier"}}', "PLAIN=1"])
    spec.mounts.add(type=Mount.VOLUME, source="data-{{.Task.Slot}}", target="/data")
    spec.sysctls.update({"net.core.somaxconn": "512", "kernel.msgmax": "1"})
    made.spec.log_options.update({"max-size": "2m", "max-file": "5"})
    made.networks.add(network_id="net1", address="10.0.1.5/24")
    made.networks.add(network_id="net2", address="10.0.2.5/24")
    return made


NODE = NodeDescription(hostname="host1", platform=Platform(os="linux", architecture="x86_64"))
IMAGE = ResolvedImage("sha256:web", (), ImageConfig())


def test_the_request_to_the_runtime() -> None:
    made = full_task()
    made.spec.container.dns_options.append("timeout:3")
    request = inputs.create_request(made, IMAGE, Path("/netns/t"), NODE, {})
    assert list(request.spec.env) == ["SLOT=3", "ON=host1", "T=gold", "PLAIN=1"]
    assert request.spec.mounts[0].source == "data-3"
    assert request.name == "web.3.abcdefghijklmnopqrstuvwxy"
    assert request.hostname == "abcdefghijkl"
    assert request.addresses == ("10.0.1.5", "10.0.2.5")
    assert (request.nameservers, request.dns_options) == (("127.0.0.11",), ("ndots:0",)), "beside the task's own"
    assert (request.log_max_bytes, request.log_max_files) == (2 << 20, 5)
    assert request.labels["com.docker.swarm.task.name"] == request.name
    assert made.spec.container.env[0] == "SLOT={{.Task.Slot}}", "the assigned task is not changed"


def test_a_hostname_of_its_own_is_expanded_and_global_tasks_have_the_node_as_slot() -> None:
    made = full_task(slot=0)
    made.spec.container.hostname = "{{.Service.Name}}-{{.Node.Hostname}}"
    request = inputs.create_request(made, IMAGE, None, NODE, {})
    assert request.hostname == "web-host1"
    assert request.name == "web.n1.abcdefghijklmnopqrstuvwxy"
    assert request.spec.env[0] == "SLOT=n1"


def attached(task: Task) -> Attachment:
    found = drivers.attachment(task, [Network(id=net.network_id) for net in task.networks])
    assert found is not None
    return found


def driven(network_id: str, driver: str, **options: str) -> Network:
    made = Network(id=network_id)
    made.spec.driver = driver
    made.spec.options.update(options)
    made.ipam.subnet, made.ipam.gateway = ("192.168.5.0/24", "192.168.5.1") if driver == "macvlan" else ("", "")
    return made


def test_drivers_decide_what_links_a_task_has() -> None:
    host, none, bridge = driven("h", "host"), driven("n", "none"), driven("b", "bridge")
    made = Task(id="t1")
    made.networks.add(network_id="h")
    assert drivers.attachment(made, [host, none, bridge]) is None
    made.networks[0].network_id = "n"
    assert drivers.attachment(made, [host, none, bridge]) == Attachment("t1", ())
    made.networks[0].network_id = "b"
    assert drivers.attachment(made, [host, none, bridge]) == Attachment("t1", (Interface("b", ""),))
    assert drivers.bridges([host, none, bridge], [made]) == (BridgeNetwork("b"),)
    assert drivers.bridges([host, none, bridge], []) == ()


def test_a_macvlan_network_is_its_options() -> None:
    lan = driven("m", "macvlan", parent="eth1", macvlan_mode="vepa")
    assert drivers.macvlans([lan, driven("b", "bridge")]) == (
        MacvlanNetwork("m", "eth1", "192.168.5.0/24", "192.168.5.1", mode="vepa"),
    )
    assert drivers.macvlans([driven("m", "macvlan", parent="eth1")])[0].mode == "bridge"
    items = net("net1") | {"network/m": Item(network=lan), "network/b": Item(network=driven("b", "bridge"))}
    state = host_state(mirror(items), LOCAL)
    assert state.network_ids() == {"net1", "m"}, "no task of this host is on the bridge"


def test_host_ports_of_a_task_on_the_bridge_lead_to_the_address_that_the_host_gave_it() -> None:
    made = Task(id="t1")
    made.networks.add(network_id="b")
    made.endpoint.ports.append(port(8080, 80, mode=HOST))
    items = {"network/b": Item(network=driven("b", "bridge")), "task/t1": Item(task=made)}
    local = replace(LOCAL, states={"t1": TASK_RUNNING}, given={"t1": "172.17.0.2"})
    assert host_state(mirror(items), local).published == (PublishedPort("tcp", 8080, (("172.17.0.2", 80),)),)


def test_a_task_has_its_addresses_of_both_families() -> None:
    made = full_task()
    made.networks[1].address6 = "fd00::5/64"
    assert attached(made).interfaces[1] == Interface("net2", "10.0.2.5/24", "fd00::5/64")
    assert inputs.addresses(made) == ("10.0.1.5", "10.0.2.5", "fd00::5")


def test_the_attachment_keeps_the_order_of_networks_and_takes_only_net_sysctls() -> None:
    attachment = attached(full_task())
    assert attachment.interfaces == (Interface("net1", "10.0.1.5/24"), Interface("net2", "10.0.2.5/24"))
    assert attachment.sysctls == {"net.core.somaxconn": "512"}


def test_the_managers_know_the_same_templates() -> None:
    values = values_for(Task(slot=1), NodeDescription(), {})
    assert set(templates.KNOWN) == set(values)
    assert not any(templates.unknown_in(f"{{{{{expression}}}}}") for expression in templates.KNOWN)


def test_all_labels_at_once_are_printed_as_docker_does() -> None:
    values = values_for(full_task(), NodeDescription(), {"zone": "east", "a.b": "c d"})
    assert expand("{{.Service.Labels}} {{ .Node.Labels }}", values, "env") == "map[tier:gold] map[a.b:c d zone:east]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("{{.A}}-{{ .A }}", "x-x"),
        ('{{index .Service.Labels "absent"}}', ""),
        ("{{.Service.Labels.absent}}", ""),
        ('{{index .Service.Labels "dotted.key"}}', "y"),
    ],
)
def test_templates(text: str, expected: str) -> None:
    assert expand(text, {".A": "x", ".Service.Labels.dotted.key": "y"}, "env") == expected


@pytest.mark.parametrize("text", ["{{.Nothing}}", "{{env}}", '{{index .Task.Labels "a"}}'])
def test_an_unknown_template_is_refused_by_name(text: str) -> None:
    with pytest.raises(RuntimeFault, match=r"in hostname is not known; known are \.A"):
        expand(text, {".A": "x"}, "hostname")


@pytest.mark.parametrize("options", [{"max-size": "x"}, {"max-size": "0"}, {"max-file": "0"}, {"max-file": "two"}])
def test_a_log_option_that_cannot_be_understood_is_refused_by_name(options: dict[str, str]) -> None:
    with pytest.raises(RuntimeFault, match=next(iter(options))):
        inputs.log_limits(options)


@pytest.mark.parametrize(
    ("mode", "ports", "networks", "expected"),
    [
        (VIP, 0, ["net1"], True),
        (VIP, 0, ["ingress"], False),
        (VIP, 1, ["ingress"], True),
        (DNSRR, 0, ["net1"], False),
        (VIP, 0, [], False),
    ],
)
def test_only_tasks_behind_a_balancer_drain(
    mode: EndpointMode.ValueType, ports: int, networks: list[str], expected: bool
) -> None:
    made = Task(id="t1")
    made.endpoint.mode = mode
    for number in range(ports):
        made.endpoint.ports.append(port(8000 + number, 80))
    for network_id in networks:
        made.networks.add(network_id=network_id, address="10.0.1.5/24")
    assert inputs.drains(made, frozenset({"ingress"})) is expected


def peer_of(node_id: str, vtep: str, **more: bool) -> dict[str, Item]:
    return {f"peer/{node_id}": Item(peer=NetworkPeer(node_id=node_id, vtep_addr=vtep, index=int(node_id[1:]), **more))}


def task_with_port() -> dict[str, Item]:
    made = Task(id="t1")
    made.networks.add(network_id="net1", address="10.0.1.3/24")
    made.endpoint.ports.append(port(8080, 80, mode=HOST))
    return {"task/t1": Item(task=made)}


choices = {
    "network/net1": [net("net1"), net("net1", internal=True)],
    "network/net2": [net("net2")],
    "peer/n2": [peer_of("n2", "192.0.2.2"), peer_of("n2", "192.0.2.2", down=True)],
    "peer/n3": [peer_of("n3", "192.0.2.2"), peer_of("n3", "192.0.2.3")],
    "service/svc1": [svc(), svc(mode=DNSRR), svc(ports=(port(8000, 80),)), svc(vip="")],
    "service/svc2": [svc("svc2", "10.0.1.9", ports=(port(8000, 81), port(8001, 82)))],
    "endpoint/net1/t1": [end("t1", "10.0.1.3"), end("t1", "10.0.1.3", serving=False)],
    "endpoint/net1/t2": [end("t2", "10.0.1.4", node="n2"), end("t2", "10.0.1.4", service="svc2")],
    "endpoint/net2/t2": [end("t2", "10.0.2.4", "net2", node="n2"), end("t2", "10.0.2.5", "net2", node="n3")],
    "task/t1": [task_with_port()],
}
steps = st.tuples(
    st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in choices.items()}),
    st.dictionaries(st.sampled_from(["t1", "t2"]), st.sampled_from([TASK_RUNNING, TASK_FAILED])),
)


@given(st.lists(steps, min_size=2, max_size=8))
def test_a_state_drawn_from_the_one_before_is_the_one_drawn_afresh(
    history: list[tuple[dict[str, dict[str, Item]], dict[str, TaskState.ValueType]]],
) -> None:
    states = view.HostStates()
    for items, observed in history:
        seen, local = mirror(*items.values()), replace(LOCAL, states=observed)
        assert states.draw(seen, local) == host_state(seen, local)


def test_what_of_a_state_did_not_change_is_the_same_object() -> None:
    items = mirror(net("net1"), svc(), svc("svc2", "10.0.1.9"), end("t1", "10.0.1.3", node="n2")).items
    states = view.HostStates()
    before = states.draw(Mirror(known=True, items=items), LOCAL)
    after = states.draw(mirror(dict(items), end("t1", "10.0.1.3", node="n2", serving=False)), LOCAL)
    assert before.endpoints is after.endpoints, "whether it serves is not its address"
    assert before.vips[0] != after.vips[0]
    assert before.vips[1] is after.vips[1]
