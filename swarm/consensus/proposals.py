"""What callers wait for: commands on their way to the kernel, and those whose entries are not applied yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from swarm.consensus import codec
from swarm.consensus.config import PROPOSALS_BYTES_MAX, PROPOSALS_MAX
from swarm.consensus.kernel import DENIED, DISCARDED, MISSING_LEADER, QUEUE_FULL, SUCCESS, Callback
from swarm.errors import Busy, NoLeader, OutcomeUnknown, SwarmError

Done = Callable[[bytes | SwarmError], None]
"""Gets what `apply` returned (nothing for a change of members), or why that is not known."""


@dataclass(frozen=True, slots=True)
class _Proposal:
    number: int
    command: bytes
    done: Done


class Proposals:
    """`not_leading` makes the error for commands that reach the kernel when this member does not lead (any more)."""

    def __init__(self, not_leading: Callable[[], NoLeader]) -> None:
        self._not_leading = not_leading
        self._queue: list[_Proposal] = []
        self._pending: dict[int, _Proposal] = {}
        self._bytes = 0
        self._count = 0

    def check_room(self) -> None:
        """Raises Busy."""
        if len(self._queue) + len(self._pending) >= PROPOSALS_MAX or self._bytes >= PROPOSALS_BYTES_MAX:
            raise Busy("too many changes wait for the quorum already; try again in a moment")

    def add(self, command: bytes, done: Done) -> None:
        """`done` is called exactly once."""
        self._count += 1
        self._bytes += len(command)
        self._queue.append(_Proposal(self._count, command, done))

    def changes_members(self) -> bool:
        """Whether a change of members waits to be taken by the kernel."""
        return any(proposal.command[:1] == codec.MEMBERSHIP for proposal in self._queue)

    def feed(self, leads: bool) -> Iterator[tuple[bytes, Callback]]:
        """The kernel asks for commands."""
        queue, self._queue = self._queue, []
        for proposal in queue:
            if leads:
                self._pending[proposal.number] = proposal
                yield proposal.command, partial(self._answered, proposal.number)
            else:
                self._finish(proposal, self._not_leading())

    def sweep(self, why: str) -> None:
        """Nobody waits for an answer that may never come."""
        pending, self._pending = self._pending, {}
        for proposal in pending.values():
            self._finish(
                proposal, OutcomeUnknown(f"{why} before a quorum answered: the change may or may not be stored; retry")
            )
        queue, self._queue = self._queue, []
        for proposal in queue:
            self._finish(proposal, NoLeader(f"{why} before the change was stored; try again"))

    def _answered(self, number: int, result: Any, reason: int) -> None:
        proposal = self._pending.pop(number, None)
        if proposal is None:
            return  # swept
        if reason == SUCCESS:
            self._finish(proposal, b"" if result is None else result)
        elif reason in (DISCARDED, MISSING_LEADER):
            self._finish(proposal, NoLeader("another manager became leader before this was stored; try again"))
        elif reason in (DENIED, QUEUE_FULL):
            self._finish(proposal, Busy("the change could not be taken on now; try again"))
        else:
            self._finish(proposal, OutcomeUnknown("the leader changed: the change may or may not be stored; retry"))

    def _finish(self, proposal: _Proposal, outcome: bytes | SwarmError) -> None:
        self._bytes -= len(proposal.command)
        proposal.done(outcome)
