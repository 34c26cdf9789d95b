"""The write-ahead log of one member: entries, term and vote, in segments that are only appended to.

It is pysyncobj's `Journal` and the engine's log. Writing is buffered; `sync` puts everything written since the last
one on disk with one fdatasync, and nothing that promises durability may leave the process before it. An error of the
disk ends the process: after a failed fsync nobody knows what is on the disk.

In memory the log begins shortly before the newest snapshot, on disk before the older of the two kept ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pysyncobj.journal import Journal

from swarm.consensus import codec, membership, wal_format
from swarm.consensus.config import DEFAULTS, RaftConfig
from swarm.consensus.disk import AppendFile, Disk, write_whole
from swarm.consensus.faults import Damaged, Fatal
from swarm.consensus.membership import MemberId
from swarm.consensus.wal_format import Kind, Record

Entry = tuple[bytes, int, int]
"""Command, index, term: the kernel's shape."""
_NAME = re.compile(r"wal-(\d{8})\.log")


@dataclass(slots=True)
class _Segment:
    number: int
    name: str
    last_index: int = 0
    """Highest entry that was ever written to it."""


def _name(number: int) -> str:
    return f"wal-{number:08d}.log"


class Wal(Journal):  # type: ignore[misc]  # pysyncobj has no types
    """Open with `create` or `load`."""

    def __init__(
        self,
        disk: Disk,
        fatal: Fatal,
        config: RaftConfig = DEFAULTS,
    ) -> None:
        self._disk = disk
        self._fatal = fatal
        self._config = config
        self._entries: list[Entry] = []
        self._term, self._vote, self._commit = 0, "", 1
        self._commit_written = 1
        self._base: tuple[int, tuple[MemberId, ...]] = (0, ())
        self._changes: list[tuple[int, str, MemberId]] = []
        self._pending: list[Record] = []
        self._batch = 0
        self._segments: list[_Segment] = []
        self._file: AppendFile | None = None
        self._file_bytes = 0
        self.log_bytes = 0
        """Bytes of commands held in memory."""
        self.written_bytes = 0
        """Bytes of commands ever added by this process."""
        self.syncs = 0
        self.membership_version = 0
        """Grows whenever `members` may have changed."""

    # ---- opening

    @classmethod
    def create(cls, disk: Disk, members: tuple[MemberId, ...], fatal: Fatal, config: RaftConfig = DEFAULTS) -> Wal:
        """A new log on an empty disk, whose base is these members."""
        wal = cls(disk, fatal, config)
        wal._base = (0, members)
        wal._start_segment(1)
        return wal

    @classmethod
    def load(cls, disk: Disk, fatal: Fatal, config: RaftConfig = DEFAULTS) -> Wal:
        """What a run before this one left. Raises Damaged, and then has changed nothing."""
        wal = cls(disk, fatal, config)
        numbers = _numbers(disk)
        for expected, number in enumerate(numbers, numbers[0]):
            if number != expected:
                raise Damaged(f"{disk}/{_name(expected)}", "this part of the log is missing")
            wal._replay(number, is_newest=number == numbers[-1])
        wal._commit_written = wal._commit
        return wal

    @staticmethod
    def exists(disk: Disk) -> bool:
        return bool(_numbers(disk))

    def _replay(self, number: int, is_newest: bool) -> None:
        name = _name(number)
        path = f"{self._disk}/{name}"
        try:
            data = self._disk.read(name)
        except OSError as error:
            raise Damaged(path, f"it cannot be read: {error}") from None
        if not data.startswith(wal_format.FILE_MAGIC):
            raise Damaged(path, "it is not a log of this program, or its beginning is damaged")
        found, stop = wal_format.scan(data)
        if stop < len(data) and (not is_newest or wal_format.is_damage(data, found, stop)):
            raise Damaged(path, f"the record at byte {stop} is damaged, and entries that were safe follow it")
        while found and not found[-1].ends:
            found.pop()  # the torn batch: nothing in it was promised to anyone
        if not found or found[0].record.kind is not Kind.HARD:
            raise Damaged(path, "term and vote are missing, so this member might vote twice")
        segment = _Segment(number, name)
        self._segments.append(segment)
        for located in found:
            self._redo(located.record, path)
            segment.last_index = max(segment.last_index, self.last_index)
        self._batch = found[-1].batch
        if is_newest:
            self._file_bytes = found[-1].end
            self._file = self._disk.append(name, self._file_bytes)
            self._file.sync()

    def _redo(self, record: Record, path: str) -> None:
        match record.kind:
            case Kind.ENTRY:
                if self._entries and record.index != self.last_index + 1:
                    raise Damaged(path, f"entry {record.index} follows entry {self.last_index}")
                self._append((record.payload, record.index, record.term))
            case Kind.TRUNCATE:
                self._forget_from(max(0, record.index - self.first_index) if self._entries else 0)
            case Kind.RESET:
                self._forget_from(0)
            case Kind.HARD:
                self._term, self._vote = record.term, record.payload.decode()
            case Kind.COMMIT:
                self._commit = record.index
            case Kind.BASE:
                self._set_base(record.index, _members_of(record.payload))

    def _start_segment(self, number: int) -> None:
        """A segment begins with all that must not be lost when those before it are dropped."""
        header = [
            Record(Kind.HARD, 0, self._term, self._vote.encode()),
            Record(Kind.COMMIT, self._commit),
            Record(Kind.BASE, self._base[0], 0, "\n".join(self._base[1]).encode()),
        ]
        self._batch += 1
        name = _name(number)
        data = wal_format.FILE_MAGIC + wal_format.encode_batch(header, self._batch)
        write_whole(self._disk, name, data)
        self.abandon()
        self._file = self._disk.append(name, len(data))
        self._file_bytes = len(data)
        self._segments.append(_Segment(number, name, 0))

    # ---- durability

    def sync(self) -> None:
        """Everything written so far is on disk when this returns; otherwise the process has ended."""
        if not self._pending:
            return
        records, self._pending = self._pending, []
        self._batch += 1
        data = wal_format.encode_batch(records, self._batch)
        assert self._file is not None
        try:
            self._file.write(data)
            self._file.sync()
            self.syncs += 1
            self._file_bytes += len(data)
            highest = max((record.index for record in records if record.kind is Kind.ENTRY), default=0)
            self._segments[-1].last_index = max(self._segments[-1].last_index, highest)
            if self._file_bytes > self._config.segment_bytes:
                self._start_segment(self._segments[-1].number + 1)
        except OSError as error:
            path = f"{self._disk}/{self._segments[-1].name}"
            self._fatal(f"cannot write {path}: {error}; free or replace the disk, then start again")

    @property
    def is_dirty(self) -> bool:
        return bool(self._pending)

    def close(self) -> None:
        """Write what is known to be committed, so that the next start need not ask, and close."""
        if self._file is None:
            return
        self.onOneSecondTimer()
        self.sync()
        self.abandon()

    def abandon(self) -> None:
        """Close without writing: what a crash leaves."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def drop_below(self, index: int) -> None:
        """Reclaim the disk space of entries below `index`; starts a segment so that the next call reclaims more."""
        self.sync()
        try:
            if self._segments[-1].last_index:
                self._start_segment(self._segments[-1].number + 1)
            while len(self._segments) > 1 and self._segments[0].last_index < index:
                self._disk.remove(self._segments.pop(0).name)
            self._disk.sync_names()
        except OSError as error:
            self._fatal(f"cannot reclaim space in {self._disk}: {error}; free or replace the disk")

    # ---- what the engine asks

    @property
    def base_index(self) -> int:
        """Everything up to here is in a snapshot."""
        return self._base[0]

    @property
    def first_index(self) -> int:
        return self._entries[0][1] if self._entries else 0

    @property
    def last_index(self) -> int:
        return self._entries[-1][1] if self._entries else 0

    def term_at(self, index: int) -> int | None:
        """Term of the entry, or None if it is not held."""
        if not self._entries or not self.first_index <= index <= self.last_index:
            return None
        return self._entries[index - self.first_index][2]

    def entry_at(self, index: int) -> Entry:
        return self._entries[index - self.first_index]

    def members(self, up_to: int | None = None) -> tuple[MemberId, ...]:
        """The configuration: of the whole log, or as of the entry `up_to` (not below the base)."""
        return membership.after(
            self._base[1],
            ((operation, name) for index, operation, name in self._changes if up_to is None or index <= up_to),
        )

    def removes(self, name: MemberId) -> bool:
        """Whether the log, as far as it is in memory, holds the removal of this member."""
        return any((operation, gone) == ("rem", name) for _, operation, gone in self._changes)

    def last_change(self) -> int:
        """Index of the newest change of members in the log; 0 if none."""
        return self._changes[-1][0] if self._changes else 0

    def set_base(self, index: int, members: tuple[MemberId, ...], write: bool) -> None:
        """A snapshot holds everything up to `index`; `members` is the configuration there."""
        self._set_base(index, members)
        if write:
            self._pending.append(Record(Kind.BASE, index, 0, "\n".join(members).encode()))

    def _set_base(self, index: int, members: tuple[MemberId, ...]) -> None:
        self._base = (index, members)
        found = ((entry[1], codec.membership_change(entry[0])) for entry in self._entries if entry[1] > index)
        self._changes = [(at, *change) for at, change in found if change is not None]
        self.membership_version += 1

    def forget_before(self, index: int) -> None:
        """Drop entries below `index` from memory (not from disk)."""
        count = max(0, index - self.first_index)
        self.log_bytes -= sum(len(entry[0]) for entry in self._entries[:count])
        del self._entries[:count]

    def reset_to(self, entries: tuple[Entry, Entry], base: tuple[MemberId, ...]) -> None:
        """Replace the whole log by the two entries that end a snapshot."""
        self.clear()
        self.set_base(entries[1][1], base, write=True)
        for entry in entries:
            self.add(*entry)

    # ---- pysyncobj's Journal

    def add(self, command: bytes, idx: int, term: int) -> None:
        self._append((command, idx, term))
        self.written_bytes += len(command)
        self._pending.append(Record(Kind.ENTRY, idx, term, command))

    def _append(self, entry: Entry) -> None:
        self._entries.append(entry)
        self.log_bytes += len(entry[0])
        change = codec.membership_change(entry[0])
        if change is not None and entry[1] > self._base[0]:
            self._changes.append((entry[1], *change))
            self.membership_version += 1

    def _forget_from(self, position: int) -> None:
        gone = self._entries[position:]
        if not gone:
            return
        del self._entries[position:]
        self.log_bytes -= sum(len(entry[0]) for entry in gone)
        if self._changes and self._changes[-1][0] >= gone[0][1]:
            self._changes = [change for change in self._changes if change[0] < gone[0][1]]
            self.membership_version += 1

    def clear(self) -> None:
        self._forget_from(0)
        self._pending.append(Record(Kind.RESET))

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        if entryFrom >= len(self._entries):
            return
        self._pending.append(Record(Kind.TRUNCATE, self._entries[entryFrom][1]))
        self._forget_from(entryFrom)

    def deleteEntriesTo(self, entryTo: int) -> None:
        """The kernel has a snapshot. A tail stays in memory, for followers that are only a little behind."""
        tail_bytes, keep = 0, 0
        while keep < min(entryTo, self._config.tail_entries) and tail_bytes < self._config.tail_bytes:
            keep += 1
            tail_bytes += len(self._entries[entryTo - keep][0])
        self.forget_before(self.first_index + entryTo - keep)

    def __getitem__(self, item: Any) -> Any:
        return self._entries[item]

    def __len__(self) -> int:
        return len(self._entries)

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        self._commit = raftCommitIndex

    def getRaftCommitIndex(self) -> int:
        return min(self._commit, self.last_index) if self._entries else 1

    def setCurrentTerm(self, term: int, votedForNodeId: MemberId | None) -> None:
        self._term, self._vote = term, votedForNodeId or ""
        self._pending.append(Record(Kind.HARD, 0, term, self._vote.encode()))

    def getCurrentTerm(self) -> int:
        return self._term

    def getVotedForNodeId(self) -> MemberId | None:
        return self._vote or None

    def onOneSecondTimer(self) -> None:
        if self._commit != self._commit_written:
            self._commit_written = self._commit
            self._pending.append(Record(Kind.COMMIT, self._commit))

    def _destroy(self) -> None:
        self.close()


def _numbers(disk: Disk) -> list[int]:
    """Of the segments, in order."""
    return sorted(int(found[1]) for found in map(_NAME.fullmatch, disk.names()) if found)


def _members_of(payload: bytes) -> tuple[MemberId, ...]:
    return tuple(payload.decode().split("\n")) if payload else ()
