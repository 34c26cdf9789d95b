"""What nodes report: only about their own tasks, only forwards, acknowledged once stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import objects_pb2 as pb
from proto.dispatch_pb2 import TaskStatusUpdate
from proto.objects_pb2 import Task, TaskStatus
from swarm.dispatch.statuses import StatusWriter, merged, refusal
from swarm.store.changes import Update
from swarm.store.store import Store
from swarm.store.writer import Writer
from tests.fakes_consensus import FakeGroup
from tests.waiting import until

NOW = 1000.0


def task(task_id: str = "t1", state: int = pb.TASK_ASSIGNED) -> Task:
    made = Task(id=task_id, node_id="n1", service_id="s1")
    made.status.state = pb.TaskState.ValueType(state)
    return made


def status(state: int, message: str = "") -> TaskStatus:
    return TaskStatus(state=pb.TaskState.ValueType(state), message=message, timestamp=5.0)


def update(task_id: str, state: int, message: str = "") -> TaskStatusUpdate:
    return TaskStatusUpdate(task_id=task_id, status=status(state, message))


@pytest.mark.parametrize(
    ("node_id", "state", "accepted"),
    [
        ("n1", pb.TASK_RUNNING, True),
        ("n1", pb.TASK_REJECTED, True),
        ("n2", pb.TASK_RUNNING, False),
        ("n1", pb.TASK_PENDING, False),
        ("n1", pb.TASK_ASSIGNED, False),
        ("n1", pb.TASK_REMOVE, False),
        ("n1", pb.TASK_ORPHANED, False),
        ("n1", 513, False),
    ],
)
def test_what_a_node_may_report(node_id: str, state: int, accepted: bool) -> None:
    assert (refusal(task(), node_id, TaskStatus(state=state)) is None) == accepted  # type: ignore[arg-type]


@given(st.lists(st.sampled_from([s for s in pb.TaskState.values() if s > pb.TASK_ASSIGNED]), max_size=20))
def test_observed_states_only_grow(states: list[int]) -> None:
    current = task()
    for state in states:
        after = merged(current, status(state), NOW)
        assert after is None or after.status.state >= current.status.state
        current = after or current
    assert current.status.state == max([pb.TASK_ASSIGNED, *states])


def test_the_same_report_again_writes_nothing_and_news_at_the_same_state_do() -> None:
    first = merged(task(), status(pb.TASK_PREPARING, "pulling"), NOW)
    assert first is not None
    assert first.status.applied_at == NOW
    assert merged(first, status(pb.TASK_PREPARING, "pulling"), NOW + 1) is None
    assert merged(first, status(pb.TASK_PREPARING, "unpacking"), NOW + 1) is not None


class Rig:
    def __init__(self, *tasks: Task) -> None:
        self.store = Store.of(*tasks)
        self.group = FakeGroup(self.store)
        self.consensus = self.group.member("m1")
        self.group.elect("m1")
        self.writer = Writer(self.consensus, lambda: NOW)
        self.statuses = StatusWriter(self.store, self.writer, lambda: NOW)
        self.acked: list[int] = []

    def submit(self, sequence: int, *updates: TaskStatusUpdate, node_id: str = "n1") -> None:
        self.statuses.submit(node_id, updates, lambda: self.acked.append(sequence))

    def state(self, task_id: str = "t1") -> int:
        found = self.store.tasks.get(task_id)
        assert found is not None
        return found.status.state


@asynccontextmanager
async def running(*tasks: Task) -> AsyncIterator[Rig]:
    rig = Rig(*tasks)
    runner = asyncio.create_task(rig.statuses.run())
    try:
        yield rig
    finally:
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)


async def test_a_burst_of_reports_is_one_entry_and_the_latest_wins() -> None:
    names = [f"t{number}" for number in range(100)]
    async with running(*map(task, names)) as rig:
        for sequence, state in enumerate((pb.TASK_PREPARING, pb.TASK_RUNNING, pb.TASK_STARTING)):
            rig.submit(sequence, *(update(name, state) for name in names))
        await until(lambda: rig.acked == [0, 1, 2])
        assert {rig.state(name) for name in names} == {pb.TASK_RUNNING}
        assert rig.group.entries == 1


async def test_nothing_is_acknowledged_before_it_is_stored() -> None:
    async with running(task()) as rig:
        rig.group.elect(None)
        rig.submit(1, update("t1", pb.TASK_RUNNING))
        await until(lambda: rig.group.refused > 1)
        assert rig.acked == []
        rig.group.elect("m1")
        await until(lambda: rig.acked == [1])
        assert rig.state() == pb.TASK_RUNNING


async def test_a_lost_race_is_decided_anew() -> None:
    async with running(task()) as rig:
        rig.group.gate.clear()
        rig.submit(1, update("t1", pb.TASK_RUNNING))
        stopping = task()
        stopping.desired_state = pb.TASK_SHUTDOWN
        other = asyncio.create_task(rig.writer.commit((Update(stopping),)))
        await until(lambda: rig.group.waiting > 0)
        rig.group.gate.set()
        await other
        await until(lambda: rig.acked == [1])
        stored = rig.store.tasks.get("t1")
        assert stored is not None
        assert (stored.status.state, stored.desired_state) == (pb.TASK_RUNNING, pb.TASK_SHUTDOWN)


async def test_reports_about_tasks_of_others_and_of_gone_tasks_are_dropped_but_acknowledged() -> None:
    async with running(task()) as rig:
        rig.submit(1, update("t1", pb.TASK_FAILED), update("gone", pb.TASK_RUNNING), node_id="n2")
        await until(lambda: rig.acked == [1])
        assert rig.state() == pb.TASK_ASSIGNED
