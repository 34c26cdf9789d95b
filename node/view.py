"""The mirror as seen by the kernel (pure); pictures.py has the name server's.

Who is behind a VIP or a published port is decided by the managers alone (`NetworkEndpoint.serving`), with one
exception: a local task that is known to have ended is left out at once, without waiting for the round trip.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from node.mirror import Mirror
from node.steps import State, ended
from overlay.interface import L4, HostState, OverlayNetwork, Peer, PublishedPort, RemoteEndpoint, Vip
from proto.objects_pb2 import HOST, INGRESS, SCTP, TASK_RUNNING, TASK_SHUTDOWN, TCP, UDP, VIP, Network, PortConfig

DEFAULT_VXLAN_PORT = 4789
MTU_OPTION = "com.docker.network.driver.mtu"

_L4: dict[int, L4] = {TCP: "tcp", UDP: "udp", SCTP: "sctp"}


@dataclass(frozen=True, slots=True)
class Local:
    """What this host itself knows."""

    node_id: str
    vtep: str
    index: int
    """0: no manager has numbered this node yet, nothing can be wired."""
    vxlan_port: int = DEFAULT_VXLAN_PORT
    states: Mapping[str, State] = field(default_factory=dict)
    """Observed states of the tasks of this host."""

    def has_ended(self, task_id: str) -> bool:
        state = self.states.get(task_id)
        return state is not None and ended(state)


def host_state(mirror: Mirror, local: Local) -> HostState:
    networks = {n.id: n for n in mirror.networks() if n.vni and n.ipam.subnet}
    serving = _serving(mirror, local)
    return HostState(
        vtep=local.vtep,
        index=local.index,
        vxlan_port=local.vxlan_port,
        networks=tuple(_overlay_network(n) for n in networks.values()),
        peers=_peers(mirror, local),
        endpoints=tuple(
            RemoteEndpoint(e.network_id, e.address, e.node_id)
            for e in mirror.endpoints()
            if e.node_id != local.node_id and e.network_id in networks
        ),
        vips=tuple(
            Vip(vip.network_id, vip.address.partition("/")[0], serving[service.service_id, vip.network_id])
            for service in mirror.services()
            if service.mode == VIP
            for vip in service.virtual_ips
            if vip.network_id in networks
        ),
        published=_published(mirror, local, serving, networks),
    )


def _peers(mirror: Mirror, local: Local) -> tuple[Peer, ...]:
    """The other nodes. One that is down and whose address another node has by now is no peer: its host left and
    joined again, and until somebody removes the old node both stand in the list."""
    others = [peer for peer in mirror.peers() if peer.node_id != local.node_id]
    taken = {local.vtep} | {peer.vtep_addr for peer in others if not peer.down}
    return tuple(
        Peer(peer.node_id, peer.vtep_addr, peer.index) for peer in others if not (peer.down and peer.vtep_addr in taken)
    )


def ingress_network_ids(mirror: Mirror) -> frozenset[str]:
    return frozenset(n.id for n in mirror.networks() if n.spec.ingress)


class _Backends(defaultdict[tuple[str, str], tuple[str, ...]]):
    """(service ID, network ID) -> serving addresses in numeric order."""

    def __init__(self) -> None:
        super().__init__(tuple)


def _serving(mirror: Mirror, local: Local) -> _Backends:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for endpoint in mirror.endpoints():
        if endpoint.serving and endpoint.address and not local.has_ended(endpoint.task_id):
            found[endpoint.service_id, endpoint.network_id].append(endpoint.address)
    backends = _Backends()
    for key, addresses in found.items():
        backends[key] = tuple(sorted(addresses, key=_numeric))
    return backends


def _numeric(address: str) -> int:
    return int(ipaddress.ip_address(address))


def _overlay_network(network: Network) -> OverlayNetwork:
    mtu = network.spec.options.get(MTU_OPTION, "")
    return OverlayNetwork(
        network_id=network.id,
        vni=network.vni,
        subnet=network.ipam.subnet,
        gateway=network.ipam.gateway,
        internal=network.spec.internal,
        mtu_bytes=int(mtu) if mtu.isdigit() else None,
    )


def _published(
    mirror: Mirror, local: Local, serving: _Backends, networks: Mapping[str, Network]
) -> tuple[PublishedPort, ...]:
    """Ingress ports of services, then host-mode ports of running local tasks; the first claim of a port wins
    (the managers allow one claim, two appear only for the moment in which one task replaces another)."""
    ports: dict[tuple[L4, int], PublishedPort] = {}

    def claim(port: PortConfig, backends: Iterable[str]) -> None:
        if port.published_port:
            key = (_L4[port.protocol], port.published_port)
            ports.setdefault(key, PublishedPort(*key, tuple((address, port.target_port) for address in backends)))

    for service in mirror.services():
        for port in service.ports:
            if port.mode == INGRESS:
                claim(port, serving[service.service_id, service.ingress_network_id])
    for task in mirror.tasks():
        if local.states.get(task.id) != TASK_RUNNING or task.desired_state >= TASK_SHUTDOWN:
            continue
        outside = [net for net in task.networks if net.network_id in networks]
        outside.sort(key=lambda net: networks[net.network_id].spec.internal)
        for port in task.endpoint.ports:
            if port.mode == HOST and outside:
                claim(port, [outside[0].address.partition("/")[0]])
    return tuple(ports[key] for key in sorted(ports))
