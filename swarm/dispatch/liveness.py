"""Which nodes are alive, as pure bookkeeping of deadlines on a monotonic clock.

Any message of a node's session is a sign of life; a broken stream alone means nothing, for the agent
reconnects at once when only the connection was lost. Two ways of declaring a living node dead are
excluded here: a new leader gives every node a longer grace before it expects to hear from it, and a
leader that was itself asleep (a loaded machine, a stopped process, a long stage) blames itself, not the
nodes: deadlines are counted on a clock that goes on only while the leader can listen.
"""

from __future__ import annotations

DEFAULT_PERIOD_S = 1.0
"""Heartbeat period when the cluster's spec says 0."""
NODES_PER_S = 200
"""With more nodes than this the default period grows by as much: one thousand nodes have 5 s (the reference's period),
and the leader hears 400 heartbeats a second, which take it about a tenth of a core."""
BEATS_PER_PERIOD = 2
"""Agents say something twice per period."""
MISSED_PERIODS = 2.25
"""A node is down this many periods after its last message. With a message each 0.5 s a dead host is found 1.75 to
2.25 s after its end, which leaves the rest of 3 s to start its tasks elsewhere; a node paused for 1.2 s was last heard
1.7 s ago at the most, which leaves it half a second to speak again."""
NEW_LEADER_FACTOR = 4
"""Grace after an election, in units of the normal one: agents have to find the new leader first."""
ORPHAN_AFTER_S = 24 * 3600.0
"""Tasks of a node that stays down so long are given up (as in the reference)."""
CHECK_EVERY_S = 0.1
"""Longest time between two looks at the deadlines."""
STEP_MAX_S = 0.15
"""The most that the listening clock goes on between two looks. What a look comes later than that, the leader was not
listening: heartbeats may have come, and wait to be read in the turns of the loop that follow."""


def default_period_s(nodes: int) -> float:
    """The heartbeat period of a cluster of so many nodes, in seconds, unless its spec says one."""
    return max(DEFAULT_PERIOD_S, nodes / NODES_PER_S)


class ListeningClock:
    """Seconds during which this process was there to listen. Deadlines on it never pass in one leap: after a stop of
    any length there are as many looks left, each with turns of the event loop before it, as there were before.
    `now` is any steady clock."""

    def __init__(self, now: float) -> None:
        self._looked_at = now
        self._listened_s = 0.0

    def look(self, now: float) -> float:
        """The leader looks around: the clock's time from here on."""
        self._listened_s = self.read(now)
        self._looked_at = now
        return self._listened_s

    def read(self, now: float) -> float:
        """The clock's time, for what happens between two looks."""
        return self._listened_s + min(STEP_MAX_S, max(0.0, now - self._looked_at))


class Liveness:
    """Times are seconds given by the caller: deadlines (`watch`, `beat`, `expired`, `next_check`) on the listening
    clock, how long a node has been down (`down`, `lost`) on any steady one."""

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
