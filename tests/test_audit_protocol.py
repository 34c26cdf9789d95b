"""The audit's failures of the bare kernel in its protocol: each is shown with the shell's rule off, then gone with it.

All drive the real engine and the real pysyncobj in the simulated network. The numbers are the audit's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from proto.raft_pb2 import RaftFrame
from swarm.consensus import codec
from swarm.consensus.config import DEFAULTS
from swarm.consensus.engine import Engine
from swarm.consensus.kernel import Message
from swarm.consensus.membership import MemberId
from swarm.consensus.sanitizer import Judge, LogView, Verdict, View, judge
from swarm.errors import Busy, NoLeader
from tests.audit import force_leader, stored
from tests.sim.net import Net, Outcome, write


def bare(view: View, log: LogView, sender: MemberId, message: Message) -> Verdict:
    """No rule: everything goes to the kernel as it came."""
    return Verdict(deliver=message, heard_leader=message["type"] == "append_entries")


both = pytest.mark.parametrize("rules", [bare, judge], ids=["bare", "judged"])


@both
def test_s2_a_repeated_old_message_erases_acknowledged_writes(rules: Judge) -> None:
    """The kernel cuts off whatever follows the entries of a message. Rule: only a contradiction may cut."""
    net = Net("ABC", engine=partial(Engine, judge=rules))
    leader = force_leader(net, "A")
    net.isolate("C")
    old: list[RaftFrame] = []
    payloads = [b"v%d" % number for number in range(20)]
    for payload in payloads:
        outcome = write(leader, payload)
        while not outcome.is_stored:
            net.step()
            old += [frame for sender, to, frame in net.taped if (sender, to) == ("A", "B") and frame.entries]
    net.inject("A", "B", old[4])
    net.crash("A")
    net.crash("B")
    net.start("B")
    net.heal()
    net.elect()
    net.step(50)
    lost = [payload for payload in payloads if payload not in net.machines["C"].entries]
    assert len(lost) == (15 if rules is bare else 0)
    net.close()


@both
def test_s3_a_snapshot_commits_a_write_that_exists_nowhere_else(rules: Judge) -> None:
    """A deposed leader that catches up by snapshot takes the commit index of its pieces for its own log, and reports
    success. Rule: a piece of a snapshot commits nothing. (The caller is told by then that the outcome is open.)"""
    net = Net(
        "ABC",
        config=replace(DEFAULTS, snapshot_entries=10, tail_entries=1, chunk_bytes=32),
        engine=partial(Engine, judge=rules),
    )
    old = force_leader(net, "A")
    net.isolate("A")
    lost = write(old, b"LOST")
    net.step(5)
    net.until(lambda: any(net.engines[name].is_leader() for name in "BC"))
    new = next(net.engines[name] for name in "BC" if net.engines[name].is_leader())
    for number in range(40):
        stored(net, new, b"b%d" % number)
    net.latency_s = (0.0, 0.2)  # so that the pieces do not all arrive in one turn
    net.heal()
    applied_lost = False
    for _ in range(300):
        net.step()
        applied_lost |= b"LOST" in net.machines["A"].entries
    assert applied_lost == (rules is bare)
    assert b"LOST" not in net.machines["B"].entries
    assert not lost.is_stored
    net.close()


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_s4_two_changes_of_members_at_once_make_two_quorums(one_at_a_time: bool) -> None:
    """The kernel accepts both, and A, D, E commit as well as B, C. Rule: the next change waits for the one before."""
    net = Net("ABC")
    leader = force_leader(net, "A")
    for name in "DE":
        net.start(name, leader.members())
    for other in "BC":
        net.cut |= {frozenset(("A", other)), frozenset(("D", other)), frozenset(("E", other))}
    if one_at_a_time:
        leader.change_members("add", "D@D:1", Outcome())
        with pytest.raises(Busy):
            leader.change_members("add", "E@E:1", Outcome())
        net.step(5)
        with pytest.raises((Busy, NoLeader)):
            leader.change_members("add", "E@E:1", Outcome())
    else:
        for name in "DE":
            leader._proposals.add(codec.membership_command("add", f"{name}@{name}:1"), Outcome())
            net.step(1)
    via_a = write(leader, b"written via A")
    net.step(500)
    assert via_a.is_stored == (not one_at_a_time)
    new = next(net.engines[name] for name in "BC" if net.engines[name].is_leader())
    stored(net, new, b"written via B or C")
    assert (b"written via A" in net.machines["D"].entries) == (not one_at_a_time)
    if one_at_a_time:
        net.heal()
        net.step(500)
        assert b"written via A" not in net.machines["B"].entries
        assert {member.node_id for member in net.elect().members()} == set("ABC")
    net.close()


@both
def test_s5_an_acknowledgement_of_an_earlier_term_counts_for_entries_it_never_saw(rules: Judge) -> None:
    """A write is reported as stored with one copy of five. Rule: an acknowledgement carries its term."""
    net = Net("ABCDE", engine=partial(Engine, judge=rules))
    leader = force_leader(net, "A")
    stored(net, leader, b"old")
    term = leader.kernel.term()
    while leader.kernel.term() == term or not leader.is_leader():
        force_leader(net, "B")
        leader = force_leader(net, "A")
    for name in "BCDE":
        net.cut.add(frozenset(("A", name)))
    new = write(leader, b"new")
    leader.pump()
    reached = leader.wal.last_index
    late = RaftFrame(type="next_node_idx", term=term, next_index=reached + 1, success=True)
    for name in "BC":
        net.inject(name, "A", late)
    assert (leader.kernel.commit() == reached) == (rules is bare)
    assert new.is_stored == (rules is bare)
    net.close()


@both
def test_s11_one_voter_elects_by_voting_twice(rules: Judge) -> None:
    """The kernel counts messages. Rule: one vote per voter and term."""
    net = Net("ABCDE", engine=partial(Engine, judge=rules))
    candidate = net.engines["A"]
    candidate.kernel.campaign()
    vote = RaftFrame(type="response_vote", term=candidate.kernel.term())
    for _ in range(2):
        net.inject("B", "A", vote)
    assert candidate.kernel.leads() == (rules is bare)
    net.inject("C", "A", vote)
    assert candidate.kernel.leads(), "three of five have voted"
    net.close()


def test_s11_a_stranger_is_not_heard() -> None:
    """The kernel believes whoever connects; here the name comes from the certificate, and must be a member's."""
    net = Net("ABC")
    net.inject("Z", "B", RaftFrame(type="append_entries", term=99, prev_index=1))
    assert net.engines["B"].kernel.term() < 99
    assert net.engines["B"].strangers == {"Z"}
    net.close()


@pytest.mark.parametrize("pre_vote", [False, True])
def test_s12_a_member_that_comes_back_deposes_a_leader_that_works(pre_vote: bool) -> None:
    """The kernel counts up its term while it is alone, and any higher term deposes. Rules: a pre-vote before any
    election, and no vote against a leader that is heard."""
    net = Net("ABC", engine=partial(Engine, judge=judge if pre_vote else bare))
    leader = net.elect()
    net.step(100)
    term = leader.kernel.term()
    away = net.engines[next(name for name in "ABC" if name != leader.me.node_id)]
    net.isolate(away.me.node_id)
    for _ in range(20):
        net.step(100)
        if not pre_vote:
            away.kernel.campaign()  # as the kernel does by itself whenever its time is up
    net.heal()
    net.step(2)
    if not pre_vote:
        away.kernel.campaign()
    net.step(300)
    assert (leader.kernel.term() == term) == pre_vote
    if pre_vote:
        assert leader.is_leader()
        assert away.kernel.term() == term
    net.close()


@pytest.mark.parametrize("fallback_s", [30.0, DEFAULTS.leader_fallback_s], ids=["kernel's default", "ours"])
def test_c2_a_leader_without_followers_goes_on_believing_in_itself(fallback_s: float) -> None:
    """For 30 s, in which it answers reads with what is long outdated. Rules: check-quorum after 2 s, and no read
    without a round to a quorum. Writes under way are answered as open, reads are refused."""
    net = Net("ABC", config=replace(DEFAULTS, leader_fallback_s=fallback_s))
    leader = net.elect()
    net.isolate(leader.me.node_id)
    outcome = write(leader, b"w")
    answers: list[object] = []
    leader.reads.add(answers.append)
    start_s = net.now_s
    net.until(lambda: not leader.kernel.leads(), limit_s=60)
    assert (net.now_s - start_s > 20) == (fallback_s == 30)
    assert net.now_s - start_s <= fallback_s + 0.1
    assert type(outcome.value).__name__ == "OutcomeUnknown"
    assert isinstance(answers[0], NoLeader)
    net.close()
