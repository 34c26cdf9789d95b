"""Snapshots as the kernel sees them: stands in for pysyncobj's `Serializer` (its method names, our files).

Taking one: the state machine lists its records at once, a thread writes them. Sending one: pieces with offsets, as many
as the peer's window allows. Receiving one: pieces are collected, checked as a whole, stored, and only then loaded;
a snapshot of what is already held is refused, because installing it would erase acknowledged entries after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import structlog
from pysyncobj.config import SERIALIZER_STATE
from pysyncobj.node import Node

from swarm.consensus.config import RaftConfig
from swarm.consensus.disk import AppendFile
from swarm.consensus.faults import Fatal
from swarm.consensus.interface import StateMachine
from swarm.consensus.membership import MemberId
from swarm.consensus.snapshot import BadSnapshot, Meta, SnapshotStore
from swarm.consensus.wal import Wal

Chunk = tuple[bytes, int, bool]
"""Data, offset in the file, whether it is the last."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Outgoing:
    file: BufferedReader
    offset: int = 0


@dataclass(slots=True)
class _Incoming:
    file: AppendFile
    offset: int = 0


class Compaction:
    """`window_open(member)`: whether more may be sent to it now. `applied()`: index of the last applied entry."""

    def __init__(
        self,
        *,
        store: SnapshotStore,
        start_from: Meta | None,
        wal: Wal,
        machine: StateMachine,
        executor: Executor,
        config: RaftConfig,
        fatal: Fatal,
        window_open: Callable[[MemberId], bool],
        applied: Callable[[], int],
    ) -> None:
        self._store = store
        self._to_load = start_from
        self._wal = wal
        self._machine = machine
        self._executor = executor
        self._config = config
        self._fatal = fatal
        self._window_open = window_open
        self._applied = applied
        self._writing: Future[str] | None = None
        self._writing_meta: Meta | None = None
        self._outgoing: dict[MemberId, _Outgoing] = {}
        self._incoming: _Incoming | None = None
        self.snapshot_index = start_from.index if start_from else 0
        self.snapshot_bytes_mark = 0
        """`wal.written_bytes` when the last snapshot was begun."""
        self.taken = 0
        self.installed = 0

    def is_due(self) -> bool:
        """Whether enough has been applied since the last snapshot."""
        if self._writing is not None:
            return False
        entries = self._applied() - self.snapshot_index
        written = self._wal.written_bytes - self.snapshot_bytes_mark
        return entries >= self._config.snapshot_entries or (entries > 1 and written >= self._config.snapshot_bytes)

    def forget(self, name: MemberId) -> None:
        """The connection to this member is gone, and pieces with it: start anew next time."""
        transfer = self._outgoing.pop(name, None)
        if transfer is not None:
            transfer.file.close()

    def close(self) -> None:
        for name in list(self._outgoing):
            self.forget(name)
        if self._incoming is not None:
            self._incoming.file.close()

    # ---- pysyncobj's Serializer

    def serialize(self, data: tuple[Any, Any, Any, Any], id_: int) -> None:
        if self._writing is not None:
            return
        _, last, previous, _ = data
        meta = Meta(previous, last, self._wal.members(up_to=last[1]))
        records = self._machine.dump()
        first = list(itertools.islice(records, 1))  # its first step fixes what is dumped
        self._writing_meta = meta
        self.snapshot_bytes_mark = self._wal.written_bytes
        self._writing = self._executor.submit(self._store.write, meta, itertools.chain(first, records))

    def checkSerializing(self) -> tuple[int, int | None]:
        if self._writing is None:
            return SERIALIZER_STATE.NOT_SERIALIZING, None
        meta = self._writing_meta
        assert meta is not None
        if not self._writing.done():
            return SERIALIZER_STATE.SERIALIZING, None
        error, self._writing = self._writing.exception(), None
        self.snapshot_index = max(self.snapshot_index, meta.index)
        if error is not None:
            # The log still holds everything; the next attempt comes after as many entries again.
            log.error("no snapshot was taken", index=meta.index, reason=str(error))
            return SERIALIZER_STATE.FAILED, None
        self.taken += 1
        if meta.index > self._wal.base_index:  # else a newer one was received meanwhile
            self._wal.set_base(meta.index, meta.members, write=True)
        self._wal.drop_below(max(0, self._store.oldest_index() - 1))
        return SERIALIZER_STATE.SUCCESS, meta.previous[1]

    def deserialize(self) -> tuple[None, Any, Any, list[Any]]:
        """Load the state. The kernel would swallow an error and go on empty, so any error ends the process."""
        meta = self._to_load
        try:
            assert meta is not None
            self._machine.load(self._store.read(meta))
            names = self._wal.members() if self._wal.term_at(meta.index) == meta.term else meta.members
            return None, meta.last, meta.previous, [Node(name) for name in names]
        except Exception as error:
            self._fatal(f"a snapshot that was checked cannot be loaded: {error!r}")

    def getTransmissionData(self, node: Any) -> Chunk | None:
        if not self._window_open(node.id):
            return None
        transfer = self._outgoing.get(node.id)
        if transfer is None:
            name = self._store.newest()
            if name is None:
                return None
            transfer = _Outgoing(self._store.open(name))
            self._outgoing[node.id] = transfer
        offset = transfer.offset
        data = transfer.file.read(self._config.chunk_bytes)
        transfer.offset += len(data)
        is_last = not transfer.file.peek(1)
        if is_last:
            self.forget(node.id)
        return data, offset, is_last

    def setTransmissionData(self, chunk: Chunk | None) -> bool:
        """Whether the kernel shall now call `deserialize`."""
        if chunk is None:
            return False
        data, offset, is_last = chunk
        try:
            if offset == 0:
                if self._incoming is not None:
                    self._incoming.file.close()
                self._incoming = _Incoming(self._store.receive())
            if self._incoming is None or self._incoming.offset != offset:
                return False  # a piece is missing: the sender will see that our log does not reach, and start anew
            self._incoming.file.write(data)
            self._incoming.offset += len(data)
            if is_last:
                self._incoming.file.sync()
                self._incoming.file.close()
        except OSError as error:
            self._fatal(f"cannot store a received snapshot: {error}; free or replace the disk, then start again")
        if not is_last:
            return False
        self._incoming = None
        return self._install()

    def _install(self) -> bool:
        try:
            meta = self._store.check_received()
        except BadSnapshot as error:
            log.error("a received snapshot is damaged and was not installed", reason=str(error))
            return False
        if meta.index <= self._applied() or self._wal.term_at(meta.index) == meta.term:
            return False  # held already: the log after it must stay
        try:
            self._store.adopt_received(meta)
        except OSError as error:
            self._fatal(f"cannot store a received snapshot: {error}; free or replace the disk, then start again")
        self._to_load = meta
        self.snapshot_index = meta.index
        self.installed += 1
        self._wal.reset_to((meta.previous, meta.last), meta.members)
        return True

    def cancelTransmisstion(self, node: Any) -> None:
        """The kernel calls this whenever it may not send; a pause must not start the transfer anew (see `forget`)."""
