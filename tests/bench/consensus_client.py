"""The client of the consensus benchmark: one process for both sides, which keeps writes in flight and times them.

Commands are lines of JSON on standard input, one answer each on standard output.
Run: python -m tests.bench.consensus_client
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc.aio

from tests.bench import puts

CALL_TIMEOUT_S = 10.0
RETRY_S = 0.005
TRY_TIMEOUT_S = 1.0
"""For a member that has just lost its leader: it may hold the write until it knows."""


class Load:
    """One measurement: `seconds` of closed loop. Keys are random below `keys`, or 0, 1, 2, ... if `in_order`."""

    def __init__(self, seconds: float, keys: int, in_order: bool, count: int | None) -> None:
        self.end_s = time.perf_counter() + seconds
        self.latencies_s: list[float] = []
        self.acknowledged_at_s: list[float] = []
        self._keys = keys
        self._numbers = itertools.count() if in_order else None
        self._left = count

    def more(self) -> bool:
        return time.perf_counter() < self.end_s and (self._left is None or self._left > 0)

    def put(self) -> bytes:
        if self._left is not None:
            self._left -= 1
        key = random.randrange(self._keys) if self._numbers is None else next(self._numbers) % self._keys
        return puts.put(key)

    def acknowledged(self, sent_s: float, count: int = 1) -> None:
        now_s = time.perf_counter()
        self.latencies_s.extend([now_s - sent_s] * count)
        self.acknowledged_at_s.append(now_s)


Call = Callable[..., Awaitable[bytes]]


async def _unary(
    load: Load, calls: Sequence[Call], encode: Callable[[list[bytes]], bytes], groups: int, size: int
) -> None:
    """`groups` calls in flight, each with `size` puts."""

    async def worker(call: Call) -> None:
        while load.more():
            message = encode([load.put() for _ in range(size)])
            sent_s = time.perf_counter()
            await call(message, timeout=CALL_TIMEOUT_S)
            load.acknowledged(sent_s, size)

    await asyncio.gather(*(worker(calls[number % len(calls)]) for number in range(groups)))


async def _stream(load: Load, channel: grpc.aio.Channel, in_flight: int) -> None:
    """One message for each put, `in_flight` of them unacknowledged."""
    call: Any = channel.stream_stream(puts.OUR_STREAM)()
    sent_s: dict[int, float] = {}
    numbers = itertools.count()

    async def send() -> None:
        number = next(numbers)
        message = puts.frame(number, load.put())
        sent_s[number] = time.perf_counter()
        await call.write(message)

    for _ in range(in_flight):
        await send()
    while sent_s:
        data = await call.read()
        if data is grpc.aio.EOF:
            raise ConnectionError(f"the stream ended: {await call.code()} {await call.details()}")
        stored = [number for (number,) in puts.KEY.iter_unpack(data)]
        for number in stored:
            load.acknowledged(sent_s.pop(number))
        for _ in stored:
            if load.more():
                await send()
    await call.done_writing()
    call.cancel()


def _ours(bodies: list[bytes]) -> bytes:
    return b"".join(puts.frame(0, body) for body in bodies)


def _etcd(bodies: list[bytes]) -> bytes:
    return puts.etcd_put(bodies[0]) if len(bodies) == 1 else puts.etcd_txn(bodies)


class Client:
    def __init__(self) -> None:
        self._channels: dict[tuple[str, int], grpc.aio.Channel] = {}

    def _channel(self, addr: str, number: int = 0) -> grpc.aio.Channel:
        """A connection of its own for each number."""
        if (addr, number) not in self._channels:
            options = [
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 100),
            ]
            self._channels[addr, number] = grpc.aio.insecure_channel(addr, options=options)
        return self._channels[addr, number]

    async def load(
        self,
        *,
        side: str,
        addr: str,
        in_flight: int,
        seconds: float,
        stream: bool = False,
        size: int = 1,
        connections: int = 1,
        keys: int = 4096,
        in_order: bool = False,
        count: int | None = None,
    ) -> dict[str, Any]:
        """`size`: puts in one message. Answers with the writes per second, latencies (ms), the longest time without an
        acknowledgement (ms) and the CPU seconds of this process."""
        load = Load(seconds, keys, in_order, count)
        channels = [self._channel(addr, number) for number in range(connections)]
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        gc.collect()
        if stream:
            shares = [in_flight // connections] * connections
            await asyncio.gather(*(_stream(load, *each) for each in zip(channels, shares, strict=True)))
        elif side == "etcd":
            method = puts.ETCD_PUT if size == 1 else puts.ETCD_TXN
            calls: list[Call] = [channel.unary_unary(method) for channel in channels]
            await _unary(load, calls, _etcd, in_flight // size, size)
        else:
            calls = [channel.unary_unary(puts.OUR_PUT) for channel in channels]
            await _unary(load, calls, _ours, in_flight // size, size)
        took_s = load.acknowledged_at_s[-1] - start_s
        latencies = sorted(load.latencies_s)
        times = [start_s, *load.acknowledged_at_s]
        gap_s, gap_at_s = max((later - sooner, later) for sooner, later in itertools.pairwise(times))
        return {
            "writes": len(latencies),
            "per_s": len(latencies) / took_s,
            "p50_ms": latencies[len(latencies) // 2] * 1e3,
            "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
            "gap_ms": gap_s * 1e3,
            "gap_at_s": gap_at_s - start_s,
            "cpu_s": time.process_time() - start_cpu_s,
            "took_s": took_s,
        }

    async def first_commit(self, *, side: str, addrs: Sequence[str]) -> dict[str, Any]:
        """Ask the members in turn until one stores a write; when that was, on the machine's monotonic clock (s)."""
        for addr in itertools.cycle(addrs):
            channel = self._channel(addr)
            method, message = (puts.ETCD_PUT, _etcd) if side == "etcd" else (puts.OUR_PUT, _ours)
            try:
                call: Any = channel.unary_unary(method)
                await call(message([puts.put(0)]), timeout=TRY_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(RETRY_S)
                continue
            return {"at_s": time.monotonic(), "addr": addr}
        raise AssertionError("unreachable")


async def _main() -> None:
    client = Client()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        request = json.loads(line)
        method = getattr(client, request.pop("command"))
        sys.stdout.write(json.dumps(await method(**request)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    asyncio.run(_main())
