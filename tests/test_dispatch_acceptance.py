"""The reference's acceptance cases of its dispatcher, by its names (its `dispatcher_test.go`), on real gRPC.

SecretDriver, WithVolume: secrets and cluster volumes do not exist here yet; both come with the issues that make them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import grpc

from proto import objects_pb2 as pb
from proto.dispatch_pb2 import AgentMessage, Heartbeat, StatusBatch, TaskStatusUpdate
from proto.objects_pb2 import Network, NodeStatus, Task, TaskStatus
from swarm.dispatch.liveness import ORPHAN_AFTER_S
from swarm.dispatch.presence import Presence
from swarm.dispatch.session import REGISTERS_MAX, REGISTERS_WITHIN_S, RegisterLimit
from swarm.store.changes import Create, Remove, Update
from swarm.store.store import Store
from tests.leading import Leader, a_cluster, a_node, agent, leading
from tests.waiting import until

FAST_S = 0.1


def a_task(task_id: str, state: int = pb.TASK_ASSIGNED, node_id: str = "n1", network_id: str = "net1") -> Task:
    made = Task(id=task_id, node_id=node_id, service_id="s1", slot=1, desired_state=pb.TASK_RUNNING)
    made.status.state = pb.TaskState.ValueType(state)
    made.networks.add(network_id=network_id, address="10.0.1.5/24")
    return made


def a_network(network_id: str) -> Network:
    made = Network(id=network_id, vni=4097)
    made.spec.annotations.name = network_id
    return made


def a_store(*records: Task | Network, period_s: float = 1.0) -> Store:
    return Store.of(a_cluster(period_s), a_node("n1"), a_node("n2", 2), *records)


async def test_register_twice() -> None:
    """The second session has another ID and ends the first."""
    async with leading(a_store()) as leader, agent(leader) as first, agent(leader) as second:
        assert first.said("welcome")[0].session_id != second.said("welcome")[0].session_id
        assert (await first.ended()).code() is grpc.StatusCode.ABORTED
        assert leader.state("n1") == NodeStatus.READY


async def test_register_exceed_rate_limit() -> None:
    async with leading(a_store()) as leader:
        for _ in range(REGISTERS_MAX):
            async with agent(leader):
                pass
        async with agent(leader) as refused:
            error = await refused.ended()
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert f"{REGISTERS_MAX} sessions" in str(error.details())
        async with agent(leader, "n2") as other:
            assert other.error is None, "another node is not concerned"


def test_the_rate_limit_ends_with_time() -> None:
    limit = RegisterLimit()
    assert [limit.allows("n1", 0.1 * number) for number in range(REGISTERS_MAX + 1)] == [True] * REGISTERS_MAX + [False]
    assert limit.allows("n1", REGISTERS_WITHIN_S)
    assert not limit.allows("n1", REGISTERS_WITHIN_S + 0.05), "the second of the first ones is still recent"


async def test_heartbeat_timeout() -> None:
    """A node that stays silent is DOWN, and its session is over."""
    async with leading(a_store(period_s=FAST_S)) as leader, agent(leader) as silent:
        await until(lambda: leader.state("n1") == NodeStatus.DOWN)
        assert (await silent.ended()).code() is grpc.StatusCode.ABORTED


async def test_assignments_initial_node_tasks() -> None:
    """The first message has the node's tasks from ASSIGNED on, with what they need, and no other node's."""
    tasks = a_task("t1"), a_task("t2", pb.TASK_PENDING), a_task("t3", pb.TASK_RUNNING), a_task("t4", node_id="n2")
    async with leading(a_store(a_network("net1"), *tasks)) as leader, agent(leader) as played:
        assert {key for key in played.items if key.startswith(("task/", "network/"))} == {
            "task/t1",
            "task/t3",
            "network/net1",
        }
        assert played.snapshots == 1


async def test_assignments_adding_tasks() -> None:
    async with leading(a_store(a_network("net1"))) as leader, agent(leader) as played:
        leader.apply(Create(a_task("t1", pb.TASK_PENDING)))
        leader.apply(Create(a_task("t2")))
        await until(lambda: "task/t2" in played.items)
        assert "task/t1" not in played.items, "it has no node's business yet"
        stored = leader.store.tasks.get("t2")
        assert stored is not None
        leader.apply(Remove(stored))
        await until(lambda: "task/t2" not in played.items)
        assert played.snapshots == 1


async def test_assignments_dependency_update_and_deletion() -> None:
    """The dependencies of tasks are networks here: sent with the first task, withdrawn with the last."""
    store = a_store(a_network("net1"), a_network("net2"), a_task("t1"))
    async with leading(store) as leader, agent(leader) as played:
        assert "network/net2" not in played.items
        for task_id in ("t2", "t3"):
            leader.apply(Create(a_task(task_id, network_id="net2")))
        await until(lambda: {"network/net2", "task/t3"} <= played.items.keys())
        changed = a_network("net2")
        changed.spec.annotations.labels["a"] = "b"
        stored_network = store.networks.get("net2")
        assert stored_network is not None
        changed.meta.CopyFrom(stored_network.meta)
        leader.apply(Update(changed))
        await until(lambda: played.items["network/net2"].network.spec.annotations.labels["a"] == "b")
        for task_id in ("t2", "t3"):
            assert "network/net2" in played.items
            stored = store.tasks.get(task_id)
            assert stored is not None
            leader.apply(Remove(stored))
            await until(lambda task_id=task_id: f"task/{task_id}" not in played.items)  # type: ignore[misc]
        await until(lambda: "network/net2" not in played.items)
        assert "network/net1" in played.items


async def test_assignments_errors_if_no_session_id() -> None:
    """There are no session IDs to send: a session is its stream. One that does not begin with a hello is refused."""
    async with leading(a_store()) as leader, agent(leader, hello=False) as played:
        await played.write(AgentMessage(heartbeat=Heartbeat(sequence=1)))
        error = await played.ended()
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert not played.items


async def test_tasks_batch() -> None:
    """Many reports in one message, and their acknowledgement once all are stored."""
    tasks = [a_task(f"t{number}") for number in range(200)]
    async with leading(a_store(a_network("net1"), *tasks)) as leader, agent(leader) as played:
        updates = [TaskStatusUpdate(task_id=task.id, status=TaskStatus(state=pb.TASK_RUNNING)) for task in tasks]
        await played.write(AgentMessage(statuses=StatusBatch(sequence=1, updates=updates)))
        await until(lambda: played.said("ack"))
        assert {leader.task_state(task.id) for task in tasks} == {pb.TASK_RUNNING}


async def test_cluster_updates_send_messages() -> None:
    """A session hears of another heartbeat period (with the next answer), of its node object and of managers."""
    async with leading(a_store()) as leader, agent(leader) as played:
        cluster, node = a_cluster(2.5), a_node("n1")
        assert leader.store.cluster is not None
        cluster.meta.CopyFrom(leader.store.cluster.meta)
        leader.apply(Update(cluster))
        await played.beat(1)
        await until(lambda: [reply.period_s for reply in played.said("heartbeat")] == [2.5])
        stored = leader.store.nodes.get("n1")
        assert stored is not None
        node.CopyFrom(stored)
        node.spec.desired_role, node.manager_addr, node.role = pb.MANAGER, "192.0.2.1:2378", pb.MANAGER
        leader.apply(Update(node))
        await until(lambda: any(told.role == pb.MANAGER for told in played.said("node")))
        await until(lambda: any("192.0.2.1:2378" in told.addrs for told in played.said("managers")))


async def test_tasks_of_a_node_that_is_down_for_a_day_are_orphaned() -> None:
    """Only then, and only those that have not ended."""
    store = a_store(a_task("t1", pb.TASK_RUNNING), a_task("t2", pb.TASK_FAILED))
    down = store.nodes.get("n1")
    assert down is not None
    down.status.state = NodeStatus.DOWN
    leader, passed_s = Leader(store), 0.0
    presence = Presence(store, leader.writer, {}, now=time.time, monotonic=lambda: time.monotonic() + passed_s)
    running = asyncio.create_task(presence.run())
    try:
        passed_s = ORPHAN_AFTER_S - 60
        await until(lambda: leader.state("n2") == NodeStatus.DOWN, what="the other node is missed")
        assert leader.task_state("t1") == pb.TASK_RUNNING
        passed_s = ORPHAN_AFTER_S
        await until(lambda: leader.task_state("t1") == pb.TASK_ORPHANED)
        assert leader.task_state("t2") == pb.TASK_FAILED
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
