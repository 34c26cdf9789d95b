"""A manager of the simulated swarm: the real loops over a member of simulated consensus."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, cast

from swarm.consensus.futures import answer, settle
from swarm.consensus.interface import Consensus, Member
from swarm.dispatch.dispatcher import Dispatcher
from swarm.errors import NoLeader
from swarm.leader import LeaderLoop, Stage
from swarm.store.store import Store
from swarm.store.writer import Writer
from tests.sim.net import Net


class SimConsensus:
    """One life of one member, as `swarm.consensus.interface.Consensus` shows it."""

    def __init__(self, net: Net, name: str) -> None:
        self._net = net
        self._engine = net.engines[name]
        self.node_id = name

    @property
    def lives(self) -> bool:
        return self._net.engines.get(self.node_id) is self._engine

    def is_leader(self) -> bool:
        return self.lives and self._engine.is_leader()

    def leader(self) -> Member | None:
        return self._engine.leader() if self.lives else None

    def members(self) -> tuple[Member, ...]:
        return self._engine.members()

    async def propose(self, entry: bytes, timeout_s: float) -> bytes:
        if not self.lives:
            raise NoLeader("this manager is off")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._engine.propose(entry, partial(settle, future))
        self._net.poke(self.node_id)
        return await answer(future, timeout_s)


class SimManager:
    """From `start` of its machine to its crash."""

    def __init__(
        self,
        net: Net,
        name: str,
        chance: random.Random,
        failed: Callable[[BaseException], None],
        stages: Sequence[tuple[str, Stage]],
    ) -> None:
        self.name = name
        self._stages = stages
        self.store: Store = net.machines[name]
        self.consensus = SimConsensus(net, name)
        self._failed = failed
        self._tasks: list[asyncio.Task[None]] = []
        self._new_id = lambda: f"{chance.getrandbits(64):016x}"
        self._now = asyncio.get_running_loop().time
        # The part of the interface that these use is there; mTLS, backups and membership are not simulated here.
        consensus = cast("Consensus", self.consensus)
        self.writer = Writer(consensus, self._now)
        self.dispatcher = Dispatcher(
            self.store, self.writer, consensus, lambda call: cast("Any", call).node_id, self._now, self._now
        )
        self.leads = False

    def observe(self) -> None:
        """As `Manager._on_leadership` does."""
        if self.consensus.is_leader() == self.leads:
            return
        self.leads = not self.leads
        self._cancel()
        if self.leads:
            loop = LeaderLoop(self.store, self.writer, self._new_id, self._now, self._stages)
            self._tasks = [self._run(loop.run()), self._run(self.dispatcher.run())]

    def crash(self) -> None:
        self._cancel()

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    def _run(self, part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(part)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)
