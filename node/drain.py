"""No request is sent to a task that cannot answer: neither before it listens, nor when it is about to stop.

Between the decision to stop a task and its stop signal lie two waits: for no new connection, then for no open one.
The managers say when every balancer has let the task go (`Releases`); then open connections get a while to end by
themselves, seen in the kernel's tables of the task's network namespace (`overlay/sockdiag.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path

from overlay.interface import HostNetwork, NetworkError
from overlay.sockdiag import TcpSockets

RELEASE_MAX_S = 3.0
"""How long to wait for the managers' word. It takes some hundredths of a second; nobody says it after a change of
leader in that moment, or without a session."""
CONNECTIONS_MAX_S = 5.0
"""How long open connections may keep a task from its stop signal. Requests end sooner; connections that are kept
open for hours would not end at all, and have the grace period as everywhere."""
POLL_S, POLL_MAX_S = 0.025, 0.2
"""Between two looks; it doubles, since a hundred tasks may wait at once."""
QUIET_POLLS = 2
"""One look could fall between two requests of a connection that has just been accepted elsewhere."""
LISTEN_MAX_S = 5.0
"""A task without health check is running when its published ports listen, at the latest after this time: what takes
longer to start needs a health check."""


class Releases:
    """Tasks of this host to which nobody sends new connections any more."""

    def __init__(self) -> None:
        self._released: set[str] = set()
        self._changed = asyncio.Event()

    def mark(self, task_ids: Iterable[str]) -> None:
        self._released.update(task_ids)
        self._changed.set()
        self._changed = asyncio.Event()

    def forget(self, task_id: str) -> None:
        self._released.discard(task_id)

    async def wait(self, task_id: str) -> None:
        while task_id not in self._released:
            await self._changed.wait()


async def quiet(network: HostNetwork, task_id: str) -> None:
    """Return once no connection to what listens in the task's network namespace ("": in the host's) is open, or when
    it cannot be looked into."""
    with contextlib.suppress(OSError, NetworkError):
        sockets = await network.inside(task_id, TcpSockets)
        with contextlib.closing(sockets):
            calm, pause_s = 0, POLL_S
            while (calm := 0 if sockets.open_connections() else calm + 1) < QUIET_POLLS:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, POLL_MAX_S)


async def listens(network: HostNetwork, task_id: str, ports: frozenset[int], pid: int) -> None:
    """Return once something listens there on all these TCP ports, before which no request is served; or when the
    process has ended, after LISTEN_MAX_S, or when it cannot be looked into."""
    with contextlib.suppress(TimeoutError, OSError, NetworkError):
        async with asyncio.timeout(LISTEN_MAX_S):
            sockets = await network.inside(task_id, TcpSockets)
            with contextlib.closing(sockets):
                pause_s = POLL_S
                while not ports <= sockets.listening() and Path(f"/proc/{pid}").exists():
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, POLL_MAX_S)
