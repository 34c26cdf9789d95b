"""When a leader's entries leave, and when what came of them is told."""

from __future__ import annotations

from swarm.consensus.engine import Engine
from tests.sim.net import Net, write


def _settled(net: Net) -> Engine:
    leader = net.elect()
    net.until(lambda: leader.is_leader() and len({engine.kernel.applied() for engine in net.engines.values()}) == 1)
    net.step(20)
    return leader


def test_entries_leave_before_they_are_on_the_leaders_disk_and_count_after() -> None:
    net = Net("ABC")
    leader = _settled(net)
    others = [name for name in "ABC" if name != leader.me.node_id]
    before = {name: len(net.links[leader.me.node_id, name].frames) for name in others}
    outcome = write(leader, b"x")
    leader.pump()
    assert leader.wal.is_dirty
    assert all(len(net.links[leader.me.node_id, name].frames) > before[name] for name in others)
    assert leader.turns_wanted, "the sync is left to the next turn"
    assert outcome.value is None
    leader.pump()
    assert not leader.wal.is_dirty
    assert outcome.value is None, "nobody else has it yet"
    net.until(lambda: outcome.is_stored)
    net.close()


def test_alone_an_entry_is_on_disk_before_it_counts() -> None:
    net = Net("A")
    leader = _settled(net)
    syncs = leader.wal.syncs
    outcome = write(leader, b"x")
    leader.pump()
    assert outcome.is_stored
    assert leader.wal.syncs == syncs + 1
    net.close()


def test_followers_hear_soon_that_a_lone_write_is_committed() -> None:
    net = Net("ABC")
    leader = _settled(net)
    outcome = write(leader, b"x")
    net.until(lambda: outcome.is_stored)
    stored_s = net.now_s
    net.until(lambda: all(machine.entries[-1:] == [b"x"] for machine in net.machines.values()))
    assert net.now_s - stored_s < net.config.heartbeat_s / 2
    net.close()
