"""Whether this manager still belongs, and who the others are: asked of the managers it knows, when frames do not say.

Three cases, all of a manager that was away or is new: it was promised membership and nobody teaches it (any more);
somebody speaks to it that it does not know; or it was removed, and nobody speaks to it any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import structlog

from swarm.consensus.changes import PROBE_TIMEOUT_S
from swarm.consensus.config import RaftConfig
from swarm.consensus.interface import Member
from swarm.consensus.transport import FrameTransport
from swarm.errors import NoLeader, SwarmError

if TYPE_CHECKING:
    from swarm.consensus.raft import RaftNode

STRANGER_ASK_S = 1.0
"""Between two inquiries about who an unknown manager is."""

log = structlog.get_logger()


class Standing:
    """`clock`: monotonic, s."""

    def __init__(
        self, node: RaftNode, me: Member, transport: FrameTransport, config: RaftConfig, clock: Callable[[], float]
    ) -> None:
        self._node = node
        self._me = me
        self._transport = transport
        self._config = config
        self._clock = clock
        self._next_join_s = clock() + config.join_retry_s
        self._next_inquiry_s = 0.0
        self._next_doubt_s = 0.0
        self._began_empty = node.running().wal.last_index <= 1
        self._said_removed = 0
        """How often in a row a leader has answered that this manager is no member."""

    def check(self) -> None:
        """Ask if there is something to ask and it is time for it."""
        engine = self._node.running()
        now = self._clock()
        if engine.strangers and now >= self._next_inquiry_s:
            self._next_inquiry_s = now + STRANGER_ASK_S
            strangers, engine.strangers = engine.strangers, set()
            self._node.spawn("inquiry", partial(self._inquire, strangers))
        silence_s = now - engine.election.heard_at_s
        joins = self._is_joining()
        if joins and now >= self._next_join_s and silence_s >= self._config.join_retry_s:
            self._next_join_s = now + self._config.join_retry_s
            self._node.spawn("join", self._ask_to_join)
        if silence_s < self._config.doubt_s or engine.kernel.leads():
            self._said_removed = 0
        elif now >= self._next_doubt_s and not joins and engine.kernel.others():
            self._next_doubt_s = now + self._config.doubt_s
            self._node.spawn("doubt", self._ask_whether_removed)

    def _is_joining(self) -> bool:
        """It was promised membership and has not got it. Whoever taught it may be dead, or may have given up, so
        that nobody remembers the promise: until it is a member it must ask again."""
        engine = self._node.running()
        if not engine.kernel.others():
            return False
        never_counted = engine.is_newcomer() or (self._began_empty and not engine.is_member())
        return never_counted or engine.wal.last_index <= 1

    async def _ask_to_join(self) -> None:
        for each in self._others():
            with contextlib.suppress(SwarmError):
                await self._transport.request_join(each.addr, self._me, PROBE_TIMEOUT_S)
                return

    async def _inquire(self, strangers: set[str]) -> None:
        """Managers that we do not know speak to us: perhaps we were away for long. Ask those that we do know."""
        for each in self._node.reachable_others():
            with contextlib.suppress(NoLeader):
                answer = await self._transport.probe(each.addr, PROBE_TIMEOUT_S)
                if answer.node_id == each.node_id and strangers & {other.node_id for other in answer.members}:
                    self._node.running().introduce(answer.members)
                    return

    async def _ask_whether_removed(self) -> None:
        """Only a leader knows. It is asked twice, because one that has been deposed learns that late."""
        for each in self._others():
            with contextlib.suppress(NoLeader):
                answer = await self._transport.probe(each.addr, PROBE_TIMEOUT_S)
                if answer.leader is None or answer.leader.node_id != answer.node_id:
                    continue
                belongs = self._me.node_id in {member.node_id for member in answer.members}
                self._said_removed = 0 if belongs else self._said_removed + 1
                break
        engine = self._node.running()
        if self._said_removed > 1 and not engine.is_removed:
            engine.is_removed = True
            log.error("the other managers have removed this one from the swarm's managers", node=self._me.node_id)

    def _others(self) -> list[Member]:
        return [each for each in self._node.members() if each.node_id != self._me.node_id]
