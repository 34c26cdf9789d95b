"""What happens in the swarm, as `docker events` tells it, and each step of each task besides.

Every manager applies every change itself, so each remembers and tells events without asking the leader: a stream goes
on through elections. Times are the leader's, from the change itself, and thus alike on all managers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass

from proto.control_pb2 import Event, EventsRequest
from proto.objects_pb2 import (
    Availability,
    Network,
    Node,
    NodeRole,
    NodeStatus,
    Service,
    Task,
    TaskState,
    UpdateStatus,
)
from swarm.errors import Busy
from swarm.store.changes import Record
from swarm.store.store import Event as Change
from swarm.store.store import Store

REMEMBERED_MAX = 5_000
"""Changes that `--since` can go back to, on each manager, since its process began: some MiB."""
QUEUE_MAX = 5_000
"""Events that wait for one reader; a slower one is told that it lost some."""

Pairs = dict[str, tuple[str, str]]
"""Name -> (new, old), of what differs."""


@dataclass(frozen=True, slots=True)
class Seen:
    at: float
    """Unix s"""
    change: Change | None
    """None: the whole state was replaced, changes in between are unknown."""


class EventLog:
    """`now`: Unix s, for removals, which carry no time of their own."""

    def __init__(self, store: Store, now: Callable[[], float]) -> None:
        self._store, self._now = store, now
        self._seen: deque[Seen] = deque(maxlen=REMEMBERED_MAX)
        self._readers: set[_Reader] = set()
        store.subscribe(self._note)

    def _note(self, changes: Sequence[Change]) -> None:
        seen = [Seen(_at(change, self._now()), change) for change in changes] or [Seen(self._now(), None)]
        self._seen.extend(seen)
        for reader in self._readers:
            reader.add(seen)

    async def read(self, request: EventsRequest) -> AsyncGenerator[Event, None]:
        """Remembered ones from `since` on, then what happens until `until`. Raises Busy for too slow a reader."""
        reader = _Reader(request)
        if request.since:
            reader.add([seen for seen in self._seen if seen.at >= request.since])
        self._readers.add(reader)
        try:
            while True:
                for seen in reader.take():
                    for event in events_of(seen, self._store):
                        if matches(event, request):
                            yield event
                if not await reader.more(request.until, self._now):
                    return
        finally:
            self._readers.discard(reader)


class _Reader:
    def __init__(self, request: EventsRequest) -> None:
        self._until = request.until
        self._queue: deque[Seen] = deque()
        self._lost = False
        self._wake = asyncio.Event()

    def add(self, seen: Sequence[Seen]) -> None:
        self._queue.extend(each for each in seen if not self._until or each.at <= self._until)
        if len(self._queue) > QUEUE_MAX:
            self._queue.clear()
            self._lost = True
        self._wake.set()

    def take(self) -> Iterator[Seen]:
        if self._lost:
            raise Busy("events came faster than they were read, some are lost: read again with --since, or --filter")
        while self._queue:
            yield self._queue.popleft()

    async def more(self, until: float, now: Callable[[], float]) -> bool:
        """Wait for events; False once `until` is over."""
        try:
            async with asyncio.timeout(max(0.0, until - now()) if until else None):
                await self._wake.wait()
        except TimeoutError:
            return bool(self._queue)
        self._wake.clear()
        return True


def _at(change: Change, now: float) -> float:
    return change.after.meta.updated_at if change.after is not None else now


def matches(event: Event, request: EventsRequest) -> bool:
    """Each kind of condition given must hold; a reference holds for the object and for what belongs to it."""
    known = (event.id, event.name, *(event.attributes.get(key, "") for key in ("service", "service.id", "node")))
    return (
        (not request.types or event.type in request.types)
        and (not request.actions or event.action in request.actions)
        and (not request.refs or any(ref in known or event.id.startswith(ref) for ref in request.refs))
    )


# ---------------------------------------------------------------- a change as events; pure


def events_of(seen: Seen, store: Store) -> list[Event]:
    """`store` only gives names of other objects."""
    if seen.change is None:
        return [Event(at=seen.at, type="swarm", action="resync", name="events before this may be missing")]
    record = seen.change.record
    match record:
        case Service():
            return _of(seen, "service", record.spec.annotations.name, _service_pairs)
        case Node():
            return _of(seen, "node", record.description.hostname, _node_pairs)
        case Network():
            return _of(seen, "network", record.spec.annotations.name, _network_pairs)
        case Task():
            return _task_event(seen, record, store)
    return []


def _of(seen: Seen, kind: str, name: str, pairs: Callable[[Record, Record], Pairs | None]) -> list[Event]:
    assert seen.change is not None
    before, after = seen.change.before, seen.change.after
    event = Event(at=seen.at, type=kind, action="update", id=seen.change.record.id, name=name)
    event.attributes["name"] = name
    if before is None or after is None:
        event.action = "create" if before is None else "remove"
        return [event]
    changed = pairs(before, after)
    for key, (new, old) in (changed or {}).items():
        event.attributes[f"{key}.new"], event.attributes[f"{key}.old"] = new, old
    return [event] if changed or _spec(before) != _spec(after) else []


def _spec(record: Record) -> object:
    return getattr(record, "spec", None)


def _differing(pairs: Pairs) -> Pairs:
    return {key: (new, old) for key, (new, old) in pairs.items() if new != old}


def _service_pairs(before: Record, after: Record) -> Pairs:
    assert isinstance(before, Service)
    assert isinstance(after, Service)
    return _differing(
        {
            "replicas": (_replicas(after), _replicas(before)),
            "image": (after.spec.task.container.image, before.spec.task.container.image),
            "updatestate": (_update_state(after), _update_state(before)),
            "allocationerror": (after.allocation_error, before.allocation_error),
            **({"virtualips": (_virtual_ips(after), _virtual_ips(before))} if before.endpoint.virtual_ips else {}),
        }
    )


def _virtual_ips(service: Service) -> str:
    return ",".join(vip.address for vip in service.endpoint.virtual_ips)


def _network_pairs(before: Record, after: Record) -> Pairs:
    assert isinstance(before, Network)
    assert isinstance(after, Network)
    return _differing({"allocationerror": (after.allocation_error, before.allocation_error)})


def _replicas(service: Service) -> str:
    return str(service.spec.replicated_job.total_completions or service.spec.replicated.replicas)


def _node_state(node: Node) -> str:
    return NodeStatus.State.Name(node.status.state).lower()


def _update_state(service: Service) -> str:
    state = service.update_status.state
    return UpdateStatus.State.Name(state).lower() if state != UpdateStatus.NONE else ""


def _node_pairs(before: Record, after: Record) -> Pairs:
    assert isinstance(before, Node)
    assert isinstance(after, Node)
    words = {Availability.ACTIVE: "active", Availability.PAUSED: "pause", Availability.DRAINED: "drain"}
    return _differing(
        {
            "state": (_node_state(after), _node_state(before)),
            "availability": (words[after.spec.availability], words[before.spec.availability]),
            "role": (NodeRole.Name(after.role).lower(), NodeRole.Name(before.role).lower()),
        }
    )


def _task_event(seen: Seen, task: Task, store: Store) -> list[Event]:
    """The action is the observed state that the task entered; a new desired state alone is an update."""
    assert seen.change is not None
    before, after = seen.change.before, seen.change.after
    event = Event(at=seen.at, type="task", id=task.id)
    event.name = f"{task.service_annotations.name}.{task.slot or task.node_id}"
    node = store.nodes.get(task.node_id)
    facts = {
        "name": event.name,
        "service": task.service_annotations.name,
        "service.id": task.service_id,
        "node": (node.description.hostname if node is not None else "") or task.node_id,
        "error": task.status.err,
    }
    if before is None or after is None:
        event.action = "create" if before is None else "remove"
        facts["reason"] = task.reason if before is None else ""
    else:
        assert isinstance(before, Task)
        event.action = _state(task.status.state) if task.status.state != before.status.state else ""
        if task.desired_state != before.desired_state:
            event.action = event.action or "update"
            facts |= {"desired.new": _state(task.desired_state), "desired.old": _state(before.desired_state)}
            facts["reason"] = task.reason
        if not event.action:
            return []
        if before.node_id != task.node_id:
            facts["reason"] = task.placement_reason
    event.attributes.update({key: value for key, value in facts.items() if value})
    return [event]


def _state(state: TaskState.ValueType) -> str:
    return TaskState.Name(state).removeprefix("TASK_").lower()
