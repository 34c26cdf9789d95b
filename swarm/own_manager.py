"""What the agent asks the manager process of its own host, through its socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from proto.control_pb2 import ClusterRequest, ListRequest
from proto.control_pb2_grpc import ControlStub
from proto.objects_pb2 import MANAGER, Cluster, Node

if TYPE_CHECKING:
    from proto.control_pb2_grpc import ControlAsyncStub

ASK_TIMEOUT_S = 2.0
LEADER_TIMEOUT_S = 30.0
"""For an answer that waits for the manager to lead."""


class OwnManager:
    """`socket`: the manager's. Methods without another word return None or nothing when there is no answer."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    @asynccontextmanager
    async def _stub(self) -> AsyncIterator[ControlAsyncStub]:
        async with grpc.aio.insecure_channel(f"unix://{self._socket}") as channel:
            yield ControlStub(channel)

    async def answers(self) -> bool:
        """Whether it serves: then the swarm has a leader."""
        return self._socket.exists() and await self.cluster(ASK_TIMEOUT_S) is not None

    async def listens(self) -> bool:
        """Whether it has opened its files. It may not answer before other managers make a quorum."""
        try:
            _, writer = await asyncio.open_unix_connection(self._socket)
        except OSError:
            return False
        writer.close()
        return True

    async def cluster(self, timeout_s: float = LEADER_TIMEOUT_S) -> Cluster | None:
        try:
            async with self._stub() as stub:
                cluster: Cluster = await stub.GetCluster(ClusterRequest(), timeout=timeout_s)
                return cluster
        except grpc.aio.AioRpcError:
            return None

    async def managers(self) -> list[Node]:
        """Of the swarm, this one included."""
        try:
            async with self._stub() as stub:
                nodes = (await stub.ListNodes(ListRequest(), timeout=ASK_TIMEOUT_S)).nodes
        except grpc.aio.AioRpcError:
            return []
        return [node for node in nodes if node.role == MANAGER]
