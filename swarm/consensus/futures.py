"""From the engine's callbacks to awaitable results."""

from __future__ import annotations

import asyncio
from typing import Any

from swarm.errors import OutcomeUnknown, SwarmError


async def answer(future: asyncio.Future[bytes], timeout_s: float) -> bytes:
    try:
        async with asyncio.timeout(timeout_s):
            return await future
    except TimeoutError:
        raise OutcomeUnknown(
            f"no quorum answered within {timeout_s:g} s: the change may or may not be stored; retry"
        ) from None


def settle(future: asyncio.Future[Any], outcome: bytes | SwarmError | None) -> None:
    if future.done():
        return  # the caller's deadline has passed
    if isinstance(outcome, SwarmError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
