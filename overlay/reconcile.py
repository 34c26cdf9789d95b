"""Makes this host's kernel equal to the wanted picture and keeps it so. Synchronous, on the namespace thread.

The last applied picture is kept in memory, so a call costs what changed; the audit reads the kernel and
repairs what somebody else changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from overlay import firewall, namespaces, nfnl
from overlay.act import NamespaceKernel, read_host, set_optional
from overlay.addressing import (
    NODE_RANGE,
    NODE_RANGE_PREFIX,
    host_table,
    is_leg,
    node_address,
    port_name,
)
from overlay.balance import (
    NO_VIPS,
    Backends,
    Changes,
    HostBalance,
    TaskBalance,
    give,
    give_host,
    udp_backends,
    wanted_chains,
    wanted_elements,
)
from overlay.diff import TaskKernel, task_operations
from overlay.encryption import HostEncryption
from overlay.interface import Attachment, HostState, Interface, NetworkError
from overlay.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Netlink, acknowledged
from overlay.plan import (
    Task,
    attachment_interfaces,
    check_state,
    plan_published,
    plan_task,
    vips_by_network,
)
from overlay.rtnl import delete_link
from overlay.ruleset import Layout, chains_of, host_layout, task_layout
from overlay.sandboxes import FAILURES, Sandboxes
from overlay.tables import UNKNOWN, task_table
from overlay.tables import host_table as make_host_table

log = structlog.get_logger("overlay")

AUDIT_PERIOD_S = 5.0
"""How stale a repair may be. An audit reads everything: about 1 ms per task and network."""
NEIGHBOUR_LIMITS = {"net.ipv4.neigh.default.gc_thresh2": 16384, "net.ipv4.neigh.default.gc_thresh3": 32768}
"""The machine's ARP table is shared by all namespaces; the default of 1,024 entries is 10 tasks of 100 peers."""
ChainSets = dict[tuple[str, ...], frozenset[str]]
"""Networks of a task -> balancing chains that their services use; shared by the tasks within one audit."""


@dataclass(slots=True)
class Attached:
    interfaces: tuple[Interface, ...]
    task: Task | None
    """None until its networks are known (again)."""
    balance: TaskBalance

    def network_ids(self) -> tuple[str, ...]:
        return tuple(interface.network_id for interface in self.interfaces)


@dataclass(frozen=True, slots=True)
class Port:
    """A task's link in a network's bridge ("" = none), and a socket in that network's namespace."""

    netlink: Netlink
    name: str

    def delete(self) -> None:
        """From any thread; closes the socket. No such link: fine."""
        with self.netlink:
            if self.name:
                self.netlink.batch(acknowledged([delete_link(self.name)]))


class Reconciler:
    def __init__(
        self, kernel: NamespaceKernel, tag: str, dns_address: str, dns_port: int, clock: Callable[[], float]
    ) -> None:
        self._kernel = kernel
        self._tag = tag
        self._task_layout = task_layout(dns_address, dns_port)
        self._clock = clock
        self._state: HostState | None = None
        self._complete = False
        """Whether `_state` was applied to its end."""
        self._mtu_bytes = 0
        self._sandboxes = Sandboxes(kernel, tag)
        self.encryption = HostEncryption(kernel.directory.parent / "encryption", f"{host_table(tag)}_esp")
        self._tasks: dict[str, Attached] = {}
        self._vips: dict[str, Backends] = {}
        self._host: HostBalance | None = None
        self._loads = Changes()
        self._loads_of: object = None
        self._audited_at_s = 0.0

    # --- apply ---------------------------------------------------------------------------------------

    def apply(self, state: HostState) -> None:
        check_state(state)
        if self._complete and state == self._state:
            if self._clock() - self._audited_at_s >= AUDIT_PERIOD_S:
                self.audit()
            elif self._sandboxes.faults:
                self._apply_networks(state)
            return
        self._complete = False
        old = self._state
        if old is None or (old.vtep, old.index, old.vxlan_port) != (state.vtep, state.index, state.vxlan_port):
            self._prepare_host(state)
        if old is None:
            self._adopt()
        self._state = state
        # Before anything is made: a new network may have the VNI or the subnet of one that goes.
        self._remove_unused()
        self._apply_networks(state)
        self._publish(state)
        self._share_vips(state)
        if old is None or old.networks != state.networks or old.index != state.index:
            self._replan_tasks()
        changes = Changes()
        for task_id, attached in self._tasks.items():
            self._guarded(f"task {task_id}", self._give, task_id, attached, changes)
        self._complete = True

    def _apply_networks(self, state: HostState) -> None:
        # First: an encrypted network's packets find everything in place.
        self.encryption.apply(state, self._sandboxes.vnis())
        self._sandboxes.apply(state, self._mtu_bytes, self.encryption.fault)

    def _guarded(self, what: str, action: Callable[..., object], *arguments: object) -> bool:
        """Failures of one object must not keep the others from being served. The audit tries it again."""
        try:
            action(*arguments)
        except FAILURES as error:
            log.warning("overlay_failed", object=what, error=str(error))
            self._audited_at_s = -AUDIT_PERIOD_S
            return False
        return True

    def _prepare_host(self, state: HostState) -> None:
        host = read_host()
        mtu = host.mtu_of(state.vtep)
        if mtu is None:
            raise NetworkError(
                f"no interface of this host has the data path address {state.vtep}; restore it, or leave and join"
                " again with --data-path-addr set to an address that this host has"
            )
        self._mtu_bytes = mtu
        self._host_sysctls()
        layout = host_layout(host_table(self._tag), self._tag, node_address(state.index), state.vxlan_port)
        if self._host is None or self._host.table.layout != layout:
            self._load_host_table(layout, state)
        self._open_firewall()

    @staticmethod
    def _host_sysctls() -> None:
        if namespaces.read_sysctl("net.ipv4.ip_forward") != "1":
            namespaces.sysctl("net.ipv4.ip_forward", "1")
            log.info("ip_forward_enabled")
        for name, limit in NEIGHBOUR_LIMITS.items():
            value = namespaces.read_sysctl(name)
            if value is not None and int(value) < limit:
                set_optional(name, str(limit))

    def _load_host_table(self, layout: Layout, state: HostState) -> None:
        netlink = self._host.netlink if self._host else Netlink(NETLINK_NETFILTER)
        balance = HostBalance(make_host_table(layout), netlink, plan_published(state), udp_backends(state))
        balance.table.adopt(netlink, balance.elements)
        self._host = balance

    def _open_firewall(self) -> None:
        with Netlink(NETLINK_NETFILTER) as netlink:
            chains = nfnl.chains(netlink)
        if firewall.in_use(chains):
            for command in firewall.let_through(self._tag):
                log.info("firewall_opened", command=f"iptables {command}")

    def _adopt(self) -> None:
        found = self._sandboxes.adopt()
        for task_id in self._kernel.task_ids():
            balance = self._new_balance(task_id)
            self._tasks[task_id] = Attached(found.get(task_id, ()), None, balance)
        log.info("overlay_adopted", networks=len(self._sandboxes.standing()), tasks=len(self._tasks))

    def _remove_unused(self) -> None:
        """A network that left the state stays until the last of its tasks has been detached."""
        kept = {network.network_id for network in self._state.networks} if self._state else set()
        kept |= {network_id for attached in self._tasks.values() for network_id in attached.network_ids()}
        for network_id in self._sandboxes.standing() - kept if self._state else ():
            self._guarded(f"network {network_id}", self._sandboxes.remove, network_id)

    # --- services ------------------------------------------------------------------------------------

    def _publish(self, state: HostState) -> None:
        host = self._host
        if host is None or host.elements == plan_published(state):
            return
        local = frozenset(address for _, address, _ in read_host().addresses) | {"127.0.0.1"}
        give_host(host, state, local)

    def _share_vips(self, state: HostState) -> None:
        """Networks whose VIPs did not change keep the identical object: comparing is then free for each task."""
        new = vips_by_network(state)
        self._vips = {
            network_id: self._vips[network_id] if self._vips.get(network_id) == vips else vips
            for network_id, vips in new.items()
        }

    def _give(self, task_id: str, attached: Attached, changes: Changes) -> None:
        balance, networks = attached.balance, attached.network_ids()
        known = balance.table.generation != UNKNOWN
        if known and all(balance.given.get(item) is self._vips.get(item, NO_VIPS) for item in networks):
            return
        if not known or not give(balance, self._vips, networks, changes):
            self._adopt_table(task_id, attached)

    def _new_balance(self, task_id: str) -> TaskBalance:
        with self._kernel.thread.inside(self._kernel.task_path(task_id)):
            return TaskBalance(task_table(self._task_layout), Netlink(NETLINK_NETFILTER))

    def _adopt_table(self, task_id: str, attached: Attached) -> None:
        networks = attached.network_ids()
        with self._kernel.thread.inside(self._kernel.task_path(task_id)):
            attached.balance.table.adopt(attached.balance.netlink, wanted_elements(self._vips, networks))
        attached.balance.given = {item: self._vips.get(item, NO_VIPS) for item in networks}

    # --- tasks ---------------------------------------------------------------------------------------

    def _plan(self, task_id: str, interfaces: tuple[Interface, ...]) -> Task:
        state = self._state
        if state is None:
            raise NetworkError(f"task {task_id}: this host has not been told of any network yet; apply a state first")
        for interface in interfaces:
            fault = self._sandboxes.faults.get(interface.network_id)
            if fault is not None:
                raise NetworkError(f"task {task_id} cannot be attached: {fault}")
        return plan_task(task_id, interfaces, self._sandboxes.networks, state.index, self._mtu_bytes)

    def _replan_tasks(self) -> None:
        for task_id, attached in self._tasks.items():
            if all(self._works(item) for item in attached.network_ids()):
                self._guarded(f"task {task_id}", self._replan, task_id, attached)

    def _replan(self, task_id: str, attached: Attached) -> None:
        task = self._plan(task_id, attached.interfaces)
        if task != attached.task:
            self._repair_links(task)
            attached.task = task

    def _repair_links(self, task: Task) -> bool:
        found = self._kernel.read_task(task.task_id)
        operations = task_operations(task, found, NODE_RANGE, NODE_RANGE_PREFIX)
        if operations:
            self._kernel.do_task(task, operations)
        return bool(operations)

    def attach(self, attachment: Attachment) -> Path:
        task_id = attachment.task_id
        interfaces = attachment_interfaces(attachment)
        for name in attachment.sysctls:
            if not name.startswith("net."):
                raise NetworkError(f"task {task_id}: sysctl {name} does not belong to a network namespace (net.*)")
        task = self._plan(task_id, interfaces)
        path = self._kernel.task_path(task_id)
        try:
            if namespaces.exists(path):
                self._attach_again(task, interfaces)
            else:
                self._attach_new(task, interfaces, attachment.sysctls)
        except OSError as error:
            raise NetworkError(f"task {task_id} cannot be attached: {error}") from error
        return path

    def _attach_new(self, task: Task, interfaces: tuple[Interface, ...], sysctls: dict[str, str]) -> None:
        kernel, task_id = self._kernel, task.task_id
        try:
            kernel.make_task_namespace(task_id, sysctls)
            attached = Attached(interfaces, task, self._new_balance(task_id))
            self._tasks[task_id] = attached
            kernel.do_task(task, task_operations(task, TaskKernel(), NODE_RANGE, NODE_RANGE_PREFIX))
            with kernel.thread.inside(kernel.task_path(task_id)):
                attached.balance.table.load(attached.balance.netlink, {}, fresh=True)
            self._give(task_id, attached, self._current_loads())
        except FAILURES:
            self._discard(task_id)
            raise

    def _current_loads(self) -> Changes:
        """Messages for a whole table are shared by the attachments between two changes of VIPs."""
        if self._loads_of is not self._vips:
            self._loads, self._loads_of = Changes(), self._vips
        return self._loads

    def _attach_again(self, task: Task, interfaces: tuple[Interface, ...]) -> None:
        known = self._tasks.get(task.task_id)
        if known is None:
            known = Attached(interfaces, None, self._new_balance(task.task_id))
            self._tasks[task.task_id] = known
        wanted = {interface.network_id for interface in interfaces}
        for network_id in set(known.network_ids()) - wanted:
            netlink = self._kernel.open_network(self._kernel.network_path(network_id))
            if netlink is not None:
                Port(netlink, port_name(task.task_id)).delete()
        if known.task != task or known.interfaces != interfaces:
            self._repair_links(task)
        known.task, known.interfaces = task, interfaces
        self._give(task.task_id, known, Changes())

    def begin_detach(self, task_id: str) -> list[Port]:
        """Forget the task; returns its ports, which are then deleted on any thread: each deletion waits about
        18 ms for packets under way, and this thread has better to do."""
        known = self._tasks.pop(task_id, None)
        names = {self._kernel.network_path(item).name for item in known.network_ids()} if known else set()
        paths = [path for path in self._sandboxes.paths() if not names or path.name in names]
        opened = [self._kernel.open_network(path) for path in paths]
        ports = [Port(netlink, port_name(task_id)) for netlink in opened if netlink is not None]
        return [*ports, Port(known.balance.netlink, "")] if known else ports

    def end_detach(self, task_id: str) -> None:
        """After its ports: until here a crash leaves the task in `attached`, to be detached again."""
        self._kernel.remove_task(task_id)
        self._remove_unused()

    def _discard(self, task_id: str) -> None:
        for port in self.begin_detach(task_id):
            port.delete()
        self._kernel.remove_task(task_id)

    def attached(self) -> frozenset[str]:
        return self._kernel.task_ids()

    # --- audit ---------------------------------------------------------------------------------------

    def audit(self) -> None:
        """Read the kernel, repair what is not as applied, log each repair."""
        state = self._state
        if state is None:
            return
        self._audited_at_s = self._clock()
        host = read_host()
        self._mtu_bytes = host.mtu_of(state.vtep) or self._mtu_bytes
        self._guarded("host", self._audit_host)
        for network_id in self._sandboxes.standing() & self._sandboxes.networks.keys():
            self._guarded(f"network {network_id}", self._sandboxes.audit, network_id, host)
        self.encryption.forget()
        self._apply_networks(state)
        chains: ChainSets = {}
        for task_id, attached in list(self._tasks.items()):
            self._guarded(f"task {task_id}", self._audit_task, task_id, attached, chains)
        self._remove_unused()

    def _audit_host(self) -> None:
        balance = self._host
        assert balance is not None
        self._host_sysctls()
        if balance.table.audit(balance.netlink, lambda: balance.elements):
            log.warning("overlay_repaired", object="host table")
            self._open_firewall()
        balance.table.sweep(balance.netlink, chains_of(balance.elements))

    def _works(self, network_id: str) -> bool:
        return network_id in self._sandboxes.networks and network_id not in self._sandboxes.faults

    def _audit_task(self, task_id: str, attached: Attached, chains: ChainSets) -> None:
        path = self._kernel.task_path(task_id)
        if not namespaces.exists(path):
            log.warning("task_namespace_gone", task=task_id)
            self._discard(task_id)
            return
        if all(self._works(item) for item in attached.network_ids()):
            attached.task = self._plan(task_id, attached.interfaces)
            if self._repair_links(attached.task):
                log.warning("overlay_repaired", object=f"task {task_id}", part="links")
        balance, networks = attached.balance, attached.network_ids()
        with self._kernel.thread.inside(path):
            if balance.table.audit(balance.netlink, lambda: wanted_elements(self._vips, networks)):
                log.warning("overlay_repaired", object=f"task {task_id}", part="table")
        if networks not in chains:
            chains[networks] = wanted_chains(self._vips, networks)
        balance.table.sweep(balance.netlink, chains[networks])

    def close(self) -> None:
        """Close what is kept open; the kernel's state stays."""
        for attached in self._tasks.values():
            attached.balance.netlink.close()
        if self._host is not None:
            self._host.netlink.close()

    # --- teardown ------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Leave nothing. Works in a new process too: everything is found by its name."""
        for task_id in self._kernel.task_ids():
            self._discard(task_id)
        for path in self._sandboxes.paths():
            self._kernel.remove_sandbox(path.name.removeprefix("net-"))
        self.encryption.teardown()
        legs = [delete_link(name) for name in read_host().links if is_leg(self._tag, name)]
        with Netlink(NETLINK_ROUTE) as netlink:
            netlink.batch(acknowledged(legs))
        with Netlink(NETLINK_NETFILTER) as netlink:
            if firewall.in_use(nfnl.chains(netlink)):
                firewall.take_back(self._tag)
            netlink.transaction(nfnl.transaction([nfnl.delete_table(host_table(self._tag))]))
        directory = self._kernel.directory
        if directory.is_dir():
            for path in directory.glob("task-*"):
                path.unlink()
            directory.rmdir()
        if self._host is not None:
            self._host.netlink.close()
        self._state, self._host, self._complete = None, None, False
        self._sandboxes = Sandboxes(self._kernel, self._tag)
        self._tasks, self._vips = {}, {}
