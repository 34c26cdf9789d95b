"""When to campaign: a pre-vote first, so that a member which cannot win does not depose a leader that works.

Pre-vote and leader stickiness belong together: followers of a working leader refuse both votes and pre-votes, and a
member that is ahead in terms tells the leader so (`higher_term`), or it would be locked out for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.consensus.config import RaftConfig, quorum
from swarm.consensus.kernel import Kernel, Message
from swarm.consensus.membership import MemberId
from swarm.consensus.sanitizer import LogView, View, may_win

Say = Callable[[MemberId, Message], None]


@dataclass(slots=True)
class _PreVote:
    round: int
    term: int
    """Our term when it began; another one voids it."""
    granted: set[MemberId] = field(default_factory=set)


class Election:
    def __init__(
        self,
        *,
        kernel: Kernel,
        log: LogView,
        config: RaftConfig,
        clock: Callable[[], float],
        random: Callable[[], float],
        say: Say,
    ) -> None:
        self._kernel = kernel
        self._log = log
        self._config = config
        self._clock = clock
        self._random = random
        self._say = say
        self._rounds = 0
        self._asking: _PreVote | None = None
        self.heard_at_s = float("-inf")
        """When a leader was last heard."""
        self.by_transfer = False
        """The campaign under way was asked for by the leader itself."""

    def heard_leader(self) -> None:
        self.heard_at_s = self._clock()
        self._asking = None

    def leader_gone(self, name: MemberId) -> None:
        """The connection from the leader has closed: it is probably dead, so do not wait for its silence."""
        if name != self._kernel.leader() or self._kernel.leads():
            return
        self.heard_at_s = float("-inf")
        soon = self._clock() + self._random() * self._config.leader_gone_s
        self._kernel.set_deadline(min(self._kernel.deadline(), soon))

    def step(self) -> None:
        """Ask for pre-votes if leaders have been silent for too long."""
        now = self._clock()
        others = self._kernel.others()
        if self._kernel.leads() or not others or self._kernel.deadline() > now:
            return
        self._rounds += 1
        self._asking = _PreVote(self._rounds, self._kernel.term())
        self._kernel.set_deadline(now + self._config.pre_vote_retry_s * (1 + self._random()))
        question = {
            "type": "pre_vote",
            "term": self._kernel.term() + 1,
            "last_log_index": self._log.last_index,
            "last_log_term": self._log.term_at(self._log.last_index) or 0,
            "round": self._rounds,
        }
        for name in others:
            self._say(name, question)

    def handle(self, view: View, sender: MemberId, message: Message) -> None:
        if message["type"] == "pre_vote":
            granted = may_win(view, self._log, message)
            self._say(sender, {"type": "pre_vote_reply", "granted": granted, "round": message["round"]})
            return
        if message["term"] > view.term:
            if not view.leads and view.silence_s >= view.sticky_s and sender in view.others:
                self._kernel.observe_term(sender, message["term"])
            return
        asking = self._asking
        if asking is None or (message["round"], view.term) != (asking.round, asking.term):
            return
        if message["granted"] and sender in view.others:
            asking.granted.add(sender)
            if len(asking.granted) + 1 >= quorum(len(view.others) + 1):
                self._asking = None
                self._kernel.campaign()

    def take_over(self) -> None:
        """The kernel has accepted the leader's wish that we succeed it: campaign now, without asking around."""
        self.by_transfer = True
        self._kernel.campaign()
        self.by_transfer = False
