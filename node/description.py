"""What this machine is: read from /proc, uname and one netlink dump (no process is started for it, no library
loaded)."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from proto.objects_pb2 import NodeDescription, Platform, Resources

NANO_CPUS_PER_CPU = 1_000_000_000

_RTM_GETADDR, _NLMSG_ERROR, _NLMSG_DONE = 22, 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 0x001, 0x300
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RT_SCOPE_LINK = 253
_NLMSG_HEADER = struct.Struct("=IHHII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTATTR = struct.Struct("=HH")
_DUMP_BYTES_MAX = 1 << 16
_DUMP_DEADLINE_S = 2.0


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    link: str
    address: str
    """ "192.168.99.11/24" """


def describe(
    hostname: str, engine_version: str, is_ours: Callable[[str], bool], labels: Mapping[str, str] | None = None
) -> NodeDescription:
    """The node's description. `is_ours(link name)` tells our own overlay links from the machine's; their
    subnets would otherwise forbid themselves. Resources are the machine's, not the agent's cgroup's."""
    return NodeDescription(
        hostname=hostname,
        platform=Platform(os="linux", architecture=os.uname().machine),
        resources=Resources(
            nano_cpus=(os.cpu_count() or 1) * NANO_CPUS_PER_CPU,
            memory_bytes=memory_bytes(Path("/proc/meminfo").read_text(encoding="ascii")),
        ),
        engine_version=engine_version,
        engine_labels=labels or {},
        underlay_subnets=underlay_subnets(interface_addresses(), is_ours),
    )


def memory_bytes(meminfo: str) -> int:
    """MemTotal of the text of /proc/meminfo."""
    for line in meminfo.splitlines():
        key, _, value = line.partition(":")
        if key == "MemTotal":
            return int(value.split()[0]) * 1024
    return 0


def underlay_subnets(addresses: list[InterfaceAddress], is_ours: Callable[[str], bool]) -> list[str]:
    """Sorted, without duplicates: every address but loopback's and our own links'."""
    return sorted({a.address for a in addresses if a.link != "lo" and not is_ours(a.link)})


def interface_addresses() -> list[InterfaceAddress]:
    """Addresses of this network namespace, but for IPv6's link-local ones. Raises OSError."""
    names = dict(socket.if_nameindex())
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_DUMP_DEADLINE_S)
        netlink.bind((0, 0))
        body = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        size = _NLMSG_HEADER.size + len(body)
        netlink.send(_NLMSG_HEADER.pack(size, _RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + body)
        found: list[InterfaceAddress] = []
        while True:
            data = netlink.recv(_DUMP_BYTES_MAX)
            while len(data) >= _NLMSG_HEADER.size:
                length, kind, _, _, _ = _NLMSG_HEADER.unpack_from(data)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    return found
                address = _parse(data[_NLMSG_HEADER.size : length], names)
                if address is not None:
                    found.append(address)
                data = data[_aligned(length) :]


def _parse(message: bytes, names: dict[int, str]) -> InterfaceAddress | None:
    family, prefix, _, scope, index = _IFADDRMSG.unpack_from(message)
    found: dict[int, bytes] = {}
    rest = message[_IFADDRMSG.size :]
    while len(rest) >= _RTATTR.size:
        length, kind = _RTATTR.unpack_from(rest)
        found[kind] = rest[_RTATTR.size : length]
        rest = rest[_aligned(length) :]
    # On a point-to-point link ADDRESS is the other end, LOCAL is ours.
    raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    if raw is None or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    if family == socket.AF_INET6 and scope == _RT_SCOPE_LINK:
        return None
    return InterfaceAddress(names.get(index, str(index)), f"{socket.inet_ntop(family, raw)}/{prefix}")


def _aligned(length: int) -> int:
    return length + 3 & ~3
