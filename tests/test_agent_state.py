"""The agent's small stateful parts: mirror, status book, appliers, task files, and the machine's description."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.appliers import Applier
from node.description import InterfaceAddress, describe, interface_addresses, memory_bytes, underlay_subnets
from node.mirror import ChainBroken, Mirror, applied, touched_tasks
from node.statuses import BATCH_MAX, StatusBook
from node.taskfiles import TaskFiles
from overlay.interface import NetworkError
from proto.agent_pb2 import TaskRecord
from proto.dispatch_pb2 import AssignmentChange, Assignments, Item
from proto.objects_pb2 import TASK_READY, TASK_RUNNING, Network, Task, TaskStatus
from tests.waiting import until

# ---------------------------------------------------------------- mirror


def change(key: str, present: bool = True) -> AssignmentChange:
    kind, _, name = key.partition("/")
    item = Item(task=Task(id=name)) if kind == "task" else Item(network=Network(id=name))
    return AssignmentChange(key=key, item=item) if present else AssignmentChange(key=key)


def test_snapshot_then_deltas() -> None:
    first = applied(Mirror(), Assignments(snapshot=True, result=5, changes=[change("task/a"), change("network/n")]))
    second = applied(first, Assignments(base=5, result=6, changes=[change("task/b"), change("task/a", present=False)]))
    assert (first.known, first.sequence, [t.id for t in first.tasks()]) == (True, 5, ["a"])
    assert ([t.id for t in second.tasks()], [n.id for n in second.networks()]) == (["b"], ["n"])


@pytest.mark.parametrize("base", [4, 6])
def test_a_delta_that_does_not_follow_is_refused_and_changes_nothing(base: int) -> None:
    known = applied(Mirror(), Assignments(snapshot=True, result=5, changes=[change("task/a")]))
    with pytest.raises(ChainBroken, match=f"on top of {base}, this node knows 5"):
        applied(known, Assignments(base=base, result=7, changes=[change("task/a", present=False)]))
    assert [t.id for t in known.tasks()] == ["a"]


def test_no_delta_without_a_snapshot() -> None:
    with pytest.raises(ChainBroken):
        applied(Mirror(), Assignments(base=0, result=1))


def test_a_snapshot_touches_the_tasks_it_names_and_those_it_forgets() -> None:
    known = applied(Mirror(), Assignments(snapshot=True, result=1, changes=[change("task/a"), change("network/n")]))
    assert touched_tasks(known, Assignments(snapshot=True, changes=[change("task/b")])) == ("a", "b")
    assert touched_tasks(known, Assignments(changes=[change("task/b"), change("network/m")])) == ("b",)


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["task/a", "task/b", "network/n"]), st.booleans()), max_size=4), max_size=6
    )
)
def test_deltas_add_up_to_the_snapshot_of_their_end(deltas: list[list[tuple[str, bool]]]) -> None:
    mirror = applied(Mirror(), Assignments(snapshot=True))
    expected: dict[str, Item] = {}
    for number, delta in enumerate(deltas):
        changes = [change(key, present) for key, present in delta]
        mirror = applied(mirror, Assignments(base=number, result=number + 1, changes=changes))
        for one in changes:
            if one.HasField("item"):
                expected[one.key] = one.item
            else:
                expected.pop(one.key, None)
    assert dict(mirror.items) == expected


# ---------------------------------------------------------------- statuses


def test_the_latest_status_is_kept_until_acknowledged() -> None:
    book = StatusBook()
    book.record("a", TaskStatus(state=TASK_READY))
    batch = book.next_batch()
    assert batch is not None
    book.record("a", TaskStatus(state=TASK_RUNNING))
    assert book.next_batch() is None, "one batch at a time"
    book.take_back()
    again = book.next_batch()
    assert again is not None
    assert [(u.task_id, u.status.state) for u in again.updates] == [("a", TASK_RUNNING)]
    book.acknowledge(batch.sequence)
    assert not book.idle, "the acknowledgement of a batch that was taken back means nothing"
    book.acknowledge(again.sequence)
    assert book.idle


def test_batches_are_bounded_and_forgotten_tasks_are_not_sent() -> None:
    book = StatusBook()
    for number in range(BATCH_MAX + 1):
        book.record(f"t{number}", TaskStatus(state=TASK_READY))
    book.forget("t0")
    batch = book.next_batch()
    assert batch is not None
    assert len(batch.updates) == BATCH_MAX
    assert batch.updates[0].task_id == "t1"


# ---------------------------------------------------------------- appliers


class Target:
    def __init__(self) -> None:
        self.wanted: int | None = None
        self.done: list[int] = []
        self.faults = 0
        self.go = asyncio.Event()

    async def apply(self, value: int) -> None:
        await self.go.wait()
        if self.faults:
            self.faults -= 1
            raise NetworkError("refused")
        self.done.append(value)


async def test_pokes_during_an_application_cost_one_more_together() -> None:
    target = Target()
    applier: Applier[int] = Applier("it", lambda: target.wanted, target.apply, 5.0)
    running = asyncio.create_task(applier.run())
    target.wanted = 0
    applier.poke()
    await until(lambda: applier.applications == 1)
    for value in range(1, 100):
        target.wanted = value
        last = applier.poke()
    target.go.set()
    await applier.settled(last)
    assert target.done == [0, 99]
    await applier.settled(applier.poke())
    assert target.done == [0, 99], "nothing new: not applied again"
    await applier.settled(applier.poke(force=True))
    assert target.done == [0, 99, 99], "an audit is"
    running.cancel()


async def test_a_failed_application_is_tried_again_and_waiters_see_why() -> None:
    target = Target()
    target.faults, target.wanted = 1, 1
    target.go.set()
    applier: Applier[int] = Applier("it", lambda: target.wanted, target.apply, 5.0)
    running = asyncio.create_task(applier.run())
    settled = asyncio.create_task(applier.settled(applier.poke()))
    await applier.wait_until(lambda: bool(applier.error))
    assert applier.error == "refused"
    assert not settled.done()
    await settled
    assert (applier.error, applier.applied) == ("", 1)
    running.cancel()


async def test_nothing_is_applied_before_it_is_known() -> None:
    target = Target()
    target.go.set()
    applier: Applier[int] = Applier("it", lambda: target.wanted, target.apply, 5.0)
    running = asyncio.create_task(applier.run())
    early = asyncio.create_task(applier.settled(applier.poke()))
    probe = Applier("probe", lambda: 1, target.apply, 5.0)
    probing = asyncio.create_task(probe.run())
    await probe.settled(probe.poke())  # the loop has turned
    assert not early.done()
    target.wanted = 7
    applier.poke()
    await early
    assert target.done == [1, 7]
    running.cancel()
    probing.cancel()


# ---------------------------------------------------------------- files


def test_task_files_survive_and_only_the_owner_can_read_them(tmp_path: Path) -> None:
    files = TaskFiles(tmp_path)
    record = TaskRecord(task=Task(id="t1", status=TaskStatus(state=TASK_RUNNING)), image_id="sha256:x")
    files.save(record)
    assert TaskFiles(tmp_path).load() == [record]
    path = tmp_path / "agent" / "tasks" / "t1.pb"
    assert path.stat().st_mode & 0o077 == 0
    files.remove("t1")
    files.remove("t1")
    assert files.load() == []


def test_a_file_that_is_not_the_tasks_is_dropped(tmp_path: Path) -> None:
    files = TaskFiles(tmp_path)
    files.save(TaskRecord(task=Task(id="other")))
    path = tmp_path / "agent" / "tasks" / "t1.pb"
    path.with_name("other.pb").rename(path)
    assert files.load() == []
    assert not path.exists()


@given(st.data())
def test_a_save_that_was_cut_short_leaves_the_record_or_none(data: st.DataObject) -> None:
    """The file is written in place: what is new of it ends anywhere."""
    before, after = (
        TaskRecord(task=Task(id="t1"), image_id=data.draw(st.text(max_size=40), label=label))
        for label in ("before", "after")
    )
    with tempfile.TemporaryDirectory() as directory:
        files = TaskFiles(Path(directory))
        path = Path(directory) / "agent" / "tasks" / "t1.pb"
        files.save(before)
        old = path.read_bytes()
        files.save(after)
        assert files.load() == [after]
        new = path.read_bytes()
        cut = data.draw(st.integers(0, len(new)), label="cut")
        path.write_bytes(new[:cut] + old[cut:])
        assert files.load() in ([], [before], [after])


# ---------------------------------------------------------------- description


def test_memory_is_read_from_meminfo() -> None:
    assert memory_bytes("MemTotal:        2048 kB\nMemFree: 1 kB\n") == 2048 * 1024


def test_underlay_subnets_leave_out_loopback_and_our_own_links() -> None:
    found = [
        InterfaceAddress("lo", "127.0.0.1/8"),
        InterfaceAddress("eth0", "192.0.2.7/24"),
        InterfaceAddress("pysab1", "10.0.1.1/24"),
        InterfaceAddress("eth0", "192.0.2.7/24"),
    ]
    assert underlay_subnets(found, lambda link: link.startswith("pys")) == ["192.0.2.7/24"]


def test_this_machine_describes_itself() -> None:
    assert InterfaceAddress("lo", "127.0.0.1/8") in interface_addresses()
    assert not any(found.address.startswith("fe80") for found in interface_addresses())
    described = describe("host1", "0.1.0", lambda link: True, {"disk": "ssd"})
    assert dict(described.engine_labels) == {"disk": "ssd"}
    assert described.resources.memory_bytes > 1 << 20
    assert described.resources.nano_cpus >= 1_000_000_000
    assert described.platform.os == "linux"
    assert list(described.underlay_subnets) == []
