"""Which nodes are alive, as pure bookkeeping of deadlines on a monotonic clock.

Any message of a node's session is a sign of life; a broken stream alone means nothing, for the agent
reconnects at once when only the connection was lost. Two ways of declaring a living node dead are
excluded here: a new leader gives every node a longer grace before it expects to hear from it, and a
leader that was itself asleep (a loaded machine, a stopped process) blames itself, not the nodes.
"""

from __future__ import annotations

DEFAULT_PERIOD_S = 1.0
"""Heartbeat period when the cluster's spec says 0."""
MISSED_PERIODS = 3
"""A node is down this many periods after its last message: found within 3 s at the default period."""
NEW_LEADER_FACTOR = 3
"""Grace after an election, in units of the normal one: agents have to find the new leader first."""
ORPHAN_AFTER_S = 24 * 3600.0
"""Tasks of a node that stays down so long are given up (as in the reference)."""
OVERSLEPT_S = 0.25
"""A check that runs later than this after its time means that this process was not running."""


class Liveness:
    """Times are monotonic seconds, given by the caller."""

    def __init__(self) -> None:
        self._deadlines: dict[str, float] = {}
        self._down_since: dict[str, float] = {}

    def watch(self, node_id: str, now: float, grace_s: float) -> None:
        """Expect to hear from this node within `grace_s`."""
        self._down_since.pop(node_id, None)
        self._deadlines[node_id] = now + grace_s

    def beat(self, node_id: str, now: float, period_s: float) -> None:
        """A message came from a watched node; one that is not watched (down, removed) has to register first."""
        if node_id in self._deadlines:
            self._deadlines[node_id] = max(self._deadlines[node_id], now + MISSED_PERIODS * period_s)

    def down(self, node_id: str, now: float) -> None:
        """The node counts as down from now on; repeated calls keep the first time."""
        self._deadlines.pop(node_id, None)
        self._down_since.setdefault(node_id, now)

    def forget(self, node_id: str) -> None:
        """The node was removed from the cluster."""
        self._deadlines.pop(node_id, None)
        self._down_since.pop(node_id, None)

    def overslept(self, late_s: float) -> None:
        """The caller checked `late_s` after it meant to: give every node that time back."""
        if late_s > OVERSLEPT_S:
            self._deadlines = {node_id: deadline + late_s for node_id, deadline in self._deadlines.items()}

    def expired(self, now: float) -> list[str]:
        """Nodes whose deadline has passed, in order of ID."""
        return sorted(node_id for node_id, deadline in self._deadlines.items() if deadline <= now)

    def lost(self, now: float) -> list[str]:
        """Nodes that have been down for ORPHAN_AFTER_S; each is told once."""
        gone = sorted(node_id for node_id, since in self._down_since.items() if now - since >= ORPHAN_AFTER_S)
        for node_id in gone:
            self._down_since[node_id] = float("inf")
        return gone

    def next_check(self, now: float, at_most_s: float) -> float:
        """When to ask `expired` again: at the nearest deadline, or after `at_most_s`."""
        return min([now + at_most_s, *self._deadlines.values()])
