"""What consensus needs of a network. `grpc_transport` is the real one; tests use one in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from proto.raft_pb2 import RaftFrame
from swarm.consensus.interface import Member


@dataclass(frozen=True, slots=True)
class Answer:
    """What a manager says about itself when asked."""

    node_id: str
    leader: Member | None
    members: tuple[Member, ...]
    """Empty: its consensus has not started."""


class Receiver(Protocol):
    """The member to which a transport belongs. Called on the event loop; must return at once."""

    def on_frame(self, node_id: str, frame: RaftFrame) -> None: ...

    def on_up(self, node_id: str) -> None:
        """Frames to this peer will be delivered in order until `on_down`."""
        ...

    def on_down(self, node_id: str) -> None: ...

    def on_writable(self, node_id: str) -> None:
        """The queue to this peer has drained."""
        ...

    def answer(self) -> Answer: ...

    async def admit(self, member: Member) -> tuple[Member, ...]:
        """A manager asks to become a member. Raises SwarmError."""
        ...

    async def dismiss(self, node_id: str, timeout_s: float) -> tuple[Member, ...]:
        """A member is to be removed. Raises SwarmError."""
        ...


class Network(Protocol):
    """Frames to a peer arrive in order and at most once, or not at all; never one of an older connection after
    one of a newer. Frames to a peer that is not up are dropped."""

    def send(self, node_id: str, frame: RaftFrame) -> None: ...

    def queued_bytes(self, node_id: str) -> int: ...

    def set_peers(self, peers: frozenset[Member]) -> None:
        """Be connected to exactly these."""
        ...


class FrameTransport(Network, Protocol):
    def attach(self, receiver: Receiver) -> None: ...

    def reachable(self, node_id: str) -> bool:
        """Whether something arrived from this peer within about a second and a half."""
        ...

    async def probe(self, addr: str, timeout_s: float) -> Answer:
        """Ask the manager at host:port who it is. Raises NoLeader when it does not answer."""
        ...

    async def request_join(self, addr: str, member: Member, timeout_s: float) -> tuple[Member, ...]:
        """Ask the manager at host:port to admit `member`. Raises SwarmError."""
        ...

    async def close(self) -> None: ...
