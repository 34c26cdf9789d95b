"""Opening what survived: one member's log and snapshots, brought into agreement before the kernel sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from swarm.consensus.faults import Damaged, Fatal
from swarm.consensus.interface import Member
from swarm.consensus.membership import member_id
from swarm.consensus.snapshot import Meta, SnapshotStore
from swarm.consensus.wal import Wal

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Storage:
    wal: Wal
    snapshots: SnapshotStore
    snapshot: Meta | None
    """The one to start from."""


def open_storage(directory: Path, members: Sequence[Member], fatal: Fatal, **wal_options: Any) -> Storage:
    """What `directory` holds, or a new log based on `members` if it holds nothing. Raises Damaged."""
    directory.mkdir(parents=True, exist_ok=True)
    snapshots = SnapshotStore(directory)
    snapshots.discard_temporaries()
    if not Wal.exists(directory):
        if snapshots.paths():
            raise Damaged(directory, "there are snapshots but no log, so term and vote are missing")
        names = tuple(member_id(each) for each in members)
        return Storage(Wal.create(directory, names, fatal, **wal_options), snapshots, None)
    snapshot, problems = snapshots.newest_good()
    wal = Wal.load(directory, fatal, **wal_options)
    try:
        _agree(directory, wal, snapshot, problems)
    except Damaged:
        wal.abandon()
        raise
    for problem in problems:
        log.warning("a damaged snapshot is not used", problem=problem)
    wal.sync()
    return Storage(wal, snapshots, snapshot)


def _agree(directory: Path, wal: Wal, snapshot: Meta | None, problems: list[str]) -> None:
    """Make the log begin with the two entries that end the snapshot."""
    if snapshot is None:
        if wal.first_index > 1:
            raise Damaged(directory, f"the log begins at entry {wal.first_index}, but there is no snapshot before it")
        return
    reaches_back = wal.first_index <= snapshot.previous[1] and wal.term_at(snapshot.index) == snapshot.term
    if reaches_back and wal.term_at(snapshot.previous[1]) == snapshot.previous[2]:
        wal.set_base(snapshot.index, snapshot.members, write=False)
        wal.forget_before(snapshot.previous[1])
    elif problems:
        raise Damaged(directory, f"{problems[0]}; and the log does not reach back to the snapshot before it")
    elif wal.first_index > snapshot.index:
        raise Damaged(
            directory, f"the log begins at entry {wal.first_index}, after the newest snapshot ({snapshot.index})"
        )
    else:
        # The process ended between storing a received snapshot and replacing the log, which is behind
        # it or contradicts it: what the snapshot holds is committed, so the log's own story is void.
        wal.reset_to((snapshot.previous, snapshot.last), snapshot.members)
