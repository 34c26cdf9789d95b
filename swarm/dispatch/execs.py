"""Commands in tasks, relayed between whoever runs them and the node that has the task.

Nothing is kept here but the messages under way. Caller and node keep to a window in each direction (node/commands.py),
so a queue that overflows means that one of them does not, and ends the command.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Protocol, Self

from proto.dispatch_pb2 import ExecInput, ExecOutput, ExecStart, ManagerMessage
from swarm.errors import Unreachable

QUEUE_MAX = 64
"""Messages for one caller: four windows of the node's."""


class Link(Protocol):
    """The way to a node: its session."""

    def send(self, message: ManagerMessage) -> bool:
        """Queue the message; False when the session has ended."""
        ...


class ExecStream:
    """Iterate over it for what the command writes; the last message has its exit code or an error."""

    def __init__(self, relay: ExecRelay, exec_id: str, node_id: str) -> None:
        self._relay, self.exec_id, self.node_id = relay, exec_id, node_id
        self._queue: deque[ExecOutput] = deque()
        self._changed = asyncio.Event()

    def send(self, message: ExecInput) -> None:
        """Of the caller: data, end of input, a new size, credit."""
        copy = ExecInput()
        copy.CopyFrom(message)
        copy.exec_id = self.exec_id
        self._relay.send(self.node_id, copy)

    def accept(self, output: ExecOutput) -> None:
        if len(self._queue) >= QUEUE_MAX:
            self._queue.clear()
            output = ExecOutput(error="the command was ended: its output came faster than it was taken")
        self._queue.append(output)
        self._changed.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._relay.close(self)

    async def __aiter__(self) -> AsyncIterator[ExecOutput]:
        while True:
            while self._queue:
                output = self._queue.popleft()
                yield output
                if output.WhichOneof("what") in ("exit_code", "error"):
                    return
            self._changed.clear()
            await self._changed.wait()


class ExecRelay:
    """`link(node_id)` finds the node's session, if it has one here."""

    def __init__(self, link: Callable[[str], Link | None]) -> None:
        self._link = link
        self._streams: dict[str, ExecStream] = {}
        self._numbers = itertools.count(1)

    def open(self, node_id: str, node_name: str, start: ExecStart) -> ExecStream:
        """Have the node run it: `async with relay.open(...) as stream: async for output in stream: ...`
        Raises Unreachable when the node has no session."""
        stream = ExecStream(self, f"exec-{next(self._numbers)}", node_id)
        if not self.send(node_id, ExecInput(exec_id=stream.exec_id, start=start)):
            raise Unreachable(f"node {node_name} is not connected: see `pyswarm node ls`, try again when it is ready")
        self._streams[stream.exec_id] = stream
        return stream

    def send(self, node_id: str, message: ExecInput) -> bool:
        link = self._link(node_id)
        return link is not None and link.send(ManagerMessage(exec=message))

    def close(self, stream: ExecStream) -> None:
        """Nobody reads it any more: the command ends, if it has not."""
        if self._streams.pop(stream.exec_id, None) is not None:
            self.send(stream.node_id, ExecInput(exec_id=stream.exec_id, cancel=True))

    def deliver(self, node_id: str, output: ExecOutput) -> None:
        """The node said this."""
        stream = self._streams.get(output.exec_id)
        if stream is not None and stream.node_id == node_id:
            stream.accept(output)

    def session_ended(self, node_id: str) -> None:
        """Nothing more will come from this node's commands, which it ends by itself."""
        for stream in [stream for stream in self._streams.values() if stream.node_id == node_id]:
            stream.accept(ExecOutput(error="the command was ended: its node lost the connection to the leader"))
