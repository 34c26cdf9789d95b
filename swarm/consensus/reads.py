"""Linearizable reads at any member (ReadIndex, Ongaro's thesis 6.4).

The leader notes what is committed and asks the others: a quorum of answers proves that it still led when the round
began. A follower asks the leader, which puts the question into its next round and answers with the index; the
follower waits until it has applied that much. On both, all barriers that wait when a round begins share it; those
that come later wait for the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.consensus.config import RaftConfig, quorum
from swarm.consensus.kernel import Kernel, Message
from swarm.consensus.membership import MemberId
from swarm.errors import Busy, NoLeader

ReadDone = Callable[[NoLeader | None], None]
READS_MAX = 10_000
"""Waiting at one member: more than a manager can answer within any caller's patience."""


@dataclass(slots=True)
class _Round:
    number: int
    term: int
    leader: MemberId
    index: int | None
    """What must be applied here; None: a follower has not been told yet."""
    waiting: dict[ReadDone, None]
    asked: dict[MemberId, int]
    """At the leader: the followers that wait, each with its newest round."""
    ask_again_at_s: float = float("-inf")
    confirmed: set[MemberId] = field(default_factory=set)


class Reads:
    def __init__(
        self,
        kernel: Kernel,
        config: RaftConfig,
        clock: Callable[[], float],
        say: Callable[[MemberId, Message], None],
        first_round: int,
    ) -> None:
        """`first_round`: new in each life, so that no answer to a question of an earlier one fits one of this."""
        self._kernel = kernel
        self._config = config
        self._clock = clock
        self._say = say
        self._numbers = first_round
        self._next: dict[ReadDone, None] = {}
        self._next_asked: dict[MemberId, int] = {}
        self._round: _Round | None = None

    def add(self, done: ReadDone) -> None:
        """`done(None)` once reads here are as new as any write acknowledged before this call. Raises Busy."""
        if len(self._next) >= READS_MAX:
            raise Busy("too many reads wait for the quorum already; try again in a moment")
        self._next[done] = None

    def drop(self, done: ReadDone) -> None:
        """Nobody waits for it any more."""
        self._next.pop(done, None)
        if self._round is not None:
            self._round.waiting.pop(done, None)

    def step(self, is_leader: bool, why_not: Callable[[], NoLeader]) -> None:
        """Begin, repeat or finish a round. `is_leader`: leads, and has applied an entry of its own term."""
        kernel = self._kernel
        leader = kernel.me if is_leader else kernel.leader()
        if leader is None or (leader == kernel.me and not is_leader):
            self._refuse(why_not)
            return
        current = self._round
        if current is not None and (current.term, current.leader) != (kernel.term(), leader):
            self._next = current.waiting | self._next
            self._round = None
        if not is_leader:
            self._next_asked = {}
        self._finish(is_leader)
        if self._round is None and (self._next or self._next_asked):
            self._numbers += 1
            index = kernel.commit() if is_leader else None
            self._round = _Round(self._numbers, kernel.term(), leader, index, self._next, self._next_asked)
            self._next, self._next_asked = {}, {}
        self._ask(is_leader)
        self._finish(is_leader)

    def _refuse(self, why_not: Callable[[], NoLeader]) -> None:
        waiting = (self._round.waiting if self._round else {}) | self._next
        self._next, self._next_asked, self._round = {}, {}, None
        for done in waiting:
            done(why_not())

    def _ask(self, is_leader: bool) -> None:
        current = self._round
        if current is None or self._clock() < current.ask_again_at_s:
            return
        current.ask_again_at_s = self._clock() + self._config.read_retry_s
        if is_leader:
            for name in self._kernel.others():
                self._say(name, {"type": "read_index", "round": current.number})
        elif current.index is None:
            self._say(current.leader, {"type": "read_ask", "round": current.number})

    def handle(self, is_leader: bool, sender: MemberId, message: Message) -> None:
        """A frame of a read; those of another term count for nothing."""
        kernel, current = self._kernel, self._round
        if message["term"] != kernel.term():
            return
        match message["type"]:
            case "read_index" if sender == kernel.leader():
                self._say(sender, {"type": "read_reply", "round": message["round"]})
            case "read_ask" if is_leader:
                self._next_asked[sender] = message["round"]
            case "read_reply" if is_leader and current is not None and sender in kernel.others():
                if message["round"] == current.number:
                    current.confirmed.add(sender)
            case "read_at" if current is not None and sender == current.leader:
                if message["round"] == current.number:
                    current.index = message["index"]

    def _finish(self, is_leader: bool) -> None:
        current = self._round
        if current is None or current.index is None or self._kernel.applied() < current.index:
            return
        others = self._kernel.others()
        if is_leader and len(current.confirmed & others) + 1 < quorum(len(others) + 1):
            return
        self._round = None
        for name, number in current.asked.items():
            self._say(name, {"type": "read_at", "round": number, "index": current.index})
        for done in current.waiting:
            done(None)
