"""The stage: tasks that have addresses get a node. Each is placed once and never moved.

Tasks of one service and spec version are alike: they are placed together, with one look at each node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from proto import objects_pb2 as pb
from proto.objects_pb2 import Node, Task
from swarm.schedule.filters import Load, Need, add_host_ports, add_resources, explain, refusing
from swarm.schedule.spread import Faults, Placer
from swarm.store import states
from swarm.store.changes import Decision, Group, Update, copy_of
from swarm.store.dirty import Dirty
from swarm.store.store import Store


def decide(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
    """A node for each task that waits for one, or the reason why there is none (`status.err`, written only when
    it changes). Tried again when a node, the task's service or anybody's use of a node has changed."""
    widely = dirty.everything or dirty.freed or bool(dirty.nodes)
    batches: dict[tuple[str, int, str], list[Task]] = {}
    for task in store.tasks.where("waiting", "node"):
        if widely or task.service_id in dirty.services:
            preset = task.node_id  # of a global service: only asked whether it may
            batches.setdefault((task.service_id, task.spec_version, preset), []).append(task)
    if not batches:
        return Decision()
    board = Board(store, now)
    groups: list[Group] = []
    for (_, _, preset), tasks in sorted(batches.items(), key=lambda item: item[0]):
        tasks.sort(key=lambda task: (task.slot, task.id))
        if preset:
            groups.extend(board.confirm(preset, tasks))
        else:
            groups.extend(board.place(tasks))
    return Decision(tuple(groups))


class Board:
    """The nodes with what they carry, kept up to date through one pass."""

    def __init__(self, store: Store, now: float) -> None:
        self._store = store
        self._now = now
        self._loads: dict[str, Load] = {}
        self._with_ports: set[str] = set()
        self._counted: set[str] = set()

    def confirm(self, node_id: str, tasks: list[Task]) -> Iterable[Group]:
        """Tasks whose node is given (global services): only the filters are asked."""
        node = self._store.nodes.get(node_id)
        for task in tasks:
            need = Need.of(task)
            if node is None:
                yield from self._refuse(task, f"no suitable node (node {node_id} was removed)")
                continue
            load = self._load(node, need)
            if need.service_id not in load.service_tasks:
                own = (other for other in self._store.tasks.where("loading", node_id) if _is_placed(other))
                load.service_tasks[need.service_id] = sum(other.service_id == need.service_id for other in own)
            refused = refusing(need, load)
            if refused:
                yield from self._refuse(task, explain([refused]))
            else:
                load.take(need)
                yield self._assign(task, node_id, "one task per node")

    def place(self, tasks: list[Task]) -> Iterable[Group]:
        """Tasks that are alike, spread over the nodes that may take them."""
        need = Need.of(tasks[0])
        loads = self.loads(need)
        accepted = [load for load in loads if refusing(need, load) is None]
        spread = "".join(f", evenly over {key}" for key in need.spec.placement.spread)
        why_here = f"fewest tasks of {len(accepted)} nodes that may take it (of {len(loads)}){spread}"
        placer = Placer(need, accepted, self._faults(need.service_id))
        for index, task in enumerate(tasks):
            node_id = placer.place_one()
            if node_id is None:
                why = explain(text for load in loads if (text := refusing(need, load)) is not None)
                for rest in tasks[index:]:
                    yield from self._refuse(rest, why)
                return
            yield self._assign(task, node_id, why_here)

    def loads(self, need: Need, preset: str = "") -> list[Load]:
        """The nodes, or the one that is given, with what they carry."""
        nodes = [node for node in self._store.nodes if preset in ("", node.id)]
        loads = [self._load(node, need) for node in nodes]
        self._count_service(need.service_id)
        return loads

    def _load(self, node: Node, need: Need) -> Load:
        load = self._loads.get(node.id)
        if load is None:
            load = self._loads[node.id] = Load(node, self._store.tasks.count("loading", node.id))
            add_resources(self._store, load)
        if need.host_ports and node.id not in self._with_ports:
            self._with_ports.add(node.id)
            add_host_ports(self._store, load)
        return load

    def _count_service(self, service_id: str) -> None:
        """Add the service's tasks to the nodes that carry them, once per pass."""
        if service_id in self._counted:
            return
        self._counted.add(service_id)
        for task in self._store.tasks.where("service", service_id):
            load = self._loads.get(task.node_id)
            if load is not None and _is_placed(task) and states.is_runnable(task) and not states.has_stopped(task):
                load.service_tasks[service_id] = load.service_tasks.get(service_id, 0) + 1

    def _faults(self, service_id: str) -> Faults:
        return Faults.of(self._store.tasks.where("service", service_id), self._now)

    def _assign(self, task: Task, node_id: str, reason: str) -> Group:
        placed = copy_of(task)
        placed.node_id = node_id
        placed.placement_reason = reason
        placed.status.Clear()
        placed.status.state = pb.TASK_ASSIGNED
        placed.status.timestamp = placed.status.applied_at = self._now
        placed.status.message = "scheduler assigned task to node"
        return (Update(placed),)

    def _refuse(self, task: Task, why: str) -> Iterable[Group]:
        if task.status.err == why:
            return
        waiting = copy_of(task)
        waiting.status.err = why
        waiting.status.timestamp = waiting.status.applied_at = self._now
        yield (Update(waiting),)


def _is_placed(task: Task) -> bool:
    return task.status.state >= pb.TASK_ASSIGNED
