"""Members of consensus on a simulated network with a virtual clock: the real engine, log and kernel, deterministic."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proto.raft_pb2 import RaftFrame
from swarm.consensus.config import DEFAULTS, RaftConfig
from swarm.consensus.disk import AppendFile, Directory
from swarm.consensus.engine import Engine
from swarm.consensus.interface import Member
from swarm.consensus.storage import open_storage
from swarm.errors import SwarmError
from tests.consensus_cluster import ListMachine, die

STEP_S = 0.01


class Inline(Executor):
    """Runs at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Unsynced(Directory):
    """A directory that does not wait for the disk: crashes here end no machine."""

    def sync_names(self) -> None: ...

    def create(self, name: str) -> AppendFile:
        return _without_sync(super().create(name))

    def append(self, name: str, size: int) -> AppendFile:
        return _without_sync(super().append(name, size))


def _without_sync(file: AppendFile) -> AppendFile:
    file.sync = lambda: None  # type: ignore[method-assign]
    return file


@dataclass
class Link:
    """One direction between two members: first in, first out."""

    frames: deque[tuple[float, RaftFrame]]
    is_up: bool = False


class _Port:
    """One member's view of the network."""

    def __init__(self, net: Net, name: str) -> None:
        self._net = net
        self._name = name
        self.peers: frozenset[Member] = frozenset()

    def send(self, node_id: str, frame: RaftFrame) -> None:
        self._net.send(self._name, node_id, frame)

    def queued_bytes(self, node_id: str) -> int:
        return 0

    def set_peers(self, peers: frozenset[Member]) -> None:
        self.peers = peers


class Net:
    """`names`: members from the start. Nothing moves but by `step`, `deliver` and `pump`."""

    def __init__(self, directory: Path, names: str, seed: int = 0, config: RaftConfig = DEFAULTS) -> None:
        self.now_s = 1000.0
        self.random = random.Random(seed)
        self.config = replace(config, disk_reserve_bytes=0)
        self.loss = 0.0
        self.latency_s = (0.0, 0.005)
        self.cut: set[frozenset[str]] = set()
        self.engines: dict[str, Engine] = {}
        self.machines: dict[str, ListMachine] = {}
        self.ports: dict[str, _Port] = {}
        self.links: dict[tuple[str, str], Link] = {}
        self.taped: list[tuple[str, str, RaftFrame]] = []
        self.leaders_of_terms: dict[int, set[str]] = {}
        self._directory = directory
        self._founders = tuple(self.member(name) for name in names)
        for name in names:
            self.start(name)

    @staticmethod
    def member(name: str) -> Member:
        return Member(name, f"{name}:1")

    # ---- members

    def start(self, name: str, members: Iterable[Member] | None = None) -> Engine:
        members = self._founders if members is None else tuple(members)
        storage = open_storage(_Unsynced(self._directory / name), members, die, self.config)
        self.machines[name] = ListMachine()
        self.ports[name] = _Port(self, name)
        engine = Engine(
            me=self.member(name),
            storage=storage,
            machine=self.machines[name],
            network=self.ports[name],
            executor=Inline(),
            config=self.config,
            clock=lambda: self.now_s,
            random=self.random.random,
            fatal=die,
        )
        self.engines[name] = engine
        engine.start()
        self._reconnect()
        return engine

    def crash(self, name: str) -> None:
        """What was not synced is gone."""
        engine = self.engines.pop(name)
        engine.compaction.close()
        engine.wal.abandon()
        for pair in [pair for pair in self.links if name in pair]:
            self._down(pair)

    def close(self) -> None:
        for name in list(self.engines):
            self.crash(name)

    def leader(self) -> Engine | None:
        """The one in the highest term that may serve."""
        leaders = [engine for engine in self.engines.values() if engine.is_leader()]
        return max(leaders, key=lambda engine: engine.kernel.term(), default=None)

    # ---- network

    def isolate(self, name: str) -> None:
        self.cut |= {frozenset((name, other)) for other in self.engines if other != name}
        self._reconnect()

    def heal(self) -> None:
        self.cut.clear()
        self._reconnect()

    def _reconnect(self) -> None:
        for one in self.engines:
            for peer in self.ports[one].peers:
                pair = (one, peer.node_id)
                link = self.links.setdefault(pair, Link(deque()))
                may = peer.node_id in self.engines and frozenset(pair) not in self.cut
                if may and not link.is_up:
                    link.is_up = True
                    self.engines[one].peer_up(peer.node_id)
                elif not may and link.is_up:
                    self._down(pair)

    def _down(self, pair: tuple[str, str]) -> None:
        link = self.links[pair]
        link.frames.clear()
        if link.is_up:
            link.is_up = False
            if pair[0] in self.engines:
                self.engines[pair[0]].peer_down(pair[1])

    def send(self, sender: str, receiver: str, frame: RaftFrame) -> None:
        link = self.links.get((sender, receiver))
        self.taped.append((sender, receiver, frame))
        if link is None or not link.is_up or self.random.random() < self.loss:
            return
        due = self.now_s + self.random.uniform(*self.latency_s)
        if link.frames:
            due = max(due, link.frames[-1][0])
        link.frames.append((due, frame))

    def step(self, count: int = 1) -> None:
        """Time passes; what is due arrives; every member has a turn."""
        for _ in range(count):
            self.now_s += STEP_S
            self.taped.clear()
            self._reconnect()
            for (sender, receiver), link in self.links.items():
                while link.frames and link.frames[0][0] <= self.now_s:
                    frame = link.frames.popleft()[1]
                    if receiver in self.engines:
                        self.engines[receiver].receive(sender, frame)
            for engine in self.engines.values():
                engine.pump()
                self._inquire(engine)
            self.observe()

    def _inquire(self, engine: Engine) -> None:
        """As `RaftNode` does: ask a member that we know about those that we do not."""
        known = {member.node_id for member in engine.members()} - engine.strangers
        for other in known & {name for name in self.engines if engine.is_up(name)}:
            members = self.engines[other].members()
            if engine.strangers & {member.node_id for member in members}:
                engine.introduce(members)
        engine.strangers.clear()

    def observe(self) -> None:
        for name, engine in self.engines.items():
            if engine.kernel.leads():
                self.leaders_of_terms.setdefault(engine.kernel.term(), set()).add(name)

    def until(self, condition: Callable[[], object], limit_s: float = 30.0) -> None:
        end = self.now_s + limit_s
        while not condition():
            assert self.now_s < end, f"did not come true within {limit_s:g} simulated seconds"
            self.step()

    def elect(self) -> Engine:
        self.until(self.leader)
        leader = self.leader()
        assert leader is not None
        return leader

    def inject(self, sender: str, receiver: str, frame: RaftFrame) -> None:
        """Let a frame arrive, whatever the links say."""
        self.engines[receiver].receive(sender, frame)
        self.engines[receiver].pump()


class Outcome:
    """Collects what a proposal came to."""

    def __init__(self) -> None:
        self.value: bytes | SwarmError | None = None

    def __call__(self, value: bytes | SwarmError) -> None:
        assert self.value is None, "answered twice"
        self.value = value

    @property
    def is_stored(self) -> bool:
        return isinstance(self.value, bytes)


def write(engine: Engine, payload: bytes) -> Outcome:
    outcome = Outcome()
    engine.propose(payload, outcome)
    return outcome
