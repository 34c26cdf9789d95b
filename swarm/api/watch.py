"""One service and its tasks, live: first everything, then what changes.

Changes wait for a slow reader merged per task, so there is a bound without a queue: the service's own
number of tasks. When even that is too much, the reader gets everything afresh.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from proto.control_pb2 import WatchEvent
from proto.objects_pb2 import Node, Service, Task
from swarm.api.backend import Backend
from swarm.api.find import find_service
from swarm.api.views import eligible_nodes, shown_service, shown_task
from swarm.errors import NoLeader
from swarm.store.store import Event, Store

PENDING_MAX = 5_000
"""Changed tasks that wait for the reader; beyond it a snapshot is sent instead."""


class Changes:
    """What the reader has not been told yet. Pure: fed with the store's events."""

    def __init__(self, service_id: str) -> None:
        self._service_id = service_id
        self._tasks: dict[str, Task | None] = {}
        self._service_changed = False
        self._nodes_changed = False
        self._snapshot_due = True

    def note(self, events: Sequence[Event]) -> bool:
        """Take in events; whether there is something to tell."""
        if not events:
            self._snapshot_due = True
        for event in events:
            record = event.record
            if isinstance(record, Task) and record.service_id == self._service_id:
                self._tasks[record.id] = event.after if isinstance(event.after, Task) else None
            elif isinstance(record, Service) and record.id == self._service_id:
                self._service_changed = True
            elif isinstance(record, Node):
                self._nodes_changed = True
        if len(self._tasks) > PENDING_MAX:
            self._snapshot_due = True
        if self._snapshot_due:
            self._tasks.clear()
        return bool(self._snapshot_due or self._tasks or self._service_changed or self._nodes_changed)

    def take(self, store: Store) -> WatchEvent:
        """The next event for the reader."""
        service = store.services.get(self._service_id)
        event = WatchEvent(snapshot=self._snapshot_due, service_removed=service is None)
        if service is not None:
            event.nodes_eligible = eligible_nodes(store, service)
            if self._snapshot_due or self._service_changed:
                event.service.CopyFrom(shown_service(service))
        if self._snapshot_due:
            event.tasks.extend(shown_task(task) for task in store.tasks.where("service", self._service_id))
        else:
            event.tasks.extend(shown_task(task) for task in self._tasks.values() if task is not None)
            event.removed_task_ids.extend(task_id for task_id, task in self._tasks.items() if task is None)
        self._tasks.clear()
        self._service_changed = self._nodes_changed = self._snapshot_due = False
        return event


async def watch(backend: Backend, ref: str) -> AsyncGenerator[WatchEvent, None]:
    """Ends after the event that says that the service is gone. Raises NotFound, and NoLeader when this manager
    no longer leads."""
    store = backend.store
    changes = Changes(find_service(store, ref).id)
    wake = asyncio.Event()
    is_lost = asyncio.Event()

    def on_events(events: Sequence[Event]) -> None:
        if changes.note(events):
            wake.set()

    def on_lost() -> None:
        is_lost.set()
        wake.set()

    stops = [store.subscribe(on_events), backend.lost_leadership.subscribe(on_lost)]
    try:
        while True:
            event = changes.take(store)
            wake.clear()
            yield event
            if event.service_removed:
                return
            await wake.wait()
            if is_lost.is_set():
                raise NoLeader("this manager does not lead any more: watch again")
    finally:
        for stop in stops:
            stop()
