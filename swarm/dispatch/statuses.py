"""Observed task states on their way into the store: latest wins per task, flushed in groups, acknowledged
once stored. The rule what a node may report is pure (`merged`); `StatusWriter` is the thin shell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from proto.dispatch_pb2 import TaskStatusUpdate
from proto.objects_pb2 import TASK_ACCEPTED, TASK_ORPHANED, TASK_REJECTED, TASK_REMOVE, Task, TaskState, TaskStatus
from swarm.errors import Conflict, NotFound, SwarmError
from swarm.store.changes import Group, Update
from swarm.store.store import Store
from swarm.store.writer import Writer

FLUSH_DELAY_S = 0.02
"""Reports of this long go into one write: a node that starts 100 tasks sends several per task."""
RETRY_DELAY_S = 0.2
"""After a write that found no quorum or a full queue."""
GROUPS_PER_COMMIT = 1_000
"""A tenth of the writer's queue, so that reports cannot crowd out the API's writes."""

log = structlog.get_logger(__name__)
_NEVER_REPORTED = (TASK_REMOVE, TASK_ORPHANED)


def refusal(task: Task | None, node_id: str, status: TaskStatus) -> str | None:
    """Why this report is dropped, or None. Reports of tasks that are gone are dropped silently elsewhere."""
    if task is not None and task.node_id != node_id:
        return f"task {task.id} belongs to node {task.node_id or '(none)'}"
    state = status.state
    if state not in TaskState.values() or not TASK_ACCEPTED <= state <= TASK_REJECTED or state in _NEVER_REPORTED:
        return f"state {state} is not one that a node reports"
    return None


def merged(task: Task, status: TaskStatus, now: float) -> Task | None:
    """The task with this status; None when nothing would change or the state would go backwards."""
    current = task.status
    if status.state < current.state:
        return None
    updated = Task()
    updated.CopyFrom(task)
    updated.status.CopyFrom(status)
    updated.status.applied_at = current.applied_at
    if updated.status == current:
        return None  # a report sent again, because its acknowledgement was lost
    updated.status.applied_at = now
    return updated


@dataclass(slots=True)
class _Batch:
    reports: dict[str, TaskStatus] = field(default_factory=dict)
    stored: list[Callable[[], object]] = field(default_factory=list)


class StatusWriter:
    """`now` is the wall clock (Unix s). Run `run` for as long as this manager leads."""

    def __init__(self, store: Store, writer: Writer, now: Callable[[], float]) -> None:
        self._store = store
        self._writer = writer
        self._now = now
        self._waiting = _Batch()
        self._wake = asyncio.Event()

    def submit(self, node_id: str, updates: Iterable[TaskStatusUpdate], stored: Callable[[], object]) -> None:
        """Take in a node's reports; `stored` is called once all of them are in the store (or superseded)."""
        for update in updates:
            task = self._store.tasks.get(update.task_id)
            why = refusal(task, node_id, update.status)
            if why is not None:
                log.warning("status dropped", node_id=node_id, task_id=update.task_id, why=why)
            elif task is not None:
                known = self._waiting.reports.get(update.task_id)
                if known is None or known.state <= update.status.state:
                    self._waiting.reports[update.task_id] = update.status
        self._waiting.stored.append(stored)
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(FLUSH_DELAY_S)
            self._wake.clear()
            batch, self._waiting = self._waiting, _Batch()
            while batch.reports:
                batch.reports = await self._store_some(batch.reports)
            for stored in batch.stored:
                stored()

    async def _store_some(self, reports: dict[str, TaskStatus]) -> dict[str, TaskStatus]:
        """One round of writing; returns what has to be tried again against the store as it is then."""
        ids: list[str] = []
        groups: list[Group] = []
        left: dict[str, TaskStatus] = {}
        for task_id, status in reports.items():
            task = self._store.tasks.get(task_id)
            changed = merged(task, status, self._now()) if task is not None else None
            if changed is None:
                continue
            if len(groups) >= GROUPS_PER_COMMIT:
                left[task_id] = status
                continue
            ids.append(task_id)
            groups.append((Update(changed),))
        try:
            errors = await self._writer.commit_all(groups)
        except SwarmError as error:
            errors = [error] * len(groups)
        failed = [(task_id, error) for task_id, error in zip(ids, errors, strict=True) if error is not None]
        left.update((task_id, reports[task_id]) for task_id, error in failed if error.retryable)
        hard = [error for _, error in failed if not isinstance(error, Conflict | NotFound)]
        if hard:
            log.warning("statuses not stored", tasks=len(hard), error=str(hard[0]), retried=hard[0].retryable)
            await asyncio.sleep(RETRY_DELAY_S)
        return left
