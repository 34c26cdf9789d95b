"""The balancing of one task, and of the host: brought from one picture of the services to the next, and verified. Runs
on the namespace thread."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from overlay import conntrack, ipvs, nfnl
from overlay.elements import (
    ElementChange,
    Elements,
    chains_of,
    element_change,
    gateway_elements,
    hidden_elements,
    joined,
)
from overlay.hostkernel import read_host
from overlay.interface import HostState, PublishedPort, Vip
from overlay.ipvs import Key, Services, VirtualServices
from overlay.netlink import Message, Netlink, NetlinkError
from overlay.ruleset import ASKED_BY_UDP, ASKED_MAX, Layout
from overlay.schemes import Scheme
from overlay.tables import UNKNOWN, Chains, Tables

Vips = Mapping[str, Vip]
"""By address, of one network."""
NO_VIPS: Vips = {}
Balanced = TypeVar("Balanced", Vip, PublishedPort)


def vips_by_network(state: HostState) -> dict[str, dict[str, Vip]]:
    found: defaultdict[str, dict[str, Vip]] = defaultdict(dict)
    for vip in state.vips:
        found[vip.network_id][vip.address] = distinct(vip)
    return dict(found)


def distinct(service: Balanced) -> Balanced:
    """Each backend named once, with the weight that it has first."""
    backends = tuple(dict.fromkeys(service.backends))
    if len(backends) == len(service.backends):
        return service
    weights = dict(zip(reversed(service.backends), reversed(service.weights), strict=False))
    return replace(service, backends=backends, weights=tuple(weights[item] for item in backends) if weights else ())


@dataclass(slots=True)
class TaskBalance:
    """The balancing in one task's namespace and what it was last given."""

    scheme: Scheme
    tables: Tables
    netlink: Netlink
    """Kept open: a change then needs no visit to the namespace, and closing an nftables socket waits (12 ms)
    for the clean-up of what earlier transactions removed."""
    ipvs: VirtualServices | None
    given: dict[str, Vips] = field(default_factory=dict)
    """Network -> its VIPs."""

    def close(self) -> None:
        self.netlink.close()
        if self.ipvs is not None:
            self.ipvs.close()


def network_elements(scheme: Scheme, vips: Vips) -> Elements:
    out: Elements = {}
    for vip in vips.values():
        out |= scheme.vip_elements(vip)
    return out


def changed(old: Vips, new: Vips) -> list[str]:
    """Only the VIPs that differ are expanded: a change costs what changes, not what there is."""
    return [address for address in old.keys() | new.keys() if old.get(address) != new.get(address)]


def vips_change(scheme: Scheme, old: Vips, new: Vips) -> ElementChange:
    differ = changed(old, new)
    before = network_elements(scheme, {address: old[address] for address in differ if address in old})
    after = network_elements(scheme, {address: new[address] for address in differ if address in new})
    return element_change(before, after)


def services_change(scheme: Scheme, old: Vips, new: Vips) -> dict[Key, ipvs.Service | None]:
    out: dict[Key, ipvs.Service | None] = {}
    differ = changed(old, new)
    for address in differ:
        out |= dict.fromkeys(scheme.vip_services(old[address]) if address in old else ())
    for address in differ:
        out |= scheme.vip_services(new[address]) if address in new else {}
    return out


def withdrawn(old: Vips, new: Vips) -> dict[str, tuple[str, ...]]:
    """VIPs that lost a backend -> those they have now."""
    out = {}
    for address, vip in old.items():
        kept = new[address].backends if address in new else ()
        if vip.backends != kept and not set(vip.backends) <= set(kept):
            out[address] = kept
    return out


Pairs = tuple[tuple[int, int], ...]
"""Pictures before and after, by id()."""


def _known_by(pairs: Iterable[tuple[Vips, Vips]]) -> Pairs:
    return tuple((id(old), id(new)) for old, new in pairs)


class Changes:
    """Work shared by the tasks within one pass: most of them go from the same picture to the same picture, so
    differences and netlink messages are made once and sent to each namespace."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._changes: dict[tuple[int, int], ElementChange] = {}
        self._joined: dict[Pairs, ElementChange] = {}
        self._withdrawn: dict[tuple[int, int], dict[str, tuple[str, ...]]] = {}
        self._messages: dict[tuple[object, ...], list[Message]] = {}
        self._kept: list[object] = []
        """Keeps the pictures alive: they are known by their id()."""

    def between(self, old: Vips, new: Vips) -> ElementChange:
        key = (id(old), id(new))
        if key not in self._changes:
            self._kept += [old, new]
            self._changes[key] = vips_change(self.scheme, old, new)
        return self._changes[key]

    def between_all(self, pairs: list[tuple[Vips, Vips]]) -> ElementChange:
        key = _known_by(pairs)
        if key not in self._joined:
            self._joined[key] = joined([self.between(old, new) for old, new in pairs])
        return self._joined[key]

    def withdrawn(self, old: Vips, new: Vips) -> dict[str, tuple[str, ...]]:
        key = (id(old), id(new))
        if key not in self._withdrawn:
            self._withdrawn[key] = withdrawn(old, new)
        return self._withdrawn[key]

    def messages(self, tables: Tables, pairs: Iterable[tuple[Vips, Vips]], change: ElementChange) -> list[Message]:
        missing = frozenset(change.chains - tables.chains)
        key = (_known_by(pairs), missing)
        if key not in self._messages:
            self._messages[key] = tables.messages(change)
        return self._messages[key]


@dataclass(frozen=True, slots=True)
class Wanted:
    """For the tasks of this host."""

    vips: Mapping[str, Vips]
    """By network."""
    alive: frozenset[bytes]
    """Addresses of tasks that still run, wherever: under IPVS connections to them go on."""

    def on(self, networks: Iterable[str]) -> dict[str, Vips]:
        return {network_id: self.vips.get(network_id, NO_VIPS) for network_id in networks}


def wanted_elements(scheme: Scheme, vips: Mapping[str, Vips]) -> Elements:
    out: Elements = {}
    for found in vips.values():
        out |= network_elements(scheme, found)
    return out


def wanted_chains(scheme: Scheme, vips: Mapping[str, Vips]) -> Chains:
    """Balancing chains in use, without expanding all elements."""
    return frozenset(chain for found in vips.values() for vip in found.values() for chain in scheme.vip_chains(vip))


def wanted_services(scheme: Scheme, vips: Mapping[str, Vips]) -> Services:
    return {
        key: service
        for found in vips.values()
        for vip in found.values()
        for key, service in scheme.vip_services(vip).items()
    }


def give(balance: TaskBalance, wanted: Wanted, networks: Iterable[str], changes: Changes) -> bool:
    """Bring one task's balancing up to date, in whatever namespace the thread is. False when the kernel refused: it
    is not as we left it, and `adopt` must repair it from inside its namespace."""
    new_vips = wanted.on(networks)
    pairs = [(balance.given.get(network_id, NO_VIPS), new) for network_id, new in new_vips.items()]
    pairs = [(old, new) for old, new in pairs if old is not new]
    change = changes.between_all(pairs)
    balance.given = new_vips
    try:
        if balance.ipvs is not None:
            for old, new in pairs:
                balance.ipvs.change(services_change(balance.scheme, old, new), wanted.alive)
        if change:
            balance.tables.change(balance.netlink, change, changes.messages(balance.tables, pairs, change))
    except NetlinkError:
        balance.tables.generation = UNKNOWN
        return False
    lost = {vip: left for old, new in pairs for vip, left in changes.withdrawn(old, new).items()}
    if lost:
        forget_task_flows(balance.netlink, balance.tables, lost)
    return True


def adopt(
    balance: TaskBalance, layouts: tuple[Layout, ...], wanted: Wanted, networks: Iterable[str], elements: Elements
) -> None:
    """Whatever stands, make it as wanted, of which `elements` follow. Runs inside the namespace."""
    vips = wanted.on(networks)
    if balance.ipvs is not None:
        balance.ipvs.adopt(wanted_services(balance.scheme, vips), wanted.alive)
    differed = balance.tables.adopt(balance.netlink, layouts, elements)
    balance.given = vips
    _forget_missed(balance, asked_only=not differed)


def audit(balance: TaskBalance, layouts: tuple[Layout, ...], wanted: Wanted) -> bool:
    """True when something had to be repaired. Runs inside the namespace."""
    scheme, vips = balance.scheme, balance.given
    repaired = balance.ipvs is not None and balance.ipvs.audit(lambda: wanted_services(scheme, vips), wanted.alive)
    if balance.tables.audit(balance.netlink, layouts, lambda: wanted_elements(scheme, vips)):
        _forget_missed(balance, asked_only=False)
        return True
    return repaired


def _forget_missed(balance: TaskBalance, asked_only: bool) -> None:
    """Flows to backends that went while the agent was away, and those that began while the tables were not there, which
    are translated by nobody. Runs inside the namespace."""
    if conntrack.any_flows():
        backends = {address: vip.backends for vips in balance.given.values() for address, vip in vips.items()}
        forget_task_flows(balance.netlink, balance.tables, backends, asked_only)


def forget_task_flows(
    netlink: Netlink, tables: Tables, lost: Mapping[str, tuple[str, ...]], asked_only: bool = True
) -> None:
    """Cut the UDP flows of this namespace to backends that their VIP no longer has. `asked_only`: the tables know which
    VIPs were sent UDP."""
    for family in {layout.family for layout in tables.layouts if ASKED_BY_UDP in dict(layout.sets)}:
        asked = nfnl.elements(netlink, family, tables.name, [ASKED_BY_UDP])
        everything = not asked_only or len(asked) >= ASKED_MAX
        hit = lost.keys() if everything else {socket.inet_ntop(family, key) for _, _, key in asked} & lost.keys()
        left = {vip: lost[vip] for vip in hit}
        if left:
            conntrack.forget_udp(netlink, family, partial(_is_stale, left))


def _is_stale(left: Mapping[str, tuple[str, ...]], flow: conntrack.Flow) -> bool:
    return flow.to in left and flow.answered_by not in left[flow.to]


# --- published ports ---------------------------------------------------------------------------------


UdpPorts = Mapping[tuple[str, int], frozenset[tuple[str, int]]]
"""(local address or "", published UDP port) -> backends."""


@dataclass(frozen=True, slots=True)
class HostPicture:
    """What balances in the host's namespace."""

    elements: Elements
    services: Services
    udp: UdpPorts


def host_picture(scheme: Scheme, state: HostState, families: Iterable[int]) -> HostPicture:
    families = tuple(families)
    unable = {peer.node_id for peer in state.peers if peer.masquerade}
    hidden = [endpoint for endpoint in state.endpoints if endpoint.node_id in unable]
    elements = gateway_elements(state.networks)
    elements |= hidden_elements(item for end in hidden for item in (end.address, end.address6) if item)
    elements = {key: value for key, value in elements.items() if key[0] in families}
    services: dict[Key, ipvs.Service] = {}
    udp: dict[tuple[str, int], frozenset[tuple[str, int]]] = {}
    for published in map(distinct, state.published):
        elements |= scheme.port_elements(published, families)
        services |= scheme.port_services(published, families)
        if published.protocol == "udp":
            udp[published.host_ip, published.port] = frozenset(published.backends)
    return HostPicture(elements, services, udp)


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


@dataclass(slots=True)
class HostBalance:
    tables: Tables
    netlink: Netlink
    ipvs: VirtualServices | None
    given: HostPicture

    def give(self, wanted: HostPicture, alive: frozenset[bytes]) -> None:
        """Bring it up to date, in the host's namespace."""
        old = self.given
        try:
            if self.ipvs is not None:
                services: dict[Key, ipvs.Service | None] = dict.fromkeys(old.services)
                self.ipvs.change(services | dict(wanted.services), alive)
            self.tables.change(self.netlink, element_change(old.elements, wanted.elements))
        except NetlinkError:
            self.adopt(self.tables.layouts, wanted, alive)
        self.given = wanted
        self._forget_flows(old.udp)

    def _forget_flows(self, old: UdpPorts) -> None:
        """Cut UDP flows to backends that their port has no more. A port that is new may be known to conntrack,
        untranslated, from a client that already tries it."""
        new = self.given.udp
        moved = {key for key in old.keys() | new.keys() if key not in old or old[key] - new.get(key, frozenset())}
        if not moved or not conntrack.any_flows():
            return
        # Under IPVS only what comes from the host's loopback is nftables' business.
        local = frozenset(address for _, address, _ in read_host().addresses if self.ipvs is None)

        def is_stale(flow: conntrack.Flow) -> bool:
            keys = (flow.to, flow.to_port), ("", flow.to_port)
            if moved.isdisjoint(keys) or not (flow.to in local or is_loopback(flow.to)):
                return False
            return all((flow.answered_by, flow.answered_port) not in new.get(key, ()) for key in keys)

        for layout in self.tables.layouts:
            conntrack.forget_udp(self.netlink, layout.family, is_stale)

    def adopt(self, layouts: tuple[Layout, ...], wanted: HostPicture, alive: frozenset[bytes]) -> None:
        """Whatever stands, make it as wanted; flows may be as an earlier agent left them."""
        if self.ipvs is not None:
            self.ipvs.adopt(wanted.services, alive)
        self.tables.adopt(self.netlink, layouts, wanted.elements)
        self.given = wanted
        self._forget_flows({})

    def audit(self, alive: frozenset[bytes]) -> bool:
        """True when something had to be repaired."""
        repaired = self.ipvs is not None and self.ipvs.audit(lambda: self.given.services, alive)
        elements = self.given.elements
        if self.tables.audit(self.netlink, self.tables.layouts, lambda: elements):
            self._forget_flows({})  # who sent meanwhile was translated by nobody
            repaired = True
        self.tables.sweep(self.netlink, chains_of(elements))
        return repaired

    def close(self) -> None:
        self.netlink.close()
        if self.ipvs is not None:
            self.ipvs.close()
