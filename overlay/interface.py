"""What the agent wants of this host's networking, as values, and the one Protocol that makes it so.

`HostState` is the whole wanted picture; `apply` may be called as often as anything changes and makes
the kernel equal to it (adopting what already stands, touching nothing that is not ours).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

T = TypeVar("T")
L4 = Literal["tcp", "udp", "sctp"]
Balance = Literal["rr", "lc", "sh"]
"""Round robin, least connections (IPVS only; else round robin), by the source's address."""
WEIGHT_MAX = 100
Balancer = Literal["nftables", "ipvs"]


@dataclass(frozen=True, slots=True)
class OverlayNetwork:
    network_id: str
    vni: int
    subnet: str
    """ "10.0.1.0/24" """
    gateway: str
    """ "10.0.1.1": this host's own leg answers for it, on every host. """
    internal: bool = False
    mtu_bytes: int | None = None
    """None = the underlay's MTU less the VXLAN overhead."""
    subnet6: str = ""
    """ "fd00:1::/64"; "" = no IPv6. """
    gateway6: str = ""
    encrypted: bool = False
    """Between hosts its packets travel in ESP; clear ones are dropped."""


@dataclass(frozen=True, slots=True)
class BridgeNetwork:
    """Of this host alone: the host chooses the subnet (one that overlaps nothing here) and gives each task its address.
    Tasks on it have egress and can publish ports of this host."""

    network_id: str


@dataclass(frozen=True, slots=True)
class MacvlanNetwork:
    """Tasks stand in the LAN of a link of the host, with addresses that the swarm gives."""

    network_id: str
    parent: str
    """Name of the host's link."""
    subnet: str
    gateway: str
    """The LAN's router."""
    internal: bool = False
    """No default route."""
    mode: str = "bridge"
    """Of MACVLAN_MODES."""
    subnet6: str = ""
    gateway6: str = ""
    mtu_bytes: int | None = None
    """None = the parent's."""


MACVLAN_MODES = {"private": 1, "vepa": 2, "bridge": 4, "passthru": 8}
"""As ip-link(8) names them; linux/if_link.h."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node: its VTEP and the small number from which its leg's address and MAC follow."""

    node_id: str
    vtep: str
    index: int
    masquerade: bool = False
    """Its tasks cannot answer through another host: clients' addresses must be hidden from them."""
    encryption_epoch: int = 0
    """0: it is on no encrypted network."""


@dataclass(frozen=True, slots=True)
class RemoteEndpoint:
    """A task's addresses on another node (its MAC follows from the IPv4 one)."""

    network_id: str
    address: str
    node_id: str
    address6: str = ""


@dataclass(frozen=True, slots=True)
class Vip:
    """A service's virtual IP, of either family: every port of it is balanced over `backends` (addresses of the same
    family)."""

    network_id: str
    address: str
    backends: tuple[str, ...]
    weights: tuple[int, ...] = ()
    """One per backend, 1 to WEIGHT_MAX; empty = all the same."""
    balance: Balance = "rr"


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """A port of this host balanced over backends (address, port), of either family each.
    Ingress: the tasks of the whole cluster. Host mode: the one local task."""

    protocol: L4
    port: int
    backends: tuple[tuple[str, int], ...]
    weights: tuple[int, ...] = ()
    balance: Balance = "rr"
    host_ip: str = ""
    """The local address that takes connections; "" = every one."""


@dataclass(frozen=True, slots=True)
class EncryptionKey:
    """Of encrypted networks. The ring is ordered newest first: send with the second, accept all."""

    serial: int
    key: bytes = field(repr=False)
    """AES-128 key (16 bytes) and salt (4 bytes) of rfc4106(gcm(aes))."""


@dataclass(frozen=True, slots=True)
class HostState:
    vtep: str
    """This node's address on the underlay."""
    index: int
    vxlan_port: int = 4789
    networks: tuple[OverlayNetwork, ...] = ()
    peers: tuple[Peer, ...] = ()
    endpoints: tuple[RemoteEndpoint, ...] = ()
    vips: tuple[Vip, ...] = ()
    published: tuple[PublishedPort, ...] = ()
    keys: tuple[EncryptionKey, ...] = ()
    bridges: tuple[BridgeNetwork, ...] = ()
    macvlans: tuple[MacvlanNetwork, ...] = ()

    def network_ids(self) -> frozenset[str]:
        """Of all kinds."""
        return frozenset(
            [network.network_id for network in self.networks]
            + [network.network_id for network in self.bridges]
            + [network.network_id for network in self.macvlans]
        )


@dataclass(frozen=True, slots=True)
class Interface:
    """One leg of a task: eth0, eth1, ... in the order given."""

    network_id: str
    address: str
    """ "10.0.1.5/24"; "" on a BridgeNetwork: the host gives one. """
    address6: str = ""
    """ "fd00:1::5/64"; "" = none """


@dataclass(frozen=True, slots=True)
class Attachment:
    task_id: str
    interfaces: tuple[Interface, ...]
    """The default route goes through the first that is not internal."""
    sysctls: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncryptionStatus:
    """What other hosts have to know of this one's encryption."""

    supported: bool
    """The kernel can."""
    epoch: int
    """Random, never 0; replaced when the kernel lost associations."""
    serial: int = 0
    """The newest key that the kernel accepts; 0 = none."""


@dataclass(frozen=True, slots=True)
class NetworkDrift:
    """What of one network the kernel lacks, and what entries it has besides, in words."""

    network_id: str
    mtu_bytes: int
    full_bytes: int
    """What its largest packets take on the underlay; 0 = none leave this host."""
    missing: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a look at the kernel shows, beside the picture applied last."""

    networks: tuple[NetworkDrift, ...] = ()
    forwards: bool = True
    """net.ipv4.ip_forward"""
    strict_links: tuple[str, ...] = ()
    """Links of ours whose rp_filter is strict."""
    tables_missing: tuple[str, ...] = ()
    """IDs of tasks without our nftables table; "host" for the host's own."""
    leg: str = ""
    """A leg of some network, "" = there is none: they are all treated alike."""
    underlay_link: str = ""
    underlay_mtu_bytes: int = 0


class NetworkError(Exception):
    """The kernel or the plan refuses; the message names the object, the reason and the remedy."""


class HostNetwork(Protocol):
    async def apply(self, state: HostState) -> None: ...

    async def attach(self, attachment: Attachment) -> Path:
        """Make (or adopt) the task's network namespace, wired as told; returns its path.
        The networks must be in the last applied state. Idempotent. Raises NetworkError."""
        ...

    def namespace(self, task_id: str) -> Path:
        """Where the task's network namespace is as long as it is attached: what `attach` returns."""
        ...

    async def given_address(self, task_id: str) -> str:
        """The address (no prefix length) that this host gave the attached task on a BridgeNetwork; "" = none."""
        ...

    async def detach(self, task_id: str) -> None:
        """Remove the namespace and all that belongs to it. Idempotent."""
        ...

    async def attached(self) -> frozenset[str]:
        """Task IDs that have a namespace now (after a restart: those to adopt or detach)."""
        ...

    def encryption(self) -> EncryptionStatus:
        """As of now; the first call may ask the kernel. Raises OSError."""
        ...

    async def inspect(self) -> Inspection:
        """Changes nothing. Raises NetworkError."""
        ...

    async def inside(self, task_id: str, function: Callable[[], T]) -> T:
        """Run it in the task's network namespace ("" = the host's). It must return at once: everything else waits.
        Raises NetworkError when there is no such namespace, and what the function raises."""
        ...

    async def teardown(self) -> None:
        """Remove every link, namespace, rule and route of ours on this host."""
        ...
