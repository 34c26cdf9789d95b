"""Nodes and the cluster object: availability and roles, removal, join tokens."""

from __future__ import annotations

from collections.abc import Callable

from proto import objects_pb2 as pb
from proto.control_pb2 import NodeUpdateRequest, RemoveReply
from proto.objects_pb2 import Cluster, Node, NodeSpec, NodeStatus, Task
from swarm.api import check
from swarm.api.backend import Backend
from swarm.api.find import find_node
from swarm.dispatch.presence import ORPHANS_PER_GROUP, orphaned
from swarm.errors import Conflict, InUse, Invalid, NotFound
from swarm.security.tokens import random_token
from swarm.store.changes import Group, Remove, Update
from swarm.store.states import has_stopped
from swarm.store.store import Store

DEFAULT_CERTIFICATE_S = 90 * 86_400.0
BLOCK_MARGIN_S = 7 * 86_400.0
"""A removed node's ID stays blocked until its certificate has expired, and a week for clocks that disagree."""

NewToken = Callable[[bytes], str]


# ---------------------------------------------------------------- decisions (pure)


def node_spec(spec: NodeSpec) -> None:
    """Raises Invalid, naming the field."""
    check.choice("availability", spec.availability, dict(pb.Availability.items()))
    check.choice("role", spec.desired_role, dict(pb.NodeRole.items()))
    check.labels("node labels", spec.annotations.labels)


def shown_name(node: Node) -> str:
    return node.description.hostname or node.id


def updated(node: Node, version: int, spec: NodeSpec) -> Node | None:
    """The node with this spec; None when it has it already. Raises Conflict."""
    if version != node.meta.version and spec != node.spec:
        raise Conflict(
            f"update out of sequence: node {shown_name(node)} was changed meanwhile; read it again and retry"
        )
    if spec == node.spec:
        return None
    changed = Node()
    changed.CopyFrom(node)
    changed.spec.CopyFrom(spec)
    return changed


def removal_refusal(node: Node, is_member: bool, force: bool) -> str | None:
    """Why the node cannot be removed, or None. `is_member`: of the managers' Raft."""
    name = shown_name(node)
    if is_member or pb.MANAGER in (node.role, node.spec.desired_role):
        return (
            f"node {name} is a cluster manager and is a member of the raft cluster: "
            "it must be demoted to worker before removal"
        )
    if node.status.state == NodeStatus.READY and not force:
        return f"node {name} is not down and can't be removed: stop it there with `pyswarm swarm leave`, or use --force"
    return None


def blocked(cluster: Cluster, node_id: str, now: float) -> Cluster:
    """The cluster that does not accept the node's certificate any more. `now` in Unix s."""
    changed = Cluster()
    changed.CopyFrom(cluster)
    for forgotten in [known for known, until in cluster.blocked_certificates.items() if until < now]:
        del changed.blocked_certificates[forgotten]
    lifetime_s = cluster.spec.node_cert_expiry_s or DEFAULT_CERTIFICATE_S
    changed.blocked_certificates[node_id] = now + lifetime_s + BLOCK_MARGIN_S
    return changed


def with_token(cluster: Cluster, role: pb.NodeRole.ValueType, token: str) -> Cluster:
    """The cluster with a new join token for this role."""
    changed = Cluster()
    changed.CopyFrom(cluster)
    if role == pb.MANAGER:
        changed.join_tokens.manager = token
    else:
        changed.join_tokens.worker = token
    return changed


def the_cluster(store: Store) -> Cluster:
    """Raises NotFound while the first manager is still storing it."""
    cluster = store.cluster
    if cluster is None:
        raise NotFound("the swarm is still being initialised: try again in a moment")
    return cluster


# ---------------------------------------------------------------- writing


async def update(backend: Backend, request: NodeUpdateRequest, own_id: str, request_id: str) -> Node:
    store = backend.store
    node_spec(request.spec)
    node_id = find_node(store, request.id, own_id).id
    write_id = f"{request_id}/{request.version}"

    def decide() -> Group:
        node = store.nodes.get(node_id)
        if node is None:
            raise NotFound(f"node {request.id} not found")
        changed = updated(node, request.version, request.spec)
        if changed is None:
            return ()
        if changed.spec.desired_role == pb.WORKER != node.spec.desired_role:
            why = backend.demotion_refusal(store, backend.consensus, node)
            if why is not None:
                raise InUse(why)
        return (Update(changed),)

    if not request.version:
        raise Invalid(f"update of node {request.id} carries no version: send the one that was read with the spec")
    if not backend.is_done(write_id):
        await backend.commit(decide, write_id)
    node = store.nodes.get(node_id)
    if node is None:
        raise NotFound(f"node {request.id} was removed meanwhile")
    return node


async def remove(backend: Backend, ref: str, force: bool, own_id: str, request_id: str) -> RemoveReply:
    store = backend.store
    if backend.is_done(request_id):
        return RemoveReply(id=ref)
    node_id = find_node(store, ref, own_id).id

    def tasks() -> list[Task]:
        return [task for task in store.tasks.where("node", node_id) if not has_stopped(task)]

    def decide() -> Group:
        node = store.nodes.get(node_id)
        if node is None:
            raise NotFound(f"node {ref} not found")
        is_member = any(member.node_id == node_id for member in backend.consensus.members())
        why = removal_refusal(node, is_member, force)
        if why is not None:
            raise InUse(why)
        now = backend.now()
        lost = tuple(Update(orphaned(task, now)) for task in tasks())
        return (Remove(node), Update(blocked(the_cluster(store), node_id, now)), *lost)

    # A node with very many tasks: its tasks go first, in pieces that fit into an entry of the log.
    decide()
    excess = tasks()[ORPHANS_PER_GROUP:]
    for start in range(0, len(excess), ORPHANS_PER_GROUP):
        chunk = excess[start : start + ORPHANS_PER_GROUP]
        await backend.writer.commit_all([tuple(Update(orphaned(task, backend.now())) for task in chunk)])
    await backend.commit(decide, request_id)
    return RemoveReply(id=node_id)


async def rotate_token(
    backend: Backend, role: pb.NodeRole.ValueType, request_id: str, new_token: NewToken = random_token
) -> Cluster:
    check.choice("role", role, dict(pb.NodeRole.items()))
    store = backend.store

    def decide() -> Group:
        cluster = the_cluster(store)
        return (Update(with_token(cluster, role, new_token(cluster.root_ca_cert_pem))),)

    await backend.commit(decide, request_id)
    return the_cluster(store)
