"""A whole swarm under faults: managers, hosts and users, all drawn from one seed; every state is checked."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from proto import objects_pb2 as pb
from proto.objects_pb2 import NodeStatus, UpdateStatus
from swarm.consensus.config import DEFAULTS
from swarm.errors import SwarmError
from swarm.leader import STAGES, Stage
from swarm.store import states
from swarm.store.changes import Change, Update, copy_of
from swarm.store.store import Store
from tests.sim.agents import CARDS, Host
from tests.sim.calls import Call
from tests.sim.checks import Checks
from tests.sim.disk import PowerFailure
from tests.sim.manager import SimManager
from tests.sim.net import STEP_S, Net
from tests.sim.users import Users, founding, networks_for
from tests.sim.virtual import VirtualLoop
from tests.simulated import check

START_S = 1000.0
CONFIG = replace(DEFAULTS, snapshot_entries=400, tail_entries=50)
RECOVERY_S = 300.0
"""The bound for convergence: a dozen tasks replaced one after the other, each with its delay, and watched."""
CHECK_EVERY_S = 0.5
WISHES_PER_USER_S = 4.0
"""A commit takes a tenth of a second or two: one user alone could not wish for more."""
LATENCY_S = (0.0002, 0.01)


@dataclass(frozen=True, slots=True)
class Size:
    managers: int
    hosts: int
    services: int
    faults_s: float
    """How long users and faults are at work."""
    wishes_per_s: float


@dataclass(frozen=True, slots=True)
class Trouble:
    """Chances per second."""

    manager_crash: float = 0.0
    manager_cut: float = 0.0
    host_off: float = 0.0
    agent_kill: float = 0.0
    host_cut: float = 0.0
    container_fault: float = 0.0
    """Per preparation, start or run of a container."""


class Swarm:
    """`run` raises AssertionError when something did not hold."""

    def __init__(
        self,
        seed: int,
        size: Size,
        trouble: Trouble,
        say: Callable[[str], None],
        stages: Sequence[tuple[str, Stage]] = STAGES,
    ) -> None:
        self._size = size
        self._stages = stages
        self._trouble = trouble
        self._say = say
        self._names = "ABCDE"[: size.managers]
        self._loop = VirtualLoop(START_S)
        self.net = Net(self._names, seed, CONFIG, Store)
        self.net.is_lazy = True
        self.net.on_death = self._died
        self._chance = self.net.generator("trouble")
        self._users = Users(self.net.generator("users"), size.services, size.hosts)
        self.checks = Checks(self.net)
        self.managers: dict[str, SimManager] = {}
        self.hosts: dict[str, Host] = {}
        self._calls: list[tuple[str, Call]] = []
        self._cuts: set[tuple[str, str]] = set()
        """(host, manager) that do not reach each other."""
        self._off: dict[str, float] = {}
        """Hosts without power or agent, and when they come back."""
        self._errors: list[BaseException] = []
        self._stormy = False
        self._checked_version = -1
        self.counts: dict[str, int] = {}

    # ---- the run

    def run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.close()

    async def _main(self) -> None:
        story = asyncio.create_task(self._story())
        clock = asyncio.create_task(self._clock())
        done, _ = await asyncio.wait((story, clock), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def _clock(self) -> None:
        """Consensus moves in steps; between them everything else happens."""
        for name in self._names:
            self._manage(name)
        steps, next_check_s = 0, START_S
        while True:
            steps += 1
            await asyncio.sleep(max(0.0, START_S + steps * STEP_S - self._loop.time()))
            self.net.step()
            self.checks.step()
            for name in self._names:
                if name in self.managers:
                    self.managers[name].observe()
            assert not self._errors, f"a part of a manager ended: {self._errors[0]!r}"
            if self.net.now_s >= next_check_s:
                next_check_s = self.net.now_s + CHECK_EVERY_S
                self._check_state()

    def _check_state(self) -> None:
        manager = self._leading()
        if manager is not None and manager.store.version != self._checked_version:
            self._checked_version = manager.store.version
            check(manager.store)
        for name, host in self.hosts.items():
            cards = host.cards_in_use()
            assert len(cards) == len(set(cards)), f"containers of {name} share a card: {cards}"

    async def _story(self) -> None:
        names = [f"host{number:04}" for number in range(self._size.hosts)]
        await self._insist(lambda _: founding(names, networks_for(self._size.services)))
        for name in names:
            host = Host(name, self.net.generator("host", name), self._dial, self._addrs(), self._container_fails)
            self.hosts[name] = host
            host.start()
        self._stormy = True
        users = math.ceil(self._size.wishes_per_s / WISHES_PER_USER_S)
        wishing = [asyncio.create_task(self._wish(self._size.wishes_per_s / users)) for _ in range(users)]
        end_s = self.net.now_s + self._size.faults_s
        while self.net.now_s < end_s:
            await asyncio.sleep(0.1)
            self._disturb(0.1)
        for each in wishing:
            each.cancel()
        await self._recover()

    async def _wish(self, per_s: float) -> None:
        """One user, who waits for each wish to be stored."""
        while True:
            await asyncio.sleep(self._chance.expovariate(per_s))
            manager = self._leading()
            if manager is None or (wish := self._users.wish(manager.store)) is None:
                continue
            what, change = wish
            self._tell(what)
            with contextlib.suppress(SwarmError):  # the user sees the error; what is stored counts
                await manager.writer.commit((change,))
            self._count("wishes")

    async def _insist(self, group: Callable[[Store], tuple[Change, ...]]) -> None:
        while True:
            manager = self._leading()
            if manager is not None:
                try:
                    await manager.writer.commit(group(manager.store))
                except SwarmError as error:
                    self._tell(f"again: {error}")
                else:
                    return
            await asyncio.sleep(0.1)

    async def _recover(self) -> None:
        self._tell("the faults stop")
        self._stormy = False
        self._cuts.clear()
        self.net.heal()
        for name in self._names:
            if name not in self.managers:
                self._start_manager(name)
        for name in list(self._off):
            self._host_back(name)
        lacking = [host for host in self.hosts.values() if host.cards != CARDS]
        for host in lacking:
            host.kill_agent()
            host.cards = CARDS
        await asyncio.sleep(0.1)  # else the agent before would still finish what it does at this instant
        for host in lacking:
            host.start()
        await self._insist(_activate_all)
        end_s, told = self.net.now_s + RECOVERY_S, ""
        while (why := self._unsettled()) and self.net.now_s < end_s:
            if why != told:
                self._tell(f"not yet: {why}")
            told = why
            await asyncio.sleep(1.0)
        assert not why, f"{RECOVERY_S:g} s after the faults stopped: {why}"
        digests = {self.net.machines[name].digest() for name in self._names}
        while len(digests) > 1 and self.net.now_s < end_s:
            await asyncio.sleep(0.1)
            digests = {self.net.machines[name].digest() for name in self._names}
        assert len(digests) == 1, "the managers' states differ"
        self._count_executions()

    def _count_executions(self) -> None:
        for service in self.net.machines[self._names[0]].services:
            if states.is_job(service.spec):
                tasks = list(self.net.machines[self._names[0]].tasks.where("service", service.id))
                done = {task.slot or task.node_id for task in tasks if task.status.state == pb.TASK_COMPLETE}
                self.counts["executions asked for"] = self.counts.get("executions asked for", 0) + len(done)
                repeated = self._executions(tasks) - len(done)
                self.counts["executions repeated"] = self.counts.get("executions repeated", 0) + repeated

    # ---- what must be true in the end

    def _unsettled(self) -> str:
        manager = self._leading()
        if manager is None:
            return "nobody leads"
        store = manager.store
        check(store)
        for node in store.nodes:
            if node.status.state != NodeStatus.READY:
                return f"{node.id} is {NodeStatus.State.Name(node.status.state)}"
        for service in sorted(store.services, key=lambda each: each.id):
            if why := self._unsettled_service(store, service):
                return f"{service.id}: {why}"
        for name, host in sorted(self.hosts.items()):
            wanted = {task.id for task in store.tasks.where("node", name) if _shall_run(task)}
            if host.running() != wanted:
                return f"{name} runs {sorted(host.running())}, wanted there is {sorted(wanted)}"
        return ""

    def _unsettled_service(self, store: Store, service: pb.Service) -> str:
        if service.pending_delete:
            return "removed, but still there"
        if service.update_status.state in (UpdateStatus.UPDATING, UpdateStatus.ROLLBACK_STARTED):
            return f"still updating: {service.update_status.message}"
        tasks = list(store.tasks.where("service", service.id))
        if states.is_job(service.spec):
            return self._unsettled_job(service, tasks)
        running = [t for t in tasks if (t.desired_state, t.status.state) == (pb.TASK_RUNNING, pb.TASK_RUNNING)]
        replicated = service.spec.WhichOneof("mode") == "replicated"
        wanted = service.spec.replicated.replicas if replicated else len(self.hosts)
        if len(running) != wanted:
            return f"{len(running)} of {wanted} run"
        places = {task.slot or task.node_id for task in running}
        if len(places) != wanted:
            return f"{wanted} tasks run in {len(places)} slots"
        return ""

    def _unsettled_job(self, service: pb.Service, tasks: list[pb.Task]) -> str:
        iteration = service.job_status.iteration
        if former := [task.id for task in tasks if task.job_iteration != iteration]:
            return f"tasks of former iterations: {former}"
        done = [task.slot or task.node_id for task in tasks if task.status.state == pb.TASK_COMPLETE]
        numbers = range(1, service.spec.replicated_job.total_completions + 1)
        wanted = set(self.hosts) if states.is_global(service.spec) else set(numbers)
        if set(done) != wanted or any(_shall_run(task) for task in tasks):
            return f"{len(set(done))} of {len(wanted)} executions have completed"
        executed = self._executions(tasks)
        return "" if executed >= len(wanted) else f"{executed} executions of {len(wanted)} took place"

    def _executions(self, tasks: Iterable[pb.Task]) -> int:
        """How often their containers ran to a good end: at least once for each that is complete."""
        return sum(host.executions.get(task.id, 0) for host in self.hosts.values() for task in tasks)

    # ---- who reaches whom

    def _addrs(self) -> list[str]:
        return [f"{name}:1" for name in self._names]

    def _dial(self, host: Host, addr: str) -> Call:
        name = addr.partition(":")[0]
        call = Call(
            host.node_id,
            self.managers.get(name),
            lambda: self._chance.uniform(*LATENCY_S),
            lambda: (host.node_id, name) in self._cuts,
        )
        self._calls = [(each, known) for each, known in self._calls if known.server and not known.server.done()]
        self._calls.append((name, call))
        return call

    def _leading(self) -> SimManager | None:
        leader = self.net.leader()
        return self.managers.get(leader.me.node_id) if leader is not None else None

    # ---- trouble

    def _container_fails(self) -> bool:
        return self._stormy and self._chance.random() < self._trouble.container_fault

    def _happens(self, per_second: float, elapsed_s: float) -> bool:
        return self._chance.random() < per_second * elapsed_s

    def _disturb(self, elapsed_s: float) -> None:
        trouble, chance = self._trouble, self._chance
        if self._happens(trouble.manager_crash, elapsed_s) and self.managers:
            self._crash_manager(chance.choice(sorted(self.managers)), "crashes")
        for name in self._names:
            if name not in self.managers and self._happens(0.3, elapsed_s):
                self._start_manager(name)
        if self._happens(trouble.manager_cut, elapsed_s):
            name = chance.choice(self._names)
            self._tell(f"{name} is cut off from the other managers")
            self._count("manager partitions")
            self.net.isolate(name)
        if self.net.cut and self._happens(0.3, elapsed_s):
            self._tell("the managers' network heals")
            self.net.heal()
        self._disturb_hosts(elapsed_s)

    def _disturb_hosts(self, elapsed_s: float) -> None:
        trouble, chance = self._trouble, self._chance
        name = chance.choice(sorted(self.hosts))
        if self._happens(trouble.host_off, elapsed_s) and name not in self._off:
            self._tell(f"{name} loses its power")
            self._count("hosts off")
            self._cuts |= {(name, manager) for manager in self._names}
            self.hosts[name].power_off()
            self._off[name] = self.net.now_s + chance.uniform(0.5, 20.0)
        elif self._happens(trouble.agent_kill, elapsed_s) and name not in self._off:
            self._tell(f"the agent of {name} is killed")
            self._count("agents killed")
            self.hosts[name].kill_agent()
            self._off[name] = self.net.now_s + chance.uniform(0.1, 6.0)
        if self._happens(trouble.host_cut, elapsed_s):
            reached = chance.sample(self._names, chance.randint(1, len(self._names)))
            self._tell(f"{name} does not reach {', '.join(sorted(reached))}")
            self._count("host partitions")
            self._cuts |= {(name, manager) for manager in reached}
            self._loop.call_later(chance.uniform(0.5, 15.0), self._heal_host, name)
        for each in [each for each, at in self._off.items() if at <= self.net.now_s]:
            self._host_back(each)

    def _heal_host(self, name: str) -> None:
        if name not in self._off:
            self._cuts = {cut for cut in self._cuts if cut[0] != name}

    def _host_back(self, name: str) -> None:
        del self._off[name]
        self._heal_host(name)
        host = self.hosts[name]
        host.cards = self._chance.choice((CARDS, CARDS, CARDS[:1])) if self._stormy else CARDS
        self._tell(f"{name} is back, with {len(host.cards)} cards")
        host.start()

    def _died(self, name: str, error: BaseException) -> None:
        assert isinstance(error, PowerFailure), f"{name} died without a reason: {error}"
        self._crash_manager(name, "fails")

    def _crash_manager(self, name: str, how: str) -> None:
        self._tell(f"{name} {how}")
        self._count("manager crashes")
        self.managers.pop(name).crash()
        self.net.crash(name)
        for at, call in self._calls:
            if at == name:
                call.reset()

    def _start_manager(self, name: str) -> None:
        self._tell(f"{name} starts")
        self.net.start(name, ())
        self._manage(name)

    def _manage(self, name: str) -> None:
        chance = random.Random(f"{self.net.seed} ids {name} {self.net.now_s}")
        self.managers[name] = SimManager(self.net, name, chance, self._errors.append, self._stages)

    # ---- telling

    def _tell(self, text: str) -> None:
        self._say(f"{self.net.now_s - START_S:7.2f} {text}")

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def summary(self) -> str:
        """What happened, in numbers."""
        store = max((self.net.machines[name] for name in self.net.engines), key=lambda each: each.version)
        tasks, services = len(store.tasks), len(store.services)
        counts = "".join(f", {count} {what}" for what, count in sorted(self.counts.items()))
        return (
            f"{self.checks.highest} entries committed, {self._size.hosts} hosts, {services} services and {tasks} tasks"
            f" in the end{counts}; {self.net.now_s - START_S:.2f} simulated s"
        )


def _shall_run(task: pb.Task) -> bool:
    return task.desired_state in (pb.TASK_RUNNING, pb.TASK_COMPLETE) and not states.has_stopped(task)


def _activate_all(store: Store) -> tuple[Change, ...]:
    changed = [copy_of(node) for node in store.nodes if node.spec.availability != pb.ACTIVE]
    for node in changed:
        node.spec.availability = pb.ACTIVE
    return tuple(map(Update, changed))
