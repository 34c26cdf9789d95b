"""Is this network spec right in itself? Pure; every refusal names the field and the remedy."""

from __future__ import annotations

import ipaddress

from proto.objects_pb2 import IpamConfig, NetworkSpec
from swarm.api import check
from swarm.errors import Invalid

PREFIX_MIN, PREFIX_MAX = 8, 29
"""A /29 has room for a gateway, a VIP and a few tasks; less is of no use."""
MTU_OPTIONS = ("com.docker.network.driver.mtu", "mtu")
ENCRYPTED_VALUES = ("", "true", "1")
"""Docker encrypts whatever the value is, also at "false"."""
MTU_BYTES_MIN, MTU_BYTES_MAX = 576, 65_535
PREDEFINED = ("bridge", "host", "none", "ingress")


def network_spec(spec: NetworkSpec) -> None:
    """Raises Invalid for the first thing that is wrong."""
    name = spec.annotations.name
    check.name("network", name)
    check.labels("labels", spec.annotations.labels)
    if name.lower() in PREDEFINED:
        raise Invalid(f"network name {name} is predefined: choose another")
    if spec.driver not in ("", "overlay"):
        raise Invalid(f"network driver {spec.driver!r} is not available for services: use overlay")
    if spec.ingress:
        raise Invalid("the ingress network exists already in every swarm; another one cannot be created")
    for option in MTU_OPTIONS:
        if option in spec.options:
            _mtu(option, spec.options[option])
    if spec.options.get("encrypted", "") not in ENCRYPTED_VALUES:
        value = spec.options["encrypted"]
        raise Invalid(f"option encrypted={value}: write --opt encrypted, or leave it out for a network in clear")
    ipam(spec.ipam)


def _mtu(option: str, value: str) -> None:
    if not value.isdigit() or not MTU_BYTES_MIN <= int(value) <= MTU_BYTES_MAX:
        raise Invalid(f"option {option}={value}: use a number of bytes from {MTU_BYTES_MIN} to {MTU_BYTES_MAX}")


def ipam(config: IpamConfig) -> None:
    """Subnet, gateway and range belong together."""
    if not config.subnet:
        if config.gateway or config.ip_range:
            raise Invalid("gateway and ip range need a subnet: give --subnet as well")
        return
    subnet = _ipv4_network("subnet", config.subnet)
    if not PREFIX_MIN <= subnet.prefixlen <= PREFIX_MAX:
        raise Invalid(f"subnet {config.subnet}: use a prefix length from /{PREFIX_MIN} to /{PREFIX_MAX}")
    if subnet.is_multicast or subnet.is_loopback or subnet.is_link_local:
        raise Invalid(f"subnet {config.subnet} is reserved (multicast, loopback or link-local): choose another")
    if config.gateway:
        gateway = _ipv4_address("gateway", config.gateway)
        if gateway not in subnet or gateway in (subnet.network_address, subnet.broadcast_address):
            raise Invalid(f"gateway {config.gateway} is not a host address of subnet {config.subnet}")
    if config.ip_range and not _ipv4_network("ip range", config.ip_range).subnet_of(subnet):
        raise Invalid(f"ip range {config.ip_range} is not within subnet {config.subnet}")


def _ipv4_network(field: str, text: str) -> ipaddress.IPv4Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise Invalid(f"invalid {field} {text!r}: {error}; write it like 10.0.9.0/24") from None
    if not isinstance(network, ipaddress.IPv4Network):
        raise Invalid(f"{field} {text}: overlay networks are IPv4 only so far; write it like 10.0.9.0/24")
    return network


def _ipv4_address(field: str, text: str) -> ipaddress.IPv4Address:
    try:
        return ipaddress.IPv4Address(text)
    except ValueError as error:
        raise Invalid(f"invalid {field} {text!r}: {error}; write it like 10.0.9.1") from None
