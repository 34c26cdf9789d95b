"""The one narrow view of consensus that the rest of the project has. Nothing else imports pysyncobj.

All methods are called on, and all callbacks run on, the manager's event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Member:
    """A voting manager: its node ID (the CN of its certificate) and its mTLS listener host:port."""

    node_id: str
    addr: str


class StateMachine(Protocol):
    """What the log is applied to (the store). `apply` is deterministic and never raises."""

    def apply(self, entry: bytes) -> bytes: ...

    def dump(self) -> Iterator[bytes]: ...

    def load(self, records: Iterable[bytes]) -> None: ...

    def digest(self) -> str:
        """Equal wherever the same entries have been applied; asked after each entry, so it must be at hand."""
        ...


class Consensus(Protocol):
    @property
    def node_id(self) -> str: ...

    def is_leader(self) -> bool:
        """True once every entry of earlier terms has been applied here."""
        ...

    def leader(self) -> Member | None: ...

    def is_removed(self) -> bool:
        """The other managers have removed this one, and a leader has told it so."""
        ...

    def difference(self) -> str:
        """Not empty: the state here is not the leader's, as it should be; says where that showed first."""
        ...

    def members(self) -> tuple[Member, ...]: ...

    def reachable(self, node_id: str) -> bool:
        """Whether frames from this member arrive (always true for oneself)."""
        ...

    def on_leadership(self, callback: Callable[[bool], None]) -> None:
        """Call `callback(is_leader)` on each change, and once at registration."""
        ...

    async def propose(self, entry: bytes, timeout_s: float) -> bytes:
        """Replicate one entry; returns what `apply` returned here.
        Raises NoLeader (not written), Busy (not written), OutcomeUnknown (maybe written)."""
        ...

    async def read_barrier(self, timeout_s: float) -> None:
        """Return once reads of the local state are as new as any write acknowledged before the call, here or
        elsewhere. Raises NoLeader."""
        ...

    def backup(self) -> Iterator[bytes]:
        """The state as it is now, as a file that `recover.read_backup` reads, in pieces. Raises NoLeader."""
        ...

    async def add_member(self, member: Member, timeout_s: float) -> None:
        """Leader only. Adding a known member with its known address is a no-op."""
        ...

    async def remove_member(self, node_id: str, timeout_s: float) -> None:
        """Leader only. Raises Invalid when the rest would not have a reachable quorum."""
        ...

    async def transfer(self, timeout_s: float) -> None:
        """Hand leadership to the most up-to-date reachable member."""
        ...

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Transfer leadership if held, flush the log, close."""
        ...
