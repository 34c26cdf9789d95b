"""Members of consensus on a simulated network with a virtual clock: the real engine, log and kernel, deterministic."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any

from proto.raft_pb2 import RaftFrame
from swarm.consensus.config import DEFAULTS, RaftConfig
from swarm.consensus.engine import Engine
from swarm.consensus.interface import Member, StateMachine
from swarm.consensus.storage import open_storage
from swarm.errors import SwarmError
from tests.consensus_cluster import Died, ListMachine, die
from tests.sim.disk import MemoryDisk, PowerFailure

STEP_S = 0.01
SNAPSHOT_S = 0.2
"""A snapshot is written at a random moment within this time."""


class Later(Executor):
    """Runs what it is given when `run_due` comes to it: as a thread would, beside everything else."""

    def __init__(self, delay_s: Callable[[], float], now_s: Callable[[], float]) -> None:
        self._delay_s = delay_s
        self._now_s = now_s
        self._jobs: list[tuple[float, Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.append((self._now_s() + self._delay_s(), future, lambda: fn(*args, **kwargs)))
        return future

    def run_due(self) -> bool:
        due = [job for job in self._jobs if job[0] <= self._now_s()]
        self._jobs = [job for job in self._jobs if job[0] > self._now_s()]
        for _, future, job in due:
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)
        return bool(due)


@dataclass
class Link:
    """One direction between two members: first in, first out, unless the network is `unruly`."""

    random: random.Random
    frames: deque[tuple[float, RaftFrame]] = field(default_factory=deque)
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
    """`names`: members from the start, one letter each. Nothing moves but by `step` and `inject`. Every link, disk and
    member draws from a generator of its own, so what happens does not depend on the order of sets."""

    def __init__(
        self,
        names: str,
        seed: int = 0,
        config: RaftConfig = DEFAULTS,
        machine: Callable[[], StateMachine] = ListMachine,
        engine: Callable[..., Engine] = Engine,
    ) -> None:
        self.now_s = 1000.0
        self.seed = seed
        self.random = random.Random(seed)
        self.config = replace(config, disk_reserve_bytes=0)
        self.loss = self.duplication = self.unruliness = 0.0
        self.latency_s = (0.0, 0.005)
        self.cut: set[frozenset[str]] = set()
        self.mute: set[tuple[str, str]] = set()
        """(sender, receiver) whose frames vanish, although the connection seems to be up."""
        self.frozen: set[str] = set()
        self.engines: dict[str, Engine] = {}
        self.machines: dict[str, Any] = {}
        self.ports: dict[str, _Port] = {}
        self.links: dict[tuple[str, str], Link] = {}
        self.disks: dict[str, MemoryDisk] = {}
        self.taped: list[tuple[str, str, RaftFrame]] = []
        self.leaders_of_terms: dict[int, set[str]] = {}
        self.is_lazy = False
        """Whether only those who have something to do get a turn: much faster, but whoever proposes must `poke`."""
        self.on_death: Callable[[str, BaseException], None] | None = None
        """Gets members that die in a turn; None: that is an error."""
        self._machine = machine
        self._make = engine
        self._executors: dict[str, Later] = {}
        self._wake_s: dict[str, float] = {}
        self._founders = tuple(self.member(name) for name in names)
        for name in names:
            self.start(name)

    @staticmethod
    def member(name: str) -> Member:
        return Member(name, f"{name}:1")

    def generator(self, *purpose: object) -> random.Random:
        """Random numbers for one purpose, whatever else draws."""
        return random.Random(f"{self.seed} {purpose}")

    # ---- members

    def start(self, name: str, members: Iterable[Member] | None = None) -> Engine:
        """Raises Damaged, Died and PowerFailure."""
        members = self._founders if members is None else tuple(members)
        if name not in self.disks:
            self.disks[name] = MemoryDisk(name, self.generator("disk", name))
        storage = open_storage(self.disks[name], members, die, self.config)
        chance = self.generator("member", name, self.now_s)
        machine = self._machine()
        port = _Port(self, name)
        executor = Later(lambda: chance.uniform(0, SNAPSHOT_S), lambda: self.now_s)
        engine = self._make(
            me=self.member(name),
            storage=storage,
            machine=machine,
            network=port,
            executor=executor,
            config=self.config,
            clock=lambda: self.now_s,
            random=chance.random,
            fatal=die,
        )
        self.machines[name], self.ports[name], self._executors[name] = machine, port, executor
        self.engines[name] = engine
        engine.start()
        self._reconnect()
        return engine

    def crash(self, name: str) -> None:
        """The machine goes off: of what was not synced, and of what it had sent, chance decides what is left."""
        engine = self.engines.pop(name)
        engine.compaction.close()
        engine.wal.abandon()
        self._executors.pop(name)
        self.frozen.discard(name)
        self.disks[name].power_off()
        for (sender, receiver), link in self.links.items():
            if sender == name and receiver in self.engines:
                for _ in range(link.random.randint(0, len(link.frames))):
                    self.engines[receiver].receive(sender, link.frames.popleft()[1])
            if name in (sender, receiver):
                self._down((sender, receiver))

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
        self.mute.clear()
        self._reconnect()

    def _reconnect(self) -> None:
        for one in self.engines:
            for peer in sorted(self.ports[one].peers, key=lambda member: member.node_id):
                pair = (one, peer.node_id)
                if pair not in self.links:
                    self.links[pair] = Link(self.generator("link", *pair))
                link = self.links[pair]
                may = peer.node_id in self.engines and frozenset(pair) not in self.cut
                if may and not link.is_up:
                    link.is_up = True
                    self.engines[one].peer_up(peer.node_id)
                    self.poke(one)
                elif not may and link.is_up:
                    self._down(pair)

    def _down(self, pair: tuple[str, str]) -> None:
        link = self.links[pair]
        link.frames.clear()
        if link.is_up:
            link.is_up = False
            if pair[0] in self.engines:
                self.engines[pair[0]].peer_down(pair[1])
                self.poke(pair[0])

    def send(self, sender: str, receiver: str, frame: RaftFrame) -> None:
        link = self.links.get((sender, receiver))
        self.taped.append((sender, receiver, frame))
        if link is None or not link.is_up or (sender, receiver) in self.mute or link.random.random() < self.loss:
            return
        for _ in range(1 + (link.random.random() < self.duplication)):
            due = self.now_s + link.random.uniform(*self.latency_s)
            if link.frames and link.random.random() >= self.unruliness:
                due = max(due, link.frames[-1][0])
            link.frames.append((due, frame))

    def poke(self, name: str) -> None:
        """It has something to do, whatever its clock says."""
        self._wake_s.pop(name, None)

    # ---- time

    def step(self, count: int = 1) -> None:
        """Time passes; what is due arrives; whoever has something to do has a turn."""
        for _ in range(count):
            self.now_s += STEP_S
            self.taped.clear()
            self._reconnect()
            for (sender, receiver), link in self.links.items():
                if link.frames:
                    self._deliver(sender, receiver, link)
            for name in list(self.engines):
                if name not in self.frozen:
                    self._turn(name)
            self.observe()

    def _deliver(self, sender: str, receiver: str, link: Link) -> None:
        due = [item for item in link.frames if item[0] <= self.now_s]
        if not due:
            return
        link.frames = deque(item for item in link.frames if item[0] > self.now_s)
        for _, frame in sorted(due, key=lambda item: item[0]):
            if receiver in self.engines:
                self.engines[receiver].receive(sender, frame)
                self.poke(receiver)

    def _turn(self, name: str) -> None:
        engine = self.engines[name]
        try:
            if self._executors[name].run_due() or not self.is_lazy or self._wake_s.get(name, 0.0) <= self.now_s:
                engine.pump()
                self._inquire(engine)
                rest_s = min(max(engine.rest_s(), 0.0), self.config.tick_max_s)
                self._wake_s[name] = self.now_s if engine.turns_wanted else self.now_s + rest_s
        except (Died, PowerFailure) as error:
            if self.on_death is None:
                raise
            self.on_death(name, error)

    def _inquire(self, engine: Engine) -> None:
        """As `RaftNode` does: ask a member that we know about those that we do not."""
        known = {member.node_id for member in engine.members()} - engine.strangers
        for other in sorted(known & {name for name in self.engines if engine.is_up(name)}):
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
