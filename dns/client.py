"""The agent's end: start the server if none runs, tell it the picture, and again at once if it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dns.changes import EMPTY_DIGEST, Changes, difference, digest_of, whole
from dns.interface import DnsError, Picture
from dns.wire import encode

START_TIMEOUT_S = 10.0
APPLY_TIMEOUT_S = 10.0
RETRY_S = 0.02
REVIVE_MIN_S, REVIVE_MAX_S = 0.05, 5.0
"""Pauses before a server that died is replaced; they double while it dies again within REVIVE_MAX_S."""
REPLY_BYTES_MAX = 1 << 20


class _Connection:
    """To one server process. Calls `on_lost` once when it ends without having been closed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_lost: Callable[[], None]) -> None:
        self._reader = reader
        self._writer = writer
        self._on_lost = on_lost
        self._replies: asyncio.Queue[bytes] = asyncio.Queue()
        self._reading = asyncio.create_task(self._read())

    async def exchange(self, line: bytes) -> dict[str, Any]:
        """Raises OSError, EOFError, TimeoutError."""
        async with asyncio.timeout(APPLY_TIMEOUT_S):
            self._writer.write(line)
            await self._writer.drain()
            raw = await self._replies.get()
        if not raw:
            raise EOFError("connection closed")
        reply: dict[str, Any] = json.loads(raw)
        return reply

    def close(self) -> None:
        self._reading.cancel()
        self._writer.close()

    async def _read(self) -> None:
        raw = b"-"
        while raw:
            try:
                raw = await self._reader.readline()
            except (OSError, ValueError):
                raw = b""
            self._replies.put_nowait(raw)
        self._on_lost()


class NameServerProcess:
    """Implements `NameServer`. One agent speaks to it at a time; calls are served in order."""

    def __init__(self, run_dir: Path, log_path: Path, on_start: Callable[[int], None] = lambda pid: None) -> None:
        """`on_start` is told the process ID of each server that is started."""
        self._on_start = on_start
        self._socket_path = run_dir / "dns.sock"
        self._log_path = log_path
        self._connection: _Connection | None = None
        self._lock = asyncio.Lock()
        self._pid = 0
        self._spawned: subprocess.Popen[bytes] | None = None
        """Starting, one at a time; whether it is the one that will serve is not known yet."""
        self._wanted: Picture | None = None
        self._told: tuple[Picture, int] | None = None
        """The last picture, and its digest. Whether the server still has it, it says itself."""
        self._reviving: asyncio.Task[None] | None = None
        self._pause_s = REVIVE_MIN_S
        self._connected_at_s = 0.0

    @property
    def pid(self) -> int:
        return self._pid

    async def apply(self, picture: Picture) -> None:
        self._wanted = picture
        async with self._lock:
            await self._tell(picture)

    async def stop(self) -> None:
        self._wanted = None
        if self._reviving is not None:
            self._reviving.cancel()
        async with self._lock:
            with contextlib.suppress(OSError, EOFError, TimeoutError):  # whichever serves by now says who it is
                self._forget()
                await self._exchange(whole(Picture(), EMPTY_DIGEST), start=False)
            self._forget()
            self._end_surplus()
            if self._pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGTERM)
                self._pid = 0

    async def _tell(self, picture: Picture) -> None:
        """What changed; where the server does not know the picture before, the whole. Raises DnsError."""
        if self._told is None:  # the server of an earlier agent may have just this picture
            self._told = picture, digest_of(picture)
        before, base = self._told
        changes = difference(before, picture, base)
        self._told = picture, changes.digest
        reply = await self._exchange_surely(changes)
        if reply["digest"] != changes.digest:
            reply = await self._exchange_surely(whole(picture, changes.digest))
        if reply["digest"] != changes.digest:
            self._told = None
            raise DnsError(f"the name server refused: {reply.get('error', 'its picture is another one')}")
        if "error" in reply:
            raise DnsError(f"the name server {reply['error']}")

    async def _exchange_surely(self, changes: Changes) -> dict[str, Any]:
        """Exchange with whatever server runs; one that died meanwhile is replaced. A killed server may hold
        its socket and lock for some milliseconds more, hence the repetition."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_TIMEOUT_S
        while True:
            try:
                return await self._exchange(changes)
            except TimeoutError as error:
                self._forget()
                raise DnsError(f"the name server took no picture within {APPLY_TIMEOUT_S:g} s") from error
            except (OSError, EOFError) as error:
                self._forget()
                if loop.time() > deadline:
                    raise DnsError(f"the name server does not start ({error}); see {self._log_path}") from error
                await asyncio.sleep(RETRY_S)

    async def _exchange(self, changes: Changes, start: bool = True) -> dict[str, Any]:
        if self._connection is None:
            reader, writer = await self._connect(start)
            self._connection = _Connection(reader, writer, self._lost)
            self._connected_at_s = asyncio.get_running_loop().time()
        reply = await self._connection.exchange(encode(changes))
        self._pid = int(reply["pid"])
        self._end_surplus()
        if "digest" not in reply:
            self._forget()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)
            raise ConnectionError("the one that runs is of another version of pyswarm")
        return reply

    async def _connect(self, start: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await self._open()
        except OSError:
            if not start:
                raise
        if self._spawned is None or self._spawned.poll() is not None:
            self._spawned = self._spawn()
        process = self._spawned
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    return await self._open()
                await asyncio.sleep(RETRY_S)
        except asyncio.CancelledError:
            process.terminate()  # it may hang
            raise
        raise ConnectionError(f"the server exited with status {process.returncode}")

    def _end_surplus(self) -> None:
        """Another agent's server was there first. Ours would see that and end, unless that one ends before: then it
        would serve on, unknown to all."""
        process, self._spawned = self._spawned, None
        if process is not None and process.pid != self._pid:
            process.terminate()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self._socket_path, limit=REPLY_BYTES_MAX)

    def _spawn(self) -> subprocess.Popen[bytes]:
        """In a session of its own, so that it outlives the agent."""
        with open(self._log_path, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dns.server", "--socket", str(self._socket_path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._on_start(process.pid)
        return process

    def _forget(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _lost(self) -> None:
        """The server is gone: names must not wait for the next change or audit."""
        self._forget()
        if self._wanted is not None and (self._reviving is None or self._reviving.done()):
            self._reviving = asyncio.create_task(self._revive())

    async def _revive(self) -> None:
        lived_s = asyncio.get_running_loop().time() - self._connected_at_s
        self._pause_s = REVIVE_MIN_S if lived_s > REVIVE_MAX_S else min(REVIVE_MAX_S, self._pause_s * 2)
        await asyncio.sleep(self._pause_s)
        async with self._lock:
            if self._wanted is not None:
                with contextlib.suppress(DnsError):  # the agent's audit tries again, and logs
                    await self._tell(self._wanted)
