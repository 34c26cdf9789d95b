"""Seconds until every PENDING task has a node: the shapes of the reference's own benchmark (`benchScheduler`).

As there, nodes are empty and READY, tasks PENDING with no reservation, all of them in the store before the clock
starts; the clock stops when each is ASSIGNED in the store. The leader's own loop runs the real scheduling stage and
commits through the real writer into a real store, without Raft below it (the reference's has none either).

One-off: each task is a service of its own, so nothing is shared between decisions. Grouped: one service. Constrained:
one-off, and only every third node will do. The largest shape, 100,000 nodes with 1,000,000 tasks, is sampled: that many
nodes with SAMPLED_TASKS tasks, and the time of all of them is estimated from the cost of one.

    python -m tests.bench.schedule [--json] [--quick]
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from proto import objects_pb2 as pb
from proto import store_pb2
from proto.objects_pb2 import Node, NodeStatus, Task
from swarm import schedule
from swarm.leader import LeaderLoop
from swarm.manager import GC_THRESHOLDS
from swarm.store.changes import Create, Record, transaction
from swarm.store.store import Event, Store
from swarm.store.writer import Writer
from tests.bench import measure

SAMPLED_TASKS = 10_000
PER_ENTRY = 2_000
TICK_S = 0.001
MEMORY_MAX_BYTES = 4 << 30
"""Address space: a mistake in a benchmark must not take the machine's memory."""
SHAPE_MAX_S = 120.0


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    nodes: int
    tasks: int
    grouped: bool = False
    constrained: bool = False
    stands_for: int = 0
    """Tasks of the shape of which this is a sample; 0 = it is the whole."""
    aim: str = ""


SHAPES = (
    Shape("oneoff_1k_1k", 1_000, 1_000),
    Shape("oneoff_1k_10k", 1_000, 10_000, aim="< 1.5 s"),
    Shape("oneoff_1k_100k", 1_000, 100_000, aim="flat within 2x"),
    Shape("grouped_1k_10k", 1_000, 10_000, grouped=True),
    Shape("grouped_1k_100k", 1_000, 100_000, grouped=True, aim="< 3 s"),
    Shape("constrained_1k_10k", 1_000, 10_000, constrained=True),
    Shape("constrained_5k_100k", 5_000, 100_000, constrained=True),
    Shape("oneoff_100k_1m", 100_000, SAMPLED_TASKS, stands_for=1_000_000),
)


@dataclass(frozen=True, slots=True)
class Result:
    shape: Shape
    seconds: float
    stalled_s: float
    """The longest time for which the event loop ran nothing else."""

    @property
    def per_task_us(self) -> float:
        return self.seconds / self.shape.tasks * 1e6


class Directly:
    """Consensus among one, in memory: what is proposed is applied at once."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def propose(self, entry: bytes, timeout_s: float) -> bytes:
        return self._store.apply(entry)


def records(shape: Shape) -> Iterator[Record]:
    for number in range(shape.nodes):
        node = Node(id=f"n{number:024}", role=pb.WORKER)
        node.status.state = NodeStatus.READY
        node.spec.availability = pb.ACTIVE
        if number % 3 == 0:
            node.spec.annotations.labels["network"] = "yes"
        yield node
    for number in range(shape.tasks):
        service_id = f"s{0 if shape.grouped else number:024}"
        task = Task(id=f"t{number:024}", service_id=service_id, slot=number + 1 if shape.grouped else 1, spec_version=1)
        task.desired_state = pb.TASK_RUNNING
        task.status.state = pb.TASK_PENDING
        if shape.constrained:
            task.spec.placement.constraints.append("node.labels.network==yes")
        yield task


def fill(store: Store, shape: Shape) -> None:
    made = records(shape)
    while batch := list(itertools.islice(made, PER_ENTRY)):
        store.apply(
            store_pb2.Entry(transactions=[transaction((Create(each),), 1.0) for each in batch]).SerializeToString()
        )


class Finish:
    """Set when the last of the tasks has a node."""

    def __init__(self, tasks: int) -> None:
        self._left = tasks
        self.reached = asyncio.Event()

    def note(self, events: Sequence[Event]) -> None:
        self._left -= sum(event.new_state == pb.TASK_ASSIGNED for event in events)
        if self._left == 0:
            self.reached.set()


async def watch_stalls(stalls: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(TICK_S)
        stalls.append(time.perf_counter() - before - TICK_S)


async def run(shape: Shape) -> Result:
    """Raises TimeoutError after SHAPE_MAX_S."""
    gc.set_threshold(*GC_THRESHOLDS)  # as the manager process does
    store = Store()
    fill(store, shape)
    gc.collect()
    numbers = itertools.count()
    stalls: list[float] = [0.0]
    finish = Finish(shape.tasks)
    store.subscribe(finish.note)
    loop = LeaderLoop(
        store,
        Writer(Directly(store), time.time),  # type: ignore[arg-type]
        lambda: f"{next(numbers):025}",
        time.time,
        stages=(("schedule", schedule.decide),),
    )
    watching = asyncio.create_task(watch_stalls(stalls))
    started_at = time.perf_counter()
    leading = asyncio.create_task(loop.run())
    try:
        async with asyncio.timeout(SHAPE_MAX_S):
            await finish.reached.wait()
        return Result(shape, time.perf_counter() - started_at, max(stalls))
    finally:
        for each in (leading, watching):
            each.cancel()
        await asyncio.gather(leading, watching, return_exceptions=True)


def row(result: Result) -> tuple[str, str, str]:
    shape = result.shape
    seconds = f"{result.seconds:.2f} s"
    if shape.stands_for:
        seconds = f"~{result.per_task_us * shape.stands_for / 1e6:.0f} s (sampled)"
    detail = f"{result.per_task_us:.0f} us per task, loop held {result.stalled_s * 1000:.0f} ms"
    return shape.name, seconds, f"{detail}{'; aim ' + shape.aim if shape.aim else ''}"


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--quick", action="store_true", help="only the shapes that the figures of --json come from")
    parser.add_argument("--only", action="append", help="only the shape of this name (may be repeated)")
    chosen = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX_BYTES, MEMORY_MAX_BYTES))
    wanted = {"oneoff_1k_10k", "oneoff_1k_100k", "grouped_1k_100k"} if chosen.quick else set(chosen.only or ())
    results = {}
    for shape in SHAPES:
        if not wanted or shape.name in wanted:
            result = results[shape.name] = asyncio.run(run(shape))
            name, seconds, detail = row(result)
            print(f"{name:22}{seconds:>18}   {detail}", flush=True)
    figures: dict[str, float | None] = {"grouped_1k_100k_s": None, "oneoff_1k_10k_s": None, "flatness": None}
    for name in ("grouped_1k_100k", "oneoff_1k_10k"):
        if name in results:
            figures[f"{name}_s"] = results[name].seconds
    if {"oneoff_1k_10k", "oneoff_1k_100k"} <= results.keys():
        figures["flatness"] = results["oneoff_1k_100k"].per_task_us / results["oneoff_1k_10k"].per_task_us
    measure.finish(chosen.json, figures)


if __name__ == "__main__":
    main()
