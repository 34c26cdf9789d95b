"""The stage: numbers for nodes, subnets for networks, endpoints for services, addresses for tasks.

Nothing is remembered outside the store: what is in use is read off the objects that use it, so a new leader
cannot disagree with an old one, and an address is free when the object that held it has stopped or is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from proto import objects_pb2 as pb
from proto.objects_pb2 import Network, Node, Service, Task, TaskSpec, VirtualIP
from swarm.allocate import ports, subnets
from swarm.allocate.addresses import Hosts
from swarm.store.changes import Decision, Group, Update, copy_of
from swarm.store.dirty import Dirty
from swarm.store.store import Store


def decide(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
    """Allocate whatever lacks an allocation. Errors are written to `allocation_error`, or to a task's `status.err`,
    only when they change; what failed is tried again whenever something was freed or changed."""
    groups: list[Group] = []
    groups.extend(_number_nodes(store, dirty))
    groups.extend(_allocate_networks(store))
    hosts = HostsCache(store)
    groups.extend(_allocate_services(store, dirty, hosts))
    groups.extend(_allocate_tasks(store, now, hosts))
    return Decision(tuple(groups))


class HostsCache:
    """Address books of the networks that this pass touches."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hosts: dict[str, Hosts] = {}

    def of(self, network: Network) -> Hosts:
        hosts = self._hosts.get(network.id)
        if hosts is None:
            hosts = self._hosts[network.id] = Hosts(self._store, network)
        return hosts


# ---------------------------------------------------------------- nodes and networks


def _number_nodes(store: Store, dirty: Dirty) -> Iterator[Group]:
    candidates = list(store.nodes) if dirty.everything else [store.nodes.get(node_id) for node_id in dirty.nodes]
    new = sorted((node for node in candidates if node is not None and not node.index), key=lambda node: node.id)
    if not new:
        return
    used = {node.index for node in store.nodes}
    number = 1
    for node in new:
        while number in used:
            number += 1
        used.add(number)
        numbered: Node = copy_of(node)
        numbered.index = number
        yield (Update(numbered),)


def _allocate_networks(store: Store) -> Iterator[Group]:
    new = [network for network in store.networks if not network.vni and not network.pending_delete]
    if not new:
        return
    new.sort(key=lambda network: (not network.spec.ingress, network.meta.created_at, network.id))
    used_vnis = {network.vni for network in store.networks if network.vni}
    fresh: list[subnets.Taken] = []
    for network in new:
        vni = subnets.next_vni(used_vnis, network.spec.ingress)
        made = subnets.allocated(store, network, vni, subnets.in_use(store, but=network.id) + fresh)
        if isinstance(made, subnets.Refused):
            if network.allocation_error != made.why:
                failed = copy_of(network)
                failed.allocation_error = made.why
                yield (Update(failed),)
            continue
        used_vnis.add(vni)
        net = subnets.parse_subnet(made.ipam.subnet)
        assert not isinstance(net, subnets.Refused), made.ipam.subnet
        fresh.append(subnets.Taken(net, f"network {network.spec.annotations.name}"))
        yield (Update(made),)


# ---------------------------------------------------------------- services


def attachments(store: Store, spec: TaskSpec, publishes: bool) -> list[tuple[str, list[str]]]:
    """The networks that tasks of this spec join, as (network ID, aliases), in order: its own; and the ingress
    network when it has none, or publishes ports and all of its own are internal. A service that is on internal
    networks only and publishes nothing stays there: it has no way out."""
    joined = [(config.network_id, list(config.aliases)) for config in spec.networks]
    known = [store.networks.get(network_id) for network_id, _ in joined]
    if any(network is not None and not network.spec.internal for network in known):
        return joined
    if joined and not publishes:
        return joined
    ingress = ingress_network(store)
    if ingress is not None and all(network_id != ingress.id for network_id, _ in joined):
        joined.append((ingress.id, []))
    return joined


def ingress_network(store: Store) -> Network | None:
    """The predefined network of services that name none."""
    return next((network for network in store.networks if network.spec.ingress), None)


def _vip_networks(service: Service) -> list[str]:
    """Networks on which the service has a virtual IP; the ingress network serves no names, so none there."""
    if service.spec.endpoint.mode != pb.VIP:
        return []
    return list(dict.fromkeys(config.network_id for config in service.spec.task.networks))


def is_allocated(service: Service) -> bool:
    """Ports and VIPs are as the spec asks."""
    if service.allocation_error or service.endpoint.spec.mode != service.spec.endpoint.mode:
        return False
    if [vip.network_id for vip in service.endpoint.virtual_ips] != _vip_networks(service):
        return False
    asked, given = service.spec.endpoint.ports, service.endpoint.spec.ports
    return len(asked) == len(given) and all(_is_given(a, g) for a, g in zip(asked, given, strict=True))


def _is_given(asked: pb.PortConfig, given: pb.PortConfig) -> bool:
    return (
        bool(given.published_port)
        and asked.published_port in (0, given.published_port)
        and (asked.name, asked.protocol, asked.target_port, asked.mode)
        == (given.name, given.protocol, given.target_port, given.mode)
    )


def _allocate_services(store: Store, dirty: Dirty, hosts: HostsCache) -> Iterator[Group]:
    if dirty.everything or dirty.networks or dirty.freed:
        candidates = list(store.services)
    else:
        named = (store.services.get(service_id) for service_id in dirty.services)
        candidates = [service for service in named if service is not None]
    lacking = [service for service in candidates if not service.pending_delete and not is_allocated(service)]
    lacking.sort(key=lambda service: (service.meta.created_at, service.id))
    given: list[Service] = []
    for service in lacking:
        others = ports.PortMap(store, service.id)
        for other in given:
            others.add(other, other.endpoint.spec.ports)
        made = _allocated_service(store, service, others, hosts)
        given.append(made)
        if made != service:
            yield (Update(made),)


def _allocated_service(store: Store, service: Service, others: ports.PortMap, hosts: HostsCache) -> Service:
    """The service with its endpoint, or unchanged but for the reason why not."""
    made = copy_of(service)
    endpoint = ports.assign(service, others)
    if isinstance(endpoint, str):
        made.allocation_error = endpoint
        return made
    held = {vip.network_id: vip.address for vip in service.endpoint.virtual_ips}
    vips: list[VirtualIP] = []
    for network_id in _vip_networks(service):
        network = store.networks.get(network_id)
        why = _why_unusable(network, network_id)
        if why is not None or network is None:
            made.allocation_error = why or ""
            return made
        address = held.get(network_id) or hosts.of(network).take()
        if address is None:
            made.allocation_error = f"no virtual IP: {hosts.of(network).exhausted()}"
            return made
        vips.append(VirtualIP(network_id=network_id, address=address))
    made.allocation_error = ""
    made.endpoint.spec.CopyFrom(endpoint)
    del made.endpoint.virtual_ips[:]
    made.endpoint.virtual_ips.extend(vips)
    return made


def _why_unusable(network: Network | None, network_id: str) -> str | None:
    if network is None:
        return f"network {network_id} does not exist any more: update the service without it"
    name = network.spec.annotations.name
    if network.pending_delete:
        return f"network {name} is being removed: update the service without it"
    if not network.vni:
        return f"network {name} has no subnet yet" + (f": {network.allocation_error}" * bool(network.allocation_error))
    return None


# ---------------------------------------------------------------- tasks


def _allocate_tasks(store: Store, now: float, hosts: HostsCache) -> Iterator[Group]:
    waiting = store.tasks.where("allocation", "waiting")
    waiting.sort(key=lambda task: (task.service_id, task.slot, task.id))
    ready: dict[str, str | None] = {}
    for task in waiting:
        if task.service_id not in ready:
            ready[task.service_id] = _why_service_is_not_ready(store, task.service_id)
        why = ready[task.service_id]
        made = _allocated_task(store, task, now, hosts) if why is None else why
        if isinstance(made, Task):
            yield (Update(made),)
        elif made and task.status.err != made:
            failed = copy_of(task)
            failed.status.err = made
            failed.status.timestamp = failed.status.applied_at = now
            yield (Update(failed),)


def _why_service_is_not_ready(store: Store, service_id: str) -> str | None:
    """None = its tasks can be allocated; "" = not yet, but nothing is wrong; else what is wrong."""
    service = store.services.get(service_id)
    if service is None:
        return ""
    if is_allocated(service):
        return None
    return service.allocation_error


def _allocated_task(store: Store, task: Task, now: float, hosts: HostsCache) -> Task | str:
    """The task with one address per network, PENDING; or why it cannot have them."""
    made = copy_of(task)
    del made.networks[:]
    service = store.services.get(task.service_id)
    publishes = service is not None and bool(service.endpoint.spec.ports)
    for network_id, aliases in attachments(store, task.spec, publishes):
        network = store.networks.get(network_id)
        why = _why_unusable(network, network_id)
        if why is not None or network is None:
            return why or ""
        address = hosts.of(network).take()
        if address is None:
            return hosts.of(network).exhausted()
        made.networks.add(network_id=network_id, address=address, aliases=aliases)
    if service is not None:
        made.endpoint.CopyFrom(service.endpoint.spec)
    made.status.Clear()
    made.status.state = pb.TASK_PENDING
    made.status.timestamp = made.status.applied_at = now
    made.status.message = "pending task scheduling"
    return made
