"""Networks as the JSON that `docker network inspect` prints. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from proto import objects_pb2 as pb
from proto.objects_pb2 import IpamConfig, Network, Node, Service, Task
from swarm.cli.docker_shape import Json, given
from swarm.cli.rows import driver_word, scope_word, task_name
from swarm.cli.units import format_time
from swarm.store import drivers

VNI_OPTION = "com.docker.network.driver.overlay.vxlanid_list"


def network_json(
    network: Network, services: Iterable[Service] = (), tasks: Iterable[Task] = (), nodes: Iterable[Node] = ()
) -> Json:
    """Services on it, with their tasks and the nodes of these, are shown with `--verbose` only."""
    spec = network.spec
    configs = [_config(network.ipam if network.ipam.subnet else spec.ipam)]
    configs += [_config(network.ipam6 if network.ipam6.subnet else spec.ipam6)]
    options = dict(spec.options)
    if network.vni:
        options[VNI_OPTION] = str(network.vni)
    on_it = [task for task in tasks if _is_there(task)]
    by_id = {node.id: node for node in nodes}
    return {
        "Name": spec.annotations.name,
        "Id": network.id,
        "Created": format_time(network.meta.created_at),
        "Scope": scope_word(network),
        "Driver": driver_word(network),
        "EnableIPv4": spec.driver != drivers.NONE,
        "EnableIPv6": bool(spec.ipv6),
        "IPAM": {"Driver": "default", "Options": None, "Config": [config for config in configs if config]},
        "Internal": spec.internal,
        "Attachable": spec.attachable,
        "Ingress": spec.ingress,
        "ConfigFrom": {"Network": ""},
        "ConfigOnly": False,
        "Containers": {},
        "Options": options,
        "Labels": dict(spec.annotations.labels),
        **given("Peers", [{"Name": node.name, "IP": node.addr} for node in network.nodes]),
        **given("Services", {each.spec.annotations.name: _service(network, each, on_it, by_id) for each in services}),
        **given("AllocationError", network.allocation_error),
    }


def _is_there(task: Task) -> bool:
    return pb.TASK_ASSIGNED <= task.status.state <= pb.TASK_RUNNING


def services_on(network: Network, services: Iterable[Service], tasks: Iterable[Task] = ()) -> list[Service]:
    """Those that name it, and those of these tasks: on the ingress network are services that name none, and an update
    leaves a network with its last old task."""
    present = {task.service_id for task in tasks if _is_there(task)}
    return [
        each
        for each in services
        if each.id in present or any(config.network_id == network.id for config in each.spec.task.networks)
    ]


def _config(config: IpamConfig) -> Json:
    return {
        **given("Subnet", config.subnet),
        **given("IPRange", config.ip_range),
        **given("Gateway", config.gateway),
        **given("AuxiliaryAddresses", dict(config.aux_addresses)),
    }


def _service(network: Network, service: Service, tasks: Iterable[Task], nodes: dict[str, Node]) -> Json:
    vip = next((vip for vip in service.endpoint.virtual_ips if vip.network_id == network.id), pb.VirtualIP())
    ports = service.endpoint.spec.ports
    return {
        "VIP": _bare(vip.address),
        **given("VIPv6", _bare(vip.address6)),
        "Ports": [f"Target: {port.target_port}, Publish: {port.published_port}" for port in ports],
        "LocalLBIndex": 0,
        "Tasks": [_task(network, task, nodes) for task in tasks if task.service_id == service.id],
    }


def _task(network: Network, task: Task, nodes: dict[str, Node]) -> Json:
    leg = next(leg for leg in task.networks if leg.network_id == network.id)
    node = nodes.get(task.node_id, Node())
    return {
        "Name": f"{task_name(task)}.{task.id}",
        "EndpointID": task.id,
        "EndpointIP": _bare(leg.address),
        **given("EndpointIPv6", _bare(leg.address6)),
        "Info": {"Host IP": node.data_path_addr},
    }


def _bare(address: str) -> str:
    return address.partition("/")[0]
