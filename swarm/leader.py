"""The leader's loop: runs the stages whenever something changed, and commits what each decides before the next.

Level-triggered: a lost event costs delay, a refused group (the object moved on meanwhile) is decided anew, and the
first round looks at everything. The loop ends only by cancellation, when leadership is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import structlog

from swarm import allocate, orchestrate, schedule
from swarm.allocate import keys
from swarm.errors import Busy, Invalid, NoLeader, OutcomeUnknown, SwarmError
from swarm.store.changes import Decision, Group, Remove
from swarm.store.dirty import Dirty
from swarm.store.store import Event, Store

DEBOUNCE_S = 0.005
"""Wait so long after the first change for others that belong to it: far below what a person or a task notices."""
REST_SHARE, REST_MAX_S = 2.0, 1.0
"""A round is followed by a rest so many times as long as itself, up to this: one that looks at a service of thousands
of tasks would otherwise be made for each handful of reports, and keep the process from reading the next ones."""
CHUNK_GROUPS = 1000
"""Groups handed to the writer at a time: a tenth of its queue, so users' writes always find room."""
BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.1, 5.0
"""Between attempts after an error; doubled from the first to the last."""

log = structlog.get_logger("leader")


class Stage(Protocol):
    """A pure decider: `now` is Unix s, `new_id` gives fresh IDs, `dirty` says what to look at."""

    def __call__(self, store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision: ...


class Commits(Protocol):
    """The part of `store.writer.Writer` that the loop needs."""

    async def commit(self, group: Group, request_id: str = "") -> int: ...

    async def commit_all(self, groups: Sequence[Group]) -> list[SwarmError | None]: ...


STAGES: tuple[tuple[str, Stage], ...] = (
    ("keys", partial(keys.decide, random_bytes=secrets.token_bytes)),  # of encrypted networks
    ("allocate", allocate.decide),  # VNIs, subnets, VIPs, published ports
    ("orchestrate", partial(orchestrate.decide, fits=schedule.fits, surplus=schedule.surplus)),  # tasks, NEW
    ("allocate", allocate.decide),  # the new tasks' addresses: PENDING
    ("schedule", schedule.decide),  # ASSIGNED
)


class LeaderLoop:
    """`now` is the wall clock in Unix s; times by which stages ask to be woken are of the same clock."""

    def __init__(
        self,
        store: Store,
        writer: Commits,
        new_id: Callable[[], str],
        now: Callable[[], float],
        stages: Sequence[tuple[str, Stage]] = STAGES,
    ) -> None:
        self._store = store
        self._writer = writer
        self._new_id = new_id
        self._now = now
        self._stages = stages
        self._dirty = Dirty()
        self._changed = asyncio.Event()
        self._wakes: dict[str, float] = {}
        """When to look at a service again; "" stands for everything. One time each: a look asks anew."""
        self._outcome_unknown = False

    async def run(self) -> None:
        """Lead until cancelled."""
        self._dirty = Dirty(everything=True)
        self._wakes = {}
        unsubscribe = self._store.subscribe(self._note)
        backoff_s, rested_at = BACKOFF_FIRST_S, 0.0
        loop = asyncio.get_running_loop()
        try:
            while True:
                if not self._dirty:
                    await self._wait()
                await asyncio.sleep(max(DEBOUNCE_S, rested_at - loop.time()))
                self._take_due()
                started_at = loop.time()
                fine = await self._round()
                rested_at = loop.time() + min(REST_MAX_S, REST_SHARE * (loop.time() - started_at))
                if fine:
                    backoff_s = BACKOFF_FIRST_S
                else:
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(BACKOFF_LAST_S, backoff_s * 2)
        finally:
            unsubscribe()
            self._store.forget_views()

    def _note(self, events: Sequence[Event]) -> None:
        if events:
            self._dirty.note(events)
        else:
            self._dirty.everything = True  # a snapshot replaced the state
        if self._dirty:
            self._changed.set()

    async def _wait(self) -> None:
        """Until something changed or the next wake time has come."""
        self._changed.clear()
        timeout_s = max(0.0, min(self._wakes.values()) - self._now()) if self._wakes else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def _take_due(self) -> None:
        now = self._now()
        for service_id in [key for key, at in self._wakes.items() if at <= now]:
            del self._wakes[service_id]
            if service_id:
                self._dirty.services.add(service_id)
            else:
                self._dirty.everything = True

    async def _round(self) -> bool:
        """Run every stage once; False when something went wrong that calls for a pause."""
        dirty, self._dirty = self._dirty, Dirty()
        try:
            if self._outcome_unknown:
                await self._settle()
                dirty.everything = True
            for name, stage in self._stages:
                dirty.merge(self._dirty)  # what earlier stages changed just now concerns the later ones
                if not await self._run_stage(name, stage, dirty):
                    self._dirty.merge(dirty)
                    return False
        except SwarmError as error:
            self._outcome_unknown |= isinstance(error, OutcomeUnknown)
            log.warning("leader.commit_failed", error=str(error))
            self._dirty.merge(dirty)
            return False
        return True

    async def _settle(self) -> None:
        """After a write of unknown outcome: an empty write behind it in the log. Once that is applied, so is whatever
        of the earlier ones will ever be; deciding before could hand out an address twice."""
        await self._writer.commit(())
        self._outcome_unknown = False

    async def _run_stage(self, name: str, stage: Stage, dirty: Dirty) -> bool:
        """Ask the stage, and again as long as it left something, unless a node changed: that concerns those before it
        first, and makes each stage look at everything anew."""
        while True:
            fine, again = await self._ask(name, stage, dirty)
            if not fine or not again or self._dirty.everything or self._dirty.nodes:
                return fine
            dirty = Dirty(services=set(again))

    async def _ask(self, name: str, stage: Stage, dirty: Dirty) -> tuple[bool, frozenset[str]]:
        """Have it decide once and store that; False when something went wrong, and what it left for the next time."""
        try:
            decision = stage(self._store, self._now(), self._new_id, dirty)
        except Exception:
            log.exception("leader.stage_failed", stage=name)
            return False, frozenset()
        for note in decision.notes:
            log.warning("leader.found", stage=name, problem=note)
        self._wakes.update(decision.wakes)
        if decision.wake_at is not None:
            self._wakes[""] = decision.wake_at
        fine = True
        for start in range(0, len(decision.groups), CHUNK_GROUPS):
            chunk = decision.groups[start : start + CHUNK_GROUPS]
            errors = await self._writer.commit_all(chunk)
            for group, error in zip(chunk, errors, strict=True):
                if error is not None:
                    fine &= self._refused(name, group, error)
            if not fine:
                break
        return fine, decision.again

    def _refused(self, stage: str, group: Group, error: SwarmError) -> bool:
        """Have the group's objects looked at again; True when the round may go on meanwhile."""
        if isinstance(error, Invalid):
            # It fails the next time as well: decided anew when one of its objects changes, or by the next leader.
            log.warning("leader.refused", stage=stage, objects=[change.record.id for change in group], error=str(error))
            return True
        for change in group:
            self._dirty.touch(change.record)
            if isinstance(change, Remove):
                self._dirty.freed = True
        if isinstance(error, OutcomeUnknown):
            self._outcome_unknown = True
        if isinstance(error, NoLeader | Busy | OutcomeUnknown):
            log.warning("leader.commit_failed", stage=stage, error=str(error))
            return False
        log.debug("leader.conflict", stage=stage, error=str(error))
        return True
