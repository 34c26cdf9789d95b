"""The overlay networks of this host: each one's namespace, VXLAN device, leg and entries. Namespace thread only."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import structlog

from overlay import namespaces
from overlay.act import NamespaceKernel
from overlay.addressing import leg_name, overlaps
from overlay.diff import empty_sandbox, sandbox_operations, settled
from overlay.encryption import HostEncryption
from overlay.hostbridge import bridge_network, choose_subnet
from overlay.hostkernel import HostKernel, read_host
from overlay.interface import HostState, Interface, NetworkError, OverlayNetwork, RemoteEndpoint
from overlay.plan import Sandbox, endpoints_by_network, plan_sandbox, read_port_alias

log = structlog.get_logger("overlay")

UNKNOWN_VNI = -1
FAILURES = (OSError, NetworkError)
"""What the kernel or the plan may refuse for one object."""


class Sandboxes:
    def __init__(self, kernel: NamespaceKernel, tag: str, encryption: HostEncryption) -> None:
        self.kernel = kernel
        self.tag = tag
        self.encryption = encryption
        self.networks: dict[str, OverlayNetwork] = {}
        """Wanted now, this host's bridge included."""
        self.faults: dict[str, str] = {}
        """Network -> why it does not work here."""
        self._applied: dict[str, Sandbox] = {}
        self._bridges: dict[str, OverlayNetwork] = {}
        self._inputs: dict[str, tuple[object, ...]] = {}
        """What each applied picture was computed from: as long as it is equal, nothing is to be done."""

    def standing(self) -> frozenset[str]:
        return frozenset(self._applied)

    def pictures(self) -> dict[str, Sandbox]:
        """What was applied last, by network."""
        return dict(self._applied)

    def adopt(self) -> dict[str, dict[str, Interface]]:
        """Take over what an earlier agent left; returns the interfaces of each task that is wired up, by link."""
        host = read_host()
        found: dict[str, dict[str, Interface]] = {}
        for path in self.paths():
            network_id = self._identity(path)
            for alias in self._read(network_id, host).values():
                known = read_port_alias(alias)
                if known is not None:
                    task_id, link, interface = known
                    found.setdefault(task_id, {})[link] = interface
        return found

    def paths(self) -> list[Path]:
        directory = self.kernel.directory
        return sorted(directory.glob("net-*")) if directory.is_dir() else []

    def _identity(self, path: Path) -> str:
        """The whole network ID, from the bridge's alias; else the part of it that is the file's name."""
        short = path.name.removeprefix("net-")
        return (self.kernel.network_identity(path) if namespaces.exists(path) else "") or short

    def _read(self, network_id: str, host: HostKernel) -> dict[str, str]:
        """Read a sandbox into `_applied`; returns its ports' aliases. A namespace that is gone is as never made."""
        self._applied.pop(network_id, None)
        self._inputs.pop(network_id, None)
        path = self.kernel.network_path(network_id)
        if not namespaces.exists(path):
            path.unlink(missing_ok=True)
            return {}
        found = self.kernel.read_sandbox(network_id)
        vxlan, network = found.picture.vxlan, self.networks.get(network_id)
        vni = vxlan.vni if vxlan else network.vni if network else UNKNOWN_VNI
        leg = host.legs(self.tag).get(leg_name(self.tag, vni)) if vni != UNKNOWN_VNI else None
        encrypted = isinstance(network, OverlayNetwork) and network.encrypted and self.kernel.marks(network_id)
        self._applied[network_id] = replace(found.picture, leg=leg, encrypted=encrypted)
        return found.aliases

    def want(self, state: HostState) -> None:
        """Take note of what is wanted. A failure is kept as the network's fault."""
        self.networks = {network.network_id: network for network in state.networks}
        wanted = state.network_ids()
        self.faults = {key: fault for key, fault in self.faults.items() if key in wanted}
        for bridge in state.bridges:
            try:
                self.networks[bridge.network_id] = self._bridge(bridge.network_id, state)
            except FAILURES as error:
                self._note_fault(bridge.network_id, error)

    def _bridge(self, network_id: str, state: HostState) -> OverlayNetwork:
        """The subnet that its leg has, else one that is free. Raises FAILURES."""
        if network_id not in self._bridges:
            host = read_host()
            leg = host.legs(self.tag).get(leg_name(self.tag, 0))
            standing = [f"{address}/{prefix}" for address, prefix in leg.addresses if prefix < 32] if leg else []
            if standing:
                subnet = str(ipaddress.ip_interface(standing[0]).network)
            else:
                overlays = [(network.subnet, f"network {network.network_id}") for network in state.networks]
                subnet = choose_subnet(network_id, host.foreign_prefixes(self.tag) + overlays)
            self._bridges[network_id] = bridge_network(network_id, subnet)
        return self._bridges[network_id]

    def is_bridge(self, network_id: str) -> bool:
        return network_id in self._bridges

    def _note_fault(self, network_id: str, error: Exception) -> None:
        if self.faults.get(network_id) != str(error):
            log.warning("network_failed", network=network_id, error=str(error))
        self.faults[network_id] = str(error)

    def apply(self, state: HostState, underlay_mtu_bytes: int) -> None:
        """Make those wanted; a failure is kept as the network's fault and tried again at the next call."""
        self.want(state)
        # First: an encrypted network's packets find everything in place.
        standing = frozenset(sandbox.vxlan.vni for sandbox in self._applied.values() if sandbox.vxlan)
        self.encryption.apply(state, standing)
        endpoints = endpoints_by_network(state.endpoints)
        for network_id, network in self.networks.items():
            mine = endpoints.get(network_id, ())
            fault = self.encryption.fault if network.encrypted else ""
            inputs = (network, mine, state.peers, state.vtep, state.index, state.vxlan_port, underlay_mtu_bytes, fault)
            if self._inputs.get(network_id) == inputs and network_id in self._applied:
                continue
            try:
                if fault:
                    raise NetworkError(f"network {network_id} is encrypted, and {fault}")
                self._make(network, state, mine, underlay_mtu_bytes)
            except FAILURES as error:
                self._applied.pop(network_id, None)
                self._note_fault(network_id, error)
            else:
                self.faults.pop(network_id, None)
                self._inputs[network_id] = inputs

    def _make(
        self, network: OverlayNetwork, state: HostState, endpoints: Iterable[RemoteEndpoint], underlay_mtu_bytes: int
    ) -> None:
        network_id = network.network_id
        wanted = plan_sandbox(network, state, endpoints, self.tag, underlay_mtu_bytes)
        ports: Iterable[str] = ()
        if network_id not in self._applied or self._applied[network_id].mtu_bytes != wanted.mtu_bytes:
            ports = self._read(network_id, read_host())
        if network_id not in self._applied:
            self._refuse_overlap(network)
            self.kernel.make_namespace(network_id)
            self._applied[network_id] = empty_sandbox(network_id)
        operations = sandbox_operations(wanted, self._applied[network_id], ports)
        if operations:
            self.kernel.do_sandbox(network_id, operations)
        self._applied[network_id] = settled(wanted)

    def _refuse_overlap(self, network: OverlayNetwork) -> None:
        if network.internal:
            return
        foreign = read_host().foreign_prefixes(self.tag)
        foreign += [
            (item.subnet, "the bridge of this host's own") for item in self._bridges.values() if item != network
        ]
        for subnet in filter(None, (network.subnet, network.subnet6)):
            clash = overlaps(subnet, foreign)
            if clash is not None:
                raise NetworkError(
                    f"network {network.network_id}: its subnet {subnet} overlaps {clash[1]} ({clash[0]}) on this"
                    " host, which would become unreachable; make the network anew with another --subnet, or keep its"
                    " tasks off this node with a constraint"
                )

    def audit(self, network_id: str, host: HostKernel) -> None:
        """Read one network from the kernel and repair it, with a line in the log. Raises FAILURES."""
        wanted = self._applied[network_id]
        aliases = self._read(network_id, host)
        actual = self._applied.pop(network_id, None)
        if actual is None:
            log.warning("overlay_repaired", object=f"network {network_id}", missing="namespace")
            return  # the next `apply` makes it anew
        operations = sandbox_operations(wanted, actual, aliases)
        if operations:
            names = sorted({type(operation).__name__ for operation in operations})
            log.warning("overlay_repaired", object=f"network {network_id}", operations=names)
            self.kernel.do_sandbox(network_id, operations)
        self._applied[network_id] = wanted

    def remove(self, network_id: str) -> None:
        self.kernel.remove_sandbox(network_id)
        self.forget(network_id)

    def forget(self, network_id: str) -> None:
        self._bridges.pop(network_id, None)
        self._applied.pop(network_id, None)
        self._inputs.pop(network_id, None)
