"""Random faults against the real engine: crashes, partitions, lost frames. Nothing acknowledged may be lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from swarm.consensus.config import DEFAULTS
from swarm.consensus.engine import Engine
from swarm.errors import SwarmError
from tests.sim.net import Net, Outcome, write

SMALL_SNAPSHOTS = replace(DEFAULTS, snapshot_entries=40, tail_entries=5, segment_bytes=4_000, chunk_bytes=64)


class History:
    """What callers were told, checked against what the members hold."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.writes: list[tuple[bytes, Outcome]] = []
        self.reads_checked = self.follower_reads_checked = 0

    def write(self) -> None:
        leader = self.net.leader()
        if leader is None:
            return
        payload = f"w{len(self.writes)}".encode()
        try:
            self.writes.append((payload, write(leader, payload)))
        except SwarmError:
            return

    def acknowledged(self) -> set[bytes]:
        return {payload for payload, outcome in self.writes if outcome.is_stored}

    def read(self) -> None:
        """A barrier at any member, leader or not, must show every write acknowledged before it."""
        for name, engine in self.net.engines.items():
            expected, leads = self.acknowledged(), engine.is_leader()

            def check(
                refused: SwarmError | None, name: str = name, expected: set[bytes] = expected, leads: bool = leads
            ) -> None:
                if refused is None:
                    assert expected <= set(self.net.machines[name].entries), "a stale read passed the barrier"
                    self.reads_checked += leads
                    self.follower_reads_checked += not leads

            engine.reads.add(check)

    def check_prefixes(self) -> None:
        logs = sorted((self.net.machines[name].entries for name in self.net.engines), key=len)
        for shorter, longer in pairwise(logs):
            assert longer[: len(shorter)] == shorter, "two members applied different entries"

    def check_end(self) -> None:
        net = self.net
        net.loss = 0
        net.heal()
        net.step(500)  # longer than any election: only one leader is left
        final = write(net.elect(), f"final at {net.now_s}".encode())
        net.until(lambda: final.is_stored)
        net.until(lambda: len({tuple(net.machines[name].entries) for name in net.engines}) == 1)
        held = net.machines[next(iter(net.engines))].entries
        assert len(held) == len(set(held)), "an entry was applied twice"
        assert self.acknowledged() <= set(held), "an acknowledged write is lost"
        assert all(len(leaders) == 1 for leaders in net.leaders_of_terms.values()), net.leaders_of_terms


def _disturb(net: Net, names: str) -> None:
    chance = net.random.random()
    if chance < 0.01 and len(net.engines) > len(names) // 2 + 1:
        net.crash(net.random.choice(list(net.engines)))
    elif chance < 0.03:
        missing = [name for name in names if name not in net.engines]
        if missing:
            net.start(net.random.choice(missing))
    elif chance < 0.04:
        net.isolate(net.random.choice(list(net.engines)))
    elif chance < 0.06:
        net.heal()
    elif chance < 0.07:
        one, other = net.random.sample(sorted(net.engines), 2)
        net.cut.add(frozenset((one, other)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("names", ["ABC", "ABCDE"])
def test_no_acknowledged_write_is_lost_under_random_faults(names: str, seed: int) -> None:
    net = Net(names, seed, SMALL_SNAPSHOTS)
    net.loss = 0.02 if seed % 2 else 0.0
    net.latency_s = (0.0, 0.05)
    history = History(net)
    for _ in range(1200):
        _disturb(net, names)
        if net.random.random() < 0.5:
            history.write()
        if net.random.random() < 0.1:
            history.read()
        net.step()
        history.check_prefixes()
    for name in names:
        if name not in net.engines:
            net.start(name)
    history.check_end()
    assert len(history.acknowledged()) > 20, "the run tested nothing"
    assert history.reads_checked
    assert history.follower_reads_checked > 20
    net.close()


def _change_members(net: Net, leader: Engine, names: str) -> None:
    """Swap, add or remove a member at random; as the node does it, a new one must run before it counts."""
    inside = {member.node_id for member in leader.members()}
    outside = [name for name in names if name not in inside]
    if outside and (len(inside) < 3 or net.random.random() < 0.5):
        name = net.random.choice(outside)
        if name not in net.engines:
            net.start(name, leader.members())
        operation = "add"
    else:
        name = net.random.choice(sorted(inside - {leader.me.node_id}))
        operation = "rem"
    if leader.may_change_members():
        leader.change_members(operation, f"{name}@{name}:1", Outcome())


@pytest.mark.parametrize("seed", range(2))
def test_members_come_and_go_under_faults(seed: int) -> None:
    names = "ABCDE"
    net = Net("ABC", seed, SMALL_SNAPSHOTS)
    net.latency_s = (0.0, 0.03)
    history = History(net)
    seen: set[frozenset[str]] = set()
    for turn in range(2000):
        leader = net.leader()
        chance = net.random.random()
        if leader is not None:
            seen.add(frozenset(member.node_id for member in leader.members()))
            if turn % 100 == 0 and len(net.engines) >= 3 and not net.cut:
                _change_members(net, leader, names)
        if chance < 0.005 and len(net.engines) > 3:
            net.crash(net.random.choice(list(net.engines)))
        elif chance < 0.05:
            missing = [name for name in names if name in history.net.ports and name not in net.engines]
            if missing:
                net.start(net.random.choice(missing))
        elif chance < 0.055:
            net.isolate(net.random.choice(list(net.engines)))
        elif chance < 0.08:
            net.heal()
        if chance < 0.5:
            history.write()
        net.step()
        history.check_prefixes()
    net.heal()
    for name in list(net.ports):
        if name not in net.engines:
            net.start(name)
    net.step(500)
    leader = net.elect()
    inside = {member.node_id for member in leader.members()}
    for name in set(net.engines) - inside:
        net.crash(name)  # not a member any more: it need not converge
    history.check_end()
    assert {engine.members() for engine in net.engines.values()} == {leader.members()}
    for name in inside:
        net.crash(name)
    for name in inside:
        net.start(name)
    history.check_end()
    assert {engine.members() for engine in net.engines.values()} == {leader.members()}, "a restart forgot a change"
    assert len(seen) > 3, "the run tested nothing"
    net.close()


def test_everything_survives_when_all_crash_at_once() -> None:
    net = Net("ABC", 1, SMALL_SNAPSHOTS)
    history = History(net)
    net.elect()
    for _ in range(300):
        history.write()
        net.step()
    for name in "ABC":
        net.crash(name)
    for name in "ABC":
        net.start(name)
    history.check_end()
    assert len(history.acknowledged()) > 250
    net.close()


def test_a_member_that_was_away_gets_a_snapshot() -> None:
    net = Net("ABC", 2, SMALL_SNAPSHOTS)
    leader = net.elect()
    away = next(name for name in "ABC" if name != leader.me.node_id)
    net.crash(away)
    history = History(net)
    for _ in range(200):
        history.write()
        net.step()
    engine = net.start(away)
    history.check_end()
    assert engine.compaction.installed == 1
    net.crash(away)
    net.start(away)
    history.check_end()
    net.close()


def test_a_lone_member_leads_at_once_and_keeps_its_writes() -> None:
    net = Net("A", 3, SMALL_SNAPSHOTS)
    net.step(2)
    leader = net.leader()
    assert leader is not None
    outcomes = [write(leader, b"%d" % number) for number in range(150)]
    net.step(3)
    assert all(outcome.is_stored for outcome in outcomes)
    net.crash("A")
    net.start("A")
    net.step(2)
    assert net.leader() is not None
    assert net.machines["A"].entries == [b"%d" % number for number in range(150)]
    net.close()
