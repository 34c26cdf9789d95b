"""The log relay: lines of several nodes in one stream, and a warning, never a hang, for who cannot answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proto.control_pb2 import LogsReply
from proto.dispatch_pb2 import LogChunk, LogLine, LogOptions, ManagerMessage
from swarm.dispatch import logs
from swarm.dispatch.logs import LogRelay, LogStream
from tests.waiting import until


class FakeLink:
    def __init__(self) -> None:
        self.sent: list[ManagerMessage] = []

    def send(self, message: ManagerMessage) -> bool:
        self.sent.append(message)
        return True

    @property
    def stream_id(self) -> str:
        return self.sent[-1].logs.stream_id


class Rig:
    def __init__(self, stall_s: float = 20.0, answer_timeout_s: float = 20.0) -> None:
        self.links = {"n1": FakeLink(), "n2": FakeLink()}
        self.relay = LogRelay(self.links.get, stall_s, answer_timeout_s)
        self.replies: list[LogsReply] = []
        self.kept_alive = 0

    def lines(self) -> list[str]:
        return [f"{line.node_id}:{line.data.decode()}" for reply in self.replies for line in reply.lines]

    def warnings(self) -> list[str]:
        return [reply.warning for reply in self.replies if reply.warning]

    async def read(self, stream: LogStream) -> None:
        async for reply in stream:
            self.replies.append(reply)

    async def deliver(self, node_id: str, *data: str, task_id: str = "t1", done: bool = False, error: str = "") -> None:
        lines = [LogLine(task_id=task_id, data=text.encode()) for text in data]
        chunk = LogChunk(stream_id=self.links[node_id].stream_id, lines=lines, done=done, error=error)
        await self.relay.deliver(node_id, chunk, self._alive)

    def _alive(self) -> None:
        self.kept_alive += 1


@asynccontextmanager
async def reading(rig: Rig, stream: LogStream) -> AsyncIterator[asyncio.Task[None]]:
    reader = asyncio.create_task(rig.read(stream))
    try:
        yield reader
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def test_lines_of_all_nodes_and_an_end_when_all_are_done() -> None:
    rig = Rig()
    async with rig.relay.open(LogOptions(stdout=True)) as stream:
        stream.add("n1", ["t1"])
        stream.add("n2", ["t1"])
        stream.seal()
        async with reading(rig, stream) as reader:
            await rig.deliver("n1", "a", "b")
            await rig.deliver("n2", "c", done=True)
            await rig.deliver("n1", done=True)
            await until(reader.done)
    assert sorted(rig.lines()) == ["n1:a", "n1:b", "n2:c"]
    assert rig.warnings() == []


async def test_a_node_without_a_session_and_a_lost_session_are_warnings() -> None:
    """The reference's NoFollowDisconnect."""
    rig = Rig()
    async with rig.relay.open(LogOptions(stdout=True, follow=True)) as stream:
        stream.add("gone", ["t7"])
        stream.add("n1", ["t1", "t2"])
        stream.add("n2", ["t3"])
        stream.seal()
        async with reading(rig, stream) as reader:
            rig.relay.session_ended("n1")
            await rig.deliver("n2", error="no such container", done=True)
            await until(reader.done)
    assert rig.warnings() == [
        "logs of task t7 on node gone are missing: the node is not connected",
        "logs of 2 tasks on node n1 are incomplete: its connection to the leader was lost",
        "logs of task t3 on node n2 are incomplete: no such container",
    ]


async def test_lines_of_tasks_that_were_not_asked_for_are_dropped() -> None:
    rig = Rig()
    async with rig.relay.open(LogOptions(stdout=True)) as stream:
        stream.add("n1", ["t1"])
        stream.seal()
        async with reading(rig, stream) as reader:
            await rig.deliver("n1", "forged", task_id="t9")
            await rig.deliver("n1", "true", done=True)
            await until(reader.done)
    assert rig.lines() == ["n1:true"]


async def test_chunks_of_another_node_for_this_stream_are_not_believed() -> None:
    rig = Rig()
    async with rig.relay.open(LogOptions(stdout=True)) as stream:
        stream.add("n1", ["t1"])
        stolen = LogChunk(stream_id=rig.links["n1"].stream_id, lines=[LogLine(task_id="t1", data=b"forged")])
        await rig.relay.deliver("n2", stolen, lambda: None)
        stream.seal()
        async with reading(rig, stream) as reader:
            await rig.deliver("n1", done=True)
            await until(reader.done)
    assert rig.lines() == []


async def test_a_reader_that_leaves_cancels_its_sources() -> None:
    rig = Rig()
    async with rig.relay.open(LogOptions(stdout=True, follow=True)) as stream:
        stream.add("n1", ["t1"])
        asked = rig.links["n1"].stream_id
    assert rig.links["n1"].sent[-1].logs.cancel
    assert rig.links["n1"].stream_id == asked


async def test_a_slow_reader_slows_the_source_and_keeps_its_node_alive() -> None:
    rig = Rig()
    async with rig.relay.open(LogOptions(stdout=True)) as stream:
        stream.add("n1", ["t1"])
        stream.seal()
        await rig.deliver("n1", "x" * logs.QUEUE_BYTES_MAX)
        more = asyncio.create_task(rig.deliver("n1", "the rest", done=True))
        await until(lambda: rig.kept_alive > 1)
        assert not more.done()
        async with reading(rig, stream) as reader:
            await until(reader.done)
        await more
    assert rig.lines()[-1] == "n1:the rest"
    assert rig.warnings() == []


async def test_a_reader_that_never_reads_is_cut_off() -> None:
    rig = Rig(stall_s=0.1)
    async with rig.relay.open(LogOptions(stdout=True)) as stream:
        stream.add("n1", ["t1"])
        stream.seal()
        await rig.deliver("n1", "x" * logs.QUEUE_BYTES_MAX)
        await rig.deliver("n1", "lost")
        assert rig.links["n1"].sent[-1].logs.cancel
        async with reading(rig, stream) as reader:
            await until(reader.done)
    assert "the reader did not read" in rig.warnings()[0]
    assert len(rig.lines()) == 1


async def test_a_node_that_does_not_answer_is_given_up_unless_the_reader_follows() -> None:
    rig = Rig(answer_timeout_s=0.1)
    async with rig.relay.open(LogOptions(stdout=True)) as stream, reading(rig, stream) as reader:
        stream.add("n1", ["t1"])
        stream.add("n2", ["t2"])
        stream.seal()
        await rig.deliver("n2", task_id="t2", done=True)
        await until(reader.done)
    assert rig.warnings() == ["logs of task t1 on node n1 are incomplete: the node did not answer within 0.1 s"]
    assert rig.links["n1"].sent[-1].logs.cancel
