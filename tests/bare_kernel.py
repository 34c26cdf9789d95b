"""pysyncobj's own storage, without our shell: `python tests/bare_kernel.py SCENARIO DIRECTORY` prints one JSON object.

A process of its own, because importing the shell replaces parts of pysyncobj.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pysyncobj.journal
from pysyncobj import SyncObj, SyncObjConf, replicated

NO_OP = b"\x01"


def journal(directory: Path) -> Any:
    return pysyncobj.journal.FileJournal(str(directory / "journal"))


def torn_vote(directory: Path) -> dict[str, Any]:
    """A vote is given; the power fails while its file is written."""
    before = journal(directory)
    before.setCurrentTerm(7, "A")
    before._destroy()
    meta = directory / "journal.meta"
    meta.write_bytes(meta.read_bytes()[:-3])
    after = journal(directory)
    return {"term": after.getCurrentTerm(), "vote": after.getVotedForNodeId()}


def compaction(directory: Path) -> dict[str, Any]:
    """The process ends while the log is compacted in place."""
    before = journal(directory)
    for index in range(3000):
        before.add(NO_OP * 100, index, 1)
    child = os.fork()
    if child == 0:
        add, count = before.add, 0

        def add_until_killed(*entry: Any) -> None:
            nonlocal count
            count += 1
            if count > 10:
                os._exit(0)
            add(*entry)

        before.add = add_until_killed
        before.deleteEntriesTo(100)
    os.waitpid(child, 0)
    return {"left": len(journal(directory))}


def commit_beyond_the_end(directory: Path) -> dict[str, Any]:
    """The log lost its tail; what is said to be committed did not."""
    before = journal(directory)
    for index in range(10):
        before.add(NO_OP, index, 1)
    before.setRaftCommitIndex(100)
    before.onOneSecondTimer()
    before._destroy()
    after = journal(directory)
    return {"entries": len(after), "commit": after.getRaftCommitIndex()}


def syncs(directory: Path) -> dict[str, Any]:
    """How often 100 entries and a vote are put on the disk, not only handed to the system."""
    calls: list[str] = []
    for name in ("fsync", "fdatasync"):
        setattr(os, name, lambda _fd, name=name: calls.append(name))
    flush = pysyncobj.journal.ResizableFile.flush

    def counted(file: Any) -> None:
        calls.append("msync")
        flush(file)

    pysyncobj.journal.ResizableFile.flush = counted
    written = journal(directory)
    for index in range(100):
        written.add(NO_OP, index, 1)
    written.setCurrentTerm(3, "A")
    written.onOneSecondTimer()
    return {"entries": len(written), "syncs": len(calls)}


def full_disk(directory: Path) -> dict[str, Any]:
    """`directory` is a small file system."""
    written = journal(directory)
    for index in range(100_000):
        written.add(NO_OP * 1000, index, 1)
    return {"ended": "no"}


class Counter(SyncObj):  # type: ignore[misc]
    def __init__(self, directory: Path) -> None:
        conf = SyncObjConf(
            autoTick=False,
            journalFile=str(directory / "journal"),
            fullDumpFile=str(directory / "dump"),
            useFork=False,
            appendEntriesUseBatch=False,
            raftMinTimeout=0.4,
            raftMaxTimeout=0.5,
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        super().__init__(address, [], conf)
        self.count = 0

    @replicated  # type: ignore[untyped-decorator]
    def add(self) -> None:
        self.count += 1

    @replicated  # type: ignore[untyped-decorator]
    def fail(self) -> None:
        raise ValueError("this entry cannot be applied")

    def run_until(self, condition: Callable[[], object]) -> bool:
        end = time.monotonic() + 10
        while not condition() and time.monotonic() < end:
            self.doTick(0.001)
        return bool(condition())


def counting(directory: Path, to: int) -> Counter:
    node = Counter(directory)
    node.run_until(lambda: node._isLeader() and node.isReady())
    for count in range(node.count + 1, to + 1):
        node.add()
        node.run_until(lambda count=count: node.count == count)  # type: ignore[misc]
    return node


def ended(node: Counter) -> None:
    node.destroy()
    node.doTick(0.001)


def newer_dump(directory: Path) -> dict[str, Any]:
    """The manager dies after its snapshot was written (by a child process), before it has trimmed its log; what was
    acknowledged after the snapshot is in the log only."""
    (directory / "old").mkdir()
    ended(counting(directory, 50))
    for file in directory.glob("journal*"):
        shutil.copy(file, directory / "old")
    node = counting(directory, 50)
    node.forceLogCompaction()
    node.run_until((directory / "dump").exists)
    for _ in range(20):
        node.doTick(0.001)
    ended(node)
    dump = (directory / "dump").read_bytes()
    (directory / "dump").unlink()
    for file in (directory / "old").iterdir():
        shutil.copy(file, directory)
    ended(counting(directory, 100))
    (directory / "dump").write_bytes(dump)
    node = Counter(directory)
    node.run_until(lambda: node._isLeader() and node.isReady())
    return {"acknowledged": 100, "left": node.count}


def unreadable_dump(directory: Path) -> dict[str, Any]:
    """One damaged byte in the snapshot, after the log was trimmed to it."""
    node = counting(directory, 50)
    node.forceLogCompaction()
    node.run_until((directory / "dump").exists)
    for _ in range(20):
        node.doTick(0.001)
    ended(node)
    dump = bytearray((directory / "dump").read_bytes())
    dump[len(dump) // 2] ^= 255
    (directory / "dump").write_bytes(dump)
    node = Counter(directory)
    leads = node.run_until(node._isLeader)
    for _ in range(200):
        node.doTick(0.001)
    return {"acknowledged": 50, "left": node.count, "leads": leads}


def foreign_version(directory: Path) -> dict[str, Any]:
    """A newer manager has switched the code version; then one more entry follows."""
    node = counting(directory, 5)
    node._applyCommand(pickle.dumps(7), None, 3)
    node.add()
    node.run_until(lambda: node.count > 6)
    return {"acknowledged": 6, "counted": node.count}


def failing_entry(directory: Path) -> dict[str, Any]:
    """The state machine fails at one entry; then one more follows."""
    node = counting(directory, 5)
    node.fail()
    node.add()
    failures = 0
    for _ in range(20):
        try:
            node.doTick(0.0)
        except ValueError:
            failures += 1
    return {"failed more than once": failures > 1, "counted": node.count, "leads": node._isLeader()}


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def evil_entry(directory: Path) -> dict[str, Any]:
    """A member, or who has written to its log, sends an entry of its own making."""
    node = counting(directory, 1)
    node._applyCommand(pickle.dumps(Evil(directory / "executed")), None, 0)
    with contextlib.suppress(Exception):
        for _ in range(20):
            node.doTick(0.0)
    return {"executed": (directory / "executed").exists()}


SCENARIOS = (
    torn_vote, compaction, commit_beyond_the_end, syncs, full_disk, newer_dump, unreadable_dump,
    foreign_version, failing_entry, evil_entry,
)  # fmt: skip

if __name__ == "__main__":
    scenario = {each.__name__: each for each in SCENARIOS}[sys.argv[1]]
    print(json.dumps(scenario(Path(sys.argv[2]))), flush=True)
    os._exit(0)
