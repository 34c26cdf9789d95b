"""One file per task: <state>/agent/tasks/<task id>.pb, a TaskRecord. Written before each step, so that an
agent that was killed at any instant resumes the step or cleans up after it.

No fdatasync: a killed process loses nothing that it wrote, and after a power cut every container is dead
anyway; a file lost or torn then is treated as unknown, and the managers' snapshot says what remains to
be done. Saving therefore costs microseconds, on which the start of 100 tasks depends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from proto.agent_pb2 import TaskRecord

log = structlog.get_logger()

_SUFFIX = ".pb"


class TaskFiles:
    def __init__(self, state_dir: Path) -> None:
        self._dir = state_dir / "agent" / "tasks"
        # Specs can hold registry credentials and passwords in env.
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    def save(self, record: TaskRecord) -> None:
        """Replace the task's file atomically. Raises OSError (disk full, read-only file system)."""
        path = self._dir / (record.task.id + _SUFFIX)
        temporary = path.with_suffix(".tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            data = record.SerializeToString()
            written = os.write(handle, data)
            if written != len(data):
                raise OSError(f"{temporary}: only {written} of {len(data)} bytes written, the disk is full")
        finally:
            os.close(handle)
        temporary.replace(path)

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
    try:
        record = TaskRecord.FromString(path.read_bytes())
    except DecodeError:
        return None
    return record if record.task.id == path.stem else None
