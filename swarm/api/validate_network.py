"""Is this network spec right in itself? Pure; every refusal names the field and the remedy."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping

from proto.objects_pb2 import IpamConfig, NetworkSpec
from swarm.allocate.subnets import VNI_LAST, VNI_OPTION
from swarm.api import check
from swarm.errors import Invalid
from swarm.store import drivers

PREFIX_MIN, PREFIX_MAX = 8, 29
"""A /29 has room for a gateway, a VIP and a few tasks; less is of no use."""
PREFIX6_MIN, PREFIX6_MAX = 16, 104
"""An IPv6 subnet has room for the host numbers of any IPv4 one, of which /8 is the largest."""
MTU_OPTION = "com.docker.network.driver.mtu"
MTU_BYTES_MIN, MTU_BYTES_MAX = 576, 65_535
MTU6_BYTES_MIN = 1280
"""RFC 8200 5."""
ENCRYPTED_OPTION = "encrypted"
PARENT_OPTION, MODE_OPTION = "parent", "macvlan_mode"
MACVLAN_MODES = ("bridge", "private", "vepa", "passthru")
LINK_NAME_MAX = 15
"""IFNAMSIZ less the final zero byte."""
AUX_ADDRESSES_MAX = 1_000

Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network


def network_spec(spec: NetworkSpec) -> None:
    """Raises Invalid for the first thing that is wrong."""
    name = spec.annotations.name
    check.name("network", name)
    check.labels("labels", spec.annotations.labels)
    if name.lower() in drivers.PREDEFINED or (name.lower() == "ingress" and not spec.ingress):
        raise Invalid(f"network name {name} is predefined: choose another")
    if spec.driver not in _OPTIONS:
        what = (
            "exists in every swarm as a network of that name" if spec.driver in drivers.PREDEFINED else "is not known"
        )
        raise Invalid(f"network driver {spec.driver!r} {what}: use one of {', '.join(_OPTIONS)}")
    if spec.ingress and (spec.driver != drivers.OVERLAY or spec.internal or spec.attachable):
        raise Invalid("the ingress network is an overlay that is neither internal nor attachable: leave that out")
    for option, value in spec.options.items():
        if option not in _OPTIONS[spec.driver]:
            known = ", ".join(_OPTIONS[spec.driver])
            raise Invalid(f"option {option} is not known to network driver {spec.driver}: use one of {known}")
        _OPTIONS[spec.driver][option](option, value, spec)
    if spec.driver == drivers.MACVLAN:
        _macvlan(spec)
    ipam(spec.ipam, 4)
    ipam(spec.ipam6, 6)


def _macvlan(spec: NetworkSpec) -> None:
    if not spec.options.get(PARENT_OPTION):
        raise Invalid("a macvlan network needs the nodes' link that leads to it: give --opt parent=eth0")
    if not spec.ipam.subnet:
        raise Invalid("a macvlan network needs the LAN's addresses: give --subnet, and --ip-range for the swarm's part")
    if spec.ipv6 and not spec.ipam6.subnet:
        raise Invalid("a macvlan network needs the LAN's IPv6 addresses: give an IPv6 --subnet too, or no --ipv6")
    if spec.internal:
        raise Invalid("internal has no meaning for a macvlan network, whose tasks are on the LAN: leave it out")


# ---------------------------------------------------------------- options


def _mtu(option: str, value: str, spec: NetworkSpec) -> None:
    low = MTU6_BYTES_MIN if spec.ipv6 or spec.ipam6.subnet else MTU_BYTES_MIN
    _number(option, value, low, MTU_BYTES_MAX, "a number of bytes")


def _vni(option: str, value: str, _: NetworkSpec) -> None:
    _number(option, value, 1, VNI_LAST, "one VNI")


def _number(option: str, value: str, low: int, high: int, what: str) -> None:
    if not (value.isascii() and value.isdigit() and low <= int(value) <= high):
        raise Invalid(f"option {option}={value}: use {what} from {low} to {high}")


def _flag(option: str, value: str, _: NetworkSpec) -> None:
    if value not in ("", "true"):
        raise Invalid(
            f"option {option}={value}: write {option} alone or {option}=true; without it the network is clear"
        )


def _link(option: str, value: str, _: NetworkSpec) -> None:
    if not 0 < len(value) <= LINK_NAME_MAX or "/" in value or any(character.isspace() for character in value):
        raise Invalid(f"option {option}={value}: use the name of a link of the nodes, such as eth0 or eth0.10")


def _mode(option: str, value: str, _: NetworkSpec) -> None:
    if value not in MACVLAN_MODES:
        raise Invalid(f"option {option}={value}: use one of {', '.join(MACVLAN_MODES)}")


_OPTIONS: Mapping[str, Mapping[str, Callable[[str, str, NetworkSpec], None]]] = {
    drivers.OVERLAY: {MTU_OPTION: _mtu, ENCRYPTED_OPTION: _flag, VNI_OPTION: _vni},
    drivers.MACVLAN: {PARENT_OPTION: _link, MODE_OPTION: _mode, MTU_OPTION: _mtu},
}
"""Driver -> option -> its check."""


# ---------------------------------------------------------------- addresses


def ipam(config: IpamConfig, version: int) -> None:
    """Subnet, gateway, range and reserved addresses belong together. `version`: 4 or 6."""
    if not config.subnet:
        if config.gateway or config.ip_range or config.aux_addresses:
            raise Invalid("gateway, ip range and aux address need a subnet: give --subnet as well")
        return
    low, high = (PREFIX_MIN, PREFIX_MAX) if version == 4 else (PREFIX6_MIN, PREFIX6_MAX)
    subnet = _subnet("subnet", config.subnet, version)
    if not low <= subnet.prefixlen <= high:
        raise Invalid(f"subnet {config.subnet}: use a prefix length from /{low} to /{high}")
    if subnet.is_multicast or subnet.is_loopback or subnet.is_link_local:
        raise Invalid(f"subnet {config.subnet} is reserved (multicast, loopback or link-local): choose another")
    if config.ip_range:
        span = _subnet("ip range", config.ip_range, version)
        if not span.subnet_of(subnet):  # type: ignore[arg-type]
            raise Invalid(f"ip range {config.ip_range} is not within subnet {config.subnet}")
        if version == 6 and span.prefixlen > PREFIX6_MAX:
            raise Invalid(f"ip range {config.ip_range}: use a prefix length up to /{PREFIX6_MAX}")
    if config.gateway:
        _host("gateway", config.gateway, subnet)
    if len(config.aux_addresses) > AUX_ADDRESSES_MAX:
        raise Invalid(f"{len(config.aux_addresses)} aux addresses: use at most {AUX_ADDRESSES_MAX}, or an --ip-range")
    for name, address in config.aux_addresses.items():
        _host(f"aux address {name}", address, subnet)
        if address == config.gateway:
            raise Invalid(f"aux address {name}={address} is the gateway: leave it out, it is never given away")


def _subnet(field: str, text: str, version: int) -> Subnet:
    try:
        return ipaddress.IPv4Network(text) if version == 4 else ipaddress.IPv6Network(text)
    except ValueError as error:
        example = "10.0.9.0/24" if version == 4 else "fd00:9::/64"
        raise Invalid(f"invalid {field} {text!r}: {error}; write it like {example}") from None


def _host(field: str, text: str, subnet: Subnet) -> None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise Invalid(f"invalid {field} {text!r}: {error}; write it like {subnet.network_address + 1}") from None
    ends = (subnet.network_address, subnet.broadcast_address) if subnet.version == 4 else (subnet.network_address,)
    if address not in subnet or address in ends:
        raise Invalid(f"{field} {text} is not a host address of subnet {subnet}")
