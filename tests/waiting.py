"""Waiting for a condition with a deadline: the only way in which tests wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

POLL_S = 0.01
INTERRUPTIBLE = ("env", "--default-signal=INT")
"""In front of a command that a test interrupts: whoever runs the tests in the background has Ctrl-C ignored."""


async def until(condition: Callable[[], object], timeout_s: float = 20, what: str = "condition") -> None:
    """Return once the condition is true; raises AssertionError at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not become true within {timeout_s:g} s")
        await asyncio.sleep(POLL_S)


def wait_until(condition: Callable[[], object], timeout_s: float = 20, what: str = "condition") -> None:
    """The same for code without an event loop."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not become true within {timeout_s:g} s")
        time.sleep(POLL_S)
