"""Autolock on a running manager: its files on disk follow the lock that the replicated state asks for.

The manager rewrites `raft.key`, the agent the node's private key, which is sealed with what `raft.key` holds: so one
write changes the lock, and there are never two files that need different unlock keys. The agent hears of a new unlock
key first and the file is written second: whenever the manager dies, the agent has the key that starts it again.
Nobody else is told, and nothing is logged but that there was a change.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

import structlog

from proto.objects_pb2 import Cluster
from swarm.security.raft_key import RaftKey
from swarm.security.unlock_key import lock_of
from swarm.store.store import Event, Store

TELL_PERIOD_S = 1.0
"""An agent that was restarted beside its running manager has no session before it knows the key again: this must be
well below the three heartbeats (3 s) after which its node is down. A write that failed (disk full) is tried again as
often."""

Tell = Callable[[bytes], Awaitable[bool]]
"""Hand the unlock key (empty: autolock is off) to this host's agent; whether it took it. Must not raise."""

log = structlog.get_logger()


class Autolock:
    """`tell` reaches this host's agent."""

    def __init__(self, store: Store, key: RaftKey, tell: Tell, period_s: float = TELL_PERIOD_S) -> None:
        self._store = store
        self._key = key
        self._tell = tell
        self._period_s = period_s
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        unsubscribe = self._store.subscribe(self._notice)
        try:
            while True:
                self._changed.clear()
                await self.step()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._period_s):
                        await self._changed.wait()
        finally:
            unsubscribe()

    def _notice(self, events: Sequence[Event]) -> None:
        if not events or any(isinstance(event.record, Cluster) for event in events):
            self._changed.set()

    async def step(self) -> None:
        """Once: tell the agent, and rewrite the file if the state asks for another lock than the one it was written
        for. An older one is part of a log that is being replayed, and ignored."""
        lock = lock_of(self._store.cluster)
        if lock.revision and lock.revision >= self._key.revision:
            await self._tell(lock.key)
        if lock.revision <= self._key.revision:
            return
        try:
            self._key.follow(lock)
        except OSError as error:
            log.error("raft.key cannot be rewritten, trying again", reason=str(error), revision=lock.revision)
        else:
            log.info("raft.key rewritten", revision=lock.revision, wrapped=bool(lock.key))
            await self._tell(lock.key)  # the agent seals the node's private key, too, or opens it
