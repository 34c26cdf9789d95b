"""Makes this host's kernel equal to the wanted picture and keeps it so. Synchronous, on the namespace thread.

The last applied picture is kept in memory, so a call costs what changed; the audit reads the kernel and
repairs what somebody else changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import structlog

from overlay import namespaces
from overlay.act import NamespaceKernel
from overlay.addressing import (
    is_leg,
    port_name,
)
from overlay.attached import Attached, Detached
from overlay.balance import TaskBalance
from overlay.diff import task_operations
from overlay.encryption import HostEncryption
from overlay.firewall import Firewall
from overlay.hostbridge import free_address
from overlay.hostkernel import read_host
from overlay.inspection import inspect
from overlay.interface import Attachment, HostState, Inspection, Interface, NetworkError
from overlay.netlink import NETLINK_ROUTE, Netlink, acknowledged
from overlay.plan import (
    Task,
    TaskNetwork,
    check_interfaces,
    check_state,
    plan_task,
)
from overlay.removal import Port
from overlay.rtnl import delete_link
from overlay.ruleset import Layout
from overlay.sandboxes import FAILURES, Sandboxes
from overlay.services import ServiceBalancer
from overlay.spares import Spares
from overlay.sysctls import set_host_sysctls
from overlay.tables import UNKNOWN
from overlay.underlay import Underlay

log = structlog.get_logger("overlay")

AUDIT_PERIOD_S = 3.0
"""No audit sooner after the last: it reads everything, about 1 ms per task and network. Less than the period at which
the agent calls, so that none of its calls comes a moment too early."""


def _links_differ(old: HostState, new: HostState) -> bool:
    """Whether the links of tasks may have to be others."""
    return (old.networks, old.macvlans, old.index) != (new.networks, new.macvlans, new.index)


class Reconciler:
    def __init__(
        self,
        kernel: NamespaceKernel,
        tag: str,
        services: ServiceBalancer,
        encryption: HostEncryption,
        clock: Callable[[], float],
    ) -> None:
        self._kernel = kernel
        self._tag = tag
        self._services = services
        self._spares = Spares(services.open)
        self._clock = clock
        self._state: HostState | None = None
        self._complete = False
        """Whether `_state` was applied to its end."""
        self._firewall = Firewall(tag)
        self.underlay = Underlay()
        self._sandboxes = Sandboxes(kernel, tag, encryption)
        self._tasks: dict[str, Attached] = {}
        self._audited_at_s = 0.0
        self._last_given = ""

    # --- apply ---------------------------------------------------------------------------------------

    def apply(self, state: HostState) -> None:
        check_state(state)
        if self._complete and state == self._state:
            if self._clock() - self._audited_at_s >= AUDIT_PERIOD_S:
                self.audit()
            elif self._sandboxes.faults:
                self._sandboxes.apply(state, self.underlay.mtu_bytes)
            return
        self._complete = False
        old = self._state
        self._sandboxes.want(state)
        if old is None:
            self._adopt()
        if old is None or (old.vtep, old.index, old.vxlan_port) != (state.vtep, state.index, state.vxlan_port):
            self._prepare_host(state)
        elif old.networks != state.networks:
            self._host_sysctls(state)
        self._state = state
        resized = self.underlay.resize(state)
        # Before anything is made: a new network may have the VNI or the subnet of one that goes.
        self._remove_unused()
        self._sandboxes.apply(state, self.underlay.mtu_bytes)
        self._publish(state)
        if resized or old is None or _links_differ(old, state):
            self._replan_tasks()
        for task_id, attached in self._tasks.items():
            self._guarded(f"task {task_id}", self._give, task_id, attached)
        self._spares.refill()
        self._complete = True

    def learn_paths(self, paths: Mapping[str, int]) -> None:
        """Peer's data path address -> MTU of the path to it, in bytes, of those that answered."""
        state = self._state
        if state is None:
            return
        self.underlay.learn(paths, state)
        if self.underlay.resize(state):
            self._sandboxes.apply(state, self.underlay.mtu_bytes)
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
        self.underlay.link_mtu_bytes = mtu
        self._host_sysctls(state)
        self._publish(state)
        self._open_firewall()

    @staticmethod
    def _host_sysctls(state: HostState) -> None:
        set_host_sysctls(ipv6=any(network.subnet6 for network in state.networks))

    def _open_firewall(self) -> None:
        for command in self._firewall.let_through():
            log.info("firewall_opened", command=f"iptables {command}")

    def _adopt(self) -> None:
        found = self._sandboxes.adopt()
        for task_id in self._kernel.task_ids() - self._tasks.keys():
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
        interfaces = [interface for attached in self._tasks.values() for interface in attached.interfaces]
        addresses = (item for interface in interfaces for item in (interface.address, interface.address6) if item)
        self._services.publish(state, (address.partition("/")[0] for address in addresses))

    def _give(self, task_id: str, attached: Attached) -> None:
        if not self._services.give(attached.balance, attached.network_ids()):
            with self._kernel.thread.inside(self._kernel.task_path(task_id)):
                self._services.adopt(attached.balance, self._layouts(attached), attached.network_ids())

    def _layouts(self, attached: Attached) -> tuple[Layout, ...]:
        return self._services.layouts(attached.task, attached.interfaces)

    def _new_balance(self, task_id: str) -> TaskBalance:
        with self._kernel.thread.inside(self._kernel.task_path(task_id)):
            return self._services.open()

    # --- tasks ---------------------------------------------------------------------------------------

    def _plan(self, task_id: str, interfaces: tuple[Interface, ...]) -> Task:
        state = self._state
        if state is None:
            raise NetworkError(f"task {task_id}: this host has not been told of any network yet; apply a state first")
        for interface in interfaces:
            fault = self._sandboxes.faults.get(interface.network_id)
            if fault is not None:
                raise NetworkError(f"task {task_id} cannot be attached: {fault}")
        return plan_task(task_id, interfaces, self._networks(), state.index, self.underlay.mtu_bytes)

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
        spare = self._spares.take(kernel.thread)
        attached = self._tasks[task_id] = Attached(interfaces, task, spare.balance)
        try:
            kernel.claim(task, spare, sysctls)
            with kernel.thread.inside(kernel.task_path(task_id)):
                self._services.load(attached.balance, self._layouts(attached))
            self._give(task_id, attached)
        except FAILURES:
            self._discard(task_id)
            raise
        finally:
            spare.release()

    def _attach_again(self, task: Task, interfaces: tuple[Interface, ...]) -> None:
        known = self._tasks.get(task.task_id)
        if known is None:
            known = Attached(interfaces, None, self._new_balance(task.task_id))
            self._tasks[task.task_id] = known
        wanted = {interface.network_id for interface in interfaces}
        for network_id in set(known.network_ids()) - wanted:
            netlink = self._kernel.open_network(self._kernel.network_path(network_id))
            if netlink is not None:
                Port(self._kernel.network_path(network_id), netlink, port_name(task.task_id)).delete()
        if known.task != task or known.interfaces != interfaces:
            self._repair_links(task)
        known.task, known.interfaces = task, interfaces
        self._give(task.task_id, known)

    def begin_detach(self, task_id: str) -> Detached:
        """Forget the task; what is left of it is removed on other threads, then `end_detach` is called. Until its
        namespace is removed a crash leaves the task in `attached`, to be detached again."""
        known = self._tasks.pop(task_id, None)
        names = {self._kernel.network_path(item).name for item in known.network_ids()} if known else set()
        found = [(path, port_name(task_id)) for path in self._sandboxes.paths() if not names or path.name in names]
        links = known.task.links if known and known.task else ()
        found += [(self._kernel.task_path(task_id), link.name) for link in links if link.parent]
        opened = [(path, self._kernel.open_network(path), name) for path, name in found]
        ports = tuple(Port(path, netlink, name) for path, netlink, name in opened if netlink is not None)
        return Detached(ports, self._kernel.task_path(task_id), known.balance if known else None)

    def end_detach(self) -> None:
        self._remove_unused()

    def _discard(self, task_id: str) -> None:
        gone = self.begin_detach(task_id)
        for port in gone.ports:
            port.delete()
        gone.finish()

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
        self.underlay.link_mtu_bytes = host.mtu_of(state.vtep) or self.underlay.link_mtu_bytes
        self.underlay.resize(state)
        self._guarded("host", self._audit_host, state)
        for network_id in self._sandboxes.standing() & self._sandboxes.networks.keys():
            self._guarded(f"network {network_id}", self._sandboxes.audit, network_id, host)
        self._sandboxes.encryption.forget()
        self._sandboxes.apply(state, self.underlay.mtu_bytes)
        for task_id, attached in list(self._tasks.items()):
            self._guarded(f"task {task_id}", self._audit_task, task_id, attached)
        self._remove_unused()

    def _audit_host(self, state: HostState) -> None:
        self._host_sysctls(state)
        if self._services.audit_host():
            log.warning("overlay_repaired", object="host's balancing")
        self._open_firewall()

    def inspect(self) -> Inspection:
        return inspect(self._kernel, self._tag, self._state, self._sandboxes.pictures(), self._tasks)

    def _works(self, network_id: str) -> bool:
        return network_id in self._networks() and network_id not in self._sandboxes.faults

    def _audit_task(self, task_id: str, attached: Attached) -> None:
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
        with self._kernel.thread.inside(path):
            if self._services.audit(attached.balance, self._layouts(attached), attached.network_ids()):
                log.warning("overlay_repaired", object=f"task {task_id}", part="balancing")

    def close(self) -> None:
        """Close what is kept open; the kernel's state stays."""
        for attached in self._tasks.values():
            attached.balance.close()
        self._spares.close()
        self._kernel.close()
        self._services.close()

    # --- teardown ------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Leave nothing. Works in a new process too: everything is found by its name."""
        for task_id in self._kernel.task_ids():
            self._discard(task_id)
        for path in self._sandboxes.paths():
            self._kernel.remove_sandbox(path.name.removeprefix("net-"))
        self._sandboxes.encryption.teardown()
        legs = [delete_link(name) for name in read_host().links if is_leg(self._tag, name)]
        with Netlink(NETLINK_ROUTE) as netlink:
            netlink.batch(acknowledged(legs))
        self._firewall.take_back()
        self._spares.clear()
        self._services.remove()
        directory = self._kernel.directory
        if directory.is_dir():
            for path in directory.glob("task-*"):
                path.unlink()
            directory.rmdir()
        self._state, self._complete = None, False
        self._sandboxes = Sandboxes(self._kernel, self._tag, self._sandboxes.encryption)
        self._tasks = {}
