"""What the doctor has nodes try: single checks, and the plan of all of them (values)."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from proto.dispatch_pb2 import Connect, Lookup, Ping, Probe
from proto.objects_pb2 import TCP, Protocol

SMALL_BYTES = 84
PATH_BYTES = (SMALL_BYTES, 576, 1280, 1350, 1400, 1420, 1450, 1472, 1492, 1500)
"""Usual sizes of packets that fit through something: tunnels, PPPoE, Ethernet."""


class Kind(enum.Enum):
    """In the order in which they are tried and shown."""

    HOST = "host"
    UNDERLAY = "underlay"
    PATH = "path MTU"
    OVERLAY = "overlay"
    FULL = "full packets"
    TCP = "TCP on overlay"
    EGRESS = "way out"
    NAMES = "names"
    BACKEND = "tasks listen"
    VIP = "virtual IP"
    PUBLISHED = "published port"


@dataclass(frozen=True, slots=True)
class Check:
    kind: Kind
    node_id: str
    """Who tries."""
    task_id: str = ""
    """From this task's namespace; "" = from the host itself."""
    peer_id: str = ""
    """The node at the other end, if one node is."""
    network_id: str = ""
    service_id: str = ""
    backend_id: str = ""
    """The task at the other end."""
    address: str = ""
    port: int = 0
    protocol: Protocol.ValueType = TCP
    name: str = ""
    expected: frozenset[str] = frozenset()
    """Addresses that the name has."""
    ipv6: bool = False
    """Of a name: which family is asked for."""

    def probe(self, number: int) -> Probe:
        probe = Probe(number=number, task_id=self.task_id)
        match self.kind:
            case Kind.UNDERLAY | Kind.OVERLAY | Kind.EGRESS:
                probe.ping.CopyFrom(Ping(address=self.address, sizes=[SMALL_BYTES]))
            case Kind.PATH:
                probe.ping.CopyFrom(Ping(address=self.address, sizes=PATH_BYTES, full=True))
            case Kind.FULL:
                probe.ping.CopyFrom(Ping(address=self.address, full=True))
            case Kind.NAMES:
                probe.lookup.CopyFrom(Lookup(name=self.name, ipv6=self.ipv6))
            case _:
                probe.connect.CopyFrom(Connect(address=self.address, port=self.port, protocol=self.protocol))
        return probe


@dataclass(frozen=True, slots=True)
class Plan:
    checks: tuple[Check, ...]
    left_out: int = 0
    """Checks beyond PROBES_MAX of a node."""
    services_left_out: int = 0
    nodes_left_out: int = 0
    names: Mapping[str, str] = field(default_factory=dict)
    """ID -> what people call the node, network, service or task."""
    endpoints: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    """(node, network) -> addresses of tasks that the node should have been told of."""
    unserved: frozenset[str] = frozenset()
    """Services with ports, and tasks that should run, none of which serves."""
    masquerading: frozenset[str] = frozenset()
    """Nodes whose tasks of published services do not see the clients' own addresses."""

    def by_node(self) -> dict[str, list[Check]]:
        found: defaultdict[str, list[Check]] = defaultdict(list)
        for check in self.checks:
            found[check.node_id].append(check)
        return dict(found)
