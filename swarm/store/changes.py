"""What deciders return: changes grouped so that each group is stored whole or not at all.

The object in an `Update` or `Remove` carries in `meta.version` the version that was read; if the
stored object has moved on, the group is refused and the decider, being level-triggered, decides anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from proto import store_pb2 as pb
from proto.objects_pb2 import Cluster, Network, Node, Service, Task

Record = Cluster | Node | Service | Task | Network
R = TypeVar("R", bound=Message)


def copy_of(record: R) -> R:
    """A copy to change and commit; records taken from the store are never mutated."""
    copy = type(record)()
    copy.CopyFrom(record)
    return copy


@dataclass(frozen=True, slots=True)
class Create:
    record: Record


@dataclass(frozen=True, slots=True)
class Update:
    record: Record


@dataclass(frozen=True, slots=True)
class Remove:
    record: Record


Change = Create | Update | Remove
Group = tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a decider wants: groups to store, and when (Unix s) to be asked again even without a change:
    about everything (`wake_at`), or about single services (`wakes`: service ID, time). `again` are the services that
    it had no time for: it is to be asked about them at once, when what it wants now is stored. `notes` are for the log:
    what it found wrong."""

    groups: tuple[Group, ...] = ()
    wake_at: float | None = None
    wakes: tuple[tuple[str, float], ...] = ()
    again: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


_KINDS: dict[type[Record], tuple[str, pb.ObjectKind.ValueType]] = {
    Cluster: ("cluster", pb.CLUSTER_KIND),
    Node: ("node", pb.NODE_KIND),
    Service: ("service", pb.SERVICE_KIND),
    Task: ("task", pb.TASK_KIND),
    Network: ("network", pb.NETWORK_KIND),
}
RECORD_TYPES = {kind: record_type for record_type, (_, kind) in _KINDS.items()}
_ACTIONS: dict[type, pb.Change.Action.ValueType] = {
    Create: pb.Change.CREATE,
    Update: pb.Change.UPDATE,
    Remove: pb.Change.REMOVE,
}


def wrap(record: Record) -> pb.Object:
    """The record inside the union message."""
    wrapped = pb.Object()
    getattr(wrapped, _KINDS[type(record)][0]).CopyFrom(record)
    return wrapped


def unwrap(wrapped: pb.Object) -> Record:
    """The record held by the union message."""
    kind = wrapped.WhichOneof("kind")
    assert kind is not None, "empty Object"
    record: Record = getattr(wrapped, kind)
    return record


def transaction(changes: Iterable[Change], at: float, request_id: str = "") -> pb.Transaction:
    """The wire form of one group."""
    message = pb.Transaction()
    fill(message, changes, at, request_id)
    return message


def fill(message: pb.Transaction, changes: Iterable[Change], at: float, request_id: str = "") -> None:
    """The same, in an empty message that is part of an entry."""
    message.request_id, message.at = request_id, at
    for change in changes:
        record, added = change.record, message.changes.add()
        added.action, added.kind = _ACTIONS[type(change)], _KINDS[type(record)][1]
        if isinstance(change, Remove):
            added.id, added.version = record.id, record.meta.version
        else:
            added.record = record.SerializeToString()
