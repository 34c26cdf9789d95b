"""Logs of a service or a task: asked of the nodes that hold them, those of new tasks as they start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence

from proto.control_pb2 import LogsReply, LogsRequest
from proto.dispatch_pb2 import LogOptions
from proto.objects_pb2 import TASK_ORPHANED, TASK_REJECTED, TASK_STARTING, Service, Task
from swarm.api.backend import Backend
from swarm.api.find import find_service, find_slot, find_task
from swarm.errors import Invalid, NoLeader, NotFound
from swarm.store.store import Event, Store

_NEVER_STARTED = (TASK_REJECTED, TASK_ORPHANED)


def has_logs(task: Task) -> bool:
    """Its container was started once."""
    return bool(task.node_id) and task.status.state >= TASK_STARTING and task.status.state not in _NEVER_STARTED


def target(store: Store, ref: str) -> tuple[Service, int] | Task:
    """A service and 0, a service and one of its slots (web.3), or a task. Raises NotFound, Invalid."""
    try:
        return find_service(store, ref), 0
    except NotFound:
        pass
    if (slot := find_slot(store, ref)) is not None:
        return slot
    try:
        return find_task(store, ref)
    except NotFound:
        raise NotFound(f"no such task or service: {ref}") from None


def checked(options: LogOptions) -> LogOptions:
    """With at least one of the two streams. Raises Invalid."""
    if options.tail < -1:
        raise Invalid(f"tail {options.tail}: use a number of lines, or all")
    full = LogOptions()
    full.CopyFrom(options)
    if not full.stdout and not full.stderr:
        full.stdout = full.stderr = True
    return full


async def logs(backend: Backend, request: LogsRequest) -> AsyncGenerator[LogsReply, None]:
    """Lines as they come, and one warning per source that cannot answer. Raises NotFound, Invalid, and
    NoLeader when this manager no longer leads."""
    store = backend.store
    options = checked(request.options)
    wanted = target(store, request.ref)
    asked: set[str] = set()
    is_lost = False

    def is_wanted(task: Task) -> bool:
        if isinstance(wanted, Task):
            return task.id == wanted.id
        service, slot = wanted
        return task.service_id == service.id and slot in (0, task.slot)

    def ask(tasks: Iterable[Task]) -> None:
        by_node: defaultdict[str, list[str]] = defaultdict(list)
        for task in tasks:
            if has_logs(task) and task.id not in asked:
                asked.add(task.id)
                by_node[task.node_id].append(task.id)
        for node_id in sorted(by_node):
            node = store.nodes.get(node_id)
            stream.add(node_id, by_node[node_id], node.description.hostname if node is not None else "")

    def on_events(events: Sequence[Event]) -> None:
        news = [event.after for event in events if isinstance(event.after, Task)]
        ask(filter(is_wanted, news))

    def on_lost() -> None:
        nonlocal is_lost
        is_lost = True
        stream.abandon()

    async with backend.logs.open(options) as stream:
        stops = [backend.lost_leadership.subscribe(on_lost)]
        try:
            if isinstance(wanted, Task):
                ask([wanted])
            else:
                ask(filter(is_wanted, store.tasks.where("service", wanted[0].id)))
            if options.follow and not (isinstance(wanted, Task) and asked):
                stops.append(store.subscribe(on_events))
            else:
                stream.seal()
            async for reply in stream:
                yield reply
        finally:
            for stop in stops:
                stop()
    if is_lost:
        raise NoLeader("this manager does not lead any more: ask for the logs again")
