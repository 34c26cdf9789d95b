"""The replicated state: tables, and the deterministic rule that applies a log entry to them.

`apply` is the only authority. It checks versions, names and existence itself, so two managers that
propose from stale reads cannot both win; it never reads a clock, never draws a random number and never
raises. Readers see live tables: within one turn of the event loop nothing changes under them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from google.protobuf.message import DecodeError

from proto import objects_pb2 as objects
from proto import store_pb2 as pb
from proto.objects_pb2 import Cluster, Network, Node, Service, Task
from swarm.store import states
from swarm.store.changes import RECORD_TYPES, Record, unwrap, wrap
from swarm.store.released import Released
from swarm.store.table import DIGEST_MODULUS, Keys, Table, digest_of

DEDUPE_LIMIT = 10_000
"""Remembered request IDs: at 1,000 writes per second a retry has 10 s, three times its deadline."""
OBJECT_BYTES_MAX = 1_000_000
"""One object; the reference limits a Raft entry to 1.5 MiB."""

_TABLE_NAMES = {
    pb.CLUSTER_KIND: "clusters",
    pb.NODE_KIND: "nodes",
    pb.SERVICE_KIND: "services",
    pb.TASK_KIND: "tasks",
    pb.NETWORK_KIND: "networks",
}


class Event(NamedTuple):
    """`before` is None for a creation, `after` is None for a removal. The states are read once for all that listen."""

    before: Record | None
    after: Record | None
    old_state: objects.TaskState.ValueType
    new_state: objects.TaskState.ValueType
    """Observed, of a task; NEW for what is none."""

    @classmethod
    def of(cls, before: Record | None, after: Record | None) -> Event:
        return cls(before, after, _state(before), _state(after))

    @property
    def keeps_addresses(self) -> bool:
        """What most changes are: a task got ahead, and holds what it held."""
        before, after, old_state, new_state = self
        return (
            isinstance(before, Task)
            and isinstance(after, Task)
            and (old_state > objects.TASK_RUNNING) == (new_state > objects.TASK_RUNNING)
            and before.networks == after.networks
        )

    @property
    def record(self) -> Record:
        record = self.after if self.after is not None else self.before
        assert record is not None
        return record


Listener = Callable[[Sequence[Event]], None]


class View(Protocol):
    """Something counted from the tables when it is made, and kept up to date with the events of each entry."""

    def __init__(self, store: Store) -> None: ...

    def note(self, events: Sequence[Event]) -> None: ...


V = TypeVar("V", bound=View)


class Store:
    def __init__(self) -> None:
        self.version = 0
        """Sequence of the last transaction that changed something; every manager counts alike."""
        self._clear()
        self._listeners: list[Listener] = []
        self._views: dict[type, View] = {}

    def _clear(self) -> None:
        self.clusters: Table[Cluster] = Table()
        self.nodes: Table[Node] = Table()
        self.services: Table[Service] = Table(name_of=lambda s: s.spec.annotations.name)
        self.networks: Table[Network] = Table(name_of=lambda n: n.spec.annotations.name)
        self.tasks: Table[Task] = Table(indexes=("service", "node", "network", "allocation"), keys_of=_task_keys)
        self._tables: dict[type, Table[Any]] = {
            Cluster: self.clusters,
            Node: self.nodes,
            Service: self.services,
            Task: self.tasks,
            Network: self.networks,
        }
        self._verdicts: OrderedDict[str, pb.Verdict] = OrderedDict()
        self._verdicts_digest = 0
        self.released = Released()

    @classmethod
    def of(cls, *records: Record) -> Store:
        """A store holding these records: for tests and simulations of pure deciders."""
        store = cls()
        for record in records:
            store._table(record).put(record)
        return store

    @property
    def cluster(self) -> Cluster | None:
        return next(iter(self.clusters), None)

    def verdict(self, request_id: str) -> pb.Verdict | None:
        """What became of this request, if it is among the last DEDUPE_LIMIT."""
        return self._verdicts.get(request_id)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with the events of each applied entry; returns the way to stop that.
        A listener must return at once; after a snapshot was installed it gets an empty sequence,
        which means: re-read everything."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def view(self, kind: type[V]) -> V:
        """The one view of this kind: made when it is first asked for, valid after every entry from then on, until the
        store is loaded or `forget_views` is called (ask again, and keep none)."""
        made = self._views.get(kind)
        if not isinstance(made, kind):
            made = self._views[kind] = kind(self)
        return made

    def forget_views(self) -> None:
        """Nobody here decides any more: let them not cost time and memory."""
        self._views.clear()

    # ---- the state machine

    def apply(self, entry: bytes) -> bytes:
        """Apply one log entry; returns a serialised `EntryResult` with one verdict per transaction."""
        result = pb.EntryResult()
        events: list[Event] = []
        try:
            transactions: Iterable[pb.Transaction] = pb.Entry.FromString(entry).transactions
        except DecodeError as error:
            result.verdicts.add(code=pb.Verdict.INVALID, message=f"undecodable entry: {error}")
            transactions = ()
        for transaction in transactions:
            result.verdicts.append(self._apply_once(transaction, events))
        if events:
            self._notify(events)
        return result.SerializeToString(deterministic=True)

    def _apply_once(self, transaction: pb.Transaction, events: list[Event]) -> pb.Verdict:
        known = self._verdicts.get(transaction.request_id) if transaction.request_id else None
        if known is not None:
            return known
        changes = [(change, _record_of(change)) for change in transaction.changes]
        verdict = self._check(changes)
        if verdict.code == pb.Verdict.OK:
            self.version += 1
            verdict.version, at = self.version, transaction.at
            events.extend(self._remove(c) if record is None else self._put(record, at) for c, record in changes)
        if transaction.request_id:
            self._remember(transaction.request_id, verdict)
        return verdict

    def _remember(self, request_id: str, verdict: pb.Verdict) -> None:
        self._verdicts[request_id] = verdict
        self._verdicts_digest += _digest_of_verdict(request_id, verdict)
        while len(self._verdicts) > DEDUPE_LIMIT:
            self._verdicts_digest -= _digest_of_verdict(*self._verdicts.popitem(last=False))

    def _check(self, changes: Sequence[tuple[pb.Change, Record | None]]) -> pb.Verdict:
        """The first reason why the changes cannot be applied, or OK."""
        names: set[tuple[str, str]] = set()
        for change, record in changes:
            action = change.action
            if action == pb.Change.REMOVE:
                existing = self._table_of(change.kind).get(change.id)
                if existing is None:
                    return pb.Verdict(code=pb.Verdict.NOT_FOUND, message=change.id)
                if change.version and existing.meta.version != change.version:
                    return pb.Verdict(code=pb.Verdict.CONFLICT, message=change.id)
                continue
            if record is None:
                return pb.Verdict(
                    code=pb.Verdict.INVALID, message=f"object empty, broken or larger than {OBJECT_BYTES_MAX} bytes"
                )
            table, object_id = self._table(record), record.id
            existing = table.get(object_id)
            if action == pb.Change.CREATE and existing is not None:
                return pb.Verdict(code=pb.Verdict.EXISTS, message=object_id)
            if action == pb.Change.UPDATE:
                if existing is None:
                    return pb.Verdict(code=pb.Verdict.NOT_FOUND, message=object_id)
                if existing.meta.version != record.meta.version:
                    return pb.Verdict(code=pb.Verdict.CONFLICT, message=object_id)
            if isinstance(record, (Service, Network)):
                name = record.spec.annotations.name
                key = (type(record).__name__, name.lower())
                if table.name_owner(record) is not None or (name and key in names):
                    return pb.Verdict(code=pb.Verdict.NAME_TAKEN, message=name)
                names.add(key)
        return pb.Verdict(code=pb.Verdict.OK)

    def _remove(self, change: pb.Change) -> Event:
        table = self._table_of(change.kind)
        before = table.get(change.id)
        table.discard(change.id)
        self.released.note(before, None)
        return Event.of(before, None)

    def _put(self, record: Record, at: float) -> Event:
        table = self._table(record)
        before = table.get(record.id)
        meta = record.meta
        meta.version, meta.updated_at = self.version, at
        meta.created_at = before.meta.created_at if before is not None else at
        table.put(record)
        event = Event.of(before, record)
        if not event.keeps_addresses:
            self.released.note(before, record)
        return event

    def _table_of(self, kind: pb.ObjectKind.ValueType) -> Table[Record]:
        table: Table[Record] = getattr(self, _TABLE_NAMES[kind])
        return table

    def _table(self, record: Record) -> Table[Record]:
        return self._tables[type(record)]

    def _notify(self, events: Sequence[Event]) -> None:
        for view in self._views.values():
            view.note(events)
        for listener in list(self._listeners):
            listener(events)

    # ---- snapshots

    def dump(self) -> Iterator[bytes]:
        """The whole state as records: a header, then every object. The list is taken at the first
        step, and stored objects are never mutated, so the rest may run beside further writes."""
        header = pb.DumpHeader(version=self.version, released=self.released.dump())
        for request_id, verdict in self._verdicts.items():
            header.verdicts.add(request_id=request_id, verdict=verdict)
        rows: list[Record] = [row for name in _TABLE_NAMES.values() for row in getattr(self, name)]
        yield header.SerializeToString(deterministic=True)
        for row in rows:
            yield wrap(row).SerializeToString(deterministic=True)

    def load(self, records: Iterable[bytes]) -> None:
        """Replace the whole state by what `dump` wrote."""
        source = iter(records)
        header = pb.DumpHeader.FromString(next(source))
        self._clear()
        self._views.clear()
        self.version = header.version
        for remembered in header.verdicts:
            self._remember(remembered.request_id, remembered.verdict)
        self.released.load(header.released)
        for raw in source:
            record = unwrap(pb.Object.FromString(raw))
            self._table(record).put(record)
        self._notify(())

    def digest(self) -> str:
        """Equal on every manager that has applied the same entries; kept up to date, so that asking costs nothing."""
        tables = (getattr(self, name).digest for name in _TABLE_NAMES.values())
        return f"{(sum(tables) + self._verdicts_digest + self.version) % DIGEST_MODULUS:032x}"


def _state(record: Record | None) -> objects.TaskState.ValueType:
    return record.status.state if isinstance(record, Task) else objects.TASK_NEW


def _task_keys(task: Task) -> Keys:
    legs = task.networks
    networks: str | frozenset[str] = legs[0].network_id if legs else ""
    if len(legs) > 1:  # most tasks are on one, and a set takes more memory than all their keys
        networks = frozenset(leg.network_id for leg in legs)
    allocation = "waiting" if states.waiting_for(task) == "allocation" else ""
    return task.service_id, task.node_id, networks, allocation


def _record_of(change: pb.Change) -> Record | None:
    """What the change stores, in memory of its own; None for a removal, and for one that cannot be stored."""
    raw, kind = change.record, change.kind
    if not 0 < len(raw) <= OBJECT_BYTES_MAX or kind not in RECORD_TYPES:
        return None
    try:
        return RECORD_TYPES[kind].FromString(raw)
    except DecodeError:
        return None


def _digest_of_verdict(request_id: str, verdict: pb.Verdict) -> int:
    return digest_of(pb.DumpHeader(verdicts=[pb.DumpHeader.Remembered(request_id=request_id, verdict=verdict)]))
