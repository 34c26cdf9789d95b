"""The stage: keys of encrypted networks, a ring of three, in which every PERIOD_S a new one replaces the oldest.

Nodes send with the second newest and accept all three. So a key is in use for a whole period before anybody needs it,
and is accepted for another after it was last sent with: a node may miss one rotation, not two.
"""

from __future__ import annotations

from collections.abc import Callable

from proto.objects_pb2 import Cluster, NetworkKey
from swarm.store.changes import Decision, Update, copy_of
from swarm.store.dirty import Dirty
from swarm.store.states import is_encrypted
from swarm.store.store import Store

RING_KEYS = 3
KEY_BYTES = 20
"""AES-128 and the salt of rfc4106(gcm(aes))."""
PERIOD_S = 12 * 3600.0
"""As the reference."""

RandomBytes = Callable[[int], bytes]


def decide(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty, *, random_bytes: RandomBytes) -> Decision:
    """A whole ring with the first encrypted network; then a key per period, as long as there is such a network."""
    cluster = store.cluster
    if cluster is None or not any(is_encrypted(network) for network in store.networks):
        return Decision()
    if len(cluster.network_keys) < RING_KEYS:
        return Decision(((Update(filled(cluster, now, random_bytes)),),), wake_at=now + PERIOD_S)
    due_at = cluster.network_keys[0].created_at + PERIOD_S
    if now < due_at:
        return Decision(wake_at=due_at)
    return Decision(((Update(rotated(cluster, now, random_bytes)),),), wake_at=now + PERIOD_S)


def rotated(cluster: Cluster, now: float, random_bytes: RandomBytes) -> Cluster:
    """The cluster with a new newest key, without its oldest."""
    changed = copy_of(cluster)
    ring = cluster.network_keys
    new = NetworkKey(key=random_bytes(KEY_BYTES), serial=ring[0].serial + 1 if ring else 1, created_at=now)
    del changed.network_keys[:]
    changed.network_keys.extend([new, *ring[: RING_KEYS - 1]])
    return changed


def filled(cluster: Cluster, now: float, random_bytes: RandomBytes) -> Cluster:
    """The cluster with a whole ring."""
    while len(cluster.network_keys) < RING_KEYS:
        cluster = rotated(cluster, now, random_bytes)
    return cluster
