"""Managers' consensus over real gRPC on loopback, in one event loop: what the gRPC tests and the benchmark share."""

from __future__ import annotations

import json
import socket
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import grpc.aio

from swarm.consensus.config import DEFAULTS, RaftConfig
from swarm.consensus.disk import Directory
from swarm.consensus.grpc_transport import GrpcTransport, ask_to_join
from swarm.consensus.interface import Member
from swarm.consensus.raft import RaftNode
from tests.waiting import until

NODE_KEY = "test-node"


class ListMachine:
    """Remembers every entry in order; answers how many there are."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []

    def apply(self, entry: bytes) -> bytes:
        self.entries.append(entry)
        return str(len(self.entries)).encode()

    def dump(self) -> Iterator[bytes]:
        rows = list(self.entries)
        yield json.dumps(len(rows)).encode()
        yield from rows

    def load(self, records: Iterable[bytes]) -> None:
        source = iter(records)
        count = json.loads(next(source))
        self.entries = list(source)
        assert len(self.entries) == count

    def digest(self) -> str:
        return f"{len(self.entries)} {zlib.crc32(b'|'.join(self.entries[-3:]))}"


class Died(BaseException):
    """What `fatal` raises in tests."""


def die(reason: str) -> NoReturn:
    raise Died(reason)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _NamedChannel:
    """A channel whose calls say who calls, in place of a certificate."""

    def __init__(self, channel: grpc.aio.Channel, node_id: str) -> None:
        self._channel = channel
        self._metadata = ((NODE_KEY, node_id),)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return partial(self._channel.stream_stream(*arguments, **options), metadata=self._metadata)

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return partial(self._channel.unary_unary(*arguments, **options), metadata=self._metadata)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> _NamedChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def peer_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    return str(dict(context.invocation_metadata() or ()).get(NODE_KEY, ""))


class Manager:
    """One manager: server, transport, node, state machine. It can be killed and started again."""

    def __init__(self, node_id: str, directory: Path, config: RaftConfig = DEFAULTS, port: int = 0) -> None:
        self.me = Member(node_id, f"127.0.0.1:{port or free_port()}")
        self.directory = directory / node_id
        self.config = config
        self.machine = ListMachine()
        self.may_join: Callable[[str], bool] = lambda _: True

    def open_channel(self, addr: str) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(addr, options=[("grpc.use_local_subchannel_pool", 1)])
        return cast("grpc.aio.Channel", _NamedChannel(channel, self.me.node_id))

    async def listen(self) -> None:
        self.server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                # A server cancels calls above a thousand that wait to be taken on: benchmarks have more in flight.
                ("grpc.server.max_pending_requests", 4096),
                ("grpc.server.max_pending_requests_hard_limit", 8192),
            ]
        )
        self.transport = GrpcTransport(self.me, self.open_channel, peer_id)
        self._add_services()
        self.server.add_insecure_port(self.me.addr)
        await self.server.start()

    def _add_services(self) -> None:
        self.transport.add_to(self.server)

    async def run(self, members: Iterable[Member]) -> None:
        self.machine = ListMachine()
        self.node = RaftNode(
            me=self.me,
            members=tuple(members),
            disk=Directory(self.directory),
            machine=self.machine,
            transport=self.transport,
            config=self.config,
            fatal=die,
            may_join=self.may_join,
        )
        await self.node.start()

    async def found(self) -> None:
        await self.listen()
        await self.run([self.me])
        await until(self.node.is_leader, what="the founder's leadership")

    async def join(self, via: str) -> None:
        await self.listen()
        await self.run(await ask_to_join(self.open_channel, via, self.me, 10))
        await until(lambda: self.me in self.node.members() and self.node.leader(), what="membership")

    async def restart(self) -> None:
        await self.listen()
        await self.run([])

    async def kill(self) -> None:
        """As by signal 9: nothing is flushed, nobody is told."""
        engine = self.node._engine
        assert engine is not None
        self.node._engine = None
        engine.wal.abandon()
        for handle in (self.node._timer, self.node._turn):
            if handle is not None:
                handle.cancel()
        for task in list(self.node._tasks.values()):
            task.cancel()
        await self.transport.close()
        await self.server.stop(0)

    async def stop(self) -> None:
        await self.node.stop()
        await self.server.stop(0)


async def cluster(directory: Path, size: int, config: RaftConfig = DEFAULTS) -> list[Manager]:
    """A cluster whose first member founded it and leads."""
    managers = [Manager(f"m{number}", directory, config) for number in range(size)]
    await managers[0].found()
    for manager in managers[1:]:
        await manager.join(managers[0].me.addr)
    await until(
        lambda: all(len(manager.node.members()) == size for manager in managers), what=f"{size} members everywhere"
    )
    return managers


def leader_of(managers: Iterable[Manager]) -> Manager | None:
    return next((manager for manager in managers if manager.node.is_leader()), None)
