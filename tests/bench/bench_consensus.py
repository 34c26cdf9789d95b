"""How fast consensus is: three processes on this machine, real gRPC, real fdatasync.

Run: python -m tests.bench.bench_consensus
Prints commit latency at 1, 64 and 512 entries in flight, idle CPU per process, and failover times.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.consensus_cluster import free_port
from tests.consensus_process import Remote

IDLE_S = 10.0
FAILOVERS = 5


async def _leader(remotes: list[Remote]) -> Remote:
    while True:
        for remote in remotes:
            if (await remote.ask("state", last=1))["leads"]:
                return remote


async def _commits(remotes: list[Remote]) -> None:
    for in_flight, count in ((1, 1500), (64, 6000), (512, 10_000)):
        leader = await _leader(remotes)
        start_s = time.perf_counter()
        latencies = sorted((await leader.ask("measure", count=count, in_flight=in_flight))["latencies_s"])
        took_s = time.perf_counter() - start_s
        p50, p99 = (latencies[int(len(latencies) * part)] * 1e3 for part in (0.5, 0.99))
        print(f"in flight {in_flight:4}: {len(latencies) / took_s:6.0f}/s  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms")


async def _idle(remotes: list[Remote]) -> None:
    leader = await _leader(remotes)
    before = [(await remote.ask("cpu"))["cpu_s"] for remote in remotes]
    await asyncio.sleep(IDLE_S)
    after = [(await remote.ask("cpu"))["cpu_s"] for remote in remotes]
    for remote, start, end in zip(remotes, before, after, strict=True):
        role = "leader  " if remote is leader else "follower"
        print(f"idle {role}: {(end - start) / IDLE_S * 100:.2f} % of a core")


async def _failovers(remotes: list[Remote]) -> None:
    times = []
    for number in range(FAILOVERS):
        leader = await _leader(remotes)
        alive = [remote for remote in remotes if remote is not leader]
        leader.process.kill()
        start_s = time.perf_counter()
        while "error" in await (await _leader(alive)).ask("write", payload=f"failover {number}"):
            pass
        times.append(time.perf_counter() - start_s)
        await leader.kill()
        await leader.start()
        await leader.ask("restart")
    print(f"kill -9 of the leader to the next commit: median {statistics.median(times):.2f} s, max {max(times):.2f} s")


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="consensus-bench-") as directory:
        remotes = [Remote(f"b{number}", free_port(), Path(directory), sys.stderr.buffer) for number in range(3)]
        try:
            for remote in remotes:
                await remote.start()
            await remotes[0].ask("found")
            await _leader(remotes[:1])
            for remote in remotes[1:]:
                await remote.ask("join", via=remotes[0].addr)
            while {(await remote.ask("state", last=1))["members"] for remote in remotes} != {3}:
                await asyncio.sleep(0.05)
            await _idle(remotes)
            await _commits(remotes)
            await _failovers(remotes)
        finally:
            for remote in remotes:
                await remote.kill()


if __name__ == "__main__":
    asyncio.run(main())
