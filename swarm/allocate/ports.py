"""Published ports: one number space per protocol for the whole cluster, since every host answers on each of them.

Host-mode ports are the scheduler's business among each other (two services may use one port on different nodes);
against ingress ports they count, which are bound everywhere."""

from __future__ import annotations

from collections.abc import Iterable

from proto import objects_pb2 as pb
from proto.objects_pb2 import EndpointSpec, PortConfig, Service
from swarm.store.store import Store

AUTO_FIRST, AUTO_LAST = 30000, 32767
"""Where ports are chosen that the user left open (Docker's range)."""

Key = tuple[int, int]
"""Protocol and number."""


class PortMap:
    """Who publishes what; one service's own ports are left out."""

    def __init__(self, store: Store, but: str = "") -> None:
        self._ingress: dict[Key, Service] = {}
        self._host: dict[Key, Service] = {}
        for service in store.services:
            if service.id != but:
                self.add(service, service.endpoint.spec.ports)

    def add(self, service: Service, ports: Iterable[PortConfig]) -> None:
        for port in ports:
            if port.published_port:
                table = self._ingress if port.mode == pb.INGRESS else self._host
                table[port.protocol, port.published_port] = service

    def conflict(self, port: PortConfig) -> str | None:
        """Why this port cannot be published, in Docker's words, or None."""
        key = (port.protocol, port.published_port)
        owner, mode = self._ingress.get(key), "an ingress"
        if owner is None and port.mode == pb.INGRESS:
            owner, mode = self._host.get(key), "a host-published"
        if owner is None:
            return None
        name = owner.spec.annotations.name
        return f"port '{port.published_port}' is already in use by service '{name}' ({owner.id}) as {mode} port"

    def free(self, protocol: pb.Protocol.ValueType, also_taken: set[Key]) -> int | None:
        """The first number that nobody publishes in any mode."""
        for number in range(AUTO_FIRST, AUTO_LAST + 1):
            key = (protocol, number)
            if key not in self._ingress and key not in self._host and key not in also_taken:
                return number
        return None


def port_conflict(store: Store, service_id: str, ports: Iterable[PortConfig]) -> str | None:
    """Why a service ("" = a new one) cannot publish these ports, in one line for the user; None = it can.
    Counts what others have been given, and what others ask for and have not been given yet."""
    others = PortMap(store, service_id)
    for service in store.services:
        if service.id != service_id:
            others.add(service, service.spec.endpoint.ports)
    return next((why for port in ports if port.published_port and (why := others.conflict(port))), None)


def assign(service: Service, others: PortMap) -> EndpointSpec | str:
    """The endpoint with each port's number chosen; numbers given before are kept. A text says why it cannot be."""
    held = {_likeness(port): port.published_port for port in service.endpoint.spec.ports}
    endpoint = EndpointSpec(mode=service.spec.endpoint.mode)
    own: set[Key] = {(p.protocol, p.published_port) for p in service.spec.endpoint.ports if p.published_port}
    for asked in service.spec.endpoint.ports:
        port = endpoint.ports.add()
        port.CopyFrom(asked)
        if asked.published_port:
            why = others.conflict(asked)
            if why:
                return f"{why}: remove that service, or publish another port"
            continue
        port.published_port = held.get(_likeness(asked), 0)
        key = (port.protocol, port.published_port)
        if not port.published_port or key in own or others.conflict(port):
            chosen = others.free(asked.protocol, own)
            if chosen is None:
                return f"every port of {AUTO_FIRST}-{AUTO_LAST} is published already: give the port a number"
            port.published_port = chosen
        own.add((port.protocol, port.published_port))
    return endpoint


def _likeness(port: PortConfig) -> tuple[str, int, int, int]:
    """What makes a port the same one across updates of its service."""
    return port.name, port.protocol, port.target_port, port.mode
