"""What the drivers of networks mean for a task of this host (pure)."""

from __future__ import annotations

from collections.abc import Iterable

from overlay.interface import Attachment, BridgeNetwork, Interface, MacvlanNetwork
from proto.objects_pb2 import Network, Task

OVERLAY, MACVLAN, BRIDGE, HOST, NONE = "overlay", "macvlan", "bridge", "host", "none"
MTU_OPTIONS = ("com.docker.network.driver.mtu", "mtu")
PARENT_OPTION, MODE_OPTION = "parent", "macvlan_mode"


def driver(network: Network) -> str:
    return network.spec.driver or OVERLAY


def mtu_option(network: Network) -> int | None:
    """Bytes."""
    given = (network.spec.options.get(option, "") for option in MTU_OPTIONS)
    return next((int(mtu) for mtu in given if mtu.isdigit()), None)


def bridges(networks: Iterable[Network], tasks: Iterable[Task]) -> tuple[BridgeNetwork, ...]:
    """Those that a task of this host is on: every node knows of the bridge, few need one."""
    used = {attachment.network_id for task in tasks for attachment in task.networks}
    return tuple(BridgeNetwork(network.id) for network in networks if driver(network) == BRIDGE and network.id in used)


def macvlans(networks: Iterable[Network]) -> tuple[MacvlanNetwork, ...]:
    return tuple(
        MacvlanNetwork(
            network_id=network.id,
            parent=network.spec.options.get(PARENT_OPTION, ""),
            subnet=network.ipam.subnet,
            gateway=network.ipam.gateway,
            internal=network.spec.internal,
            mode=network.spec.options.get(MODE_OPTION, "") or "bridge",
            subnet6=network.ipam6.subnet,
            gateway6=network.ipam6.gateway,
            mtu_bytes=mtu_option(network),
        )
        for network in networks
        if driver(network) == MACVLAN and network.ipam.subnet
    )


def attachment(task: Task, networks: Iterable[Network]) -> Attachment | None:
    """eth0, eth1, ... in the order of the service's networks; None: the task lives in the host's own namespace.
    `networks`: those of this host, all of the task's among them."""
    drivers = {network.id: driver(network) for network in networks}
    if any(drivers.get(net.network_id) == HOST for net in task.networks):
        return None
    return Attachment(
        task_id=task.id,
        interfaces=tuple(
            Interface(net.network_id, net.address, net.address6)
            for net in task.networks
            if drivers.get(net.network_id) != NONE
        ),
        sysctls={k: v for k, v in task.spec.container.sysctls.items() if k.startswith("net.")},
    )
