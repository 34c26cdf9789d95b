"""The audit's scenarios in which bare pysyncobj loses or falsely acknowledges writes, shown to be fixed.
Each drives the real engine; the numbers are the audit's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proto.raft_pb2 import RaftFrame
from swarm.consensus.config import DEFAULTS
from swarm.consensus.digests import Digests, Mark
from swarm.consensus.engine import Engine
from swarm.errors import Busy, NoLeader
from tests.sim.net import Net, Outcome, write


def _stored(net: Net, engine: Engine, *payloads: bytes) -> None:
    outcomes = [write(engine, payload) for payload in payloads]
    net.until(lambda: all(outcome.is_stored for outcome in outcomes))


def _force_leader(net: Net, name: str) -> Engine:
    """Make `name` the leader, as if the one before had handed over."""
    net.elect()
    net.step(20)
    engine = net.engines[name]
    engine.election.take_over()
    net.until(lambda: engine.is_leader() and net.leader() is engine)
    net.step(20)
    return engine


def test_s2_a_repeated_old_message_erases_nothing() -> None:
    """Bare: the follower cuts off whatever follows the message's entries: 15 of 20 acknowledged writes lost."""
    net = Net("ABC")
    leader = _force_leader(net, "A")
    net.isolate("C")
    tape: list[RaftFrame] = []
    outcomes = [write(leader, b"v%d" % number) for number in range(20)]
    while not all(outcome.is_stored for outcome in outcomes):
        net.step()
        tape += [frame for sender, to, frame in net.taped if (sender, to) == ("A", "B") and frame.entries]
    end = net.engines["B"].wal.last_index
    for frame in tape:
        net.inject("A", "B", frame)
        assert net.engines["B"].wal.last_index == end
    net.crash("A")
    net.heal()
    net.elect()
    net.step(50)
    assert net.machines["B"].entries == net.machines["C"].entries == [b"v%d" % number for number in range(20)]
    net.close()


def test_s3_a_snapshot_piece_commits_nothing() -> None:
    """Bare: a deposed leader that catches up by snapshot applies its own uncommitted write and reports success."""
    net = Net("ABC", config=replace(DEFAULTS, snapshot_entries=10, tail_entries=1, chunk_bytes=32))
    old = _force_leader(net, "A")
    net.isolate("A")
    lost = write(old, b"LOST")
    net.step(5)
    net.until(lambda: any(net.engines[name].is_leader() for name in "BC"))
    new = next(net.engines[name] for name in "BC" if net.engines[name].is_leader())
    for number in range(40):
        _stored(net, new, b"b%d" % number)
    net.heal()
    net.until(lambda: net.machines["A"].entries == net.machines["B"].entries)
    net.step(50)
    assert net.engines["A"].compaction.installed == 1
    assert b"LOST" not in net.machines["A"].entries + net.machines["B"].entries
    assert lost.value is not None
    assert not lost.is_stored
    net.close()


def test_s4_a_second_change_of_members_waits_for_the_first() -> None:
    """Bare: both are accepted, and two disjoint quorums commit."""
    net = Net("ABC")
    leader = _force_leader(net, "A")
    members = (*leader.members(), net.member("D"), net.member("E"))
    for name in "DE":
        net.start(name, members)
    for other in "BC":
        net.cut |= {frozenset(("A", other)), frozenset(("D", other)), frozenset(("E", other))}
    leader.change_members("add", "D@D:1", Outcome())
    with pytest.raises(Busy):
        leader.change_members("add", "E@E:1", Outcome())
    net.step(5)
    with pytest.raises((Busy, NoLeader)):
        leader.change_members("add", "E@E:1", Outcome())
    cut_off = write(leader, b"written via A")
    net.step(500)
    assert not cut_off.is_stored, "A and D are no quorum of four"
    assert any(net.engines[name].is_leader() for name in "BC")
    net.heal()
    net.step(500)
    assert b"written via A" not in net.machines["B"].entries
    assert {member.node_id for member in net.elect().members()} == set("ABC")
    net.close()


def test_s5_an_acknowledgement_of_an_earlier_term_does_not_count() -> None:
    """Bare: a write is reported as stored with two copies of five."""
    net = Net("ABCDE")
    leader = _force_leader(net, "A")
    _stored(net, leader, b"old")
    term = leader.kernel.term()
    late = RaftFrame(type="next_node_idx", term=term, next_index=leader.wal.last_index + 2, success=True)
    while leader.kernel.term() == term or not leader.is_leader():
        _force_leader(net, "B")
        leader = _force_leader(net, "A")
    for name in "BCDE":
        net.cut.add(frozenset(("A", name)))
    new = write(leader, b"new")
    leader.pump()
    reached = leader.wal.last_index
    late.next_index = reached + 1
    for name in "BCDE":
        net.inject(name, "A", late)
    assert leader.kernel.commit() < reached
    assert not new.is_stored
    net.close()


def test_s11_a_vote_counts_once_and_only_members_are_heard() -> None:
    """Bare: one voter's vote delivered twice elects; a stranger's message makes it the leader."""
    net = Net("ABCDE")
    candidate = net.engines["A"]
    candidate.kernel.campaign()
    vote = RaftFrame(type="response_vote", term=candidate.kernel.term())
    for _ in range(3):
        net.inject("B", "A", vote)
    assert not candidate.kernel.leads()
    net.inject("C", "A", vote)
    assert candidate.kernel.leads(), "three of five have voted"
    command = RaftFrame(type="append_entries", term=99, prev_index=1)
    net.inject("Z", "B", command)
    assert net.engines["B"].kernel.term() < 99
    assert net.engines["B"].strangers == {"Z"}
    net.close()


def test_s12_a_member_that_comes_back_does_not_depose_the_leader() -> None:
    """Bare: it has counted up its term in the meantime, and any higher term deposes."""
    net = Net("ABC")
    leader = net.elect()
    net.step(100)
    term = leader.kernel.term()
    away = next(name for name in "ABC" if name != leader.me.node_id)
    net.isolate(away)
    net.step(2000)
    assert net.engines[away].kernel.term() == term
    net.heal()
    net.step(500)
    assert leader.is_leader()
    assert leader.kernel.term() == term
    net.close()


def test_a_member_in_a_higher_term_is_not_locked_out() -> None:
    """The reverse of S12: refusing its votes must not make the leader's messages fall on deaf ears for ever."""
    net = Net("ABC")
    leader = net.elect()
    ahead = next(engine for engine in net.engines.values() if engine is not leader)
    ahead.kernel.observe_term(leader.kernel.me, leader.kernel.term() + 5)
    net.step(500)
    outcome = write(net.elect(), b"w")
    net.until(lambda: outcome.is_stored)
    net.until(lambda: all(machine.entries == [b"w"] for machine in net.machines.values()))
    net.close()


def test_a_leader_that_loses_its_followers_steps_down() -> None:
    """Bare: after 30 s. Its writes are answered as open, its barrier is refused."""
    net = Net("ABC")
    leader = net.elect()
    net.isolate(leader.me.node_id)
    outcome = write(leader, b"w")
    refusals: list[object] = []
    leader.reads.add(refusals.append)
    start_s = net.now_s
    net.until(lambda: not leader.kernel.leads())
    assert net.now_s - start_s <= DEFAULTS.leader_fallback_s + 0.1
    assert type(outcome.value).__name__ == "OutcomeUnknown"
    assert isinstance(refusals[0], NoLeader)
    net.close()


def test_s13_leadership_is_handed_over_without_silence() -> None:
    net = Net("ABC")
    leader = net.elect()
    net.step(100)
    assert leader.best_successor() is not None
    leader.kernel.hand_over()
    start_s = net.now_s
    net.until(lambda: not leader.kernel.leads() and net.leader())
    assert net.now_s - start_s < DEFAULTS.election_min_s
    net.close()


def test_votes_survive_a_restart() -> None:
    """S1: a member that has voted does not vote again in the same term after a crash."""
    net = Net("ABC")
    ask = RaftFrame(type="request_vote", term=7, last_index=9, last_term=7)
    net.inject("A", "B", ask)
    assert net.engines["B"].wal.getVotedForNodeId() == "A@A:1"
    net.crash("B")
    net.start("B")
    net.taped.clear()
    net.inject("C", "B", ask)
    assert not [frame for _, _, frame in net.taped if frame.type == "response_vote"]
    assert net.engines["B"].wal.getVotedForNodeId() == "A@A:1"
    net.close()


def test_a_member_meets_a_leader_that_joined_while_it_was_away() -> None:
    """Its own log knows only a part of the cluster; what a member that it knows says about others is believed."""
    net = Net("ABC")
    leader = _force_leader(net, "A")
    net.crash("C")
    net.start("D", (*leader.members(), net.member("D")))
    added = Outcome()
    leader.change_members("add", "D@D:1", added)
    net.until(lambda: added.is_stored)
    leader = _force_leader(net, "D")
    returned = net.start("C")
    net.until(lambda: len(returned.members()) == 4)
    assert returned.leader() == net.member("D")
    net.close()


def test_a_learner_gets_the_log_but_counts_in_no_quorum() -> None:
    net = Net("ABC", config=replace(DEFAULTS, snapshot_entries=10, tail_entries=1, chunk_bytes=32))
    leader = _force_leader(net, "A")
    _stored(net, leader, *(b"%d" % number for number in range(30)))
    net.until(lambda: leader.wal.first_index > 1)
    learner = net.start("D", (*leader.members(), net.member("D")))
    leader.teach(net.member("D"))
    during = write(leader, b"meanwhile")
    net.until(lambda: during.is_stored)
    net.until(lambda: net.machines["D"].entries == net.machines["A"].entries)
    assert learner.compaction.installed == 1, "the log before was a snapshot already"
    assert not learner.is_member()

    net.crash("B")
    net.crash("C")
    alone = write(leader, b"without a quorum")
    net.until(lambda: leader.kernel.match("D@D:1") == leader.wal.last_index)
    net.until(lambda: not leader.kernel.leads())
    assert not alone.is_stored, "the learner's acknowledgement counted"
    net.close()


def test_a_learner_that_is_silent_holds_nothing_up_and_one_that_is_added_keeps_its_place() -> None:
    net = Net("A")
    leader = net.elect()
    leader.teach(net.member("D"))
    _stored(net, leader, *(b"%d" % number for number in range(30)))
    learner = net.start("D", (net.member("A"), net.member("D")))
    net.until(lambda: leader.kernel.match("D@D:1") == leader.wal.last_index)
    added = Outcome()
    leader.change_members("add", "D@D:1", added)
    net.until(lambda: added.is_stored)
    assert leader.kernel.others() == {"D@D:1"}
    assert not leader.kernel.learners()
    leader.kernel.hand_over()
    net.until(learner.is_leader)
    leader.forget("D")
    _stored(net, learner, b"more")
    net.until(lambda: net.machines["A"].entries == net.machines["D"].entries)
    net.close()


def test_a_learner_deposes_nobody() -> None:
    net = Net("A")
    leader = net.elect()
    net.start("D", (net.member("A"), net.member("D")))
    leader.teach(net.member("D"))
    net.step(100)
    term = leader.kernel.term()
    for kind in ("request_vote", "pre_vote"):
        frame = RaftFrame(type=kind, term=term + 5, last_index=999, last_term=term + 4, transfer=True, round=1)
        net.inject("D", "A", frame)
    assert leader.is_leader()
    assert leader.kernel.term() == term
    net.close()


def test_a_state_that_differs_from_the_leaders_is_an_alarm() -> None:
    """However it came about: a bit that flipped in memory, or an entry that was applied in two ways."""
    net = Net("ABC")
    leader = net.elect()
    others = [name for name in "ABC" if name != leader.me.node_id]
    for number in range(5):
        _stored(net, leader, b"%d" % number)
        net.step(120)
    assert all(net.engines[name].digests.compared >= 4 for name in others)
    assert not any(net.engines[name].digests.difference for name in others)
    net.machines[others[0]].entries[-1] = b"flipped"
    _stored(net, leader, b"x")
    net.step(120)
    difference = net.engines[others[0]].digests.difference
    assert f"the state of manager {others[0]} is not that of the leader {leader.kernel.me}" in difference
    assert not net.engines[others[1]].digests.difference
    net.close()


def test_a_follower_that_is_behind_compares_when_it_has_caught_up() -> None:
    digests = Digests("B")
    digests.note(Mark(4, "four"))
    digests.told("A@A:1", Mark(6, "six"))
    digests.note(Mark(5, "five"))
    digests.note(Mark(6, "sicks"))
    assert "after entry 6" in digests.difference
    assert digests.due(0.0) == Mark(6, "sicks")
    assert digests.due(5.0) is None, "nothing new"
