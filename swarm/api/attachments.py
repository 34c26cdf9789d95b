"""What a service may ask of networks and ports together: rules that need to know the networks."""

from __future__ import annotations

import ipaddress

from proto import objects_pb2 as pb
from proto.objects_pb2 import Network, NodeStatus, ServiceSpec
from swarm.allocate import needs_ingress
from swarm.allocate.predefined import NO_INGRESS, ingress_network
from swarm.api import check
from swarm.api.find import find_network
from swarm.errors import Invalid
from swarm.store import drivers
from swarm.store.store import Store

NAMES_MAX = 5
"""Nodes that a warning names."""


def complete(store: Store, spec: ServiceSpec) -> None:
    """Set the networks' IDs, and what follows for ports. Raises NotFound, and Invalid for what networks cannot do."""
    joined = []
    for config in spec.task.networks:
        network = find_network(store, config.network_id)
        name = network.spec.annotations.name
        if network.spec.ingress:
            raise Invalid(f"a service cannot be attached to network {name} explicitly: publish a port instead")
        if network.pending_delete:
            raise Invalid(f"network {name} is being removed: create another one")
        if drivers.is_local(network) and config.aliases:
            raise Invalid(f"network {name} has no names: leave the aliases out, or use an overlay network")
        for alias in config.aliases:
            _alias(name, alias)
        config.network_id = network.id
        joined.append(network)
    for network in joined:
        if drivers.is_exclusive(network):
            _exclusive(network, len(joined), spec)
    for port in spec.endpoint.ports:
        port.host_ip = _canonical(port.host_ip)


def _alias(network: str, alias: str) -> None:
    labels = alias.removesuffix(".").split(".")
    if (
        not all(0 < len(label.encode()) <= check.NAME_MAX for label in labels)
        or not alias.isprintable()
        or " " in alias
    ):
        raise Invalid(
            f"alias {alias!r} on network {network}: nobody could ask for that name: write one such as db, or db.example"
        )


def _exclusive(network: Network, joined: int, spec: ServiceSpec) -> None:
    name = network.spec.annotations.name
    if joined > 1:
        raise Invalid(f"network {name} excludes every other network: attach the service to {name} alone, or not to it")
    for port in spec.endpoint.ports:
        if name == drivers.NONE:
            raise Invalid(
                f"port {port.target_port} cannot be published: tasks on network {name} have no network at all"
            )
        if port.mode == pb.INGRESS:
            raise Invalid(
                f"port {port.target_port} cannot be published by the ingress network: tasks on network {name} use their"
                " host's own ports: publish it with mode=host, or use an overlay network"
            )
        if port.published_port not in (0, port.target_port):
            raise Invalid(
                f"published port {port.published_port}: on network {name} a port is published as it is: leave the"
                f" number out, or use {port.target_port}"
            )
        port.published_port = port.target_port


def _canonical(host_ip: str) -> str:
    """One spelling for each address; "any address" is none. What is no address is left to validation."""
    try:
        address = ipaddress.ip_address(host_ip)
    except ValueError:
        return host_ip
    return "" if address.is_unspecified else str(address)


def check_ingress(store: Store, spec: ServiceSpec) -> None:
    """Raises Invalid when the service needs the ingress network and somebody removed it."""
    if needs_ingress(store, spec.task, spec.endpoint.ports) and ingress_network(store) is None:
        raise Invalid(NO_INGRESS)


def warnings(store: Store, spec: ServiceSpec) -> list[str]:
    """What is stored as asked, and will not be as expected on the nodes there are now."""
    nodes = [node for node in store.nodes if node.status.state == NodeStatus.READY]
    told = []
    if spec.endpoint.balance == pb.LEAST_CONNECTIONS:
        lacking = sorted(node.description.hostname for node in nodes if node.description.balancer != "ipvs")
        if lacking:
            more = f" and {len(lacking) - NAMES_MAX} more" if len(lacking) > NAMES_MAX else ""
            told.append(f"these nodes have no IPVS and take turns instead: {', '.join(lacking[:NAMES_MAX])}{more}")
    own = {text.partition("/")[0] for node in nodes for text in node.description.underlay_subnets}
    told += [
        f"no node has the address {port.host_ip} to publish port {port.published_port or port.target_port} on"
        for port in spec.endpoint.ports
        if port.host_ip and port.host_ip not in own and not ipaddress.ip_address(port.host_ip).is_loopback
    ]
    carrier = _carrier(store, spec)
    told += [
        f"port {port.published_port or port.target_port} at {port.host_ip} refuses connections: network"
        f" {carrier.spec.annotations.name} has no IPv6"
        for port in spec.endpoint.ports
        if ":" in port.host_ip and carrier is not None and not (carrier.spec.ipv6 or carrier.ipam6.subnet)
    ]
    return told


def _carrier(store: Store, spec: ServiceSpec) -> Network | None:
    """The network by which published connections reach the tasks, if it is an overlay."""
    own = (store.networks.get(config.network_id) for config in spec.task.networks)
    leading = next((network for network in own if network is not None and drivers.leads_out(network)), None)
    return leading or ingress_network(store)
