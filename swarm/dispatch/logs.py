"""Logs of tasks, relayed from the nodes' sessions to whoever asks.

A reader never hangs on a source that cannot answer: a node without a session, a session that ends and
a node that stays silent each become one warning beside the lines of the others. Nothing is kept here
but a bounded queue per reader; when it is full the node's session waits a moment (that is how a slow
terminal slows the source down), and after STALL_S the source is cut off, with a warning.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from proto.control_pb2 import LogsReply
from proto.dispatch_pb2 import LogChunk, LogOptions, LogRequest, ManagerMessage

QUEUE_BYTES_MAX = 4_000_000
"""Lines waiting for one reader: some seconds of a busy service, and small beside the manager itself."""
STALL_S = 1.5
"""How long a session may wait for a reader that does not read; its statuses wait as well meanwhile."""
ALIVE_EVERY_S = 0.25
"""While a session waits for a reader it is we who are slow: the node keeps counting as alive."""
ANSWER_TIMEOUT_S = 10.0
"""Silence of a node after which a reader who does not follow gets a warning instead."""


class Link(Protocol):
    """The way to a node: its session."""

    def send(self, message: ManagerMessage) -> bool:
        """Queue the message; False when the session has ended."""
        ...


@dataclass(slots=True, eq=False)
class _Source:
    stream: LogStream
    stream_id: str
    node_id: str
    node_name: str
    task_ids: frozenset[str]
    heard_at: float


class LogStream:
    """Iterate over it for replies; it ends when it is sealed and every source has finished."""

    def __init__(self, relay: LogRelay, options: LogOptions) -> None:
        self._relay = relay
        self._options = options
        self._sources: dict[str, _Source] = {}
        self._queue: deque[LogsReply] = deque()
        self._queued_bytes = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._sealed = False
        self._closed = False

    def add(self, node_id: str, task_ids: Iterable[str], node_name: str = "") -> None:
        """Ask this node for the logs of these tasks; warnings call it `node_name`, if that is known."""
        wanted = sorted(task_ids)
        name = node_name or node_id
        source = self._relay.start(self, node_id, name, wanted, self._options)
        if source is None:
            self.warn(f"logs of {_tasks(wanted)} on node {name} are missing: the node is not connected")
        else:
            self._sources[source.stream_id] = source
        self._changed.set()

    def warn(self, text: str) -> None:
        """Tell the reader, between the lines."""
        self._queue.append(LogsReply(warning=text))
        self._changed.set()

    def seal(self) -> None:
        """No further `add`: the stream ends with its last source."""
        self._sealed = True
        self._changed.set()

    def abandon(self) -> None:
        """End the stream now, whatever its sources may still have."""
        for source in list(self._sources.values()):
            self._relay.cancel(source)
        self._sources.clear()
        self.seal()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._room.set()
        for source in list(self._sources.values()):
            self._relay.cancel(source)
        self._sources.clear()

    async def __aiter__(self) -> AsyncIterator[LogsReply]:
        while True:
            self._changed.clear()
            while self._queue:
                reply = self._queue.popleft()
                self._queued_bytes -= reply.ByteSize()
                self._room.set()
                yield reply
            if self._sealed and not self._sources and not self._queue:
                return
            try:
                async with asyncio.timeout(self._patience_s()):
                    await self._changed.wait()
            except TimeoutError:
                self._give_up_silent()

    def _patience_s(self) -> float | None:
        if self._options.follow or not self._sources:
            return None
        nearest = min(source.heard_at for source in self._sources.values())
        return max(0.0, nearest + self._relay.answer_timeout_s - asyncio.get_running_loop().time())

    def _give_up_silent(self) -> None:
        limit = asyncio.get_running_loop().time() - self._relay.answer_timeout_s
        for source in [source for source in self._sources.values() if source.heard_at <= limit]:
            self._relay.cancel(source)
            self.lost(source, f"the node did not answer within {self._relay.answer_timeout_s:g} s")

    def lost(self, source: _Source, why: str) -> None:
        """The source will not say any more."""
        if self._sources.pop(source.stream_id, None) is not None:
            self.warn(f"logs of {_tasks(source.task_ids)} on node {source.node_name} are incomplete: {why}")

    async def accept(self, source: _Source, chunk: LogChunk, alive: Callable[[], None]) -> None:
        """Take in what the node sent; waits while the reader's queue is full, then cuts the source off."""
        source.heard_at = asyncio.get_running_loop().time()
        lines = [line for line in chunk.lines if line.task_id in source.task_ids]
        if lines:
            if not await self._wait_for_room(alive):
                self._relay.cancel(source)
                self.lost(source, f"the reader did not read for {self._relay.stall_s:g} s")
                return
            reply = LogsReply(lines=lines)
            for line in reply.lines:
                line.node_id = source.node_id
            self._queue.append(reply)
            self._queued_bytes += reply.ByteSize()
        if chunk.error:
            self.lost(source, chunk.error)
        if chunk.done or chunk.error:
            self._relay.ended(source)
            self._sources.pop(source.stream_id, None)
        self._changed.set()

    async def _wait_for_room(self, alive: Callable[[], None]) -> bool:
        give_up_at = asyncio.get_running_loop().time() + self._relay.stall_s
        while self._queued_bytes >= QUEUE_BYTES_MAX and not self._closed:
            if asyncio.get_running_loop().time() >= give_up_at:
                return False
            self._room.clear()
            alive()
            try:
                async with asyncio.timeout(ALIVE_EVERY_S):
                    await self._room.wait()
            except TimeoutError:
                continue
        return True


class LogRelay:
    """`link(node_id)` finds the node's session, if it has one here. Limits in seconds."""

    def __init__(
        self,
        link: Callable[[str], Link | None],
        stall_s: float = STALL_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self._link = link
        self.stall_s = stall_s
        self.answer_timeout_s = answer_timeout_s
        self._sources: dict[str, _Source] = {}
        self._numbers = itertools.count(1)

    def open(self, options: LogOptions) -> LogStream:
        """A new stream: `async with relay.open(options) as stream: stream.add(...); stream.seal();
        async for reply in stream: ...`"""
        return LogStream(self, options)

    # ---- used by streams

    def start(  # what a source is made of
        self, stream: LogStream, node_id: str, node_name: str, task_ids: list[str], options: LogOptions
    ) -> _Source | None:
        link = self._link(node_id)
        if link is None:
            return None
        stream_id = f"logs-{next(self._numbers)}"
        if not link.send(ManagerMessage(logs=LogRequest(stream_id=stream_id, task_ids=task_ids, options=options))):
            return None
        now = asyncio.get_running_loop().time()
        source = self._sources[stream_id] = _Source(stream, stream_id, node_id, node_name, frozenset(task_ids), now)
        return source

    def cancel(self, source: _Source) -> None:
        if self._sources.pop(source.stream_id, None) is not None:
            self._tell_cancelled(source.node_id, source.stream_id)

    def ended(self, source: _Source) -> None:
        self._sources.pop(source.stream_id, None)

    def _tell_cancelled(self, node_id: str, stream_id: str) -> None:
        link = self._link(node_id)
        if link is not None:
            link.send(ManagerMessage(logs=LogRequest(stream_id=stream_id, cancel=True)))

    # ---- used by sessions

    async def deliver(self, node_id: str, chunk: LogChunk, alive: Callable[[], None]) -> None:
        """A chunk came from this node. `alive` is called while waiting for a slow reader."""
        source = self._sources.get(chunk.stream_id)
        if source is None or source.node_id != node_id:
            if not chunk.done:
                self._tell_cancelled(node_id, chunk.stream_id)
            return
        await source.stream.accept(source, chunk, alive)

    def session_ended(self, node_id: str) -> None:
        """Nothing more will come from this node's requests so far."""
        for source in [source for source in self._sources.values() if source.node_id == node_id]:
            self.ended(source)
            source.stream.lost(source, "its connection to the leader was lost")


def _tasks(task_ids: Iterable[str]) -> str:
    ids = sorted(task_ids)
    return f"task {ids[0]}" if len(ids) == 1 else f"{len(ids)} tasks"
