"""Random lives of networks and services, with leaders that change: no address, virtual IP, VNI, subnet or port is held
twice in any state, and a number that was given back is the last to be given again."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proto import objects_pb2 as pb
from proto.objects_pb2 import Service, Task
from swarm.allocate.addresses import held, span_of
from swarm.store import states
from swarm.store.released import as_number
from swarm.store.store import Event
from tests.simulated import Simulation, network, node, service

NETWORKS = ("tiny", "dual", "wide")
SERVICES = ("s0", "s1", "s2", "s3")
picks = st.integers(0, 10**6)


class Turns:
    """What was given back in each network, oldest first, as a reader of all events would have it."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._in_use: dict[str, set[int]] = {}
        self._back: dict[str, list[int]] = {}
        sim.store.subscribe(self.note)

    def note(self, events: Sequence[Event]) -> None:
        for event in events:
            before, after = _numbers(event.before), _numbers(event.after)
            for network_id, number in before - after:
                self._in_use[network_id].discard(number)
                self._back.setdefault(network_id, []).append(number)
            for network_id, number in sorted(after - before):
                self._given(network_id, number)

    def _given(self, network_id: str, number: int) -> None:
        net = self._sim.store.networks.get(network_id)
        assert net is not None
        span, back = span_of(self._sim.store, net), self._back.setdefault(network_id, [])
        in_use = self._in_use.setdefault(network_id, set())
        if number in back:
            free = {n for n in range(span.first, span.last + 1) if span.holds(n) and n not in in_use}
            assert free == set(back), f"{number} of {network_id} was given again before {free - set(back)} once"
            assert number == back[0], f"{number} of {network_id} was given back after {back[0]}"
            back.remove(number)
        in_use.add(number)


def _numbers(record: object) -> set[tuple[str, int]]:
    return {(network_id, as_number(address)) for network_id, address, _ in held(record) if address}


class Allocation(RuleBasedStateMachine):
    @initialize(history=st.integers(0, 2))
    def start(self, history: int) -> None:
        dual = network("dual", subnet="10.0.8.0/28")
        dual.spec.ipv6 = True
        self.sim = Simulation(
            *(node(f"n{number}", cpus=99) for number in range(3)),
            network("tiny", subnet="10.0.9.0/29"),
            dual,
            network("wide"),
        )
        self.sim.set_history_limit(history)
        self.turns = Turns(self.sim)

    def _named(self, pick: int) -> Service | None:
        found = sorted((s for s in self.sim.store.services if not s.pending_delete), key=lambda s: s.id)
        return found[pick % len(found)] if found else None

    @rule(
        name=st.sampled_from(SERVICES),
        joins=st.lists(st.sampled_from(NETWORKS), max_size=2, unique=True),
        port=st.sampled_from((None, 0, 8080)),
        replicas=st.integers(0, 4),
        dnsrr=st.booleans(),
    )
    def a_user_creates(self, name: str, joins: list[str], port: int | None, replicas: int, dnsrr: bool) -> None:
        if name in self.sim.store.services or any(each not in self.sim.store.networks for each in joins):
            return
        made = service(name, replicas, joins)
        if port is not None:
            made.spec.endpoint.ports.add(target_port=80, published_port=port)
        elif dnsrr:
            made.spec.endpoint.mode = pb.DNSRR
        self.sim.create(made)

    @rule(pick=picks, replicas=st.integers(0, 9))
    def a_user_scales(self, pick: int, replicas: int) -> None:
        if found := self._named(pick):
            self.sim.scale(found.id, replicas)

    @rule(pick=picks, joins=st.lists(st.sampled_from(NETWORKS), max_size=3, unique=True))
    def a_user_moves_a_service_to_other_networks(self, pick: int, joins: list[str]) -> None:
        def change(spec: pb.ServiceSpec) -> None:
            del spec.task.networks[:]
            for each in joins:
                spec.task.networks.add(network_id=each)

        found = self._named(pick)
        if found and all(each in self.sim.store.networks for each in joins):
            self.sim.update_spec(found.id, change)

    @rule(pick=picks)
    def a_user_removes(self, pick: int) -> None:
        if found := self._named(pick):
            self.sim.remove_service(found.id)

    @rule(picks=st.lists(picks, min_size=1, max_size=20))
    def agents_work(self, picks: list[int]) -> None:
        for pick in picks:
            tasks = [task for task in self.sim.store.tasks if not states.has_stopped(task)]
            if tasks:
                self.sim.step(tasks[pick % len(tasks)])

    @rule(pick=picks)
    def a_task_fails(self, pick: int) -> None:
        tasks: list[Task] = [task for task in self.sim.store.tasks if task.status.state == pb.TASK_RUNNING]
        if tasks:
            self.sim.report(tasks[pick % len(tasks)], pb.TASK_FAILED)

    @rule()
    def another_manager_leads(self) -> None:
        """It knows what a snapshot holds, and counts what is in use anew."""
        self.sim.store.load(list(self.sim.store.dump()))
        self.sim.store.forget_views()

    @rule(duration_s=st.sampled_from((0.1, 6.0, 100.0)))
    def time_passes(self, duration_s: float) -> None:
        self.sim.advance(duration_s)

    @invariant()
    def it_settles_and_the_check_of_a_new_leader_finds_nothing(self) -> None:
        if hasattr(self, "sim"):
            self.sim.settle()  # checks after every entry that nothing is held twice
            assert self.sim.overlooked() == []


Allocation.TestCase.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAllocation = Allocation.TestCase
