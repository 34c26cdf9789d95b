"""Changing who the members are: one change at a time, and never one that costs the cluster its quorum."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import structlog

from swarm.consensus.config import quorum
from swarm.consensus.futures import answer, settle
from swarm.consensus.interface import Member
from swarm.consensus.membership import member_id
from swarm.consensus.transport import FrameTransport
from swarm.errors import Busy, Denied, Invalid, NoLeader

if TYPE_CHECKING:
    from swarm.consensus.raft import RaftNode

PROBE_TIMEOUT_S = 2.0
"""For a manager to say who it is: a round trip and a handshake, with room for a loaded machine."""
PROBE_EVERY_S = 0.1
ADMISSION_TIMEOUT_S = 300.0
"""For a manager that was promised membership to start its consensus and to get the log: 1 GB at 4 MB/s."""

log = structlog.get_logger()


class MemberChanges:
    """`clock`: monotonic, s. `may_join`: whether the state wants this node as a manager."""

    def __init__(
        self,
        node: RaftNode,
        me: Member,
        transport: FrameTransport,
        clock: Callable[[], float],
        may_join: Callable[[str], bool],
    ) -> None:
        self._node = node
        self._me = me
        self._transport = transport
        self._clock = clock
        self._may_join = may_join
        self._lock = asyncio.Lock()

    async def add(self, member: Member, timeout_s: float) -> None:
        """Leader only. The new member must answer at its address, run its consensus and hold the log before it counts:
        until then it is a learner, which costs nobody a quorum, and other changes go on beside it.
        Adding a known member with its known address is a no-op; with another one, its address is replaced."""
        deadline = self._clock() + timeout_s
        engine = self._node.running()
        if not engine.is_leader():
            raise engine.not_leading()
        if member in engine.members():
            return
        if member.node_id == self._me.node_id:
            raise Invalid("the leader's own address cannot change: hand leadership over first")
        await self._await_running(member, deadline)
        await self._remove_old_address(member, deadline)
        engine.teach(member)
        try:
            await self._await_frames(member, deadline)
            await self._await_log(member, deadline)
            async with self._lock:
                if member not in engine.members():  # else somebody else has added it meanwhile
                    self._check_quorum_with(member)
                    await self._change("add", member, deadline)
        finally:
            engine.forget(member.node_id)

    async def _remove_old_address(self, member: Member, deadline_s: float) -> None:
        async with self._lock:
            old = next((each for each in self._node.members() if each.node_id == member.node_id), None)
            if old is not None:
                await self._change("rem", old, deadline_s)

    def _check_quorum_with(self, member: Member) -> None:
        """Raises Invalid."""
        count = len(self._node.members()) + 1
        reachable = len(self._node.reachable_others()) + 2
        if reachable < quorum(count):
            raise Invalid(
                f"adding manager {member.node_id} would leave {reachable} of {count} managers reachable, which is"
                " no quorum: bring the unreachable managers back, or remove them first"
            )

    async def remove(self, node_id: str, timeout_s: float) -> None:
        """Leader only; an unknown member is a no-op. Raises Invalid when the rest would not have a reachable quorum.
        A leader asked to remove itself hands leadership over and raises NoLeader: ask the new one."""
        deadline = self._clock() + timeout_s
        async with self._lock:
            engine = self._node.running()
            if not engine.is_leader():
                raise engine.not_leading()
            target = next((each for each in engine.members() if each.node_id == node_id), None)
            if target is None:
                return
            rest = [each for each in engine.members() if each != target]
            reachable = [each for each in rest if self._node.reachable(each.node_id)]
            if not rest:
                raise Invalid("the only manager cannot be removed: promote another node first")
            if len(reachable) < quorum(len(rest)):
                raise Invalid(
                    f"removing manager {node_id} would leave {len(reachable)} of {len(rest)} managers reachable, which"
                    " is no quorum: bring the unreachable managers back, or remove them first"
                )
            if target.node_id == self._me.node_id:
                await self._node.transfer(timeout_s)
                raise self._node.running().not_leading()
            await self._change("rem", target, deadline)

    async def _change(self, operation: str, target: Member, deadline_s: float) -> None:
        engine = self._node.running()
        if not await self._node.until(
            lambda: not engine.is_leader() or engine.may_change_members(), deadline_s - self._clock()
        ):
            raise Busy("another change of the managers is not finished; try again")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        engine.change_members(operation, member_id(target), partial(settle, future))
        self._node.want_turn()
        await answer(future, max(0.0, deadline_s - self._clock()))
        log.info("managers changed", change=operation, member=member_id(target))

    async def _await_running(self, member: Member, deadline_s: float) -> None:
        """A member whose address is dead would cost the cluster its quorum: make sure it answers and takes part."""
        while True:
            reply = await self._transport.probe(member.addr, min(PROBE_TIMEOUT_S, max(0.0, deadline_s - self._clock())))
            if reply.node_id != member.node_id:
                raise Invalid(
                    f"at {member.addr} answers manager {reply.node_id}, not {member.node_id}:"
                    " check the address that it advertises"
                )
            if reply.members:
                break
            if self._clock() > deadline_s:
                raise NoLeader(f"manager {member.node_id} at {member.addr} did not start its consensus in time")
            await asyncio.sleep(PROBE_EVERY_S)

    async def _await_frames(self, member: Member, deadline_s: float) -> None:
        engine = self._node.running()
        if not await self._node.until(
            lambda: engine.is_up(member.node_id) and self._node.reachable(member.node_id), deadline_s - self._clock()
        ):
            raise NoLeader(
                f"manager {member.node_id} answers at {member.addr}, but no frames go both ways between it and"
                f" {self._me.addr}: check that each can reach the other's port"
            )

    async def _await_log(self, member: Member, deadline_s: float) -> None:
        """Rounds, each up to the end that the log had when it began, until one takes less than an election: then the
        new member cannot hold up commits for longer than that (Ongaro's thesis, 4.2.1)."""
        engine, name = self._node.running(), member_id(member)

        def has_gone() -> bool:
            return not engine.is_leader() or not self._node.reachable(member.node_id)

        while True:
            began_s, target = self._clock(), engine.wal.last_index
            in_time = await self._node.until(
                lambda end=target: has_gone() or engine.kernel.match(name) >= end,  # type: ignore[misc]
                deadline_s - began_s,
            )
            if not engine.is_leader():
                raise engine.not_leading()
            if not in_time or has_gone():
                raise Busy(
                    f"manager {member.node_id} at {member.addr} did not get the whole log ({engine.kernel.match(name)}"
                    f" of {target} entries), so it was not added: see its own log for the reason, then try again"
                )
            if self._clock() - began_s < engine.config.election_min_s:
                return

    async def admit(self, member: Member) -> tuple[Member, ...]:
        """A manager asks to join. It is promised membership at once, and gets it when its consensus runs: so a
        manager that dies on the way costs nobody a quorum."""
        engine = self._node.running()
        if not engine.is_leader():
            raise engine.not_leading()
        if not self._may_join(member.node_id):
            raise Denied(f"node {member.node_id} is not to be a manager: promote it first (`pyswarm node promote`)")
        reply = await self._transport.probe(member.addr, PROBE_TIMEOUT_S)
        if reply.node_id != member.node_id:
            raise Invalid(f"at {member.addr} answers manager {reply.node_id}, not {member.node_id}")
        forgot = member in engine.members() and not reply.members
        if forgot:
            # It has lost its log, and with it what it promised: as the same member it could vote twice.
            await self.remove(member.node_id, ADMISSION_TIMEOUT_S)
        if member not in engine.members():
            self._node.spawn(f"admit {member.node_id}", partial(self.add, member, ADMISSION_TIMEOUT_S))
        # Without itself: it is none until the log says so, and must not take itself for one before.
        return tuple(each for each in engine.members() if each.node_id != member.node_id)
