"""A task's log files: conmon's k8s-file format, rotation, reading from the end, following across rotations.

A line is `2026-11-23T21:06:37.184345131+00:00 stdout F text`; P instead of F marks a piece of a longer line.
Files are log (current), log.1, log.2, ... (older). conmon goes on writing to a renamed file until it is told
to reopen, so no line is lost: a reader finishes the renamed file, and turns to the new one once that exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from node.inotify import Inotify
from proto.dispatch_pb2 import LogLine, LogOptions

LINE_BYTES_MAX = 256 << 10
"""Pieces are joined up to here; a longer line comes out as several."""
_BLOCK_BYTES = 65_536
BATCH_BYTES = 512 << 10
"""Read and parsed at once before the event loop gets its turn."""
FOLLOW_CHECK_S = 1.0
"""A follower looks at least this often whether the container has ended."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the file: a whole line of output or a piece of one."""

    timestamp_s: float
    stderr: bool
    partial: bool
    text: bytes


def parse_time(text: str) -> float:
    """RFC 3339 with nanoseconds -> Unix s. Raises ValueError."""
    date, dot, rest = text.partition(".")
    if not dot:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    digits = rest[: next((i for i, char in enumerate(rest) if not char.isdigit()), len(rest))]
    zone = rest[len(digits) :].replace("Z", "+00:00")
    return datetime.fromisoformat(date + zone).timestamp() + int(digits) / 10.0 ** len(digits)


def parse(line: bytes) -> Entry | None:
    """None for a line that is not conmon's, such as one torn by a full disk."""
    fields = line.split(b" ", 3)
    if len(fields) != 4 or fields[1] not in (b"stdout", b"stderr") or fields[2] not in (b"F", b"P"):
        return None
    try:
        return Entry(parse_time(fields[0].decode("ascii")), fields[1] == b"stderr", fields[2] == b"P", fields[3])
    except ValueError:
        return None


class Joiner:
    """Pieces in, whole lines of the wanted streams out."""

    def __init__(self, task_id: str, options: LogOptions) -> None:
        self._task_id = task_id
        both = options.stdout == options.stderr  # neither asked for means both
        self._wanted = {False: options.stdout or both, True: options.stderr or both}
        self._since = options.since
        self._pieces: dict[bool, bytes] = {False: b"", True: b""}
        self._last_s = 0.0

    def feed(self, line: bytes) -> LogLine | None:
        """A finished line, without its newline."""
        entry = parse(line)
        if entry is None or not self._wanted[entry.stderr]:
            return None
        self._last_s = entry.timestamp_s
        data = self._pieces[entry.stderr] + entry.text
        if entry.partial and len(data) < LINE_BYTES_MAX:
            self._pieces[entry.stderr] = data
            return None
        self._pieces[entry.stderr] = b""
        if entry.timestamp_s < self._since:
            return None
        return LogLine(task_id=self._task_id, timestamp=entry.timestamp_s, stderr=entry.stderr, data=data)

    def flush(self) -> list[LogLine]:
        """Output that never got its newline, once all has been read."""
        lines = []
        for stderr, data in self._pieces.items():
            if data and self._last_s >= self._since:
                lines.append(LogLine(task_id=self._task_id, timestamp=self._last_s, stderr=stderr, data=data))
            self._pieces[stderr] = b""
        return lines

    def counter(self) -> Callable[[bytes], bool]:
        """For counting from the end: whether an entry is the last piece of a wanted line of output."""
        begun: set[bool] = set()

        def counts(line: bytes) -> bool:
            entry = parse(line)
            if entry is None or not self._wanted[entry.stderr]:
                return False
            unfinished = entry.stderr not in begun  # a piece at the very end stands for a line
            begun.add(entry.stderr)
            return not entry.partial or unfinished

        return counts


def log_files(log: Path) -> list[Path]:
    """Existing files, oldest first; none once the task has been removed."""
    try:
        ages = {name: name.removeprefix(log.name + ".") for name in os.listdir(log.parent)}
    except FileNotFoundError:
        return []
    rotated = sorted((int(age) for age in ages.values() if age.isdigit()), reverse=True)
    return [log.with_name(f"{log.name}.{age}") for age in rotated] + ([log] if log.name in ages else [])


def _lines_backwards(fd: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the complete lines of a file, last first."""
    end = os.fstat(fd).st_size
    tail = b""
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        block = os.pread(fd, end - start, start) + tail
        pieces = block.split(b"\n")
        # The first piece may begin before the block; the last is unfinished (or empty) at the end of the file.
        first, rest = pieces[0], pieces[1:]
        offset = start + len(block)
        for piece in reversed(rest):
            offset -= len(piece)
            if piece:
                yield offset, piece
            offset -= 1
        tail = first + b"\n" if rest else first
        end = start
    if tail.rstrip(b"\n"):
        yield 0, tail.rstrip(b"\n")


def tail_start(files: list[BinaryIO], count: int, wanted: Callable[[bytes], bool]) -> tuple[int, int]:
    """(index into files, offset) from where the last `count` wanted lines begin."""
    seen = 0
    end = (len(files) - 1, os.fstat(files[-1].fileno()).st_size)
    if count <= 0:
        return end
    start = end
    for index in range(len(files) - 1, -1, -1):
        for offset, line in _lines_backwards(files[index].fileno()):
            if wanted(line):
                if seen == count:
                    return start
                seen += 1
            start = (index, offset)
    return start


def _open_all(log: Path) -> list[BinaryIO]:
    """All files, oldest first, opened between two rotations."""
    while True:
        paths = log_files(log)
        opened: list[BinaryIO] = []
        with contextlib.suppress(FileNotFoundError):
            opened.extend(path.open("rb") for path in paths)
            held = [os.fstat(file.fileno()).st_ino for file in opened]
            if held == [path.stat().st_ino for path in log_files(log)]:
                return opened
        for file in opened:
            file.close()


class _Cursor:
    """A place in the sequence of log files that survives rotation, because it holds the file itself."""

    def __init__(self, log: Path, file: BinaryIO, offset: int) -> None:
        self._log = log
        self._file = file
        self._file.seek(offset)
        self._rest = b""

    def close(self) -> None:
        self._file.close()

    def read(self) -> list[bytes]:
        """The next complete lines; [] at the end of what has been written."""
        data = self._rest + self._file.read(BATCH_BYTES)
        *lines, self._rest = data.split(b"\n")
        return lines

    def newer(self) -> BinaryIO | None:
        """The file after this one, when this one has been rotated away; opened, for its name may change again."""
        files = _open_all(self._log)
        inodes = [os.fstat(file.fileno()).st_ino for file in files]
        inode = os.fstat(self._file.fileno()).st_ino
        # Rotated out of existence while we were slow: go on with the oldest there is.
        index = inodes.index(inode) + 1 if inode in inodes else 0
        for file in files[:index] + files[index + 1 :]:
            file.close()
        return files[index] if index < len(files) else None

    def turn_to(self, file: BinaryIO) -> None:
        self._file.close()
        self._file, self._rest = file, b""


def _open_cursor(log: Path, options: LogOptions, joiner: Joiner) -> _Cursor | None:
    files = _open_all(log)
    if not files:
        return None
    index, offset = (0, 0) if options.tail < 0 else tail_start(files, options.tail, joiner.counter())
    for file in files[:index] + files[index + 1 :]:
        file.close()
    return _Cursor(log, files[index], offset)


def _batch(cursor: _Cursor, joiner: Joiner) -> tuple[list[LogLine], bool]:
    """(lines, whether the end was reached)."""
    raw = cursor.read()
    if not raw:
        newer = cursor.newer()
        if newer is None:
            return [], True
        # The monitor has left this file by now: what came since the last read is the last of it.
        while more := cursor.read():
            raw += more
        cursor.turn_to(newer)
    return [line for line in map(joiner.feed, raw) if line is not None], False


async def read_log(
    task_id: str, log: Path, options: LogOptions, inotify: Inotify, ended: Callable[[], bool]
) -> AsyncIterator[LogLine]:
    """The task's lines in order. With `follow`, ends when `ended()` says that the container is gone and all is
    read, or when the log has been removed."""
    joiner = Joiner(task_id, options)
    if not log.parent.is_dir():
        return
    cursor: _Cursor | None = None
    with contextlib.ExitStack() as stack:
        changed = stack.enter_context(inotify.watch(log.parent)) if options.follow else asyncio.Event()
        try:
            while True:
                changed.clear()
                last_round = not options.follow or ended() or not log.parent.is_dir()
                if cursor is None:
                    cursor = await asyncio.to_thread(_open_cursor, log, options, joiner)
                at_end = cursor is None
                while cursor is not None and not at_end:
                    lines, at_end = await asyncio.to_thread(_batch, cursor, joiner)
                    for line in lines:
                        yield line
                if last_round:
                    for line in joiner.flush():
                        yield line
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FOLLOW_CHECK_S):
                        await changed.wait()
        finally:
            if cursor is not None:
                cursor.close()
