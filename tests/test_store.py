"""The store's apply rule: versions, names, whole groups, and equal bytes from equal logs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from proto import store_pb2 as pb
from proto.objects_pb2 import Network, NetworkAttachment, Service, Task
from swarm.store.changes import Create, Group, Remove, Update, transaction
from swarm.store.store import OBJECT_BYTES_MAX, Store
from swarm.store.table import Table

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


_Step = tuple[str, type[Service] | type[Task], str, str, str]
_IDS = st.sampled_from(["a", "b", "c"])
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["create", "update", "remove"]),
        st.sampled_from([Service, Task]),
        _IDS,
        st.sampled_from(["", "x", "y"]),  # name of a service; node of a task, and how many networks it is on
        st.sampled_from(["", "r1", "r2"]),  # request
    ),
    max_size=25,
)


def _made(kind: type[Service] | type[Task], object_id: str, word: str) -> Service | Task:
    if kind is Service:
        return service(object_id, word)
    legs = [NetworkAttachment(network_id=each) for each in {"": (), "x": ("n1",), "y": ("n1", "n2")}[word]]
    return Task(id=object_id, service_id="s", node_id=word, networks=legs)


def _indexes(store: Store) -> list[dict[str, dict[str, set[str]]]]:
    def of(table: Table[Any]) -> dict[str, dict[str, set[str]]]:
        return {
            index: {key: {row.id for row in table.where(index, key)} for key in table.keys(index)}
            for index in table.indexes
        }

    return [of(store.services), of(store.tasks)]


@given(_STEPS)
def test_digest_and_indexes_kept_up_to_date_equal_those_made_from_scratch(
    steps: Iterable[_Step],
) -> None:
    store = Store()
    for action, kind, object_id, word, request_id in steps:
        record = _made(kind, object_id, word)
        stored = (store.services if kind is Service else store.tasks).get(object_id)
        if stored is not None:
            record.meta.version = stored.meta.version
        change = Create(record) if action == "create" else Update(record) if action == "update" else Remove(record)
        apply(store, (change,), request_id=request_id)
    fresh = Store()
    fresh.load(store.dump())
    assert fresh.digest() == store.digest()
    assert _indexes(fresh) == _indexes(store)
    assert list(fresh.dump()) == list(store.dump())


def test_any_difference_shows_in_the_digest() -> None:
    digests = set()
    for name, request_id in (("web", ""), ("web", "r"), ("db", ""), ("db", "r")):
        store = Store()
        apply(store, (Create(service("s1", name)),), request_id=request_id)
        digests.add(store.digest())
    store = Store()
    assert len(digests | {store.digest()}) == 5
    apply(store, ())
    assert store.digest() != Store().digest(), "the version counts, too"


def test_an_object_that_is_too_large_is_refused_and_changes_nothing() -> None:
    store = Store()
    apply(store, (Create(service("s1", "web")),))
    before, read = store.digest(), store.services.get("s1")
    assert read is not None
    large = changed(read, "web")
    large.spec.annotations.labels["x"] = "x" * OBJECT_BYTES_MAX
    assert apply(store, (Update(large),)) == [pb.Verdict.INVALID]
    assert store.digest() == before


@pytest.mark.parametrize(
    ("kind", "record"), [(pb.TASK_KIND, b""), (pb.TASK_KIND, b"\xff"), (7, Task(id="t1").SerializeToString())]
)
def test_an_object_that_cannot_be_read_is_refused_and_changes_nothing(kind: Any, record: bytes) -> None:
    store = Store()
    before = store.digest()
    broken = pb.Transaction(changes=[pb.Change(action=pb.Change.CREATE, kind=kind, record=record)])
    result = pb.EntryResult.FromString(store.apply(pb.Entry(transactions=[broken]).SerializeToString()))
    assert [verdict.code for verdict in result.verdicts] == [pb.Verdict.INVALID]
    assert store.digest() == before
