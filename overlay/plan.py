"""What the kernel should hold, computed from `HostState` and the tasks attached here (pure)."""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from overlay.addressing import (
    MAX_NODE_INDEX,
    VXLAN_OVERHEAD_BYTES,
    leg_mac,
    leg_name,
    node_address,
    port_name,
    task_mac,
)
from overlay.esp import encrypted_mtu
from overlay.interface import (
    Attachment,
    HostState,
    Interface,
    NetworkError,
    OverlayNetwork,
    Peer,
    RemoteEndpoint,
)
from overlay.ruleset import Elements, port_elements

MIN_MTU_BYTES = 576
"""What every IPv4 host must accept (RFC 791): a smaller MTU option is a typing error."""


@dataclass(frozen=True, slots=True)
class Vxlan:
    vni: int
    port: int
    local: str
    mtu_bytes: int


@dataclass(frozen=True, slots=True)
class Leg:
    """The veth between a network and the host's own namespace; its end there."""

    name: str
    mac: str
    mtu_bytes: int
    addresses: frozenset[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One overlay network on this host: wanted, or read from the kernel."""

    network_id: str
    bridge: bool
    vxlan: Vxlan | None
    leg: Leg | None
    forwarding: frozenset[tuple[str, str]] = frozenset()
    """(MAC, VTEP)"""
    neighbours: frozenset[tuple[str, str]] = frozenset()
    """(address, MAC) that the VXLAN device answers ARP for."""
    ports: frozenset[str] = frozenset()
    """Links that are up and in the bridge."""
    encrypted: bool = False
    """What leaves by the VXLAN device is marked for encryption."""


@dataclass(frozen=True, slots=True)
class TaskLink:
    name: str
    network_id: str
    port: str
    """Its other end, in the network's bridge."""
    address: str
    prefix: int
    mac: str
    mtu_bytes: int
    gateway: str | None
    """None: the network is internal."""
    gateway_mac: str | None
    default: bool
    """Whether the default route leads here."""


@dataclass(frozen=True, slots=True)
class Task:
    task_id: str
    links: tuple[TaskLink, ...]


def port_alias(task_id: str, link: TaskLink) -> str:
    """Written on the link's port: from it a new agent knows what stands, without any file."""
    return f"{task_id} {link.name} {link.address}/{link.prefix}"


def read_port_alias(alias: str) -> tuple[str, str, str] | None:
    """(task ID, link name, address/prefix); None when it is not an alias of ours."""
    parts = alias.split(" ")
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None


def network_mtu(network: OverlayNetwork, underlay_mtu_bytes: int) -> int:
    """MTU of the network's links. Raises NetworkError."""
    mtu = encrypted_mtu(underlay_mtu_bytes) if network.encrypted else underlay_mtu_bytes - VXLAN_OVERHEAD_BYTES
    if network.mtu_bytes is not None:
        mtu = network.mtu_bytes
    if mtu < MIN_MTU_BYTES:
        raise NetworkError(
            f"network {network.network_id}: an MTU of {mtu} bytes is below the least that IPv4 allows"
            f" ({MIN_MTU_BYTES}); set the network's MTU option, or raise the MTU of the underlay"
        )
    return mtu


def _leg(network: OverlayNetwork, index: int, tag: str, mtu_bytes: int) -> Leg | None:
    """An internal network has none: nothing then leads out of it or into it, whatever the rules say."""
    if network.internal:
        return None
    prefix = ipaddress.IPv4Network(network.subnet).prefixlen
    return Leg(
        name=leg_name(tag, network.vni),
        mac=leg_mac(index),
        mtu_bytes=mtu_bytes,
        addresses=frozenset({(network.gateway, prefix), (node_address(index), 32)}),
    )


def plan_sandbox(
    network: OverlayNetwork,
    state: HostState,
    endpoints: Iterable[RemoteEndpoint],
    tag: str,
    underlay_mtu_bytes: int,
) -> Sandbox:
    """One network's part. `endpoints`: those of this network. Endpoints on unknown peers are left out: there is
    no VTEP to send to until the peer arrives. Raises NetworkError."""
    mtu = network_mtu(network, underlay_mtu_bytes)
    vteps = {peer.node_id: peer.vtep for peer in state.peers}
    forwarding, neighbours = set(), set()
    if not network.internal:
        for peer in state.peers:
            forwarding.add((leg_mac(peer.index), peer.vtep))
            neighbours.add((node_address(peer.index), leg_mac(peer.index)))
    for endpoint in endpoints:
        vtep = vteps.get(endpoint.node_id)
        if vtep is not None:
            mac = task_mac(endpoint.address)
            forwarding.add((mac, vtep))
            neighbours.add((endpoint.address, mac))
    return Sandbox(
        network_id=network.network_id,
        bridge=True,
        vxlan=Vxlan(network.vni, state.vxlan_port, state.vtep, mtu),
        leg=_leg(network, state.index, tag, mtu),
        forwarding=frozenset(forwarding),
        neighbours=frozenset(neighbours),
        encrypted=network.encrypted,
    )


def endpoints_by_network(endpoints: Iterable[RemoteEndpoint]) -> dict[str, tuple[RemoteEndpoint, ...]]:
    found: defaultdict[str, list[RemoteEndpoint]] = defaultdict(list)
    for endpoint in endpoints:
        found[endpoint.network_id].append(endpoint)
    return {network_id: tuple(items) for network_id, items in found.items()}


def vips_by_network(state: HostState) -> dict[str, dict[str, tuple[str, ...]]]:
    """Network -> VIP -> backends, without repetitions."""
    found: defaultdict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for vip in state.vips:
        found[vip.network_id][vip.address] = tuple(dict.fromkeys(vip.backends))
    return dict(found)


def plan_published(state: HostState) -> Elements:
    out: Elements = {}
    for published in state.published:
        out |= port_elements(replace(published, backends=tuple(dict.fromkeys(published.backends))))
    return out


def plan_task(
    task_id: str,
    interfaces: tuple[Interface, ...],
    networks: Mapping[str, OverlayNetwork],
    index: int,
    underlay_mtu_bytes: int,
) -> Task:
    """Raises NetworkError when a network is unknown here, or twice in `interfaces`."""
    links: list[TaskLink] = []
    defaulted = False
    for number, interface in enumerate(interfaces):
        network = networks.get(interface.network_id)
        if network is None:
            raise NetworkError(
                f"task {task_id}: network {interface.network_id} is not among those that this host was told of;"
                " apply a state that contains it first"
            )
        if any(link.network_id == network.network_id for link in links):
            raise NetworkError(f"task {task_id}: two interfaces in network {network.network_id}; give it one")
        address, _, prefix = interface.address.partition("/")
        if ipaddress.IPv4Interface(interface.address).network != ipaddress.IPv4Network(network.subnet):
            raise NetworkError(
                f"task {task_id}: address {interface.address} does not lie in subnet {network.subnet} of network"
                f" {network.network_id}, or its prefix differs"
            )
        links.append(
            TaskLink(
                name=f"eth{number}",
                network_id=network.network_id,
                port=port_name(task_id),
                address=address,
                prefix=int(prefix),
                mac=task_mac(address),
                mtu_bytes=network_mtu(network, underlay_mtu_bytes),
                gateway=None if network.internal else network.gateway,
                gateway_mac=None if network.internal else leg_mac(index),
                default=not network.internal and not defaulted,
            )
        )
        defaulted |= not network.internal
    return Task(task_id, tuple(links))


def check_state(state: HostState) -> None:
    """Refuse what the kernel would take and mangle. Raises NetworkError."""
    indices: dict[int, str] = {state.index: "this node"}
    for peer in state.peers:
        _check_peer(peer, state, indices)
    for network in state.networks:
        subnet = ipaddress.IPv4Network(network.subnet)
        if ipaddress.IPv4Address(network.gateway) not in subnet:
            raise NetworkError(
                f"network {network.network_id}: gateway {network.gateway} is not in its subnet {network.subnet}"
            )


def _check_peer(peer: Peer, state: HostState, indices: dict[int, str]) -> None:
    if peer.vtep == state.vtep:
        raise NetworkError(
            f"node {peer.node_id} has the same data path address {peer.vtep} as this node; give one of them another"
        )
    if peer.index in indices or not 0 <= peer.index <= MAX_NODE_INDEX:
        raise NetworkError(
            f"node {peer.node_id} has index {peer.index}, which is not between 0 and {MAX_NODE_INDEX} or is that of"
            f" {indices.get(peer.index, 'no node')}; indices must differ"
        )
    indices[peer.index] = peer.node_id


def attachment_interfaces(attachment: Attachment) -> tuple[Interface, ...]:
    for interface in attachment.interfaces:
        try:
            ipaddress.IPv4Interface(interface.address)
        except ValueError:
            raise NetworkError(
                f"task {attachment.task_id}: {interface.address!r} is not an address such as 10.0.1.5/24"
            ) from None
    return attachment.interfaces
