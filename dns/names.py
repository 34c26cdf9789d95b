"""Pure: what a name means, as seen by a task that is on certain networks.

The name that people use wins over the machinery: the networks of a task are searched in its order, and the first that
knows the name answers. `<name>.<network>` asks one network only, and a search domain after either changes nothing.
Names are in wire form and lower case (message.py), so that a question needs no decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from socket import AF_INET, AF_INET6, inet_pton
from typing import NamedTuple

from dns.interface import NetworkNames, ServiceNames, TaskNames
from dns.message import A_BYTES, AAAA, A, labels_of, record, to_wire

_IN_ADDR = b"\x07in-addr\x04arpa\x00"
_IP6 = b"\x03ip6\x04arpa\x00"

Service = tuple[bytes, bytes]
"""The first two labels of an SRV question: (b"_http", b"_tcp"), (b"_80", b"_tcp")."""


class Holder(NamedTuple):
    """One service or task that holds a name."""

    addresses: tuple[bytes, ...]
    """Packed: 4 or 16 bytes each."""
    a: bytes
    aaaa: bytes
    """The same as records, ready to be sent."""
    ports: tuple[tuple[Service, int], ...] = ()


def _holder(texts: Iterable[str | None], ports: tuple[tuple[Service, int], ...] = ()) -> Holder:
    addresses = tuple(inet_pton(AF_INET6 if ":" in text else AF_INET, text) for text in texts if text)
    a = b"".join(record(A, address) for address in addresses if len(address) == A_BYTES)
    aaaa = b"".join(record(AAAA, address) for address in addresses if len(address) != A_BYTES)
    return Holder(addresses, a, aaaa, ports)


def _ports(service: ServiceNames) -> tuple[tuple[Service, int], ...]:
    """Each port by its number and, if it has one, by its name."""
    return tuple(
        ((f"_{label}".encode().lower(), f"_{protocol}".encode()), port)
        for name, protocol, port in service.ports
        for label in (str(port), name)
        if label
    )


def _of_task(task: TaskNames) -> tuple[dict[str, Holder], tuple[bytes, ...]]:
    holder = _holder((task.address, task.address6))
    return dict.fromkeys(task.names, holder), holder.addresses


def _of_service(service: ServiceNames) -> tuple[dict[str, Holder], tuple[bytes, ...]]:
    """Its names with what they mean, and the addresses that are its own."""
    ports = _ports(service)
    tasks = _holder(service.task_addresses, ports)
    own = _holder((service.vip, service.vip6), ports)
    held = dict.fromkeys(service.names, own if own.addresses else tasks)
    return held | {f"tasks.{name}": tasks for name in service.names}, own.addresses


class NetworkView:
    """One network's names, changed in place by what arrives, ready for lookup."""

    def __init__(self, names: NetworkNames) -> None:
        self.name = names.name
        self.internal = names.internal
        self.names = replace(names, services=(), tasks=())
        self.suffix = to_wire(names.name) or b""
        self.services: dict[str, ServiceNames] = {}
        self.tasks: dict[str, TaskNames] = {}
        self._holders: dict[bytes, tuple[Holder, ...]] = {}
        self._reverse: dict[bytes, bytes] = {}
        for service in names.services:
            self.put_service(service)
        for task in names.tasks:
            self.put_task(task)

    def put_service(self, service: ServiceNames) -> None:
        """New or changed; its first name says which."""
        self.drop_service(service.names[0])
        self.services[service.names[0]] = service
        self._add(service.names[0], *_of_service(service))

    def put_task(self, task: TaskNames) -> None:
        self.drop_task(task.names[0])
        self.tasks[task.names[0]] = task
        self._add(task.names[0], *_of_task(task))

    def drop_service(self, name: str) -> None:
        service = self.services.pop(name, None)
        if service is not None:
            self._remove(name, *_of_service(service))

    def drop_task(self, name: str) -> None:
        task = self.tasks.pop(name, None)
        if task is not None:
            self._remove(name, *_of_task(task))

    def _add(self, first: str, held: dict[str, Holder], own: Iterable[bytes]) -> None:
        for name, holder in held.items():
            wire = to_wire(name)
            if wire is not None:
                # Two services may share an alias: its name then has the addresses of both.
                self._holders[wire] = (*self._holders.get(wire, ()), holder)
        target = to_wire(f"{first}.{self.name}")
        if target is not None:
            self._reverse |= dict.fromkeys(own, target)

    def _remove(self, first: str, held: dict[str, Holder], own: Iterable[bytes]) -> None:
        for name, holder in held.items():
            wire = to_wire(name)
            if wire is not None:
                left = list(self._holders[wire])
                left.remove(holder)
                if left:
                    self._holders[wire] = tuple(left)
                else:
                    del self._holders[wire]
        target = to_wire(f"{first}.{self.name}")
        for address in own:
            if self._reverse.get(address) == target:
                del self._reverse[address]

    def lookup(self, name: bytes) -> tuple[Holder, ...] | None:
        return self._holders.get(name)

    def reverse(self, address: bytes) -> bytes | None:
        """The name of a task or of a VIP, `<name>.<network>`."""
        return self._reverse.get(address)


class Target(NamedTuple):
    """One answer to an SRV question."""

    name: bytes
    port: int
    addresses: tuple[bytes, ...]


class TaskView:
    """What a task on these networks sees. None means "not ours": the question is forwarded."""

    def __init__(self, networks: Sequence[NetworkView], search: Sequence[str] = ()) -> None:
        self.networks = tuple(networks)
        self.may_forward = not networks or any(not network.internal for network in networks)
        """A task that is on internal networks only has no business outside: its questions stay here."""
        self._search = tuple(wire for domain in search if (wire := to_wire(domain)) is not None)

    def lookup(self, name: bytes) -> tuple[NetworkView, tuple[Holder, ...]] | None:
        """Who holds this name, in the network that knows it."""
        found = self._lookup(name)
        for domain in self._search:
            if found is None and name.endswith(domain):
                found = self._lookup(name[: -len(domain)] + b"\0")
        return found

    def _lookup(self, name: bytes) -> tuple[NetworkView, tuple[Holder, ...]] | None:
        for network in self.networks:
            holders = network.lookup(name)
            if holders is not None:
                return network, holders
        for network in self.networks:
            # A suffix in the middle of a label leaves no name that anybody holds.
            if name.endswith(network.suffix):
                holders = network.lookup(name[: -len(network.suffix)] + b"\0")
                if holders is not None:
                    return network, holders
        return None

    def targets(self, name: bytes) -> tuple[Target, ...] | None:
        """Who offers `_<port or its name>._<protocol>.<service>`; None = `name` is no such name of ours."""
        labels = labels_of(name)
        if len(labels) < 3 or not (labels[0].startswith(b"_") and labels[1].startswith(b"_")):
            return None
        found = self.lookup(name[len(labels[0]) + len(labels[1]) + 2 :])
        if found is None:
            return None
        network, holders = found
        wanted = (labels[0], labels[1])
        offers: dict[tuple[bytes, int], list[bytes]] = {}
        for holder in holders:
            for service, port in holder.ports:
                for address in holder.addresses if service == wanted else ():
                    target = network.reverse(address)
                    if target is not None:
                        offers.setdefault((target, port), []).append(address)
        return tuple(Target(target, port, tuple(addresses)) for (target, port), addresses in offers.items())

    def reverse(self, name: bytes) -> bytes | None:
        """The answer to the PTR question for `5.1.0.10.in-addr.arpa` or its like in ip6.arpa."""
        address = _reversed_address(name)
        if address is not None:
            for network in self.networks:
                found = network.reverse(address)
                if found is not None:
                    return found
        return None


def _reversed_address(name: bytes) -> bytes | None:
    if not name.endswith((_IN_ADDR, _IP6)):
        return None
    labels = labels_of(name)[-3::-1]
    try:
        if name.endswith(_IN_ADDR):
            return bytes(int(label) for label in labels) if len(labels) == 4 else None
        return bytes.fromhex(b"".join(labels).decode()) if len(labels) == 32 else None
    except ValueError:
        return None
