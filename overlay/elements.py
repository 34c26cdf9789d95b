"""What fills the sets and maps of our nftables tables, as values (pure).

Services live only in elements, so a change of backends costs the same whether there is one service or a thousand.
A service whose backends take K slots is sent to a chain for K, which counts round robin (or hashes the client's
address) and looks the backend up by (service, slot). A backend of weight 3 has three times the slots of one of 1.

All services with the same K could share one chain, but its counter as well: a client that asks service A, then B,
then A... would meet the same backend of A each time. So there are LANES chains for each K, chosen by address.
"""

from __future__ import annotations

import math
import re
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from overlay.interface import Balance, OverlayNetwork, PublishedPort, Vip

LANES = 64
"""Of two services with equally many backends, one pair in 64 shares a counter; chains stay few."""
SLOTS_MAX = 512
"""Of one service, unless it has more backends than that: weights are scaled down to fit."""
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
VIPS, BACKENDS, REFUSED = "vips", "backends", "refused"
PUBLISHED, MARKS, GATEWAYS, HIDDEN = "published", "marks", "gateways", "hidden"
PINGED = "pinged"
"""Under IPVS, which knows nothing of pings: VIP -> the backend that answers them."""
AT = "_at"
"""Ends the names of sets, maps and chains for ports published at one address of the host."""
FAMILIES = {4: socket.AF_INET, 16: socket.AF_INET6}
"""By the length of an address in bytes."""

Element = tuple[int, str, bytes]
"""(family, set, key as the kernel has it)"""
Value = bytes | str | None
"""What a map holds for it: data, the chain to go to, or None in a plain set."""
Elements = dict[Element, Value]


@lru_cache(maxsize=65536)
def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


# --- slots and chains ---------------------------------------------------------------------------------------


def reduced(weights: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest numbers in the same proportions; proportions are rounded where SLOTS_MAX demands it."""
    total, most = sum(weights), max(SLOTS_MAX, len(weights))
    if total > most:
        weights = tuple(max(1, weight * most // total) for weight in weights)
    divisor = math.gcd(*weights)
    return tuple(weight // divisor for weight in weights)


def slots(count: int, weights: tuple[int, ...]) -> tuple[int, ...]:
    """Which of `count` backends each slot belongs to, those of a heavy one spread out (as smooth weighted round
    robin does): it must not get its share in one burst."""
    if not weights or len(set(weights)) == 1:
        return tuple(range(count))
    turns = [
        ((2 * turn + 1) / weight, number) for number, weight in enumerate(reduced(weights)) for turn in range(weight)
    ]
    return tuple(number for _, number in sorted(turns))


def slot_count(count: int, weights: tuple[int, ...]) -> int:
    return count if not weights or len(set(weights)) == 1 else sum(reduced(weights))


@dataclass(frozen=True, slots=True)
class Balancing:
    """A balancing chain, from its name."""

    slots: int
    by_source: bool
    at_address: bool


def chain_name(balance: Balance, slot_count: int, lane: int, at: str = "") -> str:
    """Least connections falls back to round robin: nftables does not count connections."""
    return f"sh{slot_count}{at}" if balance == "sh" else f"rr{slot_count}_{lane % LANES}{at}"


@lru_cache(maxsize=4096)
def balancing(chain: str) -> Balancing | None:
    """None: any other chain."""
    found = re.fullmatch(rf"(?:rr(\d+)_\d+|sh(\d+))({AT})?", chain)
    if found is None:
        return None
    return Balancing(int(found[1] or found[2]), found[2] is not None, found[3] is not None)


# --- services -----------------------------------------------------------------------------------------------


def _number(value: int) -> bytes:
    return struct.pack("=I", value)


def vip_chain(vip: Vip) -> tuple[int, str]:
    """(family, chain) of a VIP that has backends."""
    key = packed(vip.address)
    name = chain_name(vip.balance, slot_count(len(vip.backends), vip.weights), key[-1])
    return FAMILIES[len(key)], name


def vip_elements(vip: Vip) -> Elements:
    key = packed(vip.address)
    family = FAMILIES[len(key)]
    if not vip.backends:
        return {(family, REFUSED, key): None}
    out: Elements = {(family, VIPS, key): vip_chain(vip)[1]}
    for slot, number in enumerate(slots(len(vip.backends), vip.weights)):
        out[family, BACKENDS, key + _number(slot)] = packed(vip.backends[number])
    return out


def port_key(protocol: str, port: int) -> bytes:
    return struct.pack(">BxxxHxx", PROTOCOLS[protocol], port)


def listens(published: PublishedPort, family: int) -> bool:
    """Whether the port takes connections of that family."""
    return not published.host_ip or FAMILIES[len(packed(published.host_ip))] == family


def port_elements(published: PublishedPort, families: Iterable[int]) -> Elements:
    out: Elements = {}
    for family in families:
        if not listens(published, family):
            continue
        weights = published.weights or (1,) * len(published.backends)
        pool = [
            (packed(address) + struct.pack(">Hxx", port), weight)
            for (address, port), weight in zip(published.backends, weights, strict=True)
            if FAMILIES[len(packed(address))] == family
        ]
        out |= _port_elements(published, family, pool)
    return out


def _port_elements(published: PublishedPort, family: int, pool: list[tuple[bytes, int]]) -> Elements:
    key = port_key(published.protocol, published.port)
    at = AT if published.host_ip else ""
    if at:
        key = packed(published.host_ip) + key
    if not pool:
        return {(family, REFUSED + at, key): None}
    weights = tuple(weight for _, weight in pool)
    chain = chain_name(published.balance, slot_count(len(pool), weights), published.port, at)
    out: Elements = {(family, PUBLISHED + at, key): chain}
    for slot, number in enumerate(slots(len(pool), weights)):
        out[family, BACKENDS + at, key + _number(slot)] = pool[number][0]
    return out


def gateway_elements(networks: Iterable[OverlayNetwork]) -> Elements:
    """What a host's own connections to tasks come from, on each host alike: they must get an address of their own."""
    addresses = [packed(item) for net in networks if not net.internal for item in (net.gateway, net.gateway6) if item]
    return {(FAMILIES[len(address)], GATEWAYS, address): None for address in addresses}


def hidden_elements(addresses: Iterable[str]) -> Elements:
    """Backends that must not see clients' addresses: they could not answer through this host."""
    return {(FAMILIES[len(packed(address))], HIDDEN, packed(address)): None for address in addresses}


# --- changes ------------------------------------------------------------------------------------------------


def chains_of(elements: Mapping[Element, Value]) -> frozenset[tuple[int, str]]:
    """(family, chain) that verdict maps among the elements lead to."""
    return frozenset((family, value) for (family, _, _), value in elements.items() if isinstance(value, str))


@dataclass(frozen=True, slots=True)
class ElementChange:
    """From one picture of the elements to another, to be done in one transaction."""

    remove: tuple[tuple[Element, Value], ...]
    add: tuple[tuple[Element, Value], ...]
    chains: frozenset[tuple[int, str]] = field(init=False)
    """That what is added leads to. Found once: a hundred tasks are given the same change of ten thousand elements."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chains", chains_of(dict(self.add)))

    def __bool__(self) -> bool:
        return bool(self.remove or self.add)


def element_change(old: Mapping[Element, Value], new: Mapping[Element, Value]) -> ElementChange:
    absent = object()
    return ElementChange(
        tuple((key, value) for key, value in old.items() if new.get(key, absent) != value),
        tuple((key, value) for key, value in new.items() if old.get(key, absent) != value),
    )


def joined(changes: Iterable[ElementChange]) -> ElementChange:
    found = [change for change in changes if change]
    if len(found) == 1:
        return found[0]
    return ElementChange(
        tuple(item for change in found for item in change.remove),
        tuple(item for change in found for item in change.add),
    )
