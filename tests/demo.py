"""`make demo`: the main job on a lab of three managers and two workers, each claim checked.

Exit status 0 only if everything that is printed as shown was seen to be so.
"""

from __future__ import annotations

import collections
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from swarm.lab import hosts, lab
from tests.labs import WEB_IMAGE, Lab, http_get, keep_logs, load_web_image, wait_for

NAME = "demo"
PORT = 8000
CLIENTS = 4
SMALL, LARGE = 15, 100


class Narrator:
    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self.checked = 0

    def step(self, text: str) -> None:
        print(f"\n\033[1m[{time.monotonic() - self.started_at:5.1f} s] {text}\033[0m", flush=True)

    def show(self, text: str) -> None:
        print("    " + text.rstrip().replace("\n", "\n    "), flush=True)

    def check(self, fact: bool, text: str) -> None:
        if not fact:
            raise AssertionError(f"not true: {text}")
        self.checked += 1
        self.show(f"\033[32mok\033[0m  {text}")


say = Narrator()


class Clients:
    """A few clients that ask the published port of every host in turn and count what failed."""

    def __init__(self, addresses: list[str]) -> None:
        self._addresses = addresses
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.answered = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, turn: int) -> None:
        while not self._stop.is_set():
            turn += 1
            address = self._addresses[turn % len(self._addresses)]
            try:
                http_get(address, PORT)
                with self._lock:
                    self.answered += 1
            except OSError as error:
                with self._lock:
                    self.failures.append(f"{address}: {error}")
            self._stop.wait(0.005)


def spread(cluster: Lab, asked: str) -> dict[str, int]:
    return dict(sorted(collections.Counter(row["Node"] for row in cluster.running("wpinst", asked)).items()))


def all_running(cluster: Lab, wanted: int, asked: str, timeout_s: float) -> float:
    started_at = time.monotonic()
    wait_for(lambda: len(cluster.running("wpinst", asked)) == wanted, timeout_s, f"{wanted} tasks running")
    return time.monotonic() - started_at


def create(cluster: Lab) -> None:
    say.step(f"A service of {SMALL} replicas on its own overlay network, published at port {PORT}")
    cluster.pyswarm("m1", "network", "create", "wpnet")
    command = ["service", "create", "--name", "wpinst", "--replicas", str(SMALL), "--network", "wpnet"]
    command += ["--publish", f"{PORT}:80", "--update-order", "start-first", "--update-parallelism", "5"]
    command += ["--env", "NODE={{.Node.Hostname}}", "--restart-delay", "500ms", WEB_IMAGE]
    say.show("$ pyswarm " + " ".join(command))
    started_at = time.monotonic()
    cluster.pyswarm("m1", *command)
    say.check(len(cluster.running("wpinst")) == SMALL, f"{SMALL} tasks run ({time.monotonic() - started_at:.1f} s)")
    where = spread(cluster, "m1")
    say.show(cluster.pyswarm("m2", "service", "ls"))
    say.check(max(where.values()) - min(where.values()) <= 1 and len(where) == 5, f"spread evenly: {where}")


def serve(cluster: Lab) -> None:
    say.step(f"curl port {PORT} on every host")
    for name in cluster.hosts:
        answers = [cluster.get(name, PORT) for _ in range(8)]
        own = cluster.run(name, "curl", "-s", "--max-time", "5", f"http://127.0.0.1:{PORT}/").strip()
        say.check(
            len(set(answers)) > 1 and bool(own), f"{name}: {len(set(answers))} different tasks, e.g. {answers[0]!r}"
        )


def resolve(cluster: Lab) -> None:
    say.step("Names inside a task")
    task = next(row for row in cluster.running("wpinst") if row["Node"] == "w1")
    netns = cluster.host("w1").run_dir / "netns" / f"task-{task['ID']}"

    def inside(*argv: str) -> str:
        return subprocess.run(["nsenter", f"--net={netns}", *argv], capture_output=True, text=True, check=False).stdout

    vip = inside("dig", "+short", "@127.0.0.11", "wpinst").split()
    tasks = inside("dig", "+short", "@127.0.0.11", "tasks.wpinst").split()
    say.check(len(vip) == 1, f"wpinst -> {' '.join(vip)} (its virtual IP)")
    say.check(len(tasks) == SMALL, f"tasks.wpinst -> {len(tasks)} addresses: {' '.join(sorted(tasks)[:4])} ...")
    pointer = inside("dig", "+short", "@127.0.0.11", "-x", tasks[0]).strip()
    say.check(pointer.startswith("wpinst."), f"{tasks[0]} -> {pointer}")
    answers = {inside("curl", "-s", "--max-time", "5", f"http://{vip[0]}/").strip() for _ in range(10)}
    say.check(len(answers - {""}) > 1, f"the virtual IP answers from {len(answers)} different tasks")


def scale_through_failover(cluster: Lab) -> str:
    say.step(f"Scale to {LARGE} and kill the leader with -9 in the middle of it")
    leader = cluster.leader()
    other = next(name for name in ("m1", "m2", "m3") if name != leader)
    before = {row["ID"] for row in cluster.running("wpinst", other)}
    started_at = time.monotonic()
    scaling = cluster.spawn(other, "service", "scale", f"wpinst={LARGE}")
    wait_for(lambda: len(cluster.running("wpinst", other)) > SMALL, 30, "scaling begins")
    hosts.kill(hosts.daemon_pids(cluster.host(leader)), signal.SIGKILL)
    say.show(f"{leader}'s agent and manager killed with {len(cluster.running('wpinst', other))} tasks running")
    lab.start(cluster.plan, cluster.host(leader))  # as systemd would
    scaling.communicate(timeout=90)
    say.check(
        scaling.returncode == 0, f"`service scale` on {other} finished after {time.monotonic() - started_at:.1f} s"
    )
    all_running(cluster, LARGE, other, 30)
    say.check(True, f"all {LARGE} run; the leader is {cluster.leader(other)}")
    wait_for(lambda: all(row["Status"] == "Ready" for row in cluster.rows(other, "node", "ls")), 30, "ready")
    now = {row["ID"] for row in cluster.running("wpinst", other)}
    say.check(before <= now and len(now) == LARGE, f"{leader} is back and none of the first {SMALL} was restarted")
    return other


def update(cluster: Lab, asked: str) -> None:
    say.step("Update every task, start-first, under load")
    old = {row["ID"] for row in cluster.running("wpinst", asked)}
    cluster.pyswarm(asked, "service", "scale", "wpinst=20")
    started_at = time.monotonic()
    with Clients([host.address for host in cluster.plan.hosts]) as clients:
        cluster.pyswarm(asked, "service", "update", "--env-add", "RELEASE=2", "wpinst")
    running = {row["ID"] for row in cluster.running("wpinst", asked)}
    say.check(not running & old and len(running) == 20, f"20 new tasks in {time.monotonic() - started_at:.1f} s")
    say.check(
        not clients.failures and clients.answered > 100,
        f"{clients.answered} requests answered meanwhile, {len(clients.failures)} failed {clients.failures[:3]}",
    )


def lose_host(cluster: Lab, asked: str) -> None:
    say.step("Cut the power of w2")
    lost = len([row for row in cluster.running("wpinst", asked) if row["Node"] == "w2"])
    started_at = time.monotonic()
    hosts.pull_plug(cluster.host("w2"))
    wait_for(
        lambda: "w2" not in spread(cluster, asked) and sum(spread(cluster, asked).values()) == 20, 30, "tasks moved"
    )
    say.check(
        True, f"its {lost} tasks run elsewhere after {time.monotonic() - started_at:.1f} s: {spread(cluster, asked)}"
    )
    say.show(cluster.pyswarm(asked, "node", "ls"))
    answers = {cluster.get(name, PORT) for name in cluster.hosts if name != "w2" for _ in range(5)}
    say.check(not any(answer.endswith("on w2") for answer in answers), "no request goes to w2")


def main() -> int:
    if lab.names().count(NAME):
        lab.down(NAME)
    scratch = Path(tempfile.mkdtemp(prefix="pyswarm-demo-"))
    status = 1
    try:
        say.step("Build a small web image (busybox-static) into this machine's image store")
        load_web_image(scratch)
        say.step("A lab: three managers and two workers on this machine")
        lab.up(NAME, 3, 2, say=say.show)
        cluster = Lab(lab.load(NAME))
        say.show(cluster.pyswarm("m1", "node", "ls"))
        ready = [row["Status"] for row in cluster.rows("m1", "node", "ls")]
        say.check(ready == ["Ready"] * 5, "five nodes are ready")
        create(cluster)
        serve(cluster)
        resolve(cluster)
        asked = scale_through_failover(cluster)
        update(cluster, asked)
        lose_host(cluster, asked)
        status = 0
    except (Exception, KeyboardInterrupt) as error:
        print(f"\n\033[31mfailed\033[0m  {error!r}", flush=True)
        if NAME in lab.names():
            print(f"logs of the hosts: {keep_logs(Lab(lab.load(NAME)))}")
    finally:
        say.step("Take everything down")
        if NAME in lab.names():
            lab.down(NAME)
        shutil.rmtree(scratch, ignore_errors=True)
    if status == 0:
        say.check(NAME not in lab.names(), "nothing is left of the lab")
        print(f"\n{say.checked} claims checked, all true, in {time.monotonic() - say.started_at:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
