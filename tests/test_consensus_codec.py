"""Nothing pickled enters or leaves: not the log, not the wire, not through pysyncobj's own doors."""

from __future__ import annotations

import pickle
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pysyncobj.journal
import pysyncobj.pickle
import pysyncobj.serializer
import pysyncobj.syncobj
import pysyncobj.tcp_connection
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.raft_pb2 import RaftEntry, RaftFrame
from swarm.consensus import bindings, codec, frames
from swarm.consensus.disk import Directory
from swarm.consensus.snapshot import BadSnapshot, Meta, SnapshotStore


class _Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return sys.exit, ("a pickle was run",)


PICKLE = pickle.dumps(_Exploit(), 2)


@given(st.binary())
def test_payloads_round_trip(payload: bytes) -> None:
    command = codec.entry_command(payload)
    codec.check_command(command)
    assert codec.loads(command[1:]) == (codec.APPLY_METHOD, [payload])


@pytest.mark.parametrize("operation", ["add", "rem"])
def test_membership_round_trips(operation: str) -> None:
    command = codec.membership_command(operation, "n1@host:2378")
    codec.check_command(command)
    assert codec.membership_change(command) == (operation, "n1@host:2378")
    assert codec.membership_change(codec.entry_command(b"x")) is None


def test_no_door_of_pysyncobj_runs_a_pickle() -> None:
    assert bindings.EXPECTED_VERSION == "0.3.17"
    doors: list[Any] = [
        pysyncobj.syncobj.pickle.loads,
        pysyncobj.serializer.pickle.loads,
        pysyncobj.tcp_connection.pickle.loads,
        pysyncobj.pickle.loads,
        pysyncobj.journal.loads,
    ]
    for loads in doors:
        with pytest.raises(codec.Refused):
            loads(PICKLE)
    for dumps in (pysyncobj.pickle.dumps, pysyncobj.journal.dumps, pysyncobj.syncobj.pickle.dumps):
        with pytest.raises(codec.Refused):
            dumps({"any": "thing"})


@pytest.mark.parametrize(
    "command",
    [b"", b"\x00", b"\x00" + PICKLE, b"\x02" + PICKLE, b"\x02Anobody", b"\x02A\xff@h:1", b"\x03E", b"\x01x", PICKLE],
)
def test_a_frame_with_a_foreign_command_is_refused(command: bytes) -> None:
    frame = RaftFrame(
        type="append_entries", term=3, prev_index=1, entries=[RaftEntry(command=command, index=2, term=3)]
    )
    with pytest.raises(frames.Malformed):
        frames.decode(frame)


@pytest.mark.parametrize(
    "frame",
    [
        RaftFrame(type="apply_command"),
        RaftFrame(type="append_entries", term=1, prev_index=1, entries=[RaftEntry(command=b"\x01", index=3, term=1)]),
        RaftFrame(type="append_entries", term=1, prev_index=1, entries=[RaftEntry(command=b"\x01", index=2, term=2)]),
    ],
)
def test_a_frame_that_makes_no_sense_is_refused(frame: RaftFrame) -> None:
    with pytest.raises(frames.Malformed):
        frames.decode(frame)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "request_vote", "term": 3, "last_log_index": 7, "last_log_term": 2, "transfer": True},
        {"type": "response_vote", "term": 3},
        {"type": "next_node_idx", "term": 3, "next_node_idx": 8, "reset": True, "success": False},
        {"type": "append_entries", "term": 3, "commit_index": 2, "serialized": None},
        {"type": "append_entries", "term": 3, "commit_index": 2, "serialized": (b"piece", 64, True)},
        {
            "type": "append_entries",
            "term": 3,
            "commit_index": 2,
            "prevLogIdx": 1,
            "prevLogTerm": 0,
            "entries": [(codec.NO_OP, 2, 1), (codec.entry_command(b"x"), 3, 3)],
        },
    ],
)
def test_messages_round_trip(message: dict[str, Any]) -> None:
    assert frames.decode(frames.encode(message)) == message


META = Meta((codec.entry_command(b"one"), 6, 2), (codec.NO_OP, 7, 3), ("a@h:1", "b@h:2"))


@given(st.lists(st.binary(max_size=50), max_size=6))
def test_snapshots_round_trip(records: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="consensus-snapshot-") as directory:
        store = SnapshotStore(Directory(Path(directory)))
        assert store.check(store.write(META, records)) == META
        assert list(store.read(META)) == records


def test_every_damaged_byte_and_every_cut_of_a_snapshot_is_noticed(tmp_path: Path) -> None:
    store = SnapshotStore(Directory(tmp_path))
    name = store.write(META, [b"first", b"second"])
    path = tmp_path / name
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(BadSnapshot):
            store.check(name)
        path.write_bytes(good[:position])
        with pytest.raises(BadSnapshot):
            store.check(name)
    path.write_bytes(good + b"\0")
    with pytest.raises(BadSnapshot):
        store.check(name)
    path.write_bytes(struct.pack(">I", 0) + PICKLE)
    with pytest.raises(BadSnapshot, match="not a snapshot"):
        store.check(name)


def test_the_kernel_leaves_the_socket_module_as_it_was() -> None:
    assert socket.inet_ntop(socket.AF_INET6, bytes(15) + b"\1") == "::1"
