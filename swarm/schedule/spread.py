"""Choosing among the nodes that may take a task: by spread preferences first, then the emptiest node.

The preferences make a tree (zone, then rack, ...); each branch counts the service's tasks below it, and each task
goes to the branch that has fewest. On the leaves a node is better when this service did not fail on it lately,
then when it has fewer tasks of the service, then fewer tasks at all. Heaps keep a choice at O(log nodes).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from proto import objects_pb2 as pb
from proto.objects_pb2 import Task
from swarm.schedule.constraints import read_key
from swarm.schedule.filters import Load, Need, still_accepts
from swarm.store import states

FAULTS_MAX = 5
"""From so many failures of one service on one node within the window, the node is a last resort for it."""
FAULT_WINDOW_S = 300.0


@dataclass(frozen=True, slots=True)
class Faults:
    """Nodes on which a service failed often of late, with the number of failures."""

    counts: dict[str, int]

    @classmethod
    def of(cls, tasks: Iterable[Task], now: float) -> Faults:
        """Counted from the failed tasks that are still remembered."""
        failed = Counter(
            task.node_id
            for task in tasks
            if task.status.state in (pb.TASK_FAILED, pb.TASK_REJECTED)
            and states.changed_at(task) > now - FAULT_WINDOW_S
        )
        return cls({node_id: count for node_id, count in failed.items() if count >= FAULTS_MAX})


class _Leaf:
    """Nodes that no further preference tells apart."""

    def __init__(self, need: Need, loads: list[Load], faults: Faults) -> None:
        self._need = need
        self._faults = faults
        self.count = sum(load.service_tasks.get(need.service_id, 0) for load in loads)
        self._heap = [(self._score(load), load.node.id, load) for load in loads]
        heapq.heapify(self._heap)

    def _score(self, load: Load) -> tuple[int, int, int]:
        faults = self._faults.counts.get(load.node.id, 0)
        return faults, load.service_tasks.get(self._need.service_id, 0), load.tasks

    def place_one(self) -> str | None:
        """Take the best node that has room; its ID, or None when none has."""
        while self._heap:
            _, node_id, load = self._heap[0]
            if not still_accepts(self._need, load):
                heapq.heappop(self._heap)
                continue
            load.take(self._need)
            self.count += 1
            heapq.heapreplace(self._heap, (self._score(load), node_id, load))
            return node_id
        return None


class _Branch:
    """One level of preference: children by the label's value; a node without the label has the value ""."""

    def __init__(self, need: Need, loads: list[Load], keys: list[str], faults: Faults) -> None:
        parts: dict[str, list[Load]] = {}
        for load in loads:
            parts.setdefault(read_key(keys[0], load.node), []).append(load)
        children = [(value, _grow(need, part, keys[1:], faults)) for value, part in parts.items()]
        self.count: int = sum(child.count for _, child in children)
        self._heap = [(child.count, value, child) for value, child in children]
        heapq.heapify(self._heap)

    def place_one(self) -> str | None:
        while self._heap:
            _, value, child = self._heap[0]
            node_id = child.place_one()
            if node_id is None:
                heapq.heappop(self._heap)
                continue
            self.count += 1
            heapq.heapreplace(self._heap, (child.count, value, child))
            return node_id
        return None


def _grow(need: Need, loads: list[Load], keys: list[str], faults: Faults) -> _Leaf | _Branch:
    return _Branch(need, loads, keys, faults) if keys else _Leaf(need, loads, faults)


class Placer:
    """Places tasks that are alike, one at a time, on nodes that passed every filter."""

    def __init__(self, need: Need, loads: list[Load], faults: Faults) -> None:
        self._root = _grow(need, loads, list(need.spec.placement.spread), faults)

    def place_one(self) -> str | None:
        """The chosen node's ID (its load is counted), or None when no node has room."""
        return self._root.place_one()
