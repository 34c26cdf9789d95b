"""This node's copy of what the managers assigned to it: a dictionary of items, moved by snapshots and
chained deltas. A delta which does not continue what is known is refused, never guessed at: the session
is opened again and begins with a snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from proto.dispatch_pb2 import Assignments, Item, NetworkEndpoint
from proto.objects_pb2 import Network, Task

TASK_PREFIX, ENDPOINT, NETWORK, SERVICE = "task/", "endpoint/", "network/", "service/"
"""How the keys of items begin; the rest is IDs."""


class ChainBroken(Exception):
    """A delta does not follow the last one: only a snapshot helps."""


@dataclass(frozen=True, slots=True)
class Mirror:
    known: bool = False
    """False until the first snapshot since this process started: nothing may be removed on its account."""
    sequence: int = 0
    items: Mapping[str, Item] = field(default_factory=dict)

    def task(self, task_id: str) -> Task | None:
        item = self.items.get(TASK_PREFIX + task_id)
        return item.task if item is not None else None

    def endpoint(self, network_id: str, task_id: str) -> NetworkEndpoint | None:
        item = self.items.get(f"{ENDPOINT}{network_id}/{task_id}")
        return item.endpoint if item is not None else None

    def network(self, network_id: str) -> Network | None:
        item = self.items.get(NETWORK + network_id)
        return item.network if item is not None else None

    def tasks(self) -> Iterator[Task]:
        return (item.task for item in self._all(TASK_PREFIX))

    def endpoints(self) -> Iterator[NetworkEndpoint]:
        return (item.endpoint for item in self._all(ENDPOINT))

    def networks(self) -> Iterator[Network]:
        return (item.network for item in self._all(NETWORK))

    def _all(self, prefix: str) -> list[Item]:
        """In the order of their keys."""
        return [self.items[key] for key in sorted(key for key in self.items if key.startswith(prefix))]


def applied(mirror: Mirror, message: Assignments) -> Mirror:
    """The mirror after one message. Raises ChainBroken; the mirror given is never changed."""
    if message.snapshot:
        items: dict[str, Item] = {}
    elif not mirror.known or message.base != mirror.sequence:
        raise ChainBroken(f"the managers sent changes on top of {message.base}, this node knows {mirror.sequence}")
    else:
        items = dict(mirror.items)
    for change in message.changes:
        key, item = change.key, change.item
        if item.WhichOneof("item"):
            items[key] = item
        else:
            items.pop(key, None)
    return Mirror(known=True, sequence=message.result, items=items)


def touched_tasks(before: Mirror, message: Assignments) -> tuple[str, ...]:
    """IDs of the tasks that this message may have added, changed or removed, sorted."""
    keys = {change.key for change in message.changes}
    if message.snapshot:
        keys |= before.items.keys()
    return tuple(sorted(key.removeprefix(TASK_PREFIX) for key in keys if key.startswith(TASK_PREFIX)))
