"""What the network and the runtime are told of one task (pure)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dns.interface import Sandbox
from node.interface import CreateRequest, ResolvedImage, RuntimeFault
from node.templates import expanded, task_name, values_for
from overlay.interface import Attachment
from proto.objects_pb2 import TCP, VIP, ContainerSpec, Mount, NodeDescription, Task

DEFAULT_STOP_GRACE_S = 10.0
"""Docker's default."""
DEFAULT_LOG_MAX_BYTES = 10_000_000
DEFAULT_LOG_MAX_FILES = 3
HOSTNAME_LENGTH = 12
"""Docker names a container's host by the first 12 characters of its ID."""

_SIZE = re.compile(r"(\d+)\s*([kmg]?)b?", re.IGNORECASE)
_UNIT_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def addresses(task: Task) -> tuple[str, ...]:
    """Those that the swarm gave, without prefix lengths."""
    given = (address for net in task.networks for address in (net.address, net.address6) if address)
    return tuple(address.partition("/")[0] for address in given)


def sandbox(task: Task, netns: Path, attachment: Attachment, search: tuple[str, ...]) -> Sandbox:
    """What the name server is told of the task; `search`: its domains, or the host's."""
    return Sandbox(
        task_id=task.id,
        netns_path=str(netns),
        network_ids=tuple(interface.network_id for interface in attachment.interfaces),
        upstreams=tuple(task.spec.container.dns_nameservers),
        search=search,
    )


def network_ids(task: Task) -> frozenset[str]:
    return frozenset(net.network_id for net in task.networks)


def stop_grace_s(task: Task) -> float:
    spec = task.spec.container
    return spec.stop_grace_period_s if spec.HasField("stop_grace_period_s") else DEFAULT_STOP_GRACE_S


def published_tcp_ports(task: Task) -> frozenset[int]:
    return frozenset(port.target_port for port in task.endpoint.ports if port.protocol == TCP)


def drains(task: Task, ingress_ids: frozenset[str]) -> bool:
    """Whether clients reach this task through a balancer: a published port, or a VIP on a network of its
    own. The ingress network alone serves no names, so nobody calls a VIP there."""
    if task.endpoint.ports:
        return True
    return task.endpoint.mode == VIP and bool(network_ids(task) - ingress_ids)


def size_bytes(text: str, option: str) -> int:
    """ "10m" -> 10485760. Raises RuntimeFault naming the option."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match.group(1)) == 0:
        raise RuntimeFault(f'log option {option}="{text}" is not a size: write a number with k, m or g, such as 10m')
    return int(match.group(1)) * _UNIT_BYTES[match.group(2).lower()]


def log_limits(options: Mapping[str, str]) -> tuple[int, int]:
    """(bytes per file, number of files). Raises RuntimeFault."""
    max_bytes = size_bytes(options["max-size"], "max-size") if "max-size" in options else DEFAULT_LOG_MAX_BYTES
    files = options.get("max-file", str(DEFAULT_LOG_MAX_FILES))
    if not files.isdigit() or int(files) < 1:
        raise RuntimeFault(f'log option max-file="{files}" is not a number of files: write 1 or more')
    return max_bytes, int(files)


def container_spec(task: Task, node: NodeDescription, node_labels: Mapping[str, str]) -> ContainerSpec:
    """The task's spec on this node: templates expanded, volumes per slot and generic resources named. Raises
    RuntimeFault."""
    spec = expanded(task.spec.container, values_for(task, node, node_labels))
    for mount in spec.mounts:
        if mount.per_slot:
            mount.source = f"{mount.source}.{task.slot}"
    spec.env.extend(generic_env(task))
    return spec


def generic_env(task: Task) -> list[str]:
    """What the task was given, as Docker tells it: "DOCKER_RESOURCE_GPU=GPU1,GPU2", "DOCKER_RESOURCE_LICENCES=4"."""
    values: dict[str, list[str]] = {}
    for resource in task.assigned_generic:
        values.setdefault(resource.kind.upper(), []).append(resource.id or str(resource.count))
    return [f"DOCKER_RESOURCE_{kind}={','.join(given)}" for kind, given in values.items()]


def volume_names(task: Task, node: NodeDescription, node_labels: Mapping[str, str]) -> frozenset[str]:
    try:
        mounts = container_spec(task, node, node_labels).mounts
    except RuntimeFault:
        return frozenset()  # such a task is rejected
    return frozenset(mount.source for mount in mounts if mount.type == Mount.VOLUME and mount.source)


def create_request(
    task: Task,
    image: ResolvedImage,
    netns: Path | None,
    node: NodeDescription,
    node_labels: Mapping[str, str],
) -> CreateRequest:
    """Everything the runtime needs to make the task's container; `netns` None: it has the host's network, and as in
    Docker the host's name. Raises RuntimeFault (permanent) for a
    template or an option that cannot be understood."""
    spec = container_spec(task, node, node_labels)
    max_bytes, max_files = log_limits(task.spec.log_options)
    name = task_name(task)
    labels = dict(spec.labels) | {
        "com.docker.swarm.node.id": task.node_id,
        "com.docker.swarm.service.id": task.service_id,
        "com.docker.swarm.service.name": task.service_annotations.name,
        "com.docker.swarm.task": "",
        "com.docker.swarm.task.id": task.id,
        "com.docker.swarm.task.name": name,
    }
    return CreateRequest(
        task_id=task.id,
        name=name,
        spec=spec,
        image=image,
        netns=netns,
        hostname=spec.hostname or (task.id[:HOSTNAME_LENGTH] if netns is not None else node.hostname),
        addresses=addresses(task),
        limits=task.spec.resources.limits,
        reservations=task.spec.resources.reservations,
        labels=labels,
        log_max_bytes=max_bytes,
        log_max_files=max_files,
    )
