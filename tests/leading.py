"""A leading manager's dispatcher on loopback, and agents that tests play by hand."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from proto import store_pb2
from proto.dispatch_pb2 import (
    AgentHello,
    AgentMessage,
    Assignments,
    Heartbeat,
    Item,
    LogChunk,
    ManagerMessage,
    StatusBatch,
    TaskStatusUpdate,
)
from proto.dispatch_pb2_grpc import DispatcherStub
from proto.objects_pb2 import Cluster, Node, NodeDescription, NodeStatus, TaskState, TaskStatus
from swarm.dispatch.dispatcher import Dispatcher
from swarm.store.changes import Change, transaction
from swarm.store.store import Store
from swarm.store.writer import Writer
from tests.fakes_consensus import FakeGroup
from tests.waiting import until

NODE_KEY = "test-node"
"""The certificate's stand-in: agents say in the metadata who they are."""


def node_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Who says nothing is n1."""
    return str(dict(context.invocation_metadata() or ()).get(NODE_KEY, "n1"))


class Leader:
    """Manager m1 with a store of its own."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.group = FakeGroup(store)
        self.consensus = self.group.member("m1")
        self.group.elect("m1")
        self.writer = Writer(self.consensus, time.time)
        self.dispatcher = Dispatcher(store, self.writer, self.consensus, node_of, time.time, time.monotonic)
        self.addr = ""
        self._running: asyncio.Task[None] | None = None

    def lead(self) -> None:
        self._running = asyncio.create_task(self.dispatcher.run())

    async def step_down(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def apply(self, *changes: Change) -> None:
        """What another part of the leader writes."""
        entry = store_pb2.Entry(transactions=[transaction(changes, 1.0)])
        result = store_pb2.EntryResult.FromString(self.store.apply(entry.SerializeToString()))
        assert [verdict.code for verdict in result.verdicts] == [store_pb2.Verdict.OK]

    def state(self, node_id: str) -> int:
        node = self.store.nodes.get(node_id)
        assert node is not None
        return node.status.state

    def task_state(self, task_id: str) -> int:
        task = self.store.tasks.get(task_id)
        assert task is not None
        return task.status.state


@asynccontextmanager
async def leading(store: Store, lead: bool = True) -> AsyncIterator[Leader]:
    leader = Leader(store)
    server = grpc.aio.server()
    leader.dispatcher.add_to(server)
    leader.addr = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    if lead:
        leader.lead()
    try:
        yield leader
    finally:
        await leader.step_down()
        await server.stop(None)


class FakeAgent:
    """One session, played by the test."""

    def __init__(self, call: grpc.aio.StreamStreamCall[AgentMessage, ManagerMessage]) -> None:
        self._call = call
        self.messages: list[ManagerMessage] = []
        self.items: dict[str, Item] = {}
        self.snapshots = 0
        self.deltas: list[Assignments] = []
        self.error: grpc.aio.AioRpcError | None = None
        self._sequence = 0
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for message in self._call:
                self.messages.append(message)
                if message.HasField("assignments"):
                    self._take(message.assignments)
        except grpc.aio.AioRpcError as error:
            self.error = error

    def _take(self, message: Assignments) -> None:
        if message.snapshot:
            self.items.clear()
            self.snapshots += 1
        else:
            assert message.base == self._sequence
            self.deltas.append(message)
        self._sequence = message.result
        for change in message.changes:
            if change.HasField("item"):
                self.items[change.key] = change.item
            else:
                del self.items[change.key]

    def said(self, kind: str) -> list[Any]:
        return [getattr(message, kind) for message in self.messages if message.WhichOneof("message") == kind]

    async def write(self, message: AgentMessage) -> None:
        await self._call.write(message)

    async def hello(self, hostname: str = "host", advertise_host: str = "") -> None:
        hello = AgentHello(description=NodeDescription(hostname=hostname), advertise_host=advertise_host)
        await self.write(AgentMessage(hello=hello))

    async def beat(self, sequence: int = 1) -> None:
        await self.write(AgentMessage(heartbeat=Heartbeat(sequence=sequence)))

    async def report(self, sequence: int, task_id: str, state: int, message: str = "") -> None:
        status = TaskStatus(state=TaskState.ValueType(state), message=message)
        updates = [TaskStatusUpdate(task_id=task_id, status=status)]
        await self.write(AgentMessage(statuses=StatusBatch(sequence=sequence, updates=updates)))

    async def chunk(self, chunk: LogChunk) -> None:
        await self.write(AgentMessage(logs=chunk))

    async def ended(self) -> grpc.aio.AioRpcError:
        await until(self._reader.done, what="the session ended")
        assert self.error is not None
        return self.error

    async def close(self) -> None:
        self._call.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


@asynccontextmanager
async def agent(leader: Leader, node_id: str = "n1", hello: bool = True) -> AsyncIterator[FakeAgent]:
    """A session of this node; with `hello` it has been welcomed and has its snapshot."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(leader.addr, options=options) as channel:
        call = DispatcherStub(channel).Session(metadata=((NODE_KEY, node_id),))
        played = FakeAgent(call)
        try:
            if hello:
                with contextlib.suppress(
                    grpc.aio.AioRpcError, asyncio.InvalidStateError
                ):  # refused already: `error` says why
                    await played.hello()
                await until(lambda: played.snapshots or played.error, what="a snapshot")
            yield played
        finally:
            await played.close()


def a_node(node_id: str, index: int = 1, state: int = NodeStatus.UNKNOWN) -> Node:
    made = Node(id=node_id, index=index, data_path_addr=f"192.0.2.{index}", advertise_host=f"192.0.2.{index}")
    made.status.state = NodeStatus.State.ValueType(state)
    return made


def a_cluster(period_s: float = 1.0) -> Cluster:
    made = Cluster(id="c1", data_path_port=4789)
    made.spec.heartbeat_period_s = period_s
    return made
