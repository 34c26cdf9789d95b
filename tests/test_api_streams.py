"""Watching a service and reading its logs, at the leader and through a follower."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from proto import control_pb2 as pb
from proto import objects_pb2 as objects
from proto.dispatch_pb2 import ExecInput, ExecOutput, ExecStart, LogChunk, LogLine, LogOptions, ManagerMessage
from proto.objects_pb2 import Service, Task
from swarm.api import watch
from swarm.api.watch import Changes
from swarm.store.changes import Change, Create, Remove, Update
from swarm.store.store import Event, Store
from tests.managing import Managers, a_cluster, a_node, a_spec, managing
from tests.test_api_services import refused
from tests.waiting import until


def a_service() -> Service:
    return Service(id="s1", spec=a_spec("web"))


def a_task(task_id: str, state: int = objects.TASK_RUNNING, node_id: str = "n1") -> Task:
    made = Task(id=task_id, service_id="s1", node_id=node_id)
    made.service_annotations.name = "web"
    made.status.state = objects.TaskState.ValueType(state)
    return made


class Reader:
    def __init__(self, call: Any) -> None:
        self.call = call
        self.seen: list[Any] = []
        self.error: grpc.aio.AioRpcError | None = None
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for message in self.call:
                self.seen.append(message)
        except grpc.aio.AioRpcError as error:
            self.error = error


@asynccontextmanager
async def reading(call: Any) -> AsyncIterator[Reader]:
    reader = Reader(call)
    try:
        yield reader
    finally:
        call.cancel()
        await asyncio.gather(reader.task, return_exceptions=True)


async def commit(made: Managers, *changes: Change) -> None:
    await made["m1"].service._backend.writer.commit(tuple(changes))


async def test_a_watch_begins_with_everything_and_goes_on_with_changes_through_a_follower() -> None:
    async with (
        managing(a_cluster(), a_service(), a_task("t1"), names=("m1", "m2")) as made,
        reading(made.stubs["m2"].WatchService(pb.WatchRequest(service_id="web"))) as reader,
    ):
        await until(lambda: reader.seen)
        first = reader.seen[0]
        assert (first.snapshot, first.service.id, [task.id for task in first.tasks]) == (True, "s1", ["t1"])
        await commit(made, Create(a_task("t2")), Create(Task(id="x", service_id="other")))
        await until(lambda: len(reader.seen) == 2)
        assert (reader.seen[1].snapshot, [task.id for task in reader.seen[1].tasks]) == (False, ["t2"])
        await commit(made, Remove(made.store.tasks.get("t1") or Task()))
        await until(lambda: len(reader.seen) == 3)
        assert list(reader.seen[2].removed_task_ids) == ["t1"]
        await commit(made, Remove(made.store.services.get("s1") or Service()))
        await until(reader.task.done)
        assert reader.seen[-1].service_removed
        assert reader.error is None


async def test_a_watch_breaks_when_leadership_goes_so_that_the_client_watches_elsewhere() -> None:
    async with (
        managing(a_cluster(), a_service(), names=("m1", "m2")) as made,
        reading(made.stubs["m1"].WatchService(pb.WatchRequest(service_id="web"))) as reader,
    ):
        await until(lambda: reader.seen)
        made.group.elect("m2")
        await until(reader.task.done)
        assert reader.error is not None
        assert reader.error.code() is grpc.StatusCode.UNAVAILABLE
        async with reading(made.stubs["m1"].WatchService(pb.WatchRequest(service_id="web"))) as again:
            await until(lambda: again.seen)
            assert again.seen[0].snapshot


async def test_watching_what_does_not_exist_is_an_error() -> None:
    async with managing(a_cluster()) as made:
        code, message = await refused(_drain(made.stubs["m1"].WatchService(pb.WatchRequest(service_id="web"))))
        assert (code, message) == (grpc.StatusCode.NOT_FOUND, "no such service: web")


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


def test_a_reader_that_falls_behind_gets_a_snapshot_instead_of_a_queue() -> None:
    tasks = [a_task(f"t{number}") for number in range(watch.PENDING_MAX + 1)]
    store = Store.of(a_service(), *tasks)
    changes = Changes("s1")
    changes.take(store)
    assert changes.note([Event.of(None, tasks[0])])
    assert not changes.take(store).snapshot
    for task in tasks:
        changes.note([Event.of(None, task)])
    event = changes.take(store)
    assert event.snapshot
    assert len(event.tasks) == len(tasks)


class FakeLink:
    """A node's session: remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[ManagerMessage] = []

    def send(self, message: ManagerMessage) -> bool:
        self.asked.append(message)
        return True


async def test_logs_come_from_the_nodes_that_have_them_and_missing_ones_are_warnings() -> None:
    """The reference's NoFollowMissingNode, NoFollowNotYetRunningTask."""
    tasks = [
        a_task("t1"),
        a_task("t2", objects.TASK_FAILED),
        a_task("t3", node_id="gone"),
        a_task("t4", objects.TASK_REJECTED),
        a_task("t5", objects.TASK_PREPARING),
    ]
    async with managing(a_cluster(), a_node("gone", "box"), a_service(), *tasks, names=("m1", "m2")) as made:
        link = made["m1"].links["n1"] = FakeLink()
        request = pb.LogsRequest(ref="web", options=LogOptions(tail=-1))
        async with reading(made.stubs["m2"].Logs(request)) as reader:
            await until(lambda: link.asked)
            asked = link.asked[0].logs
            assert list(asked.task_ids) == ["t1", "t2"]
            assert asked.options.stdout
            assert asked.options.stderr
            line = LogLine(task_id="t1", data=b"hello")
            await made["m1"].relay.deliver("n1", _chunk(asked.stream_id, line, done=True), lambda: None)
            await until(reader.task.done)
        assert [line.data for reply in reader.seen for line in reply.lines] == [b"hello"]
        assert [reply.warning for reply in reader.seen if reply.warning] == [
            "logs of task t3 on node box are missing: the node is not connected"
        ]


async def test_following_a_service_takes_in_its_new_tasks() -> None:
    async with managing(a_cluster(), a_service()) as made:
        link = made["m1"].links["n1"] = FakeLink()
        request = pb.LogsRequest(ref="web", options=LogOptions(follow=True, stdout=True))
        async with reading(made.stubs["m1"].Logs(request)) as reader:
            await until(lambda: made["m1"].service._backend.lost_leadership._listeners)
            await commit(made, Create(a_task("t9", objects.TASK_PREPARING)))
            started = a_task("t9")
            started.meta.CopyFrom((made.store.tasks.get("t9") or started).meta)
            await commit(made, Update(started))
            await until(lambda: link.asked)
            asked = link.asked[0].logs
            assert (list(asked.task_ids), asked.options.stderr) == (["t9"], False)
            await made["m1"].relay.deliver(
                "n1", _chunk(asked.stream_id, LogLine(task_id="t9", data=b"new")), lambda: None
            )
            await until(lambda: reader.seen)
            made.group.elect(None)
            await until(reader.task.done)
            assert reader.error is not None
            assert reader.error.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_logs_of_a_slot_are_those_of_its_tasks_only() -> None:
    tasks = [a_task("t1"), a_task("t2", objects.TASK_FAILED), a_task("t3")]
    for task, slot in zip(tasks, (1, 2, 2), strict=True):
        task.slot = slot
    async with managing(a_cluster(), a_service(), *tasks) as made:
        link = made["m1"].links["n1"] = FakeLink()
        request = pb.LogsRequest(ref="web.2", options=LogOptions(follow=True))
        async with reading(made.stubs["m1"].Logs(request)):
            await until(lambda: link.asked)
            assert list(link.asked[0].logs.task_ids) == ["t2", "t3"]
            later = a_task("t4")
            later.slot = 2
            await commit(made, Create(a_task("t5")), Create(later))
            await until(lambda: len(link.asked) == 2)
            assert list(link.asked[1].logs.task_ids) == ["t4"]


async def test_logs_of_nothing_are_an_error() -> None:
    async with managing(a_cluster()) as made:
        code, message = await refused(_drain(made.stubs["m1"].Logs(pb.LogsRequest(ref="nope"))))
        assert (code, message) == (grpc.StatusCode.NOT_FOUND, "no such task or service: nope")


def _chunk(stream_id: str, *lines: LogLine, done: bool = False) -> LogChunk:
    return LogChunk(stream_id=stream_id, lines=lines, done=done)


async def test_a_command_runs_through_a_follower_and_ends_with_its_status() -> None:
    task = a_task("t1")
    task.slot = 1
    async with managing(a_cluster(), a_service(), task, names=("m1", "m2")) as made:
        link = made["m1"].links["n1"] = FakeLink()
        call = made.stubs["m2"].Exec()
        await call.write(exec_call(start=ExecStart(task_id="web.1", command=["sh"])))
        await until(lambda: link.asked)
        asked = link.asked[0].exec
        assert asked.start.task_id == "t1"
        await call.write(exec_call(data=b"ls"))
        await until(lambda: len(link.asked) == 2)
        assert (link.asked[1].exec.exec_id, link.asked[1].exec.data) == (asked.exec_id, b"ls")
        for output in (ExecOutput(stdout=b"bin"), ExecOutput(exit_code=7)):
            output.exec_id = asked.exec_id
            made["m1"].execs.deliver("n2", output)  # not the node that was asked: not believed
            made["m1"].execs.deliver("n1", output)
        assert [message.WhichOneof("what") async for message in call] == ["stdout", "exit_code"]
        await until(lambda: link.asked[-1].exec.cancel)


async def test_a_command_ends_when_its_caller_goes_and_when_its_node_is_lost() -> None:
    async with managing(a_cluster(), a_service(), a_task("t1")) as made:
        link = made["m1"].links["n1"] = FakeLink()
        gone, lost = made.stubs["m1"].Exec(), made.stubs["m1"].Exec()
        await gone.write(exec_call(start=ExecStart(task_id="web", command=["sh"])))
        await until(lambda: len(link.asked) == 1)
        gone.cancel()
        await until(lambda: link.asked[-1].exec.cancel)
        await lost.write(exec_call(start=ExecStart(task_id="t1", command=["sh"])))
        await until(lambda: len(link.asked) == 3)
        made["m1"].execs.session_ended("n1")
        assert ["lost the connection" in message.error async for message in lost] == [True]


@pytest.mark.parametrize(
    ("ref", "code", "why"),
    [
        ("nope", grpc.StatusCode.NOT_FOUND, "no such task or service: nope"),
        ("web.7", grpc.StatusCode.INVALID_ARGUMENT, "no task of web.7 runs"),
        ("t2", grpc.StatusCode.INVALID_ARGUMENT, "task t2 does not run"),
        ("t1", grpc.StatusCode.UNAVAILABLE, "node n1 is not connected"),
    ],
)
async def test_a_command_that_cannot_run_says_why(ref: str, code: grpc.StatusCode, why: str) -> None:
    async with managing(a_cluster(), a_service(), a_task("t1"), a_task("t2", objects.TASK_FAILED)) as made:
        call = made.stubs["m1"].Exec()
        await call.write(exec_call(start=ExecStart(task_id=ref, command=["sh"])))
        refusal, message = await refused(_drain(call))
        assert refusal is code
        assert why in message


def exec_call(**what: Any) -> pb.ExecCall:
    return pb.ExecCall(input=ExecInput(**what))
