"""A daemon outlives its agent: one that a fault ended is followed by another."""

from __future__ import annotations

import asyncio

import pytest

from swarm.local import run_agents


class Agent:
    def __init__(self, fault: Exception | None) -> None:
        self._fault = fault

    async def run(self) -> None:
        if self._fault is not None:
            raise self._fault

    async def stop(self) -> None: ...

    async def leave(self) -> None: ...


async def test_an_agent_that_failed_is_followed_by_another_until_one_is_stopped() -> None:
    faults: list[Exception | None] = [KeyError("digest"), OSError(28, "disk"), None, ValueError("never made")]
    made = [Agent(fault) for fault in faults]
    left = iter(made[1:])
    async with asyncio.timeout(10):
        await run_agents(made[0], lambda: next(left), 0.0)
    assert next(left) is made[3]


async def test_cancelling_ends_it_between_two_agents() -> None:
    running = asyncio.create_task(run_agents(Agent(ValueError()), lambda: Agent(ValueError()), 3600.0))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
