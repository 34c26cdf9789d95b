"""Nodes and the cluster through the control API."""

from __future__ import annotations

import grpc
import pytest

from proto import control_pb2 as pb
from proto import objects_pb2 as objects
from proto.objects_pb2 import Node, NodeStatus, Task
from tests.managing import Managers, a_cluster, a_node, managing
from tests.test_api_services import refused


def update_of(node: Node, **spec: int) -> pb.NodeUpdateRequest:
    request = pb.NodeUpdateRequest(id=node.id, version=node.meta.version or 1, spec=node.spec)
    for field, value in spec.items():
        setattr(request.spec, field, value)
    return request


def a_manager(node_id: str = "m1") -> Node:
    made = a_node(node_id)
    made.role = made.spec.desired_role = objects.MANAGER
    made.manager_addr = "192.0.2.1:2378"
    made.meta.version = 1
    return made


def a_worker(node_id: str = "w1", hostname: str = "", state: int = NodeStatus.READY) -> Node:
    made = a_node(node_id, hostname, state)
    made.meta.version = 1
    return made


async def test_nodes_are_found_by_self_id_hostname_and_prefix() -> None:
    records = (a_manager(), a_worker("w1abc", "box"), a_worker("w2abc", "twin"), a_worker("w3abc", "twin"))
    async with managing(a_cluster(), *records) as made:
        stub = made.stubs["m1"]
        for ref, node_id in (("self", "m1"), ("w1abc", "w1abc"), ("box", "w1abc"), ("w2", "w2abc")):
            assert (await stub.GetNode(pb.GetRequest(ref=ref))).id == node_id
        assert await refused(stub.GetNode(pb.GetRequest(ref="x"))) == (
            grpc.StatusCode.NOT_FOUND,
            "node x not found",
        )
        code, message = await refused(stub.GetNode(pb.GetRequest(ref="twin")))
        assert (code, "node twin is ambiguous (2 matches" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_managers_show_their_state() -> None:
    async with managing(a_cluster(), a_manager(), a_worker()) as made:
        listed = await made.stubs["m1"].ListNodes(pb.ListRequest())
        manager, worker = listed.nodes
        status = manager.manager_status
        assert (status.leader, status.reachable, status.addr) == (True, True, "192.0.2.1:2378")
        assert not worker.HasField("manager_status")
        managers = await made.stubs["m1"].ListNodes(
            pb.ListRequest(filter=pb.Filter(roles=[objects.NodeRole.ValueType(objects.MANAGER)]))
        )
        assert [node.id for node in managers.nodes] == ["m1"]


async def test_labels_of_the_node_and_of_its_daemon_are_told_apart() -> None:
    worker = a_worker()
    worker.spec.annotations.labels["zone"] = "a"
    worker.description.engine_labels["disk"] = "ssd"
    async with managing(a_cluster(), worker) as made:

        async def found(**wanted: dict[str, str]) -> int:
            request = pb.ListRequest(filter=pb.Filter(**wanted))  # type: ignore[arg-type]
            return len((await made.stubs["m1"].ListNodes(request)).nodes)

        assert (await found(labels={"zone": ""}), await found(labels={"disk": ""})) == (1, 0)
        assert (await found(engine_labels={"disk": "ssd"}), await found(engine_labels={"zone": "a"})) == (1, 0)


async def test_availability_role_and_labels_are_updated_at_the_version_that_was_read() -> None:
    async with managing(a_cluster(), a_worker()) as made:
        stub = made.stubs["m1"]
        drained = await stub.UpdateNode(update_of(a_worker(), availability=objects.DRAINED))
        assert drained.spec.availability == objects.DRAINED
        code, _ = await refused(stub.UpdateNode(update_of(a_worker(), availability=objects.PAUSED)))
        assert code is grpc.StatusCode.ABORTED
        promoted = await stub.UpdateNode(update_of(drained, desired_role=objects.MANAGER))
        assert (promoted.spec.desired_role, promoted.role) == (objects.MANAGER, objects.WORKER)
        code, message = await refused(stub.UpdateNode(update_of(promoted, availability=9)))
        assert (code, "availability: unknown value 9" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_a_demotion_that_would_lose_quorum_is_refused_in_the_guards_words() -> None:
    async with managing(a_cluster(), a_manager()) as made:
        made["m1"].refusal = "the last manager cannot be demoted"
        request = update_of(a_manager(), desired_role=objects.WORKER)
        assert await refused(made.stubs["m1"].UpdateNode(request)) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "the last manager cannot be demoted",
        )
        made["m1"].refusal = None
        demoted = await made.stubs["m1"].UpdateNode(request)
        assert demoted.spec.desired_role == objects.WORKER


def a_task(task_id: str, state: int = objects.TASK_RUNNING) -> Task:
    made = Task(id=task_id, node_id="w1")
    made.status.state = objects.TaskState.ValueType(state)
    return made


def states(made: Managers) -> dict[str, int]:
    return {task.id: task.status.state for task in made.store.tasks}


@pytest.mark.parametrize(("state", "force"), [(NodeStatus.DOWN, False), (NodeStatus.READY, True)])
async def test_a_removed_node_is_blocked_and_its_tasks_are_orphaned(state: int, force: bool) -> None:
    tasks = [a_task(f"t{number}") for number in range(1200)]
    async with managing(a_cluster(), a_worker(state=state), *tasks, a_task("over", objects.TASK_FAILED)) as made:
        request = pb.RemoveRequest(ref="w1", force=force)
        for _ in range(2):  # the second is the same request, delivered again
            await made.stubs["m1"].RemoveNode(request, metadata=(("request-id", "r"),))
        assert "w1" not in made.store.nodes
        assert made.store.cluster is not None
        assert "w1" in made.store.cluster.blocked_certificates
        after = states(made)
        assert after.pop("over") == objects.TASK_FAILED
        assert set(after.values()) == {objects.TASK_ORPHANED}


async def test_nodes_that_may_not_be_removed() -> None:
    async with managing(a_cluster(), a_manager(), a_worker()) as made:
        before = made.store.digest()
        for ref, force, message in (
            ("m1", True, "is a cluster manager and is a member of the raft cluster"),
            ("self", False, "must be demoted to worker"),
            ("w1", False, "node w1 is not down and can't be removed"),
        ):
            code, told = await refused(made.stubs["m1"].RemoveNode(pb.RemoveRequest(ref=ref, force=force)))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert message in told
        assert made.store.digest() == before


async def test_the_cluster_is_shown_without_the_key_and_a_rotated_token_is_new() -> None:
    async with managing(a_cluster()) as made:
        stub = made.stubs["m1"]
        shown = await stub.GetCluster(pb.ClusterRequest())
        assert (shown.root_ca_key_pem, shown.root_ca_cert_pem) == (b"", b"-----CERT-----")
        rotated = await stub.RotateJoinToken(pb.RotateTokenRequest(role=objects.MANAGER))
        assert rotated.root_ca_key_pem == b""
        assert rotated.join_tokens.worker == shown.join_tokens.worker
        assert rotated.join_tokens.manager != shown.join_tokens.manager
        assert rotated.join_tokens.manager.startswith("SWMTKN-1-")
        assert made.store.cluster is not None
        assert made.store.cluster.root_ca_key_pem == b"-----KEY-----"


async def test_settings_of_the_swarm_are_changed_one_by_one() -> None:
    async with managing(a_cluster(), a_manager()) as made:
        stub = made.stubs["m1"]
        await stub.UpdateCluster(pb.ClusterUpdateRequest(task_history_limit=2))
        shown = await stub.UpdateCluster(pb.ClusterUpdateRequest(heartbeat_period_s=3, node_cert_expiry_s=7200))
        spec = shown.spec
        assert (spec.task_history_limit, spec.heartbeat_period_s, spec.node_cert_expiry_s) == (2, 3, 7200)
        assert not shown.spec.encryption.auto_lock_managers
        for bad, why in (
            (pb.ClusterUpdateRequest(task_history_limit=0), "task history limit: 0 is out of range: use 1 to 10000"),
            (pb.ClusterUpdateRequest(heartbeat_period_s=0.01), "dispatcher heartbeat in seconds: 0.01 is out of range"),
            (pb.ClusterUpdateRequest(node_cert_expiry_s=60), "certificate expiry in seconds: 60 is out of range"),
            (pb.ClusterUpdateRequest(heartbeat_period_s=float("nan")), "nan is out of range"),
        ):
            code, told = await refused(stub.UpdateCluster(bad))
            assert (code, why in told) == (grpc.StatusCode.INVALID_ARGUMENT, True), told


async def test_the_unlock_key_has_its_own_call_and_a_repeated_rotation_is_one() -> None:
    async with managing(a_cluster(), a_manager(), names=("m1", "m2")) as made:
        stub = made.stubs["m2"]
        asked = pb.UnlockKeyRequest()
        assert (await stub.GetUnlockKey(asked)).unlock_key == ""
        shown = await stub.UpdateCluster(pb.ClusterUpdateRequest(auto_lock_managers=True))
        assert (shown.spec.encryption.auto_lock_managers, shown.unlock_key) == (True, b"")
        first = (await stub.GetUnlockKey(asked)).unlock_key
        assert first.startswith("SWMKEY-1-")
        for _ in range(2):
            rotate = pb.ClusterUpdateRequest(rotate_unlock_key=True)
            shown = await stub.UpdateCluster(rotate, metadata=(("request-id", "once"),))
            assert shown.unlock_revision == 2
        second = (await made.stubs["m1"].GetUnlockKey(asked)).unlock_key
        assert second != first
        await stub.UpdateCluster(pb.ClusterUpdateRequest(auto_lock_managers=False))
        assert (await stub.GetUnlockKey(asked)).unlock_key == ""
        code, told = await refused(stub.UpdateCluster(pb.ClusterUpdateRequest(rotate_unlock_key=True)))
        assert (code, told) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "cannot rotate because autolock is not turned on",
        )
