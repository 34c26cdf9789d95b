"""From what a person typed to an object: its ID, its name, or the beginning of its ID, in this order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from proto.objects_pb2 import Network, Node, Service, Task
from swarm.errors import Invalid, NotFound
from swarm.store.changes import Record
from swarm.store.store import Store
from swarm.store.table import Table

SELF = "self"
"""As a reference to a node: the one that the question was asked on."""

T = TypeVar("T", bound=Record)


def find_service(store: Store, ref: str) -> Service:
    """Raises NotFound, or Invalid when several match."""
    found = _find(store.services, ref, "service", lambda: store.services.by_name(ref))
    if found is None:
        raise NotFound(f"no such service: {ref}")
    return found


def find_network(store: Store, ref: str) -> Network:
    """Raises NotFound, or Invalid when several match."""
    found = _find(store.networks, ref, "network", lambda: store.networks.by_name(ref))
    if found is None:
        raise NotFound(f"network {ref} not found")
    return found


def find_task(store: Store, ref: str) -> Task:
    """Raises NotFound, or Invalid when several match. A name is wpinst.3.<task id>."""
    found = _find(store.tasks, ref, "task", lambda: store.tasks.get(ref.rpartition(".")[2]) if "." in ref else None)
    if found is None:
        raise NotFound(f"no such task: {ref}")
    return found


def find_slot(store: Store, ref: str) -> tuple[Service, int] | None:
    """A service's slot as people name it: wpinst.3."""
    name, _, slot = ref.rpartition(".")
    service = store.services.by_name(name) if slot.isdecimal() else None
    return (service, int(slot)) if service is not None else None


def find_node(store: Store, ref: str, own_id: str) -> Node:
    """`own_id` is what "self" means. Raises NotFound, or Invalid when several nodes match."""
    if ref == SELF:
        ref = own_id
    found = _find(store.nodes, ref, "node", lambda: _by_hostname(store, ref))
    if found is None:
        raise NotFound(f"node {ref} not found")
    return found


def _by_hostname(store: Store, hostname: str) -> Node | None:
    matches = [node for node in store.nodes if node.description.hostname == hostname]
    if len(matches) > 1:
        raise Invalid(f"node {hostname} is ambiguous ({len(matches)} matches found): use the node's ID")
    return matches[0] if matches else None


def _find(table: Table[T], ref: str, kind: str, by_name: Callable[[], T | None]) -> T | None:
    if not ref:
        raise Invalid(f"no {kind} is named: give a name or an ID")
    exact = table.get(ref) or by_name()
    if exact is not None:
        return exact
    matches = [record for record in table if record.id.startswith(ref)]
    if len(matches) > 1:
        raise Invalid(f"{kind} {ref} is ambiguous ({len(matches)} matches found on ID prefix)")
    return matches[0] if matches else None
