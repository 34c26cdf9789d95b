"""The mirror as seen by the kernel (pure); pictures.py has the name server's.

Who is behind a VIP or a published port is decided by the managers alone (`NetworkEndpoint.serving`), with one
exception: a local task that is known to have ended is left out at once, without waiting for the round trip.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from node import drivers
from node.mirror import Mirror
from node.steps import State, ended
from overlay.interface import (
    L4,
    WEIGHT_MAX,
    Balance,
    EncryptionKey,
    HostState,
    OverlayNetwork,
    Peer,
    PublishedPort,
    RemoteEndpoint,
    Vip,
)
from proto.dispatch_pb2 import NetworkEndpoint
from proto.objects_pb2 import (
    HOST,
    INGRESS,
    LEAST_CONNECTIONS,
    ROUND_ROBIN,
    SCTP,
    SOURCE_HASH,
    TASK_RUNNING,
    TASK_SHUTDOWN,
    TCP,
    UDP,
    VIP,
    Network,
    PortConfig,
)

DEFAULT_VXLAN_PORT = 4789
ENCRYPTED_OPTION = "encrypted"

_L4: dict[int, L4] = {TCP: "tcp", UDP: "udp", SCTP: "sctp"}
_BALANCE: dict[int, Balance] = {ROUND_ROBIN: "rr", LEAST_CONNECTIONS: "lc", SOURCE_HASH: "sh"}


@dataclass(frozen=True, slots=True)
class Local:
    """What this host itself knows."""

    node_id: str
    vtep: str
    index: int
    """0: no manager has numbered this node yet, nothing can be wired."""
    vxlan_port: int = DEFAULT_VXLAN_PORT
    given: Mapping[str, str] = field(default_factory=dict)
    """Task -> the address that this host gave it on its own bridge."""
    states: Mapping[str, State] = field(default_factory=dict)
    """Observed states of the tasks of this host."""
    keys: tuple[EncryptionKey, ...] = ()
    encrypts: bool = False
    """Its kernel can."""

    def has_ended(self, task_id: str) -> bool:
        state = self.states.get(task_id)
        return state is not None and ended(state)


def host_state(mirror: Mirror, local: Local) -> HostState:
    networks = {n.id: n for n in mirror.networks() if n.vni and n.ipam.subnet and drivers.driver(n) == drivers.OVERLAY}
    serving = _serving(mirror, local)
    return HostState(
        vtep=local.vtep,
        index=local.index,
        vxlan_port=local.vxlan_port,
        networks=tuple(_overlay_network(n) for n in networks.values()),
        peers=_peers(mirror, local),
        endpoints=tuple(
            RemoteEndpoint(e.network_id, e.address, e.node_id, e.address6)
            for e in mirror.endpoints()
            if e.node_id != local.node_id and e.network_id in networks
        ),
        vips=tuple(_vips(mirror, serving, networks)),
        published=_published(mirror, local, serving, networks),
        keys=local.keys,
        bridges=drivers.bridges(mirror.networks(), mirror.tasks()),
        macvlans=drivers.macvlans(mirror.networks()),
    )


def _vips(mirror: Mirror, serving: _Serving, networks: Mapping[str, Network]) -> Iterable[Vip]:
    for service in mirror.services():
        for vip in service.virtual_ips if service.mode == VIP else ():
            if vip.network_id not in networks:
                continue
            ends, balance = serving[service.service_id, vip.network_id], _BALANCE[service.balance]
            yield Vip(vip.network_id, _bare(vip.address), tuple(end.address for end in ends), _weights(ends), balance)
            if vip.address6:
                ends = tuple(end for end in ends if end.address6)
                backends = tuple(end.address6 for end in ends)
                yield Vip(vip.network_id, _bare(vip.address6), backends, _weights(ends), balance)


def _bare(address: str) -> str:
    """Without the prefix's length."""
    return address.partition("/")[0]


def _weights(ends: Iterable[NetworkEndpoint]) -> tuple[int, ...]:
    """() when all are the same."""
    weights = tuple(min(end.weight or 1, WEIGHT_MAX) for end in ends)
    return weights if len(set(weights)) > 1 else ()


def _peers(mirror: Mirror, local: Local) -> tuple[Peer, ...]:
    """The other nodes. One that is down and whose address another node has by now is no peer: its host left and
    joined again, and until somebody removes the old node both stand in the list."""
    others = [peer for peer in mirror.peers() if peer.node_id != local.node_id]
    taken = {local.vtep} | {peer.vtep_addr for peer in others if not peer.down}
    return tuple(
        Peer(peer.node_id, peer.vtep_addr, peer.index, peer.masquerade, peer.encryption_epoch)
        for peer in others
        if not (peer.down and peer.vtep_addr in taken)
    )


def ingress_network_ids(mirror: Mirror) -> frozenset[str]:
    return frozenset(n.id for n in mirror.networks() if n.spec.ingress)


class _Serving(defaultdict[tuple[str, str], tuple[NetworkEndpoint, ...]]):
    """(service ID, network ID) -> serving endpoints in numeric order of their addresses."""

    def __init__(self) -> None:
        super().__init__(tuple)


def _serving(mirror: Mirror, local: Local) -> _Serving:
    found: dict[tuple[str, str], list[NetworkEndpoint]] = defaultdict(list)
    for endpoint in mirror.endpoints():
        if endpoint.serving and endpoint.address and not local.has_ended(endpoint.task_id):
            found[endpoint.service_id, endpoint.network_id].append(endpoint)
    serving = _Serving()
    for key, endpoints in found.items():
        serving[key] = tuple(sorted(endpoints, key=_numeric))
    return serving


def _numeric(endpoint: NetworkEndpoint) -> int:
    return int(ipaddress.ip_address(endpoint.address))


def is_encrypted(network: Network) -> bool:
    return ENCRYPTED_OPTION in network.spec.options


def _overlay_network(network: Network) -> OverlayNetwork:
    return OverlayNetwork(
        network_id=network.id,
        vni=network.vni,
        subnet=network.ipam.subnet,
        gateway=network.ipam.gateway,
        internal=network.spec.internal,
        mtu_bytes=drivers.mtu_option(network),
        encrypted=is_encrypted(network),
        subnet6=network.ipam6.subnet,
        gateway6=network.ipam6.gateway,
    )


def _published(
    mirror: Mirror, local: Local, serving: _Serving, networks: Mapping[str, Network]
) -> tuple[PublishedPort, ...]:
    """Ingress ports of services, then host-mode ports of running local tasks; the first claim of a port wins
    (the managers allow one claim, two appear only for the moment in which one task replaces another)."""
    ports: dict[tuple[L4, int, str], PublishedPort] = {}

    def claim(port: PortConfig, backends: Iterable[tuple[str, int]], balance: Balance = "rr") -> None:
        """`backends`: (address, weight)"""
        if port.published_port:
            key = (_L4[port.protocol], port.published_port, port.host_ip)
            found = [(address, weight) for address, weight in backends if address]
            weights = tuple(weight for _, weight in found)
            ports.setdefault(
                key,
                PublishedPort(
                    key[0],
                    port.published_port,
                    tuple((address, port.target_port) for address, _ in found),
                    weights if len(set(weights)) > 1 else (),
                    balance,
                    port.host_ip,
                ),
            )

    for service in mirror.services():
        network = networks.get(service.ingress_network_id)
        # A host that cannot encrypt has no way into the network: it refuses, and nothing leaves in clear.
        cut_off = network is not None and is_encrypted(network) and not local.encrypts
        ends = () if cut_off else serving[service.service_id, service.ingress_network_id]
        weighed = [(end, min(end.weight or 1, WEIGHT_MAX)) for end in ends]
        backends = [(end.address, weight) for end, weight in weighed]
        backends += [(end.address6, weight) for end, weight in weighed]
        for port in service.ports:
            if port.mode == INGRESS:
                claim(port, backends, _BALANCE[service.balance])
    for task in mirror.tasks():
        if local.states.get(task.id) != TASK_RUNNING or task.desired_state >= TASK_SHUTDOWN:
            continue
        outside = [net for net in task.networks if net.network_id in networks]
        outside.sort(key=lambda net: networks[net.network_id].spec.internal)
        for port in task.endpoint.ports:
            given = [(local.given[task.id], 1)] if task.id in local.given else []
            ways_in = given or [(_bare(address), 1) for net in outside[:1] for address in (net.address, net.address6)]
            if port.mode == HOST and ways_in:
                claim(port, ways_in)
    return tuple(ports[key] for key in sorted(ports))
