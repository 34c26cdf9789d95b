"""A task's life on a node, through a real session on loopback: states, parking, refusals, stopping, drain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from node.interface import ImageFault, Phase, RuntimeFault
from overlay.interface import NetworkError
from proto.dispatch_pb2 import Item, ManagerMessage, Released
from proto.objects_pb2 import (
    TASK_COMPLETE,
    TASK_FAILED,
    TASK_ORPHANED,
    TASK_PREPARING,
    TASK_READY,
    TASK_REJECTED,
    TASK_REMOVE,
    TASK_RUNNING,
    TASK_SHUTDOWN,
    TASK_STARTING,
    VIP,
    Network,
    Task,
)
from tests.fakes import NO_PID
from tests.fakes_dispatcher import Host, Manager, State, endpoint, host_on, serving, standing, task
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


async def test_a_task_goes_from_assigned_to_running_and_its_name_server_is_there_first(
    host: Host, manager: Manager
) -> None:
    served_at_start: list[bool] = []
    host.runtime.on_start = lambda task_id: served_at_start.append(task_id in host.names.sandboxes)
    agent = host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(task())
    status = await manager.reported("t1", TASK_RUNNING)

    assert status.pid == NO_PID
    assert status.container_id == "t1"
    assert served_at_start == [True]
    request = host.runtime.made["t1"].request
    assert request.name == "web.1.t1"
    assert request.netns == Path("/run/fake/netns/t1")
    assert request.addresses == ("10.0.1.2",)
    assert manager.states("t1") == sorted(manager.states("t1"))
    assert agent.running_count() == 1
    assert agent.image_ids() == {"sha256:web"}


def local(driver: str, task_id: str = "t1") -> tuple[Network, Task]:
    """One of the node's own networks, and a task on it."""
    net = Network(id=driver)
    net.spec.annotations.name = net.spec.driver = driver
    made = task(task_id)
    made.networks[0].network_id, made.networks[0].address = driver, ""
    return net, made


async def test_a_task_on_the_hosts_network_has_no_namespace_and_the_hosts_name(host: Host, manager: Manager) -> None:
    net, made = local("host")
    manager.items |= standing([net])
    agent = host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(made)
    await manager.reported("t1", TASK_RUNNING)
    request = host.runtime.made["t1"].request
    assert (request.netns, request.addresses) == (None, ())
    assert request.hostname == agent._world.description.hostname
    assert host.network.attach_calls == 0
    assert "t1" not in host.names.sandboxes


async def test_a_task_on_no_network_is_no_client_of_the_name_server(host: Host, manager: Manager) -> None:
    net, made = local("none")
    manager.items |= standing([net])
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(made)
    await manager.reported("t1", TASK_RUNNING)
    assert host.runtime.made["t1"].request.netns == Path("/run/fake/netns/t1")
    assert host.network.spaces["t1"].interfaces == ()
    assert "t1" not in host.names.sandboxes


async def test_the_address_that_the_host_gives_is_known_again_after_a_crash(host: Host, manager: Manager) -> None:
    net, made = local("bridge")
    manager.items |= standing([net])
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(made)
    await manager.reported("t1", TASK_RUNNING)
    assert host.runtime.made["t1"].request.addresses == ("172.17.0.2",)
    await host.abandon()
    again = host.run()  # no manager answers
    await until(lambda: again.running_count() == 1)
    assert again._world.given == {"t1": "172.17.0.2"}


async def test_the_exit_code_decides_between_complete_and_failed(host: Host, manager: Manager) -> None:
    manager.items |= {key: item for t in ("t1", "t2", "t3") for key, item in _items(t).items()}
    host.run(manager.addr)
    for name in ("t1", "t2", "t3"):
        await manager.reported(name, TASK_RUNNING)
    host.runtime.exit("t1", 0)
    host.runtime.exit("t2", 3)
    host.runtime.exit("t3", 137, oom_killed=True)
    assert (await manager.reported("t1", TASK_COMPLETE)).err == ""
    failed = await manager.reported("t2", TASK_FAILED)
    assert (failed.err, failed.exit_code) == ("task: non-zero exit (3)", 3)
    assert "out of memory" in (await manager.reported("t3", TASK_FAILED)).err
    assert not host.network.spaces, "an ended task gives its addresses back"
    assert set(host.runtime.made) == {"t1", "t2", "t3"}, "containers stay for their logs"


async def test_a_killed_monitor_fails_the_task_with_its_reason(host: Host, manager: Manager) -> None:
    manager.items |= _items("t1")
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    host.runtime.exit("t1", None, error="its monitor (conmon) was killed")
    assert (await manager.reported("t1", TASK_FAILED)).err == "task: its monitor (conmon) was killed"


async def test_desired_ready_parks_the_task_until_more_is_wanted(host: Host, manager: Manager) -> None:
    manager.put(task(desired=TASK_READY))
    host.run(manager.addr)
    await manager.reported("t1", TASK_READY)
    assert host.runtime.phase_of("t1") is Phase.CREATED
    manager.want("t1", TASK_RUNNING)
    await manager.reported("t1", TASK_RUNNING)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda host: host.images.known.clear(), "No such image: web"),
        (
            lambda host: setattr(host.images, "fault", ImageFault("registry r: access denied", "denied")),
            "access denied",
        ),
        (lambda host: setattr(host.network, "attach_fault", NetworkError("subnet overlaps eth0")), "overlaps eth0"),
        (lambda host: host.runtime.faults.update(create=[RuntimeFault("bind source path does not exist: /x")]), "/x"),
    ],
)
async def test_an_error_before_the_start_rejects_the_task_with_the_reason(
    host: Host, manager: Manager, spoil: object, reason: str
) -> None:
    assert callable(spoil)
    spoil(host)
    manager.put(task())
    host.run(manager.addr)
    status = await manager.reported("t1", TASK_REJECTED)
    assert reason in status.err
    assert status.message == "preparing"
    await until(lambda: not host.network.spaces, what="the namespace given back")
    await until(lambda: host.runtime.phase_of("t1") is None, what="the container that never ran removed")


async def test_an_unknown_template_rejects_the_task_and_names_the_field(host: Host, manager: Manager) -> None:
    made = task()
    made.spec.container.env.append("A={{.Task.Slott}}")
    manager.put(made)
    host.run(manager.addr)
    assert "{{.Task.Slott}} in env A" in (await manager.reported("t1", TASK_REJECTED)).err


async def test_an_error_at_the_start_fails_the_task(host: Host, manager: Manager) -> None:
    host.runtime.faults["start"] = [RuntimeFault('exec: "foo": not found')]
    manager.put(task())
    host.run(manager.addr)
    assert (await manager.reported("t1", TASK_FAILED)).err == 'exec: "foo": not found'
    await until(lambda: not host.network.spaces)


async def test_a_temporary_fault_is_tried_again(host: Host, manager: Manager) -> None:
    host.runtime.faults["start"] = [RuntimeFault("busy", permanent=False)]
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    assert TASK_FAILED not in manager.states("t1")


async def test_shutdown_stops_the_container_and_keeps_it_for_its_logs(host: Host, manager: Manager) -> None:
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    manager.want("t1", TASK_SHUTDOWN)
    await manager.reported("t1", TASK_SHUTDOWN)
    assert host.runtime.made["t1"].signals == ["TERM"]
    assert not host.network.spaces
    await until(lambda: not host.names.sandboxes)


async def test_a_container_that_ignores_the_signal_is_killed_after_the_grace_period(
    host: Host, manager: Manager
) -> None:
    host.runtime.ignores_signals = True
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    manager.want("t1", TASK_REMOVE)
    status = await manager.reported("t1", TASK_SHUTDOWN)
    assert status.exit_code == 137
    assert host.runtime.made["t1"].signals == ["TERM", "KILL"]


async def test_a_task_that_is_no_longer_assigned_is_stopped_and_reclaimed(host: Host, manager: Manager) -> None:
    manager.put(task())
    agent = host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    manager.withdraw("task/t1")
    await until(host.nothing_left, what="everything of the task reclaimed")
    await until(lambda: not agent.tasks())


async def test_a_failing_removal_is_tried_until_it_works(host: Host, manager: Manager) -> None:
    host.runtime.faults["remove"] = [RuntimeFault("device busy")]
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    manager.withdraw("task/t1")
    await until(host.nothing_left, what="everything of the task reclaimed")


async def test_a_task_assigned_again_while_it_is_removed_is_reported_as_lost(host: Host, manager: Manager) -> None:
    manager.put(task())
    agent = host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    host.gate.close("remove:before")
    manager.withdraw("task/t1")
    await host.gate.reached.wait()
    manager.put(task(), task("t2", slot=2))
    await until(lambda: len(agent.tasks()) == 2, what="the assignments seen")
    host.gate.open()
    assert "container is gone" in (await manager.reported("t1", TASK_FAILED)).err


async def test_a_container_is_not_started_before_the_name_server_serves_it(host: Host, manager: Manager) -> None:
    host.gate.close("names:before")
    manager.put(task(desired=TASK_READY))
    host.run(manager.addr)
    await until(lambda: host.runtime.phase_of("t1") is Phase.CREATED)
    await until(lambda: manager.heartbeats > 2)
    assert TASK_READY not in manager.states("t1")
    host.gate.open()
    await manager.reported("t1", TASK_READY)


async def test_an_ended_task_is_reported_only_after_its_address_is_free(host: Host, manager: Manager) -> None:
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    host.gate.close("detach:before")
    host.runtime.exit("t1", 1)
    await host.gate.reached.wait()
    assert host.record("t1").task.status.state == TASK_RUNNING
    host.gate.open()
    await manager.reported("t1", TASK_FAILED)


async def test_a_missing_image_leaves_no_attaching_behind(host: Host, manager: Manager) -> None:
    host.images.known.clear()
    host.gate.close("attach:before")
    host.gate.close("ensure:before")
    manager.put(task())
    host.run(manager.addr)
    await until(lambda: host.network.attach_calls == 1 and host.images.asked, what="both under way")
    host.gate.open("ensure:before")
    await manager.reported("t1", TASK_REJECTED)
    host.gate.open()
    await until(lambda: host.gate.passed["detach:after"] == 1)
    await until(lambda: manager.heartbeats > 2)
    assert not host.network.spaces


async def test_shutdown_during_a_pull_does_not_wait_for_it(host: Host, manager: Manager) -> None:
    host.gate.close("ensure:before")
    manager.put(task())
    host.run(manager.addr)
    await host.gate.reached.wait()
    manager.want("t1", TASK_SHUTDOWN)
    await manager.reported("t1", TASK_SHUTDOWN)
    await until(lambda: not host.network.spaces)
    assert "t1" not in host.runtime.made


async def test_a_container_of_a_task_that_the_managers_gave_up_is_stopped(host: Host, manager: Manager) -> None:
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)
    lost = task()
    lost.status.state = TASK_ORPHANED
    manager.put(lost)
    await until(lambda: host.runtime.phase_of("t1") is Phase.EXITED, what="the orphan stopped")
    assert TASK_SHUTDOWN not in manager.states("t1")


async def test_a_balanced_task_gets_its_signal_only_after_it_is_out_of_the_balancers(
    host: Host, manager: Manager
) -> None:
    made = task()
    made.endpoint.mode = VIP
    manager.put(made, items=endpoint(made))
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)

    manager.want("t1", TASK_SHUTDOWN)
    manager.put(items=endpoint(made, serving_now=False), confirm=True)
    await until(lambda: manager.applied == [manager.sequence], what="confirmed")
    assert host.runtime.made["t1"].signals == [], "another node may still send connections to it"
    manager.send(ManagerMessage(released=Released(task_ids=["t1"])))
    await manager.reported("t1", TASK_SHUTDOWN)
    assert host.runtime.made["t1"].signals == ["TERM"]


async def test_a_hundred_tasks_cost_few_applications_and_few_batches(host: Host, manager: Manager) -> None:
    names = [f"t{number:03}" for number in range(100)]
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(*(task(name, slot=number + 1) for number, name in enumerate(names)))
    await until(lambda: all(manager.last(name).state == TASK_RUNNING for name in names), what="100 tasks running")
    assert host.runtime.in_flight_max <= 8
    assert len(host.network.states) <= 5
    assert len(host.names.pictures) <= 40
    assert host.images.asked == [("web", "")], "one look-up serves all that ask at once"
    assert manager.batches <= 30
    assert host.names.sandboxes == set(names)


async def test_a_network_that_cannot_be_applied_at_first_is_waited_for(host: Host, manager: Manager) -> None:
    host.network.apply_faults = [NetworkError("no vxlan module"), NetworkError("no vxlan module")]
    manager.put(task())
    host.run(manager.addr)
    await manager.reported("t1", TASK_RUNNING)


@pytest.mark.parametrize(
    ("point", "state"),
    [("attach:before", TASK_PREPARING), ("create:before", TASK_PREPARING), ("start:before", TASK_STARTING)],
)
async def test_the_state_is_on_disk_before_its_step(host: Host, manager: Manager, point: str, state: State) -> None:
    host.gate.close(point)
    manager.put(task())
    host.run(manager.addr)
    await host.gate.reached.wait()
    assert host.record("t1").task.status.state == state
    host.gate.open()
    await manager.reported("t1", TASK_RUNNING)


def _items(task_id: str) -> dict[str, Item]:
    return {f"task/{task_id}": Item(task=task(task_id, slot=int(task_id[1:])))}
