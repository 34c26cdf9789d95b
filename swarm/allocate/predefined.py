"""Networks that exist in every swarm, and those that tasks join."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from proto import objects_pb2 as pb
from proto.objects_pb2 import Network, PortConfig, TaskSpec
from swarm.store import drivers
from swarm.store.changes import Create, Group
from swarm.store.store import Store


def missing(store: Store, new_id: Callable[[], str]) -> Iterator[Group]:
    """The nodes' own networks, which the state of an older version lacks. The ingress network is made with the swarm
    and by users: one that they removed stays away."""
    for name in drivers.PREDEFINED:
        if store.networks.by_name(name) is None:
            made = Network(id=new_id())
            made.spec.annotations.name = made.spec.driver = name
            yield (Create(made),)


def ingress_network(store: Store) -> Network | None:
    """The network of services that name none; it carries published traffic of those without a way out."""
    return next((network for network in store.networks if network.spec.ingress), None)


def needs_ingress(store: Store, spec: TaskSpec, ports: Iterable[PortConfig]) -> bool:
    """Whether tasks of this spec join the ingress network besides their own: when they have none, or publish ports
    that none of their own could carry. A service that is on internal networks only and publishes nothing stays there:
    it has no way out."""
    known = [network for config in spec.networks if (network := store.networks.get(config.network_id)) is not None]
    if not spec.networks:
        return True
    if any(drivers.is_exclusive(network) or drivers.leads_out(network) for network in known):
        return False
    modes = {port.mode for port in ports}
    return pb.INGRESS in modes or (pb.HOST in modes and all(net.spec.driver != drivers.BRIDGE for net in known))


def attachments(
    store: Store, spec: TaskSpec, ports: Iterable[PortConfig], ingress: Network | None
) -> list[tuple[str, list[str]]] | str:
    """The networks that tasks of this spec join, as (network ID, aliases), in order; a text says why they cannot."""
    joined = [(config.network_id, list(config.aliases)) for config in spec.networks]
    if not needs_ingress(store, spec, ports):
        return joined
    if ingress is None:
        return NO_INGRESS
    if all(network_id != ingress.id for network_id, _ in joined):
        joined.append((ingress.id, []))
    return joined


NO_INGRESS = (
    "the service needs the ingress network, and there is none: make one with `pyswarm network create --ingress NAME`,"
    " or attach the service to a network"
)
