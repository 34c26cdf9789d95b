"""The store's apply rule: versions, names, whole groups, and equal bytes from equal logs."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from proto import store_pb2 as pb
from proto.objects_pb2 import Network, Service, Task
from swarm.store.changes import Create, Group, Remove, Update, transaction
from swarm.store.store import Store

OK, CONFLICT, EXISTS, NAME_TAKEN, NOT_FOUND = (
    pb.Verdict.OK,
    pb.Verdict.CONFLICT,
    pb.Verdict.EXISTS,
    pb.Verdict.NAME_TAKEN,
    pb.Verdict.NOT_FOUND,
)


def service(object_id: str, name: str) -> Service:
    made = Service(id=object_id)
    made.spec.annotations.name = name
    return made


def apply(store: Store, *groups: Group, request_id: str = "") -> list[int]:
    entry = pb.Entry(transactions=[transaction(group, 100.0, request_id) for group in groups])
    return [verdict.code for verdict in pb.EntryResult.FromString(store.apply(entry.SerializeToString())).verdicts]


def changed(record: Service, name: str) -> Service:
    copy = Service()
    copy.CopyFrom(record)
    copy.spec.annotations.name = name
    return copy


def test_an_update_must_carry_the_version_it_read() -> None:
    store = Store()
    assert apply(store, (Create(service("s1", "web")),)) == [OK]
    read = store.services.get("s1")
    assert read is not None
    assert apply(store, (Update(changed(read, "web2")),)) == [OK]
    assert apply(store, (Update(changed(read, "web3")),)) == [CONFLICT]
    assert store.services.by_name("WEB2") is store.services.get("s1")
    assert store.services.by_name("web") is None


def test_a_group_is_stored_whole_or_not_at_all() -> None:
    store = Store()
    apply(store, (Create(service("s1", "web")),))
    before = store.digest()
    assert apply(store, (Create(Task(id="t1", service_id="s1")), Create(service("s2", "Web")))) == [NAME_TAKEN]
    assert store.digest() == before


@pytest.mark.parametrize(
    ("group", "code"),
    [
        ((Create(service("s1", "other")),), EXISTS),
        ((Create(service("s2", "WEB")),), NAME_TAKEN),
        ((Create(service("s2", "a")), Create(service("s3", "A"))), NAME_TAKEN),
        ((Update(service("s9", "x")),), NOT_FOUND),
        ((Remove(service("s9", "x")),), NOT_FOUND),
    ],
)
def test_refusals(group: Group, code: int) -> None:
    store = Store()
    apply(store, (Create(service("s1", "web")),))
    assert apply(store, group) == [code]


def test_names_are_unique_per_table_only() -> None:
    store = Store()
    network = Network(id="n1")
    network.spec.annotations.name = "web"
    assert apply(store, (Create(service("s1", "web")), Create(network))) == [OK]


def test_a_request_id_is_applied_once() -> None:
    store = Store()
    assert apply(store, (Create(service("s1", "web")),), request_id="r") == [OK]
    assert apply(store, (Create(service("s1", "web")),), request_id="r") == [OK]
    assert len(store.services) == 1
    assert store.version == 1


def test_a_dump_restores_the_same_state_and_memory_of_requests() -> None:
    store, copy = Store(), Store()
    apply(store, (Create(service("s1", "web")),), request_id="r")
    apply(store, *(((Create(Task(id=f"t{i}", service_id="s1", node_id=f"n{i % 3}"))),) for i in range(9)))
    copy.load(list(store.dump()))
    assert copy.digest() == store.digest()
    assert apply(copy, (Create(service("s1", "web")),), request_id="r") == [OK]
    assert [task.id for task in copy.tasks.where("node", "n1")] == ["t1", "t4", "t7"]
    assert copy.tasks.count("service", "s1") == 9


def test_garbage_is_refused_without_raising() -> None:
    store = Store()
    assert pb.EntryResult.FromString(store.apply(b"\xff\xff")).verdicts[0].code == pb.Verdict.INVALID


def test_listeners_see_before_and_after() -> None:
    store = Store()
    seen: list[tuple[Message | None, Message | None]] = []
    store.subscribe(lambda events: seen.extend((event.before, event.after) for event in events))
    apply(store, (Create(service("s1", "web")),))
    stored = store.services.get("s1")
    assert stored is not None
    apply(store, (Remove(stored),))
    assert seen == [(None, stored), (stored, None)]
