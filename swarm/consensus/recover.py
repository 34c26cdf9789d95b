"""Starting anew from what one manager has, when Raft itself cannot go on: after the loss of a quorum, or from a backup.

Both break a promise of Raft knowingly: what a lost quorum had acknowledged, but this manager never received, is gone.
They work on the files of a manager that does not run, and a crash at any instant leaves the old state or the new.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from swarm.consensus import codec
from swarm.consensus.disk import Directory, Disk
from swarm.consensus.faults import Fatal
from swarm.consensus.interface import Member
from swarm.consensus.membership import member, member_id
from swarm.consensus.snapshot import BadSnapshot, Meta, SnapshotStore
from swarm.consensus.storage import open_storage
from swarm.consensus.wal import Wal
from swarm.errors import Invalid

RESTORED_TERM = 1
_FIRST, _SECOND = (codec.NO_OP, 1, RESTORED_TERM), (codec.NO_OP, 2, RESTORED_TERM)
"""What a restored log begins with: the kernel wants two entries before all others."""


def keep_only(disk: Disk, me: Member, fatal: Fatal) -> tuple[Member, ...]:
    """Make this manager the only member, with all that its log holds; returns who the others were. Its address may be
    another than before. Does nothing if it is the only member already. Raises Damaged, and Invalid if it was none."""
    wal = open_storage(disk, (), fatal).wal
    try:
        members = [member(name) for name in wal.members()]
        if wal.last_index <= 1 or me.node_id not in {each.node_id for each in members}:
            raise Invalid(f"{disk} holds nothing of which node {me.node_id} is a manager: nothing can be recovered")
        others = [each for each in members if each != me]
        if others:
            term = wal.getCurrentTerm() + 1  # no entry of a former leader can be taken for one of these
            wal.setCurrentTerm(term, member_id(me))
            changes = [("add", me)] if me not in members else []
            changes += [("rem", each) for each in others]
            for index, (operation, each) in enumerate(changes, wal.last_index + 1):
                wal.add(codec.membership_command(operation, member_id(each)), index, term)
            wal.sync()  # one batch: all of it or nothing
        return tuple(each for each in others if each.node_id != me.node_id)
    finally:
        wal.abandon()


def meta_of(index: int, term: int, members: Iterable[Member]) -> Meta:
    """What a backup says of itself. The entries that made its state are not needed again."""
    names = tuple(map(member_id, members))
    return Meta((codec.NO_OP, index - 1, term), (codec.NO_OP, index, term), names)


def read_backup(path: Path) -> Iterator[bytes]:
    """The state's records, after the whole file has been checked. Raises Invalid."""
    store = SnapshotStore(Directory(path.parent))
    try:
        store.check(path.name)
    except BadSnapshot as error:
        raise Invalid(f"the backup cannot be used: {error}") from None
    return store.records(path.name)


def restore(disk: Disk, me: Member, records: Iterable[bytes], fatal: Fatal) -> None:
    """A new log on an empty disk, whose state is that of a backup and whose only member is `me`."""
    if Wal.exists(disk):
        raise Invalid(f"{disk} holds the log of a manager already")
    members = (member_id(me),)
    SnapshotStore(disk).write(Meta(_FIRST, _SECOND, members), records)
    wal = Wal.create(disk, members, fatal)
    try:
        wal.setCurrentTerm(RESTORED_TERM, None)
        wal.reset_to((_FIRST, _SECOND), members)
        wal.sync()
    finally:
        wal.abandon()
