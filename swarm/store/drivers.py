"""What the drivers of networks mean, said once for allocation, the API and dispatch."""

from __future__ import annotations

from proto.objects_pb2 import Network

OVERLAY, MACVLAN = "overlay", "macvlan"
BRIDGE, HOST, NONE = "bridge", "host", "none"
PREDEFINED = (BRIDGE, HOST, NONE)
"""Networks that every swarm has besides the ingress network; each has the driver of its own name."""


def driver_of(network: Network) -> str:
    return network.spec.driver or OVERLAY


def is_overlay(network: Network) -> bool:
    """Spans the hosts; carries virtual IPs and published traffic."""
    return driver_of(network) == OVERLAY


def is_local(network: Network) -> bool:
    """Every node has one of its own, with addresses of its own or none: nothing is allocated."""
    return network.spec.driver in PREDEFINED


def is_exclusive(network: Network) -> bool:
    """A task that is on it has no other network: the host's own, or none at all."""
    return network.spec.driver in (HOST, NONE)


def is_ready(network: Network) -> bool:
    """Tasks can be on it: what it needs is allocated."""
    return is_local(network) or bool(network.vni if is_overlay(network) else network.ipam.subnet)


def leads_out(network: Network) -> bool:
    """An overlay on which tasks can be reached from outside, by published ports."""
    return is_overlay(network) and not network.spec.internal
