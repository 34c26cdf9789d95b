"""The write-ahead log: what was synced is there after any crash, and damage is never taken for a crash."""

from __future__ import annotations

import errno
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.consensus import codec, wal_format
from swarm.consensus.config import DEFAULTS
from swarm.consensus.disk import AppendFile, Directory
from swarm.consensus.faults import Damaged
from swarm.consensus.interface import Member
from swarm.consensus.snapshot import Meta, SnapshotStore
from swarm.consensus.storage import open_storage
from swarm.consensus.wal import Wal
from tests.consensus_cluster import Died, die

ME = ("a@h:1",)


def _new(directory: Path, **options: Any) -> Wal:
    return Wal.create(Directory(directory), ME, die, **options)


def _add(wal: Wal, *payloads: bytes, term: int = 1) -> None:
    for payload in payloads:
        wal.add(codec.entry_command(payload), wal.last_index + 1, term)


def _state(wal: Wal) -> tuple[object, ...]:
    return (list(wal[:]), wal.getCurrentTerm(), wal.getVotedForNodeId(), wal.members())


def _only_segment(directory: Path) -> Path:
    (path,) = directory.glob("wal-*.log")
    return path


def test_entries_term_vote_and_members_survive(tmp_path: Path) -> None:
    wal = _new(tmp_path)
    _add(wal, b"one", b"two", b"three")
    wal.deleteEntriesFrom(2)
    wal.setCurrentTerm(4, "b@h:2")
    wal.add(codec.membership_command("add", "b@h:2"), 3, 4)
    wal.setRaftCommitIndex(2)
    wal.sync()
    before = _state(wal)
    wal.close()
    again = Wal.load(Directory(tmp_path), die)
    assert _state(again) == before
    assert again.members() == ("a@h:1", "b@h:2")
    assert again.getRaftCommitIndex() == 2
    again.close()


def test_the_commit_index_never_exceeds_the_log(tmp_path: Path) -> None:
    wal = _new(tmp_path)
    _add(wal, b"one", b"two")
    wal.setRaftCommitIndex(2)
    wal.deleteEntriesFrom(1)
    assert wal.getRaftCommitIndex() == 1
    wal.close()


def test_one_sync_carries_everything_since_the_last(tmp_path: Path) -> None:
    wal = _new(tmp_path)
    _add(wal, *[b"x"] * 100)
    wal.setCurrentTerm(2, None)
    wal.sync()
    wal.sync()
    assert wal.syncs == 1
    wal.close()


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.binary(max_size=40)),
        st.tuples(st.just("truncate"), st.integers(0, 8)),
        st.tuples(st.just("hard"), st.integers(1, 9)),
        st.tuples(st.just("member"), st.sampled_from(["b@h:2", "c@h:3"])),
        st.tuples(st.just("sync"), st.none()),
    ),
    max_size=30,
)


@settings(max_examples=150)
@given(operations, st.integers(0, 10_000), st.binary(max_size=30))
def test_after_a_crash_at_any_byte_the_log_is_a_synced_state(
    script: list[tuple[str, Any]], cut: int, garbage: bytes
) -> None:
    """Cut the file anywhere, let garbage follow: what comes back is exactly what some sync wrote, and the newest
    sync that lies whole before the cut."""
    directory = Path(tempfile.mkdtemp(prefix="consensus-wal-"))
    try:
        wal = _new(directory)
        path = _only_segment(directory)
        synced = [(path.stat().st_size, _state(wal))]
        for operation, argument in [*script, ("sync", None)]:
            match operation:
                case "add":
                    _add(wal, argument, term=wal.getCurrentTerm())
                case "truncate":
                    wal.deleteEntriesFrom(min(argument, len(wal)))
                case "hard":
                    wal.setCurrentTerm(wal.getCurrentTerm() + argument, "b@h:2" if argument % 2 else None)
                case "member":
                    wal.add(codec.membership_command("add", argument), wal.last_index + 1, wal.getCurrentTerm())
                case "sync":
                    wal.sync()
                    synced.append((path.stat().st_size, _state(wal)))
        wal.abandon()
        data = path.read_bytes()
        cut = max(synced[0][0], min(cut, len(data)))
        path.write_bytes(data[:cut] + (garbage if cut < len(data) else b""))
        again = Wal.load(Directory(directory), die)
        expected = [state for size, state in synced if size <= cut][-1]
        assert _state(again) == expected
        _add(again, b"life goes on", term=again.getCurrentTerm())
        again.sync()
        final = _state(again)
        again.abandon()
        third = Wal.load(Directory(directory), die)
        assert _state(third) == final
        third.abandon()
    finally:
        shutil.rmtree(directory)


def test_damage_before_the_last_batch_is_refused(tmp_path: Path) -> None:
    wal = _new(tmp_path)
    for number in range(5):
        _add(wal, b"entry %d" % number)
        wal.sync()
    wal.close()
    path = _only_segment(tmp_path)
    good = path.read_bytes()
    found, _ = wal_format.scan(good)
    first = found[2].end
    last_batch = max(located.end for located in found if located.batch < found[-1].batch)
    for position in range(first, last_batch):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x40]) + good[position + 1 :])
        with pytest.raises(Damaged) as refusal:
            Wal.load(Directory(tmp_path), die)
        assert "demote this node" in str(refusal.value)


def test_a_torn_batch_may_be_there_in_any_part(tmp_path: Path) -> None:
    """The disk may write the end of the last batch before its beginning."""
    wal = _new(tmp_path)
    _add(wal, b"safe")
    wal.sync()
    safe = _state(wal)
    path = _only_segment(tmp_path)
    start = path.stat().st_size
    _add(wal, b"torn 1", b"torn 2", b"torn 3")
    wal.sync()
    wal.abandon()
    data = bytearray(path.read_bytes())
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    again = Wal.load(Directory(tmp_path), die)
    assert _state(again) == safe
    again.abandon()


def test_damage_in_an_older_segment_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    wal = _new(tmp_path, config=replace(DEFAULTS, segment_bytes=400))
    for number in range(20):
        _add(wal, b"entry %d" % number)
        wal.sync()
    wal.close()
    paths = sorted(tmp_path.glob("wal-*.log"))
    assert len(paths) > 3
    good = paths[1].read_bytes()
    paths[1].write_bytes(good[:-3])
    with pytest.raises(Damaged, match=paths[1].name):
        Wal.load(Directory(tmp_path), die)
    paths[1].unlink()
    with pytest.raises(Damaged, match="missing"):
        Wal.load(Directory(tmp_path), die)
    paths[1].write_bytes(good)
    Wal.load(Directory(tmp_path), die).close()


def test_a_log_without_term_and_vote_is_refused(tmp_path: Path) -> None:
    records = [wal_format.Record(wal_format.Kind.ENTRY, 1, 0, codec.NO_OP)]
    (tmp_path / "wal-00000001.log").write_bytes(wal_format.FILE_MAGIC + wal_format.encode_batch(records, 1))
    with pytest.raises(Damaged, match="vote twice"):
        Wal.load(Directory(tmp_path), die)


class _FillingUp(Directory):
    """Full once the log has been made."""

    def append(self, name: str, size: int) -> AppendFile:
        file = super().append(name, size)

        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        file.sync = full  # type: ignore[method-assign]
        return file


def test_a_failing_disk_ends_the_process(tmp_path: Path) -> None:
    wal = Wal.create(_FillingUp(tmp_path), ME, die)
    _add(wal, b"x")
    with pytest.raises(Died, match="No space left"):
        wal.sync()
    wal.abandon()


def _snapshot(wal: Wal, store: SnapshotStore, index: int) -> None:
    """What compaction does."""
    meta = Meta(wal.entry_at(index - 1), wal.entry_at(index), wal.members(index))
    store.write(meta, [b"state at %d" % index])
    wal.set_base(index, meta.members, write=True)
    wal.drop_below(max(0, store.oldest_index() - 1))
    wal.deleteEntriesTo(index - 1 - wal.first_index)


def _grown(directory: Path) -> tuple[Wal, SnapshotStore]:
    """Ninety entries, a member added at 70, snapshots at 30, 60 and 80: the first is gone."""
    directory.mkdir(exist_ok=True)
    wal = _new(directory, config=replace(DEFAULTS, tail_entries=5))
    store = SnapshotStore(Directory(directory))
    for index in range(1, 91):
        command = codec.membership_command("add", "b@h:2") if index == 70 else codec.entry_command(b"%d" % index)
        wal.add(command, index, 1)
        wal.sync()
        if index in (30, 60, 80):
            _snapshot(wal, store, index)
    return wal, store


def test_space_is_reclaimed_but_not_what_the_older_snapshot_needs(tmp_path: Path) -> None:
    wal, store = _grown(tmp_path)
    wal.close()
    assert len(store.names()) == 2
    entries = [
        located.record.index
        for path in sorted(tmp_path.glob("wal-*.log"))
        for located in wal_format.scan(path.read_bytes())[0]
        if located.record.kind is wal_format.Kind.ENTRY
    ]
    assert 30 < min(entries) <= 59
    storage = open_storage(Directory(tmp_path), (), die)
    assert storage.snapshot is not None
    assert storage.snapshot.index == 80
    assert (storage.wal.first_index, storage.wal.last_index) == (79, 90)
    assert storage.wal.members() == ("a@h:1", "b@h:2")
    storage.wal.close()


def test_a_damaged_newest_snapshot_is_replaced_by_the_older_and_the_log(tmp_path: Path) -> None:
    wal, store = _grown(tmp_path)
    wal.close()
    newest = tmp_path / store.names()[0]
    data = bytearray(newest.read_bytes())
    data[-20] ^= 1
    newest.write_bytes(data)
    storage = open_storage(Directory(tmp_path), (), die)
    assert storage.snapshot is not None
    assert storage.snapshot.index == 60
    assert (storage.wal.first_index, storage.wal.last_index) == (59, 90)
    assert storage.wal.members() == ("a@h:1", "b@h:2"), "the change between the snapshots is in the log"
    storage.wal.close()
    for name in store.names():
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match="no snapshot can be read"):
        open_storage(Directory(tmp_path), (), die)


def test_a_log_without_its_snapshot_and_a_snapshot_without_a_log_are_refused(tmp_path: Path) -> None:
    wal, store = _grown(tmp_path)
    wal.close()
    kept = [(tmp_path / name, (tmp_path / name).read_bytes()) for name in store.names()]
    for path, _ in kept:
        path.unlink()
    with pytest.raises(Damaged, match="no snapshot before it"):
        open_storage(Directory(tmp_path), (), die)
    for path, data in kept:
        path.write_bytes(data)
    for path in tmp_path.glob("wal-*.log"):
        path.unlink()
    with pytest.raises(Damaged, match="no log"):
        open_storage(Directory(tmp_path), (), die)


def test_a_crash_while_a_received_snapshot_replaces_the_log(tmp_path: Path) -> None:
    """The snapshot is stored, the log still tells the old story, which ends before it or contradicts it."""
    wal = _new(tmp_path)
    _add(wal, *[b"old"] * 10)
    wal.setCurrentTerm(6, "b@h:2")
    wal.close()
    ending = ((codec.NO_OP, 39, 5), (codec.NO_OP, 40, 5))
    SnapshotStore(Directory(tmp_path)).write(Meta(*ending, ("b@h:2", "a@h:1")), [])
    storage = open_storage(Directory(tmp_path), (), die)
    assert list(storage.wal[:]) == list(ending)
    assert storage.wal.members() == ("b@h:2", "a@h:1")
    assert (storage.wal.getCurrentTerm(), storage.wal.getVotedForNodeId()) == (6, "b@h:2")
    storage.wal.close()


def test_members_are_read_from_disk_not_from_the_caller(tmp_path: Path) -> None:
    open_storage(Directory(tmp_path), (Member("a", "h:1"),), die).wal.close()
    storage = open_storage(Directory(tmp_path), (Member("z", "h:9"),), die)
    assert storage.wal.members() == ("a@h:1",)
    storage.wal.close()
