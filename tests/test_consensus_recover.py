"""Starting anew from one manager's log, or from a backup."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.consensus import codec
from swarm.consensus.config import DEFAULTS
from swarm.consensus.interface import Member
from swarm.consensus.recover import keep_only, read_backup, restore
from swarm.consensus.snapshot import Meta, encode
from swarm.errors import Invalid
from tests.consensus_cluster import die
from tests.sim.disk import PowerFailure
from tests.sim.net import Net, write


def _lost_quorum(config_entries: int = 10_000) -> Net:
    """A, B and C with ten writes; only A is left."""
    net = Net("ABC", 1, replace(DEFAULTS, snapshot_entries=config_entries))
    leader = net.elect()
    outcomes = [write(leader, b"%d" % number) for number in range(10)]
    net.until(lambda: all(outcome.is_stored for outcome in outcomes))
    net.until(lambda: len(net.machines["A"].entries) == 10)
    for name in "ABC":
        net.crash(name)
    return net


@pytest.mark.parametrize("snapshots_every", [10_000, 5])
def test_one_manager_goes_on_alone_with_what_it_has(snapshots_every: int) -> None:
    net = _lost_quorum(snapshots_every)
    net.start("A")
    net.step(500)
    assert net.leader() is None
    net.crash("A")
    assert set(keep_only(net.disks["A"], net.member("A"), die)) == {net.member("B"), net.member("C")}
    engine = net.start("A")
    net.until(engine.is_leader)
    assert engine.members() == (net.member("A"),)
    assert net.machines["A"].entries == [b"%d" % number for number in range(10)]
    more = write(engine, b"more")
    net.until(lambda: more.is_stored)

    net.start("B")  # a former member comes back: it disturbs nobody
    net.start("C")
    net.step(500)
    assert engine.is_leader()
    assert engine.members() == (net.member("A"),)
    net.close()


def test_recovering_twice_changes_nothing_and_an_address_may_be_new() -> None:
    net = _lost_quorum()
    moved = Member("A", "elsewhere:1")
    assert keep_only(net.disks["A"], moved, die)
    assert keep_only(net.disks["A"], moved, die) == ()
    engine = net.start("A")
    assert engine.members() == (moved,)
    net.close()


def test_a_power_failure_while_recovering_leaves_the_old_state_or_the_new() -> None:
    seen = set()
    for operations in range(12):
        net = _lost_quorum()
        disk = net.disks["A"]
        disk.fails_in = operations
        with suppress(PowerFailure):
            keep_only(disk, net.member("A"), die)
        disk.power_off()
        engine = net.start("A", ())
        seen.add(len(engine.members()))
        assert engine.wal.last_index >= 10
        net.close()
    assert seen == {1, 3}


def test_who_holds_no_log_cannot_recover() -> None:
    net = _lost_quorum()
    with pytest.raises(Invalid, match="nothing can be recovered"):
        keep_only(net.disks["A"], net.member("Z"), die)
    net.start("D", (net.member("A"), net.member("D")))
    net.crash("D")
    with pytest.raises(Invalid, match="nothing can be recovered"):
        keep_only(net.disks["D"], net.member("D"), die)


def _backup(path: Path, net: Net) -> None:
    meta = Meta((codec.NO_OP, 8, 3), (codec.NO_OP, 9, 3), ("B@B:1",))
    path.write_bytes(b"".join(encode(meta, net.machines["A"].dump())))


def test_a_backup_becomes_the_state_of_a_new_log(tmp_path: Path) -> None:
    net = _lost_quorum()
    net.start("A")
    net.start("B")
    net.elect()
    net.until(lambda: len(net.machines["A"].entries) == 10)
    _backup(tmp_path / "backup", net)
    net.start("N", ())  # makes its disk
    net.crash("N")
    disk = net.disks["N"]
    for name in disk.names():
        disk.remove(name)
    restore(disk, net.member("N"), read_backup(tmp_path / "backup"), die)
    restored = net.start("N")
    net.until(restored.is_leader)
    assert net.machines["N"].entries == net.machines["A"].entries
    outcome = write(restored, b"more")
    net.until(lambda: outcome.is_stored)
    with pytest.raises(Invalid, match="holds the log of a manager"):
        restore(disk, net.member("N"), iter(()), die)
    net.close()


def test_every_damage_of_a_backup_is_found_before_anything_is_done(tmp_path: Path) -> None:
    net = _lost_quorum()
    net.start("A")
    path = tmp_path / "backup"
    net.start("B")
    net.elect()
    _backup(path, net)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(Invalid, match="the backup cannot be used"):
            read_backup(path)
        path.write_bytes(whole[:at])
        with pytest.raises(Invalid, match="the backup cannot be used"):
            read_backup(path)
    with pytest.raises(Invalid, match="No such file"):
        read_backup(tmp_path / "none")
    net.close()
