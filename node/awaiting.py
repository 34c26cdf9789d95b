"""Waiting for several things, or for one within a time; what was begun never goes on behind the caller's back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from node.interface import RuntimeFault

T = TypeVar("T")
U = TypeVar("U")


async def both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Both results; when one fails the other is ended first, so that nothing goes on behind the caller's back."""
    one, two = asyncio.create_task(first), asyncio.create_task(second)
    try:
        return await asyncio.gather(one, two)
    finally:
        one.cancel()
        two.cancel()
        await asyncio.gather(one, two, return_exceptions=True)


async def either(exited: asyncio.Task[Any], wanted: Coroutine[Any, Any, None], timeout_s: float) -> None:
    """Until one of the two is done, or the time is over."""
    waiting = asyncio.create_task(wanted)
    try:
        watched: set[asyncio.Task[Any]] = {exited, waiting}
        await asyncio.wait(watched, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def within(awaitable: Awaitable[T], deadline_s: float, what: str) -> T:
    """The result, or a temporary RuntimeFault that names what took too long."""
    try:
        async with asyncio.timeout(deadline_s):
            return await awaitable
    except TimeoutError:
        raise RuntimeFault(f"{what} was not done within {deadline_s:g} s", permanent=False) from None
