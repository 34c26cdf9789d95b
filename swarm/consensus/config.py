"""The numbers of consensus, in one frozen value, and the limits that follow from other limits."""

from __future__ import annotations

from dataclasses import dataclass

PROPOSAL_BYTES_MAX = 1_900_000
"""One entry. The store's writer packs at most 1.5 MB; a single larger transaction still fits."""
FRAME_ENTRIES_BYTES = 2_000_000
"""Entries gathered into one message before it is cut. The kernel adds the entry that crosses the line, so a
message stays below this plus PROPOSAL_BYTES_MAX, under gRPC's default limit of 4 MiB; and because an entry is
always smaller than this, the kernel never splits one (its splitting code is faulty: audit, section 2)."""
PROPOSALS_MAX = 1_024
"""Entries proposed but not applied; beyond it callers get `Busy`."""
PROPOSALS_BYTES_MAX = 32_000_000
"""Bytes of the same: about one second of a fast disk."""
SEND_WINDOW_BYTES = 8_000_000
"""Bytes waiting for one peer before replication to it pauses: two full messages may be in flight."""


@dataclass(frozen=True, slots=True)
class RaftConfig:
    """Times in seconds, sizes in bytes."""

    election_min_s: float = 0.65
    """Silence of the leader that a member tolerates at least; votes are refused within it (stickiness)."""
    election_max_s: float = 1.1
    heartbeat_s: float = 0.2
    """Must be under a third of `election_min_s`: three lost heartbeats do not cost the leader its office."""
    commit_news_s: float = 0.01
    """How long followers may not know that an entry is committed, if no other entry follows that tells them."""
    leader_fallback_s: float = 2.0
    """A leader that has not heard a quorum for this long steps down (check-quorum)."""
    tick_min_s: float = 0.01
    tick_max_s: float = 0.25
    """The timer fires when the engine next has something to do by the clock, but no sooner and no later than
    this; messages and proposals do not wait for it."""
    pre_vote_retry_s: float = 0.15
    """Between two rounds of asking whether an election could be won, plus as much again at random."""
    leader_gone_s: float = 0.3
    """When the leader's connection closes, its followers ask for an election within this time, at random."""
    read_retry_s: float = 0.15
    snapshot_entries: int = 10_000
    """Applied entries after which a snapshot is taken, as in the reference."""
    snapshot_bytes: int = 64_000_000
    """The same in bytes of log: bounds what a restart reads and what memory holds."""
    tail_entries: int = 500
    """Entries kept in memory behind a snapshot, so that a slow follower needs no snapshot (as in the reference)."""
    tail_bytes: int = 8_000_000
    segment_bytes: int = 64_000_000
    chunk_bytes: int = 256_000
    """One piece of a snapshot on the wire."""
    disk_reserve_bytes: int = 64_000_000
    """Below this much free space nothing new is proposed here, and leadership is handed on."""
    doubt_s: float = 3.0
    """Silence of leaders after which a manager asks whether it still belongs, and the time between two such questions.
    Longer than `leader_fallback_s`: so of two answers in a row not both can come from a leader that was deposed."""
    join_retry_s: float = 1.0
    """How often a manager that was promised membership, but hears no leader, asks again."""


DEFAULTS = RaftConfig()


def quorum(members: int) -> int:
    """How many of `members` are a majority."""
    return members // 2 + 1
