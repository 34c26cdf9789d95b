"""A cluster without machines: the real store and stages, driven as the leader's loop drives them, over virtual time,
with agents that only move task states. Every committed entry is checked against what must always hold."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_network
from itertools import combinations

from proto import objects_pb2 as pb
from proto import store_pb2
from proto.objects_pb2 import Cluster, Network, Node, NodeStatus, Service, Task
from swarm.leader import STAGES
from swarm.schedule import generic
from swarm.store import states
from swarm.store.changes import Change, Create, Record, Update, copy_of, transaction
from swarm.store.dirty import Dirty
from swarm.store.store import Event, Store

COUNTED_MAX = 3
"""The most of a counted resource that a node of any simulation ever offers: where it lost some since, tasks that have
still to stop may hold more than it has."""
ROUNDS_MAX = 60
"""A quiet cluster settles in a handful of rounds; more means that two stages undo each other's work."""


def node(node_id: str, *, cpus: int = 4, labels: dict[str, str] | None = None, memory_bytes: int = 8 << 30) -> Node:
    made = Node(id=node_id)
    made.spec.annotations.labels.update(labels or {})
    made.description.hostname = node_id
    made.description.platform.os, made.description.platform.architecture = "linux", "x86_64"
    made.description.resources.nano_cpus = cpus * 10**9
    made.description.resources.memory_bytes = memory_bytes
    made.status.state = NodeStatus.READY
    return made


def network(network_id: str, *, subnet: str = "", ingress: bool = False, internal: bool = False) -> Network:
    made = Network(id=network_id)
    made.spec.annotations.name = network_id
    made.spec.ipam.subnet = subnet
    made.spec.ingress, made.spec.internal = ingress, internal
    return made


def service(service_id: str, replicas: int | None = 1, networks: Sequence[str] = (), image: str = "web:1") -> Service:
    """`replicas` None = global."""
    made = Service(id=service_id, spec_version=1)
    made.spec.annotations.name = service_id
    made.spec.task.container.image = image
    if replicas is None:
        getattr(made.spec, "global").SetInParent()
    else:
        made.spec.replicated.replicas = replicas
    for network_id in networks:
        made.spec.task.networks.add(network_id=network_id)
    return made


def offering(made: Node, **kinds: int | Sequence[str]) -> Node:
    """The node with generic resources: gpu=["A", "B"] are named, licences=3 counted."""
    for kind, offer in kinds.items():
        if isinstance(offer, int):
            made.description.generic.add(kind=kind, count=offer)
        else:
            for which in offer:
                made.description.generic.add(kind=kind, count=1, id=which)
    return made


def wanting(made: Service, **kinds: int) -> Service:
    """The service, each of whose tasks reserves so many of each kind."""
    for kind, count in kinds.items():
        made.spec.task.resources.reservations.generic.add(kind=kind, count=count)
    return made


class Simulation:
    def __init__(self, *records: Record) -> None:
        self.store = Store()
        self.now = 1000.0
        self.is_sound = True
        """False while a test has put in what must not be."""
        self._ids = 0
        self._dirty = Dirty(everything=True)
        self.wakes: dict[str, float] = {}
        self.store.subscribe(self._note)
        cluster = Cluster(id="cluster", default_addr_pool=["10.0.0.0/8"], subnet_size=24)
        self.create(cluster, *records)
        if not any(isinstance(record, Network) and record.spec.ingress for record in records):
            self.create(network("ingress", ingress=True))

    def new_id(self) -> str:
        self._ids += 1
        return f"t{self._ids:05}"

    def _note(self, events: Sequence[Event]) -> None:
        self._dirty.note(events)
        for event in events:
            if isinstance(event.before, Task) and isinstance(event.after, Task):
                assert event.after.status.state >= event.before.status.state, "an observed state went back"
                if event.before.status.state < pb.TASK_ASSIGNED <= event.after.status.state:
                    self._check_offer(event.after)

    def _check_offer(self, placed: Task) -> None:
        """Of what it was given its node has enough for all."""
        held = [t.assigned_generic for t in self.store.tasks.where("node", placed.node_id) if states.reserves(t)]
        left = generic.left_of(self.node(placed.node_id).description.generic, Counter())
        for resource in itertools.chain(*held):
            left[resource.kind, resource.id] = left.get((resource.kind, resource.id), 0) - resource.count
        for resource in placed.assigned_generic:
            assert left[resource.kind, resource.id] >= 0, f"{placed.id} was given {resource} that is not there"

    # ---- writing

    def commit(self, *groups: tuple[Change, ...]) -> None:
        entry = store_pb2.Entry(transactions=[transaction(group, self.now) for group in groups])
        result = store_pb2.EntryResult.FromString(self.store.apply(entry.SerializeToString()))
        for verdict, group in zip(result.verdicts, groups, strict=True):
            assert verdict.code == store_pb2.Verdict.OK, f"{verdict.code} {verdict.message}: {group}"

    def create(self, *records: Record) -> None:
        self.commit(*((Create(record),) for record in records))

    def replace(self, record: Record) -> None:
        self.commit((Update(record),))

    # ---- the user

    def set_history_limit(self, limit: int) -> None:
        assert self.store.cluster is not None
        changed = copy_of(self.store.cluster)
        changed.spec.task_history_limit = limit
        self.replace(changed)

    def update_spec(self, service_id: str, change: Callable[[pb.ServiceSpec], None]) -> None:
        """As the control API does it: one level of rollback, a new spec version."""
        changed = copy_of(self.service(service_id))
        changed.previous_spec.CopyFrom(changed.spec)
        changed.previous_spec_version = changed.spec_version
        change(changed.spec)
        changed.spec_version = self.store.version + 1
        self.commit((Update(changed),))

    def scale(self, service_id: str, replicas: int) -> None:
        def change(spec: pb.ServiceSpec) -> None:
            spec.replicated.replicas = replicas

        self.update_spec(service_id, change)

    def set_image(self, service_id: str, image: str) -> None:
        def change(spec: pb.ServiceSpec) -> None:
            spec.task.container.image = image

        self.update_spec(service_id, change)

    def remove_service(self, service_id: str) -> None:
        changed = copy_of(self.service(service_id))
        changed.pending_delete = True
        self.commit((Update(changed),))

    def remove_network(self, network_id: str) -> None:
        found = self.store.networks.get(network_id)
        assert found is not None
        changed = copy_of(found)
        changed.pending_delete = True
        self.commit((Update(changed),))

    def set_node(
        self,
        node_id: str,
        state: NodeStatus.State.ValueType | None = None,
        availability: pb.Availability.ValueType | None = None,
    ) -> None:
        changed = copy_of(self.node(node_id))
        if state is not None:
            changed.status.state = state
        if availability is not None:
            changed.spec.availability = availability
        self.commit((Update(changed),))

    def offer(self, node_id: str, **kinds: int | Sequence[str]) -> None:
        """The node's agent reports these generic resources from now on."""
        changed = copy_of(self.node(node_id))
        del changed.description.generic[:]
        self.replace(offering(changed, **kinds))

    # ---- the leader

    def settle(self) -> int:
        """Run the stages until they are content; returns the number of rounds that wrote something."""
        for wrote in range(ROUNDS_MAX):
            for service_id in [key for key, at in self.wakes.items() if at <= self.now]:
                del self.wakes[service_id]
                self._dirty.services.add(service_id)
            if not self._dirty:
                return wrote
            dirty, self._dirty = self._dirty, Dirty()
            for _, stage in STAGES:
                dirty.merge(self._dirty)
                decision = stage(self.store, self.now, self.new_id, dirty)
                self.wakes.update(decision.wakes)
                self._dirty.services |= decision.again
                if decision.groups:
                    self.commit(*decision.groups)
                    if self.is_sound:
                        check(self.store)
        raise AssertionError(f"the stages do not settle within {ROUNDS_MAX} rounds")

    def overlooked(self) -> list[tuple[Change, ...]]:
        """What a look at everything would still change: nothing, if `Dirty` missed nothing."""
        found: list[tuple[Change, ...]] = []
        for _, stage in STAGES:
            found.extend(stage(self.store, self.now, self.new_id, Dirty(everything=True)).groups)
        return found

    def advance(self, duration_s: float) -> None:
        """Let time pass, waking the stages when they asked for it."""
        until = self.now + duration_s
        while self.wakes and min(self.wakes.values()) <= until:
            self.now = max(self.now, min(self.wakes.values()))
            self.settle()
        self.now = until

    # ---- the agents

    def report(self, task: Task, state: pb.TaskState.ValueType, exit_code: int = 0) -> None:
        changed = copy_of(task)
        changed.status.state = state
        changed.status.exit_code = exit_code
        changed.status.timestamp = changed.status.applied_at = self.now
        self.commit((Update(changed),))

    def step(self, task: Task) -> bool:
        """What the task's agent does next, if its node is up; True when it did something."""
        at = self.store.nodes.get(task.node_id)
        if at is None or at.status.state != NodeStatus.READY or task.status.state < pb.TASK_ASSIGNED:
            return False
        if states.has_stopped(task):
            return False
        if not states.is_runnable(task):
            self.report(task, pb.TASK_SHUTDOWN)
            return True
        following = [s for s in _LIFE if task.status.state < s <= task.desired_state]
        if following:
            self.report(task, following[0])
        return bool(following)

    def run(self, hours: float = 1.0) -> None:
        """No more faults: agents and stages work, time passes, until nothing moves any more."""
        end = self.now + hours * 3600
        while self.now < end:
            self.settle()
            steps = sum(self.step(task) for task in self.store.tasks)
            if steps:
                self.now += 0.1
            elif self.wakes:
                self.now = max(self.now, min(self.wakes.values()))
            else:
                return
        raise AssertionError(f"still busy after {hours} h of virtual time: {self.wakes}")

    # ---- looking

    def service(self, service_id: str) -> Service:
        found = self.store.services.get(service_id)
        assert found is not None
        return found

    def node(self, node_id: str) -> Node:
        found = self.store.nodes.get(node_id)
        assert found is not None
        return found

    def task(self, task_id: str) -> Task:
        found = self.store.tasks.get(task_id)
        assert found is not None
        return found

    def tasks(self, service_id: str) -> list[Task]:
        return sorted(self.store.tasks.where("service", service_id), key=lambda t: (t.slot, t.meta.created_at, t.id))

    def runnable(self, service_id: str) -> list[Task]:
        return [task for task in self.tasks(service_id) if states.is_runnable(task)]

    def running(self, service_id: str) -> list[Task]:
        return [task for task in self.runnable(service_id) if task.status.state == pb.TASK_RUNNING]


_LIFE = (pb.TASK_ACCEPTED, pb.TASK_PREPARING, pb.TASK_READY, pb.TASK_STARTING, pb.TASK_RUNNING, pb.TASK_COMPLETE)


def check(store: Store) -> None:
    """What holds in every state of the store."""
    _unique(
        (network_id, address.partition("/")[0])
        for network_id, address in [
            *((vip.network_id, vip.address) for service in store.services for vip in service.endpoint.virtual_ips),
            *((leg.network_id, leg.address) for t in store.tasks if not states.has_stopped(t) for leg in t.networks),
            *((net.id, net.ipam.gateway) for net in store.networks if net.vni),
        ]
        if address
    )
    _unique(leg.address6 for t in store.tasks if not states.has_stopped(t) for leg in t.networks if leg.address6)
    _unique(net.vni for net in store.networks if net.vni)
    subnets = [ip_network(c.subnet) for net in store.networks for c in (net.ipam, net.ipam6) if c.subnet]
    assert not any(a.version == b.version and a.overlaps(b) for a, b in combinations(subnets, 2))
    _unique(at.index for at in store.nodes if at.index)
    _unique(
        (port.protocol, port.published_port, port.host_ip)
        for service in store.services
        for port in service.endpoint.spec.ports
        if port.mode == pb.INGRESS
    )
    _unique(
        (task.node_id, port.protocol, port.published_port, port.host_ip)
        for task in store.tasks
        if pb.TASK_ASSIGNED <= task.status.state <= pb.TASK_RUNNING
        for port in task.endpoint.ports
        if port.mode == pb.HOST
    )
    reserved: Counter[str] = Counter()
    given: Counter[tuple[str, str, str]] = Counter()
    for task in store.tasks:
        assert task.status.state != pb.TASK_REMOVE
        assert task.node_id or task.status.state < pb.TASK_ASSIGNED
        assert task.reason or task.desired_state == pb.TASK_NEW, task
        if states.reserves(task):
            reserved[task.node_id] += task.spec.resources.reservations.nano_cpus
            for resource in task.assigned_generic:
                given[task.node_id, resource.kind, resource.id] += resource.count
            assert _counts(task.assigned_generic) == _counts(task.spec.resources.reservations.generic), task
    for node_id, nano_cpus in reserved.items():
        at = store.nodes.get(node_id)
        assert at is None or nano_cpus <= at.description.resources.nano_cpus
    for (node_id, kind, which), count in given.items():
        most = 1 if which else COUNTED_MAX
        assert count <= most, f"{kind} {which} of {node_id} is given to {count} tasks"
    _one_per_slot(store)


def _counts(resources: Iterable[pb.GenericResource]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for resource in resources:
        counts[resource.kind] += resource.count
    return counts


def _one_per_slot(store: Store) -> None:
    """At most one task of a slot is wanted, or two while one replaces the other: start-first, or on another node."""
    wanted: dict[tuple[str, int, str], list[Task]] = {}
    for task in store.tasks:
        if states.is_runnable(task) and not states.has_stopped(task):
            place = task.node_id if not task.slot else ""
            wanted.setdefault((task.service_id, task.slot, place), []).append(task)
    for key, tasks in wanted.items():
        versions = {task.spec_version for task in tasks}
        moves = {task.replaces for task in tasks} & {task.id for task in tasks}
        assert len(tasks) <= 2, f"slot {key}: {[(t.id, t.reason) for t in tasks]}"
        assert len(tasks) == 1 or len(versions) == 2 or moves, f"slot {key}: {[(t.id, t.reason) for t in tasks]}"


def _unique(items: Iterable[object]) -> None:
    counts = Counter(items)
    assert not counts or counts.most_common(1)[0][1] == 1, f"used twice: {counts.most_common(1)}"
