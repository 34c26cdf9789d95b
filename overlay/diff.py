"""Wanted against actual: the operations in between (pure). `overlay/act.py` carries them out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from overlay.plan import Leg, Sandbox, Task, TaskLink, Vxlan


@dataclass(frozen=True, slots=True)
class MakeBridge:
    pass


@dataclass(frozen=True, slots=True)
class Mark:
    """Mark what will leave by the VXLAN device: it has to be encrypted."""


@dataclass(frozen=True, slots=True)
class MakeVxlan:
    vxlan: Vxlan
    replaces: bool


@dataclass(frozen=True, slots=True)
class SetVxlan:
    """Bring it into the bridge and up, with this MTU, IPv6 on or off."""

    vxlan: Vxlan


@dataclass(frozen=True, slots=True)
class MakeLeg:
    leg: Leg


@dataclass(frozen=True, slots=True)
class SetLeg:
    leg: Leg
    stale: frozenset[tuple[str, int]]
    """Addresses to take away first: wrong ones, and those whose route may be missing."""


@dataclass(frozen=True, slots=True)
class DeleteLeg:
    name: str


@dataclass(frozen=True, slots=True)
class SetPort:
    """Bring a link into the bridge and up."""

    name: str
    mtu_bytes: int


@dataclass(frozen=True, slots=True)
class SetEntries:
    """Forwarding entries and neighbours of the VXLAN device."""

    forward: frozenset[tuple[str, str]]
    unforward: frozenset[str]
    know: frozenset[tuple[str, str]]
    forget: frozenset[str]


SandboxOperation = MakeBridge | Mark | MakeVxlan | SetVxlan | MakeLeg | SetLeg | DeleteLeg | SetPort | SetEntries

VXLAN_NAME, BRIDGE_NAME, LEG_PORT_NAME = "vx0", "br0", "leg"


def settled(wanted: Sandbox) -> Sandbox:
    """What stands once the operations towards `wanted` are done."""
    names = [VXLAN_NAME] * bool(wanted.vxlan) + [LEG_PORT_NAME] * bool(wanted.leg)
    return replace(wanted, ports=frozenset((name, wanted.mtu_bytes) for name in names))


def empty_sandbox(network_id: str) -> Sandbox:
    return Sandbox(network_id, bridge=False, vxlan=None, leg=None)


def sandbox_operations(wanted: Sandbox, actual: Sandbox, ports: Iterable[str] = ()) -> tuple[SandboxOperation, ...]:
    """In the order to be done. `ports`: task links that should be in the bridge if they exist at all."""
    out: list[SandboxOperation] = []
    vxlan, mtu = wanted.vxlan, wanted.mtu_bytes
    if not actual.bridge:
        out.append(MakeBridge())
    if wanted.encrypted and not actual.encrypted:
        out.append(Mark())
    entries_lost = False
    if vxlan is not None and actual.vxlan != vxlan:
        old = actual.vxlan
        if old is not None and (old.vni, old.port, old.local) == (vxlan.vni, vxlan.port, vxlan.local):
            # Turning IPv6 off forgets the device's IPv6 neighbours, and no other setting has entries of its own.
            out.append(SetVxlan(vxlan))
        else:
            out.append(MakeVxlan(vxlan, replaces=old is not None))
            entries_lost = True
    elif vxlan is not None and (VXLAN_NAME, mtu) not in actual.ports:
        out.append(SetVxlan(vxlan))
    out += _leg_operations(wanted.leg, actual, mtu)
    out += [SetPort(name, mtu) for name in ports if (name, mtu) not in actual.ports]
    entries = _entries(wanted, empty_sandbox(wanted.network_id) if entries_lost else actual)
    return (*out, entries) if entries is not None else tuple(out)


def _leg_operations(leg: Leg | None, actual: Sandbox, mtu_bytes: int) -> list[SandboxOperation]:
    old = actual.leg
    if leg is None:
        return [DeleteLeg(old.name)] if old is not None else []
    if old is None or old.name != leg.name:
        gone: list[SandboxOperation] = [DeleteLeg(old.name)] if old is not None else []
        return [*gone, MakeLeg(leg)]
    out: list[SandboxOperation] = []
    if old != leg:
        out.append(SetLeg(leg, old.addresses ^ leg.addresses))
    if (LEG_PORT_NAME, mtu_bytes) not in actual.ports:
        out.append(SetPort(LEG_PORT_NAME, mtu_bytes))
    return out


def _entries(wanted: Sandbox, actual: Sandbox) -> SetEntries | None:
    macs = {mac for mac, _ in wanted.forwarding}
    known = {address for address, _ in wanted.neighbours}
    entries = SetEntries(
        forward=wanted.forwarding - actual.forwarding,
        unforward=frozenset(mac for mac, _ in actual.forwarding - wanted.forwarding if mac not in macs),
        know=wanted.neighbours - actual.neighbours,
        forget=frozenset(address for address, _ in actual.neighbours - wanted.neighbours if address not in known),
    )
    return entries if entries.forward or entries.unforward or entries.know or entries.forget else None


# --- tasks -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TaskKernel:
    """What a task's namespace holds, by link name. Only what could be ours."""

    links: frozenset[tuple[str, str, int]] = frozenset()
    """(name, MAC, MTU) of those that are up."""
    addresses: frozenset[tuple[str, str, int]] = frozenset()
    """(link, address, prefix)"""
    routes: frozenset[tuple[str, str, int, str]] = frozenset()
    """(link, destination, prefix, gateway or "")"""
    neighbours: frozenset[tuple[str, str, str]] = frozenset()
    """(link, address, MAC)"""
    present: frozenset[tuple[str, str]] = frozenset()
    """(name, MAC) of all links, down ones as well."""
    ipv6: frozenset[str] = frozenset()
    """Names of the links on which it is on."""
    ways_back: frozenset[tuple[str, str]] = frozenset()
    """(link, gateway) for marked answers."""


@dataclass(frozen=True, slots=True)
class MakeLink:
    link: TaskLink
    replaces: bool
    """A link of that name but another identity stands in the way."""


@dataclass(frozen=True, slots=True)
class SetLink:
    link: TaskLink
    stale: frozenset[tuple[str, int]]
    """Addresses to take away first: they lack the route to their subnet, or are not there at all."""


@dataclass(frozen=True, slots=True)
class LeadAnswers:
    """By these (link, gateway)."""

    ways: tuple[tuple[str, str], ...]


TaskOperation = MakeLink | SetLink | LeadAnswers


def task_operations(wanted: Task, actual: TaskKernel) -> tuple[TaskOperation, ...]:
    """A made link needs its settings too: `SetLink` follows each `MakeLink`."""
    out: list[TaskOperation] = []
    names = {name for name, _ in actual.present}
    for link in wanted.links:
        if (link.name, link.mac) not in actual.present:
            out += [MakeLink(link, link.name in names), SetLink(link, frozenset())]
        elif not _is_set(link, actual):
            standing = {(address, prefix) for name, address, prefix in actual.addresses if name == link.name}
            out.append(SetLink(link, frozenset(link.all_addresses) - standing))
    if not actual.ways_back.issuperset(wanted.ways_back):
        out.append(LeadAnswers(wanted.ways_back))
    return tuple(out)


def _is_set(link: TaskLink, actual: TaskKernel) -> bool:
    return (
        any((link.name, link.mac) == found[:2] and link.mtu_bytes in (0, found[2]) for found in actual.links)
        and (link.name in actual.ipv6 or not link.ipv6)
        and all((link.name, *address) in actual.addresses for address in link.all_addresses)
        and all((link.name, gateway, link.gateway_mac) in actual.neighbours for gateway in link.gateways)
        and all(_reachable(destination, prefix, actual) for destination, prefix, _ in link.routes)
    )


def _reachable(destination: str, prefix: int, actual: TaskKernel) -> bool:
    """Any route to that destination will do: a container with NET_ADMIN (a VPN's) may have put its own there."""
    return any((destination, prefix) == found[1:3] for found in actual.routes)
