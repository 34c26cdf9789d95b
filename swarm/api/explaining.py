"""Which object a person wants to have explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from proto.control_pb2 import Explanation
from proto.objects_pb2 import Task
from swarm.api import find
from swarm.api.backend import Backend
from swarm.errors import Invalid, NotFound
from swarm.explain import explain_node, explain_service, explain_task
from swarm.store.states import slot_of
from swarm.store.store import Store

T = TypeVar("T")


def explain(backend: Backend, ref: str) -> Explanation:
    """Of the service, else the node, else the task of this name or ID. Raises NotFound, or Invalid (several match)."""
    store, now = backend.store, backend.now()
    if not ref:
        raise Invalid("nothing is named: give a service, a task (web.3, or its ID) or a node")
    service = _or_none(lambda: find.find_service(store, ref))
    if service is not None:
        return explain_service(store, service, now)
    node = _or_none(lambda: find.find_node(store, ref, backend.consensus.node_id))
    if node is not None:
        return explain_node(store, node)
    task = _newest(store, ref) or _or_none(lambda: find.find_task(store, ref))
    if task is not None:
        return explain_task(store, task, now)
    raise NotFound(f"no service, node or task is called {ref}: see `pyswarm service ls`, `node ls` and `service ps`")


def _or_none(look: Callable[[], T]) -> T | None:
    try:
        return look()
    except NotFound:
        return None


def _newest(store: Store, ref: str) -> Task | None:
    """The latest task of a slot."""
    named = find.find_slot(store, ref)
    if named is None:
        return None
    service, slot = named
    tasks = (task for task in store.tasks.where("service", service.id) if slot_of(task) == f"{service.id}/{slot}")
    return max(tasks, key=lambda task: (task.meta.created_at, task.id), default=None)
