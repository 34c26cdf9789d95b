"""Wake up when a file in a directory changes: one inotify descriptor for all directories of the process.

The kernel gives a user 128 inotify instances by default; a follower each would exhaust them.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_IN_MODIFY, _IN_MOVED, _IN_CREATE, _IN_DELETE_SELF = 0x2, 0xC0, 0x100, 0x400
_EVENT = struct.Struct("iIII")
_READ_BYTES = 65_536

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """Directory watches of one event loop. Opened with the first watch, closed with the last."""

    def __init__(self) -> None:
        self._fd = -1
        self._watchers: dict[int, set[asyncio.Event]] = {}

    @contextmanager
    def watch(self, directory: Path) -> Iterator[asyncio.Event]:
        """An event that is set at each change of a file in `directory`; the caller clears it. Raises OSError."""
        loop = asyncio.get_running_loop()
        if self._fd < 0:
            self._fd = self._checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify")
            loop.add_reader(self._fd, self._readable)
        changed = asyncio.Event()
        mask = _IN_MODIFY | _IN_MOVED | _IN_CREATE | _IN_DELETE_SELF
        # Watching the same directory again yields the same number, so watchers share it.
        number = self._checked(_libc.inotify_add_watch(self._fd, os.fsencode(directory), mask), str(directory))
        self._watchers.setdefault(number, set()).add(changed)
        try:
            yield changed
        finally:
            self._watchers[number].discard(changed)
            if not self._watchers[number]:
                del self._watchers[number]
                _libc.inotify_rm_watch(self._fd, number)
            if not self._watchers:
                loop.remove_reader(self._fd)
                os.close(self._fd)
                self._fd = -1

    @staticmethod
    def _checked(result: int, what: str) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"watching {what}: {os.strerror(number)}")
        return result

    def _readable(self) -> None:
        data = b""
        with suppress(BlockingIOError):
            data = os.read(self._fd, _READ_BYTES)
        offset = 0
        while offset < len(data):
            number, _mask, _cookie, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size + length
            # -1: the queue overflowed, so anything may have changed.
            numbers = list(self._watchers) if number < 0 else [number]
            for watched in numbers:
                for event in self._watchers.get(watched, ()):
                    event.set()
