"""One table of the replicated state: objects by ID, by name, and by the keys the orchestrator asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
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


class Table(Generic[T]):
    """Objects are never mutated by readers: copy, change the copy, and commit that."""

    def __init__(
        self,
        name_of: NameOf[T] | None = None,
        indexes: Sequence[str] = (),
        keys_of: KeysOf[T] = lambda record: NO_KEYS,
    ) -> None:
        """`keys_of` gives one entry for each of `indexes`, in their order."""
        self._rows: dict[str, T] = {}
        self._kept: dict[str, tuple[int, Keys]] = {}
        """Digest and keys of each row: making them anew for what an update replaces would double its cost."""
        self._name_of = name_of
        self._ids_by_name: dict[str, str] = {}
        self.digest = 0
        """Sum of the objects' digests: equal wherever the objects are equal."""
        self._keys_of = keys_of
        self._indexes: dict[str, dict[str, dict[str, None]]] = {name: {} for name in indexes}
        """IDs only: an object that stays under its key costs nothing when it changes."""
        self._unfiled: Keys = ("",) * len(indexes)

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
        if self._name_of is not None:
            self._name(self._rows.get(object_id), record)
        self._rows[object_id] = record
        digest, keys = digest_of(record), self._keys_of(record)
        old_digest, old_keys = self._kept.get(object_id, (0, NO_KEYS))
        self._kept[object_id] = digest, old_keys if keys == old_keys else self._refile(object_id, old_keys, keys)
        self.digest += digest - old_digest

    def discard(self, object_id: str) -> None:
        before = self._rows.pop(object_id, None)
        if before is None:
            return
        if self._name_of is not None:
            self._name(before, None)
        digest, keys = self._kept.pop(object_id)
        self._refile(object_id, keys, NO_KEYS)
        self.digest -= digest

    def _name(self, before: T | None, after: T | None) -> None:
        assert self._name_of is not None
        if before is not None:
            self._ids_by_name.pop(self._name_of(before).lower(), None)
        if after is not None and (name := self._name_of(after)):
            self._ids_by_name[name.lower()] = after.id

    def _refile(self, object_id: str, old: Keys, new: Keys) -> Keys:
        """File an object under its new keys only; where a key stays, so does its place in the order."""
        old, new = old or self._unfiled, new or self._unfiled
        for filed, before, after in zip(self._indexes.values(), old, new, strict=True):
            if before == after:
                continue
            for key in _several(before):
                if key not in _several(after):
                    del filed[key][object_id]
                    if not filed[key]:
                        del filed[key]
            for key in _several(after):
                filed.setdefault(key, {})[object_id] = None
        return new


def digest_of(message: Message) -> int:
    """Of one object. Sums of these do not depend on the order, so a table's costs no more than what changes."""
    raw = message.SerializeToString(deterministic=True)
    return int.from_bytes(hashlib.blake2b(raw, digest_size=DIGEST_BYTES).digest(), "big")


def _several(keys: str | frozenset[str]) -> Collection[str]:
    if isinstance(keys, str):
        return (keys,) if keys else ()
    return keys
