"""How services become kernel state: by nftables alone, or by IPVS with nftables only giving marks (pure)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Protocol

from overlay import elements, ipvs
from overlay.elements import AT, MARKS, PINGED, PROTOCOLS, REFUSED, VIPS, Elements, packed
from overlay.interface import Balancer, PublishedPort, Vip
from overlay.ipvs import Services
from overlay.tables import Chains


class Scheme(Protocol):
    name: Balancer

    def vip_elements(self, vip: Vip) -> Elements:
        """Of its network's tasks' tables."""
        ...

    def vip_services(self, vip: Vip) -> Services:
        """IPVS services in those tasks' namespaces."""
        ...

    def vip_chains(self, vip: Vip) -> Chains:
        """Balancing chains that its elements lead to, without expanding them."""
        ...

    def port_elements(self, published: PublishedPort, families: Iterable[int]) -> Elements: ...

    def port_services(self, published: PublishedPort, families: Iterable[int]) -> Services: ...


class NftablesScheme:
    name: Balancer = "nftables"

    def vip_elements(self, vip: Vip) -> Elements:
        return elements.vip_elements(vip)

    def vip_services(self, vip: Vip) -> Services:
        return {}

    def vip_chains(self, vip: Vip) -> Chains:
        return frozenset({elements.vip_chain(vip)} if vip.backends else ())

    def port_elements(self, published: PublishedPort, families: Iterable[int]) -> Elements:
        return elements.port_elements(published, families)

    def port_services(self, published: PublishedPort, families: Iterable[int]) -> Services:
        return {}


class IpvsScheme:
    name: Balancer = "ipvs"

    def vip_elements(self, vip: Vip) -> Elements:
        key = packed(vip.address)
        family = elements.FAMILIES[len(key)]
        if not vip.backends:
            return {(family, REFUSED, key): None}
        marks: Elements = {
            (family, VIPS, key + struct.pack("Bxxx", number)): struct.pack("=I", mark)
            for (family, mark) in self.vip_services(vip)
            for number in PROTOCOLS.values()
        }
        return {**marks, (family, PINGED, key): packed(vip.backends[0])}

    def vip_services(self, vip: Vip) -> Services:
        return ipvs.vip_services(vip)

    def vip_chains(self, vip: Vip) -> Chains:
        return frozenset()

    def port_elements(self, published: PublishedPort, families: Iterable[int]) -> Elements:
        """With all that nftables alone would need: it balances what comes from 127.0.0.1."""
        families = tuple(families)
        at = AT if published.host_ip else ""
        key = (packed(published.host_ip) if at else b"") + elements.port_key(published.protocol, published.port)
        marks = {
            (family, MARKS + at, key): struct.pack("=I", mark)
            for family, mark in self.port_services(published, families)
        }
        return elements.port_elements(published, families) | marks

    def port_services(self, published: PublishedPort, families: Iterable[int]) -> Services:
        return ipvs.port_services(published, [item for item in families if elements.listens(published, item)])


SCHEMES: dict[Balancer, Scheme] = {"nftables": NftablesScheme(), "ipvs": IpvsScheme()}
