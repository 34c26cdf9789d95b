"""The stage: tasks that have addresses get a node. Each is placed once and never moved.

Tasks of one service and spec version are alike: they are placed together. One pass decides a bounded number of tasks
and says which services it left for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import islice

from proto import objects_pb2 as pb
from proto.objects_pb2 import Node, Task, TaskStatus
from swarm.schedule.filters import Load, Need, accepts_any, explain, refusing
from swarm.schedule.ledger import Ledger
from swarm.schedule.spread import Faults, Grove, Placer, Pool, plant
from swarm.store.changes import Decision, Group, Update, copy_of
from swarm.store.dirty import Dirty
from swarm.store.store import Store

TASKS_MAX = 4_000
"""Tasks placed in one pass: about 0.1 s in which a manager does nothing else. Those that no node takes are told so all
at once, however many: only then is their group done."""
TOGETHER = 20
"""Tasks of one group stored as one change: cheaper than each for itself, and few to decide anew if one has changed."""
TOGETHER_BYTES_MAX = 500_000
"""Fewer of large ones: a third of what an entry of the log may hold."""
LOOKS_MAX = 100_000
"""Nodes asked whether they would take a task in one pass: as long again, where every service asks for something else.
The first look at all nodes does not count, and the group that reaches the limit is decided to its end."""


def decide(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
    """A node for each task that waits for one, or the reason why there is none (`status.err`, written only when
    it changes). Tried again when a node, the task's service or anybody's use of a node has changed."""
    waiting = store.view(Ledger).waiting
    if dirty.everything or dirty.freed or dirty.nodes:
        service_ids = list(waiting)
    else:
        service_ids = sorted(service_id for service_id in dirty.services if service_id in waiting)
    if not service_ids:
        return Decision()
    # Tasks of global services can only be where they are: they come first.
    service_ids.sort(key=lambda service_id: next(iter(waiting[service_id]))[1] == "")
    board = Board(store, now)
    groups: list[Group] = []
    for position, service_id in enumerate(service_ids):
        for (_, preset, _), tasks in sorted(waiting[service_id].items()):
            if preset:
                groups.extend(board.confirm(preset, tasks.values()))
            else:
                groups.extend(board.place(tasks.values()))
        if board.is_spent:
            return Decision(tuple(groups), again=frozenset(service_ids[position + (not board.was_cut) :]))
    return Decision(tuple(groups))


class Board:
    """The nodes with what they carry, kept up to date through one pass."""

    def __init__(self, store: Store, now: float) -> None:
        self._store = store
        self._now = now
        self._assigned = TaskStatus(
            state=pb.TASK_ASSIGNED, timestamp=now, applied_at=now, message="scheduler assigned task to node"
        )
        self._ledger = store.view(Ledger)
        self._loads: dict[str, Load] = {}
        self._grounds: dict[object, Pool | Grove] = {}
        self._carriers: dict[str, dict[str, Load]] = {}
        self.was_cut = False
        """Some tasks of the last service were not even looked at."""
        self._decided = 0
        self._looks = -len(store.nodes)

    @property
    def is_spent(self) -> bool:
        return self.was_cut or self._decided >= TASKS_MAX or self._looks >= LOOKS_MAX

    def confirm(self, node_id: str, tasks: Iterable[Task]) -> Iterable[Group]:
        """Tasks whose node is given (global services): only the filters are asked."""
        node = self._store.nodes.get(node_id)
        for task in tasks:
            if node is None:
                yield from self._refuse(task, f"no suitable node (node {node_id} was removed)")
                continue
            need = Need.of(task, self._store)
            self._carriers_of(need.service_id)
            load = self._load(node)
            refused = refusing(need, load)
            if refused:
                yield from self._refuse(task, explain([refused]))
            else:
                load.take(need)
                yield (self._assign(task, load, "one task per node"),)

    def place(self, tasks: Collection[Task]) -> Iterable[Group]:
        """Tasks that are alike, spread over the nodes that may take them: the first of them, up to TASKS_MAX."""
        allowed = TASKS_MAX - self._decided
        if allowed <= 0:
            self.was_cut = True
            return
        batch = sorted(islice(tasks, allowed), key=lambda task: (task.slot, task.id))
        need = Need.of(batch[0], self._store)
        ground = self._ground(need)
        carriers = self._carriers_of(need.service_id)
        faults = self._faults(need)
        spread = "".join(f", evenly over {key}" for key in need.spec.placement.spread)
        why_here = f"fewest tasks of {len(ground)} nodes that may take it (of {len(self._store.nodes)}){spread}"
        placer = Placer(need, ground, self._special(need, carriers, faults), faults)
        assigned: list[Update] = []
        for task in batch:
            load = placer.place_one()
            if load is None:
                break
            carriers[load.node_id] = load
            assigned.append(self._assign(task, load, why_here))
        placer.close()
        together = max(1, min(TOGETHER, TOGETHER_BYTES_MAX // max(1, batch[0].ByteSize())))
        for start in range(0, len(assigned), together):
            yield tuple(assigned[start : start + together])
        if len(assigned) == len(batch):
            self.was_cut = len(batch) < len(tasks)
        else:
            self._looks += len(self._store.nodes)
            why = explain(text for load in self.loads(need) if (text := refusing(need, load)) is not None)
            placed = {update.record.id for update in assigned}
            for task in tasks:
                if task.id not in placed:
                    yield from self._refuse(task, why)

    def loads(self, need: Need, preset: str = "") -> list[Load]:
        """The nodes, or the one that is given, with what they carry."""
        self._carriers_of(need.service_id)
        return [self._load(node) for node in self._store.nodes if preset in ("", node.id)]

    def _load(self, node: Node) -> Load:
        load = self._loads.get(node.id)
        if load is None:
            load = self._loads[node.id] = Load(node, self._ledger.account(node.id))
        return load

    def _carriers_of(self, service_id: str) -> dict[str, Load]:
        """The nodes that have tasks of the service, with the numbers of these."""
        carriers = self._carriers.get(service_id)
        if carriers is None:
            carriers = self._carriers[service_id] = {}
            for node_id, count in self._ledger.tasks_on(service_id).items():
                node = self._store.nodes.get(node_id)
                if node is not None:
                    carriers[node_id] = self._load(node)
                    carriers[node_id].service_tasks[service_id] = count
        return carriers

    def _ground(self, need: Need) -> Pool | Grove:
        """The nodes that may take the task, but for how many of its own service they have."""
        shape = need.shape
        ground = self._grounds.get(shape)
        if ground is None:
            self._looks += len(self._store.nodes)
            accepted = (load for load in map(self._load, self._store.nodes) if accepts_any(need, load))
            ground = self._grounds[shape] = plant(accepted, list(need.spec.placement.spread))
        return ground

    def _special(self, need: Need, carriers: dict[str, Load], faults: Faults) -> list[Load]:
        special = dict(carriers)
        for node_id in faults.counts:
            node = self._store.nodes.get(node_id)
            if node is not None:
                special[node_id] = self._load(node)
        return list(special.values())

    def _faults(self, need: Need) -> Faults:
        return Faults.of(self._ledger.failed(need.service_id), need.spec.container, self._now)

    def _assign(self, task: Task, load: Load, reason: str) -> Update:
        self._decided += 1
        placed = copy_of(task)
        placed.node_id = load.node_id
        placed.placement_reason = reason
        if load.given:
            placed.assigned_generic.extend(load.given)
        placed.status.CopyFrom(self._assigned)
        return Update(placed)

    def _refuse(self, task: Task, why: str) -> Iterable[Group]:
        if task.status.err == why:
            return
        self._decided += 1
        waiting = copy_of(task)
        waiting.status.err = why
        waiting.status.timestamp = waiting.status.applied_at = self._now
        yield (Update(waiting),)
