"""One file per task: <state>/agent/tasks/<task id>.pb, a TaskRecord. Written before each step, so that an
agent that was killed at any instant resumes the step or cleans up after it.

No fdatasync: a killed process loses nothing that it wrote, and after a power cut every container is dead
anyway; a file lost or torn then is treated as unknown, and the managers' snapshot says what remains to
be done. And written in place, behind a checksum, which takes 5 us: replacing a file takes ext4 a quarter of a
millisecond, for it makes an inode and begins to write it out at once (auto_da_alloc, ext4(5)). On that the start of a
hundred tasks depends."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from proto.agent_pb2 import TaskRecord

log = structlog.get_logger()

_SUFFIX = ".pb"
_HEADER = struct.Struct("<II")
"""Length and CRC-32 of the record that follows. What follows that is left of a longer one before."""


class TaskFiles:
    def __init__(self, state_dir: Path) -> None:
        self._dir = state_dir / "agent" / "tasks"
        # Specs can hold registry credentials and passwords in env.
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    def save(self, record: TaskRecord) -> None:
        """The task's file is this, or unreadable. Raises OSError (disk full, read-only file system)."""
        path = self._dir / (record.task.id + _SUFFIX)
        data = record.SerializeToString()
        framed = _HEADER.pack(len(data), zlib.crc32(data)) + data
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            written = os.write(handle, framed)
            if written != len(framed):
                raise OSError(f"{path}: only {written} of {len(framed)} bytes written, the disk is full")
        finally:
            os.close(handle)

    def load(self) -> list[TaskRecord]:
        """All readable records, by task ID. Unreadable files are removed: their tasks count as unknown."""
        records = []
        for path in sorted(self._dir.iterdir()):
            record = _read(path) if path.suffix == _SUFFIX else None
            if record is not None:
                records.append(record)
                continue
            if path.suffix == _SUFFIX:
                log.warning("task file unreadable: removed, the managers' assignments decide", path=str(path))
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        return records

    def remove(self, task_id: str) -> None:
        """Idempotent."""
        (self._dir / (task_id + _SUFFIX)).unlink(missing_ok=True)


def _read(path: Path) -> TaskRecord | None:
    raw = path.read_bytes()
    if len(raw) < _HEADER.size:
        return None
    length, checksum = _HEADER.unpack_from(raw)
    data = raw[_HEADER.size : _HEADER.size + length]
    if len(data) != length or zlib.crc32(data) != checksum:
        return None
    try:
        record = TaskRecord.FromString(data)
    except DecodeError:
        return None
    return record if record.task.id == path.stem else None
