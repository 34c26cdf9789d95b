"""Objects as the API shows them: without secrets, with what is computed when read.

Stored objects are never changed; a copy is made only when something has to go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proto.control_pb2 import Filter, ServiceCounts
from proto.objects_pb2 import (
    ACTIVE,
    INGRESS,
    MANAGER,
    TASK_COMPLETE,
    TASK_RUNNING,
    Cluster,
    Network,
    Node,
    NodeStatus,
    Service,
    ServiceSpec,
    Task,
)
from swarm.consensus.interface import Consensus
from swarm.dispatch.items import is_down, is_live, task_name
from swarm.schedule.filters import fits
from swarm.store import drivers, states
from swarm.store.store import Store


def shown_cluster(cluster: Cluster) -> Cluster:
    """Without the CA's key, the unlock key and those of encrypted networks."""
    copy = Cluster()
    copy.CopyFrom(cluster)
    copy.ClearField("root_ca_key_pem")
    copy.ClearField("unlock_key")
    copy.ClearField("network_keys")
    return copy


def shown_service(service: Service) -> Service:
    """Without the credentials of registries."""
    specs = (service.spec, service.previous_spec)
    if not any(spec.task.container.registry_auth for spec in specs):
        return service
    copy = Service()
    copy.CopyFrom(service)
    _forget_auth(copy.spec)
    if copy.HasField("previous_spec"):
        _forget_auth(copy.previous_spec)
    return copy


def inspected_service(store: Store, service: Service) -> Service:
    """With what is computed when one service is read: where clients of its published ports are hidden from it."""
    copy = Service()
    copy.CopyFrom(shown_service(service))
    if any(port.mode == INGRESS for port in service.endpoint.spec.ports):
        hosts = {task.node_id for task in store.tasks.where("service", service.id) if is_live(task)}
        nodes = (node for node_id in hosts if (node := store.nodes.get(node_id)) is not None)
        copy.masquerading_nodes.extend(
            sorted(node.description.hostname for node in nodes if not node.description.answers_through_ingress)
        )
    return copy


def inspected_network(store: Store, network: Network) -> Network:
    """With the nodes that have tasks on it, if it spans them."""
    if not drivers.is_overlay(network):
        return network
    copy = Network()
    copy.CopyFrom(network)
    hosts = {task.node_id for task in store.tasks.where("network", network.id) if is_live(task)}
    nodes = [node for node_id in hosts if (node := store.nodes.get(node_id)) is not None]
    for node in sorted(nodes, key=lambda node: (node.description.hostname, node.id)):
        copy.nodes.add(name=node.description.hostname or node.id, addr=node.data_path_addr)
    return copy


def _forget_auth(spec: ServiceSpec) -> None:
    if spec.task.container.registry_auth:
        spec.task.container.ClearField("registry_auth")


def shown_task(task: Task) -> Task:
    """Without the credentials of registries."""
    if not task.spec.container.registry_auth:
        return task
    copy = Task()
    copy.CopyFrom(task)
    copy.spec.container.ClearField("registry_auth")
    return copy


def shown_node(node: Node, consensus: Consensus) -> Node:
    """With the state of the manager that it is, if it is one."""
    if node.role != MANAGER:
        return node
    copy = Node()
    copy.CopyFrom(node)
    leader = consensus.leader()
    copy.manager_status.leader = leader is not None and leader.node_id == node.id
    # A promoted node whose old connection was heard a moment ago is not a member yet.
    is_member = any(member.node_id == node.id for member in consensus.members())
    copy.manager_status.reachable = is_member and consensus.reachable(node.id)
    copy.manager_status.addr = node.manager_addr
    if node.id == consensus.node_id:
        copy.manager_status.warning = consensus.difference()
    return copy


# ---------------------------------------------------------------- counting


def counts(store: Store, service: Service) -> ServiceCounts:
    """Running: wanted tasks that run on nodes that are not down. Desired of a global service: the nodes that
    may run it, and those that run it already."""
    tasks = [task for task in store.tasks.where("service", service.id) if states.is_runnable(task)]
    running = [
        task for task in tasks if task.status.state == TASK_RUNNING and not is_down(store.nodes.get(task.node_id))
    ]
    made = ServiceCounts(service_id=service.id, running=len(running))
    if service.pending_delete:
        desired = 0
    elif states.is_job(service.spec):
        desired = _count_job(store, service, made)
    elif states.is_global(service.spec):
        desired = eligible_nodes(store, service)
    else:
        desired = service.spec.replicated.replicas
    made.desired = desired
    return made


def _count_job(store: Store, service: Service, counts: ServiceCounts) -> int:
    """Fill in what has completed; returns how many executions shall be under way."""
    iteration = service.job_status.iteration
    done = {
        task.slot or task.node_id
        for task in store.tasks.where("service", service.id)
        if task.status.state == TASK_COMPLETE and task.job_iteration == iteration
    }
    counts.completed = len(done)
    if states.is_global(service.spec):
        eligible = _eligible(store, service)
        counts.total = len(eligible | done)
        return len(eligible - done)
    job = service.spec.replicated_job
    counts.total = job.total_completions
    return min(job.max_concurrent or job.total_completions, max(0, job.total_completions - len(done)))


def eligible_nodes(store: Store, service: Service) -> int:
    """Nodes on which a task of a global service is wanted: those that take tasks, and paused ones that have one."""
    return len(_eligible(store, service))


def _eligible(store: Store, service: Service) -> set[int | str]:
    wanted = {task.node_id for task in store.tasks.where("service", service.id) if states.is_runnable(task)}
    return {
        node.id
        for node in store.nodes
        if node.status.state == NodeStatus.READY
        and (node.spec.availability == ACTIVE or node.id in wanted)
        and fits(node, service.spec.task)
    }


# ---------------------------------------------------------------- filters


def service_matches(service: Service, wanted: Filter) -> bool:
    annotations = service.spec.annotations
    return _common(service.id, [annotations.name], annotations.labels, wanted)


def network_matches(network: Network, wanted: Filter) -> bool:
    annotations = network.spec.annotations
    return _common(network.id, [annotations.name], annotations.labels, wanted)


def node_matches(node: Node, wanted: Filter) -> bool:
    """Labels: those of the node and those of its engine."""
    names = [node.description.hostname, node.spec.annotations.name]
    return (
        _common(node.id, names, node.spec.annotations.labels, wanted)
        and _has(node.description.engine_labels, wanted.engine_labels)
        and (not wanted.roles or node.role in wanted.roles)
    )


def task_matches(task: Task, wanted: Filter) -> bool:
    """Services and nodes are given by ID."""
    return (
        (not wanted.service_ids or task.service_id in wanted.service_ids)
        and (not wanted.node_ids or task.node_id in wanted.node_ids)
        and (not wanted.network_ids or any(leg.network_id in wanted.network_ids for leg in task.networks))
        and (not wanted.desired_states or task.desired_state in wanted.desired_states)
        and _common(task.id, [task_name(task)], task.service_annotations.labels, wanted)
    )


def _common(object_id: str, names: Sequence[str], labels: Mapping[str, str], wanted: Filter) -> bool:
    if wanted.ids and not any(object_id.startswith(prefix) for prefix in wanted.ids):
        return False
    if wanted.names and not any(name.startswith(prefix) for name in names if name for prefix in wanted.names):
        return False
    return _has(labels, wanted.labels)


def _has(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(key in labels and value in ("", labels[key]) for key, value in wanted.items())
