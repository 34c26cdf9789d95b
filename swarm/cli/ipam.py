"""--subnet, --gateway, --ip-range and --aux-address to the two address configurations of a network. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable

from proto.objects_pb2 import IpamConfig, NetworkSpec
from swarm.cli.spec import flag_value
from swarm.errors import Invalid

Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def set_ipam(
    spec: NetworkSpec,
    subnets: Iterable[str],
    gateways: Iterable[str],
    ip_ranges: Iterable[str],
    aux_addresses: Iterable[str],
) -> None:
    """Each value goes to the subnet that it lies in. Raises Invalid, naming the flag."""
    configs: list[tuple[Subnet, IpamConfig]] = []
    for text in subnets:
        subnet = flag_value("subnet", _value_of(ipaddress.ip_network), text)
        config = spec.ipam if subnet.version == 4 else spec.ipam6
        if config.subnet:
            raise Invalid(f'invalid value "{text}" for --subnet: give at most one IPv4 and one IPv6 subnet')
        config.subnet = text
        configs.append((subnet, config))

    def config_of(flag: str, text: str, value: Subnet | Address) -> IpamConfig:
        first = value if isinstance(value, Address) else value.network_address
        for subnet, config in configs:
            if first in subnet:
                return config
        where = " or ".join(str(subnet) for subnet, _ in configs)
        raise Invalid(
            f'invalid value "{text}" for --{flag}: it does not lie in {where}'
            if where
            else f"--{flag} needs --subnet, which it must lie in"
        )

    for flag, field, texts, parse in (
        ("gateway", "gateway", gateways, ipaddress.ip_address),
        ("ip-range", "ip_range", ip_ranges, ipaddress.ip_network),
    ):
        for text in texts:
            config = config_of(flag, text, flag_value(flag, _value_of(parse), text))
            if getattr(config, field):
                raise Invalid(f'invalid value "{text}" for --{flag}: subnet {config.subnet} has one already')
            setattr(config, field, text)
    for text in aux_addresses:
        name, _, address = text.partition("=")
        if not name or not address:
            raise Invalid(f'invalid value "{text}" for --aux-address: write NAME=ADDRESS, such as router=10.5.0.9')
        parsed = flag_value("aux-address", _value_of(ipaddress.ip_address), address)
        config_of("aux-address", text, parsed).aux_addresses[name] = address


def _value_of(parse: Callable[[str], Subnet | Address]) -> Callable[[str], Subnet | Address]:
    def parsed(text: str) -> Subnet | Address:
        try:
            return parse(text)
        except ValueError as error:
            raise Invalid(str(error)) from None

    return parsed
