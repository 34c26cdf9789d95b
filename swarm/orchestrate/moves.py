"""Running tasks that move to another node though nothing is wrong with them: off a drained node, or to a fuller use of
the nodes (`service rebalance`).

A few at a time: never more than the service's budget of unavailable tasks, counting those that are missing anyway.
With start-first the replacement runs before the task is stopped; `Task.replaces` says which one it stands in for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from proto import objects_pb2 as pb
from proto.objects_pb2 import Node, Service, Task
from swarm.orchestrate.outdated import is_outdated
from swarm.orchestrate.restart import backoff_s, failures_up_to
from swarm.orchestrate.rollout import MOVING, has_room_for_two, is_start_first
from swarm.orchestrate.view import Fits, Slot, View
from swarm.store import states
from swarm.store.changes import Update, copy_of
from swarm.store.store import Store

BUDGET_SHARE = 4
"""A quarter of the replicas, and at least one, may be unavailable where the service does not say (as Kubernetes'
deployments do)."""
PATIENCE_S = 30.0
"""A replacement that no node takes for so long ends the rebalancing: there is no better place now."""


def budget(service: Service) -> int:
    return service.spec.max_unavailable or max(1, service.spec.replicated.replicas // BUDGET_SHARE)


def advance(view: View) -> None:
    """One step of what moves."""
    if view.is_global or view.is_job:
        return
    slots = [view.slots[key] for key in sorted(view.slots, key=int)]
    for slot in slots:
        if not slot.settled:
            _follow(view, slot)
    room = budget(view.service) - sum(_is_taken_up(slot) for slot in slots)
    for slot in slots:
        if room > 0 and (task := _leaves_drained_node(view, slot)) is not None:
            _move(
                view, slot, task, f"node {_name(view.node_of(task))} is drained", is_start_first(view, view.spec.update)
            )
            room -= 1
    if view.service.rebalance_moves:
        _rebalance(view, slots, room)


def _is_taken_up(slot: Slot) -> bool:
    """Without a running task, or about to move. A crash loop takes up nothing: it could hold up drains for ever."""
    runnable = slot.runnable
    if _is_moving(slot):
        return True
    serves = any(task.status.state == pb.TASK_RUNNING for task in runnable)
    return bool(runnable) and not serves and not any(task.failures_before for task in runnable)


def _is_moving(slot: Slot) -> bool:
    """A task and the one that stands in for it both run, or shall."""
    ids = {task.id for task in slot.runnable}
    return any(task.replaces in ids for task in slot.runnable)


def _follow(view: View, slot: Slot) -> None:
    """Stop the task that moves once its replacement runs; or the replacement, if it is not needed any more."""
    for new in slot.runnable:
        old = next((task for task in slot.runnable if task.id == new.replaces), None)
        if old is None or states.has_stopped(new):
            continue
        if new.status.state == pb.TASK_RUNNING:
            view.act(slot, view.stop(old, f"moved to node {_name(view.node_of(new))}"))
        elif not _is_drained(view, old) and _leads_nowhere(view, old, new):
            view.act(slot, view.stop(new, f"{old.id} stays where it is"))
            if view.service.rebalance_moves and not _is_updating(view):
                _set_moves(view, 0)
        return


def _leads_nowhere(view: View, old: Task, new: Task) -> bool:
    if new.node_id:
        return new.node_id == old.node_id
    until = new.meta.created_at + PATIENCE_S
    if until > view.now:
        view.wake(until)
    return until <= view.now


def _is_drained(view: View, task: Task) -> bool:
    node = view.node_of(task)
    return node is not None and node.spec.availability == pb.DRAINED


def _movable(view: View, slot: Slot) -> Task | None:
    """The slot's task, if it runs, is alone, and no earlier replacement of it has just failed."""
    runnable = slot.runnable
    if slot.settled or len(runnable) != 1 or runnable[0].status.state != pb.TASK_RUNNING:
        return None
    task, last = runnable[0], slot.tasks[-1]
    if last.replaces == task.id and last.status.state in states.STOPPED_BY_ITSELF:
        policy = view.spec.task.restart
        at = states.changed_at(last) + backoff_s(policy, failures_up_to(policy, last))
        if at > view.now:
            view.wake(at)
            return None
    return task


def _leaves_drained_node(view: View, slot: Slot) -> Task | None:
    task = _movable(view, slot)
    return task if task is not None and _is_drained(view, task) else None


def _move(view: View, slot: Slot, old: Task, why: str, start_first: bool) -> None:
    if not start_first:
        view.act(slot, view.stop(old, why), view.create(slot, pb.TASK_READY, f"replaces {old.id}: {why}"))
        return
    last = slot.tasks[-1]
    failures = failures_up_to(view.spec.task.restart, last) if last.replaces == old.id else 0
    reason = f"{why}: starts before {old.id} stops"
    view.act(slot, view.create(slot, pb.TASK_RUNNING, reason, failures, replaces=old.id))


# ---------------------------------------------------------------- rebalancing


def planned(store: Store, service: Service, fits: Fits) -> int:
    """How many of the service's tasks have to move until the nodes that may run it carry alike, within one."""
    nodes = [node for node in store.nodes if states.takes_tasks(node) and fits(node, service.spec.task)]
    counts = _counts(nodes, store.tasks.where("service", service.id))
    moves = 0
    while (pair := _uneven(counts)) is not None:
        counts[pair[0]] -= 1
        counts[pair[1]] += 1
        moves += 1
    return moves


def _rebalance(view: View, slots: list[Slot], room: int) -> None:
    """A batch of moves, once the one before is done."""
    if _is_updating(view) or any(map(_is_moving, slots)):
        return
    nodes = [node for node in view.store.nodes if states.takes_tasks(node) and view.fits_on(node)]
    movable = [task for slot in slots if (task := _movable(view, slot)) is not None]
    counts = _counts(nodes, (task for slot in slots for task in slot.runnable))
    left = view.service.rebalance_moves
    while room > 0 and left:
        pair = _uneven(counts)
        task = next((task for task in reversed(movable) if pair is not None and task.node_id == pair[0]), None)
        if pair is None or task is None:
            left = 0
            break
        few, many = counts[pair[1]], counts[pair[0]]
        why = f"rebalancing: node {_name(view.node_of(task))} has {many} tasks of it, another one {few}"
        _move(view, view.slots[task.slot], task, why, has_room_for_two(view))
        movable.remove(task)
        counts[pair[0]] -= 1
        counts[pair[1]] += 1
        room, left = room - 1, left - 1
    if left != view.service.rebalance_moves:
        _set_moves(view, left)


def _is_updating(view: View) -> bool:
    """The rollout writes the service itself, and replaces tasks anyway."""
    if view.service.update_status.state in MOVING:
        return True
    return any(is_outdated(view, task) for slot in view.slots.values() for task in slot.runnable)


def _counts(nodes: Iterable[Node], tasks: Iterable[Task]) -> Counter[str]:
    counts = Counter({node.id: 0 for node in nodes})
    for task in tasks:
        if task.node_id in counts and states.is_runnable(task) and not states.has_stopped(task):
            counts[task.node_id] += 1
    return counts


def _uneven(counts: Counter[str]) -> tuple[str, str] | None:
    """(fullest, emptiest) node when moving a task from one to the other evens them out."""
    if not counts:
        return None
    fullest = max(counts, key=lambda node_id: (counts[node_id], node_id))
    emptiest = min(counts, key=lambda node_id: (counts[node_id], node_id))
    return (fullest, emptiest) if counts[fullest] - counts[emptiest] > 1 else None


def _set_moves(view: View, moves: int) -> None:
    service = copy_of(view.service)
    service.rebalance_moves = moves
    view.act(None, Update(service))


def _name(node: Node | None) -> str:
    return (node.description.hostname or node.id) if node is not None else "?"
