"""Three managers as processes, killed with signal 9 in the middle of writing: nothing acknowledged may be lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.consensus_cluster import free_port
from tests.consensus_process import Remote
from tests.waiting import POLL_S

pytestmark = pytest.mark.lab


@pytest.fixture
async def remotes(tmp_path: Path) -> AsyncIterator[list[Remote]]:
    made = [Remote(f"p{number}", free_port(), tmp_path) for number in range(3)]
    try:
        for remote in made:
            await remote.start()
        await made[0].ask("found")
        await _leader(made)
        for remote in made[1:]:
            await remote.ask("join", via=made[0].addr)
        while {(await remote.ask("state", last=1))["members"] for remote in made} != {3}:
            await asyncio.sleep(POLL_S)
        yield made
    finally:
        for remote in made:
            await remote.kill()


async def _leader(remotes: list[Remote]) -> Remote:
    async with asyncio.timeout(20):
        while True:
            for remote in remotes:
                if (await remote.ask("state", last=1))["leads"]:
                    return remote
            await asyncio.sleep(POLL_S)


async def test_signal_9_loses_nothing_that_was_acknowledged(remotes: list[Remote]) -> None:
    rng = random.Random(7)
    acknowledged: list[str] = []
    for turn in range(4):
        leader = await _leader(remotes)
        for number in range(40):
            payload = f"{turn}-{number}"
            if "error" not in await leader.ask("write", payload=payload):
                acknowledged.append(payload)
        in_flight = asyncio.create_task(leader.ask("write", payload=f"{turn}-in-flight"))
        await asyncio.sleep(rng.random() * 0.004)  # anywhere between the proposal and the answer
        victims = remotes if turn == 3 else [leader]
        await asyncio.gather(*(victim.kill() for victim in victims))
        try:
            if "error" not in await in_flight:
                acknowledged.append(f"{turn}-in-flight")
        except ConnectionError:
            pass
        alive = [remote for remote in remotes if remote not in victims]
        if alive:
            leader = await _leader(alive)
            if "error" not in await leader.ask("write", payload=f"{turn}-without"):
                acknowledged.append(f"{turn}-without")
        for victim in victims:
            await victim.start()
            await victim.ask("restart")
    assert "error" not in await (await _leader(remotes)).ask("write", payload="end")
    async with asyncio.timeout(20):
        while True:
            held = [(await remote.ask("state"))["entries"] for remote in remotes]
            if held[0] == held[1] == held[2] and held[0] and held[0][-1] == "end":
                break
            await asyncio.sleep(POLL_S)
    assert len(acknowledged) > 150
    assert [entry for entry in held[0] if entry in set(acknowledged)] == acknowledged
