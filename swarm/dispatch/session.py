"""The sending half of one node's session: a bounded queue of small messages, and the node's view.

Assignments are never queued: they wait in the view, where a later change replaces an earlier one, so a
slow node gets fewer and larger deltas. Only answers (heartbeats, acknowledgements, log requests) queue
up, and a node that lets them overflow, or that does not take a message in time, loses its session.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from proto.dispatch_pb2 import ManagerMessage
from swarm.dispatch.assignments import View

QUEUE_MAX = 1_000
"""Small messages waiting for one node: minutes of heartbeats, or a burst of acknowledgements."""
WRITE_TIMEOUT_S = 10.0
"""One message; TCP itself gives up later than that on a peer that stopped reading."""
FIRST_DELAY_S = 0.003
"""A single change goes out almost at once; what the same commit brings along comes with it."""
COALESCE_S = 0.05
"""Least distance of two deltas to one node: under load they grow instead of multiplying."""


REGISTERS_MAX = 10
REGISTERS_WITHIN_S = 8.0
"""Sessions of one node in this time; one more is refused. An agent that backs off opens seven at the most; one in a
loop would cost the leader a handshake and a snapshot each time (the reference allows three, but waits 15 s for a node).
"""


class RegisterLimit:
    """How often each node opened a session lately. Times are seconds of any steady clock."""

    def __init__(self) -> None:
        self._opened: dict[str, deque[float]] = {}

    def allows(self, node_id: str, now: float) -> bool:
        """Whether the node may open a session now; if so, it counts as opened."""
        opened = self._opened.setdefault(node_id, deque(maxlen=REGISTERS_MAX))
        if len(opened) == REGISTERS_MAX and now - opened[0] < REGISTERS_WITHIN_S:
            return False
        opened.append(now)
        return True


class NodeSession:
    """One per connected node; `view` is its picture of the cluster."""

    def __init__(self, node_id: str, session_id: str, view: View, period_s: float) -> None:
        self.node_id = node_id
        self.session_id = session_id
        self.view = view
        self.period_s = period_s
        """The heartbeat period that the node was told last: it keeps to this one until it has spoken again."""
        self.managers: tuple[str, ...] = ()
        """The list that was sent last."""
        self.ended = asyncio.Event()
        self.why = ""
        self._queue: deque[ManagerMessage] = deque()
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._sent_at = 0.0

    def send(self, message: ManagerMessage) -> bool:
        """Queue a small message; False when the session has ended (or ends now, its queue being full)."""
        if self.ended.is_set():
            return False
        if len(self._queue) >= QUEUE_MAX:
            self.end(f"node {self.node_id} does not read: {QUEUE_MAX} messages are waiting for it")
            return False
        self._queue.append(message)
        self._wake.set()
        return True

    def touch(self) -> None:
        """The view has changed: send it soon, together with what follows at once."""
        if self._timer is None and not self.ended.is_set():
            loop = asyncio.get_running_loop()
            due = max(loop.time() + FIRST_DELAY_S, self._sent_at + COALESCE_S)
            self._timer = loop.call_at(due, self._due)

    def _due(self) -> None:
        self._timer = None
        self._wake.set()

    def end(self, why: str) -> None:
        """Close the session; the agent gets `why` and comes back if it can."""
        if not self.ended.is_set():
            self.why = why
            self.ended.set()
            if self._timer is not None:
                self._timer.cancel()

    async def pump(self, write: Callable[[ManagerMessage], Awaitable[None]]) -> None:
        """Send until cancelled. Raises TimeoutError when the node does not take a message."""
        loop = asyncio.get_running_loop()
        while True:
            while self._queue:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await write(self._queue.popleft())
            if self.view.is_dirty and self._timer is None:
                assignments = self.view.take()
                if assignments is not None:
                    async with asyncio.timeout(WRITE_TIMEOUT_S):
                        await write(ManagerMessage(assignments=assignments))
                    self._sent_at = loop.time()
            self._wake.clear()
            if not self._queue and not (self.view.is_dirty and self._timer is None):
                await self._wake.wait()
