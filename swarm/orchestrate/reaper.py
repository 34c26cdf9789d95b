"""Forgetting: old tasks beyond the history limit, removed services after their last task, unused networks."""

from __future__ import annotations

from collections.abc import Iterator

from proto import objects_pb2 as pb
from proto.objects_pb2 import Network, Service
from swarm.orchestrate.view import Slot, View
from swarm.store import states
from swarm.store.changes import Remove
from swarm.store.store import Store

HISTORY_LIMIT = 5
"""Tasks kept per slot when the cluster's spec does not say (Docker's default)."""
HISTORY_MAX = 1000
"""No restart policy keeps more per slot: attempts are counted from what is kept, so more are as good as unlimited."""


def trim(view: View) -> None:
    """Delete what is not wanted any more and has stopped, and the oldest of what is remembered."""
    limit = _history_limit(view)
    for slot in list(view.slots.values()):
        for task in slot.leaving:
            if task.status.state < pb.TASK_ASSIGNED or view.is_gone(task):
                view.groups.append((Remove(task),))
        if not slot.settled:
            _trim_history(view, slot, limit)


def _history_limit(view: View) -> int:
    cluster = view.store.cluster
    limit = cluster.spec.task_history_limit if cluster is not None else 0
    attempts = view.spec.task.restart.max_attempts
    return max(limit or HISTORY_LIMIT, min(attempts + 1, HISTORY_MAX) if attempts else 0)


def _trim_history(view: View, slot: Slot, limit: int) -> None:
    surplus = len(slot.tasks) - limit
    for task in slot.tasks[:-1]:  # the newest says whether the slot was given up
        if surplus <= 0:
            break
        # What says that a job's execution has completed is not forgotten before its iteration ends.
        is_proof = view.is_job and task.status.state == pb.TASK_COMPLETE
        if not states.is_runnable(task) and view.is_gone(task) and not is_proof:
            view.groups.append((Remove(task),))
            surplus -= 1


def remove_service(view: View) -> None:
    """The user removed the service: its tasks first, then, with the last of them gone, itself."""
    for slot in view.slots.values():
        for task in slot.tasks:
            view.act(slot, view.discard(task, "service removed"))
    trim(view)
    if not view.slots and view.service.id in view.store.services:
        view.act(None, Remove(view.service))


def ownerless(service_id: str) -> Service:
    """Stands in for a service that is gone while tasks of it are left."""
    return Service(id=service_id, pending_delete=True)


def unused_networks(store: Store) -> Iterator[Network]:
    """Networks that the user removed and that no service and no task refers to."""
    leaving = [network for network in store.networks if network.pending_delete]
    if not leaving:
        return
    used = {config.network_id for service in store.services for config in service.spec.task.networks}
    for network in leaving:
        if network.id not in used and not store.tasks.count("network", network.id):
            yield network
