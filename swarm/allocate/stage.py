"""The stage: numbers for nodes, subnets for networks, endpoints for services, addresses for tasks.

Nothing is remembered outside the store: what is in use is read off the objects that use it, so a new leader
cannot disagree with an old one, and an address is free when the object that held it has stopped or is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from proto import objects_pb2 as pb
from proto.objects_pb2 import EndpointSpec, Network, Node, Service, Task, VirtualIP
from swarm.allocate import ports, predefined, selfcheck, subnets
from swarm.allocate.addresses import Hosts
from swarm.store import drivers
from swarm.store.changes import Decision, Group, Update, copy_of
from swarm.store.dirty import Dirty
from swarm.store.store import Store


def decide(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
    """Allocate whatever lacks an allocation. Errors are written to `allocation_error`, or to a task's `status.err`,
    only when they change; what failed is tried again whenever something was freed or changed. A look at everything,
    as a new leader begins with, checks first what others have allocated, and allocates once that is repaired."""
    found = selfcheck.Found()
    if dirty.everything and store.cluster is not None:
        found = selfcheck.check(store)
        repairs = (*predefined.missing(store, new_id), *found.repairs)
        if repairs:
            return Decision(repairs, notes=found.notes)
    taken = Pass(store)
    groups: tuple[Group, ...] = (
        *_number_nodes(store, dirty),
        *_allocate_networks(store),
        *_allocate_services(taken, dirty),
        *_allocate_tasks(taken, now),
    )
    return Decision(groups, notes=found.notes)


class Pass:
    """What one pass has given out already, and what it looks up again and again."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ingress = predefined.ingress_network(store)
        self._hosts: dict[str, Hosts] = {}
        self._ports: ports.PortMap | None = None
        self._attachments: dict[tuple[str, int], list[tuple[str, list[str]]] | str] = {}

    def hosts(self, network: Network) -> Hosts:
        hosts = self._hosts.get(network.id)
        if hosts is None:
            hosts = self._hosts[network.id] = Hosts(self.store, network)
        return hosts

    @property
    def ports(self) -> ports.PortMap:
        if self._ports is None:
            self._ports = ports.PortMap(self.store.services)
        return self._ports

    def attachments(self, task: Task, endpoint: EndpointSpec) -> list[tuple[str, list[str]]] | str:
        """The same for all tasks of one spec."""
        key = (task.service_id or task.id, task.spec_version)
        if key not in self._attachments:
            self._attachments[key] = predefined.attachments(self.store, task.spec, endpoint.ports, self.ingress)
        return self._attachments[key]


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
    new = [network for network in store.networks if not drivers.is_ready(network) and not network.pending_delete]
    new.sort(key=lambda network: (not network.spec.ingress, network.meta.created_at, network.id))
    fresh: list[Network] = []
    for network in new:
        made = subnets.allocated(store, network, fresh)
        if not isinstance(made, subnets.Refused):
            fresh.append(made)
            yield (Update(made),)
        elif network.allocation_error != made.why:
            failed = copy_of(network)
            failed.allocation_error = made.why
            yield (Update(failed),)


# ---------------------------------------------------------------- services


def _vip_networks(store: Store, service: Service) -> list[str]:
    """Networks on which the service has a virtual IP: overlays only, and not the ingress network, which serves no
    names. One that is gone counts, so that its loss is told."""
    if service.spec.endpoint.mode != pb.VIP:
        return []
    joined = dict.fromkeys(config.network_id for config in service.spec.task.networks)
    return [each for each in joined if (net := store.networks.get(each)) is None or drivers.is_overlay(net)]


def is_allocated(store: Store, service: Service) -> bool:
    """Ports and VIPs are as the spec asks."""
    if service.allocation_error or not ports.is_given(service.spec.endpoint, service.endpoint.spec):
        return False
    vips = service.endpoint.virtual_ips
    return [vip.network_id for vip in vips] == _vip_networks(store, service) and all(vip.address for vip in vips)


def _allocate_services(taken: Pass, dirty: Dirty) -> Iterator[Group]:
    store = taken.store
    candidates = list(store.services) if dirty.everything or dirty.networks or dirty.freed else []
    if dirty.services and not candidates:
        # What one was given may be why another waits now: its reason is to be that.
        candidates = [each for each in store.services if each.allocation_error or each.id in dirty.services]
    lacking = [each for each in candidates if not each.pending_delete and not is_allocated(store, each)]
    lacking.sort(key=lambda service: (service.meta.created_at, service.id))
    for service in lacking:
        made = _allocated_service(taken, service)
        if made != service:
            taken.ports.add(made, made.endpoint.spec.ports)
            yield (Update(made),)


def _allocated_service(taken: Pass, service: Service) -> Service:
    """The service with its endpoint, or unchanged but for the reason why not."""
    store, made = taken.store, copy_of(service)
    endpoint = ports.assign(service, taken.ports)
    if isinstance(endpoint, str):
        made.allocation_error = endpoint
        return made
    held = {vip.network_id: vip for vip in service.endpoint.virtual_ips if vip.address}
    vips: list[VirtualIP] = []
    for network_id in _vip_networks(store, service):
        network = store.networks.get(network_id)
        why = _why_unusable(network, network_id)
        if why is not None or network is None:
            made.allocation_error = why or ""
            return made
        if network_id in held:
            vips.append(held[network_id])
            continue
        addresses = taken.hosts(network).take()
        if addresses is None:
            made.allocation_error = f"no virtual IP: {taken.hosts(network).exhausted()}"
            return made
        vips.append(VirtualIP(network_id=network_id, address=addresses[0], address6=addresses[1]))
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
    if not drivers.is_ready(network):
        return f"network {name} has no subnet yet" + (f": {network.allocation_error}" * bool(network.allocation_error))
    return None


# ---------------------------------------------------------------- tasks


def _allocate_tasks(taken: Pass, now: float) -> Iterator[Group]:
    waiting = taken.store.tasks.where("allocation", "waiting")
    waiting.sort(key=lambda task: (task.service_id, task.slot, task.id))
    ready: dict[str, str | None] = {}
    for task in waiting:
        if task.service_id not in ready:
            ready[task.service_id] = _why_service_is_not_ready(taken.store, task.service_id)
        why = ready[task.service_id]
        made = _allocated_task(taken, task, now) if why is None else why
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
    if is_allocated(store, service):
        return None
    return service.allocation_error


def _allocated_task(taken: Pass, task: Task, now: float) -> Task | str:
    """The task with one address per network, PENDING; or why it cannot have them. Nodes themselves give addresses on
    networks of their own."""
    made = copy_of(task)
    del made.networks[:]
    service = taken.store.services.get(task.service_id)
    endpoint = service.endpoint.spec if service is not None else EndpointSpec()
    joined = taken.attachments(task, endpoint)
    if isinstance(joined, str):
        return joined
    for network_id, aliases in joined:
        network = taken.store.networks.get(network_id)
        why = _why_unusable(network, network_id)
        if why is not None or network is None:
            return why or ""
        leg = made.networks.add(network_id=network_id, aliases=aliases)
        if not drivers.is_local(network):
            addresses = taken.hosts(network).take()
            if addresses is None:
                return taken.hosts(network).exhausted()
            leg.address, leg.address6 = addresses
    if service is not None:
        made.endpoint.CopyFrom(endpoint)
    made.status.Clear()
    made.status.state = pb.TASK_PENDING
    made.status.timestamp = made.status.applied_at = now
    made.status.message = "pending task scheduling"
    return made
