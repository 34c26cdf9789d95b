"""One table of the replicated state: objects by ID, by name, and by the keys the orchestrator asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from google.protobuf.message import Message

from swarm.store.changes import Record

DIGEST_BYTES = 16
DIGEST_MODULUS = 1 << (8 * DIGEST_BYTES)

T = TypeVar("T", bound=Record)
NameOf = Callable[[T], str]
KeysOf = Callable[[T], str | Iterable[str]]
"""What an index files an object under: one key, several distinct keys, or none ("")."""


class Table(Generic[T]):
    """Objects are never mutated by readers: copy, change the copy, and commit that."""

    def __init__(self, name_of: NameOf[T] | None = None, **indexes: KeysOf[T]) -> None:
        self._rows: dict[str, T] = {}
        self._name_of = name_of
        self._ids_by_name: dict[str, str] = {}
        self.digest = 0
        """Sum of the objects' digests: equal wherever the objects are equal."""
        self._keys_of: Mapping[str, KeysOf[T]] = indexes
        self._indexes: dict[str, dict[str, dict[str, None]]] = {name: {} for name in indexes}
        """IDs only: an object that stays under its key costs nothing when it changes."""

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._rows.values()))

    def __contains__(self, object_id: str) -> bool:
        return object_id in self._rows

    def get(self, object_id: str) -> T | None:
        return self._rows.get(object_id)

    def by_name(self, name: str) -> T | None:
        """Names are unique per table, without regard to case."""
        return self._rows.get(self._ids_by_name.get(name.lower(), ""))

    def where(self, index: str, key: str) -> list[T]:
        """All objects whose indexed key equals `key`, in the order they were stored."""
        rows = self._rows
        return [rows[object_id] for object_id in self._indexes[index].get(key, ())]

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
        before = self._rows.get(object_id)
        self._rows[object_id] = record
        self._name(before, record)
        for index, keys_of in self._keys_of.items():
            keys = keys_of(record)
            if before is not None:
                earlier = keys_of(before)
                if keys == earlier:
                    continue
                self._unfile(index, object_id, earlier, _several(keys))
            for key in _several(keys):
                self._indexes[index].setdefault(key, {})[object_id] = None
        self.digest = (
            self.digest + digest_of(record) - (digest_of(before) if before is not None else 0)
        ) % DIGEST_MODULUS

    def discard(self, object_id: str) -> None:
        before = self._rows.pop(object_id, None)
        if before is None:
            return
        self._name(before, None)
        for index, keys_of in self._keys_of.items():
            self._unfile(index, object_id, keys_of(before), ())
        self.digest = (self.digest - digest_of(before)) % DIGEST_MODULUS

    def _name(self, before: T | None, after: T | None) -> None:
        if self._name_of is None:
            return
        if before is not None:
            self._ids_by_name.pop(self._name_of(before).lower(), None)
        if after is not None and (name := self._name_of(after)):
            self._ids_by_name[name.lower()] = after.id

    def _unfile(self, index: str, object_id: str, keys: str | Iterable[str], but: Container[str]) -> None:
        """Drop what the index says about an object under these keys, except those where it stays."""
        filed = self._indexes[index]
        for key in _several(keys):
            if key not in but:
                del filed[key][object_id]
                if not filed[key]:
                    del filed[key]


def digest_of(message: Message) -> int:
    """Of one object. Sums of these do not depend on the order, so a table's costs no more than what changes."""
    raw = message.SerializeToString(deterministic=True)
    return int.from_bytes(hashlib.blake2b(raw, digest_size=DIGEST_BYTES).digest(), "big")


def _several(keys: str | Iterable[str]) -> Collection[str]:
    if isinstance(keys, str):
        return (keys,) if keys else ()
    return keys if isinstance(keys, Collection) else tuple(keys)
