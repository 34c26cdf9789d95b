"""Creating and removing networks.

A network is removed by marking it; the reaper deletes it once nothing uses it any more. So a service
that is created at the same instant cannot lose its network under its feet.
"""

from __future__ import annotations

import secrets

from proto.control_pb2 import RemoveReply, RotateNetworkKeysReply
from proto.objects_pb2 import INGRESS, Network, NetworkSpec, Service
from swarm.allocate import needs_ingress, subnet_conflict
from swarm.allocate.keys import RandomBytes, rotated
from swarm.allocate.predefined import ingress_network
from swarm.api import validate_network
from swarm.api.backend import Backend, object_id
from swarm.api.find import find_network
from swarm.api.nodes import the_cluster
from swarm.errors import AlreadyExists, Busy, InUse, Invalid, NotFound
from swarm.store import drivers
from swarm.store.changes import Create, Group, Update
from swarm.store.states import has_stopped
from swarm.store.store import Store

REMOVAL_WAIT_S = 8.0
"""As for services: `network rm` followed by `network create` works."""
KEYS_WAIT_S = 4.0
"""For nodes to confirm a key: they do within a second, or are found down in three. Waited for twice."""
GONE_WAIT_S = 2.0
"""An unused network is gone within milliseconds; waiting for that makes the next `network ls` true."""


def created(store: Store, network_id: str, spec: NetworkSpec) -> Network:
    """The new network. Raises AlreadyExists, Invalid."""
    name = spec.annotations.name
    holder = store.networks.by_name(name)
    if holder is not None:
        state = "is still being removed; try again in a moment" if holder.pending_delete else "already exists"
        raise AlreadyExists(f"network with name {name} {state}")
    if spec.ingress and (ingress := ingress_network(store)) is not None:
        raise AlreadyExists(
            f"ingress network {ingress.spec.annotations.name} already exists, and there is one only: remove it first"
        )
    why = subnet_conflict(store, spec)
    if why is not None:
        raise Invalid(why)
    return Network(id=network_id, spec=spec)


def removal_refusal(store: Store, network: Network) -> str | None:
    """Why the network cannot go, or None. What is being removed itself is no reason."""
    name = network.spec.annotations.name
    if drivers.is_local(network):
        return f"network {name} is predefined and cannot be removed"
    for service in store.services:
        if not service.pending_delete and (why := _use(store, network, service)) is not None:
            return (
                f"network {name} is in use by service {service.spec.annotations.name}{why}: remove or update it first"
            )
    for task in store.tasks.where("network", network.id):
        owner = store.services.get(task.service_id)
        if owner is not None and owner.pending_delete:
            continue
        if not has_stopped(task):
            return f"network {name} is in use by task {task.id}: wait until it has stopped"
    return None


def _use(store: Store, network: Network, service: Service) -> str | None:
    """How the service uses the network, as the end of a sentence, or None."""
    spec = service.spec
    if any(config.network_id == network.id for config in spec.task.networks):
        return ""
    if network.spec.ingress:
        if any(port.mode == INGRESS for port in spec.endpoint.ports):
            return ", which publishes ports"
        if needs_ingress(store, spec.task, spec.endpoint.ports):
            return ", which is attached to no other network"
    return None


def _same_name(one: NetworkSpec, other: NetworkSpec) -> bool:
    return one.annotations.name.lower() == other.annotations.name.lower()


async def create(backend: Backend, spec: NetworkSpec, request_id: str) -> Network:
    store = backend.store
    full = NetworkSpec()
    full.CopyFrom(spec)
    full.driver = full.driver or drivers.OVERLAY
    full.ipv6 = full.ipv6 or bool(full.ipam6.subnet)
    validate_network.network_spec(full)
    network_id = object_id(request_id)

    def removal_is_over() -> bool:
        leaving = [network for network in store.networks if network.pending_delete]
        return not any((full.ingress and each.spec.ingress) or _same_name(full, each.spec) for each in leaving)

    def decide() -> Group:
        return () if network_id in store.networks else (Create(created(store, network_id, full)),)

    await backend.until(removal_is_over, REMOVAL_WAIT_S)
    await backend.commit(decide, request_id)
    network = store.networks.get(network_id)
    if network is None:
        raise NotFound(f"network {full.annotations.name} was removed meanwhile")
    return network


async def remove(backend: Backend, ref: str, request_id: str) -> RemoveReply:
    store = backend.store
    if backend.is_done(request_id):
        return RemoveReply(id=ref)
    network_id = find_network(store, ref).id

    def decide() -> Group:
        network = store.networks.get(network_id)
        if network is None or network.pending_delete:
            return ()
        why = removal_refusal(store, network)
        if why is not None:
            raise InUse(why)
        marked = Network()
        marked.CopyFrom(network)
        marked.pending_delete = True
        return (Update(marked),)

    await backend.commit(decide, request_id)
    if not store.tasks.count("network", network_id):
        await backend.until(lambda: network_id not in store.networks, GONE_WAIT_S)
    return RemoveReply(id=network_id)


async def rotate_keys(
    backend: Backend, request_id: str, random_bytes: RandomBytes = secrets.token_bytes
) -> RotateNetworkKeysReply:
    """A new key for encrypted networks, once every node that uses them has confirmed the one before, and until each
    has confirmed this one. Raises Invalid (there is no such network), Busy."""
    store = backend.store

    def decide() -> Group:
        cluster = the_cluster(store)
        if not cluster.network_keys:
            raise Invalid("no network is encrypted: create one with `pyswarm network create --opt encrypted NAME`")
        return (Update(rotated(cluster, backend.now(), random_bytes)),)

    if not backend.is_done(request_id):
        behind = await backend.keys_settled(KEYS_WAIT_S)
        if behind:
            raise Busy(
                f"nodes {', '.join(behind)} have not confirmed the key before this one, and would lose packets;"
                " try again when they answer (`pyswarm node ls`), or remove them"
            )
        await backend.commit(decide, request_id)
    await backend.keys_settled(KEYS_WAIT_S)
    return RotateNetworkKeysReply(serial=the_cluster(store).network_keys[0].serial)
