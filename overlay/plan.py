"""What the kernel should hold, computed from `HostState` and the tasks attached here (pure)."""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from overlay.addressing import (
    MAX_NODE_INDEX,
    NODE_RANGE,
    NODE_RANGE6,
    NODE_RANGE6_PREFIX,
    NODE_RANGE_PREFIX,
    VXLAN_OVERHEAD_BYTES,
    canonical,
    leg_mac,
    leg_name,
    link_local,
    node_address,
    node_address6,
    port_name,
    task_mac,
)
from overlay.esp import encrypted_mtu, encrypted_size
from overlay.interface import (
    Attachment,
    HostState,
    Interface,
    MacvlanNetwork,
    NetworkError,
    OverlayNetwork,
    Peer,
    RemoteEndpoint,
)

TaskNetwork = OverlayNetwork | MacvlanNetwork
MIN_MTU_BYTES = 576
"""What every IPv4 host must accept (RFC 791): a smaller MTU option is a typing error."""
MIN_MTU6_BYTES = 1280
"""RFC 8200; on a smaller link the kernel turns IPv6 off."""


@dataclass(frozen=True, slots=True)
class Vxlan:
    vni: int
    port: int
    local: str
    mtu_bytes: int
    ipv6: bool = False
    """Whether the device answers neighbour solicitations (it then has IPv6 on, without an address)."""


@dataclass(frozen=True, slots=True)
class Leg:
    """The veth between a network and the host's own namespace; its end there."""

    name: str
    mac: str
    mtu_bytes: int
    addresses: frozenset[tuple[str, int]]
    ipv6: bool = False
    routing: bool = True
    """Whether its sysctls let it route (see act.set_leg_sysctls), and, with IPv6, it takes in answers to ::1."""


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
    """(address, MAC) that the VXLAN device answers ARP and neighbour solicitations for."""
    ports: frozenset[tuple[str, int]] = frozenset()
    """(name, MTU) of the links that are up and in the bridge."""
    encrypted: bool = False
    """What leaves by the VXLAN device is marked for encryption."""

    @property
    def mtu_bytes(self) -> int:
        widest = self.vxlan or self.leg
        return widest.mtu_bytes if widest else 0


@dataclass(frozen=True, slots=True)
class TaskLink:
    name: str
    network_id: str
    port: str
    """Its other end, in the network's bridge; "" = it is a macvlan link of `parent`."""
    addresses: tuple[tuple[str, int], ...]
    """(address, prefix): IPv4, then IPv6 if the network has it."""
    mac: str
    mtu_bytes: int
    """0 = the parent's."""
    gateways: tuple[str, ...]
    """Legs of this host that it knows the MAC of, one for each family; none if the network has no leg."""
    gateway_mac: str
    routes: tuple[tuple[str, int, str], ...]
    """(destination, prefix, gateway or "" = on the link)"""
    parent: str = ""
    mode: str = ""

    @property
    def ipv6(self) -> bool:
        return len(self.addresses) > 1

    @property
    def all_addresses(self) -> tuple[tuple[str, int], ...]:
        return (*self.addresses, (link_local(self.mac), 64)) if self.ipv6 else self.addresses


@dataclass(frozen=True, slots=True)
class Task:
    task_id: str
    links: tuple[TaskLink, ...]
    answers_by: str = ""
    """The overlay's link by which published connections come and are answered, if it has other networks' links as well
    (answers.py); "" = they follow the default route."""

    @property
    def ways_back(self) -> tuple[tuple[str, str], ...]:
        """(link, gateway)"""
        return tuple(
            (link.name, gateway) for link in self.links if link.name == self.answers_by for gateway in link.gateways
        )


def port_alias(task_id: str, link: TaskLink) -> str:
    """Written on the link's port: from it a new agent knows what stands, without any file."""
    addresses = (f"{address}/{prefix}" for address, prefix in link.addresses)
    return " ".join([task_id, link.name, link.network_id, *addresses])


def read_port_alias(alias: str) -> tuple[str, str, Interface] | None:
    """(task ID, link name, its interface); None when it is not an alias of ours."""
    parts = alias.split(" ")
    if len(parts) not in (4, 5) or "/" not in parts[3]:
        return None
    return parts[0], parts[1], Interface(*parts[2:])


def mtu_left(network: OverlayNetwork, underlay_mtu_bytes: int) -> int:
    """What the underlay leaves of itself to a packet on this network, in bytes."""
    if network.encrypted:
        return encrypted_mtu(underlay_mtu_bytes)
    return underlay_mtu_bytes - (VXLAN_OVERHEAD_BYTES if network.vni else 0)


def underlay_size(sandbox: Sandbox) -> int:
    """What the network's largest packets take on the underlay, in bytes; 0 = they stay on this host."""
    if sandbox.vxlan is None:
        return 0
    mtu = sandbox.vxlan.mtu_bytes
    return encrypted_size(mtu) if sandbox.encrypted else mtu + VXLAN_OVERHEAD_BYTES


def network_mtu(network: TaskNetwork, underlay_mtu_bytes: int) -> int:
    """MTU of the network's links; 0 = the parent's. Raises NetworkError."""
    if isinstance(network, MacvlanNetwork):
        return network.mtu_bytes or 0
    mtu = mtu_left(network, underlay_mtu_bytes)
    if network.mtu_bytes is not None:
        mtu = network.mtu_bytes
    if mtu < MIN_MTU_BYTES:
        raise NetworkError(
            f"network {network.network_id}: an MTU of {mtu} bytes is below the least that IPv4 allows"
            f" ({MIN_MTU_BYTES}); set the network's MTU option, or raise the MTU of the underlay"
        )
    if network.subnet6 and mtu < MIN_MTU6_BYTES:
        raise NetworkError(
            f"network {network.network_id}: an MTU of {mtu} bytes is below the least that IPv6 allows"
            f" ({MIN_MTU6_BYTES}); set the network's MTU option, raise the MTU of the underlay, or make it without IPv6"
        )
    return mtu


def _leg(network: OverlayNetwork, index: int, tag: str, mtu_bytes: int) -> Leg | None:
    """An internal network has none: nothing then leads out of it or into it, whatever the rules say."""
    if network.internal:
        return None
    addresses = {(network.gateway, _prefix(network.subnet)), (node_address(index), 32)}
    if network.subnet6:
        addresses |= {(canonical(network.gateway6), _prefix(network.subnet6)), (node_address6(index), 128)}
        addresses.add((link_local(leg_mac(index)), 64))
    return Leg(
        name=leg_name(tag, network.vni),
        mac=leg_mac(index),
        mtu_bytes=mtu_bytes,
        addresses=frozenset(addresses),
        ipv6=bool(network.subnet6),
    )


def _prefix(subnet: str) -> int:
    return ipaddress.ip_network(subnet).prefixlen


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
    vxlan = Vxlan(network.vni, state.vxlan_port, state.vtep, mtu, bool(network.subnet6)) if network.vni else None
    if vxlan is not None and not network.internal:
        for peer in state.peers:
            forwarding.add((leg_mac(peer.index), peer.vtep))
            neighbours.add((node_address(peer.index), leg_mac(peer.index)))
            if network.subnet6:
                neighbours.add((node_address6(peer.index), leg_mac(peer.index)))
    for endpoint in endpoints:
        vtep = vteps.get(endpoint.node_id)
        if vtep is not None:
            mac = task_mac(endpoint.address)
            forwarding.add((mac, vtep))
            neighbours.add((endpoint.address, mac))
            if network.subnet6 and endpoint.address6:
                neighbours.add((canonical(endpoint.address6), mac))
    return Sandbox(
        network_id=network.network_id,
        bridge=True,
        vxlan=vxlan,
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


def plan_task(
    task_id: str,
    interfaces: tuple[Interface, ...],
    networks: Mapping[str, TaskNetwork],
    index: int,
    underlay_mtu_bytes: int,
) -> Task:
    """Raises NetworkError when a network is unknown here, or twice in `interfaces`."""
    links: list[TaskLink] = []
    homes = _homes(interfaces, networks)
    led_out: set[int] = set()
    """Versions of IP that have a default route."""
    for number, interface in enumerate(interfaces):
        network = networks.get(interface.network_id)
        if network is None:
            raise NetworkError(
                f"task {task_id}: network {interface.network_id} is not among those that this host was told of;"
                " apply a state that contains it first"
            )
        if any(link.network_id == network.network_id for link in links):
            raise NetworkError(f"task {task_id}: two interfaces in network {network.network_id}; give it one")
        addresses = _link_addresses(task_id, interface, network)
        gateways = () if network.internal else _gateways(network, addresses)
        macvlan = network if isinstance(network, MacvlanNetwork) else None
        if not addresses:
            raise NetworkError(f"task {task_id}: no address was given for network {network.network_id}")
        links.append(
            TaskLink(
                name=f"eth{number}",
                network_id=network.network_id,
                port="" if macvlan else port_name(task_id),
                addresses=addresses,
                mac=task_mac(addresses[0][0]),
                mtu_bytes=network_mtu(network, underlay_mtu_bytes),
                gateways=() if macvlan else gateways,
                gateway_mac=leg_mac(index),
                routes=_ways_out(gateways, led_out, homes, network.network_id),
                parent=macvlan.parent if macvlan else "",
                mode=macvlan.mode if macvlan else "",
            )
        )
        led_out |= {ipaddress.ip_address(gateway).version for gateway in gateways}
    overlays = [link for link in links if _is_overlay(networks[link.network_id])]
    mixed = len(overlays) < len(links)
    return Task(
        task_id, tuple(links), next((link.name for link in overlays if mixed and link.network_id == homes.get(4)), "")
    )


def _is_overlay(network: TaskNetwork) -> bool:
    return isinstance(network, OverlayNetwork) and bool(network.vni)


def _homes(interfaces: Iterable[Interface], networks: Mapping[str, TaskNetwork]) -> dict[int, str]:
    """Version of IP -> the network by whose leg the nodes' own addresses are reached, and published connections come:
    the first overlay that leads out, else the host's bridge."""
    known = (networks.get(item.network_id) for item in interfaces)
    legged = [network for network in known if isinstance(network, OverlayNetwork) and not network.internal]
    found: dict[int, str] = {}
    for network in sorted(legged, key=lambda network: not network.vni):
        for version in (4, 6) if network.subnet6 else (4,):
            found.setdefault(version, network.network_id)
    return found


def _gateways(network: TaskNetwork, addresses: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """A network of the LAN may lack a router."""
    found = (network.gateway, network.gateway6)[: len(addresses)]
    return tuple(canonical(gateway) for gateway in found if gateway)


def _link_addresses(task_id: str, interface: Interface, network: TaskNetwork) -> tuple[tuple[str, int], ...]:
    """Raises NetworkError."""
    out = []
    for given, subnet in ((interface.address, network.subnet), (interface.address6, network.subnet6)):
        if not given:
            continue
        found = ipaddress.ip_interface(given)
        if not subnet or found.network != ipaddress.ip_network(subnet):
            raise NetworkError(
                f"task {task_id}: address {given} does not lie in subnet {subnet or '(none of that family)'} of network"
                f" {network.network_id}, or its prefix differs"
            )
        out.append((str(found.ip), found.network.prefixlen))
    return tuple(out)


def _ways_out(
    gateways: Iterable[str], led_out: set[int], homes: Mapping[int, str], network_id: str
) -> tuple[tuple[str, int, str], ...]:
    """The default routes that no earlier link has, and the way to all nodes' own addresses."""
    out: list[tuple[str, int, str]] = []
    for gateway in gateways:
        version = ipaddress.ip_address(gateway).version
        if version not in led_out:
            out.append(("0.0.0.0" if version == 4 else "::", 0, gateway))
        if homes.get(version) == network_id:
            nodes = (NODE_RANGE, NODE_RANGE_PREFIX) if version == 4 else (NODE_RANGE6, NODE_RANGE6_PREFIX)
            out.append((*nodes, ""))
    return tuple(out)


def check_state(state: HostState) -> None:
    """Refuse what the kernel would take and mangle. Raises NetworkError."""
    indices: dict[int, str] = {state.index: "this node"}
    for peer in state.peers:
        _check_peer(peer, state, indices)
    for network in state.networks:
        for gateway, subnet in ((network.gateway, network.subnet), (network.gateway6, network.subnet6)):
            if subnet and ipaddress.ip_address(gateway) not in ipaddress.ip_network(subnet):
                raise NetworkError(f"network {network.network_id}: gateway {gateway} is not in its subnet {subnet}")


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


def check_interfaces(attachment: Attachment) -> None:
    """Raises NetworkError."""
    for interface in attachment.interfaces:
        for address in filter(None, (interface.address, interface.address6)):
            try:
                ipaddress.ip_interface(address)
            except ValueError:
                raise NetworkError(
                    f"task {attachment.task_id}: {address!r} is not an address such as 10.0.1.5/24"
                ) from None
