"""The network of pyswarm beside what it is compared with, all in one run on this machine (root, Debian 12).

    python -m tests.bench.network [--quick] [--json] [--only PART ...]

| row | ours | compared with |
|---|---|---|
| attach | one task made, wired and named on a host that knows 10 services | Docker's documented figure, not run here |
| iperf3 | two tasks of different hosts, over the overlay | the same two namespaces on a plain bridge |
| DNS hits, misses | `dns.server` | unbound, dnsmasq (`tests.bench.names`) |
| new connections | published port; VIP | the tasks' addresses over the overlay, as many hops, no translation |
| keep-alive | published port | likewise |
| one backend changes | one of 1,000 services x 10 backends known to a host with 100 tasks | - |
| HAProxy | published port | HAProxy of Debian in TCP mode in front of the same tasks |
| endpoint change | its commit until the last of five hosts of a lab serves the new set | - |

The sides of a comparison take turns; a ratio is the median of the rounds' ratios. `tests/bench/traffic.py` says what
the ways are, `propagation.py` how the last row is seen. Load runs inside namespaces made for it, with 24 connections
for a second at a time: many short rounds, since the machine may be busy with other things as well. What is missing of
Debian's packages is installed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from tests.bench import measure, names, overlay, propagation
from tests.bench.traffic import Load, Traffic
from tests.labs import load_web_image

PACKAGES = {"iperf3": "iperf3", "wrk": "wrk", "haproxy": "haproxy", "nginx": "nginx-light"}
"""Command -> Debian's package."""
DOCKER_ATTACH_MS = (54, 91)
"""Docker 20.10.24 on a machine such as this, two runs: (scale 10 -> 100 with an overlay - the same without) / 90."""
PARTS = ("attach", "dns", "traffic", "propagation")
KEYS = (
    "attach_ms",
    "overlay_ratio",
    "dns_hit_vs_unbound",
    "dns_miss_vs_dnsmasq",
    "published_cps_ratio",
    "vip_cps_ratio",
    "published_keepalive_ratio",
    "backend_change_ms",
    "haproxy_cps_ratio",
    "propagation_p99_ms",
)

T = TypeVar("T")

Results = dict[str, float]
Row = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Times in s. The first round of traffic warms up and is not counted."""

    rounds: int
    name_rounds: int
    load_s: int
    steps: int
    """Of the propagation: two changes each."""


FULL = Sizes(rounds=16, name_rounds=9, load_s=1, steps=110)
QUICK = Sizes(rounds=4, name_rounds=3, load_s=1, steps=12)
LOADS_PER_ROUND = 7


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def attach_rows(results: Results) -> list[Row]:
    found = asyncio.run(overlay.measure())
    results["attach_ms"] = found["attach_ms"] + found["name_ms"]
    all_ms, least_ms = found["backend_change_100_tasks_1000_vips_ms"], found["backend_change_least_ms"]
    results["backend_change_ms"] = all_ms / overlay.TASKS
    low, high = DOCKER_ATTACH_MS
    return [
        ("attach one task", f"{results['attach_ms']:.2f} ms", "<= 3 ms"),
        ("  of that the kernel", f"{found['attach_ms']:.2f} (least {found['attach_least_ms']:.2f}) ms", ""),
        ("  of that the name server", f"{found['name_ms']:.2f} ms", ""),
        ("  beside 1,000 services x 10", f"{found['attach_1000_vips_ms']:.2f} ms", ""),
        ("  Docker, documented, not run here", f"{low} to {high} ms", ""),
        ("one backend changes, per namespace", f"{results['backend_change_ms']:.3f} ms", "<= 1 ms"),
        ("  all 100 namespaces", f"{all_ms:.1f} (least {least_ms:.1f}) ms", "<= 50 ms"),
        ("  the same with 1 service", f"{found['backend_change_100_tasks_1_vip_ms']:.1f} ms", "flat"),
    ]


def dns_rows(results: Results, sizes: Sizes) -> list[Row]:
    hits, misses = names.hits(sizes.name_rounds), names.misses(sizes.name_rounds)
    results["dns_hit_vs_unbound"] = hits[names.OURS][0] / hits[names.UNBOUND][0]
    results["dns_miss_vs_dnsmasq"] = misses[names.OURS][0] / misses[names.DNSMASQ][0]
    return [
        ("DNS hits, ours / unbound", f"{results['dns_hit_vs_unbound']:.2f}", ">= 1.0"),
        *((f"  {name}", f"{rate:,.0f}/s, CPU {cpu_us:.1f} us", "") for name, (rate, cpu_us) in hits.items()),
        ("DNS first-time names, ours / dnsmasq", f"{results['dns_miss_vs_dnsmasq']:.2f}", ">= 0.5"),
        *((f"  {name}", f"{rate:,.0f}/s, CPU {cpu_us:.1f} us", "") for name, (rate, cpu_us) in misses.items()),
    ]


async def loads(sizes: Sizes) -> tuple[list[list[float]], list[list[list[Load]]]]:
    """Gbit/s of (bridge, overlay) per round; and per comparison the rounds' loads, in the order of `groups`."""
    speeds: list[list[float]] = []
    async with Traffic(sizes.rounds * LOADS_PER_ROUND) as traffic:
        seconds = sizes.load_s
        groups: list[list[Callable[[], Load]]] = [
            [partial(way, seconds) for way in (traffic.outside_direct, traffic.published, traffic.haproxy)],
            [partial(way, seconds) for way in (traffic.inside_direct, traffic.vip)],
            [partial(way, seconds, keep=True) for way in (traffic.outside_direct, traffic.published)],
        ]
        found: list[list[list[Load]]] = [[] for _ in groups]
        ways = [partial(way, seconds) for way in (traffic.bridge_gbit_s, traffic.overlay_gbit_s)]
        for number in range(sizes.rounds):
            speeds.append(in_turn(ways, number))
            for group, done in zip(groups, found, strict=True):
                done.append(in_turn(group, number))
    return speeds[1:], [done[1:] for done in found]


def in_turn(arms: Sequence[Callable[[], T]], number: int) -> list[T]:
    """Run each arm once, in an order that moves on from round to round; results in the order of the arms."""
    first = number % len(arms)
    done = {index: arms[index]() for index in [*range(first, len(arms)), *range(first)]}
    return [done[index] for index in range(len(arms))]


def ratios(rounds: Sequence[Sequence[Load]], over: int = 1, under: int = 0) -> list[float]:
    return [arms[over].per_s / arms[under].per_s for arms in rounds]


def cpu_row(rounds: Sequence[Sequence[Load]], over: int = 1, under: int = 0) -> Row:
    """The same by what a request costs at least: about what the ratio of rates comes to where nothing else runs."""
    spent = [min(arms[arm].cpu_us for arms in rounds) for arm in (under, over)]
    return "  by CPU per request", f"{spent[0] / spent[1]:.2f}", ""


def arm_row(name: str, arms: Sequence[Load]) -> Row:
    per_s, p99_ms = statistics.median(arm.per_s for arm in arms), statistics.median(arm.p99_ms for arm in arms)
    failed = sum(arm.failed for arm in arms)
    figures = f"{per_s:,.0f}/s, p99 {p99_ms:.1f} ms, CPU {min(arm.cpu_us for arm in arms):.0f} us"
    return f"  {name}", figures, f"{failed} failed" if failed else ""


def traffic_rows(results: Results, sizes: Sizes) -> list[Row]:
    speeds, (outside, inside, kept) = asyncio.run(loads(sizes))
    compared = {
        "overlay_ratio": [overlay_speed / bridge for bridge, overlay_speed in speeds],
        "published_cps_ratio": ratios(outside),
        "vip_cps_ratio": ratios(inside),
        "published_keepalive_ratio": ratios(kept),
        "haproxy_cps_ratio": ratios(outside, 1, 2),
    }
    results.update({key: statistics.median(values) for key, values in compared.items()})
    bridge, over = (statistics.median(way) for way in zip(*speeds, strict=True))
    return [
        ("iperf3, overlay / plain bridge", spread(compared["overlay_ratio"]), ">= 0.90"),
        ("  overlay; bridge", f"{over:.1f}; {bridge:.1f} Gbit/s", ""),
        ("new connections, published / direct", spread(compared["published_cps_ratio"]), ">= 0.85"),
        cpu_row(outside),
        ("new connections, published / HAProxy", spread(compared["haproxy_cps_ratio"]), ">= 2"),
        cpu_row(outside, 1, 2),
        *(arm_row(name, [arms[i] for arms in outside]) for i, name in enumerate(("direct", "published", "HAProxy"))),
        ("new connections, VIP / direct", spread(compared["vip_cps_ratio"]), ">= 0.90"),
        cpu_row(inside),
        *(arm_row(name, [arms[i] for arms in inside]) for i, name in enumerate(("direct", "VIP"))),
        ("keep-alive, published / direct", spread(compared["published_keepalive_ratio"]), ">= 0.90"),
        cpu_row(kept),
        *(arm_row(name, [arms[i] for arms in kept]) for i, name in enumerate(("direct", "published"))),
    ]


def propagation_rows(results: Results, sizes: Sizes) -> list[Row]:
    scratch = Path(tempfile.mkdtemp(prefix="pyswarm-network-"))
    try:
        load_web_image(scratch)
        delays_ms = propagation.delays_ms(sizes.steps)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    results["propagation_p99_ms"] = propagation.percentile(delays_ms, 99)
    return [
        ("endpoint change to the last of 5 hosts, p99", f"{results['propagation_p99_ms']:.0f} ms", "<= 200 ms"),
        ("  median; longest", f"{statistics.median(delays_ms):.0f}; {max(delays_ms):.0f} ms", ""),
        ("  changes", str(len(delays_ms)), ">= 200"),
    ]


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a minute or two")
    parser.add_argument("--only", action="append", default=[], choices=PARTS, help="may be repeated")
    chosen = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    measure.install(PACKAGES)
    sizes = QUICK if chosen.quick else FULL
    results: Results = {}
    parts: dict[str, Callable[[], list[Row]]] = {
        "attach": lambda: attach_rows(results),
        "dns": lambda: dns_rows(results, sizes),
        "traffic": lambda: traffic_rows(results, sizes),
        "propagation": lambda: propagation_rows(results, sizes),
    }
    rows = [row for name in chosen.only or PARTS for row in parts[name]()]
    measure.table(rows)
    measure.finish(chosen.json, {key: results.get(key) for key in KEYS})


if __name__ == "__main__":
    main()
