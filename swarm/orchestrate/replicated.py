"""Replicated services: as many slots as replicas, the lowest free numbers first."""

from __future__ import annotations

import heapq
from collections import Counter

from proto import objects_pb2 as pb
from swarm.orchestrate.restart import is_given_up
from swarm.orchestrate.view import Slot, View
from swarm.store import states

CREATED_MAX = 2_000
"""Tasks created in one look: what a leader decides at once keeps its event loop for some tenths of a second. The
creations themselves cause the next look, which goes on."""


def scale(view: View) -> None:
    """Create what is missing, remove what is too much."""
    wanted = view.spec.replicated.replicas
    held = [slot for slot in view.slots.values() if slot.runnable or is_given_up(view, slot)]
    if len(held) < wanted:
        _up(view, wanted, {slot.key for slot in held})
    elif len(held) > wanted:
        _down(view, wanted, held)


def _up(view: View, wanted: int, taken: set[int | str]) -> None:
    number, missing = 1, min(CREATED_MAX, wanted - len(taken))
    while missing:
        if number not in taken:
            slot = view.slots.setdefault(number, Slot(number))
            reason = f"slot {number} of {wanted}"
            view.act(slot, view.create(slot, pb.TASK_RUNNING, reason))
            missing -= 1
        number += 1


def _down(view: View, wanted: int, held: list[Slot]) -> None:
    """From slots without a node first, then from the node with most of this service's tasks; there those that do
    not run yet first, then the highest number."""
    copies: Counter[str] = Counter()
    by_node: dict[str, list[tuple[bool, int, Slot]]] = {}
    for slot in held:
        node_id, running = _where(slot)
        copies[node_id] += 1
        by_node.setdefault(node_id, []).append((running, -int(slot.key), slot))
    for slots in by_node.values():
        slots.sort(key=lambda entry: entry[:2], reverse=True)  # the last one goes first
    # Among equally full nodes the same rule decides: what does not run first, then the highest number.
    fullest = [(node_id != "", -count, *by_node[node_id][-1][:2], node_id) for node_id, count in copies.items()]
    heapq.heapify(fullest)
    for _ in range(len(held) - wanted):
        placed, negative, _, _, node_id = heapq.heappop(fullest)
        slot = by_node[node_id].pop()[2]
        if not slot.settled:
            reason = f"scaled down to {wanted}"
            view.act(slot, *(view.discard(task, reason) for task in slot.tasks))
        if negative < -1:
            heapq.heappush(fullest, (placed, negative + 1, *by_node[node_id][-1][:2], node_id))


def _where(slot: Slot) -> tuple[str, bool]:
    """The node of the slot's furthest task ("" when it has none, or the slot was given up), and whether it runs."""
    runnable = [task for task in slot.runnable if not states.has_stopped(task)]
    if not runnable:
        return "", False
    best = max(runnable, key=lambda task: (task.status.state, task.id))
    return best.node_id, best.status.state == pb.TASK_RUNNING
