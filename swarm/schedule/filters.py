"""Which nodes may take a task. Each filter is one question with one line for people; the first that says no counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from proto.objects_pb2 import GenericResource, Node, Platform, Task, TaskSpec
from swarm.errors import Invalid
from swarm.schedule import generic
from swarm.schedule.constraints import machine, parse_constraint
from swarm.schedule.ledger import Account, HostPort, Ledger, host_ports_of, in_the_way
from swarm.store import states
from swarm.store.store import Store

LOOPBACK = frozenset(("127.0.0.1", "::1"))
"""Addresses that every node has."""


class Load:
    """What a node carries, and what this pass has put on it."""

    __slots__ = (
        "generic_left",
        "given",
        "host_ports",
        "memory_bytes_free",
        "nano_cpus_free",
        "node",
        "node_id",
        "service_tasks",
        "tasks",
    )

    def __init__(self, node: Node, account: Account) -> None:
        self.node = node
        self.node_id = node.id
        self.tasks = account.tasks
        """Of all services, those that shall run there."""
        has = node.description.resources
        self.nano_cpus_free = has.nano_cpus - account.nano_cpus
        self.memory_bytes_free = has.memory_bytes - account.memory_bytes
        self.generic_left = generic.left_of(node.description.generic, account.generic)
        self.given: list[GenericResource] = []
        """Generic resources of the task that was taken last."""
        self.host_ports = set(account.host_ports)
        self.service_tasks: dict[str, int] = {}

    def take(self, need: Need) -> None:
        self.tasks += 1
        self.nano_cpus_free -= need.nano_cpus
        self.memory_bytes_free -= need.memory_bytes
        self.given = generic.take(self.generic_left, need.generic) if need.generic else []
        self.host_ports.update(need.host_ports)
        self.service_tasks[need.service_id] = self.service_tasks.get(need.service_id, 0) + 1


@dataclass(frozen=True, slots=True)
class Need:
    """What the tasks of one group ask of a node."""

    service_id: str
    spec: TaskSpec
    nano_cpus: int
    memory_bytes: int
    generic: tuple[GenericResource, ...]
    host_ports: frozenset[HostPort]
    max_per_node: int
    constraints: tuple[str, ...]
    platforms: tuple[Platform, ...]
    is_plain: bool
    """Nothing of this counts: a node that takes one takes any number."""
    encrypted: bool
    """One of its networks is."""

    @classmethod
    def of(cls, task: Task, store: Store) -> Need:
        spec = task.spec
        placement, reserved = spec.placement, spec.resources.reservations
        counted = (
            reserved.nano_cpus,
            reserved.memory_bytes,
            tuple(reserved.generic),
            host_ports_of(task),
            placement.max_replicas_per_node,
        )
        asked = tuple(placement.constraints), tuple(placement.platforms)
        networks = (store.networks.get(attachment.network_id) for attachment in task.networks)
        encrypted = any(network is not None and states.is_encrypted(network) for network in networks)
        return cls(task.service_id, spec, *counted, *asked, is_plain=not any(counted), encrypted=encrypted)

    @property
    def shape(self) -> tuple[bytes, bytes, frozenset[HostPort], bool]:
        """Equal for needs that the same nodes can meet, whatever the service."""
        spec = self.spec
        return (
            spec.placement.SerializeToString(),
            spec.resources.reservations.SerializeToString(),
            self.host_ports,
            self.encrypted,
        )


Filter = Callable[[Need, Load], bool]


def _is_ready(need: Need, load: Load) -> bool:
    return states.takes_tasks(load.node)


def _has_resources(need: Need, load: Load) -> bool:
    return (
        need.nano_cpus <= max(0, load.nano_cpus_free)
        and need.memory_bytes <= max(0, load.memory_bytes_free)
        and (not need.generic or generic.covers(load.generic_left, need.generic))
    )


def _satisfies_constraints(need: Need, load: Load) -> bool:
    return satisfies(load.node, need.constraints)


def _has_platform(need: Need, load: Load) -> bool:
    return runs_platform(load.node, need.platforms)


def _encrypts(need: Need, load: Load) -> bool:
    return not need.encrypted or load.node.description.encrypts


def _has_ports_free(need: Need, load: Load) -> bool:
    return not need.host_ports or not in_the_way(need.host_ports, load.host_ports)


def _has_addresses(need: Need, load: Load) -> bool:
    """Of the node, to publish host-mode ports on."""
    wanted = {host_ip for _, _, host_ip in need.host_ports if host_ip}
    return (
        not wanted or wanted <= {text.partition("/")[0] for text in load.node.description.underlay_subnets} | LOOPBACK
    )


def _is_below_max(need: Need, load: Load) -> bool:
    return not need.max_per_node or load.service_tasks.get(need.service_id, 0) < need.max_per_node


FILTERS: tuple[tuple[Filter, str], ...] = (
    (_is_ready, "{} not available for new tasks"),
    (_has_resources, "insufficient resources on {}"),
    (_satisfies_constraints, "scheduling constraints not satisfied on {}"),
    (_has_platform, "unsupported platform on {}"),
    (_encrypts, "no encryption of networks on {}"),
    (_has_ports_free, "host-mode port already in use on {}"),
    (_has_addresses, "address of a host-mode port missing on {}"),
    (_is_below_max, "max replicas per node limit exceeded on {}"),
)
"""In the order in which they are asked. The texts are Docker's, which asks for no encryption."""


def refusing(need: Need, load: Load) -> str | None:
    """The text of the first filter that refuses the node, or None."""
    return next((text for accepts, text in FILTERS if not accepts(need, load)), None)


def accepts_any(need: Need, load: Load) -> bool:
    """The node would take such a task of a service that it has none of."""
    return all(accepts(need, load) for accepts, _ in FILTERS if accepts is not _is_below_max)


def has_room(need: Need, load: Load) -> bool:
    """A node that passed every filter would take one more task, of a service that it has none of."""
    return need.is_plain or (_has_resources(need, load) and _has_ports_free(need, load))


def still_accepts(need: Need, load: Load) -> bool:
    return need.is_plain or (has_room(need, load) and _is_below_max(need, load))


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
    return satisfies(node, spec.placement.constraints) and runs_platform(node, spec.placement.platforms)


def surplus(store: Store, node: Node) -> frozenset[str]:
    """Tasks (IDs) that shall run on the node but cannot stay, because it has less by now than they reserve together:
    the youngest, and those that were given what is gone."""
    if not _is_exceeded(node, store.view(Ledger).account(node.id)):
        return frozenset()
    kept, found = Account(), set()
    held = (task for task in store.tasks.where("node", node.id) if states.reserves(task) and states.is_runnable(task))
    for task in sorted(held, key=lambda task: (task.meta.created_at, task.id)):
        kept.reserve(task, 1)
        if _is_exceeded(node, kept):
            kept.reserve(task, -1)
            found.add(task.id)
    return frozenset(found)


def _is_exceeded(node: Node, account: Account) -> bool:
    """More is reserved than the node has: it had more when it took its tasks."""
    has = node.description.resources
    if account.nano_cpus > has.nano_cpus or account.memory_bytes > has.memory_bytes:
        return True
    if not account.generic:
        return False
    return min(generic.left_of(node.description.generic, account.generic).values()) < 0


def satisfies(node: Node, constraints: Iterable[str]) -> bool:
    for text in constraints:
        try:
            if not parse_constraint(text).matches(node):
                return False
        except Invalid:  # the API refuses these; one stored all the same is satisfied nowhere, and says so
            return False
    return True


def runs_platform(node: Node, wanted: Collection[Platform]) -> bool:
    """One of the wanted platforms is the node's; a part left empty on either side matches any."""
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
