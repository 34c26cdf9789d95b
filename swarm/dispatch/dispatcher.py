"""The service Dispatcher: sessions of agents with the leader.

Everything here lives for one term of leadership (`_Term`): it starts empty, learns from the store and
from the agents that connect, and is thrown away when leadership goes. What has to survive is in the
store: node states, task states. Down nodes and lost tasks are found by `presence.py`, what a node is
sent by `assignments.py`, what it may report by `statuses.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import structlog

from proto.dispatch_pb2 import (
    AgentHello,
    AgentMessage,
    HeartbeatReply,
    ManagerList,
    ManagerMessage,
    Released,
    StatusAck,
    StatusBatch,
    Welcome,
)
from proto.dispatch_pb2_grpc import DispatcherServicer, add_DispatcherServicer_to_server
from proto.objects_pb2 import MANAGER, Cluster, Network, Node
from swarm.consensus.interface import Consensus
from swarm.dispatch.assignments import AssignmentIndex
from swarm.dispatch.doctor import ExamRelay
from swarm.dispatch.execs import ExecRelay
from swarm.dispatch.keys import KeyDistribution
from swarm.dispatch.liveness import BEATS_PER_PERIOD
from swarm.dispatch.logs import Link, LogRelay
from swarm.dispatch.nodes import host_of_peer, registered
from swarm.dispatch.presence import Presence, heartbeat_period_s
from swarm.dispatch.session import REGISTERS_MAX, REGISTERS_WITHIN_S, NodeSession, RegisterLimit
from swarm.dispatch.statuses import StatusWriter
from swarm.errors import Busy, Conflict, Denied, NotFound, SwarmError
from swarm.store.changes import Update
from swarm.store.store import Event, Store
from swarm.store.writer import Writer

HELLO_TIMEOUT_S = 10.0
"""From opening the stream to the first message."""
MANAGERS_EVERY_S = 0.5
"""A change of Raft's members reaches the agents at the latest so much later."""
REGISTER_ATTEMPTS = 10
"""A node object changes rarely; ten lost races in a row mean something is wrong."""
DEFAULT_DATA_PATH_PORT = 4789

Context = grpc.aio.ServicerContext[AgentMessage, ManagerMessage]
AnyContext = grpc.aio.ServicerContext[Any, Any]
NodeUpdate = Callable[[Node], Node | None]

log = structlog.get_logger(__name__)


class _Term:
    """All that one term of leadership knows."""

    def __init__(self, store: Store, writer: Writer, now: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self.index = AssignmentIndex(store)
        self.keys = KeyDistribution(store, self.index)
        self.statuses = StatusWriter(store, writer, now)
        self.sessions: dict[str, NodeSession] = {}
        self.registers = RegisterLimit()
        self.presence = Presence(store, writer, self.sessions, now=now, monotonic=monotonic)


class Dispatcher(DispatcherServicer):
    """`identify` tells the node ID of a session's certificate (or raises Denied); `now` is Unix s, `monotonic`
    seconds of any steady clock."""

    def __init__(  # noqa: PLR0917  # the parts of a manager, in the order in which they are made
        self,
        store: Store,
        writer: Writer,
        consensus: Consensus,
        identify: Callable[[AnyContext], str],
        now: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._store = store
        self._writer = writer
        self._consensus = consensus
        self._identify = identify
        self._now = now
        self._monotonic = monotonic
        self._term: _Term | None = None
        self.logs = LogRelay(self._link)
        self.execs = ExecRelay(self._link)
        self.exams = ExamRelay(self._link)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve `Dispatcher` on this server."""
        add_DispatcherServicer_to_server(self, server)

    def connected(self) -> frozenset[str]:
        """Nodes that have a session here now."""
        return frozenset(self._term.sessions) if self._term is not None else frozenset()

    async def run(self) -> None:
        """Lead the sessions until cancelled: start it when this manager becomes the leader, cancel it when it
        no longer is. Sessions are refused while it does not run."""
        term = _Term(self._store, self._writer, self._now, self._monotonic)
        unsubscribe = self._store.subscribe(lambda events: self._on_events(term, events))
        self._term = term
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(term.statuses.run())
                group.create_task(term.presence.run())
                group.create_task(self._compare_managers(term))
        finally:
            self._term = None
            unsubscribe()
            for session in list(term.sessions.values()):
                session.end("this manager does not lead any more")

    # ---- facts

    def _period_s(self) -> float:
        return heartbeat_period_s(self._store)

    def _manager_addrs(self) -> tuple[str, ...]:
        """mTLS listeners of the managers, as Raft and the node objects know them."""
        addrs = {member.addr for member in self._consensus.members()}
        addrs.update(node.manager_addr for node in self._store.nodes if node.role == MANAGER and node.manager_addr)
        return tuple(sorted(addrs))

    def _link(self, node_id: str) -> Link | None:
        return self._term.sessions.get(node_id) if self._term is not None else None

    # ---- what the store says

    def _on_events(self, term: _Term, events: Sequence[Event]) -> None:
        touched = term.index.apply(events)
        rekeyed = any(isinstance(event.record, Cluster | Node | Network) for event in events) or not events
        for node_id in list(term.sessions) if rekeyed else touched:
            self._send_keys(term, node_id)
        for node_id in touched:
            if node_id in term.sessions:
                term.sessions[node_id].touch()
        self._send_released(term)
        if not events:
            term.presence.expect_everybody()
        if not events or any(isinstance(event.record, Node) for event in events):
            self._send_managers(term)
        for event in events:
            if isinstance(event.record, Node):
                self._on_node(term, event)

    def _on_node(self, term: _Term, event: Event) -> None:
        node_id = event.record.id
        session = term.sessions.get(node_id)
        if event.after is None:
            term.presence.forget(node_id)
            if session is not None:
                session.end(f"node {node_id} was removed from the cluster")
        elif event.before is None:
            term.presence.expect_new(node_id)
        elif session is not None and isinstance(event.after, Node):
            session.send(ManagerMessage(node=event.after))

    @staticmethod
    def _send_released(term: _Term) -> None:
        for node_id, task_ids in term.index.releases.take().items():
            if node_id in term.sessions:
                term.sessions[node_id].send(ManagerMessage(released=Released(task_ids=task_ids)))

    @staticmethod
    def _send_keys(term: _Term, node_id: str) -> None:
        """Before the assignments that need them: these wait in the view until the queue is empty."""
        session = term.sessions.get(node_id)
        keys = term.keys.news(node_id) if session is not None else None
        if session is not None and keys is not None:
            session.send(ManagerMessage(keys=keys))

    async def keys_settled(self, timeout_s: float) -> list[str]:
        """Nodes that after so long have not confirmed the newest key of encrypted networks; [] = all have."""
        term = self._term
        if term is None:
            return []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await term.keys.settled()
        return term.keys.behind()

    async def _compare_managers(self, term: _Term) -> None:
        """Members come and go without an event of the store, so they are compared now and then."""
        while True:
            await asyncio.sleep(MANAGERS_EVERY_S)
            self._send_managers(term)

    def _send_managers(self, term: _Term) -> None:
        addrs = self._manager_addrs()
        for session in list(term.sessions.values()):
            if session.managers != addrs and session.send(ManagerMessage(managers=ManagerList(addrs=addrs))):
                session.managers = addrs

    # ---- sessions

    async def Session(  # type: ignore[override]  # a coroutine that writes: a generator cannot bound its writes
        self, request_iterator: AsyncIterator[AgentMessage], context: Context
    ) -> None:
        """One agent's stream; returns only by refusing or by the stream's end."""
        code, why, trailing = await self._session(request_iterator, context)
        await context.abort(code, why, trailing_metadata=trailing)

    async def _session(
        self, incoming: AsyncIterator[AgentMessage], context: Context
    ) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
        """Serve the stream; returns why it ended."""
        term = self._term
        if term is None or not self._consensus.is_leader():
            return self._redirect()
        try:
            node_id = self._identify(context)
            hello = await self._hello(incoming)
            session = await self._register(term, node_id, hello, host_of_peer(context.peer()))
        except Denied as error:
            return grpc.StatusCode.PERMISSION_DENIED, str(error), ()
        except NotFound as error:
            return grpc.StatusCode.NOT_FOUND, str(error), ()
        except SwarmError as error:
            return grpc.StatusCode.UNAVAILABLE, str(error), ()
        try:
            await self._serve(term, session, incoming, context)
        finally:
            session.end("the stream was closed")
            self._drop(term, session)
        if self._term is not term:
            return self._redirect()
        return grpc.StatusCode.ABORTED, session.why, ()

    def _redirect(self) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
        leader = self._consensus.leader()
        if leader is None or leader.node_id == self._consensus.node_id:
            return grpc.StatusCode.FAILED_PRECONDITION, "no leader is known here at the moment: try again", ()
        why = f"this manager does not lead: connect to {leader.addr}"
        return grpc.StatusCode.FAILED_PRECONDITION, why, (("leader-addr", leader.addr),)

    async def _hello(self, incoming: AsyncIterator[AgentMessage]) -> AgentHello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(incoming)
        except (TimeoutError, StopAsyncIteration):
            raise Denied(f"the session sent no hello within {HELLO_TIMEOUT_S:g} s") from None
        if first.WhichOneof("message") != "hello":
            raise Denied("the first message of a session has to be a hello")
        return first.hello

    async def _register(self, term: _Term, node_id: str, hello: AgentHello, seen_addr: str) -> NodeSession:
        """The node's new session, once it is stored that the node is READY. An earlier one is replaced."""
        if node_id not in self._store.nodes:
            raise NotFound(f"node {node_id} is not a member of this cluster: it may have been removed")
        if not term.registers.allows(node_id, self._monotonic()):
            raise Busy(
                f"node {node_id} opened {REGISTERS_MAX} sessions within {REGISTERS_WITHIN_S:g} s: is its certificate in"
                " use on two machines? Try again in a moment"
            )
        earlier = term.sessions.get(node_id)
        if earlier is not None:
            earlier.end(f"node {node_id} opened a newer session")
            self._drop(term, earlier)
        term.presence.arrived(node_id)
        session = NodeSession(node_id, uuid.uuid4().hex, term.index.attach(node_id), self._period_s())
        term.sessions[node_id] = session
        try:
            await self._update_node(node_id, functools.partial(_told, hello, seen_addr))
        except BaseException:
            self._drop(term, session)
            raise
        return session

    async def _update_node(self, node_id: str, change: NodeUpdate) -> None:
        for attempt in range(REGISTER_ATTEMPTS):
            node = self._store.nodes.get(node_id)
            if node is None:
                raise NotFound(f"node {node_id} is not a member of this cluster: it may have been removed")
            updated = change(node)
            if updated is None:
                return
            try:
                await self._writer.commit((Update(updated),))
            except Conflict:
                if attempt == REGISTER_ATTEMPTS - 1:
                    raise
            else:
                return

    def _drop(self, term: _Term, session: NodeSession) -> None:
        """The session is over. Whether the node is down is for the heartbeat's deadline to tell."""
        term.index.detach(session.view)
        self._send_released(term)
        if term.sessions.get(session.node_id) is session:
            del term.sessions[session.node_id]
            term.keys.session_ended(session.node_id)
            self.logs.session_ended(session.node_id)
            self.execs.session_ended(session.node_id)
            self.exams.session_ended(session.node_id)

    async def _serve(
        self, term: _Term, session: NodeSession, incoming: AsyncIterator[AgentMessage], context: Context
    ) -> None:
        """Read and write until one of the two fails or the session is ended."""
        cluster = self._store.cluster
        port = (cluster.data_path_port if cluster is not None else 0) or DEFAULT_DATA_PATH_PORT
        session.managers = self._manager_addrs()
        welcome = Welcome(session_id=session.session_id, heartbeat_period_s=session.period_s, data_path_port=port)
        session.send(ManagerMessage(welcome=welcome))
        session.send(ManagerMessage(managers=ManagerList(addrs=session.managers)))
        node = self._store.nodes.get(session.node_id)
        if node is not None:
            session.send(ManagerMessage(node=node))
        self._send_keys(term, session.node_id)
        parts = {
            asyncio.create_task(self._read(term, session, incoming, host_of_peer(context.peer()))),
            asyncio.create_task(session.pump(context.write)),
            asyncio.create_task(_until(session.ended)),
        }
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
            results = await asyncio.gather(*parts, return_exceptions=True)
        for result in results:
            if isinstance(result, TimeoutError):
                session.end(f"node {session.node_id} does not take messages")
            elif isinstance(result, SwarmError):
                session.end(str(result))
            elif isinstance(result, Exception) and not isinstance(result, grpc.RpcError | grpc.aio.UsageError):
                log.error("session failed", node_id=session.node_id, exc_info=result)
                session.end("the manager failed to serve the session; its log says why")

    async def _read(
        self, term: _Term, session: NodeSession, incoming: AsyncIterator[AgentMessage], seen_addr: str
    ) -> None:
        node_id = session.node_id

        def alive() -> None:
            # A session that was replaced or ended must not keep its node alive.
            if not session.ended.is_set():
                term.presence.alive(node_id, session.period_s)

        async for message in incoming:
            alive()
            match message.WhichOneof("message"):
                case "heartbeat" if message.heartbeat.sequence % BEATS_PER_PERIOD:  # one answer per period is enough
                    session.period_s = self._period_s()
                    reply = HeartbeatReply(sequence=message.heartbeat.sequence, period_s=session.period_s)
                    session.send(ManagerMessage(heartbeat=reply))
                case "heartbeat":
                    pass
                case "statuses":
                    self._take_statuses(term, session, message.statuses)
                case "applied":
                    term.index.releases.confirmed(node_id, session.view.confirmed(message.applied.sequence))
                    self._send_released(term)
                case "keys_applied":
                    term.keys.confirmed(node_id, message.keys_applied.serial)
                case "exec":
                    self.execs.deliver(node_id, message.exec)
                case "examined":
                    self.exams.deliver(node_id, message.examined)
                case "logs":
                    await self.logs.deliver(node_id, message.logs, alive)
                case "hello":
                    await self._update_node(node_id, functools.partial(_told, message.hello, seen_addr))
                case _:
                    log.warning("unknown message from a node", node_id=node_id)

    def _take_statuses(self, term: _Term, session: NodeSession, batch: StatusBatch) -> None:
        ack = ManagerMessage(ack=StatusAck(sequence=batch.sequence))
        term.statuses.submit(session.node_id, batch.updates, lambda: session.send(ack))


def _told(hello: AgentHello, seen_addr: str, node: Node) -> Node | None:
    return registered(node, hello, seen_addr)


async def _until(event: asyncio.Event) -> None:
    await event.wait()
