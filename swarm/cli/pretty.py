"""`inspect --pretty`: objects as text for people, laid out as Docker does. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proto import objects_pb2 as pb
from swarm.cli.docker_shape import (
    BALANCE,
    FAILURE,
    MONITOR_S,
    ORDER,
    PARALLELISM,
    RESTART,
    RESTART_DELAY_S,
    client_addresses,
    update_state,
)
from swarm.cli.generic import shown
from swarm.cli.rows import AVAILABILITY, manager_word, mode_word
from swarm.cli.units import NANO, format_duration, format_time, human_memory
from swarm.store import states

Line = tuple[int, str, str]
"""Indentation, label, value; a line without value is a heading."""


def pretty_service(service: pb.Service, network_name: Mapping[str, str]) -> str:
    """As `docker service inspect --pretty`; `network_name`: ID -> name."""
    spec, task = service.spec, service.spec.task
    lines: list[Line] = [(0, "ID", service.id), (0, "Name", spec.annotations.name)]
    lines += _labels(spec.annotations.labels)
    lines += [(0, "Service Mode", mode_word(spec).title())]
    if spec.WhichOneof("mode") == "replicated":
        lines += [(1, "Replicas", str(spec.replicated.replicas))]
    elif spec.WhichOneof("mode") == "replicated_job":
        job = spec.replicated_job
        lines += [(1, "Max Concurrent", str(job.max_concurrent or job.total_completions))]
        lines += [(1, "Total Completions", str(job.total_completions))]
    if service.HasField("job_status"):
        lines += [(1, "Job Iteration", str(service.job_status.iteration))]
        lines += [(1, "Last Execution", format_time(service.job_status.last_execution))]
    lines += _update_status(service.update_status)
    if service.allocation_error:
        lines += [(0, "Allocation", service.allocation_error)]
    lines += [(0, "Placement", "")]
    if task.placement.constraints:
        lines += [(1, "Constraints", ", ".join(task.placement.constraints))]
    if task.placement.spread:
        lines += [(1, "Preferences", ", ".join(f"spread={item}" for item in task.placement.spread))]
    if task.placement.max_replicas_per_node:
        lines += [(1, "Max Replicas Per Node", str(task.placement.max_replicas_per_node))]
    if not states.is_job(spec):
        lines += _rollout("UpdateConfig", spec.update) + _rollout("RollbackConfig", spec.rollback)
    lines += _restart(task.restart)
    lines += _container(task.container)
    reserved = task.resources.reservations
    lines += _resources("Reservations", reserved, reserved.generic) + _resources("Limits", task.resources.limits)
    if task.networks:
        names = (network_name.get(item.network_id, item.network_id) for item in task.networks)
        lines += [(0, "Networks", " ".join(names))]
    lines += [(0, "Endpoint Mode", "dnsrr" if spec.endpoint.mode == pb.DNSRR else "vip")]
    if spec.endpoint.balance:
        lines += [(0, "Balance", BALANCE[spec.endpoint.balance])]
    if spec.endpoint.weight_label:
        lines += [(0, "Balance Weight", spec.endpoint.weight_label)]
    lines += _ports(service.endpoint.spec.ports or spec.endpoint.ports)
    if clients := client_addresses(service):
        lines += [(0, "Client Addresses", clients)]
    for vip in service.endpoint.virtual_ips:
        name = network_name.get(vip.network_id, vip.network_id)
        lines += [(0, "Virtual IP", f"{' '.join(filter(None, (vip.address, vip.address6)))} ({name})")]
    return _text(lines)


def pretty_node(node: pb.Node) -> str:
    """As `docker node inspect --pretty`."""
    description = node.description
    lines: list[Line] = [(0, "ID", node.id)]
    if node.spec.annotations.name:
        lines += [(0, "Name", node.spec.annotations.name)]
    lines += _labels(node.spec.annotations.labels)
    lines += [(0, "Hostname", description.hostname), (0, "Joined at", format_time(node.meta.created_at))]
    lines += [(0, "Status", ""), (1, "State", pb.NodeStatus.State.Name(node.status.state).capitalize())]
    if node.status.message:
        lines += [(1, "Message", node.status.message)]
    lines += [(1, "Availability", AVAILABILITY.get(node.spec.availability, "Unknown"))]
    lines += [(1, "Address", node.status.addr or node.advertise_host)]
    if node.role == pb.MANAGER:
        lines += [(0, "Manager Status", ""), (1, "Address", node.manager_status.addr or node.manager_addr)]
        reached = "Unreachable" if manager_word(node) == "Unreachable" else "Reachable"
        lines += [(1, "Raft Status", reached), (1, "Leader", "Yes" if node.manager_status.leader else "No")]
    platform = description.platform
    lines += [(0, "Platform", ""), (1, "Operating System", platform.os), (1, "Architecture", platform.architecture)]
    lines += _resources("Resources", description.resources, description.generic)
    lines += [(0, "Engine Version", description.engine_version), (0, "Balancer", description.balancer)]
    return _text(lines)


def _text(lines: Iterable[Line]) -> str:
    out = []
    for indent, label, value in lines:
        head = f"{' ' * indent}{label}:"
        out.append(f"{head:<22} {value}" if value else head)
    return "\n".join(out) + "\n"


def _labels(labels: Mapping[str, str]) -> list[Line]:
    if not labels:
        return []
    return [(0, "Labels", ""), *((1, key, labels[key]) for key in sorted(labels))]


def _update_status(status: pb.UpdateStatus) -> list[Line]:
    if status.state == pb.UpdateStatus.NONE:
        return []
    lines: list[Line] = [(0, "UpdateStatus", ""), (1, "State", update_state(status.state))]
    if status.started_at:
        lines += [(1, "Started", format_time(status.started_at))]
    if status.completed_at:
        lines += [(1, "Completed", format_time(status.completed_at))]
    return [*lines, (1, "Message", status.message)] if status.message else lines


def _rollout(heading: str, config: pb.UpdateConfig) -> list[Line]:
    lines: list[Line] = [
        (0, heading, ""),
        (1, "Parallelism", str(config.parallelism if config.HasField("parallelism") else PARALLELISM)),
    ]
    if config.delay_s:
        lines += [(1, "Delay", format_duration(config.delay_s))]
    return [
        *lines,
        (1, "On failure", FAILURE[config.failure_action]),
        (1, "Monitoring Period", format_duration(config.monitor_s if config.HasField("monitor_s") else MONITOR_S)),
        (1, "Max failure ratio", f"{config.max_failure_ratio:.6g}"),
        (1, "Order", ORDER[config.order]),
    ]


def _restart(policy: pb.RestartPolicy) -> list[Line]:
    lines: list[Line] = [
        (0, "RestartPolicy", ""),
        (1, "Condition", RESTART[policy.condition]),
        (1, "Delay", format_duration(policy.delay_s if policy.HasField("delay_s") else RESTART_DELAY_S)),
        (1, "Max attempts", str(policy.max_attempts)),
    ]
    return [*lines, (1, "Window", format_duration(policy.window_s))] if policy.window_s else lines


def _container(container: pb.ContainerSpec) -> list[Line]:
    lines: list[Line] = [(0, "ContainerSpec", ""), (1, "Image", container.image)]
    for label, value in (
        ("Command", " ".join(container.command)),
        ("Args", " ".join(container.args)),
        ("Env", " ".join(container.env)),
        ("Hostname", container.hostname),
        ("Dir", container.dir),
        ("User", container.user),
        ("Stop signal", container.stop_signal),
        ("Health check", " ".join(container.health.test)),
        ("Devices", " ".join(device.host_path for device in container.devices)),
        ("Capabilities added", " ".join(container.capability_add)),
        ("Capabilities dropped", " ".join(container.capability_drop)),
    ):
        if value:
            lines += [(1, label, value)]
    for mount in container.mounts:
        lines += [(1, "Mount", "")]
        lines += [(2, "Target", mount.target)]
        lines += [(2, "Source", mount.source)] if mount.source else []
        lines += [(2, "ReadOnly", str(mount.read_only).lower())]
        lines += [(2, "Type", pb.Mount.Type.Name(mount.type).lower())]
    return lines


def _resources(heading: str, resources: pb.Resources, generic: Iterable[pb.GenericResource] = ()) -> list[Line]:
    lines: list[Line] = []
    if resources.nano_cpus:
        lines += [(1, "CPU", f"{resources.nano_cpus / NANO:g}")]
    if resources.memory_bytes:
        lines += [(1, "Memory", human_memory(resources.memory_bytes))]
    if resources.pids:
        lines += [(1, "PIDs", str(resources.pids))]
    if text := shown(generic):
        lines += [(1, "Generic", text)]
    return [(0, heading, ""), *lines] if lines else []


def _ports(ports: Iterable[pb.PortConfig]) -> list[Line]:
    lines: list[Line] = []
    for port in ports:
        lines += [(0, "Ports", "")]
        lines += [(1, "PublishedPort", str(port.published_port))] if port.published_port else []
        lines += [(1, "Protocol", pb.Protocol.Name(port.protocol).lower()), (1, "TargetPort", str(port.target_port))]
        lines += [(1, "PublishMode", pb.PublishMode.Name(port.mode).lower())]
        lines += [(1, "HostIP", port.host_ip)] if port.host_ip else []
    return lines
