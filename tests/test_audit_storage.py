"""The audit's failures of the bare kernel in its storage, shown on pysyncobj's own files, then gone with ours."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.consensus import codec
from swarm.consensus.config import DEFAULTS
from swarm.consensus.disk import Directory
from swarm.consensus.faults import Damaged
from swarm.consensus.storage import open_storage
from swarm.consensus.wal import Wal
from tests.audit import bare, shown
from tests.consensus_cluster import Died, die
from tests.sim.disk import MemoryDisk, PowerFailure
from tests.sim.net import Net, write

ENTRY = codec.entry_command(b"x")
OFTEN = replace(DEFAULTS, snapshot_entries=50, tail_entries=1)


def filled(disk: MemoryDisk, entries: int) -> Wal:
    wal = open_storage(disk, (), die, replace(DEFAULTS, segment_bytes=2_000)).wal
    wal.setCurrentTerm(1, "A@A:1")
    for index in range(1, entries + 1):
        wal.add(ENTRY, index, 1)
        wal.sync()
    return wal


def test_b_a_torn_file_makes_it_forget_its_vote(tmp_path: Path) -> None:
    """So it votes a second time in the same term. Rule: term and vote are records of the log, checked and synced with
    it; a torn one was never told to anybody, and a log without any refuses to start."""
    assert shown("torn_vote", tmp_path) == {"term": 0, "vote": None}

    for seed in range(50):
        disk = MemoryDisk("A", random.Random(seed))
        wal = filled(disk, 3)
        wal.setCurrentTerm(7, "B@B:1")
        disk.fails_in = seed % 2  # while it is written, or while it is synced
        with suppress(PowerFailure):
            wal.sync()
            raise AssertionError("the power was to fail")
        disk.power_off()
        kept = open_storage(disk, (), die).wal
        assert (kept.getCurrentTerm(), kept.getVotedForNodeId()) in {(1, "A@A:1"), (7, "B@B:1")}

    disk = MemoryDisk("A", random.Random(0))
    filled(disk, 3)
    disk._files[disk.names()[0]].data[40] ^= 1  # in the first batch: term and vote
    with pytest.raises(Damaged, match="promote it again"):
        open_storage(disk, (), die)


def test_s8_compaction_in_place_loses_the_log(tmp_path: Path) -> None:
    """Killed inside, 10 of 2900 entries are left. Rule: segments are only appended to, and dropped as a whole."""
    assert shown("compaction", tmp_path) == {"left": 10}

    for operations in range(8):
        disk = MemoryDisk("A", random.Random(operations))
        wal = filled(disk, 200)
        disk.fails_in = operations
        with suppress(PowerFailure):
            wal.drop_below(100)
        disk.power_off()
        kept = Wal.load(disk, die)
        assert (kept.first_index <= 100, kept.last_index) == (True, 200)


def test_a_commit_index_beyond_the_end_of_the_log(tmp_path: Path) -> None:
    """New entries would count as committed before any quorum has them. Rule: it is clamped to what the log holds."""
    assert shown("commit_beyond_the_end", tmp_path) == {"entries": 10, "commit": 100}

    disk = MemoryDisk("A", random.Random(0))
    wal = filled(disk, 10)
    wal.setRaftCommitIndex(100)
    wal.onOneSecondTimer()
    wal.sync()
    assert Wal.load(disk, die).getRaftCommitIndex() == 10


def test_a2_nothing_is_ever_synced(tmp_path: Path) -> None:
    """An acknowledgement means the page cache of a majority. Rule: what a frame promises is synced before it leaves."""
    assert shown("syncs", tmp_path) == {"entries": 100, "syncs": 0}

    net = Net("ABC")
    leader = net.elect()
    outcomes = [write(leader, b"%d" % number) for number in range(20)]
    while not all(outcome.is_stored for outcome in outcomes):
        net.step()
        for sender, _, frame in net.taped:
            if frame.type == "next_node_idx" and frame.success and sender in net.engines:
                log = next(name for name in net.disks[sender].names() if name.startswith("wal"))
                inode = net.disks[sender]._files[log]
                assert inode.safe == len(inode.data), "an acknowledgement left before the log was on disk"
    for name in "ABC":  # the power of all fails
        net.crash(name)
    for name in "ABC":
        net.start(name)
    net.elect()
    net.until(lambda: len(net.machines["A"].entries) == 20)
    net.close()


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.root
def test_a_full_disk_kills_with_a_bus_error(tmp_path: Path) -> None:
    """The log is a mapped file. Rule: it is written, the error is told in words, and nothing that was safe is lost."""
    with small_disk(tmp_path / "bare") as path:
        assert bare("full_disk", path).returncode == -signal.SIGBUS

    with small_disk(tmp_path / "ours") as path:
        wal = open_storage(Directory(path), (), die).wal
        wal.setCurrentTerm(1, None)
        synced: list[int] = []

        def fill() -> None:
            for index in range(1, 10_000):
                wal.add(codec.entry_command(bytes(1000)), index, 1)
                wal.sync()
                synced.append(index)

        with pytest.raises(Died, match="No space left on device; free or replace the disk"):
            fill()
        wal.abandon()
        kept = Wal.load(Directory(path), die)
        kept.abandon()
        assert kept.last_index == len(synced) > 100


def test_s9_a_snapshot_newer_than_the_log_clears_the_log(tmp_path: Path) -> None:
    """Killed between the two, every write acknowledged since the snapshot is lost (a4: 1143 of 15322 with processes).
    Rule: log and snapshot are brought into agreement before the kernel sees them."""
    assert shown("newer_dump", tmp_path) == {"acknowledged": 100, "left": 50}

    lost = []
    for operations in range(40):
        net = Net("A", operations, OFTEN)
        leader = net.elect()
        outcomes = []
        for number in range(120):
            if number == 45:
                net.disks["A"].fails_in = 5 + operations  # around the time at which the snapshot is written
            with suppress(PowerFailure):
                outcomes.append(write(leader, b"%d" % number))
                net.step()
                continue
            break
        acknowledged = sum(outcome.is_stored for outcome in outcomes)
        net.crash("A")
        net.start("A")
        net.elect()
        net.step(5)
        lost.append(acknowledged - len(net.machines["A"].entries))
        net.close()
    assert max(lost) <= 0, lost


def test_s7_a_damaged_snapshot_makes_it_start_empty_and_lead(tmp_path: Path) -> None:
    """The error is logged and swallowed. Rule: the snapshot before it and the log, which reaches back to that, will do;
    if not even these are there, it does not start, and says what to do."""
    result = shown("unreadable_dump", tmp_path)
    assert result == {"acknowledged": 50, "left": 0, "leads": True}

    net = Net("A", 0, OFTEN)
    leader = net.elect()
    for number in range(170):
        write(leader, b"%d" % number)
        net.step(2)
    net.step(100)
    disk = net.disks["A"]
    snapshots = [name for name in disk.names() if name.startswith("snapshot")]
    assert len(snapshots) == 2
    net.crash("A")
    disk._files[snapshots[1]].data[60] ^= 255
    net.start("A")
    net.elect()
    net.until(lambda: len(net.machines["A"].entries) == 170)
    net.crash("A")
    for name in snapshots:
        if name in disk.names():
            disk._files[name].data[60] ^= 255 if name == snapshots[0] else 0
    with pytest.raises(Damaged, match="no snapshot can be read"):
        net.start("A")
