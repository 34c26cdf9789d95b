"""A thousand nodes and thirty thousand tasks on one machine: one manager process, and agents without containers.

The manager is the real one, with its log on disk; the agents join with the token, hold mTLS sessions of their own
(`node.session`) and report every state of every task. One call creates the service; the clock stops when the manager
counts all of its tasks as running.

    python -m tests.bench.swarm3k [--agents 1000] [--tasks 30000] [--processes 2] [--profile FILE] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import grpc

from proto.control_pb2 import ListRequest, ServiceRequest
from proto.control_pb2_grpc import ControlStub
from proto.objects_pb2 import DRAINED, Cluster, ServiceSpec
from swarm.hostfiles import HostPaths, Membership
from swarm.ids import random_id
from swarm.security.bootstrap import NewCluster, create_cluster
from tests.bench import measure
from tests.consensus_cluster import free_port
from tests.waiting import wait_until

AGENTS, TASKS, PROCESSES = 1_000, 30_000, 2
JOIN_TIMEOUT_S = 300.0
RUN_TIMEOUT_S = 900.0
POLL_S = 0.25
SECONDS_MAX, RSS_MIB_MAX, ENTRIES_MAX = 60, 1024, 3
"""The aims, for the whole size on two cores."""


class SimulatedSwarm:
    """Its manager's process, and the sockets and files of it."""

    def __init__(self, directory: Path, profile: Path | None = None) -> None:
        self._directory = directory
        self.paths = HostPaths(directory / "m", directory / "r")
        self.join_addr = ""
        self.token = ""
        self._new = self._founded()
        environment = os.environ | ({"PYSWARM_PROFILE": str(profile)} if profile is not None else {})
        words = ["--state-dir", str(self.paths.state), "--run-dir", str(self.paths.run), "--log-level", "warning"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.swarm3k_manager", *words], stdin=subprocess.PIPE, env=environment
        )
        assert self.process.stdin is not None
        self.process.stdin.write(self._new.message().SerializeToString())
        self.process.stdin.close()

    def _founded(self) -> NewCluster:
        """As `swarm init` does, but that the first node takes no tasks: it has no agent."""
        new = create_cluster(Cluster(subnet_size=24), random_id, time.time())
        new.node.spec.availability = DRAINED
        port = free_port_pair()
        listen = f"127.0.0.1:{port}"
        membership = Membership(new.node.id, new.cluster.id, "127.0.0.1", listen)
        new.node.manager_addr, new.node.advertise_host = membership.manager_addr, "127.0.0.1"
        self.paths.make()
        self.paths.save_membership(membership)
        new.save(self.paths.certificates)
        self.join_addr, self.token = membership.join_addr, new.cluster.join_tokens.worker
        return new

    @contextmanager
    def control(self) -> Iterator[ControlStub]:
        """Its control API, once it answers."""
        wait_until(self.paths.manager_socket.exists, 30, "the manager's socket")
        with grpc.insecure_channel(f"unix://{self.paths.manager_socket}") as channel:
            yield ControlStub(channel)

    def agents(self, first: int, count: int) -> subprocess.Popen[str]:
        """A process with so many agents; it says "connected" when all have a session."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.swarm3k_agents"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        orders = {
            "join": self.join_addr,
            "token": self.token,
            "directory": str(self._directory / "agents"),
            "first": first,
            "count": count,
        }
        assert process.stdin is not None
        process.stdin.write(json.dumps(orders) + "\n")
        process.stdin.flush()
        return process

    def counts(self) -> tuple[int, int]:
        """Log entries applied and transitions of tasks so far."""
        file = self.paths.run / "counts.json"
        file.unlink(missing_ok=True)
        os.kill(self.process.pid, signal.SIGUSR1)
        wait_until(file.exists, 30, "the manager's counts")
        found = json.loads(file.read_text())
        return found["entries"], found["transitions"]

    def rss_mib(self, peak: bool = True) -> float:
        key = "VmHWM:" if peak else "VmRSS:"
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1024
        raise RuntimeError("the manager has no memory: it has ended")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port_pair() -> int:
    """A port whose successor is free too."""
    while True:
        port = free_port()
        if port < 65_000 and free_port() != port + 1:
            return port


def said(stream: IO[str] | None, word: str) -> None:
    """Read the process's next line. Raises RuntimeError when it is another or the process has ended."""
    assert stream is not None
    line = stream.readline().strip()
    if line != word:
        raise RuntimeError(f"the agents' process said {line!r} instead of {word!r}: see its messages above")


def the_service(tasks: int) -> ServiceSpec:
    spec = ServiceSpec()
    spec.annotations.name = "big"
    spec.replicated.replicas = tasks
    spec.task.container.image = "docker.io/library/nginx:alpine"
    spec.task.container.args.extend(["nginx", "-g", "daemon off;"])
    return spec


def running(control: ControlStub) -> int:
    return sum(count.running for count in control.ListServices(ListRequest(), timeout=60).counts)


def measured(directory: Path, agents: int, tasks: int, processes: int, profile: Path | None = None) -> dict[str, float]:
    """One run in this directory, which is left as it is."""
    with ExitStack() as stack:
        swarm = SimulatedSwarm(directory, profile)
        stack.callback(swarm.stop)
        control = stack.enter_context(swarm.control())
        started_at = time.monotonic()
        share = -(-agents // processes)
        crowds = [swarm.agents(first, min(share, agents - first)) for first in range(0, agents, share)]
        for crowd in crowds:
            stack.callback(crowd.wait)
            assert crowd.stdin is not None
            stack.callback(crowd.stdin.close)
        for crowd in crowds:
            said(crowd.stdout, "connected")
        joined_s = time.monotonic() - started_at
        before, cpu_before, rss_before = swarm.counts(), measure.cpu_ticks_s([swarm.process.pid]), swarm.rss_mib(False)
        started_at = time.monotonic()
        control.CreateService(ServiceRequest(spec=the_service(tasks)), timeout=60)
        deadline = started_at + RUN_TIMEOUT_S
        while (count := running(control)) < tasks:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{count} of {tasks} tasks run after {RUN_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
        seconds = time.monotonic() - started_at
        cpu_s = measure.cpu_ticks_s([swarm.process.pid]) - cpu_before
        after = swarm.counts()
        entries, transitions = after[0] - before[0], after[1] - before[1]
        return {
            "seconds": seconds,
            "leader_cpu_s": cpu_s,
            "leader_rss_mib": swarm.rss_mib(),
            "rss_before_mib": rss_before,
            "entries": entries,
            "transitions": transitions,
            "entries_per_100_transitions": 100 * entries / transitions,
            "joined_s": joined_s,
        }


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--agents", type=int, default=AGENTS)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--processes", type=int, default=PROCESSES, help="that the agents are spread over")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the manager to this file (it is slower)")
    chosen = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="pyswarm-3k-"))
    try:
        found = measured(directory, chosen.agents, chosen.tasks, chosen.processes, chosen.profile)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    measure.table(
        [
            (f"{chosen.agents} agents joined and connected", f"{found['joined_s']:.1f} s", ""),
            (f"{chosen.tasks} tasks running", f"{found['seconds']:.1f} s", f"< {SECONDS_MAX} s"),
            ("leader: CPU", f"{found['leader_cpu_s']:.1f} s", ""),
            ("leader: peak memory (RSS)", f"{found['leader_rss_mib']:.0f} MiB", f"< {RSS_MIB_MAX} MiB"),
            ("leader: memory before the tasks", f"{found['rss_before_mib']:.0f} MiB", ""),
            ("transitions stored", f"{found['transitions']:.0f}", ""),
            ("log entries", f"{found['entries']:.0f}", ""),
            ("entries per 100 transitions", f"{found['entries_per_100_transitions']:.2f}", f"<= {ENTRIES_MAX}"),
        ]
    )
    measure.finish(chosen.json, found)


if __name__ == "__main__":
    main()
