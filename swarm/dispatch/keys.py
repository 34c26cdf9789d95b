"""Keys of encrypted networks on their way to nodes: who is told, and who has confirmed that its kernel accepts them.

Told are nodes that use an encrypted network, and nobody else. A rotation by hand waits until all of them have the keys
of the one before (`settled`), so that no number of rotations, however quick, loses a packet.
"""

from __future__ import annotations

import asyncio

from proto.dispatch_pb2 import NetworkKeys
from proto.objects_pb2 import NetworkKey, Node
from swarm.dispatch.assignments import AssignmentIndex
from swarm.dispatch.items import is_down
from swarm.store.store import Store


class KeyDistribution:
    """Of one term of leadership."""

    def __init__(self, store: Store, index: AssignmentIndex) -> None:
        self._store = store
        self._index = index
        self._sent: dict[str, tuple[int, ...]] = {}
        """Node with a session -> serials that it was told."""
        self._confirmed: dict[str, int] = {}
        self._changed = asyncio.Event()

    def news(self, node_id: str) -> NetworkKeys | None:
        """What the node has to be told now, None = nothing. The first of a session is told always."""
        ring = self._ring() if self._is_entitled(self._store.nodes.get(node_id)) else []
        serials = tuple(key.serial for key in ring)
        if self._sent.get(node_id) == serials:
            return None
        self._sent[node_id] = serials
        return NetworkKeys(keys=ring)

    def confirmed(self, node_id: str, serial: int) -> None:
        self._confirmed[node_id] = serial
        self._changed.set()

    def session_ended(self, node_id: str) -> None:
        self._sent.pop(node_id, None)
        self._confirmed.pop(node_id, None)

    def behind(self) -> list[str]:
        """Nodes that use the keys, are not down, and have not confirmed the newest one."""
        ring = self._ring()
        return [
            node.id
            for node in self._store.nodes
            if ring and self._is_entitled(node) and not is_down(node) and self._confirmed.get(node.id) != ring[0].serial
        ]

    async def settled(self) -> None:
        """Return when nobody is behind. The caller sets the deadline."""
        unsubscribe = self._store.subscribe(lambda _: self._changed.set())
        try:
            while self.behind():
                self._changed.clear()
                await self._changed.wait()
        finally:
            unsubscribe()

    def _ring(self) -> list[NetworkKey]:
        cluster = self._store.cluster
        return list(cluster.network_keys) if cluster is not None else []

    def _is_entitled(self, node: Node | None) -> bool:
        return node is not None and node.description.encrypts and self._index.uses_encryption(node.id)
