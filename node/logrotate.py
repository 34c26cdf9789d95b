"""Rotate a task's log: rename it, then have conmon reopen. conmon writes to the renamed file until it has, so no
line is lost, provided that it is asked once only: its reopening replaces whatever stands in the log's place."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

REOPEN_PATIENCE_S = 10.0
"""conmon reopens within milliseconds of being asked. Longer means that the agent died before asking."""
_REOPEN = b"2 0 0\n"


def rotation(log_size_bytes: int | None, missing_s: float, max_bytes: int, max_files: int) -> list[tuple[str, str]]:
    """Pure: the steps (action, suffix) that rotate. Without a current file (None, for `missing_s`) the monitor is
    about to reopen it; it is asked again only when it must have missed that, because a second reopening would
    replace the file that the first one made."""
    if log_size_bytes is None:
        return [("reopen", "")] if missing_s >= REOPEN_PATIENCE_S else []
    if max_bytes <= 0 or log_size_bytes < max_bytes:
        return []
    oldest = max(1, max_files - 1)
    shifts = [("shift", str(number)) for number in range(oldest - 1, 0, -1)]
    # With one file only, the renamed one is removed as soon as the monitor has left it.
    return [*shifts, ("rename", ""), ("reopen", ""), *([("drop", "1")] if max_files <= 1 else [])]


def rotate(log: Path, control: Path, max_bytes: int, max_files: int, missing_s: float = 0.0) -> bool:
    """Rotate if due; returns whether there is a current file now. `control` is conmon's FIFO, `missing_s` for how
    long there has been no current file."""
    try:
        size = log.stat().st_size
    except FileNotFoundError:
        size = None
    steps = rotation(size, missing_s, max_bytes, max_files)
    for action, suffix in steps:
        match action:
            case "shift":
                with contextlib.suppress(FileNotFoundError):
                    log.with_name(f"{log.name}.{suffix}").rename(log.with_name(f"{log.name}.{int(suffix) + 1}"))
            case "rename":
                log.rename(log.with_name(f"{log.name}.1"))
            case "reopen":
                _tell(control)
            case "drop" if log.exists():
                # Still missing: conmon has not reopened yet and writes to log.1; the next rotation replaces it.
                log.with_name(f"{log.name}.{suffix}").unlink(missing_ok=True)
    return not steps and size is not None


def _tell(control: Path) -> None:
    # Non-blocking: without a reader (the monitor is gone) this fails instead of waiting for one.
    with contextlib.suppress(OSError):
        fd = os.open(control, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(fd, _REOPEN)
        finally:
            os.close(fd)


class LogRotation:
    """Rotates many logs and remembers which are being reopened. `now_s` is a monotonic clock."""

    def __init__(self) -> None:
        self._missing_since_s: dict[Path, float] = {}

    def run(self, log: Path, control: Path, max_bytes: int, max_files: int, *, now_s: float) -> None:
        """One look at one log. Raises OSError."""
        since_s = self._missing_since_s.get(log, now_s)
        if rotate(log, control, max_bytes, max_files, now_s - since_s):
            self._missing_since_s.pop(log, None)
        else:
            # Asked just now, by a rotation or again: from here on the monitor has its time to reopen.
            asked = now_s - since_s >= REOPEN_PATIENCE_S
            self._missing_since_s[log] = now_s if asked else since_s

    def forget(self, log: Path) -> None:
        self._missing_since_s.pop(log, None)
