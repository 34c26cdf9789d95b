"""`service exec`: find the task, have its node run the command, pass messages on in both directions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from proto.control_pb2 import ExecCall
from proto.dispatch_pb2 import ExecOutput, ExecStart
from proto.objects_pb2 import TASK_RUNNING, TASK_STARTING, Service, Task
from swarm.api.backend import Backend
from swarm.api.logs import target
from swarm.dispatch.execs import ExecStream
from swarm.errors import Invalid
from swarm.store.states import is_runnable
from swarm.store.store import Store

START_TIMEOUT_S = 10.0
"""From the call to its first message."""
_RUNS = (TASK_STARTING, TASK_RUNNING)
"""A task under a health check is STARTING while its container runs: just then one wants to look into it."""


def task_of(store: Store, ref: str) -> Task:
    """The task in which to run: one by ID or name, a slot's, or that of a service's first slot that runs.
    Raises NotFound, Invalid."""
    found = target(store, ref)
    if not isinstance(found, Task):
        return _running_task(store, *found)
    if found.status.state not in _RUNS:
        raise Invalid(f"task {ref} does not run: see its state with `pyswarm service ps`, and name one that does")
    return found


def _running_task(store: Store, service: Service, slot: int) -> Task:
    running = [
        task
        for task in store.tasks.where("service", service.id)
        if task.status.state in _RUNS and (not slot or task.slot == slot)
    ]
    if not running:
        name = service.spec.annotations.name + (f".{slot}" if slot else "")
        raise Invalid(f"no task of {name} runs: see why with `pyswarm explain {name}`")
    return min(running, key=lambda task: (not is_runnable(task), task.status.state != TASK_RUNNING, task.slot, task.id))


async def run(backend: Backend, calls: AsyncIterator[ExecCall]) -> AsyncGenerator[ExecOutput, None]:
    """Raises NotFound, Invalid, Unreachable."""
    start = await _first(calls)
    task = task_of(backend.store, start.task_id)
    wanted = ExecStart()
    wanted.CopyFrom(start)
    wanted.task_id = task.id
    node = backend.store.nodes.get(task.node_id)
    name = node.description.hostname if node is not None else task.node_id
    lost = ExecOutput(error="the command was ended: this manager does not lead any more")
    async with backend.execs.open(task.node_id, name, wanted) as stream:
        unsubscribe = backend.lost_leadership.subscribe(lambda: stream.accept(lost))
        feeding = asyncio.create_task(_feed(stream, calls))
        try:
            async for output in stream:
                yield output
        finally:
            unsubscribe()
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


async def _first(calls: AsyncIterator[ExecCall]) -> ExecStart:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            first = await anext(calls)
    except (TimeoutError, StopAsyncIteration):
        raise Invalid(f"the call did not say within {START_TIMEOUT_S:g} s what to run") from None
    if not first.input.HasField("start") or not first.input.start.command:
        raise Invalid("command is missing: say what to run in the task")
    return first.input.start


async def _feed(stream: ExecStream, calls: AsyncIterator[ExecCall]) -> None:
    async for call in calls:
        if call.input.WhichOneof("what") in ("data", "eof", "resize", "credit"):
            stream.send(call.input)
