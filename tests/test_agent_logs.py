"""Logs of own tasks on their way to the managers: order, bounds, cancellation, and a reason for every absence."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from node.interface import CreateRequest, ImageConfig, Phase, ResolvedImage
from node.logrelay import CHUNK_LINES_MAX, STREAMS_MAX, LogRelay
from node.outbox import LOG_CHUNKS_MAX, Outbox
from proto.dispatch_pb2 import LogChunk, LogLine, LogOptions, LogRequest, ManagerMessage
from proto.objects_pb2 import TASK_RUNNING, ContainerSpec
from tests.fakes import FakeContainer, FakeRuntime
from tests.fakes_dispatcher import Manager, host_on, serving, standing, task
from tests.waiting import until


def runtime_with(task_id: str, lines: int) -> FakeRuntime:
    runtime = FakeRuntime()
    image = ResolvedImage("sha256:web", (), ImageConfig())
    container = FakeContainer(CreateRequest(task_id, task_id, ContainerSpec(), image, None, task_id))
    container.phase = Phase.RUNNING
    container.lines = [LogLine(data=b"line %d" % number) for number in range(lines)]
    runtime.made[task_id] = container
    return runtime


class Reader:
    def __init__(self) -> None:
        self.chunks: list[LogChunk] = []

    async def take(self, chunk: LogChunk) -> None:
        self.chunks.append(chunk)

    @property
    def text(self) -> list[bytes]:
        return [line.data for chunk in self.chunks for line in chunk.lines]

    @property
    def done(self) -> bool:
        return bool(self.chunks) and self.chunks[-1].done


@pytest.fixture
def reader() -> Reader:
    return Reader()


async def test_lines_arrive_in_order_in_bounded_chunks_and_the_end_is_told(reader: Reader) -> None:
    relay = LogRelay(runtime_with("t1", 1000), "n1", lambda _: True, reader.take)
    relay.handle(LogRequest(stream_id="s", task_ids=["t1"]))
    await until(lambda: reader.done)
    assert reader.text == [b"line %d" % number for number in range(1000)]
    assert max(len(chunk.lines) for chunk in reader.chunks) <= CHUNK_LINES_MAX
    assert {(line.task_id, line.node_id) for chunk in reader.chunks for line in chunk.lines} == {("t1", "n1")}
    await until(lambda: relay.open_streams == 0)


async def test_a_follower_sees_lines_at_once_and_can_cancel(reader: Reader) -> None:
    relay = LogRelay(runtime_with("t1", 2), "n1", lambda _: True, reader.take)
    relay.handle(LogRequest(stream_id="s", task_ids=["t1"], options=LogOptions(follow=True)))
    await until(lambda: len(reader.text) == 2)
    assert not reader.done
    relay.handle(LogRequest(stream_id="s", cancel=True))
    await until(lambda: relay.open_streams == 0)


async def test_what_cannot_be_read_is_named_and_the_rest_is_delivered(reader: Reader) -> None:
    relay = LogRelay(runtime_with("t1", 1), "n1", lambda task_id: task_id != "t3", reader.take)
    relay.handle(LogRequest(stream_id="s", task_ids=["t1", "t2", "t3"]))
    await until(lambda: reader.done)
    assert reader.text == [b"line 0"]
    assert "task t2: container t2 does not exist" in reader.chunks[-1].error
    assert "task t3: not on this node" in reader.chunks[-1].error


async def test_one_stream_too_many_is_refused_with_the_remedy(reader: Reader) -> None:
    relay = LogRelay(runtime_with("t1", 0), "n1", lambda _: True, reader.take)
    for number in range(STREAMS_MAX + 1):
        relay.handle(LogRequest(stream_id=f"s{number}", task_ids=["t1"], options=LogOptions(follow=True)))
    await until(lambda: reader.done)
    assert reader.chunks[-1].stream_id == f"s{STREAMS_MAX}"
    assert "end some of them" in reader.chunks[-1].error
    await relay.close()


async def test_a_reader_that_does_not_take_chunks_makes_the_reading_wait() -> None:
    outbox = Outbox()
    for number in range(LOG_CHUNKS_MAX):
        await outbox.put_log(LogChunk(stream_id=str(number)))
    waiting = asyncio.create_task(outbox.put_log(LogChunk(stream_id="last")))
    await until(outbox.wake.is_set)
    assert not waiting.done()
    first = outbox.next_log()
    assert first is not None
    assert first.stream_id == "0"
    await waiting


async def test_through_a_session_and_lost_with_it(tmp_path: Path) -> None:
    manager = Manager()
    manager.items |= standing()
    manager.put(task())
    async with serving(manager), host_on(tmp_path) as host:
        host.run(manager.addr)
        await manager.reported("t1", TASK_RUNNING)
        host.runtime.made["t1"].lines = [LogLine(data=b"hello")]
        request = LogRequest(stream_id="s", task_ids=["t1"], options=LogOptions(follow=True))
        manager.send(ManagerMessage(logs=request))
        await until(lambda: [line.data for chunk in manager.logs for line in chunk.lines] == [b"hello"])
        manager.end_session()
        await until(lambda: manager.calls == 2 and manager.in_session)
        host.runtime.exit("t1", 0)
        await until(lambda: manager.last("t1").state > TASK_RUNNING)
        assert not any(chunk.done for chunk in manager.logs), "the stream belonged to the session that ended"
