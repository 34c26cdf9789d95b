"""One table of the replicated state: objects by ID, by name, and by the keys the orchestrator asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from swarm.store.changes import Record

DIGEST_BYTES = 16
DIGEST_MODULUS = 1 << (8 * DIGEST_BYTES)

T = TypeVar("T", bound=Record)
NameOf = Callable[[T], str]
Keys = tuple[str | frozenset[str], ...]
"""What each index files an object under: one key, several, or none ("")."""
KeysOf = Callable[[T], Keys]
NO_KEYS: Keys = ()


@dataclass(slots=True)
class _Row(Generic[T]):
    """Mutable, and the same for as long as the object exists. Making digest and keys anew for what an update replaces
    would double its cost."""

    record: T
    digest: int
    keys: Keys


class Table(Generic[T]):
    """Objects are never mutated by readers: copy, change the copy, and commit that."""

    def __init__(
        self,
        name_of: NameOf[T] | None = None,
        indexes: Sequence[str] = (),
        keys_of: KeysOf[T] = lambda record: NO_KEYS,
    ) -> None:
        """`keys_of` gives one entry for each of `indexes`, in their order."""
        self._rows: dict[str, _Row[T]] = {}
        self._name_of = name_of
        self._ids_by_name: dict[str, str] = {}
        self.digest = 0
        """Sum of the objects' digests: equal wherever the objects are equal."""
        self._keys_of = keys_of
        self._indexes: dict[str, dict[str, dict[str, _Row[T]]]] = {name: {} for name in indexes}
        """By key and ID: an object that stays under its key costs nothing when it changes."""
        self._unfiled: Keys = ("",) * len(indexes)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[T]:
        return iter([row.record for row in self._rows.values()])

    def __contains__(self, object_id: str) -> bool:
        return object_id in self._rows

    def get(self, object_id: str) -> T | None:
        row = self._rows.get(object_id)
        return row.record if row is not None else None

    def by_name(self, name: str) -> T | None:
        """Names are unique per table, without regard to case."""
        return self.get(self._ids_by_name.get(name.lower(), ""))

    def where(self, index: str, key: str) -> list[T]:
        """All objects whose indexed key equals `key`, in the order they were stored."""
        return [row.record for row in self._indexes[index].get(key, {}).values()]

    def count(self, index: str, key: str) -> int:
        return len(self._indexes[index].get(key, ()))

    def keys(self, index: str) -> list[str]:
        """Every key under which something is filed."""
        return list(self._indexes[index])

    @property
    def indexes(self) -> list[str]:
        return list(self._indexes)

    def name_owner(self, record: T) -> str | None:
        """ID of another object that holds this record's name."""
        name = self._name_of(record).lower() if self._name_of else ""
        owner = self._ids_by_name.get(name) if name else None
        return owner if owner != record.id else None

    def put(self, record: T) -> None:
        object_id = record.id  # one string for all places: each reading of the field makes another
        row = self._rows.get(object_id)
        if self._name_of is not None:
            self._name(row, record)
        if row is None:
            row = self._rows[object_id] = _Row(record, 0, self._unfiled)
        digest = digest_of(record)
        self.digest += digest - row.digest
        row.record, row.digest = record, digest
        keys = self._keys_of(record)
        if keys != row.keys:
            self._refile(object_id, row, keys)

    def discard(self, object_id: str) -> None:
        row = self._rows.pop(object_id, None)
        if row is None:
            return
        if self._name_of is not None:
            self._name(row, None)
        self._refile(object_id, row, self._unfiled)
        self.digest -= row.digest

    def _name(self, before: _Row[T] | None, after: T | None) -> None:
        assert self._name_of is not None
        if before is not None:
            self._ids_by_name.pop(self._name_of(before.record).lower(), None)
        if after is not None and (name := self._name_of(after)):
            self._ids_by_name[name.lower()] = after.id

    def _refile(self, object_id: str, row: _Row[T], keys: Keys) -> None:
        """File an object under its new keys only; where a key stays, so does its place in the order."""
        for filed, before, after in zip(self._indexes.values(), row.keys, keys, strict=True):
            if before == after:
                continue
            for key in _several(before):
                if key not in _several(after):
                    del filed[key][object_id]
                    if not filed[key]:
                        del filed[key]
            for key in _several(after):
                filed.setdefault(key, {})[object_id] = row
        row.keys = keys


def digest_of(message: Message) -> int:
    """Of one object. Sums of these do not depend on the order, so a table's costs no more than what changes."""
    raw = message.SerializeToString(deterministic=True)
    return int.from_bytes(hashlib.blake2b(raw, digest_size=DIGEST_BYTES).digest(), "big")


def _several(keys: str | frozenset[str]) -> Collection[str]:
    if isinstance(keys, str):
        return (keys,) if keys else ()
    return keys
