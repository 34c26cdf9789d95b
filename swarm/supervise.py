"""Keeping one child process running that outlives its supervisor; and, within this one, a part that may fail.

The child holds a lock on `<name>.lock`. A supervisor that starts anew finds the lock
held, asks the kernel by whom, adopts that process and watches it; it starts one only where none runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Protocol

import structlog

RESTART_DELAY_FIRST_S = 0.1
RESTART_DELAY_MAX_S = 8.0
STABLE_S = 30.0
"""A child that ran this long starts anew without delay."""

log = structlog.get_logger()


_FLOCK = "@hhqqi"
"""struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid."""


def hold_lock(path: Path) -> IO[bytes] | None:
    """Called by the child: the held lock (keep it open), or None when another one holds it."""
    file = open(path, "ab")  # noqa: SIM115 - stays open as long as the process lives
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def holder(path: Path) -> int:
    """Pid of the process that holds the lock; 0 = nobody. Asking does not disturb the lock."""
    try:
        with open(path, "rb") as file:
            question = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, question))
            return 0 if kind == fcntl.F_UNLCK else int(pid)
    except FileNotFoundError:
        return 0


class Supervisor:
    """`argv` must take the lock at `lock_path` itself. `each_input` is asked before each start for what goes to the
    standard input; None: it cannot be started now, ask again after `wake`."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        lock_path: Path,
        log_path: Path,
        each_input: Callable[[], bytes | None] = lambda: b"",
        *,
        on_start: Callable[[int], None] = lambda pid: None,
    ) -> None:
        self._name = name
        self._argv = list(argv)
        self._lock_path = lock_path
        self._log_path = log_path
        self._each_input = each_input
        self._on_start = on_start
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._child = 0

    @property
    def pid(self) -> int:
        return holder(self._lock_path)

    def start(self, first_input: bytes = b"") -> None:
        """Run it from now on; `first_input` goes to the standard input of its first start only, before that of each."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep(first_input))

    def wake(self) -> None:
        """It may be possible now to start what could not be started before."""
        self._woken.set()

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL after the timeout; returns when it is gone."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        pid = self.pid or (self._child if self._child in _children else 0)  # started, but does not hold the lock yet
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(timeout_s):
                    await _gone(pid)
            except TimeoutError:
                log.warning("process did not end, killing it", name=self._name, pid=pid, after_s=timeout_s)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                await _gone(pid)

    async def _keep(self, first_input: bytes) -> None:
        loop = asyncio.get_running_loop()
        delay_s = RESTART_DELAY_FIRST_S
        while True:
            started_at = loop.time()
            pid = self.pid
            if not pid:
                pid = self._spawn(first_input + await self._input())
                first_input = b""
            await _gone(pid)
            ran_s = loop.time() - started_at
            delay_s = RESTART_DELAY_FIRST_S if ran_s > STABLE_S else min(delay_s * 2, RESTART_DELAY_MAX_S)
            log.warning("process ended, starting it again", name=self._name, pid=pid, delay_s=delay_s)
            await asyncio.sleep(delay_s)

    async def _input(self) -> bytes:
        while True:
            self._woken.clear()
            if (given := self._each_input()) is not None:
                return given
            log.warning("process waits to be unlocked", name=self._name)
            await self._woken.wait()

    def _spawn(self, first_input: bytes) -> int:
        with open(self._log_path, "ab") as output:
            child = subprocess.Popen(
                self._argv, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )
        self._on_start(child.pid)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(first_input)
            child.stdin.close()
        _children[child.pid] = child
        self._child = child.pid
        return child.pid


_children: dict[int, subprocess.Popen[bytes]] = {}
"""Those that we started ourselves must be waited for, or they stay as zombies."""


async def _gone(pid: int) -> None:
    """Return when the process has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        fd = -1
    if fd >= 0:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(fd, ended.set)
        try:
            if not select.select([fd], [], [], 0)[0]:
                await ended.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
    child = _children.pop(pid, None)
    if child is not None:
        child.wait()


class Runs(Protocol):
    async def run(self) -> None: ...


async def keep_running(next_one: Callable[[], Runs], pause_s: float) -> None:
    """Run one, and another after each that a fault ended, until one ends that was told to. Without this a host whose
    agent failed would be down for good, with a daemon that seems to run."""
    while True:
        try:
            await next_one().run()
            return
        except Exception:
            log.exception("failed: another one follows", pause_s=pause_s)
        await asyncio.sleep(pause_s)
