"""What waits to be sent to the managers: statuses (latest wins, kept until acknowledged) and log chunks (bounded,
the reader of the log waits). Outlives sessions."""

from __future__ import annotations

import asyncio
from collections import deque

from node.statuses import StatusBook
from proto.dispatch_pb2 import Examined, ExecOutput, LogChunk

LOG_CHUNKS_MAX = 16
"""Of at most 64 KiB each: 1 MiB. Beyond it reading the logs waits, so `logs -f` of a chatty service costs this
node no more memory."""


class Outbox:
    def __init__(self) -> None:
        self.statuses = StatusBook()
        self.wake = asyncio.Event()
        """Set when there may be something to send."""
        self._applied = 0
        self._keys_applied = 0
        self._hello_due = False
        self._logs: deque[LogChunk] = deque()
        self._execs: deque[ExecOutput] = deque()
        self._examined: deque[Examined] = deque()
        self._room = asyncio.Event()
        self._room.set()

    def poke(self) -> None:
        self.wake.set()

    def put_applied(self, sequence: int) -> None:
        """The kernel and the names are as the assignments up to this sequence say."""
        self._applied = sequence
        self.wake.set()

    def next_applied(self) -> int:
        """0 = nothing new."""
        sequence, self._applied = self._applied, 0
        return sequence

    def put_keys_applied(self, serial: int) -> None:
        """The kernel accepts the keys of encrypted networks up to this one."""
        self._keys_applied = serial
        self.wake.set()

    def next_keys_applied(self) -> int:
        """0 = nothing new."""
        serial, self._keys_applied = self._keys_applied, 0
        return serial

    def ask_hello(self) -> None:
        """This node's description has changed in something that cannot wait."""
        self._hello_due = True
        self.wake.set()

    def take_hello(self) -> bool:
        due, self._hello_due = self._hello_due, False
        return due

    async def put_log(self, chunk: LogChunk) -> None:
        """Queue a chunk; waits while LOG_CHUNKS_MAX are queued."""
        while len(self._logs) >= LOG_CHUNKS_MAX:
            self._room.clear()
            await self._room.wait()
        self._logs.append(chunk)
        self.wake.set()

    def next_log(self) -> LogChunk | None:
        if not self._logs:
            return None
        chunk = self._logs.popleft()
        self._room.set()
        return chunk

    def put_exec(self, output: ExecOutput) -> None:
        """Bounded by the windows of the commands that run (node/commands.py)."""
        self._execs.append(output)
        self.wake.set()

    def next_exec(self) -> ExecOutput | None:
        return self._execs.popleft() if self._execs else None

    def put_examined(self, examined: Examined) -> None:
        """Bounded by what one examination may ask (node/doctor.py)."""
        self._examined.append(examined)
        self.wake.set()

    def next_examined(self) -> Examined | None:
        return self._examined.popleft() if self._examined else None

    def session_lost(self) -> None:
        """Statuses under way are sent again; streams of logs belonged to the session."""
        self.statuses.take_back()
        self._applied = self._keys_applied = 0
        self._logs.clear()
        self._execs.clear()
        self._examined.clear()
        self._room.set()
