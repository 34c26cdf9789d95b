"""How the kernel differs from the picture applied last. Reads only: repairing is the audit's business.

On the namespace thread, like all that changes these things, so nothing is seen half done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from overlay import namespaces, nfnl
from overlay.act import NamespaceKernel
from overlay.addressing import host_table
from overlay.hostkernel import read_host
from overlay.interface import HostState, Inspection, NetworkDrift
from overlay.netlink import NETLINK_NETFILTER, Netlink
from overlay.plan import Leg, Sandbox, Vxlan, underlay_size
from overlay.ruleset import TASK_TABLE

HOST = "host"
STRICT = 1
"""Of rp_filter: a packet is dropped unless its answer would leave by the link it came in by."""


def inspect(
    kernel: NamespaceKernel, tag: str, state: HostState | None, wanted: Mapping[str, Sandbox], task_ids: Iterable[str]
) -> Inspection:
    """`wanted`: by network."""
    vtep = state.vtep if state is not None else ""
    host = read_host()
    legs = host.legs(tag)
    forwards = namespaces.read_sysctl("net.ipv4.ip_forward") == "1"
    strict = tuple(name for name in sorted(legs) if _is_strict(name))
    # Of a leg's own settings these two are told as such, not once more for each network.
    known = {name: replace(leg, routing=True) if not forwards or name in strict else leg for name, leg in legs.items()}
    return Inspection(
        networks=tuple(_network(kernel, network_id, picture, known) for network_id, picture in wanted.items()),
        forwards=forwards,
        strict_links=strict,
        leg=min(legs, default=""),
        tables_missing=tuple(_tables_missing(kernel, tag, task_ids)),
        underlay_link=host.link_of(vtep),
        underlay_mtu_bytes=host.mtu_of(vtep) or 0,
    )


def _is_strict(link: str) -> bool:
    """The greater of the two settings counts (Documentation/networking/ip-sysctl)."""
    values = (namespaces.read_sysctl(f"net.ipv4.conf.{name}.rp_filter") for name in ("all", link))
    return max(int(value or 0) for value in values) == STRICT


def _tables_missing(kernel: NamespaceKernel, tag: str, task_ids: Iterable[str]) -> Iterable[str]:
    if not _has_table(host_table(tag)):
        yield HOST
    for task_id in task_ids:
        path = kernel.task_path(task_id)
        if namespaces.exists(path):
            with kernel.thread.inside(path):
                if not _has_table(TASK_TABLE):
                    yield task_id


def _has_table(name: str) -> bool:
    with Netlink(NETLINK_NETFILTER) as netlink:
        return any(table == name for table, _ in nfnl.chains(netlink))


def _network(kernel: NamespaceKernel, network_id: str, wanted: Sandbox, legs: Mapping[str, Leg]) -> NetworkDrift:
    mtu_bytes = wanted.vxlan.mtu_bytes if wanted.vxlan else 0
    sizes = network_id, mtu_bytes, underlay_size(wanted)
    if not namespaces.exists(kernel.network_path(network_id)):
        return NetworkDrift(*sizes, missing=("its namespace",))
    actual = kernel.read_sandbox(network_id).picture
    missing, foreign = compared(wanted, actual, legs.get(wanted.leg.name) if wanted.leg else None)
    return NetworkDrift(*sizes, missing, foreign)


def compared(wanted: Sandbox, actual: Sandbox, leg: Leg | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(missing, foreign) in words. `leg`: the one that stands. Pure."""
    missing: list[str] = []
    if not actual.bridge:
        missing.append("the bridge")
    if actual.vxlan != wanted.vxlan:
        missing.append(_vxlan(wanted.vxlan, actual.vxlan))
    if wanted.leg is not None and leg != wanted.leg:
        missing.append(f"the leg {wanted.leg.name}, up, with its addresses and settings")
    missing += [f"{name} in the bridge, with an MTU of {mtu}" for name, mtu in sorted(wanted.ports - actual.ports)]
    missing += _forwarding(wanted.forwarding - actual.forwarding)
    missing += _neighbours(wanted.neighbours - actual.neighbours)
    foreign = [
        # Without VTEP: the bridge's half of an entry, which is missing or not with the other half.
        *_forwarding({entry for entry in actual.forwarding - wanted.forwarding if entry[1]}),
        *_neighbours(actual.neighbours - wanted.neighbours),
    ]
    return tuple(missing), tuple(foreign)


def _vxlan(wanted: Vxlan | None, actual: Vxlan | None) -> str:
    return "the VXLAN device" if actual is None else f"the VXLAN device as {wanted} (it is {actual})"


def _forwarding(entries: Iterable[tuple[str, str]]) -> list[str]:
    return [f"forwarding entry {mac} to {vtep}" for mac, vtep in sorted(entries)]


def _neighbours(entries: Iterable[tuple[str, str]]) -> list[str]:
    return [f"neighbour {address} at {mac}" for address, mac in sorted(entries)]
