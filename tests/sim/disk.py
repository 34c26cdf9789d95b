"""A disk in memory that loses what was not synced, tears writes, fills up and rots."""

from __future__ import annotations

import errno
import io
import random
from dataclasses import dataclass, field

SECTOR = 512
"""A torn write leaves whole sectors, some of them never written: zeros."""


class PowerFailure(BaseException):
    """The machine goes off in the middle of a disk operation."""


@dataclass
class _Inode:
    data: bytearray = field(default_factory=bytearray)
    safe: int = 0
    """Bytes from the beginning that are durable."""
    before: bytes | None = None
    """Durable contents that were cut, while the cut is not durable."""

    def settle(self, chance: random.Random) -> None:
        """What is there after a power failure."""
        if self.before is not None and chance.random() < 0.5:
            self.data = bytearray(self.before)
        else:
            kept = chance.randint(min(self.safe, len(self.data)), len(self.data))
            del self.data[kept:]
            if kept > self.safe and chance.random() < 0.3:  # the last sector's number was written, its bytes were not
                hole = max(self.safe, kept - SECTOR)
                self.data[hole:] = bytes(kept - hole)
        self.sync()

    def sync(self) -> None:
        self.safe, self.before = len(self.data), None


class _Handle:
    def __init__(self, disk: MemoryDisk, inode: _Inode) -> None:
        self._disk = disk
        self._inode = inode

    def write(self, data: bytes) -> None:
        self._disk.operate()
        if self._disk.is_full:
            self._inode.data += data[: len(data) // 2]
            raise OSError(errno.ENOSPC, "No space left on device")
        self._inode.data += data

    def sync(self) -> None:
        self._disk.operate()
        self._inode.sync()

    def close(self) -> None: ...


class MemoryDisk:
    """Implements `swarm.consensus.disk.Disk`. Names become durable with `sync_names`, in the order of their making."""

    def __init__(self, label: str, chance: random.Random) -> None:
        self._label = label
        self._chance = chance
        self._files: dict[str, _Inode] = {}
        self._durable: dict[str, _Inode] = {}
        self._steps: list[tuple[str, str, _Inode | None]] = []
        """(name to drop or "", name to set or "", its file), since the last `sync_names`."""
        self.is_full = False
        self.fails_in: int | None = None
        """Operations until the power fails."""

    def __str__(self) -> str:
        return f"disk of {self._label}"

    def operate(self) -> None:
        """Called before each operation that changes something."""
        if self.fails_in is not None:
            self.fails_in -= 1
            if self.fails_in < 0:
                self.fails_in = None
                raise PowerFailure

    def power_off(self) -> None:
        """Only what is durable is left, and of the rest what chance leaves."""
        self.fails_in = None
        for drop, name, inode in self._steps[: self._chance.randint(0, len(self._steps))]:
            self._durable.pop(drop, None)
            if inode is not None:
                self._durable[name] = inode
        self._steps.clear()
        self._files = dict(self._durable)
        for inode in self._files.values():
            inode.settle(self._chance)

    def rot(self) -> str:
        """Flip one bit of what has been safe for long; the name of the file, or "" if there is nothing of that kind.
        The end of the newest log file is spared: damage there cannot be told from a torn write."""
        logs = [name for name in self.names() if name.startswith("wal-")]
        sizes = {name: len(self._files[name].data) for name in self.names()}
        if logs:
            sizes[logs[-1]] //= 2
        names = [name for name, size in sizes.items() if size > SECTOR]
        if not names:
            return ""
        name = self._chance.choice(names)
        self._files[name].data[self._chance.randrange(sizes[name])] ^= 1 << self._chance.randrange(8)
        return name

    # ---- Disk

    def names(self) -> list[str]:
        return sorted(self._files)

    def _inode(self, name: str) -> _Inode:
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, "No such file", name)
        return self._files[name]

    def read(self, name: str) -> bytes:
        return bytes(self._inode(name).data)

    def open(self, name: str) -> io.BufferedReader:
        return io.BufferedReader(io.BytesIO(self.read(name)))

    def create(self, name: str) -> _Handle:
        self.operate()
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        inode = self._files[name] = _Inode()
        self._steps.append(("", name, inode))
        return _Handle(self, inode)

    def append(self, name: str, size: int) -> _Handle:
        self.operate()
        inode = self._inode(name)
        if size < inode.safe and inode.before is None:
            inode.before = bytes(inode.data[: inode.safe])
        del inode.data[size:]
        inode.safe = min(inode.safe, size)
        return _Handle(self, inode)

    def rename(self, old: str, new: str) -> None:
        self.operate()
        inode = self._inode(old)
        del self._files[old]
        self._files[new] = inode
        self._steps.append((old, new, inode))

    def remove(self, name: str) -> None:
        self.operate()
        self._inode(name)
        del self._files[name]
        self._steps.append((name, "", None))

    def sync_names(self) -> None:
        self.operate()
        self._durable = dict(self._files)
        self._steps.clear()

    def free_bytes(self) -> int:
        return 0 if self.is_full else 1 << 40
