"""The audit's failures by single log entries, shown on pysyncobj alone, then gone with the shell."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from proto.raft_pb2 import RaftFrame
from swarm.consensus import codec
from tests.audit import shown
from tests.bare_kernel import Evil
from tests.consensus_cluster import Died, ListMachine
from tests.sim.net import Net, write


def _is_taken(command: bytes) -> bool:
    """Whether a follower takes it into its log, when its leader sends it."""
    net = Net("ABC")
    leader = net.elect()
    net.step(20)
    name = next(name for name in "ABC" if name != leader.me.node_id)
    wal = net.engines[name].wal
    end, term = wal.last_index, leader.kernel.term()
    frame = RaftFrame(type="append_entries", term=term, prev_index=end, prev_term=term)
    frame.entries.add(command=command, index=end + 1, term=term)
    net.inject(leader.me.node_id, name, frame)
    taken = wal.last_index > end
    net.close()
    return taken


def test_an_entry_of_ours_is_taken() -> None:
    """So that what the tests below refuse is refused for what it is."""
    assert _is_taken(codec.entry_command(b"good"))
    assert not _is_taken(b"\x09")


def test_a_foreign_code_version_makes_it_apply_an_entry_twice(tmp_path: Path) -> None:
    """Kernel: an entry that asks for a version which it does not know is passed over but not counted as applied.
    Rule: `frames.decode` asks `codec.check_command`, which knows no such entry. Audit: section 2 (Callbacks)."""
    assert shown("foreign_version", tmp_path) == {"acknowledged": 6, "counted": 7}
    assert not _is_taken(b"\x03" + pickle.dumps(7))


def test_an_entry_executes_what_its_author_likes(tmp_path: Path) -> None:
    """Kernel: everything that peers and files say is unpickled. Rule: `codec`, in pickle's place, builds bytes and
    strings only. Audit: section 2 (Security)."""
    assert shown("evil_entry", tmp_path) == {"executed": True}
    evil = pickle.dumps(Evil(tmp_path / "executed again"))
    assert not _is_taken(codec.REGULAR + evil)
    with pytest.raises(codec.Refused):
        codec.loads(evil)
    assert not (tmp_path / "executed again").exists()


class Failing(ListMachine):
    def apply(self, entry: bytes) -> bytes:
        if entry == b"bad":
            raise ValueError("this entry cannot be applied")
        return super().apply(entry)


def test_s10_an_entry_that_cannot_be_applied_is_tried_for_ever(tmp_path: Path) -> None:
    """Kernel: nothing after it is ever applied, and the manager goes on leading. Rule: `Engine._apply` ends the process
    with the entry's number. Audit: section 2 (Callbacks), S10, section 4 item 18."""
    result = shown("failing_entry", tmp_path)
    assert result == {"failed more than once": True, "counted": 5, "leads": True}

    net = Net("A", machine=Failing)
    leader = net.elect()
    write(leader, b"good")
    net.step(2)
    ended: list[str] = []

    def on_death(_: str, error: BaseException) -> None:
        assert isinstance(error, Died)
        ended.append(str(error))

    net.on_death = on_death
    bad = write(leader, b"bad")
    net.step()
    assert ended == ["the state machine failed at entry 4: ValueError('this entry cannot be applied')"]
    assert bad.value is None
    net.close()
