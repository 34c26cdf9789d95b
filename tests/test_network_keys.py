"""Keys of encrypted networks: the ring, who is told, who has confirmed, rotation by hand, nodes that cannot encrypt."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import grpc
import hypothesis.strategies as st
from hypothesis import given
from structlog.testing import capture_logs

from proto import objects_pb2 as pb
from proto.control_pb2 import ClusterRequest, GetRequest, RotateNetworkKeysRequest
from proto.dispatch_pb2 import AgentHello, AgentMessage, NetworkKeysApplied
from proto.objects_pb2 import Cluster, Network, Node, NodeDescription, Task
from swarm.allocate.keys import KEY_BYTES, PERIOD_S, RING_KEYS, decide
from swarm.explain import explain_service
from swarm.store.changes import Create, Decision, Remove, Update, copy_of
from swarm.store.dirty import Dirty
from swarm.store.store import Store
from tests import managing
from tests.leading import FakeAgent, Leader, a_cluster, a_node, agent, leading
from tests.simulated import Simulation, network, node, service
from tests.test_api_services import refused
from tests.waiting import until

numbers = itertools.count(1)


def fresh(size: int) -> bytes:
    return next(numbers).to_bytes(size, "big")


def encrypted(made: Network) -> Network:
    made.spec.options["encrypted"] = ""
    return made


def decided(store: Store, now: float, random_bytes: Callable[[int], bytes] = fresh) -> Decision:
    return decide(store, now, lambda: "", Dirty(everything=True), random_bytes=random_bytes)


def ring_of(decision: Decision) -> Cluster:
    ((change,),) = decision.groups
    assert isinstance(change, Update)
    assert isinstance(change.record, Cluster)
    return change.record


# --- the ring ------------------------------------------------------------------------------------------


def test_without_an_encrypted_network_there_is_no_key() -> None:
    assert decided(Store.of(Cluster(id="c"), network("clear")), 5.0) == Decision()


def test_the_first_encrypted_network_brings_a_whole_ring() -> None:
    made = ring_of(decided(Store.of(Cluster(id="c"), encrypted(network("secret"))), 5.0))
    assert [key.serial for key in made.network_keys] == [3, 2, 1]
    assert {key.created_at for key in made.network_keys} == {5.0}
    assert len({key.key for key in made.network_keys}) == RING_KEYS
    assert {len(key.key) for key in made.network_keys} == {KEY_BYTES}


@given(st.lists(st.floats(0, 3 * PERIOD_S), max_size=8))
def test_one_key_is_replaced_when_it_is_due_and_none_before(pauses_s: list[float]) -> None:
    now = 100.0
    store = Store.of(ring_of(decided(Store.of(Cluster(id="c"), encrypted(network("x"))), now)), encrypted(network("x")))
    for pause_s in pauses_s:
        before = store.cluster
        assert before is not None
        now += pause_s
        decision = decided(store, now)
        due = before.network_keys[0].created_at + PERIOD_S
        if now < due:
            assert decision == Decision(wake_at=due)
            continue
        after = ring_of(decision)
        assert list(after.network_keys[1:]) == list(before.network_keys[:2])
        assert after.network_keys[0].serial == before.network_keys[0].serial + 1
        assert decision.wake_at == now + PERIOD_S
        store = Store.of(after, encrypted(network("x")))


def test_a_restored_backup_with_an_old_ring_is_rotated_at_once() -> None:
    old = ring_of(decided(Store.of(Cluster(id="c"), encrypted(network("x"))), 5.0))
    assert ring_of(decided(Store.of(old, encrypted(network("x"))), 5.0 + 30 * PERIOD_S)).network_keys[0].serial == 4


def test_the_stages_of_a_leader_make_the_ring_before_any_task_needs_it() -> None:
    able = node("n1")
    able.description.encrypts = True
    sim = Simulation(able, encrypted(network("secret")), service("web", 1, ["secret"]))
    sim.settle()
    assert sim.store.cluster is not None
    assert len(sim.store.cluster.network_keys) == RING_KEYS


# --- nodes that cannot encrypt -----------------------------------------------------------------------


def two_nodes(able: bool) -> Simulation:
    nodes = [node("n1"), node("n2")]
    nodes[1].description.encrypts = able
    return Simulation(*nodes, encrypted(network("secret")), service("web", 4, ["secret"]), service("open", 4))


def test_tasks_on_encrypted_networks_go_to_nodes_that_can_encrypt_only() -> None:
    sim = two_nodes(able=True)
    sim.settle()
    assert {task.node_id for task in sim.runnable("web")} == {"n2"}
    assert {task.node_id for task in sim.runnable("open")} == {"n1", "n2"}


def test_without_such_a_node_tasks_wait_and_say_why() -> None:
    sim = two_nodes(able=False)
    sim.settle()
    waiting = {task.status.err for task in sim.runnable("web")}
    assert waiting == {"no suitable node (no encryption of networks on 2 nodes)"}
    web = sim.store.services.get("web")
    assert web is not None
    said = [line for finding in explain_service(sim.store, web, sim.now).findings for line in finding.details]
    assert any("its kernel lacks ESP" in line for line in said)


# --- who is told ----------------------------------------------------------------------------------------


def a_task(node_id: str, network_id: str = "secret") -> Task:
    made = Task(id=f"t-{node_id}", node_id=node_id, service_id="s1", slot=1, desired_state=pb.TASK_RUNNING)
    made.status.state = pb.TASK_ASSIGNED
    made.networks.add(network_id=network_id, address=f"10.0.1.{node_id[1:]}/24")
    return made


def a_network(network_id: str = "secret") -> Network:
    made = Network(id=network_id, vni=4097)
    made.spec.annotations.name = network_id
    return made


def a_store() -> Store:
    """Three nodes; n1 has a task on the encrypted network, n2 on a clear one."""
    secret = encrypted(a_network())
    cluster = ring_of(decided(Store.of(a_cluster(60.0), secret), 5.0))
    nodes = [a_node(f"n{number}", number) for number in (1, 2, 3)]
    return Store.of(cluster, *nodes, secret, a_network("clear"), a_task("n1"), a_task("n2", "clear"))


async def hello(played: FakeAgent, epoch: int = 77) -> None:
    description = NodeDescription(hostname="host", encrypts=True, encryption_epoch=epoch)
    await played.write(AgentMessage(hello=AgentHello(description=description)))


def told(played: FakeAgent) -> list[list[int]]:
    return [[key.serial for key in keys.keys] for keys in played.said("keys")]


def rotate(leader: Leader) -> None:
    cluster = leader.store.cluster
    assert cluster is not None
    leader.apply(Update(ring_of(decided(leader.store, cluster.network_keys[0].created_at + PERIOD_S))))


async def confirm(played: FakeAgent, serial: int) -> None:
    await played.write(AgentMessage(keys_applied=NetworkKeysApplied(serial=serial)))


async def test_only_nodes_on_an_encrypted_network_are_told_and_before_they_need_it() -> None:
    async with leading(a_store()) as leader, agent(leader, "n1") as user, agent(leader, "n2") as other:
        await hello(user)
        await hello(other)
        await until(lambda: told(user) == [[], [3, 2, 1]], what="the ring, once the node says that it can encrypt")
        leader.apply(Create(a_task("n3")))
        rotate(leader)
        await until(lambda: told(user)[-1] == [4, 3, 2])
        async with agent(leader, "n3", hello=False) as late:
            await hello(late)
            await until(lambda: late.snapshots == 1)
            kinds = [message.WhichOneof("message") for message in late.messages]
            assert kinds.index("keys") < kinds.index("assignments")
            assert told(late) == [[4, 3, 2]]
        assert told(other) == [[]]


async def test_a_node_whose_last_task_there_ends_is_told_to_forget() -> None:
    async with leading(a_store()) as leader, agent(leader, "n1") as user:
        await hello(user)
        await until(lambda: told(user)[-1] == [3, 2, 1])
        task = leader.store.tasks.get("t-n1")
        assert task is not None
        leader.apply(Remove(task))
        await until(lambda: told(user)[-1] == [])


async def test_peers_on_an_encrypted_network_hear_of_each_others_epochs_also_of_a_new_one() -> None:
    async with leading(a_store()) as leader, agent(leader, "n1") as one, agent(leader, "n3") as three:
        leader.apply(Create(a_task("n3")))
        await hello(one, 11)
        await hello(three, 33)
        await until(lambda: "peer/n3" in one.items and one.items["peer/n3"].peer.encryption_epoch == 33)
        await hello(three, 34)
        await until(lambda: one.items["peer/n3"].peer.encryption_epoch == 34)
        assert three.items["peer/n1"].peer.encryption_epoch == 11


async def test_all_have_confirmed_when_every_node_that_uses_the_keys_has() -> None:
    async with leading(a_store()) as leader, agent(leader, "n1") as user, agent(leader, "n2") as other:
        await hello(user)
        await hello(other)
        await until(lambda: told(user)[-1] == [3, 2, 1])
        assert await leader.dispatcher.keys_settled(0.01) == ["n1"]
        waiting = asyncio.create_task(leader.dispatcher.keys_settled(10))
        await confirm(user, 3)
        assert await waiting == []
        rotate(leader)
        assert await leader.dispatcher.keys_settled(0.01) == ["n1"]


async def test_a_new_leader_and_a_new_session_ask_for_the_confirmation_again() -> None:
    async with leading(a_store()) as leader:
        async with agent(leader, "n1") as user:
            await hello(user)
            await confirm(user, 3)
            assert await leader.dispatcher.keys_settled(10) == []
        await until(lambda: not leader.dispatcher.connected())
        assert await leader.dispatcher.keys_settled(0.01) == ["n1"]
        async with agent(leader, "n1", hello=False) as again:
            await hello(again)
            await until(lambda: told(again) == [[3, 2, 1]])
            await confirm(again, 3)
            assert await leader.dispatcher.keys_settled(10) == []


# --- rotation by hand, and what is shown ---------------------------------------------------------------


def with_ring() -> Cluster:
    made = managing.a_cluster()
    made.network_keys.extend(ring_of(decided(Store.of(made, encrypted(network("x"))), 5.0)).network_keys)
    return made


async def test_a_rotation_is_one_new_key_however_often_the_call_is_repeated() -> None:
    async with managing.managing(with_ring()) as made:
        metadata = (("request-id", "r1"),)
        for _ in range(2):
            reply = await made.stubs["m1"].RotateNetworkKeys(RotateNetworkKeysRequest(), metadata=metadata)
            assert reply.serial == 4
        assert (await made.stubs["m1"].RotateNetworkKeys(RotateNetworkKeysRequest())).serial == 5


async def test_a_rotation_waits_for_the_one_before_and_names_who_is_behind() -> None:
    async with managing.managing(with_ring()) as made:
        made["m1"].behind = ["n7"]
        code, words = await refused(made.stubs["m1"].RotateNetworkKeys(RotateNetworkKeysRequest()))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "nodes n7 have not confirmed" in words
        assert made.store.cluster is not None
        assert made.store.cluster.network_keys[0].serial == 3


async def test_without_an_encrypted_network_there_is_nothing_to_rotate() -> None:
    async with managing.managing(managing.a_cluster()) as made:
        code, words = await refused(made.stubs["m1"].RotateNetworkKeys(RotateNetworkKeysRequest()))
        assert (code, "--opt encrypted" in words) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_no_reply_and_no_log_line_holds_a_key() -> None:
    cluster = with_ring()
    secrets = [key.key for key in cluster.network_keys]
    with capture_logs() as logged:
        async with managing.managing(cluster, managing.a_network("n", "front")) as made:
            stub = made.stubs["m1"]
            rotated = await stub.RotateNetworkKeys(RotateNetworkKeysRequest())
            assert made.store.cluster is not None
            secrets += [key.key for key in made.store.cluster.network_keys]
            replies = [
                rotated,
                await stub.GetCluster(ClusterRequest()),
                await stub.GetNetwork(GetRequest(ref="front")),
            ]
    shown = b"".join(reply.SerializeToString() for reply in replies)
    assert not any(secret in shown for secret in secrets)
    assert not any(repr(secret)[2:-1] in repr(logged) or secret.hex() in repr(logged) for secret in secrets)


def test_a_node_object_that_changes_keeps_no_key() -> None:
    """Nodes and networks travel to every viewer; keys are of the cluster object alone."""
    assert not {field.name for kind in (Node, Network) for field in kind.DESCRIPTOR.fields} & {"network_keys", "keys"}
    assert copy_of(with_ring()).network_keys
