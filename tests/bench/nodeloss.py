"""Seconds from the death of a host with 20 tasks until their replacements run and answer; and what is no death.

A lab of one manager and two workers at defaults; the image is present. One worker has all processes killed (`kill -9`:
agent, containers, name server); the clock stops when the other worker's tasks answer on their published port, all of
them. Then, that nothing is declared dead while an agent is stopped for 1.2 s, and while the machine is loaded.

    python -m tests.bench.nodeloss [--repeat 10] [--json]
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from proto.control_pb2 import Filter, ListRequest
from proto.control_pb2_grpc import ControlStub
from proto.objects_pb2 import TASK_RUNNING, NodeStatus, Task
from swarm.lab import hosts, lab
from tests.bench import measure
from tests.labs import WEB_IMAGE, Lab, lab_up, load_web_image, wait_for

TASKS = 20
PAUSE_S = 1.2
BUSY_LOOPS = 4
BUSY_S = 10.0
REPLACED_S = 3.0
"""The aim."""


def tasks_running(control: ControlStub, node_id: str = "") -> list[Task]:
    listing = control.ListTasks(ListRequest(filter=Filter()), timeout=10)
    return [
        task
        for task in listing.tasks
        if task.status.state == TASK_RUNNING
        and task.desired_state == TASK_RUNNING
        and (not node_id or task.node_id == node_id)
    ]


def node_ids(control: ControlStub) -> dict[str, str]:
    """Hostname to node ID."""
    return {node.description.hostname: node.id for node in control.ListNodes(ListRequest(), timeout=10).nodes}


def down(control: ControlStub) -> list[str]:
    """Hosts that do not count as READY."""
    nodes = control.ListNodes(ListRequest(), timeout=10).nodes
    return [node.description.hostname for node in nodes if node.status.state != NodeStatus.READY]


def answering(cluster: Lab, host: str, wanted: int) -> bool:
    """Whether the published port of that host answers from so many different tasks."""
    asked = f"http://{cluster.host(host).address}:8000/?[1-{wanted * 2}]"
    words = ["curl", "-s", "--max-time", "1", "--no-keepalive", "-H", "Connection: close", asked]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    return len(set(re.findall(r"\bweb\.\d+\b|\b[0-9a-z]{12}\b", done.stdout))) >= wanted


def kill_host(cluster: Lab, name: str) -> None:
    """All of its processes, as power loss does; its network stays up, so that nothing is noticed sooner by that."""
    for pid in hosts.host_pids(cluster.host(name)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def lose_once(cluster: Lab, control: ControlStub, victim: str, other: str) -> dict[str, float]:
    """One death; the tasks stand on `victim` alone before, on `other` alone afterwards."""
    ids = node_ids(control)
    cluster.pyswarm("m1", "node", "update", "--availability", "drain", other)
    wait_for(lambda: len(tasks_running(control, ids[victim])) == TASKS, 90, f"tasks on {victim}")
    wait_for(lambda: not down(control), 30, "all ready")
    cluster.pyswarm("m1", "node", "update", "--availability", "active", other)
    kill_host(cluster, victim)
    started_at = time.monotonic()
    wait_for(lambda: victim in down(control), 30, "noticed")
    noticed_s = time.monotonic() - started_at
    wait_for(lambda: len(tasks_running(control, ids[other])) == TASKS, 60, "running elsewhere")
    running_s = time.monotonic() - started_at
    wait_for(lambda: answering(cluster, "m1", TASKS), 30, "answering")
    replaced_s = time.monotonic() - started_at
    hosts.pull_plug(cluster.host(victim))
    lab.start(cluster.plan, cluster.host(victim))
    wait_for(lambda: not down(control), 60, f"{victim} is back")
    return {"noticed_s": noticed_s, "running_s": running_s, "replaced_s": replaced_s}


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Processes that take all the CPU they get."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def downs_while(control: ControlStub, seconds: float) -> set[str]:
    """The hosts that counted as not READY at any time of this span."""
    found: set[str] = set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found.update(down(control))
        time.sleep(0.05)
    return found


def false_alarms(cluster: Lab, control: ControlStub, victim: str) -> int:
    """Hosts declared dead though they live: with an agent stopped for PAUSE_S, then with the machine loaded."""
    pids = hosts.daemon_pids(cluster.host(victim))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        found = len(downs_while(control, PAUSE_S))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    found += len(downs_while(control, 3.0))
    with busy(BUSY_LOOPS):
        return found + len(downs_while(control, BUSY_S))


def measured(cluster: Lab, repeat: int) -> tuple[list[dict[str, float]], int]:
    cluster.pyswarm("m1", "node", "update", "--availability", "drain", "m1")
    create = ["--name", "web", "--replicas", str(TASKS), "--publish", "8000:80", WEB_IMAGE]
    cluster.pyswarm("m1", "service", "create", *create)
    with grpc.insecure_channel(f"unix://{cluster.host('m1').run_dir}/manager.sock") as channel:
        control = ControlStub(channel)
        alarms = false_alarms(cluster, control, "w2")
        runs = []
        for number in range(repeat):
            victim, other = ("w1", "w2") if number % 2 else ("w2", "w1")
            runs.append(lose_once(cluster, control, victim, other))
    return runs, alarms


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--repeat", type=int, default=10, help="deaths; medians are reported")
    chosen = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="pyswarm-nodeloss-"))
    try:
        load_web_image(scratch)
        with lab_up("nodeloss", 1, 2) as cluster:
            runs, alarms = measured(cluster, chosen.repeat)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    measure.table(
        [
            ("host counts as down", f"{median['noticed_s']:.2f} s", ""),
            (f"{TASKS} tasks running elsewhere", f"{median['running_s']:.2f} s", ""),
            (f"{TASKS} tasks answering", f"{median['replaced_s']:.2f} s", f"<= {REPLACED_S:g} s"),
            ("  all runs", " ".join(f"{run['replaced_s']:.2f}" for run in runs), ""),
            ("living hosts declared dead", str(alarms), "0"),
        ]
    )
    measure.finish(chosen.json, {**median, "false_alarms": alarms})


if __name__ == "__main__":
    main()
