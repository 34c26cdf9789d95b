"""What is done to the managers of a lab. Each fault ends by itself: then everything runs and is connected again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from swarm.lab import hosts, lab
from swarm.lab.plan import Host
from tests.labs import Lab, wait_for

CLOCK = Path(__file__).with_name("clock")
"""Holds a `sitecustomize` for processes whose time of day is to jump."""
DISK_MIB = 600
"""A small disk; below 64 MB of free space a manager takes on nothing."""
FILL_BYTES = 1 << 20
SYNC_DELAY_US = 50_000
SETTLE_S = 60.0
SNAPSHOT_WAIT_S = 20.0


class Chaos:
    """`say` gets a line for each thing done."""

    def __init__(self, cluster: Lab, seed: int, say: Callable[[str], None]) -> None:
        self.cluster = cluster
        self.random = random.Random(f"{seed} faults")
        self.say = say
        self.names = [host.name for host in cluster.plan.hosts if host.manager]

    def host(self, name: str) -> Host:
        return self.cluster.host(name)

    def any_name(self) -> str:
        return self.random.choice(self.names)

    def leader(self) -> str:
        for name in self.random.sample(self.names, len(self.names)):
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                return self.cluster.leader(name)
        return self.any_name()

    def settle(self) -> None:
        """Until every manager is one again, and says so of all."""

        def all_there() -> bool:
            status = [row["ManagerStatus"] for row in self.cluster.rows(self.any_name(), "node", "ls")]
            return sorted(status) == ["Leader"] + ["Reachable"] * (len(self.names) - 1)

        wait_for(all_there, SETTLE_S, "all managers are there again")

    def pids(self, *names: str) -> list[int]:
        return [pid for name in names for pid in hosts.daemon_pids(self.host(name))]

    def start(self, *names: str) -> None:
        for name in names:
            lab.start(self.cluster.plan, self.host(name))

    # ---- faults

    def kill_leader(self) -> None:
        name = self.leader()
        self.say(f"kill -9 of the leader {name}")
        hosts.kill(self.pids(name), signal.SIGKILL)
        time.sleep(self.random.uniform(0, 2))
        self.start(name)

    def kill_all(self) -> None:
        self.say("kill -9 of all managers at once")
        hosts.kill(self.pids(*self.names), signal.SIGKILL)
        self.start(*self.names)

    def kill_all_while_a_snapshot_is_written(self) -> None:
        """The file is there for milliseconds only; if none is seen in time, all are killed all the same."""
        writing = [self.host(name).state_dir / "raft" / "writing.new" for name in self.names]
        pids = self.pids(*self.names)
        deadline = time.monotonic() + SNAPSHOT_WAIT_S
        seen = ""
        while not seen and time.monotonic() < deadline:
            seen = next((path.parent.parent.name for path in writing if path.exists()), "")
            time.sleep(0.0005)
        hosts.kill(pids, signal.SIGKILL)
        self.say(f"kill -9 of all managers, {f'{seen} is writing a snapshot' if seen else 'no snapshot was seen'}")
        self.start(*self.names)

    def freeze_leader(self) -> None:
        name = self.leader()
        seconds = self.random.uniform(2, 6)
        self.say(f"SIGSTOP of the leader {name} for {seconds:.1f} s")
        pids = self.pids(name)
        hosts.kill(pids, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            hosts.kill(pids, signal.SIGCONT)

    def cut_majority_from_minority(self) -> None:
        """The leader is in the minority: it must not answer with what is outdated."""
        leader = self.leader()
        others = [name for name in self.names if name != leader]
        self.random.shuffle(others)
        small = [leader, *others[: (len(self.names) - 1) // 2 - 1]]
        rest = [name for name in self.names if name not in small]
        self.say(f"{', '.join(small)} cut off from {', '.join(rest)}")
        lab.partition(self.cluster.plan, [[self.host(name) for name in side] for side in (small, rest)])
        try:
            time.sleep(self.random.uniform(3, 6))
        finally:
            lab.heal(self.cluster.plan)

    def cut_one_way(self) -> None:
        """What one manager sends does not reach the others; what they send arrives."""
        name = self.leader() if self.random.random() < 0.5 else self.any_name()
        self.say(f"nothing from {name} reaches the others")
        host = self.host(name)
        others = ", ".join(self.host(other).address for other in self.names if other != name)
        chain = f"type filter hook output priority -350; ip daddr {{ {others} }} drop;"
        nft = [*hosts.entering(host), "nft"]
        table = f"table ip pyl_oneway {{\nchain out {{ {chain} }}\n}}\n"
        subprocess.run([*nft, "-f", "-"], input=table, text=True, check=True)
        try:
            time.sleep(self.random.uniform(3, 6))
        finally:
            subprocess.run([*nft, "delete", "table", "ip", "pyl_oneway"], check=True)

    def slow_disk(self) -> None:
        name = self.leader()
        managers = [pid for pid in self.pids(name) if b"swarm.manager" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        self.say(f"each sync of the leader's disk ({name}) takes {SYNC_DELAY_US // 1000} ms more")
        words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync,fsync"]
        words += ["-e", f"inject=fdatasync,fsync:delay_exit={SYNC_DELAY_US}"]
        tracer = subprocess.Popen([*words, "-p", str(managers[0])])
        time.sleep(self.random.uniform(3, 6))
        tracer.send_signal(signal.SIGINT)
        tracer.wait(10)

    def full_disk(self) -> None:
        """A small disk below one manager's state fills up; then somebody makes room. It stays below it afterwards."""
        name = self.any_name()
        raft = self.host(name).state_dir / "raft"
        if not raft.is_mount():
            hosts.kill(self.pids(name), signal.SIGTERM)
            _move_to_small_disk(raft)
            self.start(name)
            self.settle()
        filler = raft / "filler"
        disk = os.statvfs(raft)
        self.say(f"the disk of {name} is full")
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            for _ in range(disk.f_bavail * disk.f_frsize // FILL_BYTES + 1):
                file.write(bytes(FILL_BYTES))
        time.sleep(self.random.uniform(3, 6))
        filler.unlink()
        self.say(f"somebody makes room on the disk of {name}")

    def clock_jump(self) -> None:
        """An hour forwards or back, on one host; its processes are started with the changeable clock."""
        name = self.any_name()
        offset = self.random.choice((3600, -3600))
        clock = self.host(name).state_dir / "clock"
        clock.write_text("0")
        hosts.kill(self.pids(name), signal.SIGKILL)
        with _changeable_clock(clock):
            self.start(name)
        self.settle()
        self.say(f"the clock of {name} jumps by {offset} s")
        clock.write_text(str(offset))
        time.sleep(self.random.uniform(3, 6))
        hosts.kill(self.pids(name), signal.SIGKILL)
        self.start(name)

    def demote_and_promote(self) -> None:
        name = self.any_name()
        asked = self.random.choice([other for other in self.names if other != name])
        self.say(f"{name} is removed from the managers and added again")
        wait_for(lambda: self.cluster.pyswarm(asked, "node", "demote", name), SETTLE_S, f"{name} is demoted")

        def is_worker() -> bool:
            rows = self.cluster.rows(asked, "node", "ls")
            return not next(row["ManagerStatus"] for row in rows if row["Hostname"] == name)

        wait_for(is_worker, SETTLE_S, f"{name} is a worker")
        time.sleep(self.random.uniform(0, 2))
        wait_for(lambda: self.cluster.pyswarm(asked, "node", "promote", name), SETTLE_S, f"{name} is promoted")

    def rolling_restart(self) -> None:
        """As for an upgrade."""
        self.say("every manager is restarted, one after the other")
        for name in self.names:
            hosts.kill(self.pids(name), signal.SIGTERM)
            self.start(name)
            self.settle()


def every_fault(chaos: Chaos) -> list[Callable[[], None]]:
    return [
        chaos.kill_leader,
        chaos.cut_majority_from_minority,
        chaos.kill_all,
        chaos.freeze_leader,
        chaos.cut_one_way,
        chaos.demote_and_promote,
        chaos.slow_disk,
        chaos.full_disk,
        chaos.clock_jump,
        chaos.rolling_restart,
        chaos.kill_all_while_a_snapshot_is_written,
    ]


def _move_to_small_disk(directory: Path) -> None:
    """Mount a small file system over a directory, with what is in it."""
    files = {path.name: (path.read_bytes(), path.stat().st_mode & 0o777) for path in directory.iterdir()}
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "none", str(directory)], check=True)
    for name, (data, mode) in files.items():
        (directory / name).write_bytes(data)
        (directory / name).chmod(mode)


@contextmanager
def _changeable_clock(file: Path) -> Iterator[None]:
    """Processes started meanwhile read the offset of their clock from a file."""
    changed = {"PYTHONPATH": str(CLOCK), "CHAOS_CLOCK": str(file)}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            del os.environ[name]
