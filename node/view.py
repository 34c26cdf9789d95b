"""The mirror as seen by the kernel (pure but for its memory: each state is drawn from the one before, so that a change
costs what it changes and not what a host with thousands of tasks in sight knows); pictures.py has the name server's.

Who is behind a VIP or a published port is decided by the managers alone (`NetworkEndpoint.serving`), with one
exception: a local task that is known to have ended is left out at once, without waiting for the round trip.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from node import drivers
from node.mirror import ENDPOINT, SERVICE, Mirror
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
from proto.dispatch_pb2 import Item, NetworkEndpoint, NetworkPeer, NetworkService
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
    Task,
)

T = TypeVar("T")

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


class HostStates:
    """Draws the state of the host again and again; what did not change since the last time are the same objects."""

    def __init__(self) -> None:
        self._memory = _Memory((), "", encrypts=False)

    def draw(self, mirror: Mirror, local: Local) -> HostState:
        """What the kernel should be like."""
        networks = tuple(mirror.networks())
        memory = self._memory
        if (networks, local.node_id, local.encrypts) != (memory.networks, memory.node_id, memory.encrypts):
            # Rare, and it concerns whatever is on the network.
            self._memory = _Memory(networks, local.node_id, local.encrypts)
        return self._memory.draw(mirror, local)


class _Sorted(Generic[T]):
    """Values in the order of their keys."""

    def __init__(self) -> None:
        self._values: dict[str, T] = {}
        self._drawn: tuple[T, ...] | None = ()

    def put(self, key: str, value: T | None) -> None:
        """None: there is none."""
        if self._values.get(key) == value:
            return
        self._drawn = None
        if value is None:
            del self._values[key]
        else:
            self._values[key] = value

    def values(self) -> tuple[T, ...]:
        if self._drawn is None:
            self._drawn = tuple(self._values[key] for key in sorted(self._values))
        return self._drawn


class _Memory:
    """What follows from the items seen last, for these networks."""

    def __init__(self, networks: tuple[Network, ...], node_id: str, encrypts: bool) -> None:
        self.networks = networks
        self.node_id = node_id
        self.encrypts = encrypts
        self._overlays = {
            net.id: net for net in networks if net.vni and net.ipam.subnet and drivers.driver(net) == drivers.OVERLAY
        }
        self._items: Mapping[str, Item] = {}
        self._ended: frozenset[str] = frozenset()
        self._serving: dict[str, dict[str, dict[str, NetworkEndpoint]]] = defaultdict(lambda: defaultdict(dict))
        """Service ID -> network ID -> task ID -> endpoint."""
        self._remote = _Sorted[RemoteEndpoint]()
        self._vips = _Sorted[tuple[Vip, ...]]()
        """Of each service."""
        self._claims = _Sorted[tuple[PublishedPort, ...]]()
        """Of each service, by ingress."""
        self._tasks = _Sorted[Task]()
        self._peers = _Sorted[NetworkPeer]()

    def draw(self, mirror: Mirror, local: Local) -> HostState:
        self._follow(mirror.items, frozenset(task_id for task_id in local.states if local.has_ended(task_id)))
        return HostState(
            vtep=local.vtep,
            index=local.index,
            vxlan_port=local.vxlan_port,
            networks=tuple(map(_overlay_network, self._overlays.values())),
            peers=_peers(self._peers.values(), local),
            endpoints=self._remote.values(),
            vips=tuple(vip for each in self._vips.values() for vip in each),
            published=_published(self._claims.values(), self._tasks.values(), local, self._overlays),
            keys=local.keys,
            bridges=drivers.bridges(self.networks, self._tasks.values()),
            macvlans=drivers.macvlans(self.networks),
        )

    def _follow(self, items: Mapping[str, Item], ended_tasks: frozenset[str]) -> None:
        """Take in what has changed since the last state: items are never changed in place, so identity tells."""
        before = self._items
        changed = {key for key, item in items.items() if before.get(key) is not item}
        toggled = self._ended ^ ended_tasks
        if toggled:
            changed.update(key for key in items if key.startswith(ENDPOINT) and key.rpartition("/")[2] in toggled)
        gone = before.keys() - items.keys()
        self._items, self._ended = items, ended_tasks
        moved = {
            key for key in changed & before.keys() if before[key].endpoint.service_id != items[key].endpoint.service_id
        }
        services = {self._drop(key, before[key]) for key in gone | moved}
        services |= {self._put(key, items[key]) for key in changed}
        for service_id in services - {""}:
            self._draw_service(service_id)

    def _put(self, key: str, item: Item) -> str:
        """Returns the ID of the service that is served otherwise now, or ""."""
        match item.WhichOneof("item"):
            case "endpoint":
                return self._put_endpoint(key, item.endpoint)
            case "service":
                return item.service.service_id
            case "task":
                self._tasks.put(key, item.task)
            case "peer":
                self._peers.put(key, item.peer)
        return ""

    def _put_endpoint(self, key: str, end: NetworkEndpoint) -> str:
        away = end.node_id != self.node_id and end.network_id in self._overlays
        remote = RemoteEndpoint(end.network_id, end.address, end.node_id, end.address6) if away else None
        self._remote.put(key, remote)
        here = self._serving[end.service_id][end.network_id]
        if end.serving and end.address and end.task_id not in self._ended:
            here[end.task_id] = end
        else:
            here.pop(end.task_id, None)
        return end.service_id

    def _drop(self, key: str, item: Item) -> str:
        """Returns the same."""
        self._remote.put(key, None)
        self._tasks.put(key, None)
        self._peers.put(key, None)
        if item.HasField("endpoint"):
            end = item.endpoint
            self._serving[end.service_id][end.network_id].pop(end.task_id, None)
            return end.service_id
        return item.service.service_id

    def _draw_service(self, service_id: str) -> None:
        item = self._items.get(f"{SERVICE}{service_id}")
        if item is None:
            self._vips.put(service_id, None)
            self._claims.put(service_id, None)
            return
        service, serving = item.service, self._serving[service_id]
        self._vips.put(service_id, tuple(_vips(service, serving, self._overlays)))
        network = self._overlays.get(service.ingress_network_id)
        # A host that cannot encrypt has no way into the network: it refuses, and nothing leaves in clear.
        cut_off = network is not None and is_encrypted(network) and not self.encrypts
        self._claims.put(service_id, tuple(_ingress(service, {} if cut_off else serving)))


def _ordered(serving: Mapping[str, Mapping[str, NetworkEndpoint]], network_id: str) -> list[NetworkEndpoint]:
    """In numeric order of their addresses."""
    return sorted(serving.get(network_id, {}).values(), key=lambda end: socket.inet_aton(end.address))


def _vips(
    service: NetworkService,
    serving: Mapping[str, Mapping[str, NetworkEndpoint]],
    overlays: Mapping[str, Network],
) -> Iterable[Vip]:
    balance = _BALANCE[service.balance]
    for vip in service.virtual_ips if service.mode == VIP else ():
        if vip.network_id not in overlays:
            continue
        ends = _ordered(serving, vip.network_id)
        yield Vip(vip.network_id, _bare(vip.address), tuple(end.address for end in ends), _weights(ends), balance)
        if vip.address6:
            ends = [end for end in ends if end.address6]
            backends = tuple(end.address6 for end in ends)
            yield Vip(vip.network_id, _bare(vip.address6), backends, _weights(ends), balance)


def _bare(address: str) -> str:
    """Without the prefix's length."""
    return address.partition("/")[0]


def _weights(ends: Iterable[NetworkEndpoint]) -> tuple[int, ...]:
    """() when all are the same."""
    weights = tuple(min(end.weight or 1, WEIGHT_MAX) for end in ends)
    return weights if len(set(weights)) > 1 else ()


def _peers(peers: Iterable[NetworkPeer], local: Local) -> tuple[Peer, ...]:
    """The other nodes. One that is down and whose address another node has by now is no peer: its host left and
    joined again, and until somebody removes the old node both stand in the list."""
    others = [peer for peer in peers if peer.node_id != local.node_id]
    taken = {local.vtep} | {peer.vtep_addr for peer in others if not peer.down}
    return tuple(
        Peer(peer.node_id, peer.vtep_addr, peer.index, peer.masquerade, peer.encryption_epoch)
        for peer in others
        if not (peer.down and peer.vtep_addr in taken)
    )


def ingress_network_ids(mirror: Mirror) -> frozenset[str]:
    return frozenset(n.id for n in mirror.networks() if n.spec.ingress)


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


def _claim(port: PortConfig, backends: Iterable[tuple[str, int]], balance: Balance = "rr") -> Iterable[PublishedPort]:
    """Nothing while the port has no number. `backends`: (address, weight)"""
    if port.published_port:
        found = [(address, weight) for address, weight in backends if address]
        weights = tuple(weight for _, weight in found)
        yield PublishedPort(
            _L4[port.protocol],
            port.published_port,
            tuple((address, port.target_port) for address, _ in found),
            weights if len(set(weights)) > 1 else (),
            balance,
            port.host_ip,
        )


def _ingress(service: NetworkService, serving: Mapping[str, Mapping[str, NetworkEndpoint]]) -> Iterable[PublishedPort]:
    ports = [port for port in service.ports if port.mode == INGRESS]
    ends = _ordered(serving, service.ingress_network_id) if ports else []
    weighed = [(end, min(end.weight or 1, WEIGHT_MAX)) for end in ends]
    backends = [(end.address, weight) for end, weight in weighed] + [(end.address6, weight) for end, weight in weighed]
    for port in ports:
        yield from _claim(port, backends, _BALANCE[service.balance])


def _published(
    claims: Iterable[tuple[PublishedPort, ...]], tasks: Iterable[Task], local: Local, overlays: Mapping[str, Network]
) -> tuple[PublishedPort, ...]:
    """Ingress ports of services, then host-mode ports of running local tasks; the first claim of a port wins
    (the managers allow one claim, two appear only for the moment in which one task replaces another)."""
    ports: dict[tuple[L4, int, str], PublishedPort] = {}
    for found in (*(port for each in claims for port in each), *_host_mode(tasks, local, overlays)):
        ports.setdefault((found.protocol, found.port, found.host_ip), found)
    return tuple(ports[key] for key in sorted(ports))


def _host_mode(tasks: Iterable[Task], local: Local, overlays: Mapping[str, Network]) -> Iterable[PublishedPort]:
    for task in tasks:
        if local.states.get(task.id) != TASK_RUNNING or task.desired_state >= TASK_SHUTDOWN:
            continue
        outside = [net for net in task.networks if net.network_id in overlays]
        outside.sort(key=lambda net: overlays[net.network_id].spec.internal)
        given = [(local.given[task.id], 1)] if task.id in local.given else []
        ways_in = given or [(_bare(address), 1) for net in outside[:1] for address in (net.address, net.address6)]
        for port in task.endpoint.ports:
            if port.mode == HOST and ways_in:
                yield from _claim(port, ways_in)
