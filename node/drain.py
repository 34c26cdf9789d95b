"""No request is sent to a task that cannot answer: neither before it listens, nor when it is about to stop.

Between the decision to stop a task and its stop signal lie two waits: for no new connection, then for no open one.
The managers say when every balancer has let the task go (`Releases`); then open connections get a while to end by
themselves, seen in the kernel's tables of the task's network namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

RELEASE_MAX_S = 3.0
"""How long to wait for the managers' word. It takes some hundredths of a second; nobody says it after a change of
leader in that moment, or without a session."""
CONNECTIONS_MAX_S = 5.0
"""How long open connections may keep a task from its stop signal. Requests end sooner; connections that are kept
open for hours would not end at all, and have the grace period as everywhere."""
POLL_S = 0.025
QUIET_POLLS = 2
"""One look could fall between two requests of a connection that has just been accepted elsewhere."""
LISTEN_MAX_S = 5.0
"""A task without health check is running when its published ports listen, at the latest after this time: what takes
longer to start needs a health check."""
_LISTEN = "0A"
_OPEN = ("01", "03")
"""States of include/net/tcp_states.h: ESTABLISHED, SYN_RECV."""


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


def _rows(tables: Iterable[str]) -> list[tuple[int, str]]:
    """(local port, state) of each socket in texts like /proc/net/tcp."""
    rows = (line.split(maxsplit=4) for table in tables for line in table.splitlines()[1:])
    return [(int(row[1].rpartition(":")[2], 16), row[3]) for row in rows]


def listening(tables: Iterable[str]) -> set[int]:
    """Ports on which something listens."""
    return {port for port, state in _rows(tables) if state == _LISTEN}


def open_connections(tables: Sequence[str]) -> int:
    """Connections to ports on which something listens."""
    served = listening(tables)
    return sum(state in _OPEN and port in served for port, state in _rows(tables))


def _tables(pid: int) -> list[str]:
    """Of the process's network namespace; none when it has ended."""
    with contextlib.suppress(OSError):
        return [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    return []


async def quiet(pid: int) -> None:
    """Return once no connection to the network namespace of this process is open."""
    calm = 0
    while calm < QUIET_POLLS and (tables := _tables(pid)):
        calm = 0 if open_connections(tables) else calm + 1
        await asyncio.sleep(POLL_S)


async def listens(pid: int, ports: frozenset[int]) -> None:
    """Return once something listens on all these TCP ports in the network namespace of this process, which serves no
    request before; or when the process has ended, or after LISTEN_MAX_S."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LISTEN_MAX_S):
            while tables := _tables(pid):
                if ports <= listening(tables):
                    return
                await asyncio.sleep(POLL_S)
