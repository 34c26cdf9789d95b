"""The agent's end: start the server if none runs, tell it the picture."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from dns.interface import DnsError, Picture
from dns.wire import encode

START_TIMEOUT_S = 10.0
APPLY_TIMEOUT_S = 10.0
RETRY_S = 0.02


class NameServerProcess:
    """Implements `NameServer`. One agent speaks to it at a time; calls are served in order."""

    def __init__(self, run_dir: Path, log_path: Path) -> None:
        self._socket_path = run_dir / "dns.sock"
        self._log_path = log_path
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._lock = asyncio.Lock()
        self._pid = 0

    @property
    def pid(self) -> int:
        return self._pid

    async def apply(self, picture: Picture) -> None:
        line = encode(picture)
        async with self._lock:
            reply = await self._exchange_surely(line)
        if "error" in reply:
            raise DnsError(f"the name server refused: {reply['error']}")

    async def stop(self) -> None:
        async with self._lock:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                if not self._pid and self._socket_path.exists():
                    await self._exchange(encode(Picture()), start=False)
            self._forget()
            if self._pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGTERM)
                self._pid = 0

    async def _exchange_surely(self, line: bytes) -> dict[str, object]:
        """Exchange with whatever server runs; one that died meanwhile is replaced. A killed server may hold
        its socket and lock for some milliseconds more, hence the repetition."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_TIMEOUT_S
        while True:
            try:
                return await self._exchange(line)
            except TimeoutError as error:
                self._forget()
                raise DnsError(f"the name server took no picture within {APPLY_TIMEOUT_S:g} s") from error
            except (OSError, EOFError) as error:
                self._forget()
                if loop.time() > deadline:
                    raise DnsError(f"the name server does not start ({error}); see {self._log_path}") from error
                await asyncio.sleep(RETRY_S)

    async def _exchange(self, line: bytes, start: bool = True) -> dict[str, object]:
        if self._streams is None:
            self._streams = await self._connect(start)
        reader, writer = self._streams
        async with asyncio.timeout(APPLY_TIMEOUT_S):
            writer.write(line)
            await writer.drain()
            raw = await reader.readline()
        if not raw:
            raise EOFError("connection closed")
        reply: dict[str, object] = json.loads(raw)
        self._pid = int(str(reply["pid"]))
        return reply

    async def _connect(self, start: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_unix_connection(self._socket_path)
        except OSError:
            if not start:
                raise
        process = self._spawn()
        while process.poll() is None:
            with contextlib.suppress(OSError):
                return await asyncio.open_unix_connection(self._socket_path)
            await asyncio.sleep(RETRY_S)
        raise ConnectionError(f"the server exited with status {process.returncode}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        """In a session of its own, so that it outlives the agent."""
        with open(self._log_path, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dns.server", "--socket", str(self._socket_path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _forget(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
