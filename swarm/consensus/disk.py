"""The files of one member: what consensus asks of a directory, and the real one. The simulator has another.

Names are flat. A write is durable after `sync`, a name (created, renamed, removed) after `sync_names`.
"""

from __future__ import annotations

import os
from io import BufferedReader
from pathlib import Path
from typing import Protocol


class AppendFile(Protocol):
    """A file that is only added to. All methods raise OSError."""

    def write(self, data: bytes) -> None:
        """All of it, or OSError."""
        ...

    def sync(self) -> None:
        """What was written is durable when this returns."""
        ...

    def close(self) -> None: ...


class Disk(Protocol):
    """All methods raise OSError."""

    def names(self) -> list[str]:
        """Sorted."""
        ...

    def read(self, name: str) -> bytes: ...

    def open(self, name: str) -> BufferedReader:
        """For reading."""
        ...

    def create(self, name: str) -> AppendFile:
        """An empty file, in place of one that may be there."""
        ...

    def append(self, name: str, size: int) -> AppendFile:
        """Go on with a file, cut to its first `size` bytes."""
        ...

    def rename(self, old: str, new: str) -> None: ...

    def remove(self, name: str) -> None: ...

    def sync_names(self) -> None: ...

    def free_bytes(self) -> int: ...


class _File:
    def __init__(self, path: Path, flags: int) -> None:
        self._fd = os.open(path, flags | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Directory:
    """Implements `Disk` on a directory, which is made if it is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def open(self, name: str) -> BufferedReader:
        return (self.path / name).open("rb")

    def create(self, name: str) -> AppendFile:
        return _File(self.path / name, os.O_CREAT | os.O_TRUNC)

    def append(self, name: str, size: int) -> AppendFile:
        file = _File(self.path / name, os.O_APPEND)
        file.truncate(size)
        return file

    def rename(self, old: str, new: str) -> None:
        (self.path / old).rename(self.path / new)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def sync_names(self) -> None:
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def free_bytes(self) -> int:
        disk = os.statvfs(self.path)
        return disk.f_bavail * disk.f_frsize


def write_whole(disk: Disk, name: str, data: bytes) -> None:
    """Create a file that is there with all of `data`, durably, or not at all."""
    temporary = name + ".new"
    file = disk.create(temporary)
    try:
        file.write(data)
        file.sync()
    finally:
        file.close()
    disk.rename(temporary, name)
    disk.sync_names()
