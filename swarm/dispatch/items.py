"""From stored objects to the items that nodes are assigned, each with the scopes in which it is seen.

A scope is a group of nodes: "node/<id>" is one node, "net/<id>" all nodes that use a network, "all"
every node. An item is sent to the nodes that are in one of its scopes (`assignments.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from proto.dispatch_pb2 import Assignments, Item, NetworkEndpoint, NetworkPeer, NetworkService
from proto.objects_pb2 import (
    INGRESS,
    TASK_ASSIGNED,
    TASK_RUNNING,
    Network,
    Node,
    NodeStatus,
    Service,
    Task,
)
from swarm.store import drivers
from swarm.store.states import is_runnable
from swarm.store.store import Store

EVERYWHERE = "all"
WEIGHT_MAX = 100
"""As overlay/interface.py has it: more would be as many entries in each balancer."""
NODE_LABELS = "node.labels."


@dataclass(frozen=True, slots=True)
class Scoped:
    item: Item
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Told:
    change: bytes
    """Encoded once for all nodes that see the item."""
    scopes: frozenset[str]

    @property
    def item(self) -> Item:
        return Assignments.FromString(self.change).changes[0].item


def encoded(key: str, item: Item | None) -> bytes:
    """A message with this change alone: put one after the other, such are a message with all of them."""
    message = Assignments()
    change = message.changes.add(key=key)
    if item is not None:
        change.item.CopyFrom(item)
    return message.SerializeToString(deterministic=True)


def node_scope(node_id: str) -> str:
    return f"node/{node_id}"


def network_scope(network_id: str) -> str:
    return f"net/{network_id}"


def is_assigned(task: Task) -> bool:
    """The node has to know this task: also a finished one, whose container and logs are kept as long as it."""
    return bool(task.node_id) and task.status.state >= TASK_ASSIGNED


def is_live(task: Task) -> bool:
    """The task holds its addresses."""
    return bool(task.node_id) and TASK_ASSIGNED <= task.status.state <= TASK_RUNNING


def task_name(task: Task) -> str:
    """wpinst.3.<task id>, or wpinst.<node id>.<task id> for a global service."""
    return f"{task.service_annotations.name}.{task.slot or task.node_id}.{task.id}"


def networks_of(task: Task) -> frozenset[str]:
    """The networks that the task's node needs for it, besides those of its own, on which tasks have no address."""
    return frozenset(leg.network_id for leg in task.networks if leg.address) if is_live(task) else frozenset()


def task_items(task: Task, node_down: bool, unreached: str = "", weight: int = 1) -> dict[str, Scoped]:
    """The task itself for its node, and its endpoints for everyone on its networks. `unreached`: the ID of a network
    that the task is on for its way out only: no other node has anything to send to it there."""
    items: dict[str, Scoped] = {}
    if is_assigned(task):
        items[f"task/{task.id}"] = Scoped(Item(task=for_agent(task)), frozenset({node_scope(task.node_id)}))
    if is_live(task):
        serving = task.status.state == TASK_RUNNING and is_runnable(task) and not node_down
        for attachment in task.networks:
            if not attachment.address:
                continue  # a network of its node's own
            endpoint = NetworkEndpoint(
                task_id=task.id,
                network_id=attachment.network_id,
                address=attachment.address.partition("/")[0],
                address6=attachment.address6.partition("/")[0],
                weight=weight,
                node_id=task.node_id,
                service_id=task.service_id,
                task_name=task_name(task),
                slot=task.slot,
                aliases=attachment.aliases,
                serving=serving,
            )
            key = f"endpoint/{attachment.network_id}/{task.id}"
            alone = attachment.network_id == unreached
            scope = node_scope(task.node_id) if alone else network_scope(attachment.network_id)
            items[key] = Scoped(Item(endpoint=endpoint), frozenset({scope}))
    return items


def for_agent(task: Task) -> Task:
    """The task without what only echoes the agent's own reports: else each report would come back as a change.
    Of the status only the state is left: the final one of a finished task, ASSIGNED for a live one."""
    copy = Task()
    copy.CopyFrom(task)
    copy.ClearField("meta")
    copy.ClearField("status")
    copy.ClearField("running_at")
    copy.status.state = TASK_ASSIGNED if is_live(task) else task.status.state
    return copy


def network_item(network: Network) -> Scoped | None:
    """Nothing until it is allocated: the node could not build it. Every node knows those of its own."""
    if not drivers.is_ready(network):
        return None
    copy = Network()
    copy.CopyFrom(network)
    copy.ClearField("meta")
    scope = EVERYWHERE if drivers.is_local(network) else network_scope(network.id)
    return Scoped(Item(network=copy), frozenset({scope}))


def weight_of(service: Service | None, node: Node | None) -> int:
    """A task's share of its service's connections: the number that its node's label says, 1 where it says none."""
    label = service.endpoint.spec.weight_label.removeprefix(NODE_LABELS) if service is not None else ""
    text = node.spec.annotations.labels.get(label, "") if label and node is not None else ""
    return max(1, min(WEIGHT_MAX, int(text))) if text.isdecimal() else 1


def peer_item(node: Node, network_ids: Iterable[str], encrypts: bool = False) -> Scoped | None:
    """The node, for those with whom it shares one of these networks. `encrypts`: one of them is encrypted."""
    if not node.data_path_addr or not node.index:
        return None
    peer = NetworkPeer(
        node_id=node.id,
        vtep_addr=node.data_path_addr,
        index=node.index,
        down=is_down(node),
        masquerade=not node.description.answers_through_ingress,
    )
    if encrypts and node.description.encrypts:
        peer.encryption_epoch = node.description.encryption_epoch
    return Scoped(Item(peer=peer), frozenset(map(network_scope, network_ids)))


def is_down(node: Node | None) -> bool:
    return node is not None and node.status.state == NodeStatus.DOWN


def ingress_network_of(store: Store, service: Service) -> str:
    """The network whose endpoints receive the service's published traffic: its first overlay that is not internal,
    else the predefined one; "" when nothing is published by ingress."""
    if not any(port.mode == INGRESS for port in service.endpoint.spec.ports):
        return ""
    for config in service.spec.task.networks:
        network = store.networks.get(config.network_id)
        if network is not None and drivers.leads_out(network):
            return network.id
    return predefined_network(store)


def predefined_network(store: Store) -> str:
    """The ID of the ingress network, "" = there is none."""
    return next((network.id for network in store.networks if network.spec.ingress), "")


def service_item(store: Store, service: Service) -> Scoped:
    ingress_network_id = ingress_network_of(store, service)
    allocated = service.endpoint
    item = NetworkService(
        service_id=service.id,
        name=service.spec.annotations.name,
        mode=service.spec.endpoint.mode,
        virtual_ips=allocated.virtual_ips,
        ports=[port for port in allocated.spec.ports if port.published_port],
        ingress_network_id=ingress_network_id,
        networks=service.spec.task.networks,
        balance=allocated.spec.balance,
    )
    seen_on = {config.network_id for config in service.spec.task.networks}
    seen_on.update(vip.network_id for vip in allocated.virtual_ips)
    scopes = {network_scope(network_id) for network_id in seen_on}
    if ingress_network_id:
        scopes.add(EVERYWHERE)
    return Scoped(Item(service=item), frozenset(scopes))
