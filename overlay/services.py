"""All balancing of this host: published ports in its own namespace, VIPs in each task's. Namespace thread only."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable

from overlay import balance, ipvs
from overlay.addressing import host_table, node_address, node_address6
from overlay.balance import (
    Changes,
    HostBalance,
    TaskBalance,
    Wanted,
    host_picture,
    vips_by_network,
    wanted_chains,
    wanted_elements,
)
from overlay.elements import Elements, packed
from overlay.interface import Balancer, HostState, Interface
from overlay.ipvs import VirtualServices
from overlay.netlink import NETLINK_NETFILTER, Netlink
from overlay.plan import Task
from overlay.ruleset import TASK_TABLE, Layout, host_layouts, task_layouts
from overlay.schemes import SCHEMES
from overlay.tables import UNKNOWN, Chains, delete_tables, host_tables, task_tables


class ServiceBalancer:
    def __init__(self, balancer: Balancer, tag: str, dns: tuple[str, int], answers_through_ingress: bool) -> None:
        self._scheme = SCHEMES[balancer]
        self._tag = tag
        self._dns = dns
        self._answers = answers_through_ingress
        self._host: HostBalance | None = None
        self._wanted = Wanted({}, frozenset())
        self._loads = Changes(self._scheme)
        """Shared by all tasks between two changes of VIPs."""
        self._chains: dict[tuple[str, ...], Chains] = {}
        """Networks of a task -> balancing chains that their services use; valid as long."""
        self._elements: dict[tuple[str, ...], Elements] = {}
        """And all their elements, as long."""

    # --- the host: to be called in its namespace ---

    def publish(self, state: HostState, local_addresses: Iterable[str]) -> None:
        """Published ports as in `state`, whose VIPs `give` uses from now on. `local_addresses`: of the tasks here."""
        self._want(state, local_addresses)
        layouts = self._host_layouts(state)
        wanted = host_picture(self._scheme, state, [layout.family for layout in layouts])
        host = self._host
        if host is None:
            virtual = self._virtual_services(ipvs.is_port_mark)
            host = self._host = HostBalance(host_tables(self._table), Netlink(NETLINK_NETFILTER), virtual, wanted)
        if host.tables.layouts != layouts or host.tables.generation == UNKNOWN:
            host.adopt(layouts, wanted, self._wanted.alive)
        elif host.given != wanted:
            host.give(wanted, self._wanted.alive)

    @property
    def _table(self) -> str:
        return host_table(self._tag)

    def _virtual_services(self, ours: Callable[[int], bool]) -> VirtualServices | None:
        """In the current namespace. None under nftables; what a daemon with IPVS left is then taken away."""
        if self._scheme.name == "ipvs":
            return VirtualServices(ours)
        if ipvs.any_here():
            left = VirtualServices(ours)
            left.adopt({}, frozenset())
            left.close()
        return None

    def _host_layouts(self, state: HostState) -> tuple[Layout, ...]:
        own: dict[int, str] = {socket.AF_INET: node_address(state.index)}
        if any(network.subnet6 for network in state.networks):
            own[socket.AF_INET6] = node_address6(state.index)
        return host_layouts(self._scheme.name, self._table, self._tag, own, state.vxlan_port)

    def _want(self, state: HostState, local_addresses: Iterable[str]) -> None:
        """Networks whose VIPs did not change keep the identical object: comparing is then free for each task."""
        old, new = self._wanted.vips, vips_by_network(state)
        vips = {
            network_id: old[network_id] if old.get(network_id) == found else found for network_id, found in new.items()
        }
        alive: frozenset[bytes] = frozenset()
        if self._scheme.name == "ipvs":
            remote = (item for end in state.endpoints for item in (end.address, end.address6) if item)
            alive = frozenset(packed(address) for address in (*remote, *local_addresses))
        if vips.keys() != old.keys() or any(vips[key] is not old[key] for key in old):
            self._loads, self._chains, self._elements = Changes(self._scheme), {}, {}
        self._wanted = Wanted(vips, alive)

    def audit_host(self) -> bool:
        """True when something had to be repaired."""
        return self._host is not None and self._host.audit(self._wanted.alive)

    # --- tasks ---

    def open(self) -> TaskBalance:
        """In the task's namespace."""
        virtual = self._virtual_services(lambda mark: True)
        return TaskBalance(self._scheme, task_tables(TASK_TABLE), Netlink(NETLINK_NETFILTER), virtual)

    def layouts(self, task: Task | None, interfaces: Iterable[Interface]) -> tuple[Layout, ...]:
        """`task`: None = its links are not known yet."""
        ways_out: tuple[str, ...] = ()
        reroute = task is not None and bool(task.answers_by)
        if task is not None and self._answers:
            leading = (link.name for link in task.links if link.routes)
            ways_out = (task.answers_by,) if reroute else tuple(leading)
        families: tuple[int, ...] = (socket.AF_INET,)
        if any(interface.address6 for interface in interfaces):
            families += (socket.AF_INET6,)
        return task_layouts(self._scheme.name, self._dns, families, ways_out, reroute)

    def give(self, task: TaskBalance, networks: tuple[str, ...]) -> bool:
        """In any namespace. False: `adopt` has to, inside the task's."""
        if task.tables.generation == UNKNOWN:
            return False
        if all(task.given.get(network_id) is vips for network_id, vips in self._wanted.on(networks).items()):
            return True
        return balance.give(task, self._wanted, networks, self._loads)

    def load(self, task: TaskBalance, layouts: tuple[Layout, ...]) -> None:
        """In a fresh namespace."""
        task.tables.layouts = layouts
        task.tables.load(task.netlink, {}, fresh=True)

    def adopt(self, task: TaskBalance, layouts: tuple[Layout, ...], networks: tuple[str, ...]) -> None:
        if networks not in self._elements:
            self._elements[networks] = wanted_elements(self._scheme, self._wanted.on(networks))
        balance.adopt(task, layouts, self._wanted, networks, self._elements[networks])

    def audit(self, task: TaskBalance, layouts: tuple[Layout, ...], networks: tuple[str, ...]) -> bool:
        """In the task's namespace; True when something had to be repaired."""
        repaired = balance.audit(task, layouts, self._wanted)
        if networks not in self._chains:
            self._chains[networks] = wanted_chains(self._scheme, self._wanted.on(networks))
        task.tables.sweep(task.netlink, self._chains[networks])
        return repaired

    # --- the end ---

    def remove(self) -> None:
        """From the host's namespace; tasks' namespaces go as wholes."""
        virtual = self._virtual_services(ipvs.is_port_mark)
        if virtual is not None:
            virtual.adopt({}, frozenset())
            virtual.close()
        with Netlink(NETLINK_NETFILTER) as netlink:
            delete_tables(netlink, self._table)
        self.close()
        self._host, self._wanted = None, Wanted({}, frozenset())

    def close(self) -> None:
        if self._host is not None:
            self._host.close()
