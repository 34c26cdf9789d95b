"""The session with the leader: one stream that is opened again for as long as the agent lives.

Any manager is asked, in random order; one that does not lead says who does and is followed at once. While nobody
leads, attempts back off to a heartbeat's period (RETRY_MAX_S at the most) with jitter, so that a cluster's agents do
not all ask at the same moment. A leader that falls silent is left after SILENT_TICKS_MAX half-periods. Nothing here
touches a task: tasks live on without any session.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import structlog

from node.mirror import ChainBroken
from node.outbox import Outbox
from proto.dispatch_pb2 import (
    AgentHello,
    AgentMessage,
    Applied,
    Assignments,
    Examination,
    ExecInput,
    Heartbeat,
    LogRequest,
    ManagerMessage,
    NetworkKeysApplied,
    Welcome,
)
from proto.dispatch_pb2_grpc import DispatcherStub
from proto.objects_pb2 import NetworkKey, Node

log = structlog.get_logger()

RETRY_MIN_S = 0.1
RETRY_MAX_S = 2.0
REDIRECTS_MAX = 3
"""Followed without a pause: managers that disagree about the leader must not be asked in a circle."""
WELCOME_DEADLINE_S = 3.0
"""An address that does not answer in this time is dead; the next manager is tried."""
WRITE_DEADLINE_S = 3.0
"""A manager that reads nothing for so long is as good as dead."""
CLOSE_DEADLINE_S = 1.0
DEFAULT_PERIOD_S = 1.0
TICK_JITTER = 0.1
"""As in the reference."""
SILENT_TICKS_MAX = 5
"""Half-periods without any message: two and a half periods. Counted rather than timed, so that an agent which did
not get the CPU for a while does not blame the manager."""
ACK_TICKS_MAX = 20
"""Half-periods after which unacknowledged statuses are sent again."""
DESCRIBE_TICKS = 40
"""The node's description is looked at again this often, and sent when it has changed."""
STABLE_S = 2.0
"""A session that lasted this long starts the back-off from the beginning when it ends."""

Stream = grpc.aio.StreamStreamCall[AgentMessage, ManagerMessage]


class Handler(Protocol):
    """What the session tells the agent; every call returns at once."""

    def on_welcome(self, welcome: Welcome) -> None: ...

    def on_assignments(self, message: Assignments) -> None:
        """Raises ChainBroken: the session is opened again for a snapshot."""
        ...

    def on_managers(self, addrs: list[str]) -> None: ...

    def on_node(self, node: Node) -> None: ...

    def on_released(self, task_ids: list[str]) -> None: ...

    def on_keys(self, keys: list[NetworkKey]) -> None:
        """The ring, newest first; empty: of no use here any more."""
        ...

    def on_exec(self, message: ExecInput) -> None: ...

    def on_logs(self, request: LogRequest) -> None: ...

    def on_examination(self, message: Examination) -> None: ...

    def on_lost(self) -> None:
        """The session ended; streams that belong to it are void."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    reason: str
    leader_addr: str = ""
    lasted_s: float = 0.0
    """0: there was no session."""


def backoff_s(attempt: int, uniform: float, period_s: float) -> float:
    """Pause before the attempt after `attempt` failures (0 = the first failure), in s; uniform in 0..1. `period_s`: of
    heartbeats, which grows with the cluster."""
    return min(RETRY_MAX_S, period_s, RETRY_MIN_S * 2.0 ** min(attempt, 10)) * (0.5 + uniform / 2)


def tick_s(period_s: float, uniform: float) -> float:
    """From one heartbeat to the next, in s: half a period, 10 % more or less, so that the nodes of a cluster do not
    speak in step; uniform in 0..1."""
    return period_s / 2 * (1 - TICK_JITTER + 2 * TICK_JITTER * uniform)


class Session:
    def __init__(
        self,
        *,
        open_channel: Callable[[str], grpc.aio.Channel],
        managers: list[str],
        hello: Callable[[], AgentHello],
        outbox: Outbox,
        handler: Handler,
        rng: random.Random,
    ) -> None:
        self.managers = list(managers)
        self.connected_to = ""
        """host:port of the manager that leads this session; "" = there is none."""
        self._open_channel = open_channel
        self._hello = hello
        self._outbox = outbox
        self._handler = handler
        self._rng = rng
        self._period_s = DEFAULT_PERIOD_S
        self._silent_ticks = 0
        self._said_hello = AgentHello()

    async def run(self) -> None:
        """For ever."""
        attempt, redirects, follow, last_reason, lost = 0, 0, "", "", ""
        queue: list[str] = []
        while True:
            if not follow and not queue:
                queue = self._shuffled(lost)
            if not follow and not queue:
                reason = "no manager is known"
                ended = Ended(reason)
            else:
                addr = follow or queue.pop()
                ended = await self._attempt(addr)
                _end_if_cancelled()
                reason = f"{addr}: {ended.reason}"
                if ended.lasted_s:
                    lost, queue = addr, []
            if reason != last_reason:
                log.info("no session with the managers", reason=reason, leader=ended.leader_addr)
                last_reason = reason
            follow = ended.leader_addr if redirects < REDIRECTS_MAX else ""
            if follow:
                redirects += 1
                continue
            redirects = 0
            attempt = 0 if ended.lasted_s > STABLE_S else attempt
            await asyncio.sleep(backoff_s(attempt, self._rng.random(), self._period_s))
            attempt += 1

    def _shuffled(self, lost: str) -> list[str]:
        """To be popped from. The manager that was lost is tried last: if it is cut off, that takes seconds."""
        addrs = [addr for addr in dict.fromkeys(self.managers) if addr != lost]
        self._rng.shuffle(addrs)
        return [lost, *addrs] if lost in self.managers else addrs

    async def _attempt(self, addr: str) -> Ended:
        """One session from hello to its end."""
        loop = asyncio.get_running_loop()
        welcomed_at: float | None = None
        reason, leader = "the manager ended the session", ""
        try:
            async with self._stream(addr) as stream:
                await self._open(stream)
                welcomed_at = loop.time()
                self.connected_to = addr
                log.info("session with the managers", manager=addr)
                await _first(self._read(stream), self._write(stream))
        except ChainBroken as error:
            reason = str(error)
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                leader = leader_of(error)
        except TimeoutError as error:
            reason = str(error) or f"no answer within {WELCOME_DEADLINE_S:g} s"
        except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            reason = str(error) or "the stream ended while it was written to"
        finally:
            if self.connected_to:
                self.connected_to = ""
                self._handler.on_lost()
            self._outbox.session_lost()
        return Ended(reason, leader, loop.time() - welcomed_at if welcomed_at is not None else 0.0)

    @contextlib.asynccontextmanager
    async def _stream(self, addr: str) -> AsyncIterator[Stream]:
        channel = self._open_channel(addr)
        try:
            stream: Stream = DispatcherStub(channel).Session()  # type: ignore[assignment, unused-ignore]
            try:
                yield stream
            finally:
                stream.cancel()
        finally:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await channel.close()

    async def _open(self, stream: Stream) -> None:
        async with asyncio.timeout(WELCOME_DEADLINE_S):
            self._said_hello = self._hello()
            with contextlib.suppress(asyncio.InvalidStateError):  # refused already: reading tells why
                await stream.write(AgentMessage(hello=self._said_hello))
            welcomed = False
            while not welcomed:
                message = await stream.read()
                if not isinstance(message, ManagerMessage):
                    raise TimeoutError("the manager ended the session without a welcome")
                # The own node's change by this very hello may overtake the welcome.
                self._handle(message)
                welcomed = message.HasField("welcome")

    async def _read(self, stream: Stream) -> None:
        while True:
            message = await stream.read()
            if not isinstance(message, ManagerMessage):
                return
            self._silent_ticks = 0
            self._handle(message)

    def _handle(self, message: ManagerMessage) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self._period_s = message.welcome.heartbeat_period_s or DEFAULT_PERIOD_S
                self._handler.on_welcome(message.welcome)
            case "heartbeat":
                self._period_s = message.heartbeat.period_s or self._period_s
            case "assignments":
                self._handler.on_assignments(message.assignments)
            case "ack":
                self._outbox.statuses.acknowledge(message.ack.sequence)
                self._outbox.poke()
            case "managers":
                if message.managers.addrs:
                    self.managers = list(message.managers.addrs)
                    self._handler.on_managers(self.managers)
            case "node":
                self._handler.on_node(message.node)
            case "released":
                self._handler.on_released(list(message.released.task_ids))
            case "keys":
                self._handler.on_keys(list(message.keys.keys))
            case "exec":
                self._handler.on_exec(message.exec)
            case "logs":
                self._handler.on_logs(message.logs)
            case "examination":
                self._handler.on_examination(message.examination)

    async def _write(self, stream: Stream) -> None:
        """The only writer of the stream. Ticks about every half period; with each tick a heartbeat goes out, before
        anything else that waits."""
        loop = asyncio.get_running_loop()
        self._silent_ticks = 0
        next_tick, ticks, sequence, ack_ticks = loop.time(), 0, 0, 0
        while True:
            if loop.time() >= next_tick:
                if self._silent_ticks > SILENT_TICKS_MAX:
                    raise TimeoutError("the manager has been silent for too long")
                sequence += 1
                await _send(stream, AgentMessage(heartbeat=Heartbeat(sequence=sequence)))
                if ticks % DESCRIBE_TICKS == DESCRIBE_TICKS - 1:
                    await self._hello_again(stream)
                ticks, ack_ticks, self._silent_ticks = ticks + 1, ack_ticks + 1, self._silent_ticks + 1
                next_tick = loop.time() + tick_s(self._period_s, self._rng.random())
                if ack_ticks > ACK_TICKS_MAX:
                    self._outbox.statuses.take_back()
            if (batch := self._outbox.statuses.next_batch()) is not None:
                ack_ticks = 0
                await _send(stream, AgentMessage(statuses=batch))
            elif sequence_applied := self._outbox.next_applied():
                await _send(stream, AgentMessage(applied=Applied(sequence=sequence_applied)))
            elif serial := self._outbox.next_keys_applied():
                await _send(stream, AgentMessage(keys_applied=NetworkKeysApplied(serial=serial)))
            elif self._outbox.take_hello():
                await self._hello_again(stream)
            elif (output := self._outbox.next_exec()) is not None:
                await _send(stream, AgentMessage(exec=output))
            elif (examined := self._outbox.next_examined()) is not None:
                await _send(stream, AgentMessage(examined=examined))
            elif (chunk := self._outbox.next_log()) is not None:
                await _send(stream, AgentMessage(logs=chunk))
            else:
                await self._wait_for_work(next_tick - loop.time())

    async def _wait_for_work(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._outbox.wake.wait()
        except TimeoutError:
            return
        self._outbox.wake.clear()

    async def _hello_again(self, stream: Stream) -> None:
        hello = self._hello()
        if hello != self._said_hello:
            self._said_hello = hello
            await _send(stream, AgentMessage(hello=hello))


def _end_if_cancelled() -> None:
    """gRPC loses a cancellation that arrives while a call is being set up, and raises the call's own failure instead:
    without this the agent would go on with its next attempt, and a stop would wait for ever."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _send(stream: Stream, message: AgentMessage) -> None:
    try:
        async with asyncio.timeout(WRITE_DEADLINE_S):
            await stream.write(message)
    except TimeoutError:
        raise TimeoutError(f"the manager took nothing for {WRITE_DEADLINE_S:g} s") from None


async def _first(*coroutines: Any) -> None:
    """Return, or raise, with the first that ends (of several, the one named first); the others are ended."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def leader_of(error: grpc.aio.AioRpcError) -> str:
    """host:port from the trailing metadata "leader-addr", "" = the manager knows none."""
    for key, value in error.trailing_metadata() or ():
        if key == "leader-addr":
            return value if isinstance(value, str) else value.decode()
    return ""
