"""What every part of the control API works with, and the one way in which it writes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from proto import store_pb2
from proto.objects_pb2 import Node
from swarm.consensus.interface import Consensus
from swarm.dispatch.doctor import ExamRelay
from swarm.dispatch.execs import ExecRelay
from swarm.dispatch.logs import LogRelay
from swarm.errors import Conflict
from swarm.ids import ID_LENGTH, base36
from swarm.store.changes import Group
from swarm.store.store import Store
from swarm.store.writer import Writer

ATTEMPTS = 20
"""Lost races against the orchestrator's own writes to the same object before the user hears of it."""

Demotion = Callable[[Store, Consensus, Node], str | None]


class LostLeadership:
    """Tells the streams that this manager serves to end when it no longer leads."""

    def __init__(self) -> None:
        self._listeners: set[Callable[[], None]] = set()

    def changed(self, leads: bool) -> None:
        """For `Consensus.on_leadership`."""
        if not leads:
            for listener in list(self._listeners):
                listener()

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` when leadership goes; returns the way to stop that."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)


@dataclass(frozen=True, slots=True)
class Backend:
    """`now` is Unix s; `demotion_refusal` says why a manager may not cease to be one, or None;
    `keys_settled` which nodes have not confirmed the keys of encrypted networks after so many seconds."""

    store: Store
    writer: Writer
    consensus: Consensus
    logs: LogRelay
    execs: ExecRelay
    exams: ExamRelay
    now: Callable[[], float]
    demotion_refusal: Demotion
    keys_settled: Callable[[float], Awaitable[list[str]]]
    lost_leadership: LostLeadership = field(default_factory=LostLeadership)

    async def commit(self, decide: Callable[[], Group], request_id: str) -> None:
        """Store what `decide` returns (an empty group: nothing to do), deciding anew after a lost race.
        Each attempt has an ID of its own, derived from the request's: a retried call goes the same way
        again, and meets its own earlier success instead of being applied twice."""
        for attempt in range(ATTEMPTS):
            group = decide()
            if not group:
                return
            try:
                await self.writer.commit(group, _attempt_id(request_id, attempt))
            except Conflict:
                if attempt == ATTEMPTS - 1:
                    raise
            else:
                return

    def is_done(self, request_id: str) -> bool:
        """Whether an earlier delivery of this request was stored: a retried removal finds nothing any more."""
        verdicts = (self.store.verdict(_attempt_id(request_id, attempt)) for attempt in range(ATTEMPTS))
        return any(verdict is not None and verdict.code == store_pb2.Verdict.OK for verdict in verdicts)

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until the store makes the condition true; False after the timeout."""
        changed = asyncio.Event()
        unsubscribe = self.store.subscribe(lambda _: changed.set())
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            return condition()
        finally:
            unsubscribe()
        return True


def object_id(request_id: str) -> str:
    """The ID of the object that a request creates. It follows from the request, so that a call which is
    sent again, after a leader died with the answer, finds its object instead of a taken name."""
    digest = hashlib.sha256(request_id.encode()).digest()
    return base36(int.from_bytes(digest[:16], "big") | 1 << 128, ID_LENGTH)[-ID_LENGTH:]


def _attempt_id(request_id: str, attempt: int) -> str:
    return f"{request_id}/{attempt}"
