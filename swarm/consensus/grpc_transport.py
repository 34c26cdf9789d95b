"""Frames between managers over gRPC streams, and the calls by which managers join, leave and find the leader.

Each member dials each other one and sends on the stream that it opened; the answering side of a stream carries only
pongs. A stream is one connection: it begins with a hello (its epoch), a newer one replaces an older, and what
was queued for a broken stream is dropped, which Raft expects. Channels come from outside, so there is no TLS here.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import structlog

from proto import raft_pb2 as pb
from proto.raft_pb2_grpc import RaftServicer, RaftStub, add_RaftServicer_to_server
from swarm.consensus.interface import Member
from swarm.consensus.transport import Answer, Receiver
from swarm.errors import Busy, Denied, Invalid, NoLeader, OutcomeUnknown, SwarmError

OpenChannel = Callable[[str], grpc.aio.Channel]
"""host:port -> a channel, which the caller closes."""
PeerId = Callable[["grpc.aio.ServicerContext[Any, Any]"], str]
"""The node ID in the caller's certificate, "" if it is no manager's."""

PING_EVERY_S = 0.5
"""A stream on which nothing else was sent for so long carries a ping. The other side answers the first frame after as
long, whatever it is: a ping is but a frame that is sent for the sake of the answer."""
DEAD_AFTER_S = 1.5
"""Three times without an answer: the peer or the path to it is gone, whatever TCP believes."""
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.03, 1.0
QUEUE_FRAMES_MAX = 20_000
"""A backstop; the engine stops sending at SEND_WINDOW_BYTES."""
CANCEL_EVERY_S = 0.1
"""Between attempts to end a task whose cancellation met another end and was swallowed."""
REMOVE_TIMEOUT_S = 10.0
REDIRECTS_MAX = 3
"""Hints about who leads that are followed before giving up: leadership moves, but not that fast."""
LEADER_ADDR_KEY = "leader-addr"

_STATUS = {
    NoLeader: grpc.StatusCode.FAILED_PRECONDITION,
    Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    Denied: grpc.StatusCode.PERMISSION_DENIED,
    Busy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    OutcomeUnknown: grpc.StatusCode.ABORTED,
}
_ERRORS: dict[grpc.StatusCode, type[SwarmError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: Invalid,
    grpc.StatusCode.PERMISSION_DENIED: Denied,
    grpc.StatusCode.UNAUTHENTICATED: Denied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Busy,
    grpc.StatusCode.ABORTED: OutcomeUnknown,
}

CLOSE_TIMEOUT_S = 2.0
"""For a channel that is given up anyway."""
_LOST = (TimeoutError, grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError)
"""How it shows that a stream has ended."""

log = structlog.get_logger()


class _Peer:
    """The outgoing stream to one member, kept open for as long as it is a peer."""

    def __init__(self, transport: GrpcTransport, member: Member) -> None:
        self.member = member
        self.queued_bytes = 0
        self.is_up = False
        self._transport = transport
        self._queue: deque[pb.RaftFrame] = deque()
        self._filled = asyncio.Event()
        self._answered_at_s = self._sent_at_s = 0.0
        self._is_closed = False
        self.task = asyncio.create_task(self._run())

    def send(self, frame: pb.RaftFrame) -> None:
        if not self.is_up or len(self._queue) >= QUEUE_FRAMES_MAX:
            return
        self._queue.append(frame)
        self.queued_bytes += frame.ByteSize()
        self._filled.set()

    def close(self) -> None:
        """`task` ends soon. A cancellation alone may be swallowed where it meets the end of the stream."""
        self._is_closed = True
        self.task.cancel()

    async def _run(self) -> None:
        backoff_s = RECONNECT_MIN_S
        while not self._is_closed:
            started_s = time.monotonic()
            try:
                await self._connect_once()
            except _LOST as error:
                log.debug("no stream", peer=self.member.addr, reason=_reason(error))
            except Exception as error:
                # Whatever it was, a peer that is never dialled again would be worse.
                log.warning("stream failed, connecting again", peer=self.member.addr, reason=repr(error))
            finally:
                self._down()
            if self._is_closed:
                return
            if time.monotonic() - started_s > DEAD_AFTER_S:
                backoff_s = RECONNECT_MIN_S
            await asyncio.sleep(backoff_s * (0.5 + random.random()))
            backoff_s = min(backoff_s * 2, RECONNECT_MAX_S)

    async def _connect_once(self) -> None:
        """Raises when the stream has ended.

        Each part is a task, and is asked for its outcome only when it has one: gRPC raises CancelledError in whoever
        uses a call that ended. No TaskGroup here: up to Python 3.12 it leaves the calling task counted as cancelled,
        and then `asyncio.timeout` of 3.11.2 (Debian 12) ends this loop with CancelledError instead of TimeoutError.
        """
        channel = self._transport.open_channel(self.member.addr)
        self._answered_at_s = time.monotonic()
        call = RaftStub(channel).Stream()
        parts = [asyncio.create_task(part) for part in (self._read(call), self._write(call), self._watch())]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                if part.cancelled():
                    raise TimeoutError("the call was cancelled")
                part.result()
        finally:
            for part in parts:
                part.cancel()
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await channel.close()
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*parts, return_exceptions=True)

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.RaftFrame, pb.RaftFrame]) -> None:
        while await call.read() is not grpc.aio.EOF:
            self._answered_at_s = time.monotonic()
            self._transport.heard(self.member.node_id)
            if not self.is_up:
                self.is_up = True
                self._transport.up(self.member.node_id)
        raise TimeoutError("the peer closed the stream")

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.RaftFrame, pb.RaftFrame]) -> None:
        await call.write(pb.RaftFrame(type="hello", round=time.monotonic_ns()))
        while True:
            while self._queue:
                frame = self._queue.popleft()
                await call.write(frame)
                self._sent_at_s = time.monotonic()
                self.queued_bytes -= frame.ByteSize()
            self._transport.drained(self.member.node_id)
            self._filled.clear()
            await self._filled.wait()

    async def _watch(self) -> None:
        """Ping, and give the stream up when this very stream is not answered: that the peer's own stream to us is
        alive says nothing about it. (The sleep is a period.)"""
        while True:
            if time.monotonic() - self._sent_at_s >= PING_EVERY_S:
                ping = pb.RaftFrame(type="ping")
                self._queue.appendleft(ping)  # past what waits: it asks about the path, not about the backlog
                self.queued_bytes += ping.ByteSize()
                self._filled.set()
            await asyncio.sleep(PING_EVERY_S)
            if time.monotonic() - self._answered_at_s > DEAD_AFTER_S:
                raise TimeoutError(f"no answer on this stream for {DEAD_AFTER_S:g} s")

    def _down(self) -> None:
        self._queue.clear()
        self.queued_bytes = 0
        if self.is_up:
            self.is_up = False
            self._transport.down(self.member.node_id)


class GrpcTransport(RaftServicer):
    """Implements `transport.FrameTransport`, and serves `Raft`. Add it to the server before the member starts: until
    `attach` it answers who it is, and nothing else."""

    def __init__(self, me: Member, open_channel: OpenChannel, peer_id: PeerId) -> None:
        self.open_channel = open_channel
        self._me = me
        self._peer_id = peer_id
        self._receiver: Receiver | None = None
        self._peers: dict[str, _Peer] = {}
        self._closing: set[asyncio.Task[Any]] = set()
        self._incoming: dict[str, int] = {}
        self._heard_at_s: dict[str, float] = {}
        self._streams: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    def add_to(self, server: grpc.aio.Server) -> None:
        add_RaftServicer_to_server(self, server)

    # ---- FrameTransport

    def attach(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def send(self, node_id: str, frame: pb.RaftFrame) -> None:
        peer = self._peers.get(node_id)
        if peer is not None:
            peer.send(frame)

    def queued_bytes(self, node_id: str) -> int:
        peer = self._peers.get(node_id)
        return peer.queued_bytes if peer is not None else 0

    def set_peers(self, peers: frozenset[Member]) -> None:
        if self._is_closed:
            peers = frozenset()
        for node_id, peer in list(self._peers.items()):
            if peer.member not in peers:
                del self._peers[node_id]
                peer.close()
                self._closing.add(peer.task)
                peer.task.add_done_callback(self._closing.discard)
        for member in peers:
            if member.node_id not in self._peers:
                self._peers[member.node_id] = _Peer(self, member)

    def reachable(self, node_id: str) -> bool:
        return time.monotonic() - self._heard_at_s.get(node_id, float("-inf")) < DEAD_AFTER_S

    async def probe(self, addr: str, timeout_s: float) -> Answer:
        return await _ask_who(self.open_channel, addr, timeout_s)

    async def request_join(self, addr: str, member: Member, timeout_s: float) -> tuple[Member, ...]:
        return await ask_to_join(self.open_channel, addr, member, timeout_s)

    async def close(self) -> None:
        self._is_closed = True
        self._receiver = None
        self.set_peers(frozenset())
        while tasks := self._closing | self._streams:
            for task in tasks:
                task.cancel()  # again, if it was swallowed where it met another end
            await asyncio.wait(tasks, timeout=CANCEL_EVERY_S)

    # ---- what peers report

    def heard(self, node_id: str) -> None:
        self._heard_at_s[node_id] = time.monotonic()

    def up(self, node_id: str) -> None:
        if self._receiver is not None:
            self._receiver.on_up(node_id)

    def down(self, node_id: str) -> None:
        self._heard_at_s.pop(node_id, None)
        if self._receiver is not None:
            self._receiver.on_down(node_id)

    def drained(self, node_id: str) -> None:
        if self._receiver is not None:
            self._receiver.on_writable(node_id)

    # ---- the service

    async def Stream(
        self,
        request_iterator: AsyncIterator[pb.RaftFrame],
        context: grpc.aio.ServicerContext[pb.RaftFrame, pb.RaftFrame],
    ) -> AsyncIterator[pb.RaftFrame]:
        node_id = await self._caller(context)
        if self._receiver is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "consensus has not started here")
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        epoch, answer_at_s = -1, 0.0
        try:
            async for frame in request_iterator:
                if frame.type == "hello":
                    epoch = frame.round
                    self._incoming[node_id] = max(epoch, self._incoming.get(node_id, -1))
                if self._incoming.get(node_id) != epoch or self._receiver is None:
                    return  # a newer connection has taken over
                self.heard(node_id)
                if frame.type not in ("hello", "ping"):
                    self._receiver.on_frame(node_id, frame)
                if frame.type in ("hello", "ping") or time.monotonic() >= answer_at_s:
                    answer_at_s = time.monotonic() + PING_EVERY_S
                    yield pb.RaftFrame(type="pong")
        finally:
            self._streams.discard(task)
            if self._incoming.get(node_id) == epoch and self._receiver is not None:
                del self._incoming[node_id]

    async def AddMember(
        self,
        request: pb.MembershipRequest,
        context: grpc.aio.ServicerContext[pb.MembershipRequest, pb.MembershipReply],
    ) -> pb.MembershipReply:
        """A manager asks for itself; nobody adds others."""
        caller = await self._caller(context)
        receiver = await self._attached(context)
        member = Member(request.member.node_id, request.member.addr)
        if member.node_id != caller or not member.addr:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"node {caller} may add only itself")
        try:
            return _membership(await receiver.admit(member))
        except SwarmError as error:
            await _abort(context, error)
            raise AssertionError("unreachable") from error

    async def RemoveMember(
        self,
        request: pb.MembershipRequest,
        context: grpc.aio.ServicerContext[pb.MembershipRequest, pb.MembershipReply],
    ) -> pb.MembershipReply:
        """Only members may remove one."""
        caller = await self._caller(context)
        receiver = await self._attached(context)
        if caller not in {member.node_id for member in receiver.answer().members}:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"node {caller} is no manager of this cluster")
        remaining_s = context.time_remaining()
        timeout_s = REMOVE_TIMEOUT_S if remaining_s is None else min(remaining_s, REMOVE_TIMEOUT_S)
        try:
            return _membership(await receiver.dismiss(request.member.node_id, timeout_s))
        except SwarmError as error:
            await _abort(context, error)
            raise AssertionError("unreachable") from error

    async def Leader(
        self, request: pb.LeaderRequest, context: grpc.aio.ServicerContext[pb.LeaderRequest, pb.LeaderReply]
    ) -> pb.LeaderReply:
        if self._receiver is None:
            return pb.LeaderReply(node_id=self._me.node_id)
        answer = self._receiver.answer()
        reply = pb.LeaderReply(node_id=answer.node_id, members=[_to_proto(member) for member in answer.members])
        if answer.leader is not None:
            reply.leader.CopyFrom(_to_proto(answer.leader))
        return reply

    async def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        node_id = self._peer_id(context)
        if not node_id:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "only managers speak here; the certificate is none's")
        return node_id

    async def _attached(self, context: grpc.aio.ServicerContext[Any, Any]) -> Receiver:
        if self._receiver is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "consensus has not started here")
        assert self._receiver is not None
        return self._receiver


def _reason(error: Exception) -> str:
    return (error.details() or "") if isinstance(error, grpc.aio.AioRpcError) else str(error)


# ---- clients


async def ask_to_join(open_channel: OpenChannel, addr: str, member: Member, timeout_s: float) -> tuple[Member, ...]:
    """Ask for membership through any manager at host:port; hints about the leader are followed. Returns the members
    to give to `RaftNode`, which becomes one once it runs. Raises NoLeader, Invalid, Denied or Busy."""
    deadline_s = time.monotonic() + timeout_s
    for _ in range(REDIRECTS_MAX):
        try:
            async with open_channel(addr) as channel:
                reply = await RaftStub(channel).AddMember(
                    pb.MembershipRequest(member=_to_proto(member)), timeout=max(0.01, deadline_s - time.monotonic())
                )
            return tuple(_from_proto(each) for each in reply.members)
        except grpc.aio.AioRpcError as error:
            failure = _error(error, addr)
            if not isinstance(failure, NoLeader) or not failure.leader_addr:
                raise failure from None
            addr = failure.leader_addr
    raise failure


async def ask_leader(
    open_channel: OpenChannel, addr: str, timeout_s: float
) -> tuple[Member | None, tuple[Member, ...]]:
    """Who leads, and who the members are, as the manager at host:port sees it. Raises NoLeader, Denied."""
    answer = await _ask_who(open_channel, addr, timeout_s)
    return answer.leader, answer.members


async def _ask_who(open_channel: OpenChannel, addr: str, timeout_s: float) -> Answer:
    try:
        async with open_channel(addr) as channel:
            reply = await RaftStub(channel).Leader(pb.LeaderRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise _error(error, addr) from None
    leader = _from_proto(reply.leader) if reply.HasField("leader") else None
    return Answer(reply.node_id, leader, tuple(_from_proto(each) for each in reply.members))


def _error(error: grpc.aio.AioRpcError, addr: str) -> SwarmError:
    kind = _ERRORS.get(error.code())
    if kind is not None:
        return kind(error.details() or "")
    if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
        trailing = dict(error.trailing_metadata() or ())
        leader_addr = trailing.get(LEADER_ADDR_KEY, "")
        return NoLeader(error.details() or "", leader_addr if isinstance(leader_addr, str) else leader_addr.decode())
    return NoLeader(f"the manager at {addr} does not answer ({error.code().name}: {error.details()})")


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: SwarmError) -> None:
    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(error, NoLeader) and error.leader_addr:
        trailing = ((LEADER_ADDR_KEY, error.leader_addr),)
    await context.abort(_STATUS.get(type(error), grpc.StatusCode.UNKNOWN), str(error), trailing)


def _membership(members: tuple[Member, ...]) -> pb.MembershipReply:
    return pb.MembershipReply(members=[_to_proto(member) for member in members])


def _to_proto(member: Member) -> pb.Member:
    return pb.Member(node_id=member.node_id, addr=member.addr)


def _from_proto(member: pb.Member) -> Member:
    return Member(member.node_id, member.addr)
