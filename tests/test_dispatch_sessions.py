"""Sessions over real gRPC: welcome, assignments, statuses, liveness, redirection."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from proto import objects_pb2 as pb
from proto.objects_pb2 import Network, Node, NodeStatus, Task
from swarm.store.changes import Create, Remove, Update
from swarm.store.store import Store
from tests import fakes_dispatcher
from tests.fakes_dispatcher import host_on
from tests.leading import a_cluster, a_node, agent, leading
from tests.waiting import until

FAST_S = 0.1
"""A heartbeat period for tests that wait until a node is down."""


def a_task(task_id: str = "t1", node_id: str = "n1", state: int = pb.TASK_ASSIGNED) -> Task:
    made = Task(id=task_id, node_id=node_id, service_id="s1", slot=1, desired_state=pb.TASK_RUNNING)
    made.service_annotations.name = "web"
    made.status.state = pb.TaskState.ValueType(state)
    made.networks.add(network_id="net1", address="10.0.1.5/24")
    return made


def a_network() -> Network:
    made = Network(id="net1", vni=4097)
    made.spec.annotations.name = "front"
    return made


def a_store(period_s: float = 1.0) -> Store:
    return Store.of(a_cluster(period_s), a_node("n1"), a_node("n2", 2), a_network(), a_task())


async def test_a_session_begins_with_welcome_own_node_managers_and_a_snapshot() -> None:
    async with leading(a_store()) as leader, agent(leader) as played:
        welcome = played.said("welcome")[0]
        assert (welcome.heartbeat_period_s, welcome.data_path_port) == (1.0, 4789)
        node = played.said("node")[0]
        assert (node.id, node.status.state, node.description.hostname) == ("n1", NodeStatus.READY, "host")
        assert node.status.addr == "127.0.0.1"
        assert set(played.items) == {"task/t1", "network/net1", "endpoint/net1/t1"}, "n2 is on no network of n1"
        assert leader.state("n1") == NodeStatus.READY


async def test_changes_arrive_as_chained_deltas_and_a_burst_as_few() -> None:
    async with leading(a_store()) as leader, agent(leader) as played:
        for number in range(2, 202):
            leader.apply(Create(a_task(f"t{number}")))
        await until(lambda: "task/t201" in played.items)
        assert len(played.items) == 1 + 2 * 201
        assert len(played.deltas) <= 5
        assert played.snapshots == 1


async def test_statuses_are_stored_then_acknowledged_and_not_echoed() -> None:
    async with leading(a_store()) as leader, agent(leader) as played:
        await played.report(7, "t1", pb.TASK_STARTING)
        await until(lambda: played.said("ack"))
        assert played.said("ack")[0].sequence == 7
        assert leader.task_state("t1") == pb.TASK_STARTING
        await played.report(8, "t1", pb.TASK_RUNNING)
        await until(lambda: played.deltas)
        assert [change.key for change in played.deltas[0].changes] == ["endpoint/net1/t1"]
        assert played.items["endpoint/net1/t1"].endpoint.serving


async def test_heartbeats_are_answered_with_the_period_of_the_cluster() -> None:
    async with leading(a_store()) as leader, agent(leader) as played:
        changed = a_cluster(2.5)
        changed.meta.CopyFrom(leader.store.cluster.meta if leader.store.cluster else changed.meta)
        leader.apply(Update(changed))
        await played.beat(41)
        await until(lambda: played.said("heartbeat"))
        reply = played.said("heartbeat")[0]
        assert (reply.sequence, reply.period_s) == (41, 2.5)


async def test_a_silent_node_is_down_and_a_speaking_one_is_not() -> None:
    async with leading(a_store(FAST_S)) as leader, agent(leader, "n1") as silent, agent(leader, "n2") as speaking:

        async def speak() -> None:
            sequence = 0
            while True:
                sequence += 1
                await speaking.report(sequence, "unknown", pb.TASK_RUNNING)  # any message counts
                await asyncio.sleep(FAST_S / 2)

        talk = asyncio.create_task(speak())
        try:
            await until(lambda: leader.state("n1") == NodeStatus.DOWN)
            assert leader.state("n2") == NodeStatus.READY
            error = await silent.ended()
            assert error.code() is grpc.StatusCode.ABORTED
            assert "nothing was heard of node n1" in str(error.details())
        finally:
            talk.cancel()


async def test_a_node_that_was_down_comes_back_by_a_new_session() -> None:
    async with leading(a_store(FAST_S)) as leader:
        async with agent(leader):
            await until(lambda: leader.state("n1") == NodeStatus.DOWN)
        async with agent(leader) as played:
            assert played.error is None
            assert leader.state("n1") == NodeStatus.READY


async def test_a_broken_stream_alone_downs_nobody() -> None:
    async with leading(a_store(60.0)) as leader:
        async with agent(leader):
            pass
        await until(lambda: not leader.dispatcher.connected())
        assert leader.state("n1") == NodeStatus.READY


async def test_a_new_leader_knows_nobody_but_declares_nobody_down() -> None:
    store = Store.of(a_cluster(), a_node("n1", 1, NodeStatus.READY), a_node("n2", 2, NodeStatus.DOWN), a_task())
    async with leading(store) as leader:
        await until(lambda: leader.state("n1") == NodeStatus.UNKNOWN)
        assert leader.state("n2") == NodeStatus.DOWN
        async with agent(leader):
            assert leader.state("n1") == NodeStatus.READY


async def test_an_unknown_that_is_stored_after_the_node_came_back_does_not_stay() -> None:
    """It was decided before the session opened, which found READY and so wrote nothing."""
    async with leading(a_store()) as leader, agent(leader):
        late = Node()
        late.CopyFrom(leader.store.nodes.get("n1") or Node())
        late.status.state = NodeStatus.UNKNOWN
        leader.apply(Update(late))
        assert leader.state("n1") == NodeStatus.UNKNOWN
        await until(lambda: leader.state("n1") == NodeStatus.READY)


async def test_who_does_not_lead_names_the_leader() -> None:
    async with leading(a_store()) as leader:
        await leader.step_down()
        leader.group.member("m2", "192.0.2.9:2378")
        leader.group.elect("m2")
        async with agent(leader) as played:
            error = await played.ended()
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert dict(error.trailing_metadata() or ())["leader-addr"] == "192.0.2.9:2378"


async def test_sessions_end_with_leadership_and_say_where_to_go() -> None:
    async with leading(a_store()) as leader, agent(leader) as played:
        leader.group.member("m2", "192.0.2.9:2378")
        leader.group.elect("m2")
        await leader.step_down()
        error = await played.ended()
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert dict(error.trailing_metadata() or ())["leader-addr"] == "192.0.2.9:2378"


async def test_a_second_session_of_a_node_replaces_the_first() -> None:
    async with leading(a_store()) as leader, agent(leader) as first, agent(leader) as second:
        error = await first.ended()
        assert "newer session" in str(error.details())
        leader.apply(Create(a_task("t2")))
        await until(lambda: "task/t2" in second.items)


async def test_strangers_and_removed_nodes_are_refused() -> None:
    async with leading(a_store()) as leader:
        async with agent(leader, "nobody") as played:
            error = await played.ended()
            assert error.code() is grpc.StatusCode.NOT_FOUND
        async with agent(leader, "n1") as played:
            node = leader.store.nodes.get("n1")
            assert node is not None
            leader.apply(Remove(node))
            assert "removed" in str((await played.ended()).details())


async def test_a_session_has_to_begin_with_a_hello() -> None:
    async with leading(a_store()) as leader, agent(leader, hello=False) as played:
        await played.beat()
        error = await played.ended()
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_own_node_managers_and_description_follow_changes() -> None:
    async with leading(a_store()) as leader, agent(leader) as played:
        node = pb.Node()
        node.CopyFrom(leader.store.nodes.get("n1") or node)
        node.role = pb.MANAGER
        node.manager_addr = "192.0.2.1:2378"
        leader.apply(Update(node))
        await until(lambda: played.said("node")[-1].role == pb.MANAGER)
        await until(lambda: "192.0.2.1:2378" in played.said("managers")[-1].addrs)
        await played.hello("renamed", advertise_host="192.0.2.77")
        await until(lambda: played.said("node")[-1].description.hostname == "renamed")
        stored = leader.store.nodes.get("n1")
        assert stored is not None
        assert (stored.advertise_host, stored.data_path_addr) == ("192.0.2.77", "192.0.2.77")


async def test_nothing_is_written_for_a_session_that_brings_no_news() -> None:
    async with leading(a_store()) as leader:
        async with agent(leader):
            pass
        await until(lambda: not leader.dispatcher.connected())
        before = leader.store.version
        async with agent(leader) as played:
            await played.beat()
            await until(lambda: played.said("heartbeat"))
        assert leader.store.version == before


async def test_the_real_agent_and_the_real_dispatcher_understand_each_other(tmp_path: Path) -> None:
    """The agent of node/ on fakes of its host, against this dispatcher: a task's whole life."""
    store = Store.of(a_cluster(0.2), a_node("n1"), fakes_dispatcher.network(), fakes_dispatcher.task("t1"))
    async with leading(store) as leader, host_on(tmp_path) as host:
        host.run(leader.addr)
        await until(lambda: leader.task_state("t1") == pb.TASK_RUNNING)
        stopping = Task()
        stopping.CopyFrom(store.tasks.get("t1") or stopping)
        stopping.desired_state = pb.TASK_SHUTDOWN
        leader.apply(Update(stopping))
        await until(lambda: leader.task_state("t1") == pb.TASK_SHUTDOWN)
        stored = store.tasks.get("t1")
        assert stored is not None
        leader.apply(Remove(stored))
        await until(host.nothing_left)
