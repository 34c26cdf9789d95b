"""Processes of the consensus benchmark: our three members, etcd's three, and one client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import grpc.aio

from tests.bench import puts
from tests.consensus_cluster import free_port

MEMBERS = 3
ANSWER_TIMEOUT_S = 120.0
READY_TIMEOUT_S = 60.0
ROOT = Path(__file__).parent.parent.parent


def cpu_s(pid: int) -> float:
    """Of all threads of a process, exact to the nanosecond (user and system)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


class Process:
    """A child that answers each line of JSON with one."""

    def __init__(self, arguments: list[str], log: IO[bytes] | None) -> None:
        self._arguments = arguments
        self._log = log

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log if self._log is not None else asyncio.subprocess.DEVNULL,
            cwd=ROOT,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, command: str, **fields: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command} | fields).encode() + b"\n")
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await self._process.stdout.readline()
        if not line:
            raise ConnectionError(f"{self._arguments[0]} has died")
        reply: dict[str, Any] = json.loads(line)
        return reply

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def finish(self) -> None:
        """It ends by itself when nobody will ask it any more."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


class OurMember(Process):
    def __init__(self, number: int, directory: Path, log: IO[bytes] | None, profile: str = "") -> None:
        port = free_port()
        self.addr = f"127.0.0.1:{port}"
        arguments = ["tests.bench.consensus_server", f"b{number}", str(port), str(directory)]
        super().__init__([*arguments, profile] if profile else arguments, log)

    async def until(self, **wanted: object) -> dict[str, Any]:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            state = await self.ask("state")
            if all(state.get(key) == value for key, value in wanted.items()):
                return state
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{self.addr}: {state} never became {wanted}")
            await asyncio.sleep(0.01)


class Ours:
    name = "pyswarm"

    def __init__(self, directory: Path, log: IO[bytes] | None, profile: str = "") -> None:
        self.members = [OurMember(number, directory, log, profile if not number else "") for number in range(MEMBERS)]

    async def start(self) -> None:
        first, *others = self.members
        for member in self.members:
            await member.start()
        await first.ask("found")
        await first.until(leads=True)
        for member in others:
            await member.ask("join", via=first.addr)
        for member in self.members:
            await member.until(members=MEMBERS)

    async def leader(self) -> OurMember:
        while True:
            for member in self.members:
                if (await member.ask("state")).get("leads"):
                    return member
            await asyncio.sleep(0.01)

    async def leader_addr(self) -> str:
        return (await self.leader()).addr

    async def settle(self) -> None:
        """Until every member has applied what the leader has."""
        applied = (await (await self.leader()).ask("state"))["applied"]
        for member in self.members:
            while (await member.ask("state"))["applied"] < applied:
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        for member in self.members:
            await member.kill()


class Etcd:
    name = "etcd"

    def __init__(self, directory: Path, log: IO[bytes] | None) -> None:
        self._log = log
        ports = [(free_port(), free_port()) for _ in range(MEMBERS)]
        cluster = ",".join(f"e{number}=http://127.0.0.1:{peer}" for number, (_, peer) in enumerate(ports))
        self.addrs = [f"127.0.0.1:{client}" for client, _ in ports]
        self._commands = []
        for number, (client, peer) in enumerate(ports):
            words = ["etcd", "--name", f"e{number}", "--data-dir", str(directory / f"etcd{number}")]
            words += ["--listen-client-urls", f"http://127.0.0.1:{client}"]
            words += ["--advertise-client-urls", f"http://127.0.0.1:{client}"]
            words += ["--listen-peer-urls", f"http://127.0.0.1:{peer}"]
            words += ["--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"]
            words += ["--initial-cluster", cluster, "--initial-cluster-state", "new", "--logger", "zap"]
            self._commands.append([*words, "--log-level", "error", "--quota-backend-bytes", str(8 << 30)])
        self._processes: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        log = self._log if self._log is not None else asyncio.subprocess.DEVNULL
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}
        for command in self._commands:
            process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=environment)
            self._processes.append(process)
        await self.leader_addr()

    async def leader_addr(self) -> str:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            for addr in self.addrs:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async with grpc.aio.insecure_channel(addr) as channel:
                        status: Any = channel.unary_unary(puts.ETCD_STATUS)
                        if puts.etcd_leads(await status(b"", timeout=1)):
                            return addr
            await asyncio.sleep(0.1)
        raise TimeoutError("etcd has no leader")

    async def stop(self) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        self._processes.clear()
