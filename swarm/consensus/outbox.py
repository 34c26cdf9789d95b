"""Frames that were said in a turn and wait until what they promise is on disk."""

from __future__ import annotations

from proto.raft_pb2 import RaftFrame
from swarm.consensus.transport import Network

_ENTRIES = ("append_entries", "snapshot")
"""Types of frames that promise nothing about the sender's own disk but its term."""


class Outbox:
    def __init__(self, network: Network) -> None:
        self._network = network
        self._frames: list[tuple[str, RaftFrame]] = []
        self._bytes: dict[str, int] = {}

    def add(self, node_id: str, frame: RaftFrame) -> None:
        self._frames.append((node_id, frame))
        self._bytes[node_id] = self._bytes.get(node_id, 0) + frame.ByteSize()

    def queued_bytes(self, node_id: str) -> int:
        """What waits for this peer, here and in the network."""
        return self._network.queued_bytes(node_id) + self._bytes.get(node_id, 0)

    def let_entries_go(self) -> bool:
        """Only a leader's entries and pieces of snapshots. Whether there were any."""
        ahead = [each for each in self._frames if each[1].type in _ENTRIES]
        if not ahead:
            return False
        self._frames = [each for each in self._frames if each[1].type not in _ENTRIES]
        self._bytes.clear()
        for node_id, frame in ahead:
            self._network.send(node_id, frame)
        return True

    def let_go(self) -> None:
        """All; of the acknowledgements the one that reaches furthest says it all."""
        frames, self._frames = self._frames, []
        self._bytes.clear()
        furthest: dict[str, RaftFrame] = {}
        for node_id, frame in frames:
            if frame.success and (node_id not in furthest or frame.next_index > furthest[node_id].next_index):
                furthest[node_id] = frame
        for node_id, frame in frames:
            if not frame.success or furthest[node_id] is frame:
                self._network.send(node_id, frame)
