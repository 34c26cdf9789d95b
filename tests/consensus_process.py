"""One manager's consensus as a process of its own, told what to do by lines on standard input (see `Remote`).

Run: python -m tests.consensus_process NODE_ID PORT DIRECTORY
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from swarm.errors import SwarmError
from tests.consensus_cluster import Manager

ANSWER_TIMEOUT_S = 30.0
LINE_BYTES_MAX = 16 << 20


class Remote:
    """The parent's side."""

    def __init__(self, node_id: str, port: int, directory: Path, log: IO[bytes] | None = None) -> None:
        self.node_id = node_id
        self.addr = f"127.0.0.1:{port}"
        self.log = log
        self._arguments = [node_id, str(port), str(directory)]

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.consensus_process",
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=(self.log if self.log is not None else asyncio.subprocess.DEVNULL),
            limit=LINE_BYTES_MAX,
            cwd=Path(__file__).parent.parent,
        )
        await self.ask("ready")

    async def ask(self, command: str, **fields: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"command": command} | fields).encode() + b"\n")
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await self.process.stdout.readline()
        if not line:
            raise ConnectionError(f"{self.node_id} has died")
        reply: dict[str, Any] = json.loads(line)
        return reply

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


async def _perform(manager: Manager, request: dict[str, Any]) -> dict[str, Any]:
    match request["command"]:
        case "found":
            await manager.run([manager.me])
        case "join":
            from swarm.consensus.grpc_transport import ask_to_join

            await manager.run(await ask_to_join(manager.open_channel, request["via"], manager.me, 10))
        case "restart":
            await manager.run([])
        case "write":
            try:
                await manager.node.propose(request["payload"].encode(), request.get("timeout_s", 5.0))
            except SwarmError as error:
                return {"error": type(error).__name__}
        case "measure":
            return {"latencies_s": await _measure(manager, request["count"], request["in_flight"])}
        case "state":
            node = manager.node
            return {
                "leads": node.is_leader(),
                "members": len(node.members()),
                "entries": [entry.decode() for entry in manager.machine.entries[-request.get("last", 1 << 30) :]],
            }
        case "cpu":
            times = os.times()
            return {"cpu_s": times.user + times.system}
    return {}


async def _measure(manager: Manager, count: int, in_flight: int) -> list[float]:
    """Seconds from proposing to applied, per entry of 1 KiB."""
    latencies: list[float] = []

    async def worker() -> None:
        while len(latencies) < count:
            start_s = time.perf_counter()
            await manager.node.propose(os.urandom(512).hex().encode(), 10)
            latencies.append(time.perf_counter() - start_s)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return latencies


async def _main(node_id: str, port: int, directory: Path) -> None:
    manager = Manager(node_id, directory, port=port)
    await manager.listen()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        reply = await _perform(manager, json.loads(line))
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    import logging

    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
