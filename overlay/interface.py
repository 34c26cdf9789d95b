"""What the agent wants of this host's networking, as values, and the one Protocol that makes it so.

`HostState` is the whole wanted picture; `apply` may be called as often as anything changes and makes
the kernel equal to it (adopting what already stands, touching nothing that is not ours).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

L4 = Literal["tcp", "udp", "sctp"]


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


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node: its VTEP and the small number from which its leg's address and MAC follow."""

    node_id: str
    vtep: str
    index: int


@dataclass(frozen=True, slots=True)
class RemoteEndpoint:
    """A task's address on another node (its MAC follows from the address)."""

    network_id: str
    address: str
    node_id: str


@dataclass(frozen=True, slots=True)
class Vip:
    """A service's virtual IP: every port of it is balanced over `backends` (addresses), round robin."""

    network_id: str
    address: str
    backends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """A port of this host (any local address) balanced over backends (address, port).
    Ingress: the tasks of the whole cluster. Host mode: the one local task."""

    protocol: L4
    port: int
    backends: tuple[tuple[str, int], ...]


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


@dataclass(frozen=True, slots=True)
class Interface:
    """One leg of a task: eth0, eth1, ... in the order given."""

    network_id: str
    address: str
    """ "10.0.1.5/24" """


@dataclass(frozen=True, slots=True)
class Attachment:
    task_id: str
    interfaces: tuple[Interface, ...]
    """The default route goes through the first that is not internal."""
    sysctls: dict[str, str] = field(default_factory=dict)


class NetworkError(Exception):
    """The kernel or the plan refuses; the message names the object, the reason and the remedy."""


class HostNetwork(Protocol):
    async def apply(self, state: HostState) -> None: ...

    async def attach(self, attachment: Attachment) -> Path:
        """Make (or adopt) the task's network namespace, wired as told; returns its path.
        The networks must be in the last applied state. Idempotent. Raises NetworkError."""
        ...

    async def detach(self, task_id: str) -> None:
        """Remove the namespace and all that belongs to it. Idempotent."""
        ...

    async def attached(self) -> frozenset[str]:
        """Task IDs that have a namespace now (after a restart: those to adopt or detach)."""
        ...

    async def teardown(self) -> None:
        """Remove every link, namespace, rule and route of ours on this host."""
        ...
