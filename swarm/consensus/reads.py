"""Linearizable reads: a round of questions to the others proves that this member still led when the round began.

All barriers that wait when a round begins share it; those that come later wait for the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.consensus.config import RaftConfig, quorum
from swarm.consensus.kernel import Kernel, Message
from swarm.consensus.membership import MemberId
from swarm.errors import NoLeader

ReadDone = Callable[[NoLeader | None], None]


@dataclass(slots=True)
class _Round:
    number: int
    term: int
    index: int
    """What was committed when it began."""
    waiting: list[ReadDone]
    ask_again_at_s: float
    confirmed: set[MemberId] = field(default_factory=set)


class Reads:
    def __init__(
        self,
        kernel: Kernel,
        config: RaftConfig,
        clock: Callable[[], float],
        say: Callable[[MemberId, Message], None],
    ) -> None:
        self._kernel = kernel
        self._config = config
        self._clock = clock
        self._say = say
        self._numbers = 0
        self._next: list[ReadDone] = []
        self._round: _Round | None = None

    def add(self, done: ReadDone) -> None:
        """`done(None)` once reads here are as new as any write acknowledged before this call."""
        self._next.append(done)

    def step(self, is_leader: bool, why_not: Callable[[], NoLeader]) -> None:
        """Begin, repeat or finish a round."""
        if not is_leader:
            waiting = self._next + (self._round.waiting if self._round else [])
            self._next, self._round = [], None
            for done in waiting:
                done(why_not())
            return
        if self._round is not None and self._round.term != self._kernel.term():
            self._round = self._begin(self._round.waiting)
        self._finish()
        if self._round is None and self._next:
            self._round = self._begin(self._next)
            self._next = []
        if self._round is not None and self._clock() >= self._round.ask_again_at_s:
            self._round.ask_again_at_s = self._clock() + self._config.read_retry_s
            for name in self._kernel.others():
                self._say(name, {"type": "read_index", "round": self._round.number})
        self._finish()

    def _begin(self, waiting: list[ReadDone]) -> _Round:
        self._numbers += 1
        return _Round(self._numbers, self._kernel.term(), self._kernel.commit(), waiting, float("-inf"))

    def handle(self, is_leader: bool, sender: MemberId, message: Message) -> None:
        if message["type"] == "read_index":
            if message["term"] == self._kernel.term() and sender == self._kernel.leader():
                self._say(sender, {"type": "read_reply", "round": message["round"]})
            return
        current = self._round
        if not is_leader or current is None or sender not in self._kernel.others():
            return
        if (message["term"], message["round"]) == (self._kernel.term(), current.number):
            current.confirmed.add(sender)

    def _finish(self) -> None:
        current = self._round
        if current is None or self._kernel.applied() < current.index:
            return
        others = self._kernel.others()
        if len(current.confirmed & others) + 1 >= quorum(len(others) + 1):
            self._round = None
            for done in current.waiting:
                done(None)
