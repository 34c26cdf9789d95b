"""Choosing among the nodes that may take a task: by spread preferences first, then the emptiest node.

The preferences make a tree (zone, then rack, ...); each branch counts the service's tasks below it, and each task
goes to the branch that has fewest. On the leaves a node is better when this service did not fail on it lately,
then when it has fewer tasks of the service, then fewer tasks at all.

Where a service has neither tasks nor failures, nodes stand in the same order for every service that asks for the same:
such groups share one heap (`Pool`), and each keeps another of the few nodes that are special to it. So a task costs
O(log nodes), also where each is of a service of its own.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from proto.objects_pb2 import ContainerSpec, Task
from swarm.schedule.constraints import read_key
from swarm.schedule.filters import Load, Need, has_room, still_accepts
from swarm.store import states

FAULTS_MAX = 5
"""From so many failures of one service on one node within the window, the node is a last resort for it."""
FAULT_WINDOW_S = 300.0


@dataclass(frozen=True, slots=True)
class Faults:
    """Nodes on which a service failed often of late, with the number of failures."""

    counts: dict[str, int]

    @classmethod
    def of(cls, failed: Iterable[Task], container: ContainerSpec, now: float) -> Faults:
        """Counted from the failed tasks that are still remembered; what another image or command did says nothing."""
        counts = Counter(
            task.node_id
            for task in failed
            if states.changed_at(task) > now - FAULT_WINDOW_S and task.spec.container == container
        )
        return cls({node_id: count for node_id, count in counts.items() if count >= FAULTS_MAX})


class Pool:
    """Nodes that passed every filter for tasks of one shape (`Need.shape`), emptiest first. For one pass: in it nodes
    only get fuller, so one without room is dropped for good, and an old count is put right when it comes to the top."""

    def __init__(self, loads: Iterable[Load]) -> None:
        self._heap = [(load.tasks, load.node_id, load) for load in loads]
        heapq.heapify(self._heap)
        self.node_ids = frozenset(node_id for _, node_id, _ in self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def take_out(self, need: Need) -> Load | None:
        """The emptiest node with room; None when none has."""
        heap = self._heap
        while heap:
            tasks, node_id, load = heap[0]
            if load.tasks != tasks:
                heapq.heapreplace(heap, (load.tasks, node_id, load))
                continue
            heapq.heappop(heap)
            if has_room(need, load):
                return load
        return None

    def put_back(self, loads: Iterable[Load]) -> None:
        for load in loads:
            heapq.heappush(self._heap, (load.tasks, load.node_id, load))


class Grove:
    """The pools below one level of preference, by the label's value; a node without the label has the value ""."""

    def __init__(self, loads: Iterable[Load], keys: list[str]) -> None:
        self.key, rest = keys[0], keys[1:]
        parts: dict[str, list[Load]] = {}
        for load in loads:
            parts.setdefault(read_key(self.key, load.node), []).append(load)
        self.parts = {value: plant(part, rest) for value, part in parts.items()}

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())


def plant(loads: Iterable[Load], keys: list[str]) -> Pool | Grove:
    """What nodes there are to choose from, for all groups of one shape."""
    return Grove(loads, keys) if keys else Pool(loads)


class _Leaf:
    """Nodes that no further preference tells apart."""

    def __init__(self, need: Need, pool: Pool, special: list[Load], faults: Faults) -> None:
        self._need = need
        self._pool = pool
        self._faults = faults
        self._known = {load.node_id for load in special}
        self._lent: list[Load] = []
        accepting = [load for load in special if load.node_id in pool.node_ids and still_accepts(need, load)]
        self.count = sum(load.service_tasks.get(need.service_id, 0) for load in accepting)
        self._special = [(self._score(load), load.node_id, load) for load in accepting]
        heapq.heapify(self._special)

    def _score(self, load: Load) -> tuple[int, int, int]:
        faults = self._faults.counts.get(load.node_id, 0)
        return faults, load.service_tasks.get(self._need.service_id, 0), load.tasks

    def place_one(self) -> Load | None:
        """Take the best node that has room; None when none has."""
        load = self._fresh()  # without tasks and failures of the service: better than any other
        if load is not None:
            load.take(self._need)
            heapq.heappush(self._special, (self._score(load), load.node_id, load))
        else:
            load = self._used()
        self.count += load is not None
        return load

    def _fresh(self) -> Load | None:
        while (load := self._pool.take_out(self._need)) is not None:
            self._lent.append(load)
            if load.node_id not in self._known:
                return load
        return None

    def _used(self) -> Load | None:
        while self._special:
            _, node_id, load = self._special[0]
            if not still_accepts(self._need, load):
                heapq.heappop(self._special)
                continue
            load.take(self._need)
            heapq.heapreplace(self._special, (self._score(load), node_id, load))
            return load
        return None

    def close(self) -> None:
        self._pool.put_back(self._lent)


class _Branch:
    """One level of preference."""

    def __init__(self, need: Need, grove: Grove, special: list[Load], faults: Faults) -> None:
        parts: dict[str, list[Load]] = {value: [] for value in grove.parts}
        for load in special:
            parts.setdefault(read_key(grove.key, load.node), []).append(load)
        children = [(value, _grow(need, part, parts[value], faults)) for value, part in grove.parts.items()]
        self.count: int = sum(child.count for _, child in children)
        self._children = [child for _, child in children]
        self._heap = [(child.count, value, child) for value, child in children]
        heapq.heapify(self._heap)

    def place_one(self) -> Load | None:
        while self._heap:
            _, value, child = self._heap[0]
            load = child.place_one()
            if load is None:
                heapq.heappop(self._heap)
                continue
            self.count += 1
            heapq.heapreplace(self._heap, (child.count, value, child))
            return load
        return None

    def close(self) -> None:
        for child in self._children:
            child.close()


def _grow(need: Need, ground: Pool | Grove, special: list[Load], faults: Faults) -> _Leaf | _Branch:
    if isinstance(ground, Grove):
        return _Branch(need, ground, special, faults)
    return _Leaf(need, ground, special, faults)


class Placer:
    """Places tasks that are alike, one at a time. `special` are the nodes that have tasks of the service, or faults.
    Closed at the end, it gives back the nodes that it holds to the others of its shape."""

    def __init__(self, need: Need, ground: Pool | Grove, special: list[Load], faults: Faults) -> None:
        self._root = _grow(need, ground, special, faults)

    def place_one(self) -> Load | None:
        """The chosen node (the task is counted), or None when no node has room."""
        return self._root.place_one()

    def close(self) -> None:
        self._root.close()
