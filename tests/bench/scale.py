"""Seconds from `service scale wpinst=100` (from 10) to 100 tasks running and answering on the VIP.

One host, overlay network with VIP, image present. Beside it, where Debian's docker.io is installed, Docker
Swarm does the same work with the same image (its VIP needs IPVS; without it only "running" is measured
there). Then the idle cost of a manager and of a worker with 20 containers each.

    python -m tests.bench.scale [--repeat 3] [--json]
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import grpc

from proto.control_pb2 import Filter, GetRequest, ListRequest
from proto.control_pb2_grpc import ControlStub
from proto.objects_pb2 import TASK_RUNNING, Task
from swarm.lab import hosts
from tests.bench import measure
from tests.bench.docker import DockerSwarm
from tests.labs import WEB_IMAGE, Lab, lab_up, load_web_image, wait_for

FROM, TO = 10, 100
IDLE_CONTAINERS = 20
IDLE_S = 20.0


def running_tasks(control: ControlStub, service_id: str) -> list[Task]:
    listing = control.ListTasks(ListRequest(filter=Filter(service_ids=[service_id])), timeout=10)
    return [task for task in listing.tasks if task.status.state == TASK_RUNNING]


def answering(netns: Path, vip: str, wanted: int) -> bool:
    """Whether the VIP, asked from inside one task, answers from that many different tasks."""
    asked = f"http://{vip}/?[1-{wanted + 20}]"
    done = subprocess.run(
        ["nsenter", f"--net={netns}", "curl", "-s", "--no-keepalive", "-H", "Connection: close", asked],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return len(set(re.findall(r"\bwpinst\.\d+\b|\b[0-9a-z]{12}\b", done.stdout))) >= wanted


def our_pids(cluster: Lab, host: str) -> list[int]:
    """Agent, manager, name server and monitors of a host; not the containers."""
    found = []
    for pid in hosts.host_pids(cluster.host(host)):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"daemon" in words or b"swarm.manager" in words or b"dns.server" in words or words[0].endswith(b"conmon"):
            found.append(pid)
    return found


def scale_once(cluster: Lab) -> dict[str, float]:
    """One run on a fresh service; removes it again."""
    cluster.pyswarm("m1", "network", "create", "wpnet")
    cluster.pyswarm(
        "m1", "service", "create", "--name", "wpinst", "--replicas", str(FROM), "--network", "wpnet", WEB_IMAGE
    )
    account = measure.CpuAccount("pyswarm-bench")
    account.adopt(our_pids(cluster, "m1"))
    containers = measure.CGROUP / "cpuacct" / cluster.host("m1").cgroup.lstrip("/")
    with grpc.insecure_channel(f"unix://{cluster.host('m1').run_dir}/manager.sock") as channel:
        control = ControlStub(channel)
        service = control.GetService(GetRequest(ref="wpinst"))
        vip = service.endpoint.virtual_ips[0].address.partition("/")[0]
        some = running_tasks(control, service.id)[0]
        netns = cluster.host("m1").run_dir / "netns" / f"task-{some.id}"
        memory_before = measure.pss_mib(our_pids(cluster, "m1"))
        cpu_before = account.seconds() + measure.usage_s(containers)
        started_at = time.monotonic()
        cluster.pyswarm("m1", "service", "scale", "--detach", f"wpinst={TO}")
        wait_for(lambda: len(running_tasks(control, service.id)) == TO, 120, "running")
        running_s = time.monotonic() - started_at
        wait_for(lambda: answering(netns, vip, TO), 60, "answering on the VIP")
        answering_s = time.monotonic() - started_at
        cpu_s = account.seconds() + measure.usage_s(containers) - cpu_before
        memory = (measure.pss_mib(our_pids(cluster, "m1")) - memory_before) / (TO - FROM)
    account.close()
    cluster.pyswarm("m1", "service", "rm", "wpinst")
    wait_for(lambda: not cluster.rows("m1", "service", "ls"), 60, "service removed")
    wait_for(lambda: cluster.try_pyswarm("m1", "network", "rm", "wpnet").returncode == 0, 60, "network removed")
    return {"running_s": running_s, "answering_s": answering_s, "cpu_s": cpu_s, "mib": memory}


def idle_cost(cluster: Lab, host: str) -> tuple[float, float]:
    """(per cent of a core, MiB PSS) of all our processes on that host over IDLE_S."""
    pids = our_pids(cluster, host)
    before = measure.cpu_ticks_s(pids)
    started_at = time.monotonic()
    time.sleep(IDLE_S)
    percent = (measure.cpu_ticks_s(pids) - before) / (time.monotonic() - started_at) * 100
    return percent, measure.pss_mib(pids)


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="runs; medians are reported")
    parser.add_argument("--no-docker", action="store_true", help="leave Docker out even if it is installed")
    chosen = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="pyswarm-bench-"))
    try:
        load_web_image(scratch)
        docker_runs: list[float] = []
        with lab_up("bench", 1, 0) as cluster:
            runs = [scale_once(cluster) for _ in range(chosen.repeat)]
        if not chosen.no_docker and DockerSwarm.installed():
            with DockerSwarm(scratch, scratch / "web.tar") as docker:
                docker_runs = [docker.scale_once(FROM, TO) for _ in range(chosen.repeat)]
        with lab_up("bench", 1, 1) as cluster:
            count = str(IDLE_CONTAINERS * 2)
            cluster.pyswarm("m1", "service", "create", "--name", "idle", "--replicas", count, WEB_IMAGE)
            wait_for(lambda: len(cluster.running("idle")) == IDLE_CONTAINERS * 2, 60, "running")
            manager, worker = idle_cost(cluster, "m1"), idle_cost(cluster, "w1")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    docker_s = statistics.median(docker_runs) if docker_runs else None
    rows = [
        (f"scale {FROM} -> {TO}: running", f"{median['running_s']:.2f} s", ""),
        (f"scale {FROM} -> {TO}: answering on the VIP", f"{median['answering_s']:.2f} s", "< 4 s"),
        ("  all runs", " ".join(f"{run['answering_s']:.2f}" for run in runs), ""),
        ("Docker Swarm: running", f"{docker_s:.2f} s" if docker_s else "not installed", ""),
        ("CPU of the 90 starts", f"{median['cpu_s']:.2f} s", ""),
        ("our memory per container", f"{median['mib']:.2f} MiB", "<= 1.0 MiB"),
        (f"idle manager, {IDLE_CONTAINERS} containers: CPU", f"{manager[0]:.2f} %", "< 2 %"),
        (f"idle manager, {IDLE_CONTAINERS} containers: memory", f"{manager[1]:.0f} MiB", "< 150 MiB"),
        (f"idle worker, {IDLE_CONTAINERS} containers: CPU", f"{worker[0]:.2f} %", "< 2 %"),
        (f"idle worker, {IDLE_CONTAINERS} containers: memory", f"{worker[1]:.0f} MiB", "< 80 MiB"),
    ]
    measure.table(rows)
    measure.finish(
        chosen.json,
        {
            "scale_100_s": median["answering_s"],
            "docker_scale_100_s": docker_s,
            "ours_mib_per_container": median["mib"],
            "cpu_s": median["cpu_s"],
            "idle_manager_cpu_percent": manager[0],
            "idle_manager_mib": manager[1],
            "idle_worker_cpu_percent": worker[0],
            "idle_worker_mib": worker[1],
        },
    )


if __name__ == "__main__":
    main()
