"""Statuses on their way to the managers: the latest of each task, kept until a manager has said that it is
stored. One batch is under way at a time; what changes meanwhile waits and only its last value is sent, so
100 tasks that start together cost a handful of log entries at the managers."""

from __future__ import annotations

from dataclasses import dataclass, field

from proto.dispatch_pb2 import StatusBatch, TaskStatusUpdate
from proto.objects_pb2 import TaskStatus

BATCH_MAX = 1024
"""Statuses per message, the reference's limit: about 200 kB."""


@dataclass(slots=True)
class StatusBook:
    _waiting: dict[str, TaskStatus] = field(default_factory=dict)
    _under_way: dict[str, TaskStatus] = field(default_factory=dict)
    _sequence: int = 0

    def record(self, task_id: str, status: TaskStatus) -> None:
        self._waiting[task_id] = status

    def forget(self, task_id: str) -> None:
        """The task is no longer ours: its status interests nobody."""
        self._waiting.pop(task_id, None)
        self._under_way.pop(task_id, None)

    def next_batch(self) -> StatusBatch | None:
        """None while a batch is under way or nothing waits."""
        if self._under_way or not self._waiting:
            return None
        chosen = list(self._waiting)[:BATCH_MAX]
        self._under_way = {task_id: self._waiting.pop(task_id) for task_id in chosen}
        self._sequence += 1
        updates = [TaskStatusUpdate(task_id=i, status=s) for i, s in self._under_way.items()]
        return StatusBatch(sequence=self._sequence, updates=updates)

    def acknowledge(self, sequence: int) -> None:
        """Acknowledgements of earlier batches (of a session that was lost) mean nothing: those were taken back."""
        if sequence == self._sequence:
            self._under_way = {}

    def take_back(self) -> None:
        """The session is lost or the acknowledgement overdue: what was under way will be sent again,
        unless something newer waits."""
        self._waiting = self._under_way | self._waiting
        self._under_way = {}

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._under_way
