"""Objects to the rows of listings, with Docker's field names and words. Pure: `now` is an argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from proto import objects_pb2 as pb
from proto.control_pb2 import ServiceCounts
from proto.local_pb2 import Image
from swarm.cli.images import repository_and_tag, short_id, without_digest
from swarm.cli.ports import ports_text
from swarm.cli.units import format_time, human_duration, human_size
from swarm.store import drivers

ID_SHORT = 12
ERROR_SHORT = 30
"""Docker's widths of an ID and of the ERROR column."""

SERVICE_COLUMNS = {
    "ID": "ID",
    "Name": "NAME",
    "Mode": "MODE",
    "Replicas": "REPLICAS",
    "Image": "IMAGE",
    "Ports": "PORTS",
}
TASK_COLUMNS = {
    "ID": "ID",
    "Name": "NAME",
    "Image": "IMAGE",
    "Node": "NODE",
    "DesiredState": "DESIRED STATE",
    "CurrentState": "CURRENT STATE",
    "Error": "ERROR",
    "Ports": "PORTS",
}
NODE_COLUMNS = {
    "ID": "ID",
    "Hostname": "HOSTNAME",
    "Status": "STATUS",
    "Availability": "AVAILABILITY",
    "ManagerStatus": "MANAGER STATUS",
    "EngineVersion": "ENGINE VERSION",
}
NETWORK_COLUMNS = {"ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Scope": "SCOPE"}
IMAGE_COLUMNS = {
    "Repository": "REPOSITORY",
    "Tag": "TAG",
    "ID": "IMAGE ID",
    "CreatedSince": "CREATED",
    "Size": "SIZE",
}

AVAILABILITY = {pb.ACTIVE: "Active", pb.PAUSED: "Pause", pb.DRAINED: "Drain"}


def state_word(state: pb.TaskState.ValueType) -> str:
    """TASK_RUNNING -> "Running"."""
    return pb.TaskState.Name(state).removeprefix("TASK_").capitalize()


def mode_word(spec: pb.ServiceSpec) -> str:
    """Docker's words: "replicated", "global", "replicated job", "global job"."""
    return (spec.WhichOneof("mode") or "replicated").replace("_", " ")


def service_row(service: pb.Service, counts: ServiceCounts) -> dict[str, str]:
    """One line of `service ls`."""
    spec = service.spec
    replicas = f"{counts.running}/{counts.desired}"
    if mode_word(spec).endswith("job"):
        replicas += f" ({counts.completed}/{counts.total} completed)"
    if spec.task.placement.max_replicas_per_node:
        replicas += f" (max {spec.task.placement.max_replicas_per_node} per node)"
    ports = service.endpoint.spec.ports or spec.endpoint.ports
    return {
        "ID": service.id[:ID_SHORT],
        "Name": spec.annotations.name,
        "Mode": mode_word(spec),
        "Replicas": replicas,
        "Image": without_digest(spec.task.container.image),
        "Ports": ports_text(ports, pb.INGRESS),
    }


def task_name(task: pb.Task) -> str:
    """ "wpinst.3", or for a global service "agent.<node ID>"."""
    return f"{task.service_annotations.name}.{task.slot or task.node_id or task.id}"


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts web.2 before web.10."""
    parts = re.findall(r"\d+|\D+", text)
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)


def task_rows(
    tasks: Iterable[pb.Task], node_name: Callable[[str], str], now: float, no_trunc: bool, no_resolve: bool = False
) -> list[dict[str, str]]:
    """The lines of `service ps`: per slot the newest task first, its predecessors under ` \\_ `."""
    ordered = sorted(tasks, key=lambda task: (natural_key(task_name(task)), -task.meta.created_at, task.id))
    rows: list[dict[str, str]] = []
    previous = ""
    for task in ordered:
        name = task_name(task)
        shown = f"{task.service_id}.{task.slot or task.node_id}" if no_resolve else name
        rows.append(
            {
                "ID": task.id if no_trunc else task.id[:ID_SHORT],
                "Name": f" \\_ {shown}" if name == previous else shown,
                "Image": task.spec.container.image if no_trunc else without_digest(task.spec.container.image),
                "Node": task.node_id if no_resolve else node_name(task.node_id),
                "DesiredState": state_word(task.desired_state),
                "CurrentState": current_state(task, now),
                "Error": error_text(task_error(task), no_trunc),
                "Ports": ports_text(task.endpoint.ports, pb.HOST),
            }
        )
        previous = name
    return rows


def current_state(task: pb.Task, now: float) -> str:
    """ "Running 5 minutes ago"."""
    since_s = max(0.0, now - (task.status.timestamp or task.meta.created_at))
    return f"{state_word(task.status.state)} {human_duration(since_s).lower()} ago"


def task_error(task: pb.Task) -> str:
    """Why it failed; of a task that waits for a node, why it waits."""
    if not task.status.err and task.status.state == pb.TASK_PENDING and "no suitable node" in task.status.message:
        return task.status.message
    return task.status.err


def error_text(error: str, no_trunc: bool) -> str:
    if not error:
        return ""
    line = " ".join(error.split())
    if not no_trunc and len(line) > ERROR_SHORT:
        line = line[: ERROR_SHORT - 1] + "…"
    return f'"{line}"'


def node_row(node: pb.Node, self_id: str) -> dict[str, str]:
    """One line of `node ls`; a `*` marks the node that was asked."""
    return {
        "ID": f"{node.id} *" if node.id == self_id else node.id,
        "Hostname": node.description.hostname,
        "Status": pb.NodeStatus.State.Name(node.status.state).capitalize(),
        "Availability": AVAILABILITY.get(node.spec.availability, "Unknown"),
        "ManagerStatus": manager_word(node),
        "EngineVersion": node.description.engine_version,
        "Self": "true" if node.id == self_id else "false",
    }


def manager_word(node: pb.Node) -> str:
    """ "Leader", "Reachable", "Unreachable", or "" for a worker."""
    if node.role != pb.MANAGER:
        return ""
    if node.manager_status.leader:
        return "Leader"
    return "Reachable" if node.manager_status.reachable else "Unreachable"


def driver_word(network: pb.Network) -> str:
    """Docker calls the driver of the network `none` "null"."""
    return "null" if network.spec.driver == drivers.NONE else drivers.driver_of(network)


def scope_word(network: pb.Network) -> str:
    return "local" if drivers.is_local(network) else "swarm"


def network_row(network: pb.Network, no_trunc: bool) -> dict[str, str]:
    """One line of `network ls`."""
    return {
        "ID": network.id if no_trunc else network.id[:ID_SHORT],
        "Name": network.spec.annotations.name,
        "Driver": driver_word(network),
        "Scope": scope_word(network),
        "IPv4": str(network.spec.driver != drivers.NONE).lower(),
        "IPv6": str(network.spec.ipv6).lower(),
        "Internal": str(network.spec.internal).lower(),
        "Labels": labels_text(network.spec.annotations.labels),
        "CreatedAt": format_time(network.meta.created_at),
    }


def image_rows(images: Iterable[Image], now: float, no_trunc: bool) -> list[dict[str, str]]:
    """The lines of `image ls`: one for each name, newest image first."""
    rows: list[dict[str, str]] = []
    for image in sorted(images, key=lambda image: (-image.created_at, image.id)):
        digest = image.digests[0] if image.digests else "<none>"
        for name in image.names or ("",):
            repository, tag = repository_and_tag(name) if name else ("<none>", "<none>")
            rows.append(
                {
                    "Repository": without_digest(repository),
                    "Tag": tag,
                    "Digest": digest.rpartition("@")[2],
                    "ID": image.id if no_trunc else short_id(image.id),
                    "CreatedSince": image_age(image.created_at, now),
                    "CreatedAt": format_time(image.created_at),
                    "Size": human_size(image.size_bytes),
                    "ReadOnly": str(image.read_only).lower(),
                }
            )
    return rows


def image_age(created_at: float, now: float) -> str:
    """ "3 weeks ago"; reproducible builds record no time, or 1970."""
    return f"{human_duration(max(0.0, now - created_at))} ago" if created_at > 0 else "N/A"


def labels_text(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={labels[key]}" for key in sorted(labels))
