"""Names, MACs and sizes on a host, all computed: no peer has to be told any of them."""

from __future__ import annotations

import hashlib
import ipaddress
from functools import lru_cache

VXLAN_OVERHEAD_BYTES = 50
"""Outer IPv4 (20) + UDP (8) + VXLAN (8) + inner Ethernet (14)."""
NODE_RANGE = "198.18.0.0"
NODE_RANGE_PREFIX = 16
"""RFC 2544: never routed on the internet. Each node's ingress traffic comes from its address in it."""
NODE_RANGE6 = "2001:2::"
NODE_RANGE6_PREFIX = 48
"""RFC 5180: the same for IPv6."""
MAX_NODE_INDEX = 65534
TAG_MAX_CHARS = 6
"""The name of a leg is "pys" + tag + "-" + VNI in base 36 (at most 5 digits): 15 characters, the kernel's limit."""

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@lru_cache(maxsize=65536)
def task_mac(address: str) -> str:
    """MAC of the task at this IPv4 address."""
    return "02:42:" + ":".join(f"{int(part):02x}" for part in address.split("."))


def node_address(index: int) -> str:
    """198.18.x.y of the node with this index (0 <= index <= MAX_NODE_INDEX)."""
    return f"198.18.{index // 256}.{index % 256}"


def node_address6(index: int) -> str:
    """2001:2::x of the same node."""
    return str(ipaddress.IPv6Address(NODE_RANGE6) + index)


def canonical(address: str) -> str:
    """An address of either family as the kernel's answers are written here. Raises ValueError."""
    return str(ipaddress.ip_address(address))


def link_local(mac: str) -> str:
    """fe80::... of the link with this MAC (EUI-64, RFC 4291): who forwards looks for neighbours by it."""
    octets = bytes.fromhex(mac.replace(":", ""))
    interface = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return str(ipaddress.IPv6Address(bytes([0xFE, 0x80, *bytes(6)]) + interface))


def leg_mac(index: int) -> str:
    return f"02:43:c6:12:{index // 256:02x}:{index % 256:02x}"


def leg_pattern(tag: str) -> str:
    """What all legs of this agent are named, as nftables matches it."""
    return f"pys{tag}-*"


def leg_name(tag: str, vni: int) -> str:
    digits = ""
    while vni:
        vni, digit = divmod(vni, 36)
        digits = _DIGITS[digit] + digits
    return f"pys{tag}-{digits or '0'}"


def is_leg(tag: str, link: str) -> bool:
    return link.startswith(leg_pattern(tag)[:-1])


def port_name(task_id: str) -> str:
    """The bridge's end of a task's veth. One per task and network; hashed since IDs exceed 15 characters."""
    return "t" + hashlib.blake2b(task_id.encode(), digest_size=6).hexdigest()


def network_namespace(network_id: str) -> str:
    return f"net-{network_id[:12]}"


def task_namespace(task_id: str) -> str:
    return f"task-{task_id}"


def host_table(tag: str) -> str:
    return f"pyswarm_{tag}"


def overlaps(subnet: str, others: list[tuple[str, str]]) -> tuple[str, str] | None:
    """The first of (prefix, what it is) that overlaps `subnet`; None when all is clear."""
    network = ipaddress.ip_network(subnet, strict=False)
    for prefix, what in others:
        other = ipaddress.ip_network(prefix, strict=False)
        if network.version == other.version and network.overlaps(other):
            return prefix, what
    return None
