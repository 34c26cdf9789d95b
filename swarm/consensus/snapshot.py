"""Snapshots: the whole state as of one entry, in a checked file of our own, written while the state moves on.

Layout: MAGIC, a header (JSON: format version, index, term, members), records, a footer. Header and records are each
length, CRC-32, bytes. The first two records are the commands of the last two entries (the kernel begins its log with
them), the rest is the state machine's dump. The footer has a length no record can have, the number of
records, and the CRC-32 over all before it. Integers are big-endian.

Two snapshots are kept: if the newest is damaged, the one before it and the log, which reaches back to it, will do.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader

from swarm.consensus.disk import AppendFile, Disk
from swarm.consensus.faults import Damaged
from swarm.consensus.membership import MemberId
from swarm.consensus.wal import Entry

FORMAT = 1
KEPT = 2
RECORD_BYTES_MAX = 64 << 20
"""Far above the largest object; a length beyond it is damage."""
_MAGIC = b"PYSWSNAP"
_RECORD = struct.Struct(">II")
_FOOTER = struct.Struct(">IQI")
_FOOTER_MARK = 0xFFFFFFFF
_NAME = re.compile(r"snapshot-([0-9a-f]{16})-[0-9a-f]{8}\.snap")
WRITING, RECEIVING = "writing.new", "receiving.new"
"""Where one is written, and where one that another member sends is collected."""
BUFFER_BYTES = 1 << 18
"""Gathered before a write: records are small."""
SYNC_EVERY_BYTES = 1 << 20
"""A sync of the log also waits for what other files of the disk have waiting: so a snapshot never has much waiting."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What a snapshot stands for: the two entries that end it, and the members then."""

    previous: Entry
    last: Entry
    members: tuple[MemberId, ...]

    @property
    def index(self) -> int:
        return self.last[1]

    @property
    def term(self) -> int:
        return self.last[2]


class BadSnapshot(ValueError):
    """The file does not check; the message says where."""


class SnapshotStore:
    """The snapshots on one disk. Methods may be called from any one thread at a time."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def write(self, meta: Meta, records: Iterable[bytes]) -> str:
        """Store a snapshot durably and forget all but the newest two."""
        file = self._disk.create(WRITING)
        try:
            unsynced = 0
            for piece in encode(meta, records):
                file.write(piece)
                unsynced += len(piece)
                if unsynced >= SYNC_EVERY_BYTES:
                    file.sync()
                    unsynced = 0
            file.sync()
        finally:
            file.close()
        return self._adopt(WRITING, meta)

    def receive(self) -> AppendFile:
        """An empty file for a snapshot that another member sends."""
        return self._disk.create(RECEIVING)

    def check_received(self) -> Meta:
        """Raises BadSnapshot."""
        return self.check(RECEIVING)

    def adopt_received(self, meta: Meta) -> str:
        """Keep the received file, which was synced and checked."""
        return self._adopt(RECEIVING, meta)

    def check(self, name: str) -> Meta:
        """Read the whole file. Raises BadSnapshot."""
        reader = _Reader(self._disk, name)
        with reader.file:
            for _ in reader.records():
                pass
        return reader.meta

    def _adopt(self, temporary: str, meta: Meta) -> str:
        name = _name(meta)
        self._disk.rename(temporary, name)
        self._disk.sync_names()
        for old in self.names()[KEPT:]:
            self._disk.remove(old)
        self._disk.sync_names()
        return name

    def names(self) -> list[str]:
        """Newest first."""
        return [name for name in reversed(self._disk.names()) if _NAME.fullmatch(name)]

    def newest(self) -> str | None:
        return next(iter(self.names()), None)

    def open(self, name: str) -> BufferedReader:
        """To send it."""
        return self._disk.open(name)

    def oldest_index(self) -> int:
        """Index of the older of the kept snapshots, 0 if there is at most one: the log must reach back to it."""
        names = self.names()
        return int(names[-1].split("-")[1], 16) if len(names) == KEPT else 0

    def newest_good(self) -> tuple[Meta | None, list[str]]:
        """The newest snapshot that checks, and what is wrong with newer ones. Raises Damaged if all are bad."""
        problems: list[str] = []
        for name in self.names():
            try:
                return self.check(name), problems
            except BadSnapshot as error:
                problems.append(str(error))
        if problems:
            raise Damaged(self._disk, f"no snapshot can be read: {'; '.join(problems)}")
        return None, problems

    def read(self, meta: Meta) -> Iterator[bytes]:
        """The state machine's records. Raises BadSnapshot on the way if the file has been damaged since."""
        yield from self.records(_name(meta))

    def records(self, name: str) -> Iterator[bytes]:
        """The same of any file. Raises BadSnapshot."""
        reader = _Reader(self._disk, name)
        with reader.file:
            yield from reader.records()

    def discard_temporaries(self) -> None:
        for name in self._disk.names():
            if name.endswith(".new"):
                self._disk.remove(name)


def _name(meta: Meta) -> str:
    return f"snapshot-{meta.index:016x}-{meta.term:08x}.snap"


def encode(meta: Meta, records: Iterable[bytes]) -> Iterator[bytes]:
    """The file, in pieces of at least BUFFER_BYTES."""
    header = {
        "format": FORMAT,
        "index": [meta.previous[1], meta.last[1]],
        "term": [meta.previous[2], meta.last[2]],
        "members": list(meta.members),
    }
    crc, count = zlib.crc32(_MAGIC), -3
    buffer = bytearray(_MAGIC)
    for data in itertools.chain([json.dumps(header).encode(), meta.previous[0], meta.last[0]], records):
        framed = _RECORD.pack(len(data), zlib.crc32(data)) + data
        crc = zlib.crc32(framed, crc)
        count += 1
        buffer += framed
        if len(buffer) >= BUFFER_BYTES:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer) + _FOOTER.pack(_FOOTER_MARK, count, crc)


class _Reader:
    """Reads a file once, forwards. `meta` is there from the start."""

    def __init__(self, disk: Disk, name: str) -> None:
        self._path = f"{disk}/{name}"
        self._crc = self._at = 0
        try:
            self.file = disk.open(name)
        except OSError as error:
            raise BadSnapshot(f"{self._path}: {error.strerror or error}") from None
        try:
            self.meta = self._read_meta()
        except BaseException:
            self.file.close()
            raise

    def _read_meta(self) -> Meta:
        if self._take(len(_MAGIC)) != _MAGIC:
            raise self._bad("it is not a snapshot of this program")
        try:
            header = json.loads(self._record())
            if header["format"] != FORMAT:
                raise self._bad(f"its format is {header['format']}, this program reads {FORMAT}")
            (previous_index, index), (previous_term, term) = header["index"], header["term"]
            members = tuple(str(name) for name in header["members"])
        except (KeyError, TypeError, ValueError) as error:
            raise error if isinstance(error, BadSnapshot) else self._bad("its header makes no sense") from None
        return Meta((self._record(), previous_index, previous_term), (self._record(), index, term), members)

    def records(self) -> Iterator[bytes]:
        count = 0
        while True:
            expected = self._crc
            size, check = _RECORD.unpack(self._take(_RECORD.size))
            if size == _FOOTER_MARK:
                footer = _RECORD.pack(size, check) + self._take(_FOOTER.size - _RECORD.size)
                if _FOOTER.unpack(footer)[1:] != (count, expected) or self.file.read(1):
                    raise self._bad("its footer does not fit its contents")
                return
            yield self._body(size, check)
            count += 1

    def _record(self) -> bytes:
        return self._body(*_RECORD.unpack(self._take(_RECORD.size)))

    def _body(self, size: int, check: int) -> bytes:
        if size > RECORD_BYTES_MAX:
            raise self._bad(f"a record claims {size} bytes")
        data = self._take(size)
        if zlib.crc32(data) != check:
            raise self._bad(f"the record before byte {self._at} is damaged")
        return data

    def _take(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) != size:
            raise self._bad("it ends too early")
        self._at += size
        self._crc = zlib.crc32(data, self._crc)
        return data

    def _bad(self, why: str) -> BadSnapshot:
        return BadSnapshot(f"{self._path}: {why}")
