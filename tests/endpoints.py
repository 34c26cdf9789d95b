"""Which endpoints should serve, as managers tell it, and how long hosts took to agree (pure but for `EventReader`)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import grpc

from proto.control_pb2 import Event, EventsRequest, Filter, ListRequest
from proto.control_pb2_grpc import ControlStub
from proto.objects_pb2 import TASK_RUNNING, Node, NodeStatus, Task
from swarm.store.states import is_runnable
from tests.serving import Addresses, Sight

ENDED = frozenset(("complete", "shutdown", "failed", "rejected", "orphaned", "remove"))
"""Observed states, and the removal, after which a task serves nothing."""


@dataclass(frozen=True, slots=True)
class Change:
    """The task's endpoint begins (or ends) to serve by an entry that the leader proposed at this time (Unix s)."""

    at: float
    service: str
    task_id: str
    serves: bool


@dataclass(slots=True)
class _Fold:
    service_of: dict[str, str] = field(default_factory=dict)
    node_of: dict[str, str] = field(default_factory=dict)
    """Task -> hostname"""
    running: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    down: set[str] = field(default_factory=set)

    def serves(self, task_id: str) -> bool:
        return task_id in self.running and task_id not in self.ended and self.node_of[task_id] not in self.down

    def touched(self, event: Event) -> list[str]:
        """Tasks that may begin or end to serve by it."""
        if event.type == "task":
            return [event.id]
        return [task_id for task_id in self.running if self.node_of[task_id] == event.name]

    def take(self, event: Event) -> None:
        if event.type == "node":
            state = event.attributes.get("state.new")
            if state is not None:
                (self.down.add if state == "down" else self.down.discard)(event.name)
            return
        self.node_of[event.id] = event.attributes.get("node", "")
        self.service_of[event.id] = event.attributes.get("service", "")
        if event.attributes.get("desired.new") in ENDED or event.action in ENDED:
            self.ended.add(event.id)
            self.running.discard(event.id)
        elif event.action == "running":
            self.running.add(event.id)


def changes(events: Iterable[Event]) -> list[Change]:
    """Of all endpoints, in the order of the events, which begin with the cluster's first."""
    fold, found = _Fold(), []
    for event in events:
        touched = fold.touched(event)
        before = [fold.serves(task_id) for task_id in touched]
        fold.take(event)
        for task_id, served in zip(touched, before, strict=True):
            if fold.serves(task_id) != served:
                found.append(Change(event.at, fold.service_of[task_id], task_id, not served))
    return found


def delay_s(history: Sequence[Sight], address: str, change: Change, until: float | None = None) -> float | None:
    """From the change until a host was seen to serve the address accordingly. 0: it did already, as a host does that
    knows by itself that its own task has ended. Never: up to `until`, when another change took its place; None if there
    was none."""
    serves = False
    for sight in history:
        if sight.at >= change.at:
            if serves == change.serves:
                return 0.0
            if until is not None and sight.at > until:
                break
            if (address in sight.addresses) == change.serves:
                return sight.at - change.at
        serves = address in sight.addresses
    if serves == change.serves and (not history or history[-1].at < change.at):
        return 0.0
    return until - change.at if until is not None else None


class EventReader(threading.Thread):
    """What one manager tells of tasks and nodes, from the first that it remembers on."""

    def __init__(self, control: ControlStub) -> None:
        super().__init__(name="events", daemon=True)
        self.events: list[Event] = []
        self._stream = control.Events(EventsRequest(since=1, types=["task", "node"]))

    def run(self) -> None:
        try:
            for event in self._stream:
                self.events.append(event)
        except grpc.RpcError:
            return  # `stop`, or the manager goes down

    def stop(self) -> None:
        self._stream.cancel()
        self.join(10)


def merged(readers: Iterable[EventReader]) -> list[Event]:
    """What any of them heard, once, in the order of the changes. A removal bears each manager's own time."""
    known = {
        (event.at, event.type, event.id, event.action): event for reader in readers for event in list(reader.events)
    }
    return [known[key] for key in sorted(known)]


def address_of(task: Task) -> str:
    return task.networks[0].address.partition("/")[0]


def all_nodes(control: ControlStub) -> list[Node]:
    return list(control.ListNodes(ListRequest(), timeout=30).nodes)


def all_tasks(control: ControlStub, service_ids: Iterable[str] = ()) -> list[Task]:
    return list(control.ListTasks(ListRequest(filter=Filter(service_ids=service_ids)), timeout=30).tasks)


def serving(tasks: Iterable[Task], nodes: Iterable[Node]) -> dict[str, Addresses]:
    """Service -> addresses of its tasks that should be served."""
    down = {node.id for node in nodes if node.status.state == NodeStatus.DOWN}
    found: dict[str, set[str]] = {}
    for task in tasks:
        if is_wanted(task) and task.node_id not in down:
            found.setdefault(task.service_annotations.name, set()).add(address_of(task))
    return {service: frozenset(addresses) for service, addresses in found.items()}


def is_wanted(task: Task) -> bool:
    """It runs, and is meant to."""
    return task.status.state == TASK_RUNNING and is_runnable(task)
