"""Subnets and VNIs of networks: the first free ones, told apart from everything that is in use."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from proto.objects_pb2 import IpamConfig, Network, NetworkSpec
from swarm.store import drivers
from swarm.store.changes import copy_of
from swarm.store.released import VNIS
from swarm.store.store import Store

Net4 = ipaddress.IPv4Network
Net6 = ipaddress.IPv6Network
Net = ipaddress.IPv4Network | ipaddress.IPv6Network

VNI_OPTION = "com.docker.network.driver.overlay.vxlanid_list"
VNI_FIRST = 4096
"""The ingress network's; below it lie the numbers of physical VLANs (as in the reference)."""
VNI_LAST = (1 << 24) - 1
INGRESS = Net4("10.255.0.0/16")
LEGS = Net4("198.18.0.0/15")
LEGS6 = Net6("2001:2::/48")
"""Nodes' own addresses on overlays (ARCHITECTURE.md)."""
FIRST = Net4("10.0.0.0/24")
"""Docker gives it to its ingress; users expect their first network at 10.0.1.0/24."""
DEFAULT_POOL = "10.0.0.0/8"
SUBNET_SIZE = 24
PREFIX_MAX = 29
"""A subnet needs a gateway, a VIP and a few tasks."""
SUBNET6_SIZE = 64
"""Of every IPv6 network that is chosen (RFC 4291)."""


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
        net = ipaddress.ip_network(text)
    except ValueError as error:
        return Refused(f"invalid subnet '{text}': {error}; write it like 10.0.9.0/24")
    if isinstance(net, Net4) and net.prefixlen > PREFIX_MAX:
        return Refused(f"subnet {net} is too small: the longest prefix is /{PREFIX_MAX}")
    return net


def ula_prefix(cluster_id: str) -> Net6:
    """The /48 from which the swarm's networks get IPv6 subnets: its own, as random as its ID (RFC 4193 3.2)."""
    global_id = hashlib.sha256(cluster_id.encode()).digest()[:5]
    return Net6((b"\xfd" + global_id + bytes(10), 48))


# ---------------------------------------------------------------- what is in use


def in_use(store: Store, spec: NetworkSpec, fresh: Iterable[Network] = ()) -> list[Taken]:
    """Every subnet that a new network of this spec must keep clear of; `fresh`: networks that are not stored yet.
    A macvlan network is a LAN that nodes are on; all others keep clear of the nodes' own networks."""
    taken = [Taken(legs, "the nodes' addresses on overlays") for legs in (LEGS, LEGS6)]
    ingress_is_placed = spec.ingress
    for network in (*store.networks, *fresh):
        ingress_is_placed |= network.spec.ingress and bool(network.ipam.subnet)
        taken.extend(subnets_of(network))
    if not ingress_is_placed and _ingress_fits(pools_of(store)):
        taken.append(Taken(INGRESS, "the ingress network"))
    if drivers.driver_of(Network(spec=spec)) == drivers.MACVLAN:
        return taken
    for node in store.nodes:
        for text in node.description.underlay_subnets:
            try:
                net = ipaddress.ip_interface(text).network
            except ValueError:
                continue  # an agent's report is not worth stopping for
            taken.append(Taken(net, f"node {node.description.hostname or node.id} (its own network)"))
    return taken


def subnets_of(network: Network) -> Iterator[Taken]:
    for config in (network.ipam, network.ipam6):
        if config.subnet:
            yield Taken(ipaddress.ip_network(config.subnet), f"network {network.spec.annotations.name}")


def overlap(net: Net, taken: Iterable[Taken]) -> Taken | None:
    return next((other for other in taken if other.net.version == net.version and other.net.overlaps(net)), None)


def subnet_conflict(store: Store, spec: NetworkSpec) -> str | None:
    """Why a new network cannot have the subnets or the VNI that it asks for, in one line for the user, or None."""
    taken = in_use(store, spec)
    for config in (spec.ipam, spec.ipam6):
        if config.subnet:
            net = _asked_subnet(config.subnet, taken)
            if isinstance(net, Refused):
                return net.why
    vni = _asked_vni(spec, {network.vni: network for network in store.networks if network.vni})
    return vni.why if isinstance(vni, Refused) else None


# ---------------------------------------------------------------- allocation


def allocated(store: Store, network: Network, fresh: Iterable[Network] = ()) -> Network | Refused:
    """The network with subnets, gateways and VNI, or why it cannot have them. `fresh`: what this pass has allocated."""
    spec, made = network.spec, copy_of(network)
    taken = in_use(store, spec, fresh)
    net = _asked_subnet(spec.ipam.subnet, taken) if spec.ipam.subnet else _free_subnet(store, network, taken)
    if isinstance(net, Refused):
        return net
    made.ipam.CopyFrom(spec.ipam)
    _complete(made.ipam, net)
    if spec.ipv6 or spec.ipam6.subnet:
        net6 = _asked_subnet(spec.ipam6.subnet, taken) if spec.ipam6.subnet else _free_subnet6(store, taken)
        if isinstance(net6, Refused):
            return net6
        made.ipam6.CopyFrom(spec.ipam6)
        _complete(made.ipam6, net6)
    if drivers.is_overlay(network):
        vni = _vni(store, spec, fresh)
        if isinstance(vni, Refused):
            return vni
        made.vni = vni
    made.allocation_error = ""
    return made


def _complete(config: IpamConfig, net: Net) -> None:
    config.subnet = str(net)
    elsewhere = set(map(ipaddress.ip_address, config.aux_addresses.values()))
    config.gateway = config.gateway or str(next((host for host in net.hosts() if host not in elsewhere), net[1]))


def _vni(store: Store, spec: NetworkSpec, fresh: Iterable[Network]) -> int | Refused:
    used = {network.vni: network for network in (*store.networks, *fresh) if network.vni}
    asked = _asked_vni(spec, used)
    if asked is not None:
        return asked
    return next_vni(set(used), store.released.of(VNIS), spec.ingress) or Refused(
        f"every VNI up to {VNI_LAST} is in use: remove networks that are not needed"
    )


def _asked_vni(spec: NetworkSpec, used: dict[int, Network]) -> int | Refused | None:
    text = spec.options.get(VNI_OPTION)
    if not text:
        return None
    holder = used.get(int(text))
    if holder is None:
        return int(text)
    return Refused(f"option {VNI_OPTION}={text}: network {holder.spec.annotations.name} has this VNI: choose another")


def next_vni(used: set[int], released: Sequence[int], ingress: bool, last: int = VNI_LAST) -> int | None:
    """Serial: after the highest that is in use or was given back, so that a number is not reused at once; then the
    lowest one that is neither, then the one that was given back first. None: there is none."""
    avoided = used.union(released)
    if ingress and VNI_FIRST not in avoided:
        return VNI_FIRST
    after = max((*avoided, VNI_FIRST)) + 1
    if after <= last:
        return after
    never_given = (number for number in range(VNI_FIRST + 1, last + 1) if number not in avoided)
    return next(never_given, next((number for number in released if number not in used), None))


def _asked_subnet(text: str, taken: list[Taken]) -> Net | Refused:
    net = parse_subnet(text)
    if isinstance(net, Refused):
        return net
    other = overlap(net, taken)
    return Refused(_overlaps(net, other)) if other else net


def _overlaps(net: Net, other: Taken) -> str:
    return f"subnet {net} overlaps {other.net} of {other.owner}: choose another --subnet, or leave it out"


def pools_of(store: Store) -> list[str]:
    return list(store.cluster.default_addr_pool if store.cluster is not None else ()) or [DEFAULT_POOL]


def _ingress_fits(pools: Iterable[str]) -> bool:
    """Into one of them, with room left for other networks."""
    return any(Net4(pool) != INGRESS and INGRESS.subnet_of(Net4(pool)) for pool in pools)


def _free_subnet(store: Store, network: Network, taken: list[Taken]) -> Net | Refused:
    cluster = store.cluster
    pools = pools_of(store)
    size = (cluster.subnet_size if cluster is not None else 0) or SUBNET_SIZE
    if network.spec.ingress:
        if overlap(INGRESS, taken) is None and _ingress_fits(pools):
            return INGRESS
    elif not any(other.net == FIRST for other in taken):
        taken = [*taken, Taken(FIRST, "reserved")]
    for pool in pools:
        free = _first_free(Net4(pool), size, taken)
        if free is not None:
            return free
    return Refused(
        f"no free /{size} is left in the address pools {', '.join(pools)}: give the network a --subnet of its own,"
        " or remove networks that are not needed"
    )


def _free_subnet6(store: Store, taken: list[Taken]) -> Net | Refused:
    pool = ula_prefix(store.cluster.id if store.cluster is not None else "")
    free = _first_free(pool, SUBNET6_SIZE, taken)
    return free or Refused(f"no free /{SUBNET6_SIZE} is left in the swarm's IPv6 prefix {pool}: give an IPv6 --subnet")


def _first_free(pool: Net, size: int, taken: list[Taken]) -> Net | None:
    """The first subnet of the pool that overlaps nothing; each overlap is leapt over as a whole."""
    prefix = max(size, pool.prefixlen)
    step = 1 << (pool.max_prefixlen - prefix)
    at, end = int(pool.network_address), int(pool.broadcast_address)
    for low, high in sorted((int(t.net[0]), int(t.net[-1])) for t in taken if t.net.version == pool.version):
        if high < at:
            continue
        if low > at + step - 1:
            break  # a gap wide enough before the next one
        at = -(-(high + 1) // step) * step
    return type(pool)((at, prefix)) if at + step - 1 <= end else None
