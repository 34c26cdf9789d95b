"""Answers by the overlay that a published connection came in by, for tasks that have other networks, too: a LAN
(macvlan) or the host's bridge may have the default route, or one straight to the client.

The mark that names the host which a connection came through (expressions.py) chooses a routing table of one route.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

from overlay import rtnl
from overlay.expressions import NODE_PREFIX
from overlay.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, Netlink, attribute, attributes

TABLE = 198
"""In tasks' namespaces only, which are ours."""
_MARK = struct.unpack("=I", NODE_PREFIX + bytes(2))[0]
_MASK = struct.unpack("=I", b"\xff\xff" + bytes(2))[0]
_NEW_RULE, _GET_RULE = 32, 34
_RULE = struct.Struct("=BBBBBBBBI")  # struct fib_rule_hdr
_TO_TABLE = 1
_PRIORITY, _FWMARK, _FWMASK = 6, 10, 16
_BEFORE_MAIN = 198


def lead(ways: Iterable[tuple[int, str]]) -> list[Message]:
    """`ways`: (link, gateway), one for each family."""
    out: list[Message] = []
    for link, gateway in ways:
        family = rtnl.family_of(gateway)
        body = _RULE.pack(family, 0, 0, 0, TABLE, 0, 0, _TO_TABLE, 0)
        body += attribute(_PRIORITY, _BEFORE_MAIN) + attribute(_FWMARK, _MARK) + attribute(_FWMASK, _MASK)
        rule = Message(_NEW_RULE, NLM_F_CREATE | NLM_F_EXCL, body, "add a rule for answers", frozenset({errno.EEXIST}))
        destination = "::" if family == socket.AF_INET6 else "0.0.0.0"
        out += [rtnl.add_route(link, destination, 0, gateway, TABLE), rule]
    return out


def standing(netlink: Netlink) -> frozenset[tuple[int, str]]:
    """(link, gateway) of the ways that are there, with their rules."""
    routes = [route for route in rtnl.routes(netlink, TABLE) if not route.prefix]
    families = _ruled(netlink) if routes else frozenset()
    return frozenset((route.link, route.gateway) for route in routes if rtnl.family_of(route.gateway) in families)


def _ruled(netlink: Netlink) -> frozenset[int]:
    body = _RULE.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0)
    found = set()
    for answer in netlink.dump(_GET_RULE, body, "read routing rules"):
        family, _, _, _, table, _, _, _, _ = _RULE.unpack_from(answer)
        mark = attributes(answer, _RULE.size).get(_FWMARK, b"")
        if table == TABLE and mark == struct.pack("=I", _MARK):
            found.add(family)
    return frozenset(found)
