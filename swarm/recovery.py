"""A manager that starts anew: from its own log without its quorum, or from a backup. What becomes of the log is the
business of `consensus.recover`; here is what becomes of the state, and who may do it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import structlog

from proto.local_pb2 import Bootstrap
from proto.objects_pb2 import MANAGER, WORKER, Cluster, Node
from swarm.consensus.disk import Disk
from swarm.consensus.faults import exit_process
from swarm.consensus.interface import Member
from swarm.consensus.recover import keep_only, read_backup, restore
from swarm.consensus.wal import Wal
from swarm.errors import Invalid
from swarm.store.changes import Create, Group, Update, copy_of
from swarm.store.store import Store
from swarm.store.writer import Writer

log = structlog.get_logger()


def is_recovery(bootstrap: Bootstrap) -> bool:
    return bootstrap.force_new_cluster or bool(bootstrap.backup)


def prepare(bootstrap: Bootstrap, disk: Disk, me: Member) -> None:
    """Before consensus opens its files. Doing it twice does no harm. Raises Invalid and Damaged."""
    if bootstrap.force_new_cluster:
        others = keep_only(disk, me, exit_process)
        log.warning("this manager goes on alone", node=me.node_id, without=[each.node_id for each in others])
    elif bootstrap.backup and not Wal.exists(disk):
        restore(disk, me, read_backup(Path(bootstrap.backup)), exit_process)


def takeover(store: Store, me: Node) -> Iterator[Group]:
    """What makes `me` the only manager in the state, too. A former one that comes back is a worker: its agent hears so,
    ends its manager process and drops its log."""
    mine = store.nodes.get(me.id)
    if mine is None:
        yield (Create(me),)
    elif (mine.advertise_host, mine.data_path_addr) != (me.advertise_host, me.data_path_addr):
        moved = copy_of(mine)
        moved.advertise_host, moved.data_path_addr = me.advertise_host, me.data_path_addr
        yield (Update(moved),)
    for node in store.nodes:
        if node.id != me.id and node.spec.desired_role == MANAGER:
            demoted = copy_of(node)
            demoted.spec.desired_role = WORKER
            yield (Update(demoted),)


async def take_over(bootstrap: Bootstrap, store: Store, writer: Writer) -> None:
    """Once this manager leads. Raises SwarmError."""
    for error in await writer.commit_all(list(takeover(store, bootstrap.node))):
        if error is not None:
            raise error


def cluster_of_backup(path: Path) -> Cluster:
    """The swarm that a backup holds, after all of it has been checked and read. Raises Invalid."""
    store = Store()
    try:
        store.load(read_backup(path))
    except (ValueError, StopIteration, AssertionError) as error:
        raise Invalid(f"{path} is no backup of a swarm: {error}") from None
    if store.cluster is None:
        raise Invalid(f"{path} holds the state of no swarm")
    return store.cluster
