"""Opening what survived: one member's log and snapshots, brought into agreement before the kernel sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from swarm.consensus.config import DEFAULTS, RaftConfig
from swarm.consensus.disk import Disk
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


def open_storage(disk: Disk, members: Sequence[Member], fatal: Fatal, config: RaftConfig = DEFAULTS) -> Storage:
    """What the disk holds, or a new log based on `members` if it holds nothing. Raises Damaged."""
    snapshots = SnapshotStore(disk)
    snapshots.discard_temporaries()
    if not Wal.exists(disk):
        if snapshots.names():
            raise Damaged(disk, "there are snapshots but no log, so term and vote are missing")
        names = tuple(member_id(each) for each in members)
        return Storage(Wal.create(disk, names, fatal, config), snapshots, None)
    snapshot, problems = snapshots.newest_good()
    wal = Wal.load(disk, fatal, config)
    try:
        _agree(disk, wal, snapshot, problems)
    except Damaged:
        wal.abandon()
        raise
    for problem in problems:
        log.warning("a damaged snapshot is not used", problem=problem)
    wal.sync()
    return Storage(wal, snapshots, snapshot)


def _agree(disk: Disk, wal: Wal, snapshot: Meta | None, problems: list[str]) -> None:
    """Make the log begin with the two entries that end the snapshot."""
    if snapshot is None:
        if wal.first_index > 1:
            raise Damaged(disk, f"the log begins at entry {wal.first_index}, but there is no snapshot before it")
        return
    reaches_back = wal.first_index <= snapshot.previous[1] and wal.term_at(snapshot.index) == snapshot.term
    if reaches_back and wal.term_at(snapshot.previous[1]) == snapshot.previous[2]:
        wal.set_base(snapshot.index, snapshot.members, write=False)
        wal.forget_before(snapshot.previous[1])
    elif problems:
        raise Damaged(disk, f"{problems[0]}; and the log does not reach back to the snapshot before it")
    elif wal.first_index > snapshot.index:
        raise Damaged(disk, f"the log begins at entry {wal.first_index}, after the newest snapshot ({snapshot.index})")
    else:
        # The process ended between storing a received snapshot and replacing the log, which is behind
        # it or contradicts it: what the snapshot holds is committed, so the log's own story is void.
        wal.reset_to((snapshot.previous, snapshot.last), snapshot.members)
