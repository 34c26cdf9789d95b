"""The nftables tables of the host and of all tasks, kept equal to the services. Runs on the namespace thread."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from overlay import conntrack, nfnl
from overlay.interface import L4, HostState
from overlay.netlink import Message, Netlink, NetlinkError
from overlay.plan import plan_published
from overlay.ruleset import (
    ASKED_BY_UDP,
    ASKED_MAX,
    ElementChange,
    Elements,
    element_change,
    joined,
    vip_chain_name,
    vip_elements,
)
from overlay.tables import UNKNOWN, Table

Backends = Mapping[str, tuple[str, ...]]
"""VIP -> backends, of one network"""
NO_VIPS: Backends = {}


@dataclass(slots=True)
class TaskBalance:
    """The table in one task's namespace and what it was last given."""

    table: Table
    netlink: Netlink
    """Kept open: a change then needs no visit to the namespace, and closing an nftables socket waits (12 ms)
    for the clean-up of what earlier transactions removed."""
    given: dict[str, Backends] = field(default_factory=dict)
    """Network -> its VIPs."""


def network_elements(vips: Backends) -> Elements:
    out: Elements = {}
    for address, backends in vips.items():
        out |= vip_elements(address, backends)
    return out


def vips_change(old: Backends, new: Backends) -> ElementChange:
    """Only the VIPs that differ are expanded: a change costs what changes, not what there is."""
    changed = [address for address in old.keys() | new.keys() if old.get(address) != new.get(address)]
    before = network_elements({address: old[address] for address in changed if address in old})
    after = network_elements({address: new[address] for address in changed if address in new})
    return element_change(before, after)


def withdrawn(old: Backends, new: Backends) -> dict[str, tuple[str, ...]]:
    """VIPs that lost a backend -> those they have now."""
    return {
        address: new.get(address, ())
        for address, backends in old.items()
        if backends != new.get(address) and not set(backends) <= set(new.get(address, ()))
    }


class Changes:
    """Work shared by the tasks within one pass: most of them go from the same picture to the same picture, so
    differences and netlink messages are made once and sent to each namespace."""

    def __init__(self) -> None:
        self._changes: dict[tuple[int, int], ElementChange] = {}
        self._withdrawn: dict[tuple[int, int], dict[str, tuple[str, ...]]] = {}
        self._messages: dict[tuple[object, ...], list[Message]] = {}
        self._kept: list[object] = []
        """Keeps the pictures alive: they are known by their id()."""

    def between(self, old: Backends, new: Backends) -> ElementChange:
        key = (id(old), id(new))
        if key not in self._changes:
            self._kept += [old, new]
            self._changes[key] = vips_change(old, new)
        return self._changes[key]

    def withdrawn(self, old: Backends, new: Backends) -> dict[str, tuple[str, ...]]:
        key = (id(old), id(new))
        if key not in self._withdrawn:
            self._withdrawn[key] = withdrawn(old, new)
        return self._withdrawn[key]

    def messages(
        self, table: Table, pairs: Iterable[tuple[Backends, Backends]], change: ElementChange
    ) -> list[Message]:
        missing = frozenset(change.chains() - table.chains)
        key = (tuple((id(old), id(new)) for old, new in pairs), missing)
        if key not in self._messages:
            self._messages[key] = table.messages(change)
        return self._messages[key]


def wanted_elements(vips: Mapping[str, Backends], networks: Iterable[str]) -> Elements:
    out: Elements = {}
    for network_id in networks:
        out |= network_elements(vips.get(network_id, NO_VIPS))
    return out


def wanted_chains(vips: Mapping[str, Backends], networks: Iterable[str]) -> frozenset[str]:
    """Balancing chains in use, without expanding all elements."""
    return frozenset(
        vip_chain_name(address, len(backends))
        for network_id in networks
        for address, backends in vips.get(network_id, NO_VIPS).items()
        if backends
    )


def give(balance: TaskBalance, vips: Mapping[str, Backends], networks: Iterable[str], changes: Changes) -> bool:
    """Bring one task's table up to date, in whatever namespace the thread is. False when the kernel refused: the
    table is not as we left it, and `Table.adopt` must repair it from inside its namespace."""
    networks = tuple(networks)
    wanted = {network_id: vips.get(network_id, NO_VIPS) for network_id in networks}
    pairs = [(balance.given.get(network_id, NO_VIPS), new) for network_id, new in wanted.items()]
    pairs = [(old, new) for old, new in pairs if old is not new]
    change = joined([changes.between(old, new) for old, new in pairs])
    balance.given = wanted
    if not change:
        return True
    try:
        balance.table.change(balance.netlink, change, changes.messages(balance.table, pairs, change))
    except NetlinkError:
        # The table is not what we left there: the audit compares and repairs, in the namespace.
        balance.table.generation = UNKNOWN
        return False
    lost = {vip: left for old, new in pairs for vip, left in changes.withdrawn(old, new).items()}
    if lost:
        forget_task_flows(balance.netlink, balance.table.layout.table, lost)
    return True


def forget_task_flows(netlink: Netlink, table: str, lost: Mapping[str, tuple[str, ...]]) -> None:
    """Cut the UDP flows of this namespace to backends that their VIP no longer has."""
    asked = nfnl.elements(netlink, table, [ASKED_BY_UDP])
    full = len(asked) >= ASKED_MAX
    hit = lost.keys() if full else {socket.inet_ntoa(key) for _, key in asked} & lost.keys()
    if hit:
        conntrack.forget_udp(netlink, lambda flow: flow.to in hit and flow.answered_by not in lost[flow.to])


# --- published ports ---------------------------------------------------------------------------------


@dataclass(slots=True)
class HostBalance:
    table: Table
    netlink: Netlink
    elements: Elements = field(default_factory=dict)
    udp: dict[int, frozenset[tuple[str, int]]] = field(default_factory=dict)


def udp_backends(state: HostState) -> dict[int, frozenset[tuple[str, int]]]:
    protocol: L4 = "udp"
    return {item.port: frozenset(item.backends) for item in state.published if item.protocol == protocol}


def give_host(balance: HostBalance, state: HostState, local_addresses: frozenset[str]) -> bool:
    """Bring the host's table up to date, in the host's namespace; True when it changed."""
    wanted, udp = plan_published(state), udp_backends(state)
    change = element_change(balance.elements, wanted)
    if not change:
        return False
    netlink = balance.netlink
    try:
        balance.table.change(netlink, change)
    except NetlinkError:
        balance.table.adopt(netlink, wanted)
    # A port that is new may be known to conntrack, untranslated, from a client that already tries it.
    moved = {
        port: udp.get(port, frozenset())
        for port in udp.keys() | balance.udp.keys()
        if port not in balance.udp or balance.udp[port] - udp.get(port, frozenset())
    }
    if moved and conntrack.any_flows():
        conntrack.forget_udp(
            netlink,
            lambda flow: (
                flow.to_port in moved
                and flow.to in local_addresses
                and (flow.answered_by, flow.answered_port) not in moved[flow.to_port]
            ),
        )
    balance.elements, balance.udp = wanted, udp
    return True
