"""Random lives of a small cluster: users, failures and nodes do as they please; the stages keep their promises in
every state, and once faults stop everything converges."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proto import objects_pb2 as pb
from proto.objects_pb2 import NodeStatus, Task
from swarm.store import states
from tests.simulated import Simulation, network, node, offering, service, wanting

NODES = ("n0", "n1", "n2")
SERVICES = ("web", "db", "agent")
picks = st.integers(0, 10**6)


class Cluster(RuleBasedStateMachine):
    @initialize(start_first=st.booleans(), parallelism=st.integers(0, 2), max_attempts=st.sampled_from((0, 0, 2)))
    def start(self, start_first: bool, parallelism: int, max_attempts: int) -> None:
        self.sim = Simulation(
            *(offering(node(n, cpus=2, labels={"zone": n}), gpu=["A", "B"], licence=2) for n in NODES),
            network("ingress", ingress=True),
            network("front", subnet="10.0.9.0/28"),  # small enough to run out
            network("back"),
        )
        web = service("web", 3, networks=["front"])
        web.spec.task.restart.max_attempts = max_attempts
        web.spec.task.resources.reservations.nano_cpus = 10**9
        web.spec.endpoint.ports.add(target_port=80)
        db = service("db", 2, networks=["front", "back"])
        db.spec.endpoint.ports.add(target_port=5432, published_port=5432, mode=pb.HOST)
        for made in (wanting(web, licence=1), wanting(db, gpu=1), service("agent", None)):
            made.spec.update.order = pb.START_FIRST if start_first else pb.STOP_FIRST
            made.spec.update.parallelism = parallelism
            made.spec.update.failure_action = pb.ROLLBACK if start_first else pb.CONTINUE
            self.sim.create(made)
        self.sim.settle()

    def _pick(self, pick: int) -> Task | None:
        """A task that its node's agent may report about."""
        alive = [
            task
            for task in self.sim.store.tasks
            if task.status.state >= pb.TASK_ASSIGNED and not states.has_stopped(task) and self._is_up(task)
        ]
        return alive[pick % len(alive)] if alive else None

    def _is_up(self, task: Task) -> bool:
        return self.sim.node(task.node_id).status.state == NodeStatus.READY

    def _service(self, pick: int) -> str | None:
        names = sorted(s.id for s in self.sim.store.services if not s.pending_delete)
        return names[pick % len(names)] if names else None

    @rule(picks=st.lists(picks, min_size=1, max_size=20))
    def agents_work(self, picks: list[int]) -> None:
        for pick in picks:
            if task := self._pick(pick):
                self.sim.step(task)

    @rule(pick=picks, end=st.sampled_from((pb.TASK_FAILED, pb.TASK_COMPLETE, pb.TASK_REJECTED)))
    def a_task_ends(self, pick: int, end: pb.TaskState.ValueType) -> None:
        if task := self._pick(pick):
            self.sim.report(task, end)

    @rule(
        node_id=st.sampled_from(NODES),
        state=st.sampled_from((NodeStatus.DOWN, NodeStatus.READY, NodeStatus.READY, NodeStatus.UNKNOWN)),
    )
    def a_node_changes(self, node_id: str, state: NodeStatus.State.ValueType) -> None:
        self.sim.set_node(node_id, state=state)

    @rule(node_id=st.sampled_from(NODES), availability=st.sampled_from((pb.ACTIVE, pb.ACTIVE, pb.PAUSED, pb.DRAINED)))
    def availability_changes(self, node_id: str, availability: pb.Availability.ValueType) -> None:
        self.sim.set_node(node_id, availability=availability)

    @rule(node_id=st.sampled_from(NODES), gpus=st.sampled_from(("AB", "A", "B", "")), licences=st.integers(0, 2))
    def a_node_offers_something_else(self, node_id: str, gpus: str, licences: int) -> None:
        self.sim.offer(node_id, gpu=list(gpus), licence=licences)

    @rule(replicas=st.integers(0, 8), name=st.sampled_from(("web", "db")))
    def a_user_scales(self, replicas: int, name: str) -> None:
        found = self.sim.store.services.get(name)
        if found and not found.pending_delete:
            self.sim.scale(name, replicas)

    @rule(pick=picks, version=st.integers(1, 4))
    def a_user_updates(self, pick: int, version: int) -> None:
        if name := self._service(pick):
            self.sim.set_image(name, f"web:{version}")

    @rule(pick=picks, zone=st.sampled_from(("", *NODES)))
    def a_user_constrains(self, pick: int, zone: str) -> None:
        def change(spec: pb.ServiceSpec) -> None:
            del spec.task.placement.constraints[:]
            if zone:
                spec.task.placement.constraints.append(f"node.labels.zone!={zone}")

        if name := self._service(pick):
            self.sim.update_spec(name, change)

    @precondition(lambda self: len(self.sim.store.services) > 1)
    @rule(pick=picks)
    def a_user_removes(self, pick: int) -> None:
        if name := self._service(pick):
            self.sim.remove_service(name)

    @rule(duration_s=st.sampled_from((0.1, 3.0, 6.0, 100.0)))
    def time_passes(self, duration_s: float) -> None:
        self.sim.advance(duration_s)

    @invariant()
    def nothing_is_overlooked(self) -> None:
        """The stages settle, and a look at only what changed finds all that a look at everything finds."""
        if hasattr(self, "sim"):
            self.sim.settle()
            assert self.sim.overlooked() == []

    def teardown(self) -> None:
        """Faults stop: every service becomes what its spec says, as far as its policy and the nodes allow."""
        if not hasattr(self, "sim"):
            return
        sim = self.sim
        for node_id in NODES:
            sim.set_node(node_id, NodeStatus.READY, pb.ACTIVE)
        sim.run()
        assert sim.overlooked() == []
        for name in SERVICES:
            found = sim.store.services.get(name)
            if found is None:
                assert not sim.tasks(name)
                continue
            assert not found.pending_delete
            self._has_converged(name)

    def _has_converged(self, name: str) -> None:
        spec = self.sim.service(name).spec
        runnable = self.sim.runnable(name)
        if spec.WhichOneof("mode") == "global":
            wanted = [n for n in NODES if f"node.labels.zone!={n}" not in spec.task.placement.constraints]
            assert sorted(task.node_id for task in runnable) == wanted
        elif not spec.task.restart.max_attempts:
            assert len({task.slot for task in runnable}) == spec.replicated.replicas
        for task in runnable:
            assert task.status.state == pb.TASK_RUNNING or task.status.err, f"{task.id} waits without a reason"
        paused = self.sim.service(name).update_status.state in (
            pb.UpdateStatus.PAUSED,
            pb.UpdateStatus.ROLLBACK_PAUSED,
            pb.UpdateStatus.UPDATING,  # the new task found no room beside the old one
            pb.UpdateStatus.ROLLBACK_STARTED,
        )
        if not paused:
            assert {task.spec.container.image for task in runnable} <= {spec.task.container.image}


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=60, stateful_step_count=30, suppress_health_check=list(HealthCheck))
