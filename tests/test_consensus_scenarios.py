"""The audit's scenarios in which bare pysyncobj loses or falsely acknowledges writes, shown to be fixed.
Each drives the real engine; the numbers are the audit's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from proto.raft_pb2 import RaftFrame
from swarm.consensus.config import DEFAULTS
from swarm.consensus.digests import Digests, Mark
from swarm.errors import NoLeader
from tests.audit import force_leader, stored
from tests.sim.net import Net, Outcome, write


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
    leader = force_leader(net, "A")
    net.crash("C")
    net.start("D", leader.members())
    added = Outcome()
    leader.change_members("add", "D@D:1", added)
    net.until(lambda: added.is_stored)
    leader = force_leader(net, "D")
    returned = net.start("C")
    net.until(lambda: len(returned.members()) == 4)
    assert returned.leader() == net.member("D")
    net.close()


def test_a_learner_gets_the_log_but_counts_in_no_quorum() -> None:
    net = Net("ABC", config=replace(DEFAULTS, snapshot_entries=10, tail_entries=1, chunk_bytes=32))
    leader = force_leader(net, "A")
    stored(net, leader, *(b"%d" % number for number in range(30)))
    net.until(lambda: leader.wal.first_index > 1)
    learner = net.start("D", leader.members())
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
    stored(net, leader, *(b"%d" % number for number in range(30)))
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
    stored(net, learner, b"more")
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
        stored(net, leader, b"%d" % number)
        net.step(120)
    assert all(net.engines[name].digests.compared >= 4 for name in others)
    assert not any(net.engines[name].digests.difference for name in others)
    net.machines[others[0]].entries[-1] = b"flipped"
    stored(net, leader, b"x")
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


def test_steady_writes_do_not_hold_up_reads() -> None:
    """The leader's entries go ahead of its own disk in every turn; its other frames must not wait for a quiet one."""
    net = Net("ABC")
    leader = net.elect()
    net.step(50)
    answers: dict[str, list[object]] = {name: [] for name in "ABC"}
    for name, answered in answers.items():
        net.engines[name].reads.add(answered.append)
    for number in range(20):
        write(leader, b"%d" % number)
        net.step()
    assert answers == {name: [None] for name in "ABC"}
    net.close()


def test_a_follower_that_is_cut_off_answers_no_read_until_it_is_up_to_date() -> None:
    net = Net("ABC")
    leader = force_leader(net, "A")
    stored(net, leader, b"before")
    net.isolate("C")
    stored(net, leader, b"meanwhile")
    seen: list[tuple[NoLeader | None, list[bytes]]] = []
    net.engines["C"].reads.add(lambda refused: seen.append((refused, list(net.machines["C"].entries))))
    net.step(500)
    assert all(isinstance(refused, NoLeader) for refused, _ in seen)
    net.heal()
    net.elect()
    seen.clear()
    net.engines["C"].reads.add(lambda refused: seen.append((refused, list(net.machines["C"].entries))))
    net.until(lambda: seen)
    assert seen == [(None, [b"before", b"meanwhile"])]
    net.close()


def test_reads_that_wait_at_a_follower_share_one_question() -> None:
    net = Net("ABC")
    force_leader(net, "A")
    done: list[object] = []
    for _ in range(50):
        net.engines["B"].reads.add(partial(done.append))
    asked = 0
    while not done:
        net.step()
        asked += sum(frame.type == "read_ask" for _, _, frame in net.taped)
    assert (done, asked) == ([None] * 50, 1)
    net.close()


def test_an_answer_to_a_question_of_an_earlier_life_answers_no_read() -> None:
    """It would name an index of then, and so let a read pass that misses later writes."""
    net = Net("ABC")
    leader = force_leader(net, "A")
    stored(net, leader, b"before")
    net.step(50)
    questions: list[RaftFrame] = []
    for _ in range(2):
        done: list[object] = []
        net.engines["B"].reads.add(done.append)
        net.step()
        questions += [frame for sender, _, frame in net.taped if sender == "B" and frame.type == "read_ask"]
        if len(questions) == 1:
            net.crash("B")
            net.start("B")
            net.until(lambda: net.engines["B"].leader() == net.member("A"))
    earlier = questions[0]
    assert earlier.term == net.engines["B"].kernel.term()
    net.inject("A", "B", RaftFrame(type="read_at", term=earlier.term, round=earlier.round, last_index=1))
    assert not done
    net.until(lambda: done == [None])
    net.close()


def test_a_removal_that_may_be_undone_is_told_to_nobody() -> None:
    """Or the member would fall silent, and it may be the only one that can lead."""
    net = Net("ABC")
    leader = force_leader(net, "A")
    net.isolate("A")
    leader.change_members("rem", "C@C:1", Outcome())
    net.step(5)
    assert net.member("C") not in leader.members()
    assert net.member("C") in leader.decided_members()
    net.heal()
    after = net.elect()
    net.until(lambda: net.member("C") in after.decided_members())
    net.close()
