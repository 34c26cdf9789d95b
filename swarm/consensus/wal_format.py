"""Bytes of the write-ahead log: records, and the rule that tells a torn tail from damage.

A file is MAGIC and then records. Records reach the disk in batches, one fdatasync each; a record carries the number
of its batch and the last one of a batch is marked. After a crash the batch that was being written may be
there in any part, all earlier ones are whole. Hence a record that does not check is a torn tail if it belongs to
the last batch in the file, and damage if any record of a later batch follows it.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

FILE_MAGIC = b"PYSWWAL1"
_MARK = b"\xa7WR\n"
_HEADER = struct.Struct(
    "<4sIIBBQQQ"
)  # mark, payload bytes, CRC-32 of all that follows it, kind, ends, batch, index, term
_CHECKED = struct.Struct("<BBQQQ")
PAYLOAD_BYTES_MAX = 16 << 20
"""Larger than any entry; a length beyond it is damage, not data."""


class Kind(enum.IntEnum):
    ENTRY = 1  # index, term, payload = command
    TRUNCATE = 2  # entries with this index and above are gone
    HARD = 3  # term, payload = voted for
    COMMIT = 4  # index
    BASE = 5  # members (payload, one per line) as of index
    RESET = 6  # all entries are gone; the next may have any index


@dataclass(frozen=True, slots=True)
class Record:
    kind: Kind
    index: int = 0
    term: int = 0
    payload: bytes = b""


def encode(record: Record, batch: int, ends: bool) -> bytes:
    fields = (int(record.kind), int(ends), batch, record.index, record.term)
    crc = zlib.crc32(record.payload, zlib.crc32(_CHECKED.pack(*fields)))
    return _HEADER.pack(_MARK, len(record.payload), crc, *fields) + record.payload


def encode_batch(records: list[Record], batch: int) -> bytes:
    """All records of one fdatasync."""
    last = len(records) - 1
    return b"".join(encode(record, batch, ends=number == last) for number, record in enumerate(records))


@dataclass(frozen=True, slots=True)
class Located:
    record: Record
    batch: int
    ends: bool
    end: int
    """Offset after it."""


def read_at(data: bytes, offset: int) -> Located | None:
    """The record at `offset`, or None if what stands there does not check."""
    if offset + _HEADER.size > len(data):
        return None
    mark, size, crc, kind, ends, batch, index, term = _HEADER.unpack_from(data, offset)
    start = offset + _HEADER.size
    if mark != _MARK or size > PAYLOAD_BYTES_MAX or start + size > len(data) or kind not in Kind._value2member_map_:
        return None
    payload = data[start : start + size]
    if zlib.crc32(payload, zlib.crc32(_CHECKED.pack(kind, ends, batch, index, term))) != crc:
        return None
    return Located(Record(Kind(kind), index, term, payload), batch, bool(ends), start + size)


def scan(data: bytes) -> tuple[list[Located], int]:
    """All records up to the first that does not check, and the offset where that one starts."""
    found: list[Located] = []
    offset = len(FILE_MAGIC)
    while (located := read_at(data, offset)) is not None:
        found.append(located)
        offset = located.end
    return found, offset


def is_damage(data: bytes, found: list[Located], stop: int) -> bool:
    """Whether what stands at `stop` was once safely on disk, rather than being the torn end of the last batch."""
    if stop >= len(data):
        return False
    torn_batch = 0
    if found:
        torn_batch = found[-1].batch + (1 if found[-1].ends else 0)
    return any(later.batch > torn_batch for later in _records_after(data, stop))


def _records_after(data: bytes, offset: int) -> Iterator[Located]:
    while (offset := data.find(_MARK, offset)) >= 0:
        located = read_at(data, offset)
        if located is None:
            offset += 1
        else:
            yield located
            offset = located.end
