"""The scheduler's ledger: kept up to date or counted anew, it says the same; and a pass is bounded."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from proto import objects_pb2 as pb
from proto import store_pb2
from proto.objects_pb2 import Node, NodeStatus, Task
from swarm.errors import SwarmError
from swarm.leader import LeaderLoop
from swarm.schedule import decide
from swarm.schedule import stage as scheduling
from swarm.schedule.ledger import Ledger
from swarm.store.changes import Change, Create, Group, Remove, Update, copy_of, transaction
from swarm.store.dirty import Dirty
from swarm.store.store import Store
from tests.simulated import Simulation, node, service


class Direct:
    """Stores at once what is decided."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, groups: Sequence[Group]) -> None:
        entry = store_pb2.Entry(transactions=[transaction(group, 1.0) for group in groups])
        result = store_pb2.EntryResult.FromString(self._store.apply(entry.SerializeToString()))
        assert {verdict.code for verdict in result.verdicts} <= {store_pb2.Verdict.OK}

    async def commit(self, group: Group, request_id: str = "") -> int:
        self.write((group,))
        return self._store.version

    async def commit_all(self, groups: Sequence[Group]) -> list[SwarmError | None]:
        self.write(groups)
        return [None] * len(groups)


STATES = (
    pb.TASK_NEW,
    pb.TASK_PENDING,
    pb.TASK_ASSIGNED,
    pb.TASK_RUNNING,
    pb.TASK_COMPLETE,
    pb.TASK_FAILED,
    pb.TASK_ORPHANED,
)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    made = Task(id=draw(st.sampled_from("abcdef")), service_id=draw(st.sampled_from(("", "s1", "s2"))), slot=1)
    made.spec_version = draw(st.integers(1, 2))
    made.status.state = draw(st.sampled_from(STATES))
    made.desired_state = draw(st.sampled_from((pb.TASK_RUNNING, pb.TASK_SHUTDOWN)))
    placed = made.status.state >= pb.TASK_ASSIGNED
    made.node_id = draw(st.sampled_from(("n1", "n2") if placed else ("", "n1")))
    made.spec.resources.reservations.nano_cpus = draw(st.integers(0, 3))
    made.spec.resources.reservations.memory_bytes = draw(st.integers(0, 3))
    if draw(st.booleans()):
        made.endpoint.ports.add(published_port=draw(st.integers(80, 81)), mode=pb.HOST)
    return made


def said(ledger: Ledger) -> object:
    return (
        {node_id: ledger.account(node_id) for node_id in ("n1", "n2")},
        {service_id: ledger.tasks_on(service_id) for service_id in ("", "s1", "s2")},
        {
            service_id: sorted(task.id for task in ledger.failed(service_id) if task.node_id)
            for service_id in ("", "s1", "s2")
        },
        {
            service_id: {alike: set(group) for alike, group in groups.items()}
            for service_id, groups in ledger.waiting.items()
        },
    )


def write(sim: Simulation, task: Task, remove: bool) -> None:
    known = sim.store.tasks.get(task.id)
    change: Change
    if known is None:
        change = Create(task)
    elif remove:
        change = Remove(known)
    elif task.status.state < known.status.state:
        return
    else:
        task.meta.version = known.meta.version
        if known.node_id and known.status.state >= pb.TASK_ASSIGNED:  # what a node holds never changes
            task.node_id, task.service_id = known.node_id, known.service_id
            task.spec.CopyFrom(known.spec)
            task.endpoint.CopyFrom(known.endpoint)
        change = Update(task)
    sim.commit((change,))


@given(st.lists(st.tuples(tasks(), st.booleans()), max_size=25))
def test_kept_up_to_date_it_says_what_counting_anew_says(steps: list[tuple[Task, bool]]) -> None:
    """The reference's TreeTaskCountConsistency."""
    sim = Simulation(node("n1"), node("n2"))
    kept = sim.store.view(Ledger)
    for task, remove in steps:
        write(sim, task, remove)
        assert said(kept) == said(Ledger(sim.store))
    assert sim.store.view(Ledger) is kept


def test_a_loaded_snapshot_is_counted_anew() -> None:
    sim = Simulation(node("n1"), service("web", 3))
    sim.settle()
    store = Store()
    assert store.view(Ledger).account("n1").tasks == 0
    store.load(sim.store.dump())
    assert store.view(Ledger).account("n1").tasks == 3


def pending(count: int, services: int) -> list[Node | Task]:
    made: list[Node | Task] = []
    for number in range(10):
        one = Node(id=f"n{number}")
        one.status.state = NodeStatus.READY
        made.append(one)
    for number in range(count):
        task = Task(id=f"t{number:05}", service_id=f"s{number % services}", slot=number, spec_version=1)
        task.desired_state, task.status.state = pb.TASK_RUNNING, pb.TASK_PENDING
        made.append(task)
    return made


def test_a_pass_is_bounded_and_the_next_goes_on_where_it_ended() -> None:
    """Two services, together three passes: no more than TASKS_MAX in each, and evenly spread in the end."""
    count = scheduling.TASKS_MAX * 2 + 10
    store = Store.of(*pending(count, services=2))
    writes = Direct(store)
    dirty = Dirty(everything=True)
    sizes: list[int] = []
    while dirty and len(sizes) < 10:
        decision = decide(store, 1.0, str, dirty)
        sizes.append(sum(len(group) for group in decision.groups))
        writes.write(decision.groups)
        dirty = Dirty(services=set(decision.again))
    assert sizes == [scheduling.TASKS_MAX, scheduling.TASKS_MAX, 10]
    assert set(Counter(task.node_id for task in store.tasks).values()) == {count // 10}


def test_those_that_no_node_takes_do_not_keep_the_others_waiting() -> None:
    """As many as fill several passes are refused; the service behind them is placed all the same."""
    records = pending(scheduling.TASKS_MAX * 2, services=1)
    for record in records:
        if isinstance(record, Task):
            record.spec.placement.constraints.append("node.role==manager")
    other = Task(id="other", service_id="z", slot=1, spec_version=1, desired_state=pb.TASK_RUNNING)
    other.status.state = pb.TASK_PENDING
    store = Store.of(*records, other)
    writes = Direct(store)
    dirty = Dirty(everything=True)
    passes = 0
    while dirty and passes < 10:
        decision = decide(store, 1.0, str, dirty)
        writes.write(decision.groups)
        dirty = Dirty(services=set(decision.again))
        passes += 1
    placed = store.tasks.get("other")
    assert placed is not None
    assert placed.status.state == pb.TASK_ASSIGNED
    assert passes == 2
    refused = store.tasks.get("t00000")
    assert refused is not None
    assert "constraints not satisfied on 10 nodes" in refused.status.err


def test_the_leader_asks_again_until_nothing_is_left() -> None:
    store = Store.of(*pending(scheduling.TASKS_MAX + 5, services=7))
    numbers = itertools.count()

    async def lead() -> None:
        done = asyncio.Event()
        left = {task.id for task in store.tasks}

        def note(events: object) -> None:
            left.difference_update(task.id for task in store.tasks if task.status.state == pb.TASK_ASSIGNED)
            if not left:
                done.set()

        store.subscribe(note)
        loop = LeaderLoop(store, Direct(store), lambda: str(next(numbers)), lambda: 1.0, stages=(("schedule", decide),))
        running = asyncio.create_task(loop.run())
        async with asyncio.timeout(60):
            await done.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(lead())
    assert {task.status.state for task in store.tasks} == {pb.TASK_ASSIGNED}


def test_a_decision_does_not_alter_what_it_was_made_from() -> None:
    """What is decided but never stored counts for nothing."""
    store = Store.of(*pending(30, services=3))
    first = decide(store, 1.0, str, Dirty(everything=True))
    again = decide(store, 1.0, str, Dirty(everything=True))
    assert first == again
    assert store.view(Ledger).account("n0").tasks == 0
    assert copy_of(next(iter(store.tasks))).node_id == ""
