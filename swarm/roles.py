"""Promotion and demotion of managers: brings `Node.role` and the members of Raft to what users want.

A promoted node gets its role at once; it then fetches a manager's certificate and joins Raft by itself.
A demoted one leaves Raft first and becomes a worker afterwards, so that a manager's vote never hangs on
a certificate that is about to go. A leader that is to be demoted hands leadership over and leaves the
rest to its successor. One member changes at a time, and never one whose loss would cost the quorum.

`Node.role` and `Node.manager_addr` are written here only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from proto.objects_pb2 import MANAGER, WORKER, Cluster, Node, NodeRole
from swarm.consensus.interface import Consensus, Member
from swarm.errors import SwarmError
from swarm.store.changes import Group, Update
from swarm.store.store import Event, Store
from swarm.store.writer import Writer

REMOVE_TIMEOUT_S = 5.0
"""As in the reference: a member change that takes longer is tried again."""
TRANSFER_TIMEOUT_S = 5.0
RETRY_FIRST_S, RETRY_MAX_S = 0.2, 5.0
AUDIT_S = 1.0
"""Reachability and membership change without an event of the store: look this often while something is pending or
not; one look costs microseconds."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: write these nodes, then at most one change of Raft's members, or hand over leadership."""

    updates: tuple[Node, ...] = ()
    remove: str | None = None
    transfer: bool = False
    waits: tuple[str, ...] = ()
    """What cannot be done yet and why, one line each."""


def decide(nodes: Sequence[Node], members: Sequence[Member], reachable: frozenset[str], me: str) -> Plan:
    """The next step from what is to what users want. `me` leads; `reachable`: members that answer, `me` included."""
    by_id = {node.id: node for node in nodes}
    addrs = {member.node_id: member.addr for member in members}
    updates = tuple(new for node in nodes if (new := _settled(node, addrs)) is not node)
    # A member that answers nobody goes first: that costs no vote. Our own turn comes last.
    leaving = [member for member in sorted(addrs) if not _stays(by_id.get(member))]
    leaving.sort(key=lambda member: (member == me, member in reachable))
    waits: list[str] = []
    for member in leaving:
        refusal = quorum_refusal(frozenset({member}), frozenset(addrs), reachable)
        if refusal is not None:
            waits.append(f"manager {member} stays for now: {refusal}")
        elif member == me:
            return Plan(updates, transfer=True, waits=tuple(waits))
        else:
            return Plan(updates, remove=member, waits=tuple(waits))
    return Plan(updates, waits=tuple(waits))


def _stays(node: Node | None) -> bool:
    """Whether a member of Raft with this object (None: it was removed) is to stay one."""
    return node is not None and node.spec.desired_role == MANAGER


def _settled(node: Node, addrs: dict[str, str]) -> Node:
    """The node with role and manager address as they should be stored now; itself when it has them."""
    role, addr = node.role, node.manager_addr
    if node.spec.desired_role == MANAGER:
        role = MANAGER
    elif node.id not in addrs:
        role = WORKER
    if node.id in addrs:
        addr = addrs[node.id]
    elif role == WORKER:
        addr = ""
    if (role, addr) == (node.role, node.manager_addr):
        return node
    copy = Node()
    copy.CopyFrom(node)
    copy.role, copy.manager_addr = role, addr
    return copy


def quorum_refusal(leaving: frozenset[str], members: frozenset[str], reachable: frozenset[str]) -> str | None:
    """Why these members may not leave Raft together, or None: those that remain must be able to go on at once."""
    remaining = members - leaving
    if not remaining:
        return "it is the last manager of the swarm; promote another node first"
    needed = len(remaining) // 2 + 1
    answering = len(remaining & reachable)
    if answering < needed:
        return (
            f"the swarm would lose its quorum: of the {len(remaining)} managers that would remain {answering} can be"
            f" reached, and {needed} are needed; bring another manager up or promote a worker first"
        )
    return None


def demotion_refusal(store: Store, consensus: Consensus, node: Node) -> str | None:
    """Why this node may not be demoted or removed now, as one line for people, or None. Asked on the leader.
    Demotions that were accepted but are not finished count as done."""
    members = frozenset(member.node_id for member in consensus.members())
    managers = {other.id for other in store.nodes if other.spec.desired_role == MANAGER}
    if node.id not in members | managers:
        return None
    name = node.description.hostname or node.id
    if not managers - {node.id}:
        return f"node {name} cannot be demoted: it is the last manager of the swarm; promote another node first"
    if node.id not in members:
        return None  # promoted, but not a member yet: no vote is lost
    leaving = frozenset(member for member in members if member not in managers) | {node.id}
    refusal = quorum_refusal(leaving, members, _reachable(consensus))
    return None if refusal is None else f"node {name} cannot be demoted: {refusal}"


def forgetting(cluster: Cluster, now: float) -> Cluster | None:
    """The cluster without blocked certificates that have expired by `now` (Unix s); None if there are none."""
    expired = [node_id for node_id, forget_after in cluster.blocked_certificates.items() if forget_after < now]
    if not expired:
        return None
    copy = Cluster()
    copy.CopyFrom(cluster)
    for node_id in expired:
        del copy.blocked_certificates[node_id]
    return copy


def _reachable(consensus: Consensus) -> frozenset[str]:
    return frozenset(member.node_id for member in consensus.members() if consensus.reachable(member.node_id))


class RoleManager:
    """Runs on the leader; on another manager it waits. `now` is the wall clock (Unix s)."""

    def __init__(self, store: Store, writer: Writer, consensus: Consensus, now: Callable[[], float]) -> None:
        self._store = store
        self._writer = writer
        self._consensus = consensus
        self._now = now
        self._wake = asyncio.Event()
        self._told: tuple[str, ...] = ()

    async def run(self) -> None:
        """Until cancelled."""
        unsubscribe = self._store.subscribe(self._notice)
        retry_s = RETRY_FIRST_S
        try:
            while True:
                self._wake.clear()
                try:
                    acted = await self._step()
                    retry_s = RETRY_FIRST_S
                except SwarmError as error:
                    log.info("roles: trying again", reason=str(error), after_s=retry_s)
                    await asyncio.sleep(retry_s)
                    retry_s = min(RETRY_MAX_S, retry_s * 2)
                    continue
                if not acted:
                    await self._sleep()
        finally:
            unsubscribe()

    def _notice(self, events: Sequence[Event]) -> None:
        if not events or any(isinstance(event.record, Node) for event in events):
            self._wake.set()

    async def _sleep(self) -> None:
        try:
            async with asyncio.timeout(AUDIT_S):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _step(self) -> bool:
        """Decide and act once; whether anything was done. Raises SwarmError when it failed."""
        cluster = self._store.cluster
        if cluster is None or not self._consensus.is_leader():
            return False
        plan = decide(
            list(self._store.nodes), self._consensus.members(), _reachable(self._consensus), self._consensus.node_id
        )
        self._tell(plan.waits)
        forgotten = forgetting(cluster, self._now())
        await self._write([*plan.updates, *([forgotten] if forgotten is not None else [])])
        if plan.remove is not None:
            log.info("manager leaves consensus", node=plan.remove)
            await self._consensus.remove_member(plan.remove, REMOVE_TIMEOUT_S)
        elif plan.transfer:
            log.info("handing leadership over: this manager is to be demoted")
            await self._consensus.transfer(TRANSFER_TIMEOUT_S)
        return bool(plan.updates or plan.remove)  # after a transfer somebody else goes on

    async def _write(self, records: Iterable[Node | Cluster]) -> None:
        groups: list[Group] = [(Update(record),) for record in records]
        if not groups:
            return
        for (change,) in groups:
            if isinstance(change.record, Node):
                log.info("role", node=change.record.id, role=NodeRole.Name(change.record.role))
        for error in await self._writer.commit_all(groups):
            if error is not None:
                raise error

    def _tell(self, waits: tuple[str, ...]) -> None:
        """Log what waits, once for each change of it."""
        if waits != self._told:
            self._told = waits
            for line in waits:
                log.warning("roles", waits=line)
