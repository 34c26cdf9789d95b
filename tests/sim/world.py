"""A cluster under faults: what goes wrong is drawn from one seed, and every step is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from swarm.consensus.config import DEFAULTS
from swarm.consensus.faults import Damaged
from swarm.errors import SwarmError
from swarm.store.store import Store
from tests.consensus_cluster import Died
from tests.sim.checks import Checks
from tests.sim.clients import REGISTERS, Client, registers, value_of
from tests.sim.disk import PowerFailure
from tests.sim.linearizable import Operation, contradiction
from tests.sim.net import Net, Outcome

SMALL = replace(DEFAULTS, snapshot_entries=40, tail_entries=5, segment_bytes=4_000, chunk_bytes=512)
"""Everything that happens rarely in practice happens often: snapshots, new segments, pieces."""
FAULTS_S = 12.0
RECOVERY_S = 60.0
"""The bound for progress: several elections, and a snapshot for everybody, one after the other."""
CLIENTS = 6
OPERATION_CHANCE = 0.2
"""For each client that is idle, per step."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances per step of 10 ms; `loss` and the like per frame."""

    crash: float = 0.0
    power: float = 0.0
    """The power fails in the middle of one of the next disk operations."""
    all_off: float = 0.0
    cut: float = 0.0
    mute: float = 0.0
    freeze: float = 0.0
    full: float = 0.0
    rot: float = 0.0
    """Chance that a member that is off comes back with a flipped bit."""
    transfer: float = 0.0
    membership: float = 0.0
    loss: float = 0.0
    duplication: float = 0.0
    unruliness: float = 0.0
    latency_s: float = 0.005


class World:
    """Run it with `run`; it raises AssertionError when something did not hold."""

    def __init__(self, seed: int, size: int, faults: Faults, say: Callable[[str], None]) -> None:
        self.faults = faults
        self.net = Net("ABCDEFGHIJ"[:size], seed, SMALL, Store)
        self.net.is_lazy = True
        self.net.on_death = self._died
        self._random = self.net.generator("faults")
        self._say = say
        self._names = "ABCDEFGHIJ"[:size]
        self._spare = list("KLMNOPQRSTUVWXYZ")
        self._off: set[str] = set()
        self._lost: set[str] = set()
        """Their disks are damaged: they never come back."""
        self._rotten: set[str] = set()
        self._joining: str | None = None
        self.history: list[Operation] = []
        self.clients = [Client(self.net, number, self.history) for number in range(CLIENTS)]
        self.checks = Checks(self.net)
        self.counts: dict[str, int] = {}

    # ---- the run

    def run(self) -> None:
        net = self.net
        self._settle(registers())
        net.loss, net.duplication = self.faults.loss, self.faults.duplication
        net.unruliness, net.latency_s = self.faults.unruliness, (0.0, self.faults.latency_s)
        end_s = net.now_s + FAULTS_S
        while net.now_s < end_s:
            self._disturb()
            self._step(may_begin=True)
        self._recover()

    def _step(self, may_begin: bool) -> None:
        for client in self.clients:
            if self.net.engines:
                client.step(may_begin and self._random.random() < OPERATION_CHANCE)
        self.net.step()
        self.checks.step()

    def _until(self, condition: Callable[[], object], what: str) -> None:
        end_s = self.net.now_s + RECOVERY_S
        while not condition():
            assert self.net.now_s < end_s, f"{what} did not happen within {RECOVERY_S:g} s after the faults stopped"
            self._step(may_begin=False)

    def _settle(self, entry: bytes) -> None:
        """Let an entry be stored, whoever leads."""
        outcome = Outcome()
        asked: object = None

        def is_stored() -> bool:
            nonlocal outcome, asked
            if outcome.is_stored:
                return True
            leader = self.net.leader()
            if leader is not None and (outcome.value is not None or leader is not asked):
                outcome, asked = Outcome(), leader
                try:
                    leader.propose(entry, outcome)
                    self.net.poke(leader.me.node_id)
                except SwarmError as error:
                    outcome.value = error
            return False

        self._until(is_stored, "a write")

    def _recover(self) -> None:
        net = self.net
        self._tell("the faults stop")
        net.loss = net.duplication = net.unruliness = 0.0
        net.latency_s = (0.0, 0.005)
        net.heal()
        for name in sorted(net.frozen):
            self._thaw(name)
        for disk in net.disks.values():
            disk.is_full, disk.fails_in = False, None
        for name in sorted(self._off):
            self._start(name)
        self._settle(registers())
        for name in [member.node_id for member in net.elect().members()]:
            if name not in net.engines and name not in self._lost:
                self._start(name)  # it went off while it joined, and the change that adds it was under way
        for name in sorted(self._lost):
            self._until(lambda name=name: self._remove(name), f"the removal of {name}")  # type: ignore[misc]
        for client in self.clients:
            self._until(lambda client=client: client.is_idle, "the answer to a client")  # type: ignore[misc]
        self._settle(registers())
        members = [member.node_id for member in net.elect().members()]
        self._until(
            lambda: len({net.machines[name].digest() for name in members}) == 1, "the same state at every member"
        )
        for key in REGISTERS:
            at = net.now_s
            values = {value_of(net.machines[name], key) for name in members}
            assert len(values) == 1
            self.history.append(Operation(key, at, at, None, values.pop()))
        assert not (found := contradiction(self.history)), found

    def summary(self) -> str:
        """What happened, in numbers."""
        swaps = sum(client.acknowledged for client in self.clients)
        reads = sum(client.reads for client in self.clients)
        counts = "".join(f", {count} {what}" for what, count in sorted(self.counts.items()))
        is_open = sum(operation.is_open for operation in self.history)
        return (
            f"{self.checks.highest} entries committed, {swaps} swaps, {reads} reads, {is_open} open{counts};"
            f" {self.net.now_s - 1000:.2f} simulated s"
        )

    # ---- faults

    def _tell(self, text: str) -> None:
        self._say(f"{self.net.now_s - 1000.0:7.2f} {text}")

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _happens(self, chance: float) -> bool:
        return chance > 0 and self._random.random() < chance

    def _disturb(self) -> None:
        net, faults = self.net, self.faults
        running = sorted(net.engines)
        if self._happens(faults.crash) and running:
            self._crash(self._random.choice(running))
        if self._happens(faults.power) and running:
            net.disks[self._random.choice(running)].fails_in = self._random.randrange(12)
        if self._happens(faults.all_off):
            self._tell("the power of all fails")
            for name in sorted(net.engines):
                self._crash(name)
        if self._off and self._random.random() < 0.02:
            self._start(self._random.choice(sorted(self._off)))
        self._disturb_network(sorted(net.engines))
        if self._happens(faults.freeze) and len(running) > 1:
            name = self._random.choice(running)
            self._tell(f"{name} freezes")
            self._count("freezes")
            net.frozen.add(name)
        elif net.frozen and self._random.random() < 0.015:
            self._thaw(self._random.choice(sorted(net.frozen)))
        if self._happens(faults.full) and running:
            name = self._random.choice(running)
            self._tell(f"the disk of {name} is full")
            self._count("full disks")
            net.disks[name].is_full = True
        if self._happens(faults.transfer) and (leader := net.leader()) is not None:
            leader.kernel.hand_over()
            net.poke(leader.me.node_id)
            self._count("transfers")
        self._change_members()

    def _disturb_network(self, running: list[str]) -> None:
        net = self.net
        if len(running) < 2:
            return
        if self._happens(self.faults.cut):
            one, other = self._random.sample(running, 2)
            if self._random.random() < 0.5:
                self._tell(f"{one} is cut off")
                net.isolate(one)
            else:
                self._tell(f"{one} and {other} are cut off from each other")
                net.cut.add(frozenset((one, other)))
            self._count("partitions")
        if self._happens(self.faults.mute):
            one, other = self._random.sample(running, 2)
            self._tell(f"nothing from {one} reaches {other}")
            net.mute.add((one, other))
            self._count("one-way partitions")
        if (net.cut or net.mute) and self._random.random() < 0.01:
            self._tell("the network heals")
            net.heal()

    def _thaw(self, name: str) -> None:
        self._tell(f"{name} thaws")
        self.net.frozen.discard(name)
        self.net.poke(name)

    def _died(self, name: str, error: BaseException) -> None:
        disk = self.net.disks[name]
        assert isinstance(error, PowerFailure) or disk.is_full, f"{name} died without a reason: {error}"
        self._tell(f"{name} ends: {error or 'the power fails in the middle of a write'}")
        self._count("power failures" if isinstance(error, PowerFailure) else "deaths of a full disk")
        self._end(name)

    def _crash(self, name: str) -> None:
        self._tell(f"{name} crashes")
        self._count("crashes")
        self._end(name)

    def _end(self, name: str) -> None:
        self.net.crash(name)
        self._off.add(name)
        if name == self._joining:
            self._off.discard(name)  # it was no member yet: it joins anew, if at all, as another
            self._forget_joining()

    def _start(self, name: str) -> None:
        """As an operator does, who has made room on the disk."""
        net = self.net
        disk = net.disks[name]
        disk.is_full = False
        self._off.discard(name)
        if self._happens(self.faults.rot) and self._may_lose() and (file := disk.rot()):
            self._tell(f"{file} of {name} rots")
            self._rotten.add(name)
            self._count("rotten files")
        self._tell(f"{name} starts")
        try:
            net.start(name, ())
        except (PowerFailure, Died):
            net.engines.pop(name, None)
            disk.power_off()
            self._off.add(name)
        except Damaged as error:
            if name not in self._rotten:
                raise AssertionError(f"a crash alone damaged the log of {name}: {error}") from None
            self._tell(f"{name} refuses to start: its disk is damaged")
            self._count("refusals to start")
            self._lost.add(name)

    def _may_lose(self) -> bool:
        """At most one disk is lost at a time: more than a minority of losses is beyond what Raft promises."""
        leader = self.net.leader()
        return not self._lost and not self._rotten and leader is not None and len(leader.members()) > 2

    # ---- members

    def _change_members(self) -> None:
        if self._lost and self._random.random() < 0.05:
            self._remove(min(self._lost))
        if self._joining is not None:
            self._go_on_joining(self._joining)
        elif self._happens(self.faults.membership) and (leader := self.net.leader()) is not None:
            members = [member.node_id for member in leader.members()]
            if len(members) < len(self._names) + 1 and self._spare:
                self._begin_joining()
            elif len(members) > 2:
                self._remove(self._random.choice([name for name in members if name != leader.me.node_id]))

    def _begin_joining(self) -> None:
        leader = self.net.leader()
        assert leader is not None
        name = self._spare.pop(0)
        self._joining = name
        self._tell(f"{name} joins")
        self.net.start(name, leader.members())  # without itself, as `changes.admit` answers
        leader.teach(self.net.member(name))

    def _go_on_joining(self, name: str) -> None:
        leader = self.net.leader()
        if leader is None:
            return
        member = self.net.member(name)
        if member in leader.members():
            self._count("joins")
            self._joining = None
        elif f"{name}@{name}:1" not in leader.kernel.learners():
            leader.teach(member)
            self.net.poke(leader.me.node_id)
        elif leader.kernel.match(f"{name}@{name}:1") >= leader.wal.last_index and leader.may_change_members():
            self._change(leader.change_members, "add", name)

    def _forget_joining(self) -> None:
        name, self._joining = self._joining, None
        for engine in self.net.engines.values():
            if name is not None and self.net.member(name) in engine.members():
                self._off.add(name)  # it was added after all
                return

    def _remove(self, name: str) -> bool:
        """Whether it is done."""
        leader = self.net.leader()
        if leader is None:
            return False
        if self.net.member(name) not in leader.members():
            if not leader.may_change_members() or leader.kernel.applied() < self.checks.highest:
                return False  # not decided yet, or asked of one that only thinks it still leads
            self._lost.discard(name)
            self._rotten.discard(name)
            if name in self.net.engines:
                self.net.crash(name)
            return True
        others = [member.node_id for member in leader.members() if member.node_id != name]
        alive = [each for each in others if each in self.net.engines and each not in self.net.frozen]
        if name != leader.me.node_id and len(alive) > len(others) // 2 and leader.may_change_members():
            self._change(leader.change_members, "rem", name)
        return False

    def _change(self, change: Callable[..., None], operation: str, name: str) -> None:
        try:
            change(operation, f"{name}@{name}:1", lambda _: None)
        except SwarmError:
            return
        self._tell(f"change of members: {operation} {name}")
        self._count("changes of members")
        for each in self.net.engines:
            self.net.poke(each)
