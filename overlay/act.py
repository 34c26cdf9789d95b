"""The kernel's side of networks and tasks: reads what stands, carries out operations of `overlay/diff.py`.

All of it runs on the namespace thread, synchronously.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from overlay import answers, namespaces, nfnl, nft, rtnl
from overlay.addressing import (
    network_namespace,
    task_namespace,
)
from overlay.diff import (
    BRIDGE_NAME,
    LEG_PORT_NAME,
    VXLAN_NAME,
    DeleteLeg,
    LeadAnswers,
    MakeBridge,
    MakeLeg,
    MakeLink,
    MakeVxlan,
    Mark,
    SandboxOperation,
    SetEntries,
    SetLeg,
    SetLink,
    SetPort,
    SetVxlan,
    TaskKernel,
    TaskOperation,
)
from overlay.esp import MARKING, MARKING_RULES, MARKING_TABLE
from overlay.hostkernel import connected
from overlay.interface import MACVLAN_MODES, Interface, NetworkError
from overlay.namespaces import NamespaceThread
from overlay.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Message, Netlink, NetlinkError, acknowledged
from overlay.plan import Leg, Sandbox, Task, TaskLink, Vxlan, port_alias, read_port_alias
from overlay.spares import Spare
from overlay.sysctls import IPV6_SYSCTLS, set_all_optional, set_leg_sysctls, set_optional


@dataclass(frozen=True, slots=True)
class SandboxKernel:
    picture: Sandbox
    aliases: dict[str, str]
    """Port -> alias, of the tasks' ports that exist."""


class NamespaceKernel:
    """Sandboxes and task namespaces under `directory`."""

    def __init__(self, thread: NamespaceThread, directory: Path) -> None:
        self.thread = thread
        self.directory = directory
        self._sockets: dict[str, Netlink] = {}
        """In the namespaces of networks; kept open, since each task that comes and each audit needs one."""
        self._bridges: dict[str, int] = {}
        """Network -> index of its bridge, as long as that is known."""

    def network_path(self, network_id: str) -> Path:
        return self.directory / network_namespace(network_id)

    def task_path(self, task_id: str) -> Path:
        return self.directory / task_namespace(task_id)

    def task_ids(self) -> frozenset[str]:
        prefix = task_namespace("")
        found = self.directory.glob(f"{prefix}*") if self.directory.is_dir() else []
        return frozenset(path.name.removeprefix(prefix) for path in found if namespaces.exists(path))

    # --- networks ---

    def read_sandbox(self, network_id: str) -> SandboxKernel:
        """All of it but the leg, whose end is in the host's namespace."""
        netlink = self._socket(network_id)
        links = rtnl.links(netlink)
        known = rtnl.neighbours(netlink)
        entries = rtnl.forwardings(netlink)
        device, bridge = links.get(VXLAN_NAME), links.get(BRIDGE_NAME)
        index = device.index if device else 0
        bridged = {entry.mac for entry in entries if not entry.vtep} if bridge and bridge.up else set()
        info = device.vxlan if device and device.vxlan and device.vxlan.proxy else None
        master = bridge.index if bridge and bridge.up else -1  # one that is down is made anew
        picture = Sandbox(
            network_id=network_id,
            bridge=bridge is not None and bridge.up,
            vxlan=Vxlan(info.vni, info.port, info.local, device.mtu_bytes, device.ipv6) if device and info else None,
            leg=None,
            # Both tables must have it; an entry in one only is added again.
            forwarding=frozenset(
                (entry.mac, entry.vtep) for entry in entries if entry.link == index and entry.mac in bridged
            ),
            neighbours=frozenset((address, mac) for link, address, mac in known if link == index),
            ports=frozenset(
                (link.name, link.mtu_bytes) for link in links.values() if link.master == master and link.up
            ),
        )
        ours = {LEG_PORT_NAME, VXLAN_NAME, BRIDGE_NAME}
        ports = [link for link in links.values() if link.kind == "veth" and link.name not in ours]
        return SandboxKernel(picture, {link.name: link.alias for link in ports})

    def marks(self, network_id: str) -> bool:
        """Whether packets of an encrypted network are marked."""
        with self.thread.inside(self.network_path(network_id)), Netlink(NETLINK_NETFILTER) as netlink:
            return nfnl.rule_counts(netlink, MARKING_TABLE, nfnl.BRIDGE) == MARKING_RULES

    def network_identity(self, path: Path) -> str:
        """The network ID that was written on the bridge; "" if there is none."""
        with self.thread.inside(path), Netlink(NETLINK_ROUTE) as netlink:
            bridge = rtnl.links(netlink).get(BRIDGE_NAME)
        return bridge.alias if bridge else ""

    def make_namespace(self, network_id: str) -> None:
        self._forget_lost(network_id)
        path = self.network_path(network_id)
        self.thread.create(path)
        with self.thread.inside(path), Netlink(NETLINK_ROUTE) as netlink:
            set_all_optional(IPV6_SYSCTLS)
            # br_netfilter would send bridged frames through IP hooks for nothing.
            for family in ("iptables", "ip6tables", "arptables"):
                set_optional(f"net.bridge.bridge-nf-call-{family}", "0")
            netlink.batch(acknowledged([rtnl.set_link("lo")]))

    def _forget_lost(self, network_id: str) -> None:
        """A namespace that somebody unmounted: with its links go the tasks' ends, which are then made anew."""
        known = self._sockets.get(network_id)
        if known is not None:
            known.batch(acknowledged([rtnl.delete_group()]))
            self._leave(network_id)

    def do_sandbox(self, network_id: str, operations: Iterable[SandboxOperation]) -> None:
        """Raises NetlinkError."""
        path = self.network_path(network_id)
        with Netlink(NETLINK_ROUTE) as outer, self.thread.inside(path) as descriptor, Netlink(NETLINK_ROUTE) as inner:
            for operation in operations:
                match operation:
                    case MakeBridge():
                        self._bridges.pop(network_id, None)
                        alias = rtnl.set_link(BRIDGE_NAME, alias=network_id)
                        inner.batch(acknowledged([rtnl.delete_link(BRIDGE_NAME), rtnl.new_bridge(BRIDGE_NAME), alias]))
                    case Mark():
                        nft.run(MARKING)
                    case MakeVxlan():
                        self._make_vxlan(outer, inner, descriptor, operation)
                    case SetVxlan(vxlan):
                        self._set_vxlan(inner, vxlan)
                    case MakeLeg(leg):
                        near = rtnl.VethEnd(leg.name, leg.mac)
                        far = rtnl.VethEnd(LEG_PORT_NAME, in_group=True)
                        outer.batch(
                            acknowledged(
                                [rtnl.delete_link(leg.name), rtnl.new_veth(near, far, leg.mtu_bytes, descriptor)]
                            )
                        )
                        self._enslave(inner, LEG_PORT_NAME, leg.mtu_bytes)
                        self._set_leg(outer, leg, frozenset())
                    case SetLeg(leg, stale):
                        self._set_leg(outer, leg, stale)
                    case DeleteLeg(name):
                        outer.batch(acknowledged([rtnl.delete_link(name)]))
                    case SetPort(name, mtu_bytes):
                        self._enslave(inner, name, mtu_bytes)
                    case SetEntries():
                        self._set_entries(inner, operation)

    @staticmethod
    def _enslave(inner: Netlink, name: str, mtu_bytes: int) -> None:
        bridge = rtnl.link_index(inner, BRIDGE_NAME)
        inner.batch(acknowledged([rtnl.set_link(name, master=bridge, mtu_bytes=mtu_bytes)]))

    def _make_vxlan(self, outer: Netlink, inner: Netlink, descriptor: int, operation: MakeVxlan) -> None:
        vxlan = operation.vxlan
        if operation.replaces:
            inner.batch(acknowledged([rtnl.delete_link(VXLAN_NAME)]))
        made = rtnl.new_vxlan(
            VXLAN_NAME, vxlan.vni, vxlan.port, vxlan.local, mtu_bytes=vxlan.mtu_bytes, namespace_fd=descriptor
        )
        outer.batch(acknowledged([made]))
        self._set_vxlan(inner, vxlan)

    def _set_vxlan(self, inner: Netlink, vxlan: Vxlan) -> None:
        # The kernel refuses IPv6 neighbours to a device without IPv6.
        set_optional(f"net.ipv6.conf.{VXLAN_NAME}.disable_ipv6", "0" if vxlan.ipv6 else "1")
        self._enslave(inner, VXLAN_NAME, vxlan.mtu_bytes)

    def _set_leg(self, outer: Netlink, leg: Leg, stale: frozenset[tuple[str, int]]) -> None:
        with self.thread.home():
            set_leg_sysctls(leg)
        index = rtnl.link_index(outer, leg.name)
        outer.batch(
            acknowledged(
                [
                    *(rtnl.delete_address(index, address, prefix) for address, prefix in sorted(stale)),
                    rtnl.set_link(index=index, mac=leg.mac, mtu_bytes=leg.mtu_bytes),
                    *(rtnl.add_address(index, address, prefix) for address, prefix in sorted(leg.addresses)),
                    *([rtnl.take_loopback(index)] if leg.ipv6 else []),
                ]
            )
        )

    @staticmethod
    def _set_entries(inner: Netlink, entries: SetEntries) -> None:
        index = rtnl.link_index(inner, VXLAN_NAME)
        messages: list[Message] = []
        for mac in entries.unforward:
            messages += rtnl.delete_forwarding(index, mac)
        messages += [rtnl.delete_neighbour(index, address) for address in entries.forget]
        messages += [rtnl.add_forwarding(index, mac, vtep) for mac, vtep in entries.forward]
        messages += [rtnl.add_neighbour(index, address, mac) for address, mac in entries.know]
        inner.batch(acknowledged(messages))

    def remove_sandbox(self, network_id: str) -> None:
        """The links explicitly: the kernel destroys namespaces late, and the VNI may be wanted again now. With
        the leg's end here goes its end in the host's namespace."""
        self._leave(network_id)
        path = self.network_path(network_id)
        if namespaces.exists(path):
            with self.thread.inside(path), Netlink(NETLINK_ROUTE) as inner:
                inner.batch(acknowledged([rtnl.delete_group()]))
        namespaces.remove(path)

    # --- tasks ---

    def claim(self, task: Task, spare: Spare, sysctls: Mapping[str, str]) -> None:
        """Make a spare namespace the task's, and wire it. Raises OSError, NetworkError."""
        path = self.task_path(task.task_id)
        namespaces.pin(spare.descriptor, path)
        if sysctls:
            with self.thread.inside(path):
                for name, value in sysctls.items():
                    namespaces.sysctl(name, value)
        for link in task.links:
            self._make_link(task, link, spare.descriptor, spare.route)
        if any(link.ipv6 for link in task.links):
            with self.thread.inside(path):
                _turn_on_ipv6(task.links)
        _set_links(spare.route, (SetLink(link, frozenset()) for link in task.links))
        _lead_answers(spare.route, task.ways_back)

    def read_task(self, task_id: str) -> TaskKernel:
        with self.thread.inside(self.task_path(task_id)), Netlink(NETLINK_ROUTE) as netlink:
            links = rtnl.links(netlink)
            addresses, routes = rtnl.addresses(netlink), rtnl.routes(netlink)
            known = rtnl.neighbours(netlink)
            ways_back = answers.standing(netlink)
        names = {link.index: link.name for link in links.values()}
        return TaskKernel(
            links=frozenset((link.name, link.mac, link.mtu_bytes) for link in links.values() if link.up),
            addresses=frozenset(
                (names.get(index, ""), address, prefix) for index, address, prefix in connected(addresses, routes)
            ),
            routes=frozenset(
                (names.get(route.link, ""), route.destination, route.prefix, route.gateway) for route in routes
            ),
            neighbours=frozenset((names.get(index, ""), address, mac) for index, address, mac in known),
            present=frozenset((link.name, link.mac) for link in links.values()),
            ipv6=frozenset(link.name for link in links.values() if link.ipv6),
            ways_back=frozenset((names.get(index, ""), gateway) for index, gateway in ways_back),
        )

    def do_task(self, task: Task, operations: Iterable[TaskOperation]) -> None:
        """Raises OSError, NetworkError."""
        settings: list[SetLink] = []
        ways: tuple[tuple[str, str], ...] = ()
        with self.thread.inside(self.task_path(task.task_id)) as descriptor, Netlink(NETLINK_ROUTE) as inner:
            for operation in operations:
                match operation:
                    case MakeLink(link, replaces):
                        if replaces:
                            inner.batch(acknowledged([rtnl.delete_link(link.name)]))
                        self._make_link(task, link, descriptor, inner)
                    case SetLink():
                        settings.append(operation)
                    case LeadAnswers():
                        ways = operation.ways
            # A link has no IPv6 at all while its MTU is too small for it.
            sized = [rtnl.set_link(setting.link.name, mtu_bytes=setting.link.mtu_bytes) for setting in settings]
            inner.batch(acknowledged([rtnl.set_link("lo"), *sized]))
            _turn_on_ipv6(setting.link for setting in settings)
            _set_links(inner, settings)
            _lead_answers(inner, ways)

    def _make_link(self, task: Task, link: TaskLink, descriptor: int, inner: Netlink) -> None:
        if link.parent:
            self._make_macvlan(task, link, descriptor, inner)
            return
        try:
            self._make_veth(task, link, descriptor)
        except NetlinkError:
            # A port of that name may stand from before a crash, or the bridge be another than it was.
            self._leave(link.network_id)
            self._socket(link.network_id).batch(acknowledged([rtnl.delete_link(link.port)]))
            self._make_veth(task, link, descriptor)

    def _make_macvlan(self, task: Task, link: TaskLink, descriptor: int, inner: Netlink) -> None:
        with self.thread.home(), Netlink(NETLINK_ROUTE) as outer:
            try:
                parent = rtnl.link_index(outer, link.parent)
            except OSError as error:
                raise NetworkError(
                    f"task {task.task_id}: this host has no link {link.parent}, the parent of macvlan network"
                    f" {link.network_id}; make that link, keep the service's tasks on hosts that have it with a"
                    " constraint, or make the network anew with another parent"
                ) from error
            made = rtnl.new_macvlan(
                link.name,
                parent,
                MACVLAN_MODES[link.mode],
                link.mac,
                mtu_bytes=link.mtu_bytes,
                namespace_fd=descriptor,
            )
            outer.batch(acknowledged([made]))
        inner.batch(acknowledged([rtnl.set_link(link.name, alias=port_alias(task.task_id, link))]))

    def read_macvlans(self, task_id: str) -> dict[str, Interface]:
        """Link name -> interface, of those in its namespace that are no veth: their alias is on themselves."""
        with self.thread.inside(self.task_path(task_id)), Netlink(NETLINK_ROUTE) as netlink:
            aliases = [link.alias for link in rtnl.links(netlink).values() if link.kind == "macvlan"]
        known = [found for alias in aliases if (found := read_port_alias(alias)) is not None]
        return {name: interface for _, name, interface in known}

    def _make_veth(self, task: Task, link: TaskLink, descriptor: int) -> None:
        near = rtnl.VethEnd(link.port, in_group=True)
        far = rtnl.VethEnd(link.name, link.mac)
        made = rtnl.new_veth(near, far, link.mtu_bytes, descriptor, self._bridge(link.network_id))
        alias = rtnl.set_link(link.port, alias=port_alias(task.task_id, link))
        self._socket(link.network_id).batch(acknowledged([made, alias]))

    def _socket(self, network_id: str) -> Netlink:
        if network_id not in self._sockets:
            with self.thread.home(), self.thread.inside(self.network_path(network_id)):
                self._sockets[network_id] = Netlink(NETLINK_ROUTE)
        return self._sockets[network_id]

    def _bridge(self, network_id: str) -> int:
        if network_id not in self._bridges:
            self._bridges[network_id] = rtnl.link_index(self._socket(network_id), BRIDGE_NAME)
        return self._bridges[network_id]

    def _leave(self, network_id: str) -> None:
        self._bridges.pop(network_id, None)
        known = self._sockets.pop(network_id, None)
        if known is not None:
            known.close()

    def close(self) -> None:
        for network_id in list(self._sockets):
            self._leave(network_id)

    def open_network(self, path: Path) -> Netlink | None:
        """A socket in a network's namespace, to be closed by the caller; None when there is no such namespace."""
        if not namespaces.exists(path):
            return None
        with self.thread.inside(path):
            return Netlink(NETLINK_ROUTE)


def _turn_on_ipv6(links: Iterable[TaskLink]) -> None:
    """In the task's namespace, where it is off by default."""
    for link in links:
        if link.ipv6:
            namespaces.sysctl(f"net.ipv6.conf.{link.name}.disable_ipv6", "0")


def _set_links(inner: Netlink, settings: Iterable[SetLink]) -> None:
    messages: list[Message] = []
    for setting in settings:
        index = rtnl.link_index(inner, setting.link.name)
        messages += [rtnl.delete_address(index, address, prefix) for address, prefix in sorted(setting.stale)]
        messages += _link_settings(setting.link, index)
    inner.batch(acknowledged(messages))


def _lead_answers(inner: Netlink, ways: Iterable[tuple[str, str]]) -> None:
    inner.batch(acknowledged(answers.lead((rtnl.link_index(inner, name), gateway) for name, gateway in ways)))


def _link_settings(link: TaskLink, index: int) -> list[Message]:
    return [
        rtnl.set_link(index=index, mtu_bytes=link.mtu_bytes),
        *(rtnl.add_address(index, address, prefix) for address, prefix in link.all_addresses),
        *(rtnl.add_neighbour(index, gateway, link.gateway_mac) for gateway in link.gateways),
        *(rtnl.add_route(index, destination, prefix, gateway or None) for destination, prefix, gateway in link.routes),
    ]
