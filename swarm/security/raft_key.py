"""The key that seals this manager's log and snapshots, in `raft.key` beside them. Every manager has its own.

In clear it goes with the files: copies of single ones, of the disk's free blocks and of backups without it tell
nothing. While autolock is on it is wrapped with the cluster's unlock key, and the directory alone tells nothing.

The file: MAGIC, whether it is wrapped, the revision of the lock that it was written for, the key or what `wrap` made
of it, and a digest of all that, so that damage is not taken for a wrong unlock key. It is replaced as a whole.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from swarm.consensus.disk import Disk, write_whole
from swarm.consensus.sealing import KEY_BYTES, Sealed
from swarm.errors import Invalid, Locked
from swarm.security.files import Seal
from swarm.security.unlock_key import NO_LOCK, NONCE_BYTES, Lock, unwrap, wrap

KEY_FILE = "raft.key"
_PURPOSE = b"raft.key"
_HEADER = struct.Struct(">8sBQ")
_MAGIC = b"PYSWKEY1"
_DIGEST_BYTES = 8
_CLEAR_BYTES = _HEADER.size + KEY_BYTES + _DIGEST_BYTES
_WRAPPED_BYTES = _CLEAR_BYTES + NONCE_BYTES + 16


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What the file says without an unlock key. `body`: the key, or what `wrap` made of it."""

    is_wrapped: bool
    revision: int
    body: bytes

    @property
    def header(self) -> bytes:
        return _HEADER.pack(_MAGIC, self.is_wrapped, self.revision)

    def opened(self, unlock_keys: Iterable[bytes]) -> bytes | None:
        """The key; None if it is wrapped and none of the unlock keys opens it."""
        if not self.is_wrapped:
            return self.body
        for unlock_key in unlock_keys:
            key = unwrap(unlock_key, _PURPOSE, self.body, self.header)
            if key is not None:
                return key
        return None


def decode(data: bytes) -> KeyFile:
    """Raises Invalid when a byte is not as it was written."""
    if len(data) == KEY_BYTES:
        return KeyFile(False, 0, data)  # as it was before there was autolock
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if len(data) not in (_CLEAR_BYTES, _WRAPPED_BYTES) or _digest(body) != digest:
        raise Invalid(f"it holds {len(data)} bytes that are no key, or damaged")
    magic, kind, revision = _HEADER.unpack_from(body)
    if magic != _MAGIC or kind not in (0, 1):
        raise Invalid("it is of a format that this version does not know")
    return KeyFile(bool(kind), revision, body[_HEADER.size :])


def encode(key: bytes, lock: Lock, nonce: bytes) -> bytes:
    """The file for this key as the lock wants it; `nonce`: 12 random bytes."""
    header = _HEADER.pack(_MAGIC, bool(lock.key), lock.revision)
    body = header + (wrap(lock.key, _PURPOSE, key, header, nonce) if lock.key else key)
    return body + _digest(body)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


class RaftKey:
    """This manager's key and the file it lies in. `randomness`: count -> bytes."""

    def __init__(self, disk: Disk, key: bytes, revision: int, randomness: Callable[[int], bytes]) -> None:
        self._disk = disk
        self._key = key
        self._randomness = randomness
        self.revision = revision
        """Of the lock that the file was written for."""

    @classmethod
    def open(
        cls,
        disk: Disk,
        unlock_keys: Iterable[bytes] = (),
        first: Lock = NO_LOCK,
        randomness: Callable[[int], bytes] = os.urandom,
    ) -> RaftKey:
        """The key in `disk`; where there is nothing yet one is made, and never stored otherwise than `first` wants.
        Raises Locked without the right unlock key, Invalid without a usable file."""
        names = disk.names()
        if KEY_FILE in names:
            file = read_key_file(disk)
            key = file.opened(unlock_keys)
            if key is None:
                raise Locked
            return cls(disk, key, file.revision, randomness)
        if any(name.startswith("wal-") for name in names):
            raise Invalid(
                f"{disk}/{KEY_FILE} is missing, so this manager's log cannot be read: restore the file from a copy; or,"
                " if other managers hold a quorum, run `pyswarm swarm leave --force` here and join again"
            )
        made = cls(disk, randomness(KEY_BYTES), 0, randomness)
        made.follow(first)
        return made

    def follow(self, lock: Lock) -> None:
        """Store the key as `lock` wants it; a crash at any instant leaves the old file or the new. Raises OSError."""
        write_whole(self._disk, KEY_FILE, encode(self._key, lock, self._randomness(NONCE_BYTES)))
        self.revision = lock.revision

    def seal(self) -> Seal:
        """What opens the node's private key, if that is sealed. The agent alone writes it."""
        return Seal(self._key)

    def sealed(self) -> Sealed:
        """The disk through which consensus reads and writes."""
        return Sealed(self._disk, self._key, self._randomness)


def read_key_file(disk: Disk) -> KeyFile:
    """Raises Invalid if it is damaged, OSError if it is not there."""
    try:
        return decode(disk.read(KEY_FILE))
    except Invalid as error:
        raise Invalid(f"{disk}/{KEY_FILE} is not usable: {error}; restore the file from a copy") from None


def has_log(disk: Disk) -> bool:
    """Whether consensus ran from this directory before."""
    return any(name.startswith("wal-") and name.endswith(".log") for name in disk.names())
