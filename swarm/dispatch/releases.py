"""Which nodes may still send new connections to tasks that are to stop. Pure bookkeeping.

A task that is to stop leaves every node's balancers and names first. Each node that knew it confirms that its kernel
has forgotten it; when the last one has (or has lost its session), the task is released: its own node may signal it.
Nothing of this is stored: after a change of leader the node goes on without an answer (node/drain.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Leaving:
    node_id: str
    """Where the task is."""
    viewers: set[str]
    """Nodes that have not confirmed yet."""


class Releases:
    def __init__(self) -> None:
        self._leaving: dict[str, _Leaving] = {}
        self._released: dict[str, list[str]] = {}

    def begin(self, task_id: str, node_id: str, viewers: Iterable[str]) -> None:
        """The task leaves the balancers of these nodes."""
        self._leaving[task_id] = _Leaving(node_id, set(viewers))
        self._settle(task_id)

    def confirmed(self, viewer: str, task_ids: Iterable[str]) -> None:
        for task_id in task_ids:
            if task_id in self._leaving:
                self._leaving[task_id].viewers.discard(viewer)
                self._settle(task_id)

    def gone(self, viewer: str) -> None:
        """The node's session ended: it cannot be waited for. (Alone it does not stop tasks of its own either.)"""
        self.confirmed(viewer, [task_id for task_id, leaving in self._leaving.items() if viewer in leaving.viewers])

    def forget(self, task_id: str) -> None:
        self._leaving.pop(task_id, None)

    def take(self) -> dict[str, list[str]]:
        """Node -> its tasks released since the last call."""
        released, self._released = self._released, {}
        return released

    def _settle(self, task_id: str) -> None:
        leaving = self._leaving[task_id]
        if not leaving.viewers:
            del self._leaving[task_id]
            self._released.setdefault(leaving.node_id, []).append(task_id)
