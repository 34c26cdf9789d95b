"""Logs of own tasks, streamed to whoever asked the managers: read from the runtime, cut into chunks, cancelled when
the reader goes. Backpressure is the outbox's bound: a slow reader makes the reading wait, nothing piles up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from node.interface import Runtime, RuntimeFault
from proto.dispatch_pb2 import LogChunk, LogLine, LogRequest

log = structlog.get_logger()

STREAMS_MAX = 64
"""`service logs` running at once against this node; each may follow many files."""
CHUNK_BYTES_MAX = 64 * 1024
CHUNK_LINES_MAX = 256
GATHER_S = 0.05
"""Lines are held this long to travel together; a person does not notice it."""


class LogRelay:
    def __init__(
        self,
        runtime: Runtime,
        node_id: str,
        has_task: Callable[[str], bool],
        send: Callable[[LogChunk], Awaitable[None]],
    ) -> None:
        self._runtime = runtime
        self._node_id = node_id
        self._has_task = has_task
        self._send = send
        self._streams: dict[str, asyncio.Task[None]] = {}

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    def handle(self, request: LogRequest) -> None:
        stream_id = request.stream_id
        if request.cancel:
            if stream_id in self._streams:
                self._streams[stream_id].cancel()
            return
        if stream_id in self._streams:
            return
        refused = len(self._streams) >= STREAMS_MAX
        work = self._refuse(stream_id) if refused else self._stream(request)
        task = asyncio.create_task(work, name=f"logs {stream_id}")
        self._streams[stream_id] = task
        task.add_done_callback(lambda _: self._streams.pop(stream_id, None))

    def cancel_all(self) -> None:
        for task in self._streams.values():
            task.cancel()

    async def close(self) -> None:
        tasks = list(self._streams.values())
        self.cancel_all()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _refuse(self, stream_id: str) -> None:
        error = f"this node already streams {STREAMS_MAX} logs: end some of them, then try again"
        await self._send(LogChunk(stream_id=stream_id, done=True, error=error))

    async def _stream(self, request: LogRequest) -> None:
        gathered = _Gathered(request.stream_id, self._send)
        sender = asyncio.create_task(gathered.run())
        try:
            readers = [self._read_task(task_id, request, gathered) for task_id in request.task_ids]
            errors = [error for error in await asyncio.gather(*readers) if error]
            await gathered.flush()
            await self._send(LogChunk(stream_id=request.stream_id, done=True, error="; ".join(errors)))
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _read_task(self, task_id: str, request: LogRequest, gathered: _Gathered) -> str:
        """Returns why it could not be read, or ""."""
        if not self._has_task(task_id):
            return f"task {task_id}: not on this node (any more)"
        try:
            async for line in self._runtime.logs(task_id, request.options):
                line.task_id, line.node_id = task_id, self._node_id
                await gathered.add(line)
        except (RuntimeFault, OSError) as error:
            return f"task {task_id}: {error}"
        return ""


class _Gathered:
    """Lines of one stream on their way into chunks."""

    def __init__(self, stream_id: str, send: Callable[[LogChunk], Awaitable[None]]) -> None:
        self._stream_id = stream_id
        self._send = send
        self._lines: list[LogLine] = []
        self._bytes = 0
        self._some = asyncio.Event()
        self._turn = asyncio.Lock()  # chunks leave in the order in which they were cut

    async def add(self, line: LogLine) -> None:
        self._lines.append(line)
        self._bytes += len(line.data)
        if self._bytes >= CHUNK_BYTES_MAX or len(self._lines) >= CHUNK_LINES_MAX:
            await self.flush()
        else:
            self._some.set()

    async def flush(self) -> None:
        async with self._turn:
            lines, self._lines, self._bytes = self._lines, [], 0
            self._some.clear()
            if lines:
                await self._send(LogChunk(stream_id=self._stream_id, lines=lines))

    async def run(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(GATHER_S)
            await self.flush()
