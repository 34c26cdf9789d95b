"""What attaching a task and changing a service's backends cost: `python -m tests.bench.overlay [--json]` (root).

One host with 100 task namespaces; first 1 VIP, then 1,000 VIPs of 10 backends each. A real name server is told of each
task, with the names of 10 services. Nothing is kept afterwards.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable
from dataclasses import replace

from dns.client import NameServerProcess
from dns.interface import NetworkNames, Picture, Sandbox, ServiceNames
from overlay.interface import HostState, PublishedPort, RemoteEndpoint, Vip
from overlay.reconcile import AUDIT_PERIOD_S
from tests.overlay_lab import NET, OverlayLab

TASKS = 100
SERVICES = 1000
BACKENDS = 10
REPEATS = 10
NAMED = 10
WIDE = replace(NET, subnet="10.77.0.0/16", gateway="10.77.0.1", subnet6="", gateway6="")


def address(number: int) -> str:
    return f"10.77.{number // 200 + 1}.{number % 200 + 2}"


def services(count: int, backends: int) -> tuple[Vip, ...]:
    return tuple(
        Vip(
            WIDE.network_id,
            f"10.77.{200 + number // 200}.{number % 200 + 2}",
            tuple(address((number + index) % 1000) for index in range(backends)),
        )
        for number in range(count)
    )


async def took_ms(work: Awaitable[object]) -> float:
    start_s = time.perf_counter()
    await work
    return (time.perf_counter() - start_s) * 1000


async def timed(lab: OverlayLab, state: HostState) -> float:
    return await took_ms(lab.hosts[0].network.apply(state))


async def attach_all(lab: OverlayLab, prefix: str, count: int, first: int) -> list[float]:
    host = lab.hosts[0]
    return [await took_ms(lab.task(host, f"{prefix}{n}", (WIDE, address(first + n)))) for n in range(count)]


async def name_all(lab: OverlayLab, server: NameServerProcess) -> list[float]:
    """The name server is told of one attached task after the other."""
    services = tuple(ServiceNames((f"web{n}",), f"10.77.200.{n + 2}", (address(n),)) for n in range(NAMED))
    networks = (NetworkNames(WIDE.network_id, "wide", False, services, ()),)
    boxes = tuple(Sandbox(name, str(path), (WIDE.network_id,)) for name, (_, path, _) in lab.tasks.items())
    await server.apply(Picture(networks, boxes[:1]))
    return [await took_ms(server.apply(Picture(networks, boxes[:count]))) for count in range(2, len(boxes) + 1)]


async def changes(lab: OverlayLab, base: HostState, vips: tuple[Vip, ...]) -> list[float]:
    """One service alternately loses and gets back one backend."""
    less = (replace(vips[0], backends=vips[0].backends[:-1]), *vips[1:])
    await lab.hosts[0].network.apply(replace(base, vips=less))
    return [await timed(lab, replace(base, vips=less if number % 2 else vips)) for number in range(REPEATS)]


async def measure() -> dict[str, float]:
    lab = OverlayLab()
    host = lab.hosts[0]
    server = NameServerProcess(lab.directory, lab.directory / "dns.log")
    try:
        few, many = services(1, 3), services(SERVICES, BACKENDS)
        base = lab.state(host, networks=(WIDE,))
        await host.network.apply(replace(base, vips=few))
        await attach_all(lab, "warm", 1, 999)
        attach_ms = await attach_all(lab, "t", TASKS, 0)
        name_ms = await name_all(lab, server)
        await server.stop()
        few_ms = await changes(lab, base, few)
        growing_ms = [await timed(lab, replace(base, vips=services(1, count))) for count in range(10, 30)]
        load_ms = await timed(lab, replace(base, vips=many))
        many_ms = await changes(lab, base, many)
        last = replace(base, vips=many)
        await host.network.apply(last)
        unchanged_ms = await timed(lab, last)
        full_ms = await attach_all(lab, "f", 10, 500)
        host.now_s[0] += AUDIT_PERIOD_S
        audit_ms = await timed(lab, last)
        ends = tuple(RemoteEndpoint(WIDE.network_id, address(number), "node2") for number in range(1000))
        endpoints_ms = await timed(lab, replace(last, endpoints=ends))
        one_ms = await timed(lab, replace(last, endpoints=ends[:-1]))
        ports = (PublishedPort("tcp", 8000, tuple((address(number), 80) for number in range(256))),)
        publish_ms = await timed(lab, replace(last, endpoints=ends[:-1], published=ports))
        start_s = time.perf_counter()
        await asyncio.gather(*(host.network.detach(f"t{number}") for number in range(TASKS)))
        detach_ms = (time.perf_counter() - start_s) * 1000 / TASKS
    finally:
        await server.stop()
        await lab.close()
    return {
        "attach_ms": statistics.median(attach_ms),
        "attach_least_ms": min(attach_ms),
        "attach_p90_ms": statistics.quantiles(attach_ms, n=10)[8],
        "name_ms": statistics.median(name_ms),
        "attach_1000_vips_ms": statistics.median(full_ms),
        "detach_100_at_once_each_ms": detach_ms,
        "backend_change_100_tasks_1_vip_ms": statistics.median(few_ms),
        "backend_added_100_tasks_ms": statistics.median(growing_ms),
        "backend_change_100_tasks_1000_vips_ms": statistics.median(many_ms),
        "backend_change_least_ms": min(many_ms),
        "load_1000_vips_100_tasks_ms": load_ms,
        "apply_unchanged_ms": unchanged_ms,
        "audit_110_tasks_1000_vips_ms": audit_ms,
        "endpoints_1000_ms": endpoints_ms,
        "endpoint_change_ms": one_ms,
        "publish_256_backends_ms": publish_ms,
    }


def main() -> None:
    found = asyncio.run(measure())
    for name, value in found.items():
        print(f"{name.removesuffix('_ms').replace('_', ' '):42s} {value:9.2f} ms")
    if "--json" in sys.argv:
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
