"""Snapshots: the whole state as of one entry, in a checked file of our own, written while the state moves on.

Layout: MAGIC, a header (JSON: format version, index, term, members), records, a footer. Header and records are each
length, CRC-32, bytes. The first two records are the commands of the last two entries (the kernel begins its log with
them), the rest is the state machine's dump. The footer has a length no record can have, the number of
records, and the CRC-32 over all before it. Integers are big-endian.

Two snapshots are kept: if the newest is damaged, the one before it and the log, which reaches back to it, will do.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from swarm.consensus.faults import Damaged
from swarm.consensus.files import publish, sync_directory
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
_PATTERN = "snapshot-*.snap"


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
    """The snapshots in one directory. Methods may be called from any one thread at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, meta: Meta, records: Iterable[bytes]) -> Path:
        """Store a snapshot durably and forget all but the newest two."""
        temporary = self._directory / "writing.new"
        with temporary.open("wb") as file:
            _write(file, meta, records)
            file.flush()
            os.fsync(file.fileno())
        return self._adopt(temporary, meta)

    def receiving(self) -> Path:
        """Where to collect a snapshot that another member sends."""
        return self._directory / "receiving.new"

    def check(self, path: Path) -> Meta:
        """Read the whole file. Raises BadSnapshot."""
        reader = _Reader(path)
        with reader.file:
            for _ in reader.records():
                pass
        return reader.meta

    def adopt(self, received: Path, meta: Meta) -> Path:
        """Keep a received, checked file."""
        with received.open("rb") as file:
            os.fsync(file.fileno())
        return self._adopt(received, meta)

    def _adopt(self, temporary: Path, meta: Meta) -> Path:
        path = self._directory / f"snapshot-{meta.index:016x}-{meta.term:08x}.snap"
        publish(temporary, path)
        for old in self.paths()[KEPT:]:
            old.unlink(missing_ok=True)
        sync_directory(self._directory)
        return path

    def paths(self) -> list[Path]:
        """Newest first."""
        return sorted(self._directory.glob(_PATTERN), reverse=True)

    def newest(self) -> Path | None:
        return next(iter(self.paths()), None)

    def oldest_index(self) -> int:
        """Index of the older of the kept snapshots, 0 if there is at most one: the log must reach back to it."""
        paths = self.paths()
        return int(paths[-1].stem.split("-")[1], 16) if len(paths) == KEPT else 0

    def newest_good(self) -> tuple[Meta | None, list[str]]:
        """The newest snapshot that checks, and what is wrong with newer ones. Raises Damaged if all are bad."""
        problems: list[str] = []
        for path in self.paths():
            try:
                return self.check(path), problems
            except BadSnapshot as error:
                problems.append(str(error))
        if problems:
            raise Damaged(self._directory, f"no snapshot can be read: {'; '.join(problems)}")
        return None, problems

    def read(self, meta: Meta) -> Iterator[bytes]:
        """The state machine's records. Raises BadSnapshot on the way if the file has been damaged since."""
        reader = _Reader(self._directory / f"snapshot-{meta.index:016x}-{meta.term:08x}.snap")
        with reader.file:
            yield from reader.records()

    def discard_temporaries(self) -> None:
        for path in self._directory.glob("*.new"):
            path.unlink()


def _write(file: BinaryIO, meta: Meta, records: Iterable[bytes]) -> None:
    crc = count = 0

    def put(data: bytes) -> None:
        nonlocal crc
        file.write(data)
        crc = zlib.crc32(data, crc)

    def put_record(data: bytes) -> None:
        put(_RECORD.pack(len(data), zlib.crc32(data)) + data)

    header = {
        "format": FORMAT,
        "index": [meta.previous[1], meta.last[1]],
        "term": [meta.previous[2], meta.last[2]],
        "members": list(meta.members),
    }
    put(_MAGIC)
    put_record(json.dumps(header).encode())
    for command in (meta.previous[0], meta.last[0]):
        put_record(command)
    for record in records:
        put_record(record)
        count += 1
    file.write(_FOOTER.pack(_FOOTER_MARK, count, crc))


class _Reader:
    """Reads a file once, forwards. `meta` is there from the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._crc = 0
        try:
            self.file = path.open("rb")
        except OSError as error:
            raise BadSnapshot(f"{path}: {error.strerror}") from None
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
            raise self._bad(f"the record before byte {self.file.tell()} is damaged")
        return data

    def _take(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) != size:
            raise self._bad("it ends too early")
        self._crc = zlib.crc32(data, self._crc)
        return data

    def _bad(self, why: str) -> BadSnapshot:
        return BadSnapshot(f"{self._path}: {why}")
