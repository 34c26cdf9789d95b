"""Published ports: one number space per protocol for the whole cluster, since every host answers on each of them.
Ports that are published on different addresses of the hosts do not meet; one without an address meets all.

Host-mode ports are the scheduler's business among each other (two services may use one port on different nodes);
against ingress ports they count, which are bound everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from proto import objects_pb2 as pb
from proto.objects_pb2 import EndpointSpec, PortConfig, Service
from swarm.store.store import Store

AUTO_FIRST, AUTO_LAST = 30000, 32767
"""Where ports are chosen that the user left open (Docker's range)."""

Key = tuple[int, int]
"""Protocol and number."""


@dataclass(frozen=True, slots=True)
class Claim:
    service: Service
    mode: pb.PublishMode.ValueType
    host_ip: str


class PortMap:
    """Who publishes what."""

    def __init__(self, services: Iterable[Service]) -> None:
        self._claims: dict[Key, list[Claim]] = {}
        for service in services:
            self.add(service, service.endpoint.spec.ports)

    def add(self, service: Service, ports: Iterable[PortConfig]) -> None:
        for port in ports:
            if port.published_port:
                claims = self._claims.setdefault((port.protocol, port.published_port), [])
                claims.append(Claim(service, port.mode, port.host_ip))

    def conflict(self, port: PortConfig, owner_id: str) -> str | None:
        """Why this service (its ID) cannot publish this port, in Docker's words, or None."""
        for claim in self._claims.get((port.protocol, port.published_port), ()):
            if claim.service.id == owner_id or not share_address(claim.host_ip, port.host_ip):
                continue
            if pb.INGRESS in (claim.mode, port.mode):
                mode = "an ingress" if claim.mode == pb.INGRESS else "a host-published"
                name = claim.service.spec.annotations.name
                number = port.published_port
                return f"port '{number}' is already in use by service '{name}' ({claim.service.id}) as {mode} port"
        return None

    def free(self, protocol: pb.Protocol.ValueType, owner_id: str, also_taken: set[Key]) -> int | None:
        """The first number that nobody else publishes in any mode on any address."""
        for number in range(AUTO_FIRST, AUTO_LAST + 1):
            key = (protocol, number)
            if key not in also_taken and all(c.service.id == owner_id for c in self._claims.get(key, ())):
                return number
        return None


def share_address(one: str, other: str) -> bool:
    """Host addresses of two ports; "" is every address."""
    return not one or not other or one == other


def port_conflict(store: Store, service_id: str, ports: Iterable[PortConfig]) -> str | None:
    """Why a service ("" = a new one) cannot publish these ports, in one line for the user; None = it can.
    Counts what others have been given, and what others ask for and have not been given yet."""
    others = PortMap(store.services)
    for service in store.services:
        others.add(service, service.spec.endpoint.ports)
    return next((why for port in ports if port.published_port and (why := others.conflict(port, service_id))), None)


def assign(service: Service, others: PortMap) -> EndpointSpec | str:
    """The endpoint with each port's number chosen; numbers given before are kept. A text says why it cannot be."""
    held = {_likeness(port): port.published_port for port in service.endpoint.spec.ports}
    endpoint = EndpointSpec()
    endpoint.CopyFrom(service.spec.endpoint)
    own: set[Key] = {(p.protocol, p.published_port) for p in endpoint.ports if p.published_port}
    for port in endpoint.ports:
        if port.published_port:
            why = others.conflict(port, service.id)
            if why:
                return f"{why}: remove that service, or publish another port"
            continue
        port.published_port = held.get(_likeness(port), 0)
        key = (port.protocol, port.published_port)
        if not port.published_port or key in own or others.conflict(port, service.id):
            chosen = others.free(port.protocol, service.id, own)
            if chosen is None:
                return f"every port of {AUTO_FIRST}-{AUTO_LAST} is published already: give the port a number"
            port.published_port = chosen
        own.add((port.protocol, port.published_port))
    return endpoint


def is_given(asked: EndpointSpec, given: EndpointSpec) -> bool:
    """The endpoint is what the spec asks for, with every number chosen."""
    if len(asked.ports) != len(given.ports) or not all(port.published_port for port in given.ports):
        return False
    expected = EndpointSpec()
    expected.CopyFrom(asked)
    for port, chosen in zip(expected.ports, given.ports, strict=True):
        port.published_port = port.published_port or chosen.published_port
    return expected == given


def _likeness(port: PortConfig) -> tuple[str, int, int, int, str]:
    """What makes a port the same one across updates of its service."""
    return port.name, port.protocol, port.target_port, port.mode, port.host_ip
