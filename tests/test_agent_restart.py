"""An agent that dies at any instant: the next one resumes the step or cleans up after it, and no container that runs
is touched."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from node.interface import Phase
from proto.objects_pb2 import (
    TASK_COMPLETE,
    TASK_FAILED,
    TASK_READY,
    TASK_RUNNING,
    TASK_SHUTDOWN,
)
from tests.fakes_dispatcher import Host, Manager, endpoint, host_on, serving, standing, task
from tests.waiting import until


@pytest.fixture
async def manager() -> AsyncIterator[Manager]:
    made = Manager()
    made.items |= standing()
    async with serving(made):
        yield made


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with host_on(tmp_path) as made:
        yield made


async def two_run(host: Host, manager: Manager) -> None:
    manager.put(task(), task("t2", slot=2))
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    await manager.reported("t2", TASK_RUNNING)


STARTING_POINTS = [
    f"{call}:{when}" for call in ("ensure", "attach", "create", "names", "start") for when in ("before", "after")
]


@pytest.mark.parametrize("point", STARTING_POINTS)
async def test_killed_on_the_way_up_the_task_still_runs_once(host: Host, manager: Manager, point: str) -> None:
    host.gate.close(point)
    manager.put(task())
    host.run(manager.addr)
    await host.gate.reached.wait()
    await host.abandon()
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    assert host.runtime.made["t1"].starts == 1
    await until(lambda: host.names.sandboxes == {"t1"})


@pytest.mark.parametrize("point", STARTING_POINTS)
async def test_killed_on_the_way_up_and_withdrawn_meanwhile_nothing_is_left(
    host: Host, manager: Manager, point: str
) -> None:
    host.gate.close(point)
    manager.put(task())
    host.run(manager.addr)
    await host.gate.reached.wait()
    await host.abandon()
    manager.withdraw("task/t1")
    host.run(manager.addr)
    await until(host.nothing_left, what="everything of the task reclaimed")


@pytest.mark.parametrize("point", ["stop:before", "stop:after", "detach:before", "detach:after"])
async def test_killed_while_stopping_the_task_is_stopped(host: Host, manager: Manager, point: str) -> None:
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    host.gate.close(point)
    manager.want("t1", TASK_SHUTDOWN)
    await host.gate.reached.wait()
    await host.abandon()
    host.run(manager.addr)
    await manager.reported("t1", TASK_SHUTDOWN)
    assert host.runtime.phase_of("t1") is Phase.EXITED
    assert not host.network.spaces


@pytest.mark.parametrize("point", ["remove:before", "remove:after", "detach:before", "detach:after"])
async def test_killed_while_removing_nothing_is_left(host: Host, manager: Manager, point: str) -> None:
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    host.gate.close(point)
    manager.withdraw("task/t1")
    await host.gate.reached.wait()
    await host.abandon()
    host.run(manager.addr)
    await until(host.nothing_left, what="everything of the task reclaimed")


async def test_a_stop_that_was_wanted_is_finished_without_any_manager(host: Host, manager: Manager) -> None:
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    host.gate.close("stop:before")
    manager.want("t1", TASK_SHUTDOWN)
    await host.gate.reached.wait()
    await host.abandon()
    agent = host.run()
    await until(lambda: agent.tasks() and agent.tasks()[0].status.state == TASK_SHUTDOWN)


async def test_a_restart_touches_no_container_network_or_name(host: Host, manager: Manager) -> None:
    await two_run(host, manager)
    await until(lambda: host.names.sandboxes == {"t1", "t2"})
    await host.abandon()
    pictures, states = len(host.names.pictures), len(host.network.states)
    passed = host.gate.passed.copy()

    agent = host.run(manager.addr)
    await until(lambda: len(host.names.pictures) > pictures, what="names applied again")
    assert all(len(picture.sandboxes) == 2 for picture in host.names.pictures[pictures:]), "no name went away"
    assert all(state.networks for state in host.network.states[states:]), "no network went away"
    for call in ("create", "start", "stop", "remove", "detach"):
        assert host.gate.passed[f"{call}:after"] == passed[f"{call}:after"]
    assert agent.running_count() == 2
    assert agent.image_ids() == {"sha256:web"}, "images of adopted containers stay in use"


async def test_names_change_while_namespaces_are_still_taken_over(host: Host, manager: Manager) -> None:
    await two_run(host, manager)
    await host.abandon()
    pictures = len(host.names.pictures)

    host.gate.close("attach:before")
    host.run(manager.addr)
    await host.gate.reached.wait()
    manager.put(items=endpoint(task("t3", slot=3), node_id="n2"))
    await until(lambda: "10.0.1.4" in str(host.names.pictures[-1].networks), what="the name of a task elsewhere")
    assert all(len(picture.sandboxes) == 2 for picture in host.names.pictures[pictures:]), "no name went away"


async def test_without_a_manager_what_runs_is_kept_and_an_exit_is_reported_later(host: Host, manager: Manager) -> None:
    await two_run(host, manager)
    await host.abandon()
    host.runtime.exit("t1", 3)  # while the agent is away

    states = len(host.network.states)
    agent = host.run("127.0.0.1:1")  # nobody there
    await until(lambda: agent.running_count() == 1, what="the exit noticed")
    host.runtime.exit("t2", 0)  # while the managers are away
    await until(lambda: agent.running_count() == 0)
    assert len(host.network.states) == states, "no network changes without a manager's word"
    assert host.runtime.made["t1"].starts == 1, "nothing is restarted by the node"
    await host.abandon()

    host.run(manager.addr)
    assert (await manager.reported("t1", TASK_FAILED)).exit_code == 3
    await manager.reported("t2", TASK_COMPLETE)


async def test_a_container_that_ran_and_ended_between_start_and_record_is_not_run_again(
    host: Host, manager: Manager
) -> None:
    host.gate.close("start:after")
    manager.put(task())
    host.run(manager.addr)
    await host.gate.reached.wait()
    await host.abandon()
    host.runtime.exit("t1", 0)
    host.run(manager.addr)
    await manager.reported("t1", TASK_COMPLETE)
    assert host.runtime.made["t1"].starts == 1


async def test_after_a_reboot_running_tasks_have_failed_and_parked_ones_are_prepared_again(
    host: Host, manager: Manager
) -> None:
    manager.put(task(), task("t2", slot=2, desired=TASK_READY))
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    await manager.reported("t2", TASK_READY)
    await host.abandon()
    host.runtime.made.clear()
    host.network.spaces.clear()
    host.run(manager.addr)
    assert "reboot" in (await manager.reported("t1", TASK_FAILED)).err
    await until(lambda: host.runtime.phase_of("t2") is Phase.CREATED)
    assert manager.last("t2").state == TASK_READY


async def test_a_torn_task_file_is_dropped_and_the_assignment_decides(host: Host, manager: Manager) -> None:
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    await host.abandon()
    (host.state_dir / "agent" / "tasks" / "t1.pb").write_bytes(b"")
    (host.state_dir / "agent" / "tasks" / "t9.tmp").write_bytes(b"half")
    agent = host.run(manager.addr)
    await until(lambda: agent.running_count() == 1)
    assert host.runtime.made["t1"].starts == 1, "the container that runs is taken over"
    assert list(host.files()) == ["t1.pb"]


async def test_containers_and_namespaces_of_nobody_are_removed_after_the_first_snapshot_only(
    host: Host, manager: Manager
) -> None:
    await two_run(host, manager)
    await host.abandon()
    for path in (host.state_dir / "agent" / "tasks").iterdir():
        path.unlink()
    follower = Manager()
    follower.leads = False
    async with serving(follower):
        host.run(follower.addr)
        await until(lambda: follower.calls >= 2, what="a while without a leader")
        await host.abandon()
    assert set(host.runtime.made) == {"t1", "t2"}

    manager.withdraw("task/t2")
    host.run(manager.addr)
    await until(lambda: set(host.runtime.made) == {"t1"}, what="the leftover removed")
    await until(lambda: set(host.network.spaces) == {"t1"})


async def test_stop_leaves_containers_and_leave_removes_all(host: Host, manager: Manager) -> None:
    manager.put(task(), task("t2", slot=2, desired=TASK_READY))
    agent = host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    await manager.reported("t2", TASK_READY)
    await agent.stop()
    assert host.runtime.phase_of("t1") is Phase.RUNNING
    assert not host.names.stopped

    again = host.run(manager.addr)
    await until(lambda: again.running_count() == 1)
    signals = host.runtime.made["t1"].signals
    await again.leave()
    assert signals == ["TERM"]
    assert host.nothing_left()
    assert host.network.torn_down
    assert host.names.stopped
    assert "t2" not in host.runtime.made
