"""Nodes that are there and nodes that are not: the shell around `liveness.py` which writes `Node.status`.

A state is written only when it changes. What is written is decided from the store as it is at that
moment and from who is connected now, so a node that comes back in between is left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from proto.objects_pb2 import TASK_ORPHANED, Node, NodeStatus, Task
from swarm.dispatch.items import is_live
from swarm.dispatch.liveness import (
    CHECK_EVERY_S,
    MISSED_PERIODS,
    NEW_LEADER_FACTOR,
    ListeningClock,
    Liveness,
    default_period_s,
)
from swarm.dispatch.nodes import with_state
from swarm.errors import Conflict, NotFound, SwarmError
from swarm.store.changes import Group, Update
from swarm.store.store import Store
from swarm.store.writer import Writer

SET_READY_EVERY_S = 0.5
"""Between two looks whether all who are connected count as READY: it goes through all of them."""
RETRY_DELAY_S = 0.2
"""After a write that found no quorum."""
ORPHANS_PER_GROUP = 500
"""Tasks given up in one transaction: about half a megabyte, a third of an entry."""

log = structlog.get_logger(__name__)


class Connected(Protocol):
    ended: asyncio.Event

    def end(self, why: str) -> None:
        """Close the session."""
        ...


def heartbeat_period_s(store: Store) -> float:
    """What agents are told, in seconds: what the cluster's spec says, else as long as the number of nodes asks for."""
    cluster = store.cluster
    return (cluster.spec.heartbeat_period_s if cluster is not None else 0.0) or default_period_s(len(store.nodes))


def orphaned(task: Task, now: float) -> Task:
    """The task, given up: nobody will ever report what became of it. `now` in Unix s."""
    updated = Task()
    updated.CopyFrom(task)
    updated.status.state = TASK_ORPHANED
    updated.status.timestamp = updated.status.applied_at = now
    updated.status.message = "its node is gone"
    return updated


class Presence:
    """`sessions` is the live map of who is connected; `now` is Unix s, `monotonic` any steady clock."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        sessions: Mapping[str, Connected],
        *,
        now: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._store = store
        self._writer = writer
        self._sessions = sessions
        self._now = now
        self._monotonic = monotonic
        self._liveness = Liveness()
        self._clock = ListeningClock(monotonic())
        self.expect_everybody()

    async def run(self) -> None:
        """Until cancelled: first nobody is known to be up, then the deadlines are watched."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._set_unknown())
            group.create_task(self._check())

    # ---- what happens to nodes

    def expect_everybody(self) -> None:
        """At the start of a term: all nodes that are not down get the longer grace."""
        for node in self._store.nodes:
            if self._is_connected(node.id):
                continue
            if node.status.state == NodeStatus.DOWN:
                self._liveness.down(node.id, self._monotonic())
            else:
                self.expect_new(node.id)

    def expect_new(self, node_id: str) -> None:
        """A node joined: its agent will connect."""
        grace_s = NEW_LEADER_FACTOR * self._grace_s()
        self._liveness.watch(node_id, self._listened(), grace_s)

    def arrived(self, node_id: str) -> None:
        """The node opened a session."""
        self._liveness.watch(node_id, self._listened(), self._grace_s())

    def alive(self, node_id: str, period_s: float) -> None:
        """A message came from the node, which was told this period."""
        self._liveness.beat(node_id, self._listened(), period_s)

    def forget(self, node_id: str) -> None:
        """The node was removed."""
        self._liveness.forget(node_id)

    def _is_connected(self, node_id: str) -> bool:
        session = self._sessions.get(node_id)
        return session is not None and not session.ended.is_set()

    def _listened(self) -> float:
        return self._clock.read(self._monotonic())

    def _grace_s(self) -> float:
        return MISSED_PERIODS * heartbeat_period_s(self._store)

    # ---- what is written

    async def _set_unknown(self) -> None:
        """A new leader has not heard of anybody: it says so, and nothing is rescheduled for it."""
        message = "a new leader waits for the node to report"
        while True:
            silent = [node for node in self._store.nodes if not self._is_connected(node.id) and _was_up(node)]
            if not await self._write(silent, NodeStatus.UNKNOWN, message):
                return

    async def _check(self) -> None:
        ready_at = 0.0
        while True:
            listened = self._listened()
            await asyncio.sleep(max(0.0, self._liveness.next_check(listened, CHECK_EVERY_S) - listened))
            now = self._monotonic()
            expired = self._liveness.expired(self._clock.look(now))
            for node_id in expired:
                self._liveness.down(node_id, now)
                session = self._sessions.get(node_id)
                if session is not None:
                    session.end(f"nothing was heard of node {node_id} for {MISSED_PERIODS:g} heartbeat periods")
            if expired:
                await self._set_down(expired)
            for node_id in self._liveness.lost(now):
                await self._orphan_tasks(node_id)
            if now >= ready_at:
                ready_at = now + SET_READY_EVERY_S
                await self._set_ready()

    async def _set_down(self, node_ids: list[str]) -> None:
        """Returns once each is DOWN, removed, or back."""
        message = f"nothing heard for at least {self._grace_s():g} s"
        log.warning("nodes down", node_ids=node_ids, why=message)
        while True:
            absent = [self._store.nodes.get(node_id) for node_id in node_ids if not self._is_connected(node_id)]
            if not await self._write([node for node in absent if node is not None], NodeStatus.DOWN, message):
                return

    async def _set_ready(self) -> None:
        """Who is connected is READY. Its session says so when it opens, unless it finds that written already; an
        UNKNOWN or DOWN that was decided before then may be stored only afterwards, and would stay."""
        connected = [self._store.nodes.get(node_id) for node_id in self._sessions if self._is_connected(node_id)]
        await self._write([node for node in connected if node is not None], NodeStatus.READY, "")

    async def _write(self, nodes: Sequence[Node], state: NodeStatus.State.ValueType, message: str) -> bool:
        """Give the nodes this state; False when all have it already."""
        updated = [with_state(node, state, message) for node in nodes]
        groups: list[Group] = [(Update(node),) for node in updated if node is not None]
        if groups and not await self._commit_all(groups):
            await asyncio.sleep(RETRY_DELAY_S)
        return bool(groups)

    async def _orphan_tasks(self, node_id: str) -> None:
        """What fails here is done by the next leader, after another such time."""
        tasks = [task for task in self._store.tasks.where("node", node_id) if is_live(task)]
        chunks = [tasks[start : start + ORPHANS_PER_GROUP] for start in range(0, len(tasks), ORPHANS_PER_GROUP)]
        await self._commit_all([tuple(Update(orphaned(task, self._now())) for task in chunk) for chunk in chunks])

    async def _commit_all(self, groups: Sequence[Group]) -> bool:
        """False when something other than lost races stood in the way."""
        try:
            errors = await self._writer.commit_all(groups)
        except SwarmError as error:
            errors = [error]
        hard = [error for error in errors if error is not None and not isinstance(error, Conflict | NotFound)]
        if hard:
            log.warning("node states not stored yet", error=str(hard[0]))
        return not hard


def _was_up(node: Node) -> bool:
    return node.status.state in (NodeStatus.READY, NodeStatus.DISCONNECTED)
