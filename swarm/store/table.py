"""One table of the replicated state: objects by ID, by name, and by the keys the orchestrator asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from swarm.store.changes import Record

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
        self._keys_of: Mapping[str, KeysOf[T]] = indexes
        self._indexes: dict[str, dict[str, dict[str, T]]] = {name: {} for name in indexes}

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
        return list(self._indexes[index].get(key, {}).values())

    def count(self, index: str, key: str) -> int:
        return len(self._indexes[index].get(key, ()))

    def keys(self, index: str) -> list[str]:
        """Every key under which something is filed."""
        return list(self._indexes[index])

    def name_owner(self, record: T) -> str | None:
        """ID of another object that holds this record's name."""
        name = self._name_of(record).lower() if self._name_of else ""
        owner = self._ids_by_name.get(name) if name else None
        return owner if owner != record.id else None

    def put(self, record: T) -> None:
        self.discard(record.id)
        self._rows[record.id] = record
        if self._name_of and (name := self._name_of(record)):
            self._ids_by_name[name.lower()] = record.id
        for index, key_of in self._keys_of.items():
            for key in _several(key_of(record)):
                self._indexes[index].setdefault(key, {})[record.id] = record

    def discard(self, object_id: str) -> None:
        record = self._rows.pop(object_id, None)
        if record is None:
            return
        if self._name_of and (name := self._name_of(record)):
            self._ids_by_name.pop(name.lower(), None)
        for index, key_of in self._keys_of.items():
            for key in _several(key_of(record)):
                rows = self._indexes[index][key]
                del rows[object_id]
                if not rows:
                    del self._indexes[index][key]


def _several(keys: str | Iterable[str]) -> Iterable[str]:
    if isinstance(keys, str):
        return (keys,) if keys else ()
    return keys
