"""Load through published ports, VIPs, HAProxy and around them, on three hosts in network namespaces.

Three backends (nginx) are tasks of hosts 2 and 3. Two clients ask them: one outside, on the underlay, as users do; one
is itself a task of host 1.

| arm | client | way |
|---|---|---|
| published | outside | host 1's published port, over the overlay |
| haproxy | outside | HAProxy on host 1, TCP mode, over the overlay |
| outside direct | outside | the tasks' addresses, by a plain router on host 1: as many hops, no translation |
| vip | task | the VIP, over the overlay |
| inside direct | task | the tasks' addresses, over the overlay |

Arms that are compared take turns within a round, and each arm of each round has a port of its own: a client that
reaches one socket by two addresses stalls on pairs of address and port that the other one used a moment ago.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from overlay.interface import PublishedPort, Vip
from tests.bench.measure import cpu_ticks_s
from tests.overlay_lab import NET, OverlayLab
from tests.waiting import wait_until

NETWORK = replace(NET, subnet6="", gateway6="")
BACKENDS = ("10.77.1.11", "10.77.1.12", "10.77.1.13")
CALLER, ROUTER, VIP = "10.77.1.10", "10.77.1.250", "10.77.1.200"
INGRESS = "192.168.99.1"
ROUTER_OUTSIDE, CLIENT_ROUTED = "192.168.99.201", "192.168.99.110"
PLAIN = {"a": "10.78.0.1", "b": "10.78.0.2"}
"""Addresses on the plain bridge that iperf3 is compared with."""
FIRST_PORT = 20_000
CONNECTIONS = 24
"""At once, shared by as many threads of wrk as there are backends: the bound of the load."""
IPERF_PORT = 5201
START_TIMEOUT_S = 10.0
BACKLOG = 4096
HANG_S = 10.0
TRIES = 5

LUA = """
local addresses, page, turn = {}, nil, 0
for address in os.getenv("TARGETS"):gmatch("%S+") do
  addresses[#addresses + 1] = wrk.lookup(address, os.getenv("PORT"))[1]
end
local function next_address()
  turn = turn % #addresses + 1
  return addresses[turn]
end
function setup(thread)
  thread.addr = next_address()
end
if os.getenv("KEEP") == "" then
  function request()
    wrk.thread.addr = next_address()
    page = page or wrk.format()
    return page
  end
end
function done(summary, latency)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format('\\n{"requests": %d, "us": %d, "p99_us": %d, "failed": %d}\\n',
    summary.requests, summary.duration, latency:percentile(99), failed))
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    per_s: float
    p99_ms: float
    failed: int
    cpu_us: float
    """Of client and servers, per request: the kernel's work for their packets is mostly done in their name. It depends
    less on what else the machine does than rates do."""


class Traffic:
    """Use as an async context manager. `ports`: how many loads there will be."""

    def __init__(self, ports: int) -> None:
        self._ports = range(FIRST_PORT, FIRST_PORT + ports)
        self._next = iter(self._ports)
        self._lab = OverlayLab()
        self._running: list[subprocess.Popen[str]] = []
        self._stack = ExitStack()

    async def __aenter__(self) -> Traffic:
        try:
            self._scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pyswarm-traffic-")))
            await self._wire()
            self._serve()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait(START_TIMEOUT_S)
        await self._lab.close()
        self._stack.close()

    async def _wire(self) -> None:
        lab = self._lab
        first, *others = lab.hosts
        await self._apply()
        for number, address in enumerate(BACKENDS):
            await lab.task(others[number % len(others)], f"web{number}", (NETWORK, address))
        await lab.task(first, "caller", (NETWORK, CALLER))
        await lab.task(first, "router", (NETWORK, ROUTER))
        await self._apply()
        self._wire_router()
        self._wire_plain_bridge()

    async def _apply(self) -> None:
        published = tuple(PublishedPort("tcp", port, tuple((each, port) for each in BACKENDS)) for port in self._ports)
        for host in self._lab.hosts:
            state = self._lab.state(host, (NETWORK,), (Vip(NETWORK.network_id, VIP, BACKENDS),), published)
            await host.network.apply(state)

    def _wire_router(self) -> None:
        """The client outside reaches the tasks through the task `router`, and they answer the same way."""
        lab = self._lab
        self._cable("u-router", "router", "plain0", f"{ROUTER_OUTSIDE}/24", "br0")
        self._run(lab.path("router"), "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self._run(lab.client, "ip", "addr", "add", f"{CLIENT_ROUTED}/24", "dev", "eth0")
        way = ("via", ROUTER_OUTSIDE, "src", CLIENT_ROUTED)
        self._run(lab.client, "ip", "route", "add", NETWORK.subnet, *way)
        for number in range(len(BACKENDS)):
            self._run(lab.path(f"web{number}"), "ip", "route", "add", CLIENT_ROUTED, "via", ROUTER)

    def _wire_plain_bridge(self) -> None:
        """A second way between two tasks of different hosts that the overlay joins as well."""
        self._run(self._lab.outside, "ip", "link", "add", "plain", "type", "bridge")
        self._run(self._lab.outside, "ip", "link", "set", "plain", "up")
        self._cable("u-plain-a", "caller", "plain0", f"{PLAIN['a']}/24", "plain")
        self._cable("u-plain-b", "web0", "plain0", f"{PLAIN['b']}/24", "plain")

    def _cable(self, link: str, task: str, name: str, address: str, bridge: str) -> None:
        lab = self._lab
        peer = ("peer", "name", name, "netns", str(lab.path(task)))
        self._run(lab.outside, "ip", "link", "add", link, "type", "veth", *peer)
        self._run(lab.outside, "ip", "link", "set", link, "master", bridge, "up")
        self._run(lab.path(task), "ip", "addr", "add", address, "dev", name)
        self._run(lab.path(task), "ip", "link", "set", name, "up")

    def _run(self, netns: Path, *words: str) -> str:
        done = subprocess.run(
            ["nsenter", f"--net={netns}", *words], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout

    # ---- servers

    def _serve(self) -> None:
        for number in range(len(BACKENDS)):
            self._serve_pages(f"web{number}")
        self._serve_proxy()
        self._spawn(self._lab.path("web0"), "iperf3", "-s", "-p", str(IPERF_PORT))
        for address in BACKENDS:
            self._wait_for(self._lab.path("caller"), address, self._ports[-1])
        self._wait_for(self._lab.path("caller"), BACKENDS[0], IPERF_PORT)

    def _serve_pages(self, task: str) -> None:
        """nginx with one worker: a port is asked by the requests of one arm of one round."""
        directory = self._scratch / task
        directory.mkdir()
        listens = "\n".join(f"listen {port} backlog={BACKLOG};" for port in self._ports)
        config = directory / "nginx.conf"
        config.write_text(
            "daemon off; worker_processes 1; pid nginx.pid; error_log stderr error;\n"
            "events { worker_connections 4096; }\n"
            "http { access_log off; keepalive_requests 100000000;\n"
            + "".join(f"{each}_temp_path {each};\n" for each in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
            + f'server {{ {listens}\n location / {{ return 200 "ok"; }} }} }}\n'
        )
        words = ("nginx", "-p", str(directory), "-c", str(config), "-e", "stderr")
        self._spawn(self._lab.path(task), *words)

    def _serve_proxy(self) -> None:
        """HAProxy on host 1, on a socket per port that no service publishes: its ports begin where those end."""
        sections = [
            f"listen p{port}\n bind {INGRESS}:{port + len(self._ports)} backlog {BACKLOG}\n"
            + "".join(f" server s{number} {address}:{port}\n" for number, address in enumerate(BACKENDS))
            for port in self._ports
        ]
        config = self._scratch / "haproxy.cfg"
        timeouts = " timeout connect 5s\n timeout client 30s\n timeout server 30s\n"
        config.write_text(
            f"global\n maxconn 4096\ndefaults\n mode tcp\n balance roundrobin\n{timeouts}" + "".join(sections)
        )
        self._spawn(self._lab.hosts[0].netns, "haproxy", "-db", "-f", str(config))
        self._wait_for(self._lab.client, INGRESS, self._ports[-1] + len(self._ports))

    def _spawn(self, netns: Path, *words: str) -> None:
        with open(self._scratch / "servers.log", "a") as log:
            command = ["nsenter", f"--net={netns}", *words]
            self._running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True))

    def _wait_for(self, netns: Path, address: str, port: int) -> None:
        def answers() -> bool:
            words = ["nsenter", f"--net={netns}", "bash", "-c", f"exec 3<>/dev/tcp/{address}/{port}"]
            return not subprocess.run(words, capture_output=True, timeout=START_TIMEOUT_S, check=False).returncode

        wait_until(answers, START_TIMEOUT_S, f"{address}:{port} answers")

    # ---- loads

    def published(self, seconds: int, keep: bool = False) -> Load:
        port = next(self._next)
        return self._load(self._lab.client, (INGRESS,), port, seconds, keep)

    def haproxy(self, seconds: int) -> Load:
        port = next(self._next) + len(self._ports)
        return self._load(self._lab.client, (INGRESS,), port, seconds)

    def outside_direct(self, seconds: int, keep: bool = False) -> Load:
        return self._load(self._lab.client, BACKENDS, next(self._next), seconds, keep)

    def vip(self, seconds: int) -> Load:
        return self._load(self._lab.path("caller"), (VIP,), next(self._next), seconds)

    def inside_direct(self, seconds: int) -> Load:
        return self._load(self._lab.path("caller"), BACKENDS, next(self._next), seconds)

    def _load(self, netns: Path, targets: Sequence[str], port: int, seconds: int, keep: bool = False) -> Load:
        """A connection per request unless `keep`."""
        script = self._scratch / "load.lua"
        script.write_text(LUA)
        words = ["nsenter", f"--net={netns}", "wrk", "-t", str(len(BACKENDS)), "-c", str(CONNECTIONS)]
        words += ["-d", f"{seconds}s", "--timeout", "5s", "-s", str(script)]
        words += [] if keep else ["-H", "Connection: close"]
        words.append(f"http://{targets[0]}:{port}/")
        environment = {**os.environ, "TARGETS": " ".join(targets), "PORT": str(port), "KEEP": "keep" if keep else ""}
        for left in reversed(range(TRIES)):  # wrk itself hangs at its end now and then, whomever it asks
            before = self._cpu_s()
            try:
                done = _finished(words, environment, seconds + HANG_S)
            except subprocess.TimeoutExpired:
                if not left:
                    raise
            else:
                break
        found = json.loads(done.stdout.splitlines()[-1])
        requests = max(1, found["requests"])
        cpu_us = (self._cpu_s() - before) / requests * 1e6
        return Load(requests / found["us"] * 1e6, found["p99_us"] / 1000, found["failed"], cpu_us)

    def _cpu_s(self) -> float:
        """Of the servers with their workers, and of all loads that have ended."""
        pids = [process.pid for process in self._running]
        workers = [int(word) for pid in pids for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cpu_ticks_s([*pids, *workers]) + ended.ru_utime + ended.ru_stime

    def overlay_gbit_s(self, seconds: int) -> float:
        return self._iperf(BACKENDS[0], seconds)

    def bridge_gbit_s(self, seconds: int) -> float:
        return self._iperf(PLAIN["b"], seconds)

    def _iperf(self, address: str, seconds: int) -> float:
        words = ("iperf3", "-c", address, "-p", str(IPERF_PORT), "-t", f"{seconds}", "-J")
        measured: list[float] = []

        def tried() -> bool:
            """The server may still be busy with the end of the last test."""
            end = json.loads(self._run(self._lab.path("caller"), *words))["end"]
            measured.extend([end["sum_received"]["bits_per_second"] / 1e9] if "sum_received" in end else [])
            return bool(measured)

        wait_until(tried, START_TIMEOUT_S + seconds, "iperf3 measures")
        return measured[0]


def _finished(
    words: Sequence[str], environment: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout_s, check=True)
