"""The network that is a host's own: which subnet it has, which address a task gets (pure)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from overlay.addressing import overlaps
from overlay.interface import NetworkError, OverlayNetwork

SUBNETS = tuple(
    [f"172.{second}.0.0/16" for second in range(17, 32)] + [f"192.168.{third}.0/20" for third in range(0, 256, 16)]
)
"""Docker's local pools, in its order."""


def bridge_network(network_id: str, subnet: str) -> OverlayNetwork:
    """As one without other hosts: VNI 0."""
    return OverlayNetwork(network_id, 0, subnet, str(ipaddress.IPv4Network(subnet)[1]))


def choose_subnet(network_id: str, taken: list[tuple[str, str]]) -> str:
    """`taken`: (prefix, what it is) of all that must stay reachable. Raises NetworkError."""
    for subnet in SUBNETS:
        if overlaps(subnet, taken) is None:
            return subnet
    raise NetworkError(
        f"network {network_id}: each of {SUBNETS[0]} to {SUBNETS[-1]} overlaps an address or a route of this host, so"
        " there is no subnet for tasks on its bridge; use an overlay network"
    )


def free_address(network: OverlayNetwork, used: Iterable[str], last: str) -> str:
    """ "172.17.0.2/16": the next free one after `last` ("" = none yet), so that an address rests before it is given
    again. Raises NetworkError."""
    subnet = ipaddress.IPv4Network(network.subnet)
    taken = {int(ipaddress.IPv4Address(address)) for address in (network.gateway, *used)}
    first, count = int(subnet[1]), subnet.num_addresses - 2
    start = int(ipaddress.IPv4Interface(last).ip) + 1 - first if last else 0
    for step in range(count):
        candidate = first + (start + step) % count
        if candidate not in taken:
            return f"{ipaddress.IPv4Address(candidate)}/{subnet.prefixlen}"
    raise NetworkError(
        f"network {network.network_id}: all {count} addresses of {network.subnet} are in use on this host"
    )
