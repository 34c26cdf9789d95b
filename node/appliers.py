"""One loop that makes something outside equal to a wanted state: latest wins, one application at a time.

Pokes that arrive while an application runs cost one further application together, so 100 tasks arriving at
once are wired by a few. Whoever needs the result waits for a generation (`poke` returns it) or for a condition
on `applied`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import structlog

from dns.interface import DnsError
from overlay.interface import NetworkError

log = structlog.get_logger()

RETRY_MIN_S = 0.2
RETRY_MAX_S = 5.0

S = TypeVar("S")


class Applier(Generic[S]):
    def __init__(
        self, what: str, read: Callable[[], S | None], apply: Callable[[S], Awaitable[None]], deadline_s: float
    ) -> None:
        """`read` gives the wanted state, None while it is not known yet. `what` names it in the log."""
        self.applied: S | None = None
        """The state last applied without an error."""
        self.error = ""
        """Why the last attempt failed; "" = it did not."""
        self.applications = 0
        self._what = what
        self._read = read
        self._apply = apply
        self._deadline_s = deadline_s
        self._wanted = 0
        self.done = 0
        """The newest generation that has been applied."""
        self._force = False
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()

    def poke(self, force: bool = False) -> int:
        """Something may have changed. Returns the generation that will include it. `force` applies even if
        the state is the same: an audit."""
        self._wanted += 1
        self._force |= force
        self._wake.set()
        return self._wanted

    async def settled(self, generation: int) -> None:
        await self.wait_until(lambda: self.done >= generation)

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Checked after each application. The caller sets the deadline."""
        while not holds():
            await self._progress.wait()

    async def run(self) -> None:
        failures = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            generation = self._wanted
            state = self._read()
            if state is None:
                continue
            if state != self.applied or self._force or self.error:
                self._force = False
                if not await self._attempt(state):
                    failures += 1
                    self._announce()
                    await asyncio.sleep(min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(failures - 1, 10)))
                    self._wake.set()
                    continue
            failures = 0
            self.done = generation
            self._announce()

    async def _attempt(self, state: S) -> bool:
        self.applications += 1
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._apply(state)
        except (NetworkError, DnsError, OSError, TimeoutError) as error:
            reason = str(error) or f"not done within {self._deadline_s:g} s"
            if reason != self.error:
                log.warning(f"{self._what} could not be applied: trying again", reason=reason)
            self.error = reason
            return False
        if self.error:
            log.info(f"{self._what} applied again")
        self.applied, self.error = state, ""
        return True

    def _announce(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()
