"""rtnetlink: messages that make links, addresses, routes and neighbours, and parsers of what stands."""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass

from overlay.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    Netlink,
    attribute,
    attributes,
    nested,
    text,
)

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
IFF_UP = 1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO, IFLA_IFALIAS = 1, 3, 4, 5, 10, 18, 20
IFLA_GROUP, IFLA_NET_NS_FD, IFLA_EXT_MASK = 27, 28, 29
LINK_GROUP = 7901
"""Of all links that we put into a network's namespace: one message then deletes them all, and waits once (18 ms)
for packets under way instead of once per link."""
DOOMED_GROUP = 7902
"""Of links that are deleted next, together."""
RTEXT_FILTER_SKIP_STATS = 8
VETH_INFO_PEER = 1
MACVLAN_MODE = 1
VXLAN_ID, VXLAN_LOCAL, VXLAN_LEARNING, VXLAN_PROXY, VXLAN_PORT = 1, 4, 7, 11, 15
BRIDGE_MULTICAST_SNOOPING = 23
NTF_SELF, NTF_MASTER = 2, 4
NUD_REACHABLE, NUD_NOARP, NUD_PERMANENT = 0x02, 0x40, 0x80
IFA_F_NODAD = 0x02
RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RTN_UNICAST, RTN_LOCAL = 254, 4, 0, 253, 1, 2
LOOPBACK6 = "::1"
AF_BRIDGE = 7
IFLA_AF_SPEC, IFLA_INET_CONF, IFLA_INET6_CONF, DEVCONF_DISABLE_IPV6 = 26, 1, 2, 26
LEG_SETTINGS = {"forwarding": (1, 1), "rp_filter": (8, 2), "route_localnet": (26, 1)}
"""IPv4 sysctl of each leg -> (its number in a link's answer, its value). rp_filter is loose: what comes in by a leg may
be answered by another; route_localnet: answers to a client at 127.0.0.1 of a published port come in there."""
_FAMILIES = (socket.AF_INET, socket.AF_INET6)

_GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL, errno.ENXIO})


def _mac(value: str) -> bytes:
    return bytes.fromhex(value.replace(":", ""))


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _ip(value: str) -> bytes:
    return socket.inet_pton(family_of(value), value)


def _text_ip(family: int, value: bytes | None) -> str:
    """No value: the unspecified address."""
    return socket.inet_ntop(family, value or bytes(16 if family == socket.AF_INET6 else 4))


def _info(index: int = 0, up: bool = False) -> bytes:
    return struct.pack("=BxHiII", 0, 0, index, IFF_UP if up else 0, IFF_UP if up else 0)


# --- links -----------------------------------------------------------------------------------------


def new_bridge(name: str) -> Message:
    kind = nested(IFLA_LINKINFO, attribute(1, "bridge"), nested(2, attribute(BRIDGE_MULTICAST_SNOOPING, b"\0")))
    body = _info(up=True) + attribute(IFLA_IFNAME, name) + kind
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make bridge {name}")


def new_vxlan(name: str, vni: int, port: int, local: str, *, mtu_bytes: int, namespace_fd: int) -> Message:
    """Sent in the host's namespace, appears in that of `namespace_fd`: its UDP socket stays in the host's."""
    data = nested(
        2,
        attribute(VXLAN_ID, vni),
        attribute(VXLAN_LOCAL, _ip(local)),
        attribute(VXLAN_LEARNING, b"\0"),
        attribute(VXLAN_PROXY, b"\1"),
        attribute(VXLAN_PORT, struct.pack(">H", port)),
    )
    body = _info() + attribute(IFLA_IFNAME, name) + attribute(IFLA_MTU, mtu_bytes)
    body += attribute(IFLA_GROUP, LINK_GROUP) + attribute(IFLA_NET_NS_FD, namespace_fd)
    body += nested(IFLA_LINKINFO, attribute(1, "vxlan"), data)
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make VXLAN device for VNI {vni} on port {port}")


@dataclass(frozen=True, slots=True)
class VethEnd:
    name: str
    mac: str | None = None
    in_group: bool = False


def new_veth(near: VethEnd, far: VethEnd, mtu_bytes: int, far_namespace_fd: int, master: int = 0) -> Message:
    """`near` appears here, up and in bridge `master` (an ifindex) if given; `far` in the other namespace, still
    down: the kernel cannot bring up a peer that is not paired yet."""

    def end(side: VethEnd) -> bytes:
        mac = attribute(IFLA_ADDRESS, _mac(side.mac)) if side.mac else b""
        group = attribute(IFLA_GROUP, LINK_GROUP) if side.in_group else b""
        return attribute(IFLA_IFNAME, side.name) + mac + attribute(IFLA_MTU, mtu_bytes) + group

    peer = attribute(VETH_INFO_PEER, _info() + end(far) + attribute(IFLA_NET_NS_FD, far_namespace_fd))
    body = _info(up=True) + end(near) + (attribute(IFLA_MASTER, master) if master else b"")
    body += nested(IFLA_LINKINFO, attribute(1, "veth"), attribute(2, peer))
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make veth {near.name} - {far.name}")


def new_macvlan(name: str, parent: int, mode: int, mac: str, *, mtu_bytes: int, namespace_fd: int) -> Message:
    """Sent in the namespace of `parent` (an ifindex), appears in that of `namespace_fd`. mtu_bytes 0: the parent's."""
    body = _info() + attribute(IFLA_IFNAME, name) + attribute(IFLA_ADDRESS, _mac(mac))
    body += (attribute(IFLA_MTU, mtu_bytes) if mtu_bytes else b"") + attribute(IFLA_LINK, parent)
    body += attribute(IFLA_NET_NS_FD, namespace_fd)
    body += nested(IFLA_LINKINFO, attribute(1, "macvlan"), nested(2, attribute(MACVLAN_MODE, mode)))
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make macvlan link {name}")


def set_link(
    name: str = "", index: int = 0, *, master: int = 0, mtu_bytes: int = 0, alias: str = "", mac: str = ""
) -> Message:
    """Bring it up and set what is given. Found by `index` if given, else by `name`."""
    body = _info(index, up=True) + (b"" if index else attribute(IFLA_IFNAME, name))
    body += attribute(IFLA_MASTER, master) if master else b""
    body += attribute(IFLA_MTU, mtu_bytes) if mtu_bytes else b""
    body += attribute(IFLA_IFALIAS, alias) if alias else b""
    body += attribute(IFLA_ADDRESS, _mac(mac)) if mac else b""
    return Message(RTM_SETLINK, 0, body, f"set up link {name or index}")


def delete_link(name: str) -> Message:
    return Message(RTM_DELLINK, 0, _info() + attribute(IFLA_IFNAME, name), f"delete link {name}", _GONE)


def set_group(name: str, group: int) -> Message:
    body = _info() + attribute(IFLA_IFNAME, name) + attribute(IFLA_GROUP, group)
    return Message(RTM_SETLINK, 0, body, f"mark link {name}", _GONE)


def delete_group(group: int = LINK_GROUP) -> Message:
    """All its links in this namespace."""
    return Message(RTM_DELLINK, 0, _info() + attribute(IFLA_GROUP, group), "delete a group of links", _GONE)


# --- addresses, routes, neighbours -------------------------------------------------------------------


def _address(kind: int, flags: int, index: int, address: str, prefix: int) -> Message:
    family = family_of(address)
    # No other host has it, whatever stands behind the bridge: usable at once, without duplicate address detection.
    usable = IFA_F_NODAD if family == socket.AF_INET6 else 0
    body = struct.pack("=BBBBi", family, prefix, usable, RT_SCOPE_UNIVERSE, index)
    body += attribute(1, _ip(address)) + attribute(2, _ip(address))
    verb = "add" if kind == RTM_NEWADDR else "delete"
    tolerated = _GONE if kind == RTM_DELADDR else frozenset[int]()
    return Message(kind, flags, body, f"{verb} address {address}/{prefix}, link {index}", tolerated)


def add_address(index: int, address: str, prefix: int) -> Message:
    return _address(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, index, address, prefix)


def delete_address(index: int, address: str, prefix: int) -> Message:
    return _address(RTM_DELADDR, 0, index, address, prefix)


def add_route(index: int, destination: str, prefix: int, gateway: str | None, table: int = RT_TABLE_MAIN) -> Message:
    """destination "0.0.0.0"/0 or "::"/0 = default; without gateway the destination is on the link."""
    family = family_of(destination)
    scope = RT_SCOPE_UNIVERSE if gateway or family == socket.AF_INET6 else RT_SCOPE_LINK
    body = struct.pack("=BBBBBBBBI", family, prefix, 0, 0, table, RTPROT_STATIC, scope, RTN_UNICAST, 0)
    body += (attribute(1, _ip(destination)) if prefix else b"") + attribute(4, index)
    body += attribute(5, _ip(gateway)) if gateway else b""
    return Message(
        RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body, f"add route {destination}/{prefix}, gateway {gateway}"
    )


def take_loopback(index: int) -> Message:
    """What NAT turns back into ::1 is taken in by this link, too. (IPv6's route_localnet: the kernel looks for ::1 at
    the link that a packet came by only, and drops those that bear it on the wire.)"""
    body = struct.pack("=BBBBBBBBI", socket.AF_INET6, 128, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_LOCAL, 0)
    body += attribute(1, _ip(LOOPBACK6)) + attribute(4, index)
    # Appended: the other legs have one like it.
    flags = NLM_F_CREATE | NLM_F_APPEND
    return Message(RTM_NEWROUTE, flags, body, f"take {LOOPBACK6} in by link {index}", frozenset({errno.EEXIST}))


def _neighbour_header(family: int, index: int, state: int, flags: int) -> bytes:
    return struct.pack("=BxxxiHBB", family, index, state, flags, 0)


def add_neighbour(index: int, address: str, mac: str) -> Message:
    body = _neighbour_header(family_of(address), index, NUD_PERMANENT, 0)
    body += attribute(1, _ip(address)) + attribute(2, _mac(mac))
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, f"add neighbour {address} at {mac}")


def delete_neighbour(index: int, address: str) -> Message:
    body = _neighbour_header(family_of(address), index, 0, 0) + attribute(1, _ip(address))
    return Message(RTM_DELNEIGH, 0, body, f"delete neighbour {address}", _GONE)


def add_forwarding(index: int, mac: str, vtep: str) -> Message:
    """MAC -> VTEP in the VXLAN device and MAC -> device in its bridge, in one message.

    SELF is needed (else only the bridge learns of it), and REACHABLE|NOARP is the one state that both take as
    static: the bridge would read PERMANENT as "mine, deliver here".
    """
    body = _neighbour_header(AF_BRIDGE, index, NUD_REACHABLE | NUD_NOARP, NTF_SELF | NTF_MASTER)
    body += attribute(2, _mac(mac)) + attribute(1, _ip(vtep))
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, f"forward {mac} to {vtep}")


def delete_forwarding(index: int, mac: str) -> tuple[Message, ...]:
    """Two messages: the kernel would skip the device when the bridge no longer has the entry."""

    def one(flags: int) -> Message:
        body = _neighbour_header(AF_BRIDGE, index, 0, flags) + attribute(2, _mac(mac))
        return Message(RTM_DELNEIGH, 0, body, f"stop forwarding {mac}", _GONE)

    return one(NTF_MASTER), one(NTF_SELF)


# --- what stands -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VxlanInfo:
    vni: int
    local: str
    port: int
    proxy: bool


@dataclass(frozen=True, slots=True)
class Link:
    index: int
    name: str
    kind: str
    mac: str
    mtu_bytes: int
    up: bool
    master: int
    alias: str
    vxlan: VxlanInfo | None
    ipv6: bool
    """On for this link."""
    routing: bool
    """As LEG_SETTINGS ask for (IPv4)."""


@dataclass(frozen=True, slots=True)
class Route:
    destination: str
    prefix: int
    gateway: str
    link: int


@dataclass(frozen=True, slots=True)
class Forwarding:
    link: int
    mac: str
    vtep: str
    """ "" in the bridge's own entries."""


def _text_mac(value: bytes) -> str:
    return value.hex(":")


def _vxlan(data: bytes) -> VxlanInfo:
    found = attributes(data)
    local = found.get(VXLAN_LOCAL, b"")
    return VxlanInfo(
        vni=struct.unpack("=I", found[VXLAN_ID])[0] if VXLAN_ID in found else 0,
        local=socket.inet_ntoa(local) if len(local) == 4 else "",
        port=struct.unpack(">H", found[VXLAN_PORT])[0] if VXLAN_PORT in found else 0,
        proxy=found.get(VXLAN_PROXY, b"\0") != b"\0",
    )


def _settings(values: bytes) -> tuple[int, ...]:
    """A link's sysctls of one family, in the order of the kernel's numbers."""
    return struct.unpack(f"={len(values) // 4}i", values[: len(values) & ~3])


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = struct.unpack_from("=BxHiII", body)
    found = attributes(body, 16)
    families = attributes(found.get(IFLA_AF_SPEC, b""))
    ipv4 = _settings(attributes(families.get(socket.AF_INET, b"")).get(IFLA_INET_CONF, b""))
    ipv6 = _settings(attributes(families.get(socket.AF_INET6, b"")).get(IFLA_INET6_CONF, b""))
    info = attributes(found.get(IFLA_LINKINFO, b""))
    kind = text(info.get(1, b""))
    return Link(
        index=index,
        name=text(found[IFLA_IFNAME]),
        kind=kind,
        mac=_text_mac(found.get(IFLA_ADDRESS, b"")),
        mtu_bytes=struct.unpack("=I", found[IFLA_MTU])[0],
        up=bool(flags & IFF_UP),
        master=struct.unpack("=I", found[IFLA_MASTER])[0] if IFLA_MASTER in found else 0,
        alias=text(found.get(IFLA_IFALIAS, b"")),
        vxlan=_vxlan(info.get(2, b"")) if kind == "vxlan" else None,
        ipv6=bool(ipv6) and not ipv6[DEVCONF_DISABLE_IPV6],
        routing=bool(ipv4) and all(ipv4[number - 1] == value for number, value in LEG_SETTINGS.values()),
    )


def link_index(netlink: Netlink, name: str) -> int:
    """Raises NetlinkError (ENODEV) when there is none."""
    answer = netlink.ask(RTM_GETLINK, _info() + attribute(IFLA_IFNAME, name), f"find link {name}")
    return int(struct.unpack_from("=BxHi", answer)[2])


def links(netlink: Netlink) -> dict[str, Link]:
    """By name."""
    body = _info() + attribute(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    found = [_link(answer) for answer in netlink.dump(RTM_GETLINK, body, "read links")]
    return {link.name: link for link in found}


def addresses(netlink: Netlink) -> frozenset[tuple[int, str, int]]:
    """(link, address, prefix) of both families."""
    out = set()
    body = struct.pack("=BBBBi", socket.AF_UNSPEC, 0, 0, 0, 0)
    for answer in netlink.dump(RTM_GETADDR, body, "read addresses"):
        family, prefix, _, _, index = struct.unpack_from("=BBBBi", answer)
        if family in _FAMILIES:
            found = attributes(answer, 8)
            out.add((index, _text_ip(family, found.get(2, found.get(1))), prefix))
    return frozenset(out)


def routes(netlink: Netlink, table: int = RT_TABLE_MAIN) -> list[Route]:
    """Routes of one table of each family (others than the main ones hold what policy routing chose on purpose)."""
    out = []
    body = struct.pack("=BBBBBBBBI", socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0)
    for answer in netlink.dump(RTM_GETROUTE, body, "read routes"):
        family, prefix, _, _, found_in, _, _, _, _ = struct.unpack_from("=BBBBBBBBI", answer)
        if found_in != table or family not in _FAMILIES:
            continue
        found = attributes(answer, 12)
        destination = _text_ip(family, found.get(1))
        gateway = _text_ip(family, found[5]) if 5 in found else ""
        link = struct.unpack("=I", found[4])[0] if 4 in found else 0
        out.append(Route(destination, prefix, gateway, link))
    return out


def neighbours(netlink: Netlink) -> frozenset[tuple[int, str, str]]:
    """(link, address, MAC) of the permanent entries."""
    out = set()
    body = _neighbour_header(socket.AF_UNSPEC, 0, 0, 0)
    for answer in netlink.dump(RTM_GETNEIGH, body, "read neighbours"):
        family, index, state, _, _ = struct.unpack_from("=BxxxiHBB", answer)
        found = attributes(answer, 12)
        if family in _FAMILIES and state & NUD_PERMANENT and 1 in found and 2 in found:
            out.add((index, _text_ip(family, found[1]), _text_mac(found[2])))
    return frozenset(out)


def forwardings(netlink: Netlink) -> frozenset[Forwarding]:
    """Static entries of VXLAN devices (with a VTEP) and of bridges (without)."""
    out = set()
    for answer in netlink.dump(RTM_GETNEIGH, _neighbour_header(AF_BRIDGE, 0, 0, 0), "read forwarding entries"):
        _, index, state, _, _ = struct.unpack_from("=BxxxiHBB", answer)
        found = attributes(answer, 12)
        if not state & NUD_NOARP or 2 not in found:
            continue
        vtep = socket.inet_ntoa(found[1]) if len(found.get(1, b"")) == 4 else ""
        out.add(Forwarding(index, _text_mac(found[2]), vtep))
    return frozenset(out)
