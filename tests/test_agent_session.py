"""The session over real gRPC: finding the leader, losing it, silence, broken chains, statuses until acknowledged; and
through all of it no container is touched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.session import RETRY_MAX_S, backoff_s
from proto.dispatch_pb2 import Assignments, ManagerList, ManagerMessage
from proto.objects_pb2 import DRAINED, TASK_RUNNING, Node
from tests.fakes_dispatcher import Host, Manager, endpoint, host_on, serving, standing, task
from tests.waiting import until


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with host_on(tmp_path) as made:
        yield made


@pytest.fixture
async def managers() -> AsyncIterator[list[Manager]]:
    made = [Manager(), Manager(), Manager()]
    for manager in made:
        manager.items |= standing()
    async with serving(*made):
        yield made


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.1, 3_600))
def test_backoff_stays_within_its_bounds(attempt: int, uniform: float, period_s: float) -> None:
    assert 0.05 <= backoff_s(attempt, uniform, period_s) <= min(period_s, RETRY_MAX_S)


async def test_a_follower_redirects_to_the_leader_at_once(host: Host, managers: list[Manager]) -> None:
    follower, leader, _ = managers
    follower.leads, follower.leader_addr = False, leader.addr
    agent = host.run(follower.addr)
    await until(lambda: agent.manager == leader.addr)
    assert (follower.calls, leader.calls) == (1, 1)
    assert leader.hellos[0].description.hostname == "host1"
    assert leader.hellos[0].advertise_host == "192.0.2.1"


async def test_managers_that_send_each_other_around_are_not_asked_in_a_circle(
    host: Host, managers: list[Manager]
) -> None:
    one, two, leader = managers
    one.leads = two.leads = False
    one.leader_addr, two.leader_addr = two.addr, one.addr
    agent = host.run(one.addr, two.addr, leader.addr)
    await until(lambda: agent.manager == leader.addr)
    assert one.calls + two.calls <= 8


async def test_dead_managers_are_skipped(host: Host, managers: list[Manager]) -> None:
    agent = host.run("127.0.0.1:1", "127.0.0.1:2", managers[0].addr)
    await until(lambda: agent.manager == managers[0].addr)


async def test_a_change_of_leader_touches_no_task(host: Host, managers: list[Manager]) -> None:
    old, new, _ = managers
    old.put(task())
    new.put(task())
    new.leads = False
    agent = host.run(old.addr, new.addr)
    await old.reported("t1", TASK_RUNNING)
    passed = host.gate.passed.copy()

    old.leads = False
    old.end_session()
    await until(lambda: new.calls + old.calls >= 4 and not agent.manager, what="some time without a leader")
    assert agent.running_count() == 1
    new.leads = True
    old.leader_addr = new.addr
    await until(lambda: agent.manager == new.addr)
    new.put(task("t2", slot=2))
    await new.reported("t2", TASK_RUNNING)
    for call in ("stop", "remove", "detach"):
        assert host.gate.passed[f"{call}:before"] == passed[f"{call}:before"]
    assert host.runtime.made["t1"].starts == 1


async def test_a_silent_leader_is_left(host: Host, managers: list[Manager]) -> None:
    manager = managers[0]
    manager.answers_heartbeats, manager.period_s = False, 0.02
    host.run(manager.addr)
    await until(lambda: manager.calls >= 2, what="a second session")
    assert manager.heartbeats >= 2


async def test_the_manager_that_was_lost_is_asked_last(host: Host, managers: list[Manager]) -> None:
    lost, *others = managers
    for follower in others:
        follower.leads = False
    agent = host.run(*(manager.addr for manager in managers))
    for _ in range(4):  # in whatever order they are tried
        lost.leads = True
        await until(lambda: agent.manager == lost.addr)
        asked = [manager.calls for manager in managers]
        lost.leads = False
        lost.end_session()
        await until(partial(lambda calls: lost.calls > calls, asked[0]))
        assert all(other.calls > before for other, before in zip(others, asked[1:], strict=True))


async def test_heartbeats_go_on_while_the_leader_answers(host: Host, managers: list[Manager]) -> None:
    managers[0].period_s = 0.02
    host.run(managers[0].addr)
    await until(lambda: managers[0].heartbeats >= 20)
    assert managers[0].calls == 1


async def test_statuses_are_sent_again_until_they_are_acknowledged(host: Host, managers: list[Manager]) -> None:
    manager = managers[0]
    manager.acknowledges, manager.period_s = False, 5.0
    host.gate.close("start:before")
    manager.put(task())
    agent = host.run(manager.addr)
    await until(lambda: manager.batches == 1)
    host.gate.open()
    await until(lambda: agent.running_count() == 1)
    assert manager.batches == 1, "one batch is under way at a time"
    manager.acknowledges = True
    manager.end_session()
    await manager.reported("t1", TASK_RUNNING)

    batches = manager.batches
    manager.end_session()
    await until(lambda: manager.calls >= 3 and manager.in_session)
    manager.put(task("t2", slot=2))
    await manager.reported("t2", TASK_RUNNING)
    assert manager.batches > batches
    assert manager.states("t1")[-1] == TASK_RUNNING
    assert manager.states("t1").count(TASK_RUNNING) == 1, "what was acknowledged is not repeated"


async def test_unacknowledged_statuses_are_repeated_within_the_session(host: Host, managers: list[Manager]) -> None:
    manager = managers[0]
    manager.acknowledges, manager.period_s = False, 0.02
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    await until(lambda: manager.batches >= 2)
    assert manager.calls == 1


async def test_a_delta_that_does_not_chain_opens_a_new_session(host: Host, managers: list[Manager]) -> None:
    manager = managers[0]
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    manager.send(ManagerMessage(assignments=Assignments(base=manager.sequence + 5, result=manager.sequence + 6)))
    await until(lambda: manager.calls == 2 and manager.in_session)
    manager.put(task("t2", slot=2))
    await manager.reported("t2", TASK_RUNNING)
    assert host.runtime.made["t1"].starts == 1


async def test_a_snapshot_withdraws_what_it_does_not_name(host: Host, managers: list[Manager]) -> None:
    manager = managers[0]
    manager.put(task(), task("t2", slot=2))
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    await manager.reported("t2", TASK_RUNNING)
    del manager.items["task/t1"]
    manager.end_session()
    await until(lambda: set(host.runtime.made) == {"t2"}, what="t1 reclaimed")


async def test_managers_and_own_node_are_handed_on(host: Host, managers: list[Manager]) -> None:
    manager = managers[0]
    agent = host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.send(ManagerMessage(managers=ManagerList(addrs=["192.0.2.1:2378", manager.addr])))
    node = Node(id="n1", index=9)
    node.spec.availability = DRAINED
    manager.send(ManagerMessage(node=node))
    await until(lambda: host.seen_nodes and host.seen_nodes[-1].spec.availability == DRAINED)
    assert host.seen_managers == [["192.0.2.1:2378", manager.addr]]
    assert agent.managers == ["192.0.2.1:2378", manager.addr]
    await until(lambda: host.network.states and host.network.state.index == 9)
    assert host.network.state.vxlan_port == 4790, "the port that the welcome names"


async def test_a_remote_change_reaches_the_kernel_and_the_names(host: Host, managers: list[Manager]) -> None:
    manager = managers[0]
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    remote = task("t2", slot=2)
    manager.put(items=endpoint(remote, node_id="n2"))
    await until(lambda: [e.address for e in host.network.state.endpoints] == ["10.0.1.3"])
    await until(lambda: [t.address for t in host.names.pictures[-1].networks[0].tasks] == ["10.0.1.3"])
    manager.withdraw("endpoint/net1/t2")
    await until(lambda: not host.network.state.endpoints)


@pytest.mark.parametrize("turns", range(0, 40, 2))
async def test_an_agent_that_ends_at_any_turn_of_a_refused_call_ends_at_once(
    host: Host, managers: list[Manager], turns: int
) -> None:
    """gRPC loses about one cancellation of a hundred here: then the agent went on with its next attempt."""
    follower = managers[0]
    follower.leads = False
    for _ in range(5):
        calls = follower.calls
        host.run(follower.addr)
        while follower.calls == calls:
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await host.abandon()
