"""The stream between a simulated agent and a manager: what gRPC would be, over paths that can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc

from proto.dispatch_pb2 import AgentMessage, ManagerMessage
from tests.sim.manager import SimManager
from tests.sim.virtual import Pipe


class _Aborted(Exception):
    """The servicer refused or ended the call."""


def _error(code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str], ...] = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


class Call:
    """Both ends of one session: `write`, `read`, `cancel` are the agent's, the rest is the manager's context."""

    def __init__(
        self, node_id: str, manager: SimManager | None, latency_s: Callable[[], float], is_cut: Callable[[], bool]
    ) -> None:
        self.node_id = node_id
        self._answers: asyncio.Queue[ManagerMessage | grpc.aio.AioRpcError] = asyncio.Queue()
        self._requests: asyncio.Queue[AgentMessage | None] = asyncio.Queue()
        self._up: Pipe[AgentMessage | None] = Pipe(latency_s, is_cut, self._requests.put_nowait)
        self._down: Pipe[ManagerMessage | grpc.aio.AioRpcError] = Pipe(latency_s, is_cut, self._answers.put_nowait)
        self._is_over = False
        self.server: asyncio.Task[None] | None = None
        if manager is None:
            self.reset()
        else:
            self.server = asyncio.get_running_loop().create_task(self._serve(manager))

    async def _serve(self, manager: SimManager) -> None:
        try:
            await manager.dispatcher.Session(self._incoming(), cast("Any", self))
        except _Aborted:
            return

    async def _incoming(self) -> AsyncIterator[AgentMessage]:
        while (message := await self._requests.get()) is not None:
            yield message

    def reset(self) -> None:
        """The manager's process is gone: its kernel says so to whoever it can reach."""
        if self.server is not None:
            self.server.cancel()
        self._down.send(_error(grpc.StatusCode.UNAVAILABLE, "connection reset"))

    # ---- the agent's end

    async def write(self, message: AgentMessage | ManagerMessage) -> None:
        if isinstance(message, ManagerMessage):
            self._down.send(message)
        elif self._is_over:
            raise asyncio.InvalidStateError
        else:
            self._up.send(message)

    async def read(self) -> ManagerMessage:
        answer = await self._answers.get()
        if isinstance(answer, grpc.aio.AioRpcError):
            self._is_over = True
            raise answer
        return answer

    def cancel(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._up.send(None)

    # ---- the manager's end

    def peer(self) -> str:
        return "ipv4:192.0.2.1:4242"

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._down.send(_error(code, details, trailing_metadata))
        raise _Aborted


class Channel:
    """What `DispatcherStub` wants of a channel."""

    def __init__(self, dial: Callable[[], Call]) -> None:
        self._dial = dial

    def stream_stream(self, path: str, **_: Any) -> Callable[[], Call]:
        return self._dial

    async def close(self) -> None:
        return None
