"""Autolock: whether managers' files are wrapped, and with which key."""

from __future__ import annotations

from collections.abc import Callable

from proto.control_pb2 import ClusterUpdateRequest
from proto.objects_pb2 import Cluster
from swarm.api.backend import Backend
from swarm.api.nodes import the_cluster
from swarm.errors import Invalid
from swarm.security.unlock_key import locked, random_key
from swarm.store.changes import Group, Update


def updated(cluster: Cluster, request: ClusterUpdateRequest, key: bytes) -> Cluster | None:
    """The cluster as the request wants it; None when it is so already. `key`: 32 fresh bytes, used if one is needed.
    Raises Invalid: rotation while autolock is off, or is being turned off."""
    is_on = cluster.spec.encryption.auto_lock_managers
    wanted = request.auto_lock_managers if request.HasField("auto_lock_managers") else is_on
    if request.rotate_unlock_key and not wanted:
        raise Invalid("cannot rotate because autolock is not turned on")
    if wanted and (not is_on or request.rotate_unlock_key):
        return locked(cluster, key)
    if is_on and not wanted:
        return locked(cluster, b"")
    return None


async def update(
    backend: Backend, request: ClusterUpdateRequest, request_id: str, new_key: Callable[[], bytes] = random_key
) -> Cluster:
    """Store it; every manager rewrites its files as soon as it has applied that. Raises SwarmError."""
    store = backend.store

    def decide() -> Group:
        changed = updated(the_cluster(store), request, new_key())
        return () if changed is None else (Update(changed),)

    if not backend.is_done(request_id):
        await backend.commit(decide, request_id)
    return the_cluster(store)
