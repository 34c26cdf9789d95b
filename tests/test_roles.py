"""Promotion and demotion: what is decided, what is refused, and that it converges without losing a quorum."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.objects_pb2 import MANAGER, WORKER, Cluster, Node, NodeRole
from swarm.consensus.interface import Member
from swarm.roles import Plan, RoleManager, decide, demotion_refusal, forgetting
from swarm.store.changes import Update
from swarm.store.store import Store
from swarm.store.writer import Writer
from tests.fakes_consensus import FakeConsensus, FakeGroup
from tests.waiting import until


def node(node_id: str, desired: NodeRole.ValueType, role: NodeRole.ValueType | None = None, addr: str = "") -> Node:
    made = Node(id=node_id, role=desired if role is None else role, manager_addr=addr)
    made.spec.desired_role = desired
    return made


def manager(node_id: str) -> Node:
    return node(node_id, MANAGER, addr=f"{node_id}:2378")


def leaving(node_id: str) -> Node:
    """A manager that is to become a worker."""
    return node(node_id, WORKER, MANAGER, f"{node_id}:2378")


def members(*ids: str) -> list[Member]:
    return [Member(node_id, f"{node_id}:2378") for node_id in ids]


def planned(nodes: list[Node], ids: list[str], up: list[str] | None = None, me: str = "m1") -> Plan:
    return decide(nodes, members(*ids), frozenset(ids if up is None else up), me)


def test_nothing_to_do() -> None:
    assert planned([manager("m1"), node("w1", WORKER)], ["m1"]) == Plan()


def test_a_promoted_node_gets_its_role_at_once() -> None:
    assert planned([manager("m1"), node("w1", MANAGER, WORKER)], ["m1"]) == Plan(updates=(node("w1", MANAGER),))


def test_a_manager_in_raft_gets_its_address_stored() -> None:
    nodes = [manager("m1"), node("m2", MANAGER)]
    assert planned(nodes, ["m1", "m2"]) == Plan(updates=(manager("m2"),))


def test_a_demoted_manager_leaves_raft_before_it_becomes_a_worker() -> None:
    nodes = [manager("m1"), manager("m2"), leaving("m3")]
    assert planned(nodes, ["m1", "m2", "m3"]) == Plan(remove="m3")
    assert planned(nodes, ["m1", "m2"]) == Plan(updates=(node("m3", WORKER),))


def test_a_leader_that_is_demoted_hands_over() -> None:
    nodes = [leaving("m1"), manager("m2"), manager("m3")]
    assert planned(nodes, ["m1", "m2", "m3"]) == Plan(transfer=True)
    assert planned(nodes, ["m1", "m2", "m3"], me="m2") == Plan(remove="m1")


def test_the_last_manager_stays() -> None:
    plan = planned([leaving("m1")], ["m1"])
    assert (plan.remove, plan.transfer) == (None, False)
    assert "last manager" in plan.waits[0]


def test_no_removal_costs_the_quorum() -> None:
    nodes = [manager("m1"), leaving("m2"), manager("m3")]
    plan = planned(nodes, ["m1", "m2", "m3"], up=["m1", "m2"])
    assert plan.remove is None
    assert "of the 2 managers that would remain 1 can be reached, and 2 are needed" in plan.waits[0]


def test_an_unreachable_member_goes_before_a_reachable_one() -> None:
    nodes = [manager("m1"), leaving("m2"), leaving("m3")]
    assert planned(nodes, ["m1", "m2", "m3"], up=["m1", "m2"]).remove == "m3"


@pytest.mark.parametrize("strange", [[], [node("x", WORKER)]])
def test_a_member_whose_node_was_removed_or_is_a_worker_is_evicted(strange: list[Node]) -> None:
    assert planned([manager("m1"), manager("m2"), *strange], ["m1", "m2", "x"], up=["m1", "m2"]).remove == "x"


IDS = ("a", "b", "c", "d", "e")
Roles = st.lists(st.sampled_from([MANAGER, WORKER]), min_size=5, max_size=5)


@given(desired=Roles, roles=Roles, joined=st.sets(st.sampled_from(IDS), min_size=1), down=st.sets(st.sampled_from(IDS)))
def test_steps_converge_and_never_cost_a_quorum(
    desired: list[NodeRole.ValueType], roles: list[NodeRole.ValueType], joined: set[str], down: set[str]
) -> None:
    """Played to the end with some members down: a quorum, once there, stays; with all up, the wish is fulfilled."""
    nodes = {id_: node(id_, want, role) for id_, want, role in zip(IDS, desired, roles, strict=True)}
    inside, up = set(joined), set(IDS) - down
    leader = min(inside & up, default=None)
    if leader is None or len(inside & up) * 2 <= len(inside):
        return  # nobody leads, so nobody decides
    for _ in range(4 * len(IDS)):
        plan = decide(list(nodes.values()), members(*sorted(inside)), frozenset(inside & up), leader)
        nodes |= {updated.id: updated for updated in plan.updates}
        assert plan.remove != leader
        if plan.remove is not None:
            inside.remove(plan.remove)
        elif plan.transfer:
            leader = min((inside & up) - {leader})
        elif not plan.updates:
            break
        assert len(inside & up) * 2 > len(inside)
    else:
        pytest.fail("did not come to rest")
    wanted = {id_ for id_, want in zip(IDS, desired, strict=True) if want == MANAGER}
    assert wanted <= {id_ for id_, found in nodes.items() if found.role == MANAGER}
    assert all(nodes[id_].manager_addr == f"{id_}:2378" for id_ in inside)
    if not down and inside & wanted:
        assert inside <= wanted
        assert wanted == {id_ for id_, found in nodes.items() if found.role == MANAGER}


# ---- the guard of the API


class PartlyDown(FakeConsensus):
    down: frozenset[str] = frozenset()

    def reachable(self, node_id: str) -> bool:
        return node_id not in self.down


def guarded(nodes: list[Node], ids: list[str], down: frozenset[str] = frozenset()) -> tuple[Store, PartlyDown]:
    store = Store.of(*nodes)
    group = FakeGroup(store)
    for node_id in ids:
        group.member(node_id)
    consensus = PartlyDown(group, Member("m1", ""))
    consensus.down = down
    return store, consensus


@pytest.mark.parametrize(
    ("nodes", "ids", "down", "asked", "why"),
    [
        ([manager("m1")], ["m1"], [], "m1", "last manager of the swarm"),
        ([manager("m1"), leaving("m2")], ["m1", "m2"], [], "m1", "last manager of the swarm"),
        ([manager("m1"), manager("m2")], ["m1", "m2"], [], "m2", None),
        ([manager("m1"), manager("m2"), manager("m3")], ["m1", "m2", "m3"], ["m3"], "m2", "would lose its quorum"),
        ([manager("m1"), manager("m2"), manager("m3")], ["m1", "m2", "m3"], ["m3"], "m3", None),
        ([manager("m1"), node("m2", MANAGER)], ["m1"], [], "m2", None),
        ([manager("m1"), node("w1", WORKER)], ["m1"], [], "w1", None),
        ([manager("m1"), node("m2", MANAGER)], ["m1"], [], "m1", "last manager"),
    ],
)
def test_what_the_api_refuses(nodes: list[Node], ids: list[str], down: list[str], asked: str, why: str | None) -> None:
    store, consensus = guarded(nodes, ids, frozenset(down))
    found = store.nodes.get(asked)
    assert found is not None
    text = demotion_refusal(store, consensus, found)
    assert text is None if why is None else why in str(text)


def test_blocked_certificates_are_forgotten_once_they_have_expired() -> None:
    cluster = Cluster(blocked_certificates={"old": 10.0, "new": 30.0})
    assert forgetting(cluster, 5.0) is None
    left = forgetting(cluster, 20.0)
    assert left is not None
    assert dict(left.blocked_certificates) == {"new": 30.0}
    assert len(cluster.blocked_certificates) == 2


# ---- the loop


@contextlib.asynccontextmanager
async def role_managers(group: FakeGroup) -> AsyncIterator[None]:
    loops = [
        asyncio.create_task(RoleManager(group.store, Writer(each, lambda: 100.0), each, lambda: 100.0).run())
        for each in list(group.nodes.values())
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


async def test_demoting_the_leader_is_finished_by_its_successor() -> None:
    store = Store.of(Cluster(id="c1"), leaving("m1"), manager("m2"), manager("m3"))
    group = FakeGroup(store)
    for node_id in ("m1", "m2", "m3"):
        group.member(node_id, f"{node_id}:2378")
    group.elect("m1")
    async with role_managers(group):
        await until(lambda: store.nodes.get("m1") == stored(store, node("m1", WORKER)), what="m1 is a worker")
    assert set(group.nodes) == {"m2", "m3"}
    assert group.leader_id in {"m2", "m3"}


async def test_a_promotion_is_seen_at_once() -> None:
    store = Store.of(Cluster(id="c1"), manager("m1"), node("w1", WORKER))
    group = FakeGroup(store)
    leader = group.member("m1", "m1:2378")
    group.elect("m1")
    async with role_managers(group):
        await Writer(leader, lambda: 100.0).commit((Update(node("w1", MANAGER, WORKER)),))
        await until(lambda: (found := store.nodes.get("w1")) is not None and found.role == MANAGER, what="w1's role")


def stored(store: Store, wanted: Node) -> Node:
    """`wanted` with the version and times of the stored object."""
    found = store.nodes.get(wanted.id)
    if found is not None:
        wanted.meta.CopyFrom(found.meta)
    return wanted
