"""Global services: one slot per node that may run them; the slot's key is the node's ID."""

from __future__ import annotations

from proto import objects_pb2 as pb
from swarm.orchestrate.restart import is_given_up, may_start_in
from swarm.orchestrate.view import Slot, View


def spread(view: View) -> None:
    """A task on each fitting node; what stays on other nodes is `restart.replace_ended`'s to stop."""
    for node in view.store.nodes:
        slot = view.slots.get(node.id) or Slot(node.id)
        if slot.settled or slot.runnable or view.is_done(slot) or is_given_up(view, slot):
            continue
        if not may_start_in(view, slot):
            continue
        view.slots[node.id] = slot
        waits = any(not view.is_gone(task) for task in slot.tasks)
        name = node.description.hostname or node.id
        view.act(slot, view.create(slot, pb.TASK_READY if waits else pb.TASK_RUNNING, f"one on node {name}"))
    for slot in view.slots.values():
        if view.store.nodes.get(str(slot.key)) is None and not slot.settled and slot.tasks:
            view.act(slot, *(view.discard(task, f"node {slot.key} was removed") for task in slot.tasks))
