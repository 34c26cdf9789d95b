"""Addresses inside one network: for VIPs and tasks, never the same twice, and not at once the same again."""

from __future__ import annotations

import ipaddress

from proto.objects_pb2 import Network
from swarm.store import states
from swarm.store.store import Store


class Hosts:
    """The addresses of one network during one pass.

    Handed out in turn: the search goes on after the address that was given last. An address whose former task is
    still remembered (its history) is given only when no other is left: caches elsewhere may still know it."""

    def __init__(self, store: Store, network: Network) -> None:
        self.network = network
        net = ipaddress.IPv4Network(network.ipam.subnet)
        self._prefix = net.prefixlen
        span = ipaddress.IPv4Network(network.ipam.ip_range) if network.ipam.ip_range else net
        self._first = max(int(span.network_address), int(net.network_address) + 1)
        self._last = min(int(span.broadcast_address), int(net.broadcast_address) - 1)
        self._used = {int(ipaddress.IPv4Address(network.ipam.gateway))}
        self._remembered: set[int] = set()
        latest = (-1.0, self._first - 1)
        for service in store.services:
            for vip in service.endpoint.virtual_ips:
                if vip.network_id == network.id and vip.address:
                    self._used.add(as_number(vip.address))
        for task in store.tasks.where("network", network.id):
            kept = self._remembered if states.has_stopped(task) else self._used
            for leg in task.networks:
                if leg.network_id == network.id and leg.address:
                    number = as_number(leg.address)
                    kept.add(number)
                    latest = max(latest, (task.meta.created_at, number))
        self._at = latest[1]
        self._avoided = self._used | self._remembered

    @property
    def used(self) -> int:
        return len(self._used)

    def take(self) -> str | None:
        """The next address with its prefix length ("10.0.1.5/24"), or None when all are in use."""
        number = self._next(self._avoided)
        if number is None:
            number = self._next(self._used)
        if number is None:
            return None
        self._used.add(number)
        self._avoided.add(number)
        self._at = number
        return f"{ipaddress.IPv4Address(number)}/{self._prefix}"

    def exhausted(self) -> str:
        name = self.network.spec.annotations.name
        pool = self.network.ipam.ip_range or self.network.ipam.subnet
        return (
            f"no free address in {pool} of network {name} ({self.used} in use): scale down or remove services on it,"
            f" or use a network with a larger --subnet"
        )

    def _next(self, avoid: set[int]) -> int | None:
        start = self._at + 1 if self._first <= self._at + 1 <= self._last else self._first
        for number in range(start, self._last + 1):
            if number not in avoid:
                return number
        return next((number for number in range(self._first, start) if number not in avoid), None)


def as_number(address: str) -> int:
    """ "10.0.1.5/24" as one number; written out because it runs for each task of a network."""
    a, b, c, d = address.partition("/")[0].split(".")
    return int(a) << 24 | int(b) << 16 | int(c) << 8 | int(d)
