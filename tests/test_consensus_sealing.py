"""Files at rest: nothing in clear, and torn tails and damage are told apart as on a disk in clear."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.consensus import codec
from swarm.consensus.disk import Directory
from swarm.consensus.faults import Damaged
from swarm.consensus.interface import Member
from swarm.consensus.sealing import FRAME_BYTES_MAX, Sealed
from swarm.consensus.snapshot import BadSnapshot, Meta, SnapshotStore
from swarm.consensus.storage import open_storage
from swarm.consensus.wal import Wal
from swarm.errors import Invalid
from swarm.security.raft_key import KEY_FILE, RaftKey
from tests.consensus_cluster import die

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
META = Meta((codec.entry_command(b"one"), 6, 2), (codec.NO_OP, 7, 3), ("a@h:1", "b@h:2"))


def _disk(path: Path) -> Sealed:
    return Sealed(Directory(path), KEY)


@settings(max_examples=60)
@given(writes=st.lists(st.binary(max_size=60), max_size=6), keep=st.integers(0, 6))
def test_what_was_written_is_read_also_after_going_on_behind_a_cut(
    tmp_path_factory: pytest.TempPathFactory, writes: list[bytes], keep: int
) -> None:
    disk = _disk(tmp_path_factory.mktemp("sealed"))
    file = disk.create("f")
    for data in writes:
        file.write(data)
    file.close()
    assert disk.read("f") == b"".join(writes)
    kept = b"".join(writes[:keep])
    file = disk.append("f", len(kept))
    file.write(b"more")
    file.close()
    assert disk.read("f") == kept + b"more"
    with disk.open("f") as reader:
        assert reader.read() == kept + b"more"


def test_a_write_larger_than_a_frame_is_whole(tmp_path: Path) -> None:
    disk = _disk(tmp_path)
    file = disk.create("f")
    data = bytes(range(256)) * (FRAME_BYTES_MAX // 100)
    file.write(data)
    file.close()
    with disk.open("f") as reader:
        assert reader.read() == disk.read("f") == data


def _log_with_secrets(path: Path) -> list[object]:
    """Three syncs; returns the entries after each."""
    wal = Wal.create(_disk(path), ("a@h:1",), die)
    states: list[object] = [list(wal[:])]
    for number in range(3):
        wal.add(codec.entry_command(b"the secret %d" % number), number + 1, 1)
        wal.sync()
        states.append(list(wal[:]))
    wal.abandon()
    return states


def test_nothing_of_log_and_snapshots_is_in_clear(tmp_path: Path) -> None:
    _log_with_secrets(tmp_path)
    SnapshotStore(_disk(tmp_path)).write(META, [b"the secret state"])
    for path in tmp_path.iterdir():
        assert b"secret" not in path.read_bytes()
        assert b"a@h:1" not in path.read_bytes()


def test_a_log_cut_at_any_byte_is_a_synced_state(tmp_path: Path) -> None:
    states = _log_with_secrets(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    seen = []
    empty = len(whole)
    for size in range(len(whole), 0, -1):
        path.write_bytes(whole[:size])
        try:
            wal = Wal.load(_disk(tmp_path), die)
        except Damaged:
            empty = size
            break
        seen.append(states.index(list(wal[:])))
        wal.abandon()
    assert sorted(set(seen)) == [0, 1, 2, 3]
    assert seen == sorted(seen, reverse=True), "a longer file never holds less"
    assert empty < len(whole) / 2, "only the file's beginning, durable before it had a name, may not be cut"


def test_damage_before_the_last_sync_is_refused(tmp_path: Path) -> None:
    _log_with_secrets(tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    middle = len(good) // 2
    for position in range(middle - 60, middle + 60):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(Damaged):
            Wal.load(_disk(tmp_path), die)


def test_every_damaged_byte_and_every_cut_of_a_snapshot_is_noticed(tmp_path: Path) -> None:
    store = SnapshotStore(_disk(tmp_path))
    name = store.write(META, [b"first", b"second"])
    path = tmp_path / name
    good = path.read_bytes()
    for position in range(len(good)):
        for bad in (good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :], good[:position]):
            path.write_bytes(bad)
            with pytest.raises(BadSnapshot):
                store.check(name)


def raft_disk(directory: Path) -> Sealed:
    return RaftKey.open(Directory(directory)).sealed()


def test_a_manager_keeps_its_key_beside_its_log_and_does_not_make_a_second_one(tmp_path: Path) -> None:
    directory = tmp_path / "raft"
    open_storage(raft_disk(directory), (Member("a", "h:1"),), die).wal.close()
    assert (directory / KEY_FILE).stat().st_mode & 0o777 == 0o600
    open_storage(raft_disk(directory), (), die).wal.close()
    (directory / KEY_FILE).write_bytes(b"short")
    with pytest.raises(Invalid, match="are no key"):
        raft_disk(directory)
    (directory / KEY_FILE).unlink()
    with pytest.raises(Invalid, match="is missing"):
        raft_disk(directory)


def test_another_key_is_told_from_damage(tmp_path: Path) -> None:
    open_storage(_disk(tmp_path), (Member("a", "h:1"),), die).wal.close()
    with pytest.raises(Damaged, match="not sealed with this manager's key"):
        open_storage(Sealed(Directory(tmp_path), OTHER_KEY), (), die)
