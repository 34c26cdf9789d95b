"""Addresses inside one network: for VIPs and tasks, never the same twice, and not at once the same again.

A network with IPv6 has no second pool: the IPv6 address has the host number of the IPv4 one (10.0.1.5, fd00::5)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from proto.objects_pb2 import IpamConfig, Network, Service, Task
from swarm.store import drivers, states
from swarm.store.released import as_address, as_number
from swarm.store.store import Event, Store


class AddressBook:
    """Which addresses of each network are held, and how often (twice only until the self-check repairs it). A view of
    the store (`Store.view`): a pass costs what it gives out, not what the swarm holds."""

    def __init__(self, store: Store) -> None:
        self._held: dict[str, dict[int, int]] = {}
        for task in store.tasks:
            self._file(task, 1)
        for service in store.services:
            self._file(service, 1)

    def of(self, network_id: str) -> dict[int, int]:
        """Address -> holders. Not to be changed."""
        return self._held.get(network_id, {})

    def note(self, events: Sequence[Event]) -> None:
        for event in events:
            if not event.keeps_addresses:
                self._file(event.after, 1)
                self._file(event.before, -1)

    def _file(self, record: object, sign: int) -> None:
        for network_id, address, _ in held(record):
            if not address:
                continue
            number, numbers = as_number(address), self._held.setdefault(network_id, {})
            left = numbers.get(number, 0) + sign
            if left:
                numbers[number] = left
            else:
                del numbers[number]
                if not numbers:
                    del self._held[network_id]


def held(record: object) -> Iterator[tuple[str, str, str]]:
    """(network ID, address, IPv6 address) of what a task or service holds."""
    match record:
        case Task() if not states.has_stopped(record):
            for leg in record.networks:
                yield leg.network_id, leg.address, leg.address6
        case Service():
            for vip in record.endpoint.virtual_ips:
                yield vip.network_id, vip.address, vip.address6


@dataclass(frozen=True, slots=True)
class Span:
    """The addresses of a network as arithmetic: which there are, which are never given, and their IPv6 twins."""

    subnet: ipaddress.IPv4Network
    first: int
    last: int
    reserved: frozenset[int]
    """Gateways and what the user set aside, in either family."""
    prefix6: int = 0
    """0: the network has no IPv6."""
    offset6: int = 0
    """IPv6 address less IPv4 address."""

    @classmethod
    def of(cls, network: Network, also_reserved: frozenset[int] = frozenset()) -> Span:
        v4, v6 = network.ipam, network.ipam6
        subnet = ipaddress.IPv4Network(v4.subnet)
        span = ipaddress.IPv4Network(v4.ip_range or v4.subnet)
        taken = {as_number(address) for address in _set_aside(v4)}
        offset6 = prefix6 = 0
        if v6.subnet:
            subnet6 = ipaddress.IPv6Network(v6.subnet)
            prefix6 = subnet6.prefixlen
            base6 = ipaddress.IPv6Network(v6.ip_range) if v6.ip_range else subnet6
            base4 = span if v6.ip_range else subnet
            offset6 = int(base6.network_address) - int(base4.network_address)
            # The subnet's own address means "any router" (RFC 4291 2.6.1).
            others = (str(subnet6.network_address), *_set_aside(v6))
            taken.update(int(ipaddress.IPv6Address(address)) - offset6 for address in others)
        return cls(
            subnet,
            max(int(span.network_address), int(subnet.network_address) + 1),
            min(int(span.broadcast_address), int(subnet.broadcast_address) - 1),
            also_reserved.union(number for number in taken if number in range(1 << 32)),
            prefix6,
            offset6,
        )

    def holds(self, number: int) -> bool:
        return self.first <= number <= self.last and number not in self.reserved

    def texts(self, number: int) -> tuple[str, str]:
        """("10.0.1.5/24", "fd00::5/64"), or "" for the second."""
        six = f"{ipaddress.IPv6Address(number + self.offset6)}/{self.prefix6}" if self.prefix6 else ""
        return f"{as_address(number)}/{self.subnet.prefixlen}", six


def _set_aside(config: IpamConfig) -> list[str]:
    return [address for address in (config.gateway, *config.aux_addresses.values()) if address]


def span_of(store: Store, network: Network) -> Span:
    """A macvlan network is the LAN of nodes, so that their own addresses are taken there."""
    if not drivers.is_overlay(network):
        own = (text for node in store.nodes for text in node.description.underlay_subnets if ":" not in text)
        return Span.of(network, frozenset(map(as_number, own)))
    return Span.of(network)


class Hosts:
    """The addresses of one network during one pass. What was never given comes first; what was given back comes
    last, the address that has been free the longest before the others (`Store.released`)."""

    def __init__(self, store: Store, network: Network) -> None:
        self.network = network
        self._span = span_of(store, network)
        self._held = store.view(AddressBook).of(network.id)
        self._given = 0
        self._free = self._candidates(store.released.of(network.id))

    def _candidates(self, released: list[int]) -> Iterator[int]:
        span, held, avoided = self._span, self._held, set(released)
        for number in range(span.first, span.last + 1):
            if number not in held and number not in avoided and number not in span.reserved:
                yield number
        for number in released:
            if number not in held and span.holds(number):
                yield number

    def take(self) -> tuple[str, str] | None:
        """The next address with its prefix length ("10.0.1.5/24") and its IPv6 twin ("" if the network has none), or
        None when all are in use."""
        number = next(self._free, None)
        if number is None:
            return None
        self._given += 1
        return self._span.texts(number)

    def exhausted(self) -> str:
        name = self.network.spec.annotations.name
        pool, flag = self.network.ipam.subnet, "--subnet"
        if self.network.ipam.ip_range:
            pool, flag = self.network.ipam.ip_range, "--ip-range"
        in_use = len(self._held) + self._given
        return (
            f"no free address in {pool} of network {name} ({in_use} in use): scale down or remove services on it,"
            f" or use a network with a larger {flag}"
        )
