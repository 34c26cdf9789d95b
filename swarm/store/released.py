"""Numbers that were given back: addresses of networks, VNIs. A part of the replicated state, so that a number which was
just freed is the last to be given again, whoever leads then and whether or not its former holder is remembered."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from proto import store_pb2 as pb
from proto.objects_pb2 import Network, Service, Task
from swarm.store import states
from swarm.store.changes import Record

RELEASED_MAX = 4096
"""Remembered in each pool: 16 KiB. What is forgotten first has been free the longest, and may as well come first."""
VNIS = "vni"
"""The pool of all networks' VNIs; every other pool is a network's addresses, under its ID."""


class Released:
    """Fed by `apply` alone, with each change of what is held in order: the same on every manager."""

    def __init__(self) -> None:
        self._pools: dict[str, dict[int, None]] = {}

    def of(self, pool: str) -> list[int]:
        """Numbers that nobody was given since they were freed, the one that has been free the longest first."""
        return list(self._pools.get(pool, ()))

    def note(self, before: Record | None, after: Record | None) -> None:
        had, has = list(_held(before)), list(_held(after))
        for pool, number in has:
            self._pools.get(pool, {}).pop(number, None)
        kept = set(has)
        for pool, number in had:
            if (pool, number) not in kept:
                self._add(pool, number)
        if isinstance(before, Network) and after is None:
            self._pools.pop(before.id, None)

    def _add(self, pool: str, number: int) -> None:
        numbers = self._pools.setdefault(pool, {})
        numbers.pop(number, None)
        numbers[number] = None
        if len(numbers) > RELEASED_MAX:
            del numbers[next(iter(numbers))]

    def dump(self) -> list[pb.DumpHeader.Released]:
        return [pb.DumpHeader.Released(pool=pool, numbers=numbers) for pool, numbers in self._pools.items() if numbers]

    def load(self, pools: Iterable[pb.DumpHeader.Released]) -> None:
        self._pools = {each.pool: dict.fromkeys(each.numbers) for each in pools}


def _held(record: Record | None) -> Iterator[tuple[str, int]]:
    match record:
        case Task() if record.networks and not states.has_stopped(record):
            for leg in record.networks:
                if leg.address:
                    yield leg.network_id, as_number(leg.address)
        case Service():
            for vip in record.endpoint.virtual_ips:
                if vip.address:
                    yield vip.network_id, as_number(vip.address)
        case Network() if record.vni:
            yield VNIS, record.vni


def as_number(address: str) -> int:
    """ "10.0.1.5/24" as one number; the common form is written out because it runs for each task of a network."""
    a, b, c, d = address.partition("/")[0].split(".")
    return int(a) << 24 | int(b) << 16 | int(c) << 8 | int(d)


def as_address(number: int) -> str:
    return str(ipaddress.IPv4Address(number))
