"""The faults that tests.chaos does to a lab's managers; each ends with the harm undone."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from swarm.lab import client, hosts, lab
from swarm.lab.plan import Host
from swarm.lab.shell import run
from tests.labs import Lab, wait_for

HELD_S = 2.5
"""How long a fault lasts: longer than an election, so that the others go on without its victim."""
READY_S = 45.0
DISK_MB = 96
SLOW_US = 60_000
"""Added to every fdatasync of the slow disk."""


class Harm:
    """Chooses victims by `generator`. Every method is one fault and returns what it did, in words."""

    def __init__(self, cluster: Lab, generator: random.Random) -> None:
        self._cluster = cluster
        self._random = generator
        self._hosts = [host for host in cluster.plan.hosts if host.manager]

    # ---- words

    def _leader(self) -> Host:
        def found() -> Host | None:
            nodes = client.nodes(self._cluster.plan)
            names = [node.description.hostname for node in nodes if node.manager_status.leader]
            return self._cluster.host(names[0]) if names else None

        chosen = wait_for(found, READY_S, "a leader")
        assert isinstance(chosen, Host)
        return chosen

    def _others(self, than: Sequence[Host]) -> list[Host]:
        return [host for host in self._hosts if host not in than]

    def _follower(self) -> Host:
        return self._random.choice(self._others([self._leader()]))

    def _kill(self, victims: Sequence[Host]) -> None:
        hosts.kill([pid for host in victims for pid in hosts.daemon_pids(host)], signal.SIGKILL)

    def _start(self, victims: Sequence[Host]) -> None:
        for host in victims:
            lab.start(self._cluster.plan, host)
        self._ready()

    def _ready(self) -> None:
        lab.wait_ready(self._cluster.plan, READY_S)

    def _manager_pid(self, host: Host) -> int:
        words = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in hosts.daemon_pids(host)}
        return next(pid for pid, line in words.items() if "swarm.manager" in line)

    # ---- processes

    def kill_leader(self) -> str:
        leader = self._leader()
        self._kill([leader])
        time.sleep(HELD_S)
        self._start([leader])
        return f"kill -9 of the leader {leader.name}"

    def kill_all(self) -> str:
        self._kill(self._hosts)
        self._start(self._hosts)
        return "kill -9 of all at once"

    def stop_leader(self) -> str:
        leader = self._leader()
        pids = hosts.daemon_pids(leader)
        hosts.kill(pids, signal.SIGSTOP)
        try:
            time.sleep(HELD_S)
        finally:
            hosts.kill(pids, signal.SIGCONT)
        self._ready()
        return f"SIGSTOP of the leader {leader.name}"

    def rolling_restart(self) -> str:
        for host in self._random.sample(self._hosts, len(self._hosts)):
            hosts.kill(hosts.daemon_pids(host), signal.SIGTERM)
            self._start([host])
        return "rolling restart"

    # ---- network

    def _partition(self, side: Sequence[Host], words: str) -> str:
        lab.partition(self._cluster.plan, [list(side), self._others(side)])
        try:
            time.sleep(HELD_S)
        finally:
            lab.heal(self._cluster.plan)
        self._ready()
        return f"{words}: {' '.join(host.name for host in side)} cut off"

    def cut_leader(self) -> str:
        """The leader with less than half."""
        leader = self._leader()
        few = (len(self._hosts) - 1) // 2
        return self._partition([leader, *self._others([leader])[: few - 1]], "partition, leader in the minority")

    def cut_follower(self) -> str:
        return self._partition([self._follower()], "partition, leader in the majority")

    def one_way(self) -> str:
        """One host speaks and is not answered, or hears and is not heard."""
        victim = self._random.choice([self._leader(), self._follower()])
        deaf = self._random.random() < 0.5
        addresses = ", ".join(host.address for host in self._others([victim]))
        chain = f"prerouting priority -350; ip saddr {{ {addresses} }} drop;"
        if not deaf:
            chain = f"output priority -350; ip daddr {{ {addresses} }} drop;"
        rules = f"table ip pyl_partition {{\n chain one {{ type filter hook {chain} }}\n}}\n"
        run("nsenter", f"--net={victim.netns_path}", "nft", "-f", "-", text=rules)
        try:
            time.sleep(HELD_S)
        finally:
            lab.heal(self._cluster.plan)
        self._ready()
        return f"one-way partition: {victim.name} {'deaf' if deaf else 'mute'}"

    # ---- membership

    def member(self) -> str:
        """Removed and added under load."""
        victim = self._random.choice(self._hosts)
        asked = self._random.choice(self._others([victim])).name

        def status() -> str:
            rows = self._cluster.rows(asked, "node", "ls")
            return next(str(row["ManagerStatus"]) for row in rows if row["Hostname"] == victim.name)

        self._cluster.pyswarm(asked, "node", "demote", victim.name)
        wait_for(lambda: not status(), READY_S, f"{victim.name} is a worker")
        self._cluster.pyswarm(asked, "node", "promote", victim.name)
        wait_for(status, READY_S, f"{victim.name} is a manager")
        self._ready()
        return f"{victim.name} demoted and promoted"

    # ---- disks

    def full_disk(self) -> str:
        """The leader's log on a file system of its own, which is filled to the last byte, then emptied."""
        leader = self._leader()
        raft = leader.state_dir / "raft"
        kept = raft.with_name("raft.kept")
        self._kill([leader])
        shutil.copytree(raft, kept)
        run("mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m,mode=700", "tmpfs", str(raft))
        try:
            shutil.copytree(kept, raft, dirs_exist_ok=True)
            self._start([leader])
            _fill(raft / "filler")
            time.sleep(2 * HELD_S)
            (raft / "filler").unlink()
            self._kill([leader])
            shutil.rmtree(kept)
            shutil.copytree(raft, kept)
        finally:
            self._kill([leader])
            run("umount", str(raft))
        shutil.rmtree(raft)
        kept.rename(raft)
        self._start([leader])
        return f"disk full at {leader.name}"

    def slow_disk(self) -> str:
        """Every fdatasync of the leader takes SLOW_US longer; strace holds it up."""
        leader = self._leader()
        argv = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync"]
        argv += ["-e", f"inject=fdatasync:delay_enter={SLOW_US}", "-p", str(self._manager_pid(leader))]
        tracer = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            time.sleep(HELD_S)
            assert tracer.poll() is None, "strace could not attach"
        finally:
            tracer.terminate()
            tracer.wait()
        self._ready()
        return f"slow disk at {leader.name}"


def _fill(path: Path) -> None:
    """Write until the file system takes no more."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while os.write(file.fileno(), bytes(size)) == size:
                    pass


FAULTS: dict[str, Callable[[Harm], str]] = {
    "kill-leader": Harm.kill_leader,
    "kill-all": Harm.kill_all,
    "stop-leader": Harm.stop_leader,
    "rolling-restart": Harm.rolling_restart,
    "cut-leader": Harm.cut_leader,
    "cut-follower": Harm.cut_follower,
    "one-way": Harm.one_way,
    "member": Harm.member,
    "full-disk": Harm.full_disk,
    "slow-disk": Harm.slow_disk,
}
