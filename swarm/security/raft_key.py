"""The key that seals this manager's log and snapshots. It lies beside them and goes with them: copies of single files,
of the disk's free blocks and of backups without it tell nothing. Every manager has its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from swarm.consensus.disk import Directory, Disk
from swarm.consensus.sealing import KEY_BYTES, Sealed
from swarm.errors import Invalid
from swarm.hostfiles import write_atomically

KEY_FILE = "raft.key"


def raft_disk(directory: Path, randomness: Callable[[int], bytes] = os.urandom) -> Disk:
    """The sealed files of consensus; makes the key where there is nothing yet. Raises Invalid without a usable key."""
    files = Directory(directory)
    path = directory / KEY_FILE
    if path.exists():
        key = path.read_bytes()
    elif has_log(directory):
        raise Invalid(
            f"{path} is missing, so this manager's log cannot be read: restore the file from a copy; or, if other"
            " managers hold a quorum, run `pyswarm swarm leave --force` here and join again"
        )
    else:
        key = randomness(KEY_BYTES)
        write_atomically(path, key, 0o600)
    if len(key) != KEY_BYTES:
        raise Invalid(f"{path} holds {len(key)} bytes, not a key of {KEY_BYTES}: restore the file from a copy")
    return Sealed(files, key)


def has_log(directory: Path) -> bool:
    """Whether consensus ran from this directory before."""
    return any(directory.glob("wal-*.log"))
