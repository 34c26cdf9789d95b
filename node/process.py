"""Run a helper command without blocking the event loop, with a deadline, and reap it whatever happens.

asyncio's own subprocess support starts a thread per child on Python 3.11; a start of a container needs
several children, so this waits on the child's pidfd instead: one file descriptor, no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from node import priority

OUTPUT_BYTES_MAX = 4_000_000
"""Kept of each stream; the rest is read and dropped, so that a talkative child cannot fill our memory."""
_READ_BYTES = 65_536
_REAP_TIMEOUT_S = 2.0
"""After SIGKILL; a child in uninterruptible sleep is left to its pidfd callback."""


class CommandTimeout(Exception):
    """The command did not end in time and was killed."""


class CommandMissing(Exception):
    """The command is not installed."""


@dataclass(frozen=True, slots=True)
class Finished:
    code: int
    """Exit code; negative = killed by that signal."""
    output: bytes
    errors: bytes


class _Stream:
    """One pipe from the child, read as it fills; complete lines are handed to `on_line`."""

    def __init__(self, fd: int, loop: asyncio.AbstractEventLoop, on_line: Callable[[str], None] | None) -> None:
        self._fd, self._loop, self._on_line = fd, loop, on_line
        self._partial = b""
        self.data = bytearray()
        os.set_blocking(fd, False)
        loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        if not self._read_once():
            self._loop.remove_reader(self._fd)

    def _read_once(self) -> bool:
        try:
            chunk = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.data += chunk[: max(0, OUTPUT_BYTES_MAX - len(self.data))]
        if self._on_line is not None:
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            for line in lines:
                self._on_line(line.decode(errors="replace"))
        return bool(chunk)

    def drain(self) -> None:
        """What is in the pipe now. Not until end of file: grandchildren may hold the pipe for ever."""
        self._loop.remove_reader(self._fd)
        with contextlib.suppress(OSError):
            while chunk := os.read(self._fd, _READ_BYTES):
                self.data += chunk[: max(0, OUTPUT_BYTES_MAX - len(self.data))]


class _Child:
    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None,
        pass_fds: tuple[int, ...],
        on_line: Callable[[str], None] | None,
        errors_to: int | None,
        cwd: Path | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            with priority.ordinary():
                self._popen = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if errors_to is None else subprocess.DEVNULL,
                    stderr=subprocess.PIPE if errors_to is None else errors_to,
                    env=None if env is None else dict(env),
                    cwd=cwd,
                    pass_fds=pass_fds,
                    start_new_session=True,  # so that a kill reaches its own children too
                )
        except FileNotFoundError:
            raise CommandMissing(f"{argv[0]} is not installed on this host: install it and retry") from None
        self._pidfd = os.pidfd_open(self._popen.pid)
        self._streams = [
            _Stream(pipe.fileno(), self._loop, on_line)
            for pipe in (self._popen.stdout, self._popen.stderr)
            if pipe is not None
        ]
        self.exited = asyncio.Event()
        self._loop.add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        for stream in self._streams:
            stream.drain()
        for pipe in (self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                pipe.close()
        self._popen.wait()  # returns at once: the pidfd says that it has ended
        self.exited.set()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def finished(self) -> Finished:
        kept = [bytes(stream.data) for stream in self._streams]
        output, errors = kept if kept else (b"", b"")
        return Finished(self._popen.returncode, output, errors)


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
    on_line: Callable[[str], None] | None = None,
    errors_to: int | None = None,
    cwd: Path | None = None,
) -> Finished:
    """Run `argv` to its end. `errors_to` is a file descriptor for stderr; nothing is captured then.
    Raises CommandTimeout (the child and its process group have been killed) and CommandMissing."""
    child = _Child(argv, env=env, pass_fds=pass_fds, on_line=on_line, errors_to=errors_to, cwd=cwd)
    try:
        async with asyncio.timeout(timeout_s):
            await child.exited.wait()
    except TimeoutError:
        raise CommandTimeout(f"{' '.join(argv[:2])} did not finish within {timeout_s:g} s and was killed") from None
    finally:
        if not child.exited.is_set():
            child.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REAP_TIMEOUT_S):
                    await child.exited.wait()
    return child.finished()


async def readable(fd: int) -> None:
    """Wait until `fd` can be read (for a pidfd: until the process has ended)."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
