"""pysyncobj held by the ears: the only module that calls it, and the only one that knows names of its insides.

The kernel elects, replicates and commits. Everything it says goes through `KernelTransport.send`, everything it hears
comes through `deliver`. It believes itself connected to a member only while it leads (or is told to campaign), so it
never starts an election on its own unless it is alone: whether to campaign is decided outside, after a pre-vote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pysyncobj.config import FAIL_REASON, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.syncobj import SyncObj
from pysyncobj.transport import Transport

from swarm.consensus import bindings
from swarm.consensus.config import FRAME_ENTRIES_BYTES, PROPOSALS_MAX, RaftConfig
from swarm.consensus.membership import MemberId

Message = dict[str, Any]
"""pysyncobj's own message shape; `frames` turns it into protobuf and back."""
Callback = Callable[[Any, int], None]
"""(what apply returned, reason of failure: 0 = success)."""
NEVER = 1 << 62
SUCCESS = int(FAIL_REASON.SUCCESS)
DISCARDED = int(FAIL_REASON.DISCARDED)
DENIED = int(FAIL_REASON.REQUEST_DENIED)
MISSING_LEADER = int(FAIL_REASON.MISSING_LEADER)
QUEUE_FULL = int(FAIL_REASON.QUEUE_FULL)
_LEADER_STATE = 2


class KernelTransport(Transport):  # type: ignore[misc]  # pysyncobj has no types
    """The kernel's mouth."""

    def __init__(self, said: Callable[[MemberId, Message], None]) -> None:
        super().__init__(None, None, None)
        self._said = said

    def send(self, node: Any, message: Message) -> bool:
        self._said(node.id, message)
        return True


class _Core(SyncObj):  # type: ignore[misc]
    def __init__(
        self,
        feed: Callable[[bool], Iterable[tuple[bytes, Callback]]],
        apply: Callable[[bytes], bytes],
        *arguments: Any,
        **options: Any,
    ) -> None:
        self._feed = feed
        self._apply = apply
        super().__init__(*arguments, **options)
        self._idToMethod = {0: self._apply_entry}

    def _apply_entry(self, payload: bytes, _doApply: bool = True) -> bytes:
        return self._apply(payload)

    def _checkCommandsToApply(self) -> None:
        """Where the kernel takes commands: it is asked here whether it leads, so none is ever sent elsewhere."""
        for command, callback in self._feed(self._isLeader()):
            self._applyCommand(command, callback)
        super()._checkCommandsToApply()


class Kernel:
    """All times are of the host's clock (s). Every call puts this member's clock and log in the kernel's globals."""

    def __init__(
        self,
        host: bindings.Host,
        *,
        me: MemberId,
        others: Iterable[MemberId],
        config: RaftConfig,
        has_snapshot: bool,
        said: Callable[[MemberId, Message], None],
        apply: Callable[[bytes], bytes],
        feed: Callable[[bool], Iterable[tuple[bytes, Callback]]],
        on_leading: Callable[[bool], None],
    ) -> None:
        self._host = host
        self.me = me
        self._transport = KernelTransport(said)
        self._commit_news_s = config.commit_news_s
        self._sent_to = 0
        self._connected: set[MemberId] = set()
        self._learners: set[MemberId] = set()

        def on_state(old: int, new: int) -> None:
            if _LEADER_STATE in (old, new):
                on_leading(new == _LEADER_STATE)

        settings = SyncObjConf(
            autoTick=False,
            appendEntriesUseBatch=True,
            appendEntriesPeriod=config.heartbeat_s,
            raftMinTimeout=config.election_min_s,
            raftMaxTimeout=config.election_max_s,
            connectionTimeout=config.election_max_s,
            leaderFallbackTimeout=config.leader_fallback_s,
            appendEntriesBatchSizeBytes=FRAME_ENTRIES_BYTES,
            commandsQueueSize=2 * PROPOSALS_MAX,
            commandsWaitLeader=False,
            dynamicMembershipChange=True,
            logCompactionMinEntries=NEVER,
            logCompactionMinTime=NEVER,
            fullDumpFile=__file__ if has_snapshot else "none",  # only asked whether it is a file
            serializer=_never,
            deserializer=_never,
            journalFile="wal",
            onStateChanged=on_state,
        )
        bindings.enter(host)
        self._core = _Core(
            feed,
            apply,
            Node(me),
            [Node(name) for name in others],
            settings,
            nodeClass=Node,
            transport=self._transport,
        )

    def _get(self, name: str) -> Any:
        return getattr(self._core, "_SyncObj__" + name)

    def _set(self, name: str, value: object) -> None:
        setattr(self._core, "_SyncObj__" + name, value)

    # ---- what it is

    def leads(self) -> bool:
        return bool(self._core._isLeader())

    def leader(self) -> MemberId | None:
        node = self._core._getLeader()
        return None if node is None else str(node.id)

    def term(self) -> int:
        return int(self._core.raftCurrentTerm)

    def commit(self) -> int:
        return int(self._core.raftCommitIndex)

    def applied(self) -> int:
        return int(self._core.raftLastApplied)

    def others(self) -> set[MemberId]:
        return {node.id for node in self._get("otherNodes")}

    def learners(self) -> set[MemberId]:
        return set(self._learners)

    def match(self, name: MemberId) -> int:
        """Leader only: the last entry known to be on that member's disk."""
        return int(self._get("raftMatchIndex").get(Node(name), 0))

    def deadline(self) -> float:
        """When the silence of leaders has lasted too long."""
        return float(self._get("raftElectionDeadline"))

    def heartbeat_at(self) -> float:
        """Leader only: when it is to say something even if there is nothing to say."""
        return float(self._get("newAppendEntriesTime"))

    # ---- what it is told

    def feed(self) -> None:
        """Take the commands that wait into the log: then one tick sends them, in one message."""
        bindings.enter(self._host)
        self._core._checkCommandsToApply()

    def tick(self) -> None:
        """One turn. What is new in the log is sent at once, not only with the next heartbeat; that it is committed is
        told with the next entries, or soon: a message of its own would double the work that a lone write makes."""
        bindings.enter(self._host)
        end, commit = self._host.journal.last_index, self.commit()
        if self.leads() and end != self._sent_to:
            self._set("newAppendEntriesTime", float("-inf"))
        self._core.doTick(0.0)
        self._sent_to = end
        if self.leads() and commit != self.commit():
            self._set("newAppendEntriesTime", min(self.heartbeat_at(), self._host.clock() + self._commit_news_s))

    def deliver(self, sender: MemberId, message: Message) -> None:
        bindings.enter(self._host)
        self._transport._onMessageReceived(Node(sender), message)

    def set_deadline(self, at_s: float) -> None:
        self._set("raftElectionDeadline", at_s)

    def connect(self, names: set[MemberId]) -> None:
        """Exactly these are reachable, as far as the kernel needs to know."""
        bindings.enter(self._host)
        for name in names - self._connected:
            self._transport._onNodeConnected(Node(name))
        for name in self._connected - names:
            self._transport._onNodeDisconnected(Node(name))
        self._connected = set(names)

    def teach(self, names: set[MemberId]) -> None:
        """Replicate to exactly these, too, while leading, but count them in no quorum (to pysyncobj they are
        "read-only nodes"). One that has become a member keeps its place."""
        bindings.enter(self._host)
        for name in names - self._learners:
            self._transport._onReadonlyNodeConnected(Node(name))
            self._connected.add(name)
        for name in self._learners - names:
            if name in self.others():
                self._get("readonlyNodes").discard(Node(name))
            else:
                self._transport._onReadonlyNodeDisconnected(Node(name))
                self._connected.discard(name)
        self._learners = set(names)

    def campaign(self) -> None:
        """Start a real election now: a new term, and a request for votes to every other member."""
        others = self.others()
        if not others or self.leads():
            return
        self.set_deadline(float("-inf"))
        self.connect(others)
        self.tick()
        if not self.leads():
            self.connect(set())

    def observe_term(self, sender: MemberId, term: int) -> None:
        """Somebody is in this higher term: follow, without a vote. (A vote request nobody can grant does that.)"""
        self.deliver(sender, {"type": "request_vote", "term": term, "last_log_index": 0, "last_log_term": -1})

    def set_others(self, names: set[MemberId]) -> None:
        """Replace the configuration by what the log says."""
        bindings.enter(self._host)
        new = names - self.others()
        self._get("updateClusterConfiguration")([Node(name) for name in names])
        if self.leads():
            for name in new:
                self._get("lastResponseTime")[Node(name)] = self._host.clock()

    def hand_over(self) -> None:
        """Ask the most up-to-date connected member to start an election at once."""
        bindings.enter(self._host)
        self._core.transferLeadership(None, None)

    def take_snapshot(self) -> None:
        """At the next tick."""
        self._core.forceLogCompaction()

    def forget_waiting(self) -> None:
        """Drop the callbacks of entries that were proposed here: their callers have been told."""
        self._get("commandsWaitingCommit").clear()


def _never(*_: object) -> None:
    raise AssertionError("snapshots go through the serializer that bindings put in place")
