"""What the host's own namespace holds: its links, ours (the legs) among them, addresses and routes."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from overlay import rtnl
from overlay.addressing import is_leg
from overlay.netlink import NETLINK_ROUTE, Netlink
from overlay.plan import Leg


@dataclass(frozen=True, slots=True)
class HostKernel:
    """Links, addresses and routes of the host's namespace."""

    links: dict[str, rtnl.Link]
    addresses: frozenset[tuple[int, str, int]]
    routes: tuple[rtnl.Route, ...]

    def legs(self, tag: str) -> dict[str, Leg]:
        whole = connected(self.addresses, self.routes)
        loopbacks = {route.link for route in self.routes if (route.destination, route.prefix) == (rtnl.LOOPBACK6, 128)}
        return {
            name: Leg(
                name,
                link.mac,
                link.mtu_bytes,
                frozenset((address, prefix) for index, address, prefix in whole if index == link.index),
                link.ipv6,
                link.routing and (not link.ipv6 or link.index in loopbacks),
            )
            for name, link in self.links.items()
            if is_leg(tag, name) and link.up
        }

    def link_of(self, address: str) -> str:
        """The link that has this address; "" = none has."""
        indices = {index for index, found, _ in self.addresses if found == address}
        return next((link.name for link in self.links.values() if link.index in indices), "")

    def mtu_of(self, address: str) -> int | None:
        """MTU of the link that has this address, in bytes."""
        link = self.links.get(self.link_of(address))
        return link.mtu_bytes if link is not None else None

    def foreign_prefixes(self, tag: str) -> list[tuple[str, str]]:
        """(prefix, what it is) of the addresses and routes on links that are not legs."""
        names = {link.index: link.name for link in self.links.values()}
        ours = {link.index for link in self.links.values() if is_leg(tag, link.name)}
        out = [
            (f"{address}/{prefix}", f"address {address}/{prefix} of {names.get(index, '?')}")
            for index, address, prefix in self.addresses
            if index not in ours
        ]
        out += [
            (f"{route.destination}/{route.prefix}", f"the route to it by {names.get(route.link, '?')}")
            for route in self.routes
            if route.prefix and route.link not in ours
        ]
        return out


def connected(
    addresses: Iterable[tuple[int, str, int]], routes: Iterable[rtnl.Route]
) -> frozenset[tuple[int, str, int]]:
    """(link, address, prefix) of those whose subnet is reachable: the kernel adds the route with the address, and does
    not miss it later."""
    reachable = {(route.link, route.destination, route.prefix) for route in routes if not route.gateway}

    def has_route(link: int, address: str, prefix: int) -> bool:
        subnet = ipaddress.ip_network(f"{address}/{prefix}", strict=False)
        return subnet.num_addresses == 1 or (link, str(subnet.network_address), prefix) in reachable

    return frozenset(item for item in addresses if has_route(*item))


def read_host() -> HostKernel:
    with Netlink(NETLINK_ROUTE) as netlink:
        return HostKernel(rtnl.links(netlink), rtnl.addresses(netlink), tuple(rtnl.routes(netlink)))
