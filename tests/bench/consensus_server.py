"""One member of our side of the consensus benchmark: RaftNode, GrpcTransport, sealed disk and a small Put service which
merges waiting writes into entries as `swarm/store/writer.py` does. Told what to do by lines on standard input.

Run: python -m tests.bench.consensus_server NODE_ID PORT DIRECTORY [PROFILE_FILE]
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import os
import struct
import sys
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop

from swarm.consensus.disk import Directory
from swarm.consensus.faults import exit_process
from swarm.consensus.grpc_transport import ask_to_join
from swarm.consensus.interface import Member
from swarm.consensus.raft import RaftNode
from swarm.consensus.sealing import Sealed
from swarm.errors import SwarmError
from tests.bench import puts
from tests.consensus_cluster import Manager

ENTRY_BYTES_MAX = 1_500_000
"""As in the store's writer."""
TIMEOUT_S = 10.0
_FIRST = struct.Struct(">II")
DUMP_ROWS = 256
"""Puts in one record of a snapshot."""


class Table:
    """The state: values by key."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self._crc = 0

    def digest(self) -> str:
        return f"{self._crc:08x}"

    def apply(self, entry: bytes) -> bytes:
        self._crc = zlib.crc32(entry, self._crc)
        for _, body in puts.frames(entry):
            self.values[body[:4]] = body[4:]
        return b""

    def dump(self) -> Iterator[bytes]:
        rows = list(self.values.items())
        yield _FIRST.pack(len(rows), self._crc)
        for start in range(0, len(rows), DUMP_ROWS):
            yield b"".join(puts.frame(0, key + value) for key, value in rows[start : start + DUMP_ROWS])

    def load(self, records: Iterable[bytes]) -> None:
        source = iter(records)
        count, crc = _FIRST.unpack(next(source))
        self.values = {}
        for record in source:
            self.apply(record)
        self._crc = crc
        assert len(self.values) == count


Done = Callable[[SwarmError | None], None]


class Merger:
    """One entry in flight; what arrives meanwhile goes into the next."""

    def __init__(self, node: RaftNode) -> None:
        self._node = node
        self._waiting: deque[tuple[bytes, Done]] = deque()
        self._flushing: asyncio.Task[None] | None = None

    def add(self, framed: bytes, done: Done) -> None:
        self._waiting.append((framed, done))
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        while self._waiting:
            batch, size = [], 0
            while self._waiting and size < ENTRY_BYTES_MAX:
                batch.append(self._waiting.popleft())
                size += len(batch[-1][0])
            failure: SwarmError | None = None
            try:
                await self._node.propose(b"".join(framed for framed, _ in batch), TIMEOUT_S)
            except SwarmError as error:
                failure = error
            for _, done in batch:
                done(failure)
        self._flushing = None


class Puts:
    """The service. Requests are `puts.frame`s, one or more; replies of the stream carry the numbers of those stored."""

    def __init__(self, merger: Callable[[], Merger]) -> None:
        self._merger = merger

    async def put(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(failure: SwarmError | None) -> None:
            if future.cancelled():
                return
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

        self._merger().add(request, done)
        try:
            await future
        except SwarmError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return b""

    async def stream(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        stored: list[bytes] = []
        wake = asyncio.Event()
        failures: list[SwarmError] = []

        def done(numbers: bytes, failure: SwarmError | None) -> None:
            if failure is not None:
                failures.append(failure)
            stored.append(numbers)
            wake.set()

        async def answer() -> None:
            while True:
                await wake.wait()
                wake.clear()
                if failures:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, str(failures[0]))
                numbers = b"".join(stored)
                stored.clear()
                await context.write(numbers)

        answering = asyncio.create_task(answer())
        try:
            async for request in requests:
                numbers = b"".join(puts.KEY.pack(number) for number, _ in puts.frames(request))
                self._merger().add(request, lambda failure, numbers=numbers: done(numbers, failure))  # type: ignore[misc]
        finally:
            answering.cancel()

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "bench.Puts",
            {
                "Put": grpc.unary_unary_rpc_method_handler(self.put),
                "Stream": grpc.stream_stream_rpc_method_handler(self.stream),
            },
        )


class Server(Manager):
    """The tests' manager with another state machine and one more service."""

    async def listen(self) -> None:
        self.table = Table()
        self.merger: Merger | None = None
        await super().listen()

    def _add_services(self) -> None:
        super()._add_services()
        self.server.add_generic_rpc_handlers((Puts(self._merger).handler(),))

    def _merger(self) -> Merger:
        assert self.merger is not None
        return self.merger

    async def run(self, members: Iterable[Member]) -> None:
        self.node = RaftNode(
            me=self.me,
            members=tuple(members),
            disk=Sealed(Directory(self.directory), bytes(32)),
            machine=self.table,
            transport=self.transport,
            config=self.config,
            fatal=exit_process,
        )
        await self.node.start()
        self.merger = Merger(self.node)

    async def perform(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["command"]:
            case "found":
                await self.run([self.me])
            case "join":
                await self.run(await ask_to_join(self.open_channel, request["via"], self.me, 10))
            case "restart":
                await self.run([])
            case "snapshot":
                engine = self.node.running()
                engine.kernel.take_snapshot()
                self.node.want_turn()
        return self.state() if self.merger is not None else {}

    def state(self) -> dict[str, Any]:
        engine = self.node.running()
        return {
            "leads": self.node.is_leader(),
            "knows_leader": self.node.leader() is not None,
            "members": len(self.node.members()),
            "applied": engine.kernel.applied(),
            "snapshots": engine.compaction.taken,
            "rows": len(self.table.values),
        }


async def _main(node_id: str, port: int, directory: Path) -> None:
    server = Server(node_id, directory, port=port)
    await server.listen()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        sys.stdout.write(json.dumps(await server.perform(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    import logging

    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[os.environ.get("BENCH_LOG", "WARNING")]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    run = asyncio.Runner(loop_factory=uvloop.new_event_loop).run  # as a manager
    main = _main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    if len(sys.argv) > 4:
        profile = cProfile.Profile()
        profile.enable()
        try:
            run(main)
        finally:
            profile.disable()
            profile.dump_stats(sys.argv[4])
    else:
        run(main)
