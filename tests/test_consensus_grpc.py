"""Consensus of several managers over real gRPC on loopback, with real files and the real clock."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proto.raft_pb2 import Member as MemberMessage
from proto.raft_pb2 import MembershipRequest, RaftFrame
from proto.raft_pb2_grpc import RaftStub
from swarm.consensus.config import DEFAULTS, PROPOSAL_BYTES_MAX, PROPOSALS_MAX, RaftConfig
from swarm.consensus.faults import Damaged
from swarm.consensus.grpc_transport import ask_leader, ask_to_join
from swarm.consensus.interface import Consensus, Member
from swarm.consensus.raft import RaftNode
from swarm.errors import Busy, Denied, Invalid, NoLeader, OutcomeUnknown, SwarmError
from tests.consensus_cluster import Manager, cluster, free_port, leader_of
from tests.waiting import until

Make = Callable[..., Awaitable[list[Manager]]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes a cluster, which is stopped afterwards."""
    made: list[Manager] = []

    async def make_cluster(size: int, config: RaftConfig = DEFAULTS) -> list[Manager]:
        made.extend(await cluster(tmp_path, size, config))
        return made

    yield make_cluster
    await asyncio.gather(*(manager.kill() for manager in made if manager.node._engine is not None))


async def _leader(managers: list[Manager]) -> Manager:
    await until(lambda: leader_of(managers), what="a leader")
    leader = leader_of(managers)
    assert leader is not None
    return leader


async def _write(managers: list[Manager], payload: bytes) -> bytes:
    """As a client does: try again while nothing was written."""
    while True:
        try:
            return await (await _leader(managers)).node.propose(payload, 5)
        except (NoLeader, Busy):
            await asyncio.sleep(0)


async def test_nothing_is_lost_when_leaders_die_and_when_all_restart(make: Make) -> None:
    managers = await make(3)
    typed: Consensus = managers[0].node
    assert typed.node_id == "m0"
    written = []
    for number in range(30):
        written.append(b"a%d" % number)
        assert await _write(managers, written[-1]) == b"%d" % len(written)
    old = await _leader(managers)
    await old.kill()
    alive = [manager for manager in managers if manager is not old]
    for number in range(30):
        written.append(b"b%d" % number)
        await _write(alive, written[-1])
    await old.restart()
    await until(lambda: old.machine.entries == written, what="the old leader to catch up")
    assert not old.node.is_leader()
    await asyncio.gather(*(manager.kill() for manager in managers))
    for manager in managers:
        await manager.restart()
    written.append(b"after all")
    await _write(managers, written[-1])
    for manager in managers:
        await until(lambda manager=manager: manager.machine.entries == written)  # type: ignore[misc]
        assert {member.node_id for member in manager.node.members()} == {"m0", "m1", "m2"}


async def test_stopping_the_leader_hands_leadership_over(make: Make) -> None:
    managers = await make(3)
    seen: list[bool] = []
    leader = await _leader(managers)
    leader.node.on_leadership(seen.append)
    others = [manager for manager in managers if manager is not leader]
    await leader.stop()
    assert seen == [True, False]
    assert others[0].node.leader() is not None
    await _write(others, b"x")
    with pytest.raises(NoLeader):
        await leader.node.propose(b"y", 1)


async def test_reads_at_any_manager_see_what_was_written_before(make: Make) -> None:
    managers = await make(3)
    leader = await _leader(managers)
    for number in range(20):
        await _write(managers, b"%d" % number)
        for manager in managers:
            await asyncio.gather(*(manager.node.read_barrier(5) for _ in range(20)))
            assert len(manager.machine.entries) == number + 1
    follower, other = (manager for manager in managers if manager is not leader)
    await asyncio.gather(leader.kill(), other.kill())
    with pytest.raises(NoLeader):
        await follower.node.read_barrier(0.5)


async def test_without_a_quorum_a_write_is_open_and_then_refused(make: Make) -> None:
    managers = await make(3)
    leader = await _leader(managers)
    for manager in managers:
        if manager is not leader:
            await manager.kill()
    with pytest.raises(OutcomeUnknown):
        await leader.node.propose(b"x", 10)
    await until(lambda: not leader.node.is_leader())
    with pytest.raises(NoLeader):
        await leader.node.propose(b"y", 1)
    assert not any(leader.node.reachable(manager.me.node_id) for manager in managers if manager is not leader)


async def test_limits_are_told_before_anything_is_written(make: Make) -> None:
    (manager,) = await make(1)
    with pytest.raises(Invalid, match="split it"):
        await manager.node.propose(b"x" * (PROPOSAL_BYTES_MAX + 1), 5)
    results = await asyncio.gather(
        *(manager.node.propose(b"%d" % number, 10) for number in range(PROPOSALS_MAX + 10)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, Busy)]
    assert len(refused) == 10
    assert len(manager.machine.entries) == PROPOSALS_MAX
    assert await manager.node.propose(b"x" * PROPOSAL_BYTES_MAX, 5) == b"%d" % (PROPOSALS_MAX + 1)


async def test_joining_through_a_follower_and_leaving(make: Make, tmp_path: Path) -> None:
    managers = await make(2)
    leader = await _leader(managers)
    follower = next(manager for manager in managers if manager is not leader)
    third = Manager("m2", tmp_path)
    await third.join(follower.me.addr)
    managers.append(third)
    assert (await ask_leader(third.open_channel, follower.me.addr, 5))[0] == leader.me
    await leader.node.add_member(third.me, 5)  # a known member: nothing happens
    await _write(managers, b"x")
    await leader.node.remove_member("m2", 5)
    await leader.node.remove_member("m2", 5)
    assert {member.node_id for member in leader.node.members()} == {"m0", "m1"}
    await until(lambda: len(follower.node.members()) == 2)
    await third.kill()
    await asyncio.gather(leader.kill(), follower.kill())
    await leader.restart()
    await follower.restart()
    assert {member.node_id for member in leader.node.members()} == {"m0", "m1"}
    await _write([leader, follower], b"y")


async def test_a_node_that_is_not_to_be_a_manager_is_not_admitted(tmp_path: Path) -> None:
    """Its certificate still says manager, but the state does not."""
    leader = Manager("m0", tmp_path)
    leader.may_join = {"wanted"}.__contains__
    await leader.found()
    for node_id, fits in (("unwanted", False), ("wanted", True)):
        newcomer = Manager(node_id, tmp_path)
        await newcomer.listen()
        if fits:
            assert await ask_to_join(newcomer.open_channel, leader.me.addr, newcomer.me, 5)
        else:
            with pytest.raises(Denied, match="promote it first"):
                await ask_to_join(newcomer.open_channel, leader.me.addr, newcomer.me, 5)
        await newcomer.transport.close()
        await newcomer.server.stop(0)
    await leader.kill()


async def test_a_removed_manager_is_told_and_disturbs_nobody(make: Make) -> None:
    managers = await make(3, replace(DEFAULTS, doubt_s=0.5))
    leader = await _leader(managers)
    gone = next(manager for manager in managers if manager is not leader)
    rest = [manager for manager in managers if manager is not gone]
    await gone.kill()
    await leader.node.remove_member(gone.me.node_id, 5)
    term = leader.node.running().kernel.term()
    await gone.restart()
    await until(gone.node.is_removed, what="being told")
    await _write(rest, b"x")
    assert leader.node.running().kernel.term() == term
    with pytest.raises(NoLeader):
        await gone.node.read_barrier(0.2)
    await leader.node.add_member(gone.me, 10)
    await until(lambda: gone.machine.entries == [b"x"] and not gone.node.is_removed())


async def test_a_leader_does_not_remove_itself_but_hands_over(make: Make) -> None:
    managers = await make(3)
    leader = await _leader(managers)
    with pytest.raises(NoLeader):
        await leader.node.remove_member(leader.me.node_id, 5)
    others = [manager for manager in managers if manager is not leader]
    await (await _leader(others)).node.remove_member(leader.me.node_id, 5)
    await _write(others, b"x")


async def test_removing_is_refused_when_no_quorum_would_be_left(make: Make) -> None:
    managers = await make(3)
    leader = await _leader(managers)
    followers = [manager for manager in managers if manager is not leader]
    await followers[0].kill()
    await until(lambda: not leader.node.reachable(followers[0].me.node_id))
    with pytest.raises(Invalid, match="no quorum"):
        await leader.node.remove_member(followers[1].me.node_id, 5)
    await leader.node.remove_member(followers[0].me.node_id, 5)


async def test_a_dead_or_wrong_address_does_not_become_a_member(make: Make) -> None:
    managers = await make(1)
    leader = managers[0]
    with pytest.raises(NoLeader, match="does not answer"):
        await leader.node.add_member(Member("ghost", f"127.0.0.1:{free_port()}"), 3)
    with pytest.raises(Invalid, match="answers manager m0"):
        await leader.node.add_member(Member("ghost", leader.me.addr), 3)
    assert leader.node.members() == (leader.me,)
    await _write(managers, b"x")


async def test_a_manager_that_dies_while_joining_costs_nobody_a_quorum(make: Make, tmp_path: Path) -> None:
    managers = await make(1)
    newcomer = Manager("m1", tmp_path)
    await newcomer.listen()
    members = await ask_to_join(newcomer.open_channel, managers[0].me.addr, newcomer.me, 5)
    assert members == (managers[0].me,), "it is no member yet, and must not take itself for one"
    await newcomer.transport.close()
    await newcomer.server.stop(0)
    await _write(managers, b"x")
    assert managers[0].node.members() == (managers[0].me,)


async def test_a_member_that_lost_its_disk_is_replaced_not_trusted(make: Make) -> None:
    managers = await make(3)
    leader = await _leader(managers)
    await _write(managers, b"x")
    forgetful = next(manager for manager in managers if manager is not leader)
    await forgetful.kill()
    shutil.rmtree(forgetful.directory)
    seen: list[int] = []
    await forgetful.listen()
    members = await ask_to_join(forgetful.open_channel, leader.me.addr, forgetful.me, 10)
    seen.append(len(leader.node.members()))
    await forgetful.run(members)
    await until(lambda: forgetful.machine.entries == [b"x"])
    await until(lambda: len(leader.node.members()) == 3)
    assert seen == [2], "it was removed before it came back"


async def test_a_new_address_replaces_the_old(make: Make) -> None:
    managers = await make(3)
    leader = await _leader(managers)
    moved = next(manager for manager in managers if manager is not leader)
    await moved.kill()
    moved.me = Member(moved.me.node_id, f"127.0.0.1:{free_port()}")
    await moved.restart()
    await leader.node.add_member(moved.me, 10)
    await _write(managers, b"x")
    await until(lambda: moved.machine.entries == [b"x"])
    assert len(leader.node.members()) == 3
    assert moved.me in leader.node.members()


async def test_strangers_and_impostors_are_refused(make: Make, tmp_path: Path) -> None:
    managers = await make(1)
    outsider = Manager("outsider", tmp_path)
    nobody = Manager("", tmp_path)
    addr = managers[0].me.addr
    term = managers[0].node._engine.kernel.term()  # type: ignore[union-attr]
    async with nobody.open_channel(addr) as channel:
        with pytest.raises(Exception, match="only managers speak here"):
            await RaftStub(channel).Stream().read()
    async with outsider.open_channel(addr) as channel:
        call = RaftStub(channel).Stream()
        await call.write(RaftFrame(type="hello", round=1))
        await call.read()
        await call.write(RaftFrame(type="append_entries", term=term + 50, prev_index=1))
        await call.write(RaftFrame(type="ping"))
        await call.read()
        for method in (RaftStub(channel).AddMember, RaftStub(channel).RemoveMember):
            request = MembershipRequest(member=MemberMessage(node_id="m0", addr="h:1"))
            with pytest.raises(Exception, match="PERMISSION_DENIED"):
                await method(request)
    with pytest.raises(Denied):
        await ask_to_join(outsider.open_channel, addr, Member("someone else", "h:1"), 5)
    await _write(managers, b"x")
    assert managers[0].node._engine.kernel.term() == term  # type: ignore[union-attr]


async def test_megabytes_reach_a_member_that_was_away(make: Make) -> None:
    """Snapshot and log exceed the send window several times over."""
    managers = await make(3, replace(DEFAULTS, snapshot_entries=20, tail_entries=2))
    away = next(manager for manager in managers if not manager.node.is_leader())
    await away.kill()
    rest = [manager for manager in managers if manager is not away]
    for number in range(36):
        await _write(rest, b"%d" % number + bytes(1_000_000))
    await until(lambda: leader_of(rest).node._engine.compaction.taken)  # type: ignore[union-attr]
    await away.restart()
    await until(lambda: away.machine.entries == rest[0].machine.entries and len(away.machine.entries) == 36)
    assert away.node._engine is not None
    assert away.node._engine.compaction.installed >= 1


async def test_damaged_files_are_refused_with_the_way_out(make: Make) -> None:
    (manager,) = await make(1)
    await _write([manager], b"x")
    await manager.stop()
    (segment,) = manager.directory.glob("wal-*.log")
    data = bytearray(segment.read_bytes())
    data[60] ^= 1
    segment.write_bytes(data)
    await manager.listen()
    with pytest.raises(Damaged, match="promote"):
        await manager.run([])
    assert issubclass(Damaged, SwarmError)
    await manager.stop()


async def test_a_peer_is_dialled_again_after_it_ended_a_stream_and_then_did_not_answer(make: Make) -> None:
    """As a partition looks: the stream dies, then whoever connects hears nothing, then the peer is back."""
    managers = await make(2)
    leader = await _leader(managers)
    follower = next(manager for manager in managers if manager is not leader)
    await follower.kill()
    connected = 0

    def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1

    silent = await asyncio.start_server(count, *follower.me.addr.split(":"))
    await until(lambda: connected >= 2, what="the leader to connect, give up and connect again")
    silent.close()
    await until(lambda: not leader.node.is_leader(), what="the lone leader to step down")
    await follower.restart()
    assert await _write(managers, b"x") == b"1", "it takes streams in both directions"


@pytest.mark.parametrize("teacher_dies", [True, False])
async def test_a_learner_whose_teacher_dies_or_gives_up_asks_again(
    make: Make, tmp_path: Path, teacher_dies: bool
) -> None:
    managers = await make(3)
    leader = await _leader(managers)
    await _write(managers, b"x")
    newcomer = Manager("new", tmp_path, replace(DEFAULTS, doubt_s=0.5))
    managers.append(newcomer)
    await newcomer.listen()
    await newcomer.run([manager.me for manager in managers[:3]])
    leader.node.running().teach(newcomer.me)
    await until(lambda: newcomer.machine.entries == [b"x"], what="the learner's log")
    assert not newcomer.node.running().is_member()
    if teacher_dies:
        await leader.kill()
        managers.remove(leader)
    else:
        leader.node.running().forget(newcomer.me.node_id)
    await until(lambda: newcomer.me in newcomer.node.members(), 15, what="membership")
    assert not newcomer.node.is_removed()


class _Deaf:
    """A manager that is up and answers, but takes nothing in."""

    def __init__(self, node: RaftNode) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def on_frame(self, node_id: str, frame: RaftFrame) -> None: ...


async def test_a_manager_that_does_not_catch_up_is_not_added(make: Make, tmp_path: Path) -> None:
    managers = await make(1)
    await _write(managers, b"x")
    newcomer = Manager("deaf", tmp_path)
    managers.append(newcomer)
    await newcomer.listen()
    await newcomer.run([managers[0].me, newcomer.me])
    newcomer.transport.attach(_Deaf(newcomer.node))
    with pytest.raises(Busy, match=r"did not get the whole log \(0 of \d+ entries\)"):
        await managers[0].node.add_member(newcomer.me, 2)
    assert managers[0].node.members() == (managers[0].me,)
    await _write(managers, b"y")


async def test_a_manager_whose_disk_is_nearly_full_takes_nothing_on_and_hands_over(make: Make) -> None:
    managers = await make(2)
    leader = await _leader(managers)
    full = next(manager for manager in managers if manager is not leader)
    await full.kill()
    full.config = replace(DEFAULTS, disk_reserve_bytes=1 << 60)
    await full.restart()
    await _write([leader], b"x")
    seen: list[bool] = []
    full.node.on_leadership(seen.append)
    await until(lambda: leader.node.reachable(full.me.node_id) and full.machine.entries == [b"x"])
    await leader.node.transfer(5)
    await until(lambda: seen == [False, True, False], what="the full one to lead, and to hand over")
    await _write([leader], b"y")


async def test_a_lone_manager_whose_disk_is_nearly_full_says_so(tmp_path: Path) -> None:
    manager = Manager("m0", tmp_path, replace(DEFAULTS, disk_reserve_bytes=1 << 60))
    await manager.found()
    with pytest.raises(Busy, match="the disk of this manager is nearly full"):
        await manager.node.propose(b"x", 5)
    await manager.stop()
