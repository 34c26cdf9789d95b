"""Whether a task must be replaced because its service's spec says something else now."""

from __future__ import annotations

from proto import objects_pb2 as pb
from proto.objects_pb2 import PortConfig, Service, Task, TaskSpec
from swarm.orchestrate.view import Slot, View


def is_outdated(view: View, task: Task) -> bool:
    """True when a task made from today's spec would differ from this one in anything that a container shows.

    Equal spec versions decide at once. Placement alone replaces nothing where the node still fits; fresh
    registry credentials replace nothing; ingress ports are served by the hosts, not by the task."""
    service = view.service
    if task.spec_version == service.spec_version:
        return False
    differs = view.outdated_versions.get(task.spec_version)
    if differs is None:
        differs = _essence(task.spec) != _essence(service.spec.task)
        view.outdated_versions[task.spec_version] = differs
    if differs or _host_ports_differ(service, task):
        return True
    if task.spec.placement == service.spec.task.placement:
        return False
    if not task.node_id:
        return True  # not placed yet: let today's rules choose
    node = view.node_of(task)
    return node is not None and not view.fits_on(node)


def needs_update(view: View, slot: Slot) -> bool:
    """The slot holds an outdated task that runs or shall run, or one that was given up under an older spec."""
    runnable = slot.runnable
    if runnable:
        return any(is_outdated(view, task) for task in runnable)
    return bool(slot.tasks) and is_outdated(view, slot.tasks[-1])


def _essence(spec: TaskSpec) -> bytes:
    kept = TaskSpec()
    kept.CopyFrom(spec)
    kept.ClearField("placement")
    if kept.HasField("container"):
        kept.container.ClearField("registry_auth")
    if not kept.resources.ByteSize():  # an empty message means the same as none
        kept.ClearField("resources")
    if not kept.restart.ByteSize():
        kept.ClearField("restart")
    return kept.SerializeToString(deterministic=True)


def _host_ports(ports: list[PortConfig]) -> dict[tuple[int, int, str, str], int]:
    return {(p.protocol, p.target_port, p.name, p.host_ip): p.published_port for p in ports if p.mode == pb.HOST}


def _host_ports_differ(service: Service, task: Task) -> bool:
    if not task.HasField("endpoint"):
        return False  # not allocated yet: it will get today's ports
    wanted, held = _host_ports(list(service.spec.endpoint.ports)), _host_ports(list(task.endpoint.ports))
    if wanted.keys() != held.keys():
        return True
    return any(port and port != held[key] for key, port in wanted.items())
