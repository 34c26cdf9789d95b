"""Rules of the shell, each left out alone: what the real kernel then does, and that it does not with the rule.

Goes on where `test_audit_protocol.py` ends: there all rules of the sanitizer are off at once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytest

from proto.raft_pb2 import RaftFrame
from swarm.consensus.config import DEFAULTS
from swarm.consensus.election import Election
from swarm.consensus.engine import Engine
from swarm.consensus.kernel import Message
from swarm.consensus.membership import MemberId
from swarm.consensus.sanitizer import Judge, LogView, Verdict, View, judge
from swarm.errors import SwarmError
from tests.audit import believing, force_leader, stored
from tests.consensus_cluster import ListMachine
from tests.sim.disk import PowerFailure
from tests.sim.net import Net, write


class Witness(ListMachine):
    """Remembers also what a snapshot has wiped out."""

    applied: ClassVar[set[bytes]] = set()

    def apply(self, entry: bytes) -> bytes:
        self.applied.add(entry)
        return super().apply(entry)


class Unswept(Engine):
    """Leaves callers to the kernel when leadership is lost."""

    def _on_leading(self, leads: bool) -> None:
        super()._on_leading(leads)
        self._lost_leadership = False


def _believe_pieces(view: View, log: LogView, sender: MemberId, message: Message) -> Verdict:
    if message["type"] == "append_entries" and "prevLogIdx" not in message:
        return Verdict(message, heard_leader=True)
    return judge(view, log, sender, message)


@pytest.mark.parametrize(
    ("engine", "rules", "is_applied", "is_told"),
    [
        pytest.param(Engine, judge, False, False, id="both rules on"),
        pytest.param(Unswept, judge, False, False, id="without the sweep"),
        pytest.param(Engine, _believe_pieces, True, False, id="without the clamp"),
        pytest.param(Unswept, _believe_pieces, True, True, id="both rules off"),
    ],
)
def test_s3_a_piece_of_a_snapshot_commits_what_nobody_else_has(
    engine: type[Engine], rules: Judge, is_applied: bool, is_told: bool
) -> None:
    """Kernel: the commit index of a snapshot's pieces is applied to a local log that nobody has compared.
    Rules: `sanitizer._append_entries` clamps it; `Engine._settle` answers waiting callers when leadership is lost.
    Audit: S3: the caller is told SUCCESS for a write that exists nowhere."""
    Witness.applied.clear()
    config = replace(DEFAULTS, snapshot_entries=10, tail_entries=1, chunk_bytes=32)
    net = Net("ABC", config=config, machine=Witness, engine=partial(engine, judge=rules))
    old = force_leader(net, "A")
    net.isolate("A")
    lost = write(old, b"LOST")
    net.step(5)
    net.until(lambda: any(net.engines[name].is_leader() for name in "BC"))
    new = next(net.engines[name] for name in "BC" if net.engines[name].is_leader())
    for number in range(40):
        stored(net, new, b"b%d" % number)
    net.latency_s = (0.0, 0.2)  # so that the pieces do not arrive all at once
    net.heal()
    net.until(lambda: net.machines["A"].entries == net.machines["B"].entries)
    net.step(50)
    assert net.engines["A"].compaction.installed == 1
    assert not any(b"LOST" in machine.entries for machine in net.machines.values())
    assert (b"LOST" in Witness.applied) is is_applied
    assert lost.is_stored is is_told
    net.close()


@pytest.mark.parametrize(
    ("rules", "is_safe"), [(judge, True), (believing("response_vote"), False)], ids=["rule on", "rule off"]
)
def test_s11_one_vote_delivered_twice_makes_two_leaders_of_a_term(rules: Judge, is_safe: bool) -> None:
    """Kernel: counts messages, not voters. Rule: `sanitizer._vote`. Audit: section 2 (Protocol), S11."""
    net = Net("ABCDE", engine=partial(Engine, judge=rules))
    for candidate, voters in (("A", "BC"), ("E", "D")):
        engine = net.engines[candidate]
        engine.kernel.campaign()
        for name in (*voters, voters[-1], voters[-1]):
            net.inject(name, candidate, RaftFrame(type="response_vote", term=engine.kernel.term()))
    first, second = net.engines["A"], net.engines["E"]
    assert first.kernel.leads()
    assert first.kernel.term() == second.kernel.term()
    assert second.kernel.leads() is not is_safe
    net.close()


@pytest.mark.parametrize("is_safe", [pytest.param(True, id="rule on"), pytest.param(False, id="rule off")])
def test_s11_a_stranger_becomes_the_leader(is_safe: bool) -> None:
    """Kernel: never looks whether the sender is a member. Rule: `Engine._handle` hears members and those that members
    have named. Audit: section 2 (Protocol), S11."""
    net = Net("ABC")
    net.elect()
    engine = net.engines["B"]
    if is_safe:
        net.inject("Z", "B", RaftFrame(type="snapshot", term=99, commit_index=1))
    else:
        message = {"type": "append_entries", "term": 99, "commit_index": 1, "serialized": None}
        engine.kernel.deliver("Z@Z:1", message)
    assert (engine.kernel.leader() == "Z@Z:1") is not is_safe
    assert (engine.kernel.term() == 99) is not is_safe
    net.close()


BARE_FALLBACK = replace(DEFAULTS, leader_fallback_s=30.0)
"""pysyncobj's default."""


class Hasty(Election):
    """Campaigns at once, as the kernel does by itself when its timer runs out."""

    def step(self) -> None:
        if self._kernel.deadline() <= self._clock():
            self._kernel.set_deadline(self._clock() + self._config.election_min_s)
            self._kernel.campaign()


class HastyEngine(Engine):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.election = Hasty(
            kernel=self.kernel,
            log=self.wal,
            config=self.config,
            clock=options["clock"],
            random=options["random"],
            say=self.say,
        )


@pytest.mark.parametrize(
    ("engine", "rules", "is_term_kept", "is_safe"),
    [
        pytest.param(Engine, judge, True, True, id="rules on"),
        pytest.param(HastyEngine, judge, False, False, id="without the pre-vote"),
        pytest.param(HastyEngine, believing("request_vote"), False, False, id="both rules off"),
    ],
)
def test_s12_s15_a_member_that_comes_back_deposes_a_leader_that_works(
    engine: type[Engine], rules: Judge, is_term_kept: bool, is_safe: bool
) -> None:
    """Kernel: without a pre-vote the term of a lone member grows (S15), and any higher term deposes (S12). Rules:
    `Election.step` asks first, `sanitizer._vote_request` and `may_win` refuse while a leader is heard. Stickiness
    alone does not help, because the leader hears of the higher term. Audit: section 2, S12, S15, section 4 item 12."""
    net = Net("ABC", engine=partial(engine, judge=rules))
    leader = force_leader(net, "A")
    term = leader.kernel.term()
    net.isolate("C")
    net.step(1000)
    assert leader.kernel.term() == term
    assert (net.engines["C"].kernel.term() == term) is is_term_kept
    net.heal()
    net.step(500)
    assert (net.elect().kernel.term() == term) is is_safe
    net.close()


@pytest.mark.parametrize(
    ("rules", "is_safe"), [(judge, True), (believing("request_vote"), False)], ids=["rule on", "rule off"]
)
def test_s12_a_request_for_votes_deposes_a_leader_that_works(rules: Judge, is_safe: bool) -> None:
    """Kernel: any higher term deposes, however often its followers hear the leader. Rule: `sanitizer._vote_request`
    (stickiness). Audit: section 2 (Election), S12."""
    net = Net("ABC", engine=partial(Engine, judge=rules))
    leader = force_leader(net, "A")
    ask = RaftFrame(type="request_vote", term=leader.kernel.term() + 5, last_index=0, last_term=0)
    net.inject("C", "A", ask)
    assert leader.is_leader() is is_safe
    net.close()


@pytest.mark.parametrize("through_barrier", [True, False], ids=["rule on", "rule off"])
def test_c1_c2_a_deposed_leader_serves_stale_reads(through_barrier: bool) -> None:
    """Kernel: reads are local, and a leader that slept or was cut off does not know that it was deposed.
    Rule: `reads.Reads` lets a read pass when a quorum has confirmed the leader. Audit: section 3, c1, c2."""
    net = Net("ABC", config=BARE_FALLBACK)
    leader = force_leader(net, "A")
    net.frozen.add("A")
    net.isolate("A")
    net.until(lambda: any(net.engines[name].is_leader() for name in "BC"))
    stored(net, next(net.engines[name] for name in "BC" if net.engines[name].is_leader()), b"new")
    net.frozen.clear()
    assert leader.is_leader(), "it has slept"
    seen: list[list[bytes] | SwarmError] = []

    def read(refused: SwarmError | None) -> None:
        seen.append(refused or list(net.machines["A"].entries))

    if through_barrier:
        leader.reads.add(read)
    else:
        read(None)
    net.step(100)
    net.heal()
    net.until(lambda: seen)
    assert (seen[0] == []) is not through_barrier
    net.close()


class Blurting(Engine):
    """Lets frames go as they are said, before the log is on disk."""

    def say(self, name: MemberId, message: dict[str, Any]) -> None:
        super().say(name, message)
        self._outbox.let_go()


@pytest.mark.parametrize(("engine", "is_safe"), [(Engine, True), (Blurting, False)], ids=["rule on", "rule off"])
def test_a_power_failure_loses_what_was_acknowledged_before_it_was_on_disk(engine: type[Engine], is_safe: bool) -> None:
    """Kernel: acknowledges what is in the page cache (`test_audit_storage.py`: it never syncs). Rule: `Engine._release`
    after `Wal.sync`. Audit: section 2 (Durability), section 4 item 2."""
    net = Net("ABC", engine=engine)
    leader = force_leader(net, "A")
    net.isolate("C")

    def on_death(name: str, _: BaseException) -> None:
        left = [frame for sender, _, frame in net.taped if sender == name]
        net.crash(name)
        for frame in left:
            leader.receive(name, frame)

    net.on_death = on_death
    net.disks["B"].fails_in = 0
    outcome = write(leader, b"acknowledged?")
    net.step(50)
    assert "B" not in net.engines
    assert outcome.is_stored is not is_safe
    net.crash("A")
    net.heal()
    net.start("B")
    net.elect()
    net.step(50)
    assert not net.machines["C"].entries
    net.close()


@pytest.mark.parametrize(("engine", "is_safe"), [(Engine, True), (Blurting, False)], ids=["rule on", "rule off"])
def test_a_power_failure_makes_a_member_vote_twice(engine: type[Engine], is_safe: bool) -> None:
    """Kernel: stores its vote without fsync. Rule: `Engine._release` after `Wal.sync`. Audit: section 3, b."""
    net = Net("ABCDE", engine=engine)
    net.step()  # the first entry of the new log is on disk
    voted: list[str] = []
    for candidate in "AC":
        net.taped.clear()
        net.disks["B"].fails_in = 0 if candidate == "A" else None
        ask = RaftFrame(type="request_vote", term=7, last_index=9, last_term=6)
        try:
            net.inject(candidate, "B", ask)
        except PowerFailure:
            net.crash("B")
        voted += [to for sender, to, frame in net.taped if sender == "B" and frame.type == "response_vote"]
        if "B" not in net.engines:
            net.start("B")
    assert voted == (["C"] if is_safe else ["A", "C"])
    net.close()


class Forward(Engine):
    """While it leads, it counts its own entries before they are on its disk."""

    def _sync(self) -> None:
        if not self.kernel.leads():
            super()._sync()


@pytest.mark.parametrize(("engine", "is_safe"), [(Engine, True), (Forward, False)], ids=["rule on", "rule off"])
def test_a_leader_that_counts_itself_before_its_disk_loses_what_it_acknowledged(
    engine: type[Engine], is_safe: bool
) -> None:
    """Kernel: a leader counts itself for whatever is in its log. Rule: entries may go ahead of the leader's disk, but
    `Engine.pump` begins with the sync, before it hears of any acknowledgement. Audit: section 4 item 2."""
    net = Net("ABC", engine=engine)
    leader = force_leader(net, "A")
    net.isolate("C")
    outcome = write(leader, b"acknowledged")
    net.until(lambda: outcome.is_stored)
    net.crash("A")
    net.crash("B")
    net.heal()
    net.start("A")
    net.elect()
    net.step(50)
    assert (b"acknowledged" in net.machines["C"].entries) is is_safe
    net.close()
