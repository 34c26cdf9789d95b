"""The mirror as seen by the kernel and by the name server (pure).

Who is behind a VIP or a published port is decided by the managers alone (`NetworkEndpoint.serving`), with one
exception: a local task that is known to have ended is left out at once, without waiting for the round trip.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dns.interface import NetworkNames, Picture, Sandbox, ServiceNames, TaskNames
from node.mirror import Mirror
from node.steps import State, ended
from overlay.interface import L4, EncryptionKey, HostState, OverlayNetwork, Peer, PublishedPort, RemoteEndpoint, Vip
from proto.dispatch_pb2 import NetworkEndpoint, NetworkService
from proto.objects_pb2 import HOST, INGRESS, SCTP, TASK_RUNNING, TASK_SHUTDOWN, TCP, UDP, VIP, Network, PortConfig

DEFAULT_VXLAN_PORT = 4789
MTU_OPTION = "com.docker.network.driver.mtu"
ENCRYPTED_OPTION = "encrypted"

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
    keys: tuple[EncryptionKey, ...] = ()
    encrypts: bool = False
    """Its kernel can."""

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
        keys=local.keys,
    )


def _peers(mirror: Mirror, local: Local) -> tuple[Peer, ...]:
    """The other nodes. One that is down and whose address another node has by now is no peer: its host left and
    joined again, and until somebody removes the old node both stand in the list."""
    others = [peer for peer in mirror.peers() if peer.node_id != local.node_id]
    taken = {local.vtep} | {peer.vtep_addr for peer in others if not peer.down}
    return tuple(
        Peer(peer.node_id, peer.vtep_addr, peer.index, encryption_epoch=peer.encryption_epoch)
        for peer in others
        if not (peer.down and peer.vtep_addr in taken)
    )


def picture(mirror: Mirror, local: Local, sandboxes: Iterable[Sandbox], upstreams: tuple[str, ...]) -> Picture:
    """Names for the networks that local tasks see. The ingress network has none: publishing needs no names
    and its tasks belong to strangers."""
    serving = _serving(mirror, local)
    named = {n.id: n for n in mirror.networks() if not n.spec.ingress}
    boxes = tuple(
        Sandbox(box.task_id, box.netns_path, tuple(i for i in box.network_ids if i in named), box.upstreams)
        for box in sorted(sandboxes, key=lambda box: box.task_id)
    )
    seen = {network_id for box in boxes for network_id in box.network_ids}
    endpoints: dict[str, list[NetworkEndpoint]] = defaultdict(list)
    for endpoint in mirror.endpoints():
        endpoints[endpoint.network_id].append(endpoint)
    services = list(mirror.services())
    return Picture(
        networks=tuple(
            NetworkNames(
                network_id=network.id,
                name=network.spec.annotations.name,
                internal=network.spec.internal,
                services=tuple(
                    names
                    for service in services
                    if (names := _service_names(service, network.id, serving[service.service_id, network.id]))
                    is not None
                ),
                tasks=tuple(_task_names(e, local) for e in endpoints[network.id] if e.address),
            )
            for network in named.values()
            if network.id in seen
        ),
        sandboxes=boxes,
        upstreams=upstreams,
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


def is_encrypted(network: Network) -> bool:
    return ENCRYPTED_OPTION in network.spec.options


def _overlay_network(network: Network) -> OverlayNetwork:
    mtu = network.spec.options.get(MTU_OPTION, "")
    return OverlayNetwork(
        network_id=network.id,
        vni=network.vni,
        subnet=network.ipam.subnet,
        gateway=network.ipam.gateway,
        internal=network.spec.internal,
        mtu_bytes=int(mtu) if mtu.isdigit() else None,
        encrypted=is_encrypted(network),
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
                network = networks.get(service.ingress_network_id)
                # A host that cannot encrypt has no way into the network: it refuses, and nothing leaves in clear.
                cut_off = network is not None and is_encrypted(network) and not local.encrypts
                claim(port, () if cut_off else serving[service.service_id, service.ingress_network_id])
    for task in mirror.tasks():
        if local.states.get(task.id) != TASK_RUNNING or task.desired_state >= TASK_SHUTDOWN:
            continue
        outside = [net for net in task.networks if net.network_id in networks]
        outside.sort(key=lambda net: networks[net.network_id].spec.internal)
        for port in task.endpoint.ports:
            if port.mode == HOST and outside:
                claim(port, [outside[0].address.partition("/")[0]])
    return tuple(ports[key] for key in sorted(ports))


def _service_names(service: NetworkService, network_id: str, addresses: tuple[str, ...]) -> ServiceNames | None:
    """None: the service is not on this network."""
    config = next((c for c in service.networks if c.network_id == network_id), None)
    vip = next((v.address.partition("/")[0] for v in service.virtual_ips if v.network_id == network_id), None)
    if config is None and vip is None and not addresses:
        return None
    aliases = tuple(config.aliases) if config is not None else ()
    names = tuple(dict.fromkeys((service.name, *aliases)))
    return ServiceNames(names=names, vip=vip if service.mode == VIP else None, task_addresses=addresses)


def _task_names(endpoint: NetworkEndpoint, local: Local) -> TaskNames:
    """The full name stands for as long as the address belongs to the task, so that peers of a draining task can
    still be named; `<service>.<slot>` and `<slot>.<service>` mean the one that serves, of which an update has two:
    a slot keeps its name whatever task fills it. Tasks of global services have their node instead of a slot."""
    names: tuple[str, ...] = (endpoint.task_name,)
    if endpoint.serving and not local.has_ended(endpoint.task_id):
        short = endpoint.task_name.rpartition(".")[0]
        service, _, place = short.rpartition(".")
        names += (short, f"{place}.{service}")
    return TaskNames(names=names, address=endpoint.address)
