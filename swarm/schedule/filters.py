"""Which nodes may take a task. Each filter is one question with one line for people; the first that says no counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from proto import objects_pb2 as pb
from proto.objects_pb2 import Node, Task, TaskSpec
from swarm.errors import Invalid
from swarm.schedule.constraints import machine, parse_constraint
from swarm.store import states
from swarm.store.store import Store

HostPort = tuple[int, int]
"""Protocol and port of the host."""


@dataclass(slots=True)
class Load:
    """What a node carries, and what this pass has put on it."""

    node: Node
    tasks: int
    """Tasks of all services that shall run there."""
    nano_cpus_free: int = 0
    memory_bytes_free: int = 0
    host_ports: set[HostPort] = field(default_factory=set)
    service_tasks: dict[str, int] = field(default_factory=dict)

    def take(self, need: Need) -> None:
        self.tasks += 1
        self.nano_cpus_free -= need.nano_cpus
        self.memory_bytes_free -= need.memory_bytes
        self.host_ports.update(need.host_ports)
        self.service_tasks[need.service_id] = self.service_tasks.get(need.service_id, 0) + 1


@dataclass(frozen=True, slots=True)
class Need:
    """What the tasks of one group ask of a node."""

    service_id: str
    spec: TaskSpec
    nano_cpus: int
    memory_bytes: int
    host_ports: frozenset[HostPort]
    max_per_node: int

    @classmethod
    def of(cls, task: Task) -> Need:
        reserved = task.spec.resources.reservations
        return cls(
            task.service_id,
            task.spec,
            reserved.nano_cpus,
            reserved.memory_bytes,
            host_ports_of(task),
            task.spec.placement.max_replicas_per_node,
        )


Filter = Callable[[Need, Load], bool]


def _is_ready(need: Need, load: Load) -> bool:
    return states.takes_tasks(load.node)


def _has_resources(need: Need, load: Load) -> bool:
    return need.nano_cpus <= max(0, load.nano_cpus_free) and need.memory_bytes <= max(0, load.memory_bytes_free)


def _satisfies_constraints(need: Need, load: Load) -> bool:
    return satisfies(load.node, need.spec)


def _has_platform(need: Need, load: Load) -> bool:
    return runs_platform(load.node, need.spec)


def _has_ports_free(need: Need, load: Load) -> bool:
    return not need.host_ports or need.host_ports.isdisjoint(load.host_ports)


def _is_below_max(need: Need, load: Load) -> bool:
    return not need.max_per_node or load.service_tasks.get(need.service_id, 0) < need.max_per_node


FILTERS: tuple[tuple[Filter, str], ...] = (
    (_is_ready, "{} not available for new tasks"),
    (_has_resources, "insufficient resources on {}"),
    (_satisfies_constraints, "scheduling constraints not satisfied on {}"),
    (_has_platform, "unsupported platform on {}"),
    (_has_ports_free, "host-mode port already in use on {}"),
    (_is_below_max, "max replicas per node limit exceeded on {}"),
)
"""In the order in which they are asked. The texts are Docker's."""

COUNTED: tuple[Filter, ...] = (_has_resources, _has_ports_free, _is_below_max)
"""Those whose answer changes with each task placed."""


def refusing(need: Need, load: Load) -> str | None:
    """The text of the first filter that refuses the node, or None."""
    return next((text for accepts, text in FILTERS if not accepts(need, load)), None)


def still_accepts(need: Need, load: Load) -> bool:
    return all(accepts(need, load) for accepts in COUNTED)


def explain(refusals: Iterable[str]) -> str:
    """Docker's line: `no suitable node (insufficient resources on 2 nodes; ...)`, most frequent reason first."""
    counts: dict[str, int] = {}
    for text in refusals:
        counts[text] = counts.get(text, 0) + 1
    if not counts:
        return "no suitable node (the cluster has no node)"
    most_first = sorted(counts.items(), key=lambda item: -item[1])
    parts = [text.format(f"{n} node" if n == 1 else f"{n} nodes") for text, n in most_first]
    return f"no suitable node ({'; '.join(parts)})"


def fits(node: Node, spec: TaskSpec) -> bool:
    """The node satisfies the constraints and platforms of `spec`, whatever its state and load are now."""
    return satisfies(node, spec) and runs_platform(node, spec)


def satisfies(node: Node, spec: TaskSpec) -> bool:
    for text in spec.placement.constraints:
        try:
            if not parse_constraint(text).matches(node):
                return False
        except Invalid:  # the API refuses these; one stored all the same is satisfied nowhere, and says so
            return False
    return True


def runs_platform(node: Node, spec: TaskSpec) -> bool:
    """One of the wanted platforms is the node's; a part left empty on either side matches any."""
    wanted = spec.placement.platforms
    if not wanted:
        return True
    has = node.description.platform
    return any(
        (not platform.os or not has.os or platform.os.lower() == has.os.lower())
        and (
            not platform.architecture
            or not has.architecture
            or machine(platform.architecture) == machine(has.architecture)
        )
        for platform in wanted
    )


def host_ports_of(task: Task) -> frozenset[HostPort]:
    return frozenset((p.protocol, p.published_port) for p in task.endpoint.ports if p.mode == pb.HOST)


def add_resources(store: Store, load: Load) -> None:
    has = load.node.description.resources
    load.nano_cpus_free, load.memory_bytes_free = has.nano_cpus, has.memory_bytes
    for task in store.tasks.where("reserving", load.node.id):
        reserved = task.spec.resources.reservations
        load.nano_cpus_free -= reserved.nano_cpus
        load.memory_bytes_free -= reserved.memory_bytes


def add_host_ports(store: Store, load: Load) -> None:
    for task in store.tasks.where("node", load.node.id):
        if not states.has_stopped(task) and task.status.state >= pb.TASK_ASSIGNED:
            load.host_ports |= host_ports_of(task)
