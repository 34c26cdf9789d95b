"""Why no node takes a task: every node, and everything that it lacks, nearest miss first. For people, on demand."""

from __future__ import annotations

from collections.abc import Callable

from proto import objects_pb2 as pb
from proto.objects_pb2 import NodeStatus, Task
from swarm.errors import Invalid
from swarm.schedule import generic
from swarm.schedule.constraints import parse_constraint
from swarm.schedule.filters import FILTERS, Filter, Load, Need
from swarm.schedule.ledger import in_the_way
from swarm.schedule.stage import Board
from swarm.store.store import Store

NODES_MAX = 10
"""Nodes told one by one; of the rest only the number."""


def why_pending(store: Store, task: Task, now: float) -> tuple[str, ...]:
    """One line per node that refuses the task, those that refuse for the fewest reasons first; empty if some node
    would take it. `now` is Unix s."""
    need = Need.of(task, store)
    loads = Board(store, now).loads(need, task.node_id)
    lacks = {load.node.id: missing(need, load) for load in loads}
    if not all(lacks.values()):
        return ()
    ordered = sorted(loads, key=lambda load: (len(lacks[load.node.id]), _name(load), load.node.id))
    lines = [f"{_name(load)}: {'; '.join(lacks[load.node.id])}" for load in ordered[:NODES_MAX]]
    if len(ordered) > NODES_MAX:
        lines.append(f"and {len(ordered) - NODES_MAX} more nodes, for more reasons than these")
    return tuple(lines) or ("the cluster has no node",)


def missing(need: Need, load: Load) -> list[str]:
    """What keeps this node from taking one of these tasks, in words; empty = nothing."""
    return [_WORDS[accepts](need, load) for accepts, _ in FILTERS if not accepts(need, load)]


def _name(load: Load) -> str:
    return load.node.description.hostname or load.node.id


def _state(need: Need, load: Load) -> str:
    node = load.node
    if node.status.state != NodeStatus.READY:
        return f"is {NodeStatus.State.Name(node.status.state).lower()}"
    return "is drained" if node.spec.availability == pb.DRAINED else "is paused"


def _resources(need: Need, load: Load) -> str:
    lacks = []
    cpus = (need.nano_cpus - max(0, load.nano_cpus_free)) / 1e9
    memory_mib = (need.memory_bytes - max(0, load.memory_bytes_free)) / 2**20
    if cpus > 0:
        lacks.append(f"{cpus:g} of {need.nano_cpus / 1e9:g} CPUs")
    if memory_mib > 0:
        lacks.append(f"{memory_mib:.0f} of {need.memory_bytes / 2**20:.0f} MiB memory")
    for resource in need.generic:
        missing_count = resource.count - generic.free(load.generic_left, resource.kind)
        if missing_count > 0:
            lacks.append(f"{missing_count} of {resource.count} {resource.kind}")
    return f"lacks {' and '.join(lacks)}" if lacks else "lacks resources"


def _constraints(need: Need, load: Load) -> str:
    unmet = []
    for text in need.spec.placement.constraints:
        try:
            if not parse_constraint(text).matches(load.node):
                unmet.append(text)
        except Invalid:
            unmet.append(text)
    return f"does not satisfy {', '.join(unmet)}"


def _platform(need: Need, load: Load) -> str:
    has = load.node.description.platform
    wanted = ", ".join(f"{each.os}/{each.architecture}" for each in need.spec.placement.platforms)
    return f"is {has.os}/{has.architecture}, the image is for {wanted}"


def _encryption(need: Need, load: Load) -> str:
    return "cannot encrypt networks (its kernel lacks ESP with AES-GCM)"


def _ports(need: Need, load: Load) -> str:
    names = {int(value): name.lower() for name, value in pb.Protocol.items()}
    taken = sorted(in_the_way(need.host_ports, load.host_ports))
    return f"has port {', '.join(f'{port}/{names[protocol]}' for protocol, port, _ in taken)} in use"


def _addresses(need: Need, load: Load) -> str:
    return f"has no address {', '.join(sorted({host_ip for _, _, host_ip in need.host_ports if host_ip}))}"


def _replicas(need: Need, load: Load) -> str:
    return f"carries {load.service_tasks.get(need.service_id, 0)} tasks of at most {need.max_per_node}"


_WORDS: dict[Filter, Callable[[Need, Load], str]] = dict(
    zip(
        (accepts for accepts, _ in FILTERS),
        (_state, _resources, _constraints, _platform, _encryption, _ports, _addresses, _replicas),
        strict=True,
    )
)
