"""How fast consensus is, beside Debian's etcd-server: three members each, the same disk, the same client, one run.

    python -m tests.bench.consensus [--quick] [--json] [--profile FILE] [--only PART ...]

Both sides take 1 KiB random values, unencrypted on loopback, from one client process (Python, gRPC) at the leader; ours
seals its disk besides. Rounds alternate between the sides, figures are medians of the rounds.

How the client sends is what differs, and it gives each side its best that keeps one message per write: ours takes
writes on a bidirectional stream per connection, each acknowledged by its number; etcd has unary calls only. Both get
as many connections as serve them best. Beside it stand the same unary calls to both, and writes that the client itself
merges, at most 128 in one message (etcd: one Txn, its default limit).
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.bench import measure
from tests.bench.consensus_sides import Etcd, OurMember, Ours, Process, cpu_s

STATE_ROWS = 100_000
"""Of 1 KiB: 100 MB."""
FILL_SIZE = 256
TXN_OPERATIONS_MAX = 128
"""etcd's default of --max-txn-ops."""
CONNECTIONS = (1, 4, 16)
PARTS = ("idle", "rates", "failover", "state")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. Times in s."""

    rounds: int
    round_s: float
    extra_rounds: int
    failovers: int
    snapshots: int
    idle_s: float


FULL = Sizes(rounds=5, round_s=2.0, extra_rounds=3, failovers=20, snapshots=3, idle_s=10.0)
QUICK = Sizes(rounds=2, round_s=0.7, extra_rounds=0, failovers=3, snapshots=1, idle_s=4.0)

Row = tuple[str, str, str]


class Bench:
    def __init__(self, sizes: Sizes, ours: Ours, etcd: Etcd, client: Process) -> None:
        self.sizes = sizes
        self.ours = ours
        self.etcd = etcd
        self.client = client
        self.rows: list[Row] = []
        self.results: dict[str, float | None] = {}

    # ---- commits per second

    async def rates(self) -> None:
        for in_flight, aim in ((1, ">= 1.2"), (64, ">= 1.5"), (1024, ">= 1.5")):
            ours = await self._best(self._our_load, {"in_flight": in_flight, "stream": True})
            etcd = await self._best(self._etcd_load, {"in_flight": in_flight})
            titles = (f"ratio_{in_flight}", f"{in_flight} in flight", aim)
            await self._compare(titles, self.sizes.rounds, ours, etcd)
        if not self.sizes.extra_rounds:
            return
        for in_flight in (1, 64, 1024):
            load = {"in_flight": in_flight}
            titles = (f"ratio_{in_flight}_unary", f"{in_flight}, unary calls to both", "")
            await self._compare(titles, self.sizes.extra_rounds, load, load)
        for in_flight in (64, 1024):
            load = {
                "in_flight": in_flight,
                "size": min(in_flight, TXN_OPERATIONS_MAX),
                "in_order": True,
            }  # no key twice
            titles = (f"ratio_{in_flight}_merged", f"{in_flight}, merged by both clients", "")
            await self._compare(titles, self.sizes.extra_rounds, load, load)

    async def _best(self, run: Callable[..., Awaitable[dict[str, Any]]], load: dict[str, Any]) -> dict[str, Any]:
        """With as many connections as serve this side best."""
        if load["in_flight"] == 1:
            return load
        rates = {count: (await run(0.5, connections=count, **load))["per_s"] for count in CONNECTIONS}
        return load | {"connections": max(rates, key=lambda count: rates[count])}

    async def _our_load(self, seconds: float, **load: Any) -> dict[str, Any]:
        addr = await self.ours.leader_addr()
        return await self.client.ask("load", side="ours", addr=addr, seconds=seconds, **load)

    async def _etcd_load(self, seconds: float, **load: Any) -> dict[str, Any]:
        addr = await self.etcd.leader_addr()
        return await self.client.ask("load", side="etcd", addr=addr, seconds=seconds, **load)

    async def _compare(
        self,
        titles: tuple[str, str, str],
        rounds: int,
        our_load: dict[str, Any],
        etcd_load: dict[str, Any],
    ) -> None:
        """`titles`: key of the ratio, what was compared, its aim."""
        key, name, aim = titles
        sides = (("pyswarm", self._our_load, our_load), ("etcd", self._etcd_load, etcd_load))
        found: dict[str, list[dict[str, Any]]] = {"pyswarm": [], "etcd": []}
        for number in range(-1, rounds):
            for side, run, load in sides if number % 2 else reversed(sides):
                if number < 0:
                    await run(0.3, **load)  # warms up
                else:
                    found[side].append(await run(self.sizes.round_s, **load))
        rates = {side: statistics.median(result["per_s"] for result in results) for side, results in found.items()}
        self.results[key] = rates["pyswarm"] / rates["etcd"]
        for side, results in found.items():
            self.results[f"{key}.{side}_per_s"] = rates[side]
            p50, p99, cpu = (
                statistics.median(result[field] for result in results) for field in ("p50_ms", "p99_ms", "cpu_s")
            )
            busy = cpu / statistics.median(result["took_s"] for result in results)
            text = f"{rates[side]:.0f}/s, p50 {p50:.2f}, p99 {p99:.2f} ms, client {busy:.0%}"
            self.rows.append((f"{name}: {side}", text, ""))
        self.rows.append((f"{name}: ratio", f"{self.results[key]:.2f}", aim))

    # ---- idle

    async def idle(self) -> None:
        await asyncio.sleep(1.0)  # what the start left to do
        before = {member: cpu_s(member.pid) for member in self.ours.members}
        start_s = time.monotonic()
        await asyncio.sleep(self.sizes.idle_s)
        took_s = time.monotonic() - start_s
        leader = await self.ours.leader()
        percent = {member: (cpu_s(member.pid) - before[member]) / took_s * 100 for member in self.ours.members}
        self.results["idle_cpu_percent"] = max(percent.values())
        self.results["idle_cpu_percent.leader"] = percent[leader]
        text = f"{percent[leader]:.2f} % (leader), {max(percent.values()):.2f} % (highest)"
        self.rows.append(("idle CPU of a manager", text, "<= 1 %"))

    # ---- failover

    async def failover(self) -> None:
        times = []
        for _ in range(self.sizes.failovers):
            leader = await self.ours.leader()
            alive = [member.addr for member in self.ours.members if member is not leader]
            await self.client.ask("first_commit", side="ours", addrs=[leader.addr])
            start_s = time.monotonic()
            await leader.kill()
            committed = await self.client.ask("first_commit", side="ours", addrs=alive)
            times.append(committed["at_s"] - start_s)
            await leader.start()
            await leader.ask("restart")
            await self.ours.settle()
        median, worst = statistics.median(times), max(times)
        self.results["failover_median_s"] = median
        self.results["failover_median_s.max"] = worst
        text = f"median {median:.2f} s, max {worst:.2f} s of {len(times)}"
        self.rows.append(("kill -9 of the leader to the next commit", text, "<= 0.7 s"))

    # ---- 100 MB

    async def state(self) -> None:
        await self._our_load(
            100.0, in_flight=4 * FILL_SIZE, size=FILL_SIZE, keys=STATE_ROWS, in_order=True, count=STATE_ROWS
        )
        await self.ours.settle()
        rows = (await (await self.ours.leader()).ask("state"))["rows"]
        assert rows >= STATE_ROWS, rows
        await self._quiet()
        quiet = await self._our_load(3.0, in_flight=1, stream=True)
        gaps = [await self._gap_during_snapshots() for _ in range(self.sizes.snapshots)]
        self.results["snapshot_pause_ms"] = max(gaps)
        self.results["snapshot_pause_ms.without_snapshot"] = quiet["gap_ms"]
        text = f"{max(gaps):.0f} ms (of {len(gaps)}; {quiet['gap_ms']:.0f} ms without)"
        self.rows.append(("snapshots of 100 MB on all three: longest pause", text, "<= 50 ms"))
        await self._restarts()

    async def _quiet(self) -> None:
        """Until no snapshot is being written, for some time."""
        counts: list[int] = []
        while len(counts) < 5 or len(set(counts[-5:])) > 1:
            await asyncio.sleep(0.3)
            counts.append(sum([(await member.ask("state"))["snapshots"] for member in self.ours.members]))

    async def _gap_during_snapshots(self) -> float:
        """All members at once, as when the log has grown: longest time without an acknowledgement, ms."""
        loading = asyncio.create_task(self._our_load(4.0, in_flight=1, stream=True))
        await asyncio.sleep(0.3)
        before = [(await member.ask("state"))["snapshots"] for member in self.ours.members]
        for member in self.ours.members:
            await member.ask("snapshot")
        for member, count in zip(self.ours.members, before, strict=True):
            while (await member.ask("state"))["snapshots"] <= count:
                await asyncio.sleep(0.05)
        if loading.done():
            raise RuntimeError("the snapshots took longer than the load: the pause is not known")
        return float((await loading)["gap_ms"])

    async def _restarts(self) -> None:
        leader = await self.ours.leader()
        times = [await self._restart([member]) for member in self.ours.members if member is not leader]
        together = await self._restart(self.ours.members)
        self.results["restart_s"] = max(times)
        self.results["restart_s.all_at_once"] = together
        text = f"{max(times):.2f} s ({together:.2f} s for all three at once)"
        self.rows.append(("kill -9, restart to ready with 100 MB", text, "<= 3 s"))

    async def _restart(self, members: list[OurMember]) -> float:
        """From starting the processes until each knows the leader and has applied all that was stored, s."""
        applied = (await (await self.ours.leader()).ask("state"))["applied"]
        for member in members:
            await member.kill()
        start_s = time.monotonic()

        async def back(member: OurMember) -> None:
            await member.start()
            state = await member.ask("restart")
            while not state["knows_leader"] or state["applied"] < applied:
                await asyncio.sleep(0.01)
                state = await member.ask("state")

        await asyncio.gather(*(back(member) for member in members))
        return time.monotonic() - start_s


async def run(arguments: argparse.Namespace, directory: Path, log: IO[bytes] | None) -> Bench:
    ours = Ours(directory, log, arguments.profile)
    etcd = Etcd(directory, log)
    client = Process(["tests.bench.consensus_client"], log)
    bench = Bench(QUICK if arguments.quick else FULL, ours, etcd, client)
    parts: dict[str, Callable[[], Awaitable[None]]] = {
        "idle": bench.idle,
        "rates": bench.rates,
        "failover": bench.failover,
        "state": bench.state,
    }
    try:
        await client.start()
        await ours.start()
        for name in PARTS:
            if name in arguments.only:
                if name == "rates":
                    await etcd.start()
                await parts[name]()
                await etcd.stop()
        if arguments.profile:
            await ours.members[0].finish()
    finally:
        for each in (ours, etcd):
            await each.stop()
        await client.kill()
        measure.table(bench.rows)  # what is known when something fails, too
    return bench


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: under a minute")
    parser.add_argument("--profile", default="", help="write a cProfile of the first leader to this file")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure only these")
    parser.add_argument("--directory", default=None, help="where the files of both sides go (default: the system's)")
    arguments = parser.parse_args()
    if "rates" in arguments.only and shutil.which("etcd") is None:
        parser.error("no etcd found: apt install etcd-server")
    with tempfile.TemporaryDirectory(prefix="consensus-bench-", dir=arguments.directory) as directory:
        bench = asyncio.run(run(arguments, Path(directory), sys.stderr.buffer))
    measure.finish(arguments.json, bench.results)


if __name__ == "__main__":
    main()
