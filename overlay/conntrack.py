"""Connection tracking over raw netlink: forget UDP flows that lead to a backend which is no more.

TCP ends by itself; a UDP flow would follow its old translation for as long as the client keeps sending.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from overlay.namespaces import read_sysctl
from overlay.netlink import NLM_F_ACK, Message, Netlink, attribute, attributes

_SUBSYSTEM = 1
_GET, _DELETE = 1, 2
_ORIGINAL, _REPLY, _ZONE = 1, 2, 18
_NESTED = 0x8000


@dataclass(frozen=True, slots=True)
class Flow:
    """A tracked UDP flow: where it was sent to, and from where it is answered (the backend)."""

    to: str
    to_port: int
    answered_by: str
    answered_port: int


def _tuple(data: bytes) -> tuple[str, str, int, int, int]:
    """(source, destination, protocol, source port, destination port)"""
    found = attributes(data)
    ip, protocol = attributes(found[1]), attributes(found[2])
    family, source_kind = (socket.AF_INET, 1) if 1 in ip else (socket.AF_INET6, 3)
    source, target = (socket.inet_ntop(family, ip[kind]) for kind in (source_kind, source_kind + 1))
    ports = [int(struct.unpack(">H", protocol.get(kind, b"\0\0"))[0]) for kind in (2, 3)]
    return source, target, protocol[1][0], ports[0], ports[1]


def _flow(original: bytes, reply: bytes) -> Flow | None:
    _, to, protocol, _, to_port = _tuple(original)
    answered_by, _, _, answered_port, _ = _tuple(reply)
    return Flow(to, to_port, answered_by, answered_port) if protocol == socket.IPPROTO_UDP else None


def any_flows() -> bool:
    """Whether the current namespace tracks anything. Cheap; a dump walks the table of the whole machine."""
    return read_sysctl("net.netfilter.nf_conntrack_count") != "0"


def forget_udp(netlink: Netlink, family: int, stale: Callable[[Flow], bool]) -> int:
    """Delete the UDP flows of the socket's namespace and that family for which `stale` holds; returns how many."""
    header = struct.pack("=BBH", family, 0, 0)
    deletions = []
    for answer in netlink.dump(_SUBSYSTEM << 8 | _GET, header, "read tracked connections"):
        found = attributes(answer, 4)
        if _ORIGINAL not in found or _REPLY not in found:
            continue
        flow = _flow(found[_ORIGINAL], found[_REPLY])
        if flow is None or not stale(flow):
            continue
        body = header + attribute(_ORIGINAL | _NESTED, found[_ORIGINAL])
        body += attribute(_ZONE, found[_ZONE]) if _ZONE in found else b""
        what = f"forget the UDP flow to {flow.to}:{flow.to_port}"
        deletions.append(Message(_SUBSYSTEM << 8 | _DELETE, NLM_F_ACK, body, what, frozenset({errno.ENOENT})))
    for deletion in deletions:
        netlink.transaction([deletion])
    return len(deletions)
