"""Events: what each change is called, what is remembered, and what a reader gets."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import grpc
import pytest

from proto import control_pb2 as pb
from proto import objects_pb2 as objects
from proto.objects_pb2 import Node, Service, Task
from swarm.api.events import QUEUE_MAX, EventLog, Seen, events_of, matches
from swarm.errors import Busy
from swarm.store.changes import Create, Record, Remove, Update
from swarm.store.store import Event as Change
from swarm.store.store import Store
from tests.managing import Managers, a_cluster, a_node, a_spec, managing
from tests.waiting import until

R = TypeVar("R", Service, Node, Task)


def a_service(replicas: int = 2) -> Service:
    service = Service(id="s1", spec=a_spec("web"))
    service.spec.replicated.replicas = replicas
    return service


def a_task(state: int = objects.TASK_ASSIGNED) -> Task:
    task = Task(id="t1", service_id="s1", slot=1, node_id="n1", desired_state=objects.TASK_RUNNING)
    task.service_annotations.name = "web"
    task.status.state = objects.TaskState.ValueType(state)
    return task


def copy_of(record: R, **fields: Any) -> R:
    copy = type(record)()
    copy.CopyFrom(record)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def told(before: Record | None, after: Record | None) -> list[tuple[str, str, dict[str, str]]]:
    store = Store.of(a_node("n1", "box"))
    return [(e.type, e.action, dict(e.attributes)) for e in events_of(Seen(1.0, Change.of(before, after)), store)]


def test_services() -> None:
    old, new = a_service(), a_service(5)
    new.update_status.state = objects.UpdateStatus.UPDATING
    assert told(None, old) == [("service", "create", {"name": "web"})]
    assert told(old, None) == [("service", "remove", {"name": "web"})]
    changed = {"replicas.new": "5", "replicas.old": "2", "updatestate.new": "updating", "updatestate.old": ""}
    assert told(old, new) == [("service", "update", {"name": "web", **changed})]
    assert told(old, copy_of(old, spec_version=9)) == [], "bookkeeping is no event"


def test_allocation_is_told_when_it_fails_or_takes_something_away() -> None:
    asked, given, failed = a_service(), a_service(), a_service()
    given.endpoint.virtual_ips.add(network_id="n", address="10.0.1.2/24")
    failed.allocation_error = "no virtual IP"
    assert told(asked, given) == [], "that it succeeds is no event"
    taken = {"virtualips.new": "", "virtualips.old": "10.0.1.2/24"}
    assert told(given, asked) == [("service", "update", {"name": "web", **taken})]
    wrong = {"allocationerror.new": "no virtual IP", "allocationerror.old": ""}
    assert told(asked, failed) == [("service", "update", {"name": "web", **wrong})]
    sound, twice = (objects.Network(id="n", allocation_error=text) for text in ("", "VNI 4097 is also network a's"))
    wrong["allocationerror.new"] = "VNI 4097 is also network a's"
    assert told(sound, twice) == [("network", "update", {"name": "", **wrong})]


def test_nodes_say_only_what_people_know_of() -> None:
    up = a_node("n1", "box")
    down = copy_of(up)
    down.status.state = objects.NodeStatus.DOWN
    down.spec.availability = objects.DRAINED
    [(kind, action, attributes)] = told(up, down)
    assert (kind, action) == ("node", "update")
    assert (attributes["state.new"], attributes["availability.new"]) == ("down", "drain")
    assert told(up, copy_of(up, index=7)) == []


def test_every_step_of_a_task() -> None:
    running, failed = a_task(objects.TASK_RUNNING), a_task(objects.TASK_FAILED)
    failed.status.err = "task: non-zero exit (1)"
    [(kind, action, attributes)] = told(running, failed)
    assert (kind, action) == ("task", "failed")
    assert attributes == {
        "name": "web.1",
        "service": "web",
        "service.id": "s1",
        "node": "box",
        "error": "task: non-zero exit (1)",
    }
    stopping = copy_of(running, desired_state=objects.TASK_SHUTDOWN, reason="update to version 3")
    [(_, action, attributes)] = told(running, stopping)
    assert (action, attributes["desired.new"], attributes["reason"]) == ("update", "shutdown", "update to version 3")
    assert told(running, copy_of(running, running_at=3.0)) == []
    assert [told(None, running)[0][1], told(running, None)[0][1]] == ["create", "remove"]


def test_conditions() -> None:
    [event] = events_of(Seen(1.0, Change.of(None, a_task())), Store.of(a_node("n1", "box")))
    good: tuple[dict[str, Any], ...] = (
        {},
        {"types": ["task", "node"]},
        {"actions": ["create"]},
        {"refs": ["web"]},
        {"refs": ["box", "x"]},
    )
    assert all(matches(event, pb.EventsRequest(**each)) for each in good)
    bad: tuple[dict[str, Any], ...] = (
        {"types": ["node"]},
        {"actions": ["remove"]},
        {"refs": ["x"]},
        {"refs": ["web"], "types": ["service"]},
    )
    assert not any(matches(event, pb.EventsRequest(**each)) for each in bad)


async def commit(made: Managers, change: Create | Update | Remove) -> None:
    await made["m1"].service._backend.writer.commit((change,))


async def test_any_manager_tells_of_the_past_and_of_what_comes() -> None:
    async with managing(a_cluster(), names=("m1", "m2")) as made:
        await commit(made, Create(a_service()))
        await until(lambda: made["m2"].service._events._seen)
        call = made.stubs["m2"].Events(pb.EventsRequest(since=1.0, types=["service"]))
        reading = aiter(call)
        assert (await anext(reading)).action == "create"
        made.group.elect(None)  # no leader: nothing changes, and nobody is cut off
        made.group.elect("m1")
        service = made.store.services.get("s1")
        assert service is not None
        await commit(made, Remove(service))
        assert (await anext(reading)).action == "remove"
        call.cancel()
        past = pb.EventsRequest(since=1.0, until=2.0)
        assert [event async for event in made.stubs["m1"].Events(past)] == []


async def test_a_replaced_state_and_a_slow_reader_are_told() -> None:
    store = Store()
    log = EventLog(store, lambda: 5.0)
    reading = log.read(pb.EventsRequest())
    first = asyncio.ensure_future(anext(reading))
    await until(lambda: log._readers)
    log._note([])
    assert (await first).action == "resync"
    log._note([Change.of(None, a_service())] * (QUEUE_MAX + 1))
    with pytest.raises(Busy, match="some are lost"):
        await anext(reading)
    assert not log._readers


async def test_a_bad_filter_is_refused_by_the_command_line_and_an_unknown_type_is_no_event() -> None:
    async with managing(a_cluster()) as made:
        call = made.stubs["m1"].Events(pb.EventsRequest(since=1.0, until=1.0, types=["volume"]))
        assert [event async for event in call] == []
        assert await call.code() is grpc.StatusCode.OK
