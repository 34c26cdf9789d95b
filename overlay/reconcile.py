"""Makes this host's kernel equal to the wanted picture and keeps it so. Synchronous, on the namespace thread.

The last applied picture is kept in memory, so a call costs what changed; the audit reads the kernel and
repairs what somebody else changed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from overlay import firewall, namespaces, nfnl
from overlay.act import NamespaceKernel, read_host
from overlay.addressing import (
    host_table,
    is_leg,
    node_address,
    port_name,
)
from overlay.balance import (
    NO_VIPS,
    Changes,
    HostBalance,
    TaskBalance,
    Vips,
    give,
    give_host,
    host_picture,
    vips_by_network,
    wanted_chains,
    wanted_elements,
)
from overlay.diff import TaskKernel, task_operations
from overlay.elements import chains_of
from overlay.hostbridge import free_address
from overlay.interface import Attachment, HostState, Interface, NetworkError
from overlay.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Netlink, acknowledged
from overlay.plan import (
    Task,
    TaskNetwork,
    check_interfaces,
    check_state,
    mtu_left,
    plan_task,
)
from overlay.rtnl import delete_link
from overlay.ruleset import TASK_TABLE, Layout, host_layouts, task_layouts
from overlay.sandboxes import FAILURES, Sandboxes
from overlay.sysctls import set_host_sysctls
from overlay.tables import UNKNOWN, Chains, delete_tables, host_tables, task_tables

log = structlog.get_logger("overlay")

AUDIT_PERIOD_S = 5.0
"""How stale a repair may be. An audit reads everything: about 1 ms per task and network."""
ChainSets = dict[tuple[str, ...], Chains]
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


def _links_differ(old: HostState, new: HostState) -> bool:
    """Whether the links of tasks may have to be others."""
    return (old.networks, old.macvlans, old.index) != (new.networks, new.macvlans, new.index)


class Reconciler:
    def __init__(
        self,
        kernel: NamespaceKernel,
        tag: str,
        dns_address: str,
        dns_port: int,
        *,
        clock: Callable[[], float],
        answers_through_ingress: bool,
    ) -> None:
        self._kernel = kernel
        self._tag = tag
        self._dns = (dns_address, dns_port)
        self._answers = answers_through_ingress
        self._clock = clock
        self._state: HostState | None = None
        self._complete = False
        """Whether `_state` was applied to its end."""
        self.link_mtu_bytes = 0
        """Of the link that has this node's data path address."""
        self._mtu_bytes = 0
        """What the underlay takes: the link, and the path to each peer."""
        self._paths: dict[str, int] = {}
        """Peer's data path address -> MTU of the path to it, in bytes, as measured last."""
        self._warned: set[tuple[str, int]] = set()
        self._sandboxes = Sandboxes(kernel, tag)
        self._tasks: dict[str, Attached] = {}
        self._vips: dict[str, Vips] = {}
        self._host: HostBalance | None = None
        self._loads = Changes()
        self._loads_of: object = None
        self._audited_at_s = 0.0
        self._last_given = ""

    # --- apply ---------------------------------------------------------------------------------------

    def apply(self, state: HostState) -> None:
        check_state(state)
        if self._complete and state == self._state:
            if self._clock() - self._audited_at_s >= AUDIT_PERIOD_S:
                self.audit()
            elif self._sandboxes.faults:
                self._sandboxes.apply(state, self._mtu_bytes)
            return
        self._complete = False
        old = self._state
        if old is None or (old.vtep, old.index, old.vxlan_port) != (state.vtep, state.index, state.vxlan_port):
            self._prepare_host(state)
        elif old.networks != state.networks:
            self._host_sysctls(state)
        self._sandboxes.want(state)
        if old is None:
            self._adopt()
        self._state = state
        resized = self._resize(state)
        # Before anything is made: a new network may have the VNI or the subnet of one that goes.
        self._remove_unused()
        self._sandboxes.apply(state, self._mtu_bytes)
        self._publish(state)
        self._share_vips(state)
        if resized or old is None or _links_differ(old, state):
            self._replan_tasks()
        changes = Changes()
        for task_id, attached in self._tasks.items():
            self._guarded(f"task {task_id}", self._give, task_id, attached, changes)
        self._complete = True

    def _resize(self, state: HostState) -> bool:
        """Decide on the underlay's MTU; True when it is another than before."""
        before = self._mtu_bytes
        paths = [self._paths[peer.vtep] for peer in state.peers if peer.vtep in self._paths]
        self._mtu_bytes = min([self.link_mtu_bytes, *paths])
        if before not in (0, self._mtu_bytes):
            log.info("underlay_mtu_changed", bytes=self._mtu_bytes, before=before, link=self.link_mtu_bytes)
        for network in state.networks:
            option, left = network.mtu_bytes or 0, mtu_left(network, self._mtu_bytes)
            if option > left and (network.network_id, left) not in self._warned:
                self._warned.add((network.network_id, left))
                log.warning("network_mtu_too_large", network=network.network_id, option=option, room=left)
        return self._mtu_bytes != before

    def learn_paths(self, paths: Mapping[str, int]) -> None:
        """Peer's data path address -> MTU of the path to it, in bytes. A peer that does not answer keeps the last."""
        state = self._state
        if state is None:
            return
        peers = {peer.vtep for peer in state.peers}
        self._paths = {peer: mtu for peer, mtu in {**self._paths, **paths}.items() if peer in peers}
        if self._resize(state):
            self._sandboxes.apply(state, self._mtu_bytes)
            self._replan_tasks()

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
        self.link_mtu_bytes = mtu
        self._host_sysctls(state)
        self._publish(state)
        self._open_firewall()

    @staticmethod
    def _host_sysctls(state: HostState) -> None:
        set_host_sysctls(ipv6=any(network.subnet6 for network in state.networks))

    def _open_firewall(self) -> None:
        with Netlink(NETLINK_NETFILTER) as netlink:
            chains = nfnl.chains(netlink)
        if firewall.in_use(chains):
            for command in firewall.let_through(self._tag):
                log.info("firewall_opened", command=f"iptables {command}")

    def _adopt(self) -> None:
        found = self._sandboxes.adopt()
        for task_id in self._kernel.task_ids():
            links = found.get(task_id, {}) | self._kernel.read_macvlans(task_id)
            interfaces = tuple(links[name] for name in sorted(links, key=lambda name: (len(name), name)))
            self._tasks[task_id] = Attached(interfaces, None, self._new_balance(task_id))
        log.info("overlay_adopted", networks=len(self._sandboxes.standing()), tasks=len(self._tasks))

    def _remove_unused(self) -> None:
        """A network that left the state stays until the last of its tasks has been detached."""
        kept = set(self._sandboxes.networks)
        kept |= {network_id for attached in self._tasks.values() for network_id in attached.network_ids()}
        for network_id in self._sandboxes.standing() - kept if self._state else ():
            self._guarded(f"network {network_id}", self._sandboxes.remove, network_id)

    # --- services ------------------------------------------------------------------------------------

    def _publish(self, state: HostState) -> None:
        layouts = self._host_layouts(state)
        wanted = host_picture(state, [layout.family for layout in layouts])
        host = self._host
        if host is None or host.tables.layouts != layouts:
            netlink = host.netlink if host else Netlink(NETLINK_NETFILTER)
            self._host = HostBalance(host_tables(host_table(self._tag)), netlink, wanted)
            self._host.tables.adopt(netlink, layouts, wanted.elements)
        elif host.given != wanted:
            local = frozenset(address for _, address, _ in read_host().addresses) | {"127.0.0.1"}
            give_host(host, wanted, local)

    def _host_layouts(self, state: HostState) -> tuple[Layout, ...]:
        own: dict[int, str] = {socket.AF_INET: node_address(state.index)}
        return host_layouts(host_table(self._tag), self._tag, own, state.vxlan_port)

    def _share_vips(self, state: HostState) -> None:
        """Networks whose VIPs did not change keep the identical object: comparing is then free for each task."""
        new = vips_by_network(state)
        self._vips = {
            network_id: self._vips[network_id] if self._vips.get(network_id) == vips else vips
            for network_id, vips in new.items()
        }

    def _give(self, task_id: str, attached: Attached, changes: Changes) -> None:
        balance, networks = attached.balance, attached.network_ids()
        known = balance.tables.generation != UNKNOWN
        if known and all(balance.given.get(item) is self._vips.get(item, NO_VIPS) for item in networks):
            return
        if not known or not give(balance, self._vips, networks, changes):
            self._adopt_table(task_id, attached)

    def _new_balance(self, task_id: str) -> TaskBalance:
        with self._kernel.thread.inside(self._kernel.task_path(task_id)):
            return TaskBalance(task_tables(TASK_TABLE), Netlink(NETLINK_NETFILTER))

    def _task_layouts(self, attached: Attached) -> tuple[Layout, ...]:
        links = attached.task.links if attached.task else ()
        default = next((link.name for link in links if link.routes), "")
        families = (
            (socket.AF_INET, socket.AF_INET6) if any(i.address6 for i in attached.interfaces) else (socket.AF_INET,)
        )
        return task_layouts(*self._dns, families, default if self._answers else "")

    def _adopt_table(self, task_id: str, attached: Attached) -> None:
        balance, networks = attached.balance, attached.network_ids()
        with self._kernel.thread.inside(self._kernel.task_path(task_id)):
            layouts = self._task_layouts(attached)
            balance.tables.adopt(balance.netlink, layouts, wanted_elements(self._vips, networks))
        balance.given = {item: self._vips.get(item, NO_VIPS) for item in networks}

    # --- tasks ---------------------------------------------------------------------------------------

    def _plan(self, task_id: str, interfaces: tuple[Interface, ...]) -> Task:
        state = self._state
        if state is None:
            raise NetworkError(f"task {task_id}: this host has not been told of any network yet; apply a state first")
        for interface in interfaces:
            fault = self._sandboxes.faults.get(interface.network_id)
            if fault is not None:
                raise NetworkError(f"task {task_id} cannot be attached: {fault}")
        return plan_task(task_id, interfaces, self._networks(), state.index, self._mtu_bytes)

    def _networks(self) -> dict[str, TaskNetwork]:
        macvlans = self._state.macvlans if self._state else ()
        return {**self._sandboxes.networks, **{network.network_id: network for network in macvlans}}

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
        operations = task_operations(task, found)
        if operations:
            self._kernel.do_task(task, operations)
        return bool(operations)

    def attach(self, attachment: Attachment) -> Path:
        task_id = attachment.task_id
        check_interfaces(attachment)
        interfaces = tuple(self._addressed(task_id, interface) for interface in attachment.interfaces)
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

    def _addressed(self, task_id: str, interface: Interface) -> Interface:
        """On the host's bridge: with the address that the host gave it, or gives it now. Raises NetworkError."""
        if interface.address or not self._sandboxes.is_bridge(interface.network_id):
            return interface
        known = {
            owner: item
            for owner, attached in self._tasks.items()
            for item in attached.interfaces
            if item.network_id == interface.network_id
        }
        if task_id not in known:
            network = self._sandboxes.networks[interface.network_id]
            used = (item.address.partition("/")[0] for item in known.values())
            self._last_given = free_address(network, used, self._last_given)
            return replace(interface, address=self._last_given)
        return known[task_id]

    def given_address(self, task_id: str) -> str:
        known = self._tasks.get(task_id)
        interfaces = known.interfaces if known else ()
        given = (item.address.partition("/")[0] for item in interfaces if self._sandboxes.is_bridge(item.network_id))
        return next(given, "")

    def _attach_new(self, task: Task, interfaces: tuple[Interface, ...], sysctls: dict[str, str]) -> None:
        kernel, task_id = self._kernel, task.task_id
        try:
            kernel.make_task_namespace(task_id, sysctls)
            attached = Attached(interfaces, task, self._new_balance(task_id))
            self._tasks[task_id] = attached
            kernel.do_task(task, task_operations(task, TaskKernel()))
            with kernel.thread.inside(kernel.task_path(task_id)):
                attached.balance.tables.layouts = self._task_layouts(attached)
                attached.balance.tables.load(attached.balance.netlink, {}, fresh=True)
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
        own = self._kernel.task_path(task_id)
        for link in known.task.links if known and known.task else ():
            netlink = self._kernel.open_network(own) if link.parent else None
            if netlink is not None:
                ports.append(Port(netlink, link.name))
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
        self.link_mtu_bytes = host.mtu_of(state.vtep) or self.link_mtu_bytes
        self._resize(state)
        self._guarded("host", self._audit_host, state)
        for network_id in self._sandboxes.standing() & self._sandboxes.networks.keys():
            self._guarded(f"network {network_id}", self._sandboxes.audit, network_id, host)
        self._sandboxes.apply(state, self._mtu_bytes)
        chains: ChainSets = {}
        for task_id, attached in list(self._tasks.items()):
            self._guarded(f"task {task_id}", self._audit_task, task_id, attached, chains)
        self._remove_unused()

    def _audit_host(self, state: HostState) -> None:
        balance = self._host
        assert balance is not None
        self._host_sysctls(state)
        elements = balance.given.elements
        if balance.tables.audit(balance.netlink, balance.tables.layouts, lambda: elements):
            log.warning("overlay_repaired", object="host table")
            self._open_firewall()
        balance.tables.sweep(balance.netlink, chains_of(elements))

    def _works(self, network_id: str) -> bool:
        return network_id in self._networks() and network_id not in self._sandboxes.faults

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
                attached.balance.tables.generation = UNKNOWN  # the hook at a link goes with it
        balance, networks = attached.balance, attached.network_ids()
        with self._kernel.thread.inside(path):
            layouts = self._task_layouts(attached)
            if balance.tables.audit(balance.netlink, layouts, lambda: wanted_elements(self._vips, networks)):
                log.warning("overlay_repaired", object=f"task {task_id}", part="table")
        if networks not in chains:
            chains[networks] = wanted_chains(self._vips, networks)
        balance.tables.sweep(balance.netlink, chains[networks])

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
        legs = [delete_link(name) for name in read_host().links if is_leg(self._tag, name)]
        with Netlink(NETLINK_ROUTE) as netlink:
            netlink.batch(acknowledged(legs))
        with Netlink(NETLINK_NETFILTER) as netlink:
            if firewall.in_use(nfnl.chains(netlink)):
                firewall.take_back(self._tag)
            delete_tables(netlink, host_table(self._tag))
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
