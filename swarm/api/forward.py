"""Any manager answers: reads by itself, once it has what the leader has; the rest the leader, by passing the call on.

A call waits up to LEADER_WAIT_S for an election to end, so that the death of a leader is a pause and
not an error. Passing a write on twice is safe: it carries a request ID from the first manager that saw
it, and the log applies each ID once. A passed-on call is never passed on again (no loops): the manager
that received it refuses, and the first one tries again with what it knows by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
import structlog
from google.protobuf.message import Message

from swarm.api.status import status_of
from swarm.consensus.interface import Consensus, Member
from swarm.errors import NoLeader, OutcomeUnknown, SwarmError

LEADER_WAIT_S = 5.0
"""Several elections; a caller that waits longer should hear what is wrong."""
POLL_S = 0.05
"""While waiting for a leader: consensus tells only its own leadership by callback."""
LEADER_CHECK_S = 0.25
"""While a passed-on call is under way: has the leader changed (the old one may be frozen, not dead)?"""
FORWARD_TIMEOUT_S = 20.0
"""A whole unary call at the leader: its commit gives up after 10 s, and a removal may be waited for."""
BARRIER_TIMEOUT_S = 2.0
"""One round to a quorum; a leader that cannot do that in this time is none."""

REQUEST_ID = "request-id"
FORWARDED = "forwarded-by"
NO_LEADER = (
    "the swarm does not have a leader: more than half of the managers have to be up and reach each other; "
    "see which are with `pyswarm node ls` on another manager, start the missing ones and try again"
)
REMOVED = (
    "this node is no manager any more: the other managers have removed it; use one of them, "
    "or leave with `pyswarm swarm leave --force` and join again"
)

Req = TypeVar("Req", bound=Message)
Rep = TypeVar("Rep", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler may know of the call besides the request."""

    path: str
    request_id: str
    is_forwarded: bool
    timeout_s: float


class Router:
    """`open_channel` makes an mTLS channel to a manager's address."""

    def __init__(
        self,
        consensus: Consensus,
        open_channel: Callable[[str], grpc.aio.Channel],
        new_id: Callable[[], str],
    ) -> None:
        self._consensus = consensus
        self._open_channel = open_channel
        self._new_id = new_id
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the channels to other managers."""
        for addr in list(self._channels):
            self._drop_channel(addr)
        await asyncio.gather(*self._closing, return_exceptions=True)

    # ---- entry points

    async def unary(
        self,
        path: str,
        request: Req,
        reply: type[Rep],
        context: Context,
        local: Callable[[Req, Call], Awaitable[Rep]],
        *,
        reads: bool = False,
    ) -> Rep:
        """Answer here if the call only reads, else at the leader; every error ends the call with its status."""
        call = self._call_of(path, context)
        try:
            return await self._unary(request, reply, call, local, reads=reads)
        except (SwarmError, grpc.aio.AioRpcError) as error:
            await _refuse(context, error)
        except Exception:
            log.exception("call failed", method=path, request_id=call.request_id)
            await _fail(context, path)

    async def stream(
        self,
        path: str,
        request: Req,
        reply: type[Rep],
        context: Context,
        local: Callable[[Req, Call], AsyncIterator[Rep]],
    ) -> AsyncGenerator[Rep, None]:
        """The same for a stream: it moves to another leader as long as nothing was sent, then it breaks.
        Streams have no deadline (logs and watches are followed for hours): keepalive ends dead ones."""
        call = self._call_of(path, context)
        try:
            async for message in self._stream(request, reply, call, local):
                yield message
        except (SwarmError, grpc.aio.AioRpcError) as error:
            await _refuse(context, error)
        except Exception:
            log.exception("stream failed", method=path)
            await _fail(context, path)

    async def here(
        self, path: str, context: Context, local: Callable[[], AsyncIterator[Rep]]
    ) -> AsyncGenerator[Rep, None]:
        """A stream that this manager answers from what it has, leader or not."""
        try:
            async for message in local():
                yield message
        except SwarmError as error:
            await _refuse(context, error)
        except Exception:
            log.exception("stream failed", method=path)
            await _fail(context, path)

    async def exchange(  # noqa: PLR0917  # as `stream`
        self,
        path: str,
        requests: AsyncIterator[Req],
        request: type[Req],
        reply: type[Rep],
        context: Context,
        local: Callable[[AsyncIterator[Req]], AsyncIterator[Rep]],
    ) -> AsyncGenerator[Rep, None]:
        """A call that streams both ways; what was sent cannot be sent again, so it waits for a leader only at first."""
        call = self._call_of(path, context)
        give_up_at = _loop_time() + LEADER_WAIT_S
        try:
            while True:
                try:
                    leader = await self._elsewhere(call)
                    break
                except NoLeader as error:
                    await self._pause_or_raise(error, call, give_up_at)
            source = local(requests) if leader is None else self._exchange(leader, requests, request, reply, call)
            async for message in source:
                yield message
        except (SwarmError, grpc.aio.AioRpcError) as error:
            await _refuse(context, error)
        except Exception:
            log.exception("stream failed", method=path)
            await _fail(context, path)

    def _call_of(self, path: str, context: Context) -> Call:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        remaining_s = context.time_remaining()
        return Call(
            path=path,
            request_id=metadata.get(REQUEST_ID, "") or self._new_id(),
            is_forwarded=FORWARDED in metadata,
            timeout_s=min(FORWARD_TIMEOUT_S, remaining_s if remaining_s is not None else FORWARD_TIMEOUT_S),
        )

    # ---- routing

    async def _unary(
        self, request: Req, reply: type[Rep], call: Call, local: Callable[[Req, Call], Awaitable[Rep]], *, reads: bool
    ) -> Rep:
        give_up_at = _loop_time() + LEADER_WAIT_S
        while True:
            try:
                leader = await self._elsewhere(call, reads=reads)
                if leader is None:
                    return await local(request, call)
                return await self._ask(leader, request, reply, call)
            except (NoLeader, OutcomeUnknown, grpc.aio.AioRpcError) as error:
                await self._pause_or_raise(error, call, give_up_at)

    async def _stream(
        self, request: Req, reply: type[Rep], call: Call, local: Callable[[Req, Call], AsyncIterator[Rep]]
    ) -> AsyncGenerator[Rep, None]:
        give_up_at = _loop_time() + LEADER_WAIT_S
        has_begun = False
        while True:
            try:
                leader = await self._elsewhere(call)
                source = local(request, call) if leader is None else self._follow(leader, request, reply, call)
                async for message in source:
                    has_begun = True
                    yield message
                return
            except (NoLeader, grpc.aio.AioRpcError) as error:
                if has_begun:
                    raise
                await self._pause_or_raise(error, call, give_up_at)

    async def _elsewhere(self, call: Call, *, reads: bool = False) -> Member | None:
        """None: answer here, where what is read now is current. Else the leader. Raises NoLeader."""
        if self._consensus.is_removed():
            raise NoLeader(REMOVED)
        leader = self._consensus.leader()
        if leader is None or (leader.node_id == self._consensus.node_id and not self._consensus.is_leader()):
            raise NoLeader(NO_LEADER)
        if reads or self._consensus.is_leader():
            await self._consensus.read_barrier(BARRIER_TIMEOUT_S)
            return None
        if call.is_forwarded:
            raise NoLeader(f"the leader is now {leader.node_id}", leader.addr)
        return leader

    async def _pause_or_raise(self, error: SwarmError | grpc.aio.AioRpcError, call: Call, give_up_at: float) -> None:
        """Wait a moment before the next try, or raise what the caller shall see."""
        if isinstance(error, grpc.aio.AioRpcError) and error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise error
        if call.is_forwarded or _loop_time() >= give_up_at:
            raise error
        await asyncio.sleep(POLL_S)

    # ---- to the leader

    async def _ask(self, leader: Member, request: Req, reply: type[Rep], call: Call) -> Rep:
        method = self._channel(leader.addr).unary_unary(
            call.path, request_serializer=type(request).SerializeToString, response_deserializer=reply.FromString
        )
        under_way = asyncio.ensure_future(
            _result(method(request, timeout=call.timeout_s, metadata=self._metadata(call)))
        )
        try:
            while not under_way.done():
                await asyncio.wait({under_way}, timeout=LEADER_CHECK_S)
                now = self._consensus.leader()
                if not under_way.done() and (now is None or now.addr != leader.addr):
                    raise NoLeader(f"manager {leader.node_id} ceased to lead before it answered")
            return under_way.result()
        except grpc.aio.AioRpcError as error:
            raise self._told(leader, error) from None
        finally:
            under_way.cancel()

    async def _follow(self, leader: Member, request: Req, reply: type[Rep], call: Call) -> AsyncGenerator[Rep, None]:
        method = self._channel(leader.addr).unary_stream(
            call.path, request_serializer=type(request).SerializeToString, response_deserializer=reply.FromString
        )
        under_way = method(request, metadata=self._metadata(call))
        try:
            async for message in under_way:
                yield message
        except grpc.aio.AioRpcError as error:
            raise self._told(leader, error) from None
        finally:
            under_way.cancel()

    async def _exchange(
        self, leader: Member, requests: AsyncIterator[Req], request: type[Req], reply: type[Rep], call: Call
    ) -> AsyncGenerator[Rep, None]:
        method = self._channel(leader.addr).stream_stream(
            call.path, request_serializer=request.SerializeToString, response_deserializer=reply.FromString
        )
        under_way = method(requests, metadata=self._metadata(call))
        try:
            async for message in under_way:
                yield message
        except grpc.aio.AioRpcError as error:
            raise self._told(leader, error) from None
        finally:
            under_way.cancel()

    def _metadata(self, call: Call) -> tuple[tuple[str, str], ...]:
        return ((REQUEST_ID, call.request_id), (FORWARDED, self._consensus.node_id))

    def _told(self, leader: Member, error: grpc.aio.AioRpcError) -> SwarmError | grpc.aio.AioRpcError:
        """The leader's own refusal as it is; a broken connection in words."""
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return error
        self._drop_channel(leader.addr)  # the next one is made with the newest certificate
        return NoLeader(
            f"the leader {leader.node_id} at {leader.addr} cannot serve the call: {error.details()}; try again"
        )

    def _channel(self, addr: str) -> grpc.aio.Channel:
        if addr not in self._channels:
            self._channels[addr] = self._open_channel(addr)
        return self._channels[addr]

    def _drop_channel(self, addr: str) -> None:
        channel = self._channels.pop(addr, None)
        if channel is not None:
            closing = asyncio.ensure_future(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)


async def _result(call: Awaitable[Rep]) -> Rep:
    return await call


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


async def _refuse(context: Context, error: SwarmError | grpc.aio.AioRpcError) -> NoReturn:
    if isinstance(error, SwarmError):
        addr = error.leader_addr if isinstance(error, NoLeader) else ""
        await context.abort(status_of(error), str(error), (("leader-addr", addr),) if addr else ())
    await context.abort(error.code(), error.details() or "")


async def _fail(context: Context, path: str) -> NoReturn:
    method = path.rpartition("/")[2]
    await context.abort(
        grpc.StatusCode.INTERNAL, f"{method} failed on the manager for a reason it did not expect: see its log"
    )
