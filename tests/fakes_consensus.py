"""Consensus without a network: entries are applied at once, to a store that several managers may share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from swarm.consensus.interface import Member
from swarm.consensus.recover import meta_of
from swarm.consensus.snapshot import encode
from swarm.errors import NoLeader
from swarm.store.store import Store


class FakeGroup:
    """The managers that share one replicated log. `leader` may be set to another member, or None."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.nodes: dict[str, FakeConsensus] = {}
        self.leader_id: str | None = None
        self.entries = 0
        self.refused = 0
        self.waiting = 0
        self.gate = asyncio.Event()
        """Cleared: proposals wait, as without a quorum."""
        self.gate.set()

    def member(self, node_id: str, addr: str = "") -> FakeConsensus:
        node = self.nodes[node_id] = FakeConsensus(self, Member(node_id, addr))
        return node

    def elect(self, node_id: str | None) -> None:
        before, self.leader_id = self.leader_id, node_id
        for changed in {before, node_id} - {None}:
            self.nodes[str(changed)].tell()


class FakeConsensus:
    def __init__(self, group: FakeGroup, member: Member) -> None:
        self._group = group
        self.member = member
        self._callbacks: list[Callable[[bool], None]] = []
        self.sees_leader = True

    @property
    def node_id(self) -> str:
        return self.member.node_id

    def is_leader(self) -> bool:
        return self._group.leader_id == self.node_id

    def leader(self) -> Member | None:
        leader_id = self._group.leader_id
        return self._group.nodes[leader_id].member if leader_id is not None and self.sees_leader else None

    def is_removed(self) -> bool:
        return self.node_id not in self._group.nodes

    def difference(self) -> str:
        return ""

    def members(self) -> tuple[Member, ...]:
        return tuple(node.member for node in self._group.nodes.values())

    def reachable(self, node_id: str) -> bool:
        return node_id in self._group.nodes

    def on_leadership(self, callback: Callable[[bool], None]) -> None:
        self._callbacks.append(callback)
        callback(self.is_leader())

    def tell(self) -> None:
        for callback in self._callbacks:
            callback(self.is_leader())

    async def propose(self, entry: bytes, timeout_s: float) -> bytes:
        self._group.waiting += 1
        await self._group.gate.wait()
        self._group.waiting -= 1
        if not self.is_leader():
            self._group.refused += 1
            raise NoLeader("this manager does not lead")
        self._group.entries += 1
        return self._group.store.apply(entry)

    async def read_barrier(self, timeout_s: float) -> None:
        if self.leader() is None:
            raise NoLeader("nobody leads")

    def backup(self) -> Iterator[bytes]:
        return encode(meta_of(9, 3, self.members()), self._group.store.dump())

    async def add_member(self, member: Member, timeout_s: float) -> None:
        self._group.member(member.node_id, member.addr)

    async def remove_member(self, node_id: str, timeout_s: float) -> None:
        self._group.nodes.pop(node_id, None)

    async def transfer(self, timeout_s: float) -> None:
        others = [node_id for node_id in self._group.nodes if node_id != self.node_id]
        self._group.elect(others[0] if others else self.node_id)

    async def start(self) -> None:
        return None

    async def stop(self) -> None:
        return None


def single(store: Store, node_id: str = "m1", addr: str = "") -> FakeConsensus:
    """One manager, which leads."""
    group = FakeGroup(store)
    node = group.member(node_id, addr)
    group.elect(node_id)
    return node
