"""Name lookups beside unbound and dnsmasq: `python -m tests.bench.names [--json]` (root; installs them from Debian).

All servers listen in one namespace, each pinned to the second core; dnsperf asks from the first. Rounds take turns,
figures are medians. Hits: 2,000 names that were asked before. First-time names: 40,000 names, each asked once since the
last change of the picture, so that no cache of ours has them; dnsmasq answers them from its hosts file. One change: how
long the agent and its name server take for it on a host that knows 10,000 tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dns.client import NameServerProcess
from dns.interface import LISTEN_ADDRESS, LISTEN_PORT, NetworkNames, Picture, Sandbox, ServiceNames
from node.mirror import Mirror, applied
from node.pictures import Pictures
from node.view import Local
from proto.dispatch_pb2 import Assignments, Item, NetworkEndpoint, NetworkService
from proto.objects_pb2 import VIP, Network
from tests.bench import measure
from tests.waiting import until

ROUNDS = 9
ROUND_S = 1
HIT_SERVICES, MISS_SERVICES = 1_000, 20_000
TASKS = 5
NICE = -20
"""Of all servers and of dnsperf: what else the machine does shall not decide."""
CHANGE_SERVICES, CHANGE_TASKS, CHANGE_SANDBOXES, CHANGES = 1_000, 10, 100, 40
PACKAGES = {"dnsperf": "dnsperf", "unbound": "unbound", "dnsmasq": "dnsmasq-base", "dig": "dnsutils"}
UNBOUND_PORT, DNSMASQ_PORT = 5301, 5302
OURS, UNBOUND, DNSMASQ = "pyswarm", "unbound", "dnsmasq"
PORTS = {OURS: LISTEN_PORT, UNBOUND: UNBOUND_PORT, DNSMASQ: DNSMASQ_PORT}


def install() -> dict[str, str]:
    """Program -> version of its package."""
    measure.install(PACKAGES)
    query = ["dpkg-query", "-W", "-f", "${Version}"]
    return {
        program: subprocess.run([*query, package], check=True, capture_output=True, text=True, timeout=10).stdout
        for program, package in PACKAGES.items()
    }


@dataclass(frozen=True)
class Bench:
    netns: str
    directory: Path
    services: tuple[ServiceNames, ...]

    def picture(self, *extra: ServiceNames) -> Picture:
        network = NetworkNames("net", "net", False, self.services + extra, ())
        return Picture((network,), (Sandbox("task", f"/run/netns/{self.netns}", ("net",)),))

    def names(self) -> list[tuple[str, tuple[str, ...]]]:
        """Every name with its addresses, as the other servers are told."""
        return [
            pair
            for service in self.services
            for pair in (
                (service.names[0], (service.vip or "",)),
                (f"tasks.{service.names[0]}", service.task_addresses),
            )
        ]

    def inside(self, core: int, *argv: str) -> list[str]:
        return ["nice", "-n", str(NICE), "taskset", "-c", str(core), "ip", "netns", "exec", self.netns, *argv]

    def ask(self, server: str, pid: int, *options: str) -> tuple[float, float]:
        """Queries per second of one dnsperf run, and CPU us per query of the server, which is `pid`."""
        argv = ["dnsperf", "-s", LISTEN_ADDRESS, "-p", str(PORTS[server]), "-d", str(self.directory / "questions")]
        argv += ["-c", "8", "-T", "1", "-q", "100", *options]
        used_s = measure.cpu_ticks_s([pid])
        out = subprocess.run(self.inside(0, *argv), capture_output=True, text=True, check=True, timeout=120).stdout
        used_s = measure.cpu_ticks_s([pid]) - used_s
        answered = re.search(r"Response codes: +NOERROR (\d+) \(100.00%\)", out)
        rate = re.search(r"Queries per second: +([\d.]+)", out)
        if answered is None or rate is None:
            raise RuntimeError(f"{server} did not answer everything:\n{out}")
        return float(rate[1]), used_s / int(answered[1]) * 1e6


def service(number: int) -> ServiceNames:
    tasks = tuple(f"10.{64 + number // 2000}.{number % 2000 // 10}.{number % 10 * TASKS + k + 1}" for k in range(TASKS))
    return ServiceNames((f"svc{number}",), f"10.99.{number // 250}.{number % 250 + 1}", tasks)


@contextlib.contextmanager
def bench(services: int, number: int = 0) -> Iterator[Bench]:
    netns = f"dnsbench{os.getpid()}-{number}"
    subprocess.run(["ip", "netns", "add", netns], check=True)
    try:
        subprocess.run(["ip", "-n", netns, "link", "set", "lo", "up"], check=True)
        with tempfile.TemporaryDirectory() as directory:
            made = Bench(netns, Path(directory), tuple(map(service, range(services))))
            (made.directory / "questions").write_text("".join(f"{name} A\n" for name, _ in made.names()))
            yield made
    finally:
        subprocess.run(["ip", "netns", "del", netns], check=True)


def unbound(made: Bench) -> list[str]:
    data = "".join(f'local-data: "{name}. 60 A {each}"\n' for name, every in made.names() for each in every)
    config = made.directory / "unbound.conf"
    config.write_text(
        f"server:\ninterface: {LISTEN_ADDRESS}\nport: {UNBOUND_PORT}\nnum-threads: 1\ndo-daemonize: no\nusername: ''\n"
        f"chroot: ''\npidfile: ''\nuse-syslog: no\nlogfile: '{made.directory}/unbound.log'\nmodule-config: 'iterator'\n"
        f"so-rcvbuf: 1m\n{data}"
    )
    return ["unbound", "-d", "-c", str(config)]


def dnsmasq(made: Bench) -> list[str]:
    hosts = made.directory / "hosts"
    hosts.write_text("".join(f"{each} {name}\n" for name, every in made.names() for each in every))
    hosts.chmod(0o644)
    made.directory.chmod(0o755)
    argv = ["dnsmasq", "-k", f"--port={DNSMASQ_PORT}", f"--listen-address={LISTEN_ADDRESS}", "--bind-interfaces"]
    return [*argv, "--no-resolv", "--no-hosts", f"--addn-hosts={hosts}", "--pid-file=", "--user=root", "--conf-file="]


@contextlib.contextmanager
def running(made: Bench, argv: Sequence[str]) -> Iterator[int]:
    """Gives its process ID."""
    process = subprocess.Popen(
        made.inside(1, *argv), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


async def compare(services: int, others: Sequence[str], fresh: bool, rounds: int) -> dict[str, tuple[float, float]]:
    """Medians of each server: queries per second, CPU us per query. `fresh`: our caches are emptied before each round,
    by a change."""
    install()
    starts = {UNBOUND: unbound, DNSMASQ: dnsmasq}
    options = ("-n", "1") if fresh else ("-l", str(ROUND_S))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (OURS, *others)}
    with bench(services) as made, contextlib.ExitStack() as stack:
        pids = {name: stack.enter_context(running(made, starts[name](made))) for name in others}
        ours = NameServerProcess(made.directory, made.directory / "dns.log")
        try:
            await ours.apply(Picture())
            pids[OURS] = ours.pid
            os.sched_setaffinity(ours.pid, {1})
            os.setpriority(os.PRIO_PROCESS, ours.pid, NICE)
            await ours.apply(made.picture())
            for name in others:
                await until(lambda name=name: answers(made, name), 60, f"{name} answers")  # type: ignore[misc]
            for name in () if fresh else found:
                await asyncio.to_thread(made.ask, name, pids[name], "-n", "2")
            for number in range(rounds):
                for name, rates in found.items():
                    if fresh:
                        changed = replace(service(0), names=("fresh",), vip=f"10.98.0.{number + 1}")
                        await ours.apply(made.picture(changed))
                    rates.append(await asyncio.to_thread(made.ask, name, pids[name], *options))
        finally:
            await ours.stop()
    return {
        name: (statistics.median(rate for rate, _ in rates), statistics.median(cost for _, cost in rates))
        for name, rates in found.items()
    }


def answers(made: Bench, server: str) -> bool:
    argv = ["dig", "+short", "+tries=1", "+time=1", f"@{LISTEN_ADDRESS}", "-p", str(PORTS[server]), "svc0"]
    done = subprocess.run(made.inside(0, *argv), capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip() == service(0).vip


def a_mirror() -> Mirror:
    """As the managers tell it: one network with CHANGE_SERVICES services of CHANGE_TASKS tasks."""
    network = Network(id="net")
    network.spec.annotations.name = "net"
    items = {"network/net": Item(network=network)}
    for number in range(CHANGE_SERVICES):
        told = NetworkService(service_id=f"s{number}", name=f"svc{number}", mode=VIP)
        told.virtual_ips.add(network_id="net", address=f"10.99.{number // 250}.{number % 250 + 1}/8")
        items[f"service/s{number}"] = Item(service=told)
        for slot in range(1, CHANGE_TASKS + 1):
            task_id = f"{number:020}{slot:05}"
            end = NetworkEndpoint(task_id=task_id, network_id="net", service_id=told.service_id, serving=True)
            end.task_name, end.address = (
                f"svc{number}.{slot}.{task_id}",
                f"10.{64 + slot}.{number // 250}.{number % 250 + 1}",
            )
            items[f"endpoint/net/{task_id}"] = Item(endpoint=end)
    return Mirror(True, 1, items)


async def change_ms() -> float:
    """Median from the managers' word that one task serves no more, or does again, to the name server's that it answers
    so, with CHANGE_SERVICES services of CHANGE_TASKS tasks in sight of CHANGE_SANDBOXES tasks of the host."""
    local, pictures, taken = Local("node", "192.0.2.1", 1), Pictures(), []
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(bench(0, number)) for number in range(CHANGE_SANDBOXES)]
        boxes = [Sandbox(each.netns, f"/run/netns/{each.netns}", ("net",)) for each in made]
        ours = NameServerProcess(made[0].directory, made[0].directory / "dns.log")
        mirror = a_mirror()
        try:
            await ours.apply(pictures.draw(mirror, local, boxes, ()))
            for number in range(CHANGES):
                key = f"endpoint/net/{number // 2:020}00001"
                message = Assignments(base=mirror.sequence, result=mirror.sequence + 1)
                change = message.changes.add(key=key)
                change.item.CopyFrom(mirror.items[key])
                change.item.endpoint.serving = not change.item.endpoint.serving
                start_s = time.perf_counter()
                mirror = applied(mirror, message)
                await ours.apply(pictures.draw(mirror, local, boxes, ()))
                taken.append((time.perf_counter() - start_s) * 1000)
        finally:
            await ours.stop()
    return statistics.median(taken)


def hits(rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    return asyncio.run(compare(HIT_SERVICES, (UNBOUND, DNSMASQ), False, rounds))


def misses(rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    return asyncio.run(compare(MISS_SERVICES, (DNSMASQ,), True, rounds))


def main() -> None:
    arguments = measure.options(__doc__).parse_args()
    print(", ".join(f"{program} {version}" for program, version in install().items()))
    known, new, one_change_ms = hits(), misses(), asyncio.run(change_ms())
    ratios = {
        "dns_hit_vs_unbound": known[OURS][0] / known[UNBOUND][0],
        "dns_hit_vs_dnsmasq": known[OURS][0] / known[DNSMASQ][0],
        "dns_miss_vs_dnsmasq": new[OURS][0] / new[DNSMASQ][0],
    }
    rows = [(f"hits, {name}", *each) for name, each in known.items()]
    rows += [(f"first-time names, {name}", *each) for name, each in new.items()]
    measure.table(
        [
            *((what, f"{rate:,.0f}/s {cost:.1f} us", "") for what, rate, cost in rows),
            ("hits, to unbound", f"{ratios['dns_hit_vs_unbound']:.2f}", ">= 1.0"),
            ("hits, to dnsmasq", f"{ratios['dns_hit_vs_dnsmasq']:.2f}", ""),
            ("first-time names, to dnsmasq", f"{ratios['dns_miss_vs_dnsmasq']:.2f}", ">= 0.5"),
            ("one change among 1,000 services x 10 tasks", f"{one_change_ms:.1f} ms", ""),
        ]
    )
    measure.finish(arguments.json, ratios | {"dns_change_ms": one_change_ms})


if __name__ == "__main__":
    main()
