"""The leader's loop over the real store and writer: it reacts, retries, wakes in time, and nothing ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import pytest

from proto import objects_pb2 as pb
from proto import store_pb2 as pb_store
from proto.objects_pb2 import Cluster, Network, Service
from swarm.errors import OutcomeUnknown, SwarmError
from swarm.ids import random_id
from swarm.leader import STAGES, LeaderLoop, Stage
from swarm.store.changes import Create, Decision, Group, Update, copy_of, transaction
from swarm.store.dirty import Dirty
from swarm.store.store import OBJECT_BYTES_MAX, Event, Store
from swarm.store.writer import Writer
from tests.fakes_consensus import FakeGroup
from tests.simulated import network, node, service
from tests.waiting import until

Stages = Sequence[tuple[str, Stage]]


class Leading:
    def __init__(self, stages: Stages = STAGES) -> None:
        self.store = Store.of(network("ingress", ingress=True))
        self.group = FakeGroup(self.store)
        self.group.member("m1")
        self.group.elect("m1")
        self.writer = Writer(self.group.nodes["m1"], time.time)
        self.loop = LeaderLoop(self.store, self.writer, random_id, time.time, stages)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.loop.run())
        try:
            yield
            assert not task.done(), "the loop ended"
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def create(self, *records: Cluster | pb.Node | Service | Network) -> None:
        for record in records:
            await self.writer.commit((Create(record),))

    def assigned(self, service_id: str) -> int:
        return sum(task.status.state >= pb.TASK_ASSIGNED for task in self.store.tasks.where("service", service_id))


async def test_a_service_becomes_assigned_tasks() -> None:
    lead = Leading()
    await lead.create(Cluster(id="c"), node("n1"), network("front"), service("before", 3, ["front"]))
    async with lead.running():
        await until(lambda: lead.assigned("before") == 3)
        await lead.create(service("after", 2, ["front"]))
        await until(lambda: lead.assigned("after") == 2)


@pytest.mark.parametrize("turns", range(5))
async def test_a_loop_that_is_cancelled_just_as_something_changes_ends(turns: int) -> None:
    """It went on to lead, beside the next leader: `asyncio.wait_for` of Python 3.11 loses such a cancellation."""

    def wake(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
        return Decision(wake_at=now + 1000)

    lead = Leading((("wake", wake),))
    await lead.create(Cluster(id="c"))
    task = asyncio.create_task(lead.loop.run())
    await until(lambda: lead.loop._wakes)
    entry = pb_store.Entry(transactions=[transaction((Create(node("n1")),), 1.0)])
    lead.store.apply(entry.SerializeToString())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    assert done


async def test_who_leads_no_more_starts_no_job() -> None:
    """The reference's BUG #53632: its jobs orchestrator goes on, so that former leaders run every job again."""
    lead = Leading()
    job = service("job")
    job.spec.replicated_job.total_completions = 3
    await lead.create(Cluster(id="c"), node("n1"), service("before", 2))
    async with lead.running():
        await until(lambda: lead.assigned("before") == 2)
    lead.loop = LeaderLoop(lead.store, lead.writer, random_id, time.time)  # the next leader's
    created: list[str] = []
    lead.store.subscribe(lambda events: created.extend(event.record.id for event in events if event.before is None))
    async with lead.running():
        await lead.create(job)
        await until(lambda: lead.assigned("job") == 3)
    assert len(created) == 4, "the job, and each of its tasks once"


async def test_a_quiet_cluster_writes_nothing() -> None:
    rounds: list[int] = []

    def count(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
        rounds.append(1)
        return Decision()

    lead = Leading((*STAGES, ("count", count)))
    await lead.create(node("n1"), service("web", 2))
    async with lead.running():
        await until(lambda: lead.assigned("web") == 2)
        await lead.create(network("unrelated"))
        await until(lambda: all(net.vni for net in lead.store.networks))
        seen, version = len(rounds), lead.store.version
        async with asyncio.timeout(1):
            await lead.writer.commit(())  # an entry that changes no object wakes nobody
        assert lead.store.version == version + 1
        assert len(rounds) <= seen + 1  # the round that notices the network's own change


async def test_it_wakes_when_a_stage_asked_for_it() -> None:
    looked: list[tuple[float, bool]] = []
    began = time.time()

    def impatient(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
        looked.append((now, "s" in dirty.services))
        return Decision(wakes=(("s", now + 0.05),) if len(looked) < 4 else ())

    lead = Leading((("impatient", impatient),))
    async with lead.running():
        await until(lambda: len(looked) == 4)
    assert [named for _, named in looked] == [False, True, True, True]
    assert looked[3][0] - began >= 0.15


async def test_a_stage_that_raises_is_tried_again_with_everything_it_was_to_look_at() -> None:
    calls: list[Dirty] = []

    def faulty(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
        calls.append(dirty)
        if len(calls) < 3:
            raise RuntimeError("a bug")
        return Decision()

    lead = Leading((("faulty", faulty),))
    async with lead.running():
        await until(lambda: len(calls) == 3)
    assert calls[2].everything


async def test_a_refused_group_is_decided_anew() -> None:
    """The object changes between decision and commit: the second look sees the change."""
    lead = Leading()
    await lead.create(service("web", 0))
    seen: list[int] = []

    def stale(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
        found = store.services.get("web")
        assert found is not None
        if found.allocation_error == "done" or not (dirty.everything or "web" in dirty.services):
            return Decision()
        seen.append(found.meta.version)
        changed = copy_of(found)
        changed.allocation_error = "done"
        if len(seen) == 1:
            changed.meta.version -= 1  # as if someone had been faster
        return Decision(((Update(changed),),))

    lead.loop = LeaderLoop(lead.store, lead.writer, random_id, time.time, (("stale", stale),))
    async with lead.running():
        await until(lambda: any(s.allocation_error == "done" for s in lead.store.services))
    assert len(seen) == 2


async def test_a_group_that_can_never_be_stored_is_not_decided_again_and_again() -> None:
    lead = Leading()
    await lead.create(service("web", 0))
    decided: list[str] = []

    def impossible(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
        names = {"web"} if dirty.everything else dirty.services
        decided.extend(names)
        found = store.services.get("web")
        assert found is not None
        changed = copy_of(found)
        changed.spec.task.container.env.append("x" * OBJECT_BYTES_MAX)
        return Decision(((Update(changed),),) if "web" in names else ())

    lead.loop = LeaderLoop(lead.store, lead.writer, random_id, time.time, (("impossible", impossible),))
    async with lead.running():
        for name in ("a", "b"):
            await until(lambda: "web" in decided)
            await lead.create(service(name, 0))
            await until(lambda name=name: name in decided)  # type: ignore[misc]
    assert decided == ["web", "a", "b"]


class Unsure:
    """A writer whose first answer is lost: the write itself arrives, but later."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.late: list[Group] = []
        self.lost = False

    async def commit(self, group: Group, request_id: str = "") -> int:
        await self._arrive()
        return await self._writer.commit(group, request_id)

    async def _arrive(self) -> None:
        """What was proposed before stands before it in the log."""
        late, self.late = self.late, []
        await self._writer.commit_all(late)

    async def commit_all(self, groups: Sequence[Group]) -> list[SwarmError | None]:
        if not self.lost and any(isinstance(change.record, pb.Task) for group in groups for change in group):
            self.lost = True
            self.late = list(groups)
            return [OutcomeUnknown("no quorum answered within 10 s") for _ in groups]
        await self._arrive()
        return await self._writer.commit_all(groups)


async def test_nothing_is_decided_before_a_write_of_unknown_outcome_is_settled() -> None:
    """Else the slots whose creation was on its way would be filled twice."""
    lead = Leading()
    await lead.create(node("n1"))
    unsure = Unsure(lead.writer)
    lead.loop = LeaderLoop(lead.store, unsure, random_id, time.time)
    created: set[str] = set()
    lead.store.subscribe(lambda events: created.update(e.record.id for e in events if isinstance(e.after, pb.Task)))
    async with lead.running():
        await lead.create(service("web", 3))
        await until(lambda: lead.assigned("web") == 3)
    assert unsure.lost
    assert len(created) == 3


async def test_a_loop_without_a_quorum_carries_on_when_it_is_back() -> None:
    lead = Leading()
    await lead.create(node("n1"), service("web", 2))
    lead.group.elect(None)
    async with lead.running():
        await until(lambda: lead.group.refused >= 2)
        lead.group.elect("m1")
        await until(lambda: lead.assigned("web") == 2)


async def test_a_replaced_state_is_looked_at_as_a_whole() -> None:
    lead = Leading()
    async with lead.running():
        other = Leading()
        await other.create(node("n1"), service("web", 2))
        lead.store.load(list(other.store.dump()))  # a snapshot
        await until(lambda: lead.assigned("web") == 2)


def test_dirty_takes_note_of_what_concerns_stages_only() -> None:
    task = pb.Task(id="t", service_id="web", node_id="n1", desired_state=pb.TASK_RUNNING)

    def after(state: pb.TaskState.ValueType, before: pb.TaskState.ValueType) -> Dirty:
        old, new = copy_of(task), copy_of(task)
        old.status.state, new.status.state = before, state
        dirty = Dirty()
        dirty.note([Event.of(old, new)])
        return dirty

    assert not after(pb.TASK_STARTING, pb.TASK_PREPARING)
    assert after(pb.TASK_RUNNING, pb.TASK_STARTING).services == {"web"}
    assert not after(pb.TASK_RUNNING, pb.TASK_STARTING).freed
    assert after(pb.TASK_FAILED, pb.TASK_RUNNING).freed
