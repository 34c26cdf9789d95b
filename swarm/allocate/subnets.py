"""Subnets and VNIs of overlay networks: the first free ones, told apart from everything that is in use."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from proto.objects_pb2 import IpamConfig, Network
from swarm.store.changes import copy_of
from swarm.store.store import Store

Net = ipaddress.IPv4Network

VNI_FIRST = 4096
"""The ingress network's; below it lie the numbers of physical VLANs (as in the reference)."""
VNI_LAST = (1 << 24) - 1
INGRESS = ipaddress.IPv4Network("10.255.0.0/16")
LEGS = ipaddress.IPv4Network("198.18.0.0/15")
"""Nodes' own addresses on overlays (ARCHITECTURE.md)."""
FIRST = ipaddress.IPv4Network("10.0.0.0/24")
"""Docker gives it to its ingress; users expect their first network at 10.0.1.0/24."""
DEFAULT_POOL = "10.0.0.0/8"
SUBNET_SIZE = 24
PREFIX_MAX = 29
"""A subnet needs a gateway, a VIP and a few tasks."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A subnet that a network must not overlap, and whose it is, as told to people."""

    net: Net
    owner: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Why nothing could be allocated, and what to do."""

    why: str


def parse_subnet(text: str) -> Net | Refused:
    try:
        net = ipaddress.IPv4Network(text)
    except ValueError as error:
        return Refused(f"invalid subnet '{text}': {error}; write it like 10.0.9.0/24")
    if net.prefixlen > PREFIX_MAX:
        return Refused(f"subnet {net} is too small: the longest prefix is /{PREFIX_MAX}")
    return net


def in_use(store: Store, but: str = "") -> list[Taken]:
    """Every subnet that a network other than `but` must keep clear of."""
    taken = [Taken(LEGS, "the nodes' addresses on overlays")]
    ingress_net = INGRESS
    for network in store.networks:
        subnet = network.ipam.subnet
        if network.id == but:
            if network.spec.ingress:
                ingress_net = LEGS  # its own range is not in its way
            continue
        if subnet:
            taken.append(Taken(ipaddress.IPv4Network(subnet), f"network {network.spec.annotations.name}"))
    if ingress_net is INGRESS:
        taken.append(Taken(INGRESS, "the ingress network"))
    for node in store.nodes:
        for text in node.description.underlay_subnets:
            try:
                net = ipaddress.ip_interface(text).network
            except ValueError:
                continue  # an agent's report is not worth stopping for
            if isinstance(net, Net):
                taken.append(Taken(net, f"node {node.description.hostname or node.id} (its own network)"))
    return taken


def overlap(net: Net, taken: Iterable[Taken]) -> Taken | None:
    return next((other for other in taken if other.net.overlaps(net)), None)


def subnet_conflict(store: Store, subnet: str) -> str | None:
    """Why a new network cannot have this subnet ("10.0.9.0/24"), in one line for the user; None = it can."""
    net = parse_subnet(subnet)
    if isinstance(net, Refused):
        return net.why
    other = overlap(net, in_use(store))
    return _overlaps(net, other) if other else None


def allocated(store: Store, network: Network, vni: int, taken: list[Taken]) -> Network | Refused:
    """The network with subnet, gateway and VNI, or why it cannot have them."""
    asked = network.spec.ipam
    net = _asked_subnet(asked.subnet, taken) if asked.subnet else _free_subnet(store, network, taken)
    if isinstance(net, Refused):
        return net
    gateway = asked.gateway or str(net.network_address + 1)
    refused = _outside(gateway, asked.ip_range, net)
    if refused:
        return refused
    made = copy_of(network)
    made.ipam.CopyFrom(IpamConfig(subnet=str(net), gateway=gateway, ip_range=asked.ip_range))
    made.vni = vni
    made.allocation_error = ""
    return made


def next_vni(used: set[int], ingress: bool) -> int:
    """Serial: after the highest in use, so that a number is not reused at once; then the lowest free one."""
    if ingress and VNI_FIRST not in used:
        return VNI_FIRST
    after = max((*used, VNI_FIRST)) + 1
    if after <= VNI_LAST:
        return after
    return next(number for number in range(VNI_FIRST + 1, VNI_LAST + 1) if number not in used)


def _asked_subnet(text: str, taken: list[Taken]) -> Net | Refused:
    net = parse_subnet(text)
    if isinstance(net, Refused):
        return net
    other = overlap(net, taken)
    return Refused(_overlaps(net, other)) if other else net


def _overlaps(net: Net, other: Taken) -> str:
    return f"subnet {net} overlaps {other.net} of {other.owner}: choose another --subnet, or leave it out"


def _free_subnet(store: Store, network: Network, taken: list[Taken]) -> Net | Refused:
    cluster = store.cluster
    pools = list(cluster.default_addr_pool) if cluster is not None else []
    pools = pools or [DEFAULT_POOL]
    size = (cluster.subnet_size if cluster is not None else 0) or SUBNET_SIZE
    if network.spec.ingress:
        if overlap(INGRESS, taken) is None:
            return INGRESS
    elif not any(other.net == FIRST for other in taken):
        taken = [*taken, Taken(FIRST, "reserved")]
    for pool in pools:
        free = _first_free(ipaddress.IPv4Network(pool), size, taken)
        if free is not None:
            return free
    return Refused(
        f"no free /{size} is left in the address pools {', '.join(pools)}: give the network a --subnet of its own,"
        " or remove networks that are not needed"
    )


def _first_free(pool: Net, size: int, taken: list[Taken]) -> Net | None:
    """The first subnet of the pool that overlaps nothing; each overlap is leapt over as a whole."""
    step = 1 << (32 - max(size, pool.prefixlen))
    at, end = int(pool.network_address), int(pool.broadcast_address)
    for low, high in _ranges(taken):
        if high < at:
            continue
        if low > at + step - 1:
            break  # a gap wide enough before the next one
        at = -(-(high + 1) // step) * step
    return ipaddress.IPv4Network((at, max(size, pool.prefixlen))) if at + step - 1 <= end else None


def _ranges(taken: list[Taken]) -> Iterator[tuple[int, int]]:
    yield from sorted((int(t.net.network_address), int(t.net.broadcast_address)) for t in taken)


def _outside(gateway: str, ip_range: str, net: Net) -> Refused | None:
    try:
        if ipaddress.IPv4Address(gateway) not in net:
            return Refused(f"gateway {gateway} is not in subnet {net}")
        if ip_range and not ipaddress.IPv4Network(ip_range).subnet_of(net):
            return Refused(f"ip-range {ip_range} is not in subnet {net}")
    except ValueError as error:
        return Refused(f"invalid gateway or ip-range: {error}")
    return None
