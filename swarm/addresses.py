"""Which address a node announces. Docker's rule: one obvious address, else the user must say."""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence

from swarm.errors import Invalid

DEFAULT_LISTEN_ADDR = "0.0.0.0:2377"
DEFAULT_PORT = 2377
COMMAND_TIMEOUT_S = 10.0
SUBNET_BITS_MAX = 29
"""A subnet needs a gateway, a VIP and a few tasks (swarm/allocate/subnets.py)."""
_NOT_UNDERLAY = ("lo", "docker", "br-", "veth", "pys", "pyl", "cni", "flannel", "virbr")
"""Interfaces that other software made for containers, and ours: never announced."""


def host_addresses() -> dict[str, list[str]]:
    """Global IPv4 addresses with prefix by interface name."""
    done = subprocess.run(
        ["ip", "-j", "-4", "addr", "show", "scope", "global"],
        capture_output=True,
        timeout=COMMAND_TIMEOUT_S,
        check=True,
    )
    return {
        link["ifname"]: [f"{item['local']}/{item['prefixlen']}" for item in link["addr_info"]]
        for link in json.loads(done.stdout or b"[]")
        if link.get("addr_info")
    }


def split_host_port(text: str, default_port: int = DEFAULT_PORT) -> tuple[str, int]:
    """ "host", "host:port" as (host, port). Raises Invalid."""
    host, separator, port = text.rpartition(":")
    if not separator:
        return text, default_port
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise Invalid(f"invalid address {text!r}: the port must be a number from 1 to 65535")
    return host, int(port)


def choose_advertise_host(wanted: str, addresses: Mapping[str, Sequence[str]]) -> str:
    """`wanted` (address, host name or interface, a port is ignored) or the host's only address.
    Raises Invalid when there is none, or more than one to choose from."""
    host, _ = split_host_port(wanted) if wanted else ("", 0)
    if host in addresses:
        found = [item.partition("/")[0] for item in addresses[host]]
        if len(found) != 1:
            raise Invalid(f"interface {host} has {len(found)} addresses ({', '.join(found)}): give one of them")
        return found[0]
    if host:
        try:
            if ipaddress.ip_address(host).is_unspecified:
                raise Invalid(f"advertise address must not be {host}: give one that other nodes can reach")
        except ValueError:
            pass  # a host name
        return host
    candidates = [
        item.partition("/")[0]
        for name, items in addresses.items()
        if not name.startswith(_NOT_UNDERLAY)
        for item in items
    ]
    if not candidates:
        raise Invalid("this host has no address that other nodes could reach: use --advertise-addr")
    if len(candidates) > 1:
        raise Invalid(
            f"could not choose an IP address to advertise since this system has multiple addresses"
            f" ({', '.join(candidates)}): specify one with --advertise-addr"
        )
    return candidates[0]


def check_listen(text: str) -> str:
    """The listen address in full. Raises Invalid."""
    host, port = split_host_port(text or DEFAULT_LISTEN_ADDR)
    if port == 65535:
        raise Invalid("listen port 65535 leaves no room for the mTLS listener on the next port")
    return f"{host or '0.0.0.0'}:{port}"


def vtep_of(wanted: str, advertised: str, addresses: Mapping[str, Sequence[str]]) -> str:
    """`wanted`, an IPv4 address of this host or an interface that has one, else the advertised address; "" = neither is
    known yet. Raises Invalid: the kernel sends overlay traffic from its own addresses only."""
    if not wanted:
        if advertised and not _is_own(advertised, addresses):
            raise Invalid(
                f"advertise address {advertised} is no IPv4 address of this host, and overlay traffic needs one: give"
                " it with --data-path-addr"
            )
        return advertised
    text = choose_advertise_host(wanted, addresses) if wanted in addresses else wanted
    if not _is_own(text, addresses):
        raise Invalid(
            f"invalid --data-path-addr {wanted!r}: give an IPv4 address of this host, without port, or an interface"
        )
    return text


def _is_own(text: str, addresses: Mapping[str, Sequence[str]]) -> bool:
    own = {item.partition("/")[0] for items in addresses.values() for item in items}
    try:
        return text in own or ipaddress.IPv4Address(text).is_loopback
    except ValueError:
        return False


def check_pools(pools: Iterable[str], subnet_bits: int) -> None:
    """Whether subnets of this size can be cut from each pool. Raises Invalid."""
    checked: list[ipaddress.IPv4Network] = []
    for pool in pools:
        try:
            network = ipaddress.ip_network(pool)
        except ValueError as error:
            raise Invalid(f"invalid --default-addr-pool {pool!r}: {error}") from None
        if not isinstance(network, ipaddress.IPv4Network):
            raise Invalid(
                f"invalid --default-addr-pool {pool!r}: IPv6 subnets come from the swarm's own prefix, fd00::/8"
            )
        if not network.prefixlen <= subnet_bits <= SUBNET_BITS_MAX:
            raise Invalid(
                f"invalid --default-addr-pool-mask-length {subnet_bits}: must be from"
                f" {network.prefixlen} (the pool {pool}) to {SUBNET_BITS_MAX}"
            )
        if (other := next((each for each in checked if each.overlaps(network)), None)) is not None:
            raise Invalid(f"invalid --default-addr-pool {pool!r}: it overlaps pool {other}")
        checked.append(network)
