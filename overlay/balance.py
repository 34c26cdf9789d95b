"""Balancing by nftables: the tables of the host and of all tasks, kept equal to the services. Runs on the namespace
thread."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from overlay import conntrack, nfnl
from overlay.elements import (
    ElementChange,
    Elements,
    element_change,
    gateway_elements,
    hidden_elements,
    joined,
    port_elements,
    vip_chain,
    vip_elements,
)
from overlay.interface import HostState, PublishedPort, Vip
from overlay.netlink import Message, Netlink, NetlinkError
from overlay.ruleset import ASKED_BY_UDP, ASKED_MAX
from overlay.tables import UNKNOWN, Chains, Tables

Vips = Mapping[str, Vip]
"""By address, of one network."""
NO_VIPS: Vips = {}
Service = TypeVar("Service", Vip, PublishedPort)


def vips_by_network(state: HostState) -> dict[str, dict[str, Vip]]:
    found: defaultdict[str, dict[str, Vip]] = defaultdict(dict)
    for vip in state.vips:
        found[vip.network_id][vip.address] = distinct(vip)
    return dict(found)


def distinct(service: Service) -> Service:
    """Each backend named once, with the weight that it has first."""
    backends = tuple(dict.fromkeys(service.backends))
    if len(backends) == len(service.backends):
        return service
    weights = dict(zip(reversed(service.backends), reversed(service.weights), strict=False))
    return replace(service, backends=backends, weights=tuple(weights[item] for item in backends) if weights else ())


@dataclass(slots=True)
class TaskBalance:
    """The tables in one task's namespace and what they were last given."""

    tables: Tables
    netlink: Netlink
    """Kept open: a change then needs no visit to the namespace, and closing an nftables socket waits (12 ms)
    for the clean-up of what earlier transactions removed."""
    given: dict[str, Vips] = field(default_factory=dict)
    """Network -> its VIPs."""


def network_elements(vips: Vips) -> Elements:
    out: Elements = {}
    for vip in vips.values():
        out |= vip_elements(vip)
    return out


def vips_change(old: Vips, new: Vips) -> ElementChange:
    """Only the VIPs that differ are expanded: a change costs what changes, not what there is."""
    changed = [address for address in old.keys() | new.keys() if old.get(address) != new.get(address)]
    before = network_elements({address: old[address] for address in changed if address in old})
    after = network_elements({address: new[address] for address in changed if address in new})
    return element_change(before, after)


def withdrawn(old: Vips, new: Vips) -> dict[str, tuple[str, ...]]:
    """VIPs that lost a backend -> those they have now."""
    out = {}
    for address, vip in old.items():
        kept = new[address].backends if address in new else ()
        if vip.backends != kept and not set(vip.backends) <= set(kept):
            out[address] = kept
    return out


class Changes:
    """Work shared by the tasks within one pass: most of them go from the same picture to the same picture, so
    differences and netlink messages are made once and sent to each namespace."""

    def __init__(self) -> None:
        self._changes: dict[tuple[int, int], ElementChange] = {}
        self._withdrawn: dict[tuple[int, int], dict[str, tuple[str, ...]]] = {}
        self._messages: dict[tuple[object, ...], list[Message]] = {}
        self._kept: list[object] = []
        """Keeps the pictures alive: they are known by their id()."""

    def between(self, old: Vips, new: Vips) -> ElementChange:
        key = (id(old), id(new))
        if key not in self._changes:
            self._kept += [old, new]
            self._changes[key] = vips_change(old, new)
        return self._changes[key]

    def withdrawn(self, old: Vips, new: Vips) -> dict[str, tuple[str, ...]]:
        key = (id(old), id(new))
        if key not in self._withdrawn:
            self._withdrawn[key] = withdrawn(old, new)
        return self._withdrawn[key]

    def messages(self, tables: Tables, pairs: Iterable[tuple[Vips, Vips]], change: ElementChange) -> list[Message]:
        missing = frozenset(change.chains() - tables.chains)
        key = (tuple((id(old), id(new)) for old, new in pairs), missing)
        if key not in self._messages:
            self._messages[key] = tables.messages(change)
        return self._messages[key]


def wanted_elements(vips: Mapping[str, Vips], networks: Iterable[str]) -> Elements:
    out: Elements = {}
    for network_id in networks:
        out |= network_elements(vips.get(network_id, NO_VIPS))
    return out


def wanted_chains(vips: Mapping[str, Vips], networks: Iterable[str]) -> Chains:
    """Balancing chains in use, without expanding all elements."""
    found = (vip for network_id in networks for vip in vips.get(network_id, NO_VIPS).values())
    return frozenset(vip_chain(vip) for vip in found if vip.backends)


def give(balance: TaskBalance, vips: Mapping[str, Vips], networks: Iterable[str], changes: Changes) -> bool:
    """Bring one task's tables up to date, in whatever namespace the thread is. False when the kernel refused: the
    tables are not as we left them, and `Tables.adopt` must repair them from inside their namespace."""
    networks = tuple(networks)
    wanted = {network_id: vips.get(network_id, NO_VIPS) for network_id in networks}
    pairs = [(balance.given.get(network_id, NO_VIPS), new) for network_id, new in wanted.items()]
    pairs = [(old, new) for old, new in pairs if old is not new]
    change = joined([changes.between(old, new) for old, new in pairs])
    balance.given = wanted
    if not change:
        return True
    try:
        balance.tables.change(balance.netlink, change, changes.messages(balance.tables, pairs, change))
    except NetlinkError:
        balance.tables.generation = UNKNOWN
        return False
    lost = {vip: left for old, new in pairs for vip, left in changes.withdrawn(old, new).items()}
    if lost:
        forget_task_flows(balance.netlink, balance.tables, lost)
    return True


def forget_task_flows(netlink: Netlink, tables: Tables, lost: Mapping[str, tuple[str, ...]]) -> None:
    """Cut the UDP flows of this namespace to backends that their VIP no longer has."""
    for family in {layout.family for layout in tables.layouts if ASKED_BY_UDP in dict(layout.sets)}:
        asked = nfnl.elements(netlink, family, tables.name, [ASKED_BY_UDP])
        full = len(asked) >= ASKED_MAX
        hit = lost.keys() if full else {socket.inet_ntop(family, key) for _, _, key in asked} & lost.keys()
        left = {vip: lost[vip] for vip in hit}
        if left:
            conntrack.forget_udp(netlink, family, partial(_is_stale, left))


def _is_stale(left: Mapping[str, tuple[str, ...]], flow: conntrack.Flow) -> bool:
    return flow.to in left and flow.answered_by not in left[flow.to]


# --- published ports ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostPicture:
    """What the host's tables should hold."""

    elements: Elements
    udp: Mapping[int, frozenset[tuple[str, int]]]
    """Published UDP ports -> backends."""


def host_picture(state: HostState, families: Iterable[int]) -> HostPicture:
    families = tuple(families)
    unable = {peer.node_id for peer in state.peers if peer.masquerade}
    hidden = [endpoint for endpoint in state.endpoints if endpoint.node_id in unable]
    elements = gateway_elements(state.networks)
    elements |= hidden_elements(item for end in hidden for item in (end.address, end.address6) if item)
    elements = {key: value for key, value in elements.items() if key[0] in families}
    udp: defaultdict[int, frozenset[tuple[str, int]]] = defaultdict(frozenset)
    for published in state.published:
        elements |= port_elements(distinct(published), families)
        if published.protocol == "udp":
            udp[published.port] |= frozenset(published.backends)
    return HostPicture(elements, dict(udp))


@dataclass(slots=True)
class HostBalance:
    tables: Tables
    netlink: Netlink
    given: HostPicture


def give_host(balance: HostBalance, wanted: HostPicture, local_addresses: frozenset[str]) -> None:
    """Bring the host's tables up to date, in the host's namespace."""
    change = element_change(balance.given.elements, wanted.elements)
    if not change:
        return
    netlink = balance.netlink
    try:
        balance.tables.change(netlink, change)
    except NetlinkError:
        balance.tables.adopt(netlink, balance.tables.layouts, wanted.elements)
    old, new = balance.given.udp, wanted.udp
    # A port that is new may be known to conntrack, untranslated, from a client that already tries it.
    moved = {
        port: new.get(port, frozenset())
        for port in old.keys() | new.keys()
        if port not in old or old[port] - new.get(port, frozenset())
    }
    if moved and conntrack.any_flows():
        for layout in balance.tables.layouts:
            conntrack.forget_udp(
                netlink,
                layout.family,
                lambda flow: (
                    flow.to_port in moved
                    and flow.to in local_addresses
                    and (flow.answered_by, flow.answered_port) not in moved[flow.to_port]
                ),
            )
    balance.given = wanted
