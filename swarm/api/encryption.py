"""The swarm's settings, autolock among them: whether managers' files are wrapped, and with which key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from proto.control_pb2 import ClusterUpdateRequest
from proto.objects_pb2 import Cluster
from swarm.api.backend import Backend
from swarm.api.nodes import the_cluster
from swarm.errors import Invalid
from swarm.security.ca import NODE_EXPIRY_MIN_S
from swarm.security.unlock_key import locked, random_key
from swarm.store.changes import Group, Update, copy_of

_SETTINGS: dict[Literal["task_history_limit", "heartbeat_period_s", "node_cert_expiry_s"], tuple[str, float, float]] = {
    "task_history_limit": ("task history limit", 1, 10_000),
    "heartbeat_period_s": ("dispatcher heartbeat in seconds", 0.1, 3_600),
    "node_cert_expiry_s": ("certificate expiry in seconds", NODE_EXPIRY_MIN_S, 100 * 365 * 86_400),
}
"""What each is called, its least and its greatest value. With more tasks kept for each slot the managers' memory would
hold little else; more heartbeats a second would fill a core of the leader's with 50 nodes."""


def updated(cluster: Cluster, request: ClusterUpdateRequest, key: bytes) -> Cluster | None:
    """The cluster as the request wants it; None when it is so already. `key`: 32 fresh bytes, used if one is needed.
    Raises Invalid: a value out of range; rotation while autolock is off, or is being turned off."""
    changed = _with_settings(cluster, request)
    is_on = cluster.spec.encryption.auto_lock_managers
    wanted = request.auto_lock_managers if request.HasField("auto_lock_managers") else is_on
    if request.rotate_unlock_key and not wanted:
        raise Invalid("cannot rotate because autolock is not turned on")
    if wanted and (not is_on or request.rotate_unlock_key):
        changed = locked(changed, key)
    elif is_on and not wanted:
        changed = locked(changed, b"")
    return None if changed == cluster else changed


def _with_settings(cluster: Cluster, request: ClusterUpdateRequest) -> Cluster:
    changed = copy_of(cluster)
    for field, (name, least, most) in _SETTINGS.items():
        if request.HasField(field):
            value = getattr(request, field)
            if not least <= value <= most:
                raise Invalid(f"{name}: {value:g} is out of range: use {least:g} to {most:.0f}")
            setattr(changed.spec, field, value)
    return changed


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
