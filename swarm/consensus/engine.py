"""One member of the quorum without sockets, timers or event loop: frames and calls in, frames and callbacks out.

`pump` is one turn: it handles what arrived, looks at the clock, lets the kernel work, puts the log on disk, and only
then lets go of the frames that were said meanwhile. So every acknowledgement and every vote is durable before it
leaves, and a turn costs one fdatasync however much it carries. A leader's new entries alone leave before its own sync,
which then begins the next turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor

import structlog

from proto.raft_pb2 import RaftFrame
from swarm.consensus import codec, frames
from swarm.consensus.bindings import Host
from swarm.consensus.compaction import Compaction
from swarm.consensus.config import (
    PROPOSAL_BYTES_MAX,
    SEND_WINDOW_BYTES,
    RaftConfig,
)
from swarm.consensus.digests import Digests, Mark
from swarm.consensus.election import Election
from swarm.consensus.faults import Fatal
from swarm.consensus.interface import Member, StateMachine
from swarm.consensus.kernel import Kernel, Message
from swarm.consensus.membership import MemberId, member, member_id, node_id_of
from swarm.consensus.outbox import Outbox
from swarm.consensus.proposals import Done, Proposals
from swarm.consensus.reads import Reads
from swarm.consensus.sanitizer import Judge, View, judge
from swarm.consensus.storage import Storage
from swarm.consensus.transport import Network
from swarm.errors import Busy, Invalid, NoLeader

READ_ROUNDS_PER_S = 1_000_000
"""More than a member can begin: so rounds numbered from the clock at its start follow all those of its life before."""
TICKS_PER_TURN = 4
"""A turn lets the kernel work until nothing changes, but no more often than this: the rest waits for the next turn."""

log = structlog.get_logger()


class Engine:
    """`clock`: monotonic, s. `random`: in [0, 1). `executor` writes snapshots. `judge`: what messages may do."""

    def __init__(
        self,
        *,
        me: Member,
        storage: Storage,
        machine: StateMachine,
        network: Network,
        executor: Executor,
        config: RaftConfig,
        clock: Callable[[], float],
        random: Callable[[], float],
        fatal: Fatal,
        judge: Judge = judge,
    ) -> None:
        self.me = me
        self.config = config
        self._judge = judge
        self.wal = storage.wal
        self.paused_because = ""
        """Not empty: proposals are refused with this reason."""
        self.strangers: set[str] = set()
        """Node IDs that spoke to us and are no members we know of (see `introduce`)."""
        self.is_removed = False
        """Whether a leader has told us that we are no member any more: then we are silent until one speaks to us."""
        self.turns_wanted = False
        """Whether something was left for another `pump`."""
        self._machine = machine
        self._network = network
        self._clock = clock
        self._fatal = fatal
        self._up: set[str] = set()
        self._full: set[MemberId] = set()
        self._acquaintances: dict[str, MemberId] = {}
        self._learners: set[MemberId] = set()
        self._names: dict[str, MemberId] = {}
        self._membership_seen = (-1, -1)
        self._inbox: deque[tuple[str, RaftFrame]] = deque()
        self._outbox = Outbox(network)
        self._proposals = Proposals(self.not_leading)
        self._lost_leadership = False
        self._term_on_disk = 0
        self._voters: tuple[int, set[MemberId]] = (0, set())
        self.compaction = Compaction(
            store=storage.snapshots,
            start_from=storage.snapshot,
            wal=storage.wal,
            machine=machine,
            executor=executor,
            config=config,
            fatal=fatal,
            window_open=self._window_open,
            applied=lambda: self.kernel.applied(),  # noqa: PLW0108  # the kernel comes to be after this
        )
        self.kernel = Kernel(
            Host(clock, random, storage.wal, self.compaction),
            me=member_id(me),
            others=[name for name in storage.wal.members() if node_id_of(name) != me.node_id],
            config=config,
            has_snapshot=storage.snapshots.newest() is not None,
            said=self._said,
            apply=self._apply,
            feed=self._proposals.feed,
            on_leading=self._on_leading,
        )
        self.election = Election(
            kernel=self.kernel, log=self.wal, config=config, clock=clock, random=random, say=self.say
        )
        self.reads = Reads(self.kernel, config, clock, self.say, int(clock() * READ_ROUNDS_PER_S))
        self.digests = Digests(me.node_id)

    def start(self) -> None:
        """Load the snapshot and apply what is known to be committed. A member that is alone leads at once."""
        self.kernel.tick()
        self._settle()
        if self.is_member() and not self.kernel.others():
            self.kernel.set_deadline(float("-inf"))

    def close(self) -> None:
        """Flush the log; nothing may be called after it. Callers still waiting are told that the outcome is open."""
        self._proposals.sweep("this manager stops")
        self.compaction.close()
        self.wal.close()

    # ---- what it is

    def is_leader(self) -> bool:
        """Leads, and has applied an entry of its own term: then every earlier one has been applied, too."""
        return self.kernel.leads() and self.wal.term_at(self.kernel.applied()) == self.kernel.term()

    def members(self) -> tuple[Member, ...]:
        return tuple(member(name) for name in self.wal.members())

    def decided_members(self) -> tuple[Member, ...]:
        """Without changes that may yet be undone."""
        return tuple(member(name) for name in self.wal.members(self.kernel.applied()))

    def is_newcomer(self) -> bool:
        """The log neither counts this member nor tells of its removal: it has never been one."""
        return not self.is_member() and not self.wal.removes(self.kernel.me)

    def is_member(self) -> bool:
        return any(node_id_of(name) == self.me.node_id for name in self.wal.members())

    def leader(self) -> Member | None:
        if self.kernel.leads():
            return self.me
        name = self.kernel.leader()
        return member(name) if name is not None and node_id_of(name) != self.me.node_id else None

    def may_change_members(self) -> bool:
        """One change at a time: the one before must be applied here."""
        waiting = self._proposals.changes_members()
        return self.is_leader() and not waiting and self.wal.last_change() <= self.kernel.applied()

    def best_successor(self) -> MemberId | None:
        """A member that is up and has the whole log."""
        up = (name for name in self.kernel.others() if node_id_of(name) in self._up)
        return next((name for name in up if self.kernel.match(name) == self.wal.last_index), None)

    def not_leading(self) -> NoLeader:
        leader = self.leader()
        if leader is None:
            return NoLeader("no manager leads at present (no quorum, or an election is under way); try again")
        if leader == self.me:
            return NoLeader("this manager has only just been elected; try again")
        return NoLeader(f"manager {leader.node_id} at {leader.addr} leads, not this one; ask it", leader.addr)

    # ---- what it is asked

    def propose(self, payload: bytes, done: Done) -> None:
        """`done` gets what `apply` returned, or an error. Raises NoLeader, Busy, Invalid: nothing was written."""
        if len(payload) > PROPOSAL_BYTES_MAX:
            raise Invalid(f"a change of {len(payload)} bytes exceeds the limit of {PROPOSAL_BYTES_MAX}: split it")
        if not self.is_leader():
            raise self.not_leading()
        if self.paused_because:
            raise Busy(f"{self.paused_because}; try again")
        self._proposals.check_room()
        self._proposals.add(codec.entry_command(payload), done)

    def change_members(self, operation: str, name: MemberId, done: Done) -> None:
        """ "add" or "rem". Raises NoLeader or Busy."""
        if not self.is_leader():
            raise self.not_leading()
        if not self.may_change_members():
            raise Busy("another change of the managers is under way; try again in a moment")
        self._proposals.add(codec.membership_command(operation, name), done)

    def is_up(self, node_id: str) -> bool:
        """Whether frames to this peer are delivered."""
        return node_id in self._up

    def introduce(self, members: tuple[Member, ...]) -> None:
        """Connect to these managers and listen to them, although our log does not count them as members (yet): a
        member says they are, and we may be far behind; or they are about to be added."""
        known = {node_id_of(name) for name in self.wal.members()}
        self._acquaintances |= {each.node_id: member_id(each) for each in members if each.node_id not in known}
        self._membership_seen = (-1, -1)
        self._settle()

    def teach(self, learner: Member) -> None:
        """Replicate to it while this member leads, without counting it: it is to become a member."""
        self.introduce((learner,))
        self._learners.add(member_id(learner))
        self._settle()

    def forget(self, node_id: str) -> None:
        """Undo `introduce` and `teach`."""
        self._acquaintances.pop(node_id, None)
        for name in [name for name in self._learners if node_id_of(name) == node_id]:
            self._learners.discard(name)
            self.compaction.forget(name)
        self._membership_seen = (-1, -1)
        self._settle()

    # ---- the network

    def receive(self, node_id: str, frame: RaftFrame) -> None:
        self._inbox.append((node_id, frame))

    def peer_up(self, node_id: str) -> None:
        self._up.add(node_id)
        self._connect()

    def peer_down(self, node_id: str) -> None:
        self._up.discard(node_id)
        name = self._names.get(node_id)
        if name is not None:
            self._full.discard(name)
            self.compaction.forget(name)
            self.election.leader_gone(name)
        self._connect()

    def is_held_back(self) -> bool:
        """Whether replication to some member waits for its queue to drain."""
        return bool(self._full)

    def _window_open(self, name: MemberId) -> bool:
        return self._outbox.queued_bytes(node_id_of(name)) < SEND_WINDOW_BYTES

    def _connect(self) -> None:
        """The kernel replicates to members that are up and whose window is open, while it leads."""
        wanted: set[MemberId] = set()
        if self.kernel.leads():
            taught = self.kernel.others() | self._learners
            wanted = {name for name in taught if node_id_of(name) in self._up} - self._full
        self.kernel.connect(wanted)

    def _said(self, name: MemberId, message: Message) -> None:
        """The kernel speaks."""
        match message["type"]:
            case "apply_command" | "apply_command_response":
                return  # writes go to the leader through the API, never this way
            case "next_node_idx":
                message = message | {"term": self.kernel.term()}
            case "request_vote":
                message = message | {"transfer": self.election.by_transfer}
        self.say(name, message)
        if message["type"] == "append_entries" and not self._window_open(name) and name not in self._full:
            self._full.add(name)
            self._connect()

    def say(self, name: MemberId, message: Message) -> None:
        """Let a message leave at the end of this turn, when the log is on disk."""
        node_id = node_id_of(name)
        frame = frames.encode({"term": self.kernel.term()} | message)
        self._outbox.add(node_id, frame)

    def rest_s(self) -> float:
        """How long this member has nothing to do by the clock."""
        if self.kernel.leads():
            return self.kernel.heartbeat_at() - self._clock()
        return self.kernel.deadline() - self._clock()

    # ---- a turn

    def pump(self) -> None:
        self.turns_wanted = False
        self._sync()  # what the turn before may have left
        self._outbox.let_go()
        if self._full:
            self._full = {name for name in self._full if self._network.queued_bytes(node_id_of(name)) > 0}
            self._connect()
        while self._inbox:
            self._handle(*self._inbox.popleft())
        if self.is_member() and not self.is_removed:
            self.election.step()
        if self.compaction.is_due():
            self.kernel.take_snapshot()
        self._work()
        self.reads.step(self.is_leader(), self.not_leading)
        self._tell_digest()
        self._release()

    def _sync(self) -> None:
        self.wal.sync()
        self._term_on_disk = self.kernel.term()

    def _replicate_early(self) -> bool:
        """A leader's entries may leave before they are on its own disk (Ongaro's thesis, 10.2.1), which then works at
        the same time as the followers' disks. The next turn begins with the sync, before it hears any answer to
        them, so the leader never counts itself too soon. Whether anything was sent."""
        if not (self.wal.is_dirty and self.kernel.leads() and self.kernel.others()):
            return False
        if self._term_on_disk != self.kernel.term():
            return False
        self.turns_wanted |= (sent := self._outbox.let_entries_go())
        return sent

    def _release(self) -> None:
        """Let the frames of this turn go, unless a leader's entries went ahead: then the rest waits for the sync with
        which the next turn begins. (Not for the end of that one: under steady writes entries go ahead in each.)"""
        if not self._replicate_early():
            self._sync()
            self._outbox.let_go()

    def _work(self) -> None:
        """The kernel counts its own log as durable when it commits. That is so: what this turn adds can be committed
        in a later turn only, once others have it, too; and without others it is synced first."""
        for _ in range(TICKS_PER_TURN):
            self.kernel.feed()
            self._settle()
            if not self.kernel.others():
                self._sync()
            before = (self.wal.last_index, self.kernel.leads())
            self.kernel.tick()
            self._settle()
            if before == (self.wal.last_index, self.kernel.leads()):
                break
        else:
            self.turns_wanted = True

    def _tell_digest(self) -> None:
        if self.kernel.leads() and (mark := self.digests.due(self._clock())) is not None:
            for name in self.kernel.others():
                self.say(name, {"type": "digest", "index": mark.index, "digest": mark.digest})

    def _handle(self, node_id: str, frame: RaftFrame) -> None:
        name = self._names.get(node_id)
        if name is None:
            self.strangers.add(node_id)
            return
        try:
            message = frames.decode(frame)
        except frames.Malformed as error:
            log.error("a frame was refused", sender=name, reason=str(error))
            return
        kind = message["type"]
        if kind in ("pre_vote", "pre_vote_reply"):
            self.election.handle(self._view(), name, message)
        elif kind in ("read_index", "read_reply", "read_ask", "read_at"):
            self.reads.handle(self.is_leader(), name, message)
        elif kind == "digest":
            if message["term"] == self.kernel.term() and name == self.kernel.leader():
                self.digests.told(name, Mark(message["index"], message["digest"]))
        elif kind == "higher_term":
            if message["term"] > self.kernel.term() and name in self.kernel.others():
                self.kernel.observe_term(name, message["term"])
        else:
            self._handle_kernel_message(name, message)
        self._settle()

    def _handle_kernel_message(self, name: MemberId, message: Message) -> None:
        verdict = self._judge(self._view(), self.wal, name, message)
        if verdict.heard_leader:
            self.election.heard_leader()
            self.is_removed = False
        if verdict.deliver is not None:
            if message["type"] == "response_vote":
                self._voters[1].add(name)
            self.kernel.deliver(name, verdict.deliver)
            if message["type"] == "timeout_now":
                self.election.take_over()
        elif verdict.reply is None:
            log.debug("a message was not delivered", sender=name, type=message["type"], reason=verdict.refused)
        if verdict.reply is not None:
            self.say(name, verdict.reply)

    def _view(self) -> View:
        term = self.kernel.term()
        if self._voters[0] != term:
            self._voters = (term, set())
        return View(
            leads=self.kernel.leads(),
            leader=self.kernel.leader(),
            term=term,
            decided=max(self.kernel.commit(), self.kernel.applied()),
            others=frozenset(self.kernel.others()),
            learners=frozenset(self._learners),
            voters=frozenset(self._voters[1]),
            silence_s=self._clock() - self.election.heard_at_s,
            sticky_s=self.config.election_min_s,
        )

    def _settle(self) -> None:
        """After anything the kernel did: the log decides who is a member, and lost leadership is told."""
        seen = (self.wal.membership_version, len(self._acquaintances))
        if seen != self._membership_seen or self._learners or self.kernel.learners():
            self._settle_members()
        if self._lost_leadership:
            self._lost_leadership = False
            self.kernel.forget_waiting()
            self._proposals.sweep("leadership was lost")

    def _settle_members(self) -> None:
        others = {name for name in self.wal.members() if node_id_of(name) != self.me.node_id}
        if self.kernel.others() != others:
            self.kernel.set_others(others)
        self._learners = self._learners - others if self.kernel.leads() else set()
        if self.kernel.learners() != self._learners:
            self.kernel.teach(self._learners)
            self._connect()
        seen = (self.wal.membership_version, len(self._acquaintances))
        if seen != self._membership_seen:
            for name in others:
                self._acquaintances.pop(node_id_of(name), None)
            self._names = self._acquaintances | {node_id_of(name): name for name in others}
            self._membership_seen = (self.wal.membership_version, len(self._acquaintances))
            self._network.set_peers(frozenset(member(name) for name in self._names.values()))
            self._connect()

    def _on_leading(self, leads: bool) -> None:
        if not leads:
            self._lost_leadership = True
        self._full.clear()
        self._connect()

    def _apply(self, payload: bytes) -> bytes:
        try:
            result = self._machine.apply(payload)
            self.digests.note(Mark(self.kernel.applied() + 1, self._machine.digest()))
            return result
        except Exception as error:
            # Skipping it here, but not elsewhere, would make the managers differ without anyone noticing.
            self._fatal(f"the state machine failed at entry {self.kernel.applied() + 1}: {error!r}")
