"""Asks a running container for its health until that turns, or the container exits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from node.health import Check, Health, Probe, judged, pause_s
from node.interface import RuntimeFault
from node.shell import Shell


class Prober:
    def __init__(self, shell: Shell, task_id: str, check: Check, failed: Callable[[Health], None]) -> None:
        """`failed` hears of each failure that counts and does not yet turn the health."""
        self._shell, self._task_id, self._check, self._failed = shell, task_id, check, failed

    async def turned(self, health: Health, started_at: float) -> Health | None:
        """The container's health once it is another than `health`. None: it exited first, or its monitor
        cannot be asked. `started_at`: Unix s of the container's start."""
        turning = asyncio.create_task(self._until_it_turns(health, started_at))
        exiting = asyncio.create_task(self._shell.runtime.wait(self._task_id))
        try:
            watched: set[asyncio.Task[Any]] = {turning, exiting}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            return None if exiting.done() else turning.result()
        finally:
            turning.cancel()
            exiting.cancel()
            await asyncio.gather(turning, exiting, return_exceptions=True)

    async def _until_it_turns(self, health: Health, started_at: float) -> Health:
        while True:
            await asyncio.sleep(pause_s(self._check, health))
            after = judged(self._check, health, await self._ask(), started_at, self._shell.now())
            if after.status != health.status:
                return after
            if after.failures > health.failures:
                self._failed(after)
            health = after

    async def _ask(self) -> Probe:
        async with self._shell.probes:
            try:
                code, output = await self._shell.runtime.exec(self._task_id, self._check.argv, self._check.timeout_s)
            except RuntimeFault as fault:
                return Probe(False, str(fault))
        return Probe(code == 0, output.decode(errors="replace"))
