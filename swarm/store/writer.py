"""From decisions to the log: the only way to write.

Writers hand in groups; whatever is waiting when the previous entry has been committed goes into the
next one (group commit), so a hundred small writes cost one round of replication. One entry is in
flight at a time: merging, not pipelining, is what makes many writers fast.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from proto import store_pb2 as pb
from swarm.consensus.interface import Consensus
from swarm.errors import AlreadyExists, Busy, Conflict, Invalid, NoLeader, NotFound, OutcomeUnknown, SwarmError
from swarm.store.changes import Group, fill

ENTRY_BYTES_MAX = 1_500_000
"""As in the reference (Batch splits at 1.5 MiB); below gRPC's 4 MiB message limit."""
PENDING_MAX = 10_000
"""Waiting transactions; beyond it callers get `Busy`."""
COMMIT_TIMEOUT_S = 10.0

_ERRORS: dict[pb.Verdict.Code.ValueType, tuple[type[SwarmError], str]] = {
    pb.Verdict.CONFLICT: (Conflict, "update out of sequence: {} was changed meanwhile; read it again and retry"),
    pb.Verdict.EXISTS: (AlreadyExists, "{} already exists"),
    pb.Verdict.NAME_TAKEN: (AlreadyExists, "name conflicts with an existing object: {}"),
    pb.Verdict.NOT_FOUND: (NotFound, "{} does not exist any more"),
    pb.Verdict.INVALID: (Invalid, "{}"),
}


@dataclass(slots=True)
class _Waiting:
    packed: bytes
    """The transaction as it stands in an entry."""
    done: asyncio.Future[int]


class Writer:
    """`now` is the wall clock (Unix s) that stamps `meta.updated_at`."""

    def __init__(self, consensus: Consensus, now: Callable[[], float]) -> None:
        self._consensus = consensus
        self._now = now
        self._waiting: deque[_Waiting] = deque()
        self._flushing: asyncio.Task[None] | None = None

    async def commit(self, group: Group, request_id: str = "", timeout_s: float = COMMIT_TIMEOUT_S) -> int:
        """Store the group whole; returns the store version after it.
        Raises Conflict, AlreadyExists, NotFound or Invalid (nothing written), NoLeader, Busy, OutcomeUnknown."""
        done = self._enqueue(group, request_id)
        try:
            async with asyncio.timeout(timeout_s):
                return await done
        except TimeoutError:
            raise OutcomeUnknown(
                f"no quorum answered within {timeout_s:g} s: the change may or may not be stored; retry"
            ) from None

    async def commit_all(self, groups: Sequence[Group]) -> list[SwarmError | None]:
        """Store many independent groups; returns per group None or why it was not stored."""
        futures = [self._enqueue(group, "") for group in groups]
        results = await asyncio.gather(*futures, return_exceptions=True)
        errors: list[SwarmError | None] = []
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, SwarmError):
                raise result
            errors.append(result if isinstance(result, SwarmError) else None)
        return errors

    def _enqueue(self, group: Group, request_id: str) -> asyncio.Future[int]:
        if len(self._waiting) >= PENDING_MAX:
            raise Busy(f"{PENDING_MAX} writes are waiting already: try again in a moment")
        entry = pb.Entry()
        fill(entry.transactions.add(), group, self._now(), request_id)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(entry.SerializeToString(), done))
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())
        return done

    async def _flush(self) -> None:
        try:
            await asyncio.sleep(0)  # let every writer of this turn of the loop get on board
            while self._waiting:
                await self._propose(self._take())
        finally:
            self._flushing = None

    def _take(self) -> list[_Waiting]:
        """The next entry's transactions: at least one, at most ENTRY_BYTES_MAX in all."""
        batch = [self._waiting.popleft()]
        size_bytes = len(batch[0].packed)
        while self._waiting and size_bytes + len(self._waiting[0].packed) <= ENTRY_BYTES_MAX:
            size_bytes += len(self._waiting[0].packed)
            batch.append(self._waiting.popleft())
        return batch

    async def _propose(self, batch: list[_Waiting]) -> None:
        entry = b"".join(item.packed for item in batch)  # messages one after the other are one with all they repeat
        try:
            raw = await self._consensus.propose(entry, COMMIT_TIMEOUT_S)
            verdicts = pb.EntryResult.FromString(raw).verdicts
        except SwarmError as error:
            for item in batch:
                _settle(item.done, error)
            if isinstance(error, NoLeader):
                while self._waiting:
                    _settle(self._waiting.popleft().done, error)
            return
        for item, verdict in zip(batch, verdicts, strict=True):
            if verdict.code == pb.Verdict.OK:
                _settle(item.done, verdict.version)
            else:
                kind, text = _ERRORS[verdict.code]
                _settle(item.done, kind(text.format(verdict.message)))


def _settle(done: asyncio.Future[int], result: int | SwarmError) -> None:
    if done.done():
        return  # the caller's deadline has passed
    if isinstance(result, SwarmError):
        done.set_exception(result)
    else:
        done.set_result(result)
