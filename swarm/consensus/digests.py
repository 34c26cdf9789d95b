"""Is the state the same everywhere? The leader says now and then what its state's digest was after some entry; the
others compare. A difference is an alarm: an entry was applied in two ways, or memory is at fault; whose, nobody knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from swarm.consensus.membership import MemberId

KEPT = 4_096
"""Own digests that are remembered: a follower may have applied this many entries more than the one asked about."""
TELL_EVERY_S = 1.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Mark:
    """The digest of the state after an entry."""

    index: int
    digest: str


class Digests:
    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._own: dict[int, str] = {}
        self._newest = Mark(0, "")
        self._told: tuple[MemberId, Mark] | None = None
        """What the leader said about an entry that is not applied here yet."""
        self._said_index = 0
        self._next_s = float("-inf")
        self.compared = 0
        self.difference = ""
        """Not empty: in words, the first difference."""

    def note(self, mark: Mark) -> None:
        """Our own state, after each entry of the state machine."""
        self._newest = mark
        self._own[mark.index] = mark.digest
        if len(self._own) > KEPT:
            del self._own[next(iter(self._own))]
        if self._told is not None and self._told[1].index <= mark.index:
            self.told(*self._told)

    def due(self, now_s: float) -> Mark | None:
        """What the leader is to say now."""
        if now_s < self._next_s or self._newest.index <= self._said_index:
            return None
        self._next_s = now_s + TELL_EVERY_S
        self._said_index = self._newest.index
        return self._newest

    def told(self, leader: MemberId, mark: Mark) -> None:
        """The leader's state. Ours after the same entry must be the same."""
        self._told = (leader, mark) if mark.index > self._newest.index else None
        own = self._own.get(mark.index)
        if own is None:
            return
        self.compared += 1
        if own != mark.digest and not self.difference:
            self.difference = (
                f"after entry {mark.index} the state of manager {self._node_id} is not that of the leader {leader}"
                f" ({own} is not {mark.digest}): demote one of the two, let it leave and join again, and report a bug"
            )
            log.error("the managers' states differ", what=self.difference)
