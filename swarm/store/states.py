"""What the states of tasks and nodes mean, said once for the store's indexes and for every stage."""

from __future__ import annotations

from proto import objects_pb2 as pb
from proto.objects_pb2 import Network, Node, NodeStatus, ServiceSpec, Task

STOPPED_BY_ITSELF = frozenset((pb.TASK_COMPLETE, pb.TASK_FAILED, pb.TASK_REJECTED))
"""Ends that the restart policy judges; SHUTDOWN and ORPHANED are the cluster's own doing."""


def is_encrypted(network: Network) -> bool:
    """Between hosts its packets travel in ESP (--opt encrypted)."""
    return "encrypted" in network.spec.options


def slot_of(task: Task) -> str:
    """The place that it shares with its predecessors and successors: a replica's number, a global service's node.
    "" = it belongs to no service."""
    service_id = task.service_id
    return f"{service_id}/{task.slot or task.node_id}" if service_id else ""


def is_runnable(task: Task) -> bool:
    """Managers want it to run (a job's: to its completion), or to stand ready to."""
    return task.desired_state <= pb.TASK_COMPLETE


def is_job(spec: ServiceSpec) -> bool:
    """Its tasks are to complete, not to serve."""
    return spec.WhichOneof("mode") in ("replicated_job", "global_job")


def is_global(spec: ServiceSpec) -> bool:
    """One task on each node that may run it."""
    return spec.WhichOneof("mode") in ("global", "global_job")


def has_stopped(task: Task) -> bool:
    """Its node said that nothing of it runs any more (or it is ORPHANED): addresses and resources are free."""
    return task.status.state > pb.TASK_RUNNING


def waiting_for(task: Task) -> str:
    """What a task that shall run still lacks: "allocation", "node" or "" (it has both)."""
    state = task.status.state
    if state >= pb.TASK_ASSIGNED or not is_runnable(task):
        return ""
    return "allocation" if state == pb.TASK_NEW else "node"


def reserves(task: Task) -> bool:
    """Holds CPU, memory or generic resources of its node: from assignment until it has stopped."""
    if not task.node_id or not pb.TASK_ASSIGNED <= task.status.state <= pb.TASK_RUNNING:
        return False
    wanted = task.spec.resources.reservations
    return wanted.nano_cpus > 0 or wanted.memory_bytes > 0 or bool(wanted.generic)


def is_lost(node: Node | None) -> bool:
    """The node was removed or is DOWN. UNKNOWN (a new leader has not heard of it yet) and DISCONNECTED are not lost."""
    return node is None or node.status.state == NodeStatus.DOWN


def takes_tasks(node: Node) -> bool:
    """READY and ACTIVE: the scheduler may give it new tasks."""
    return node.status.state == NodeStatus.READY and node.spec.availability == pb.ACTIVE


def changed_at(task: Task) -> float:
    """When its observed state was stored (leader's clock), else when it was reported (node's clock); Unix s."""
    return task.status.applied_at or task.status.timestamp


def milestone(state: pb.TaskState.ValueType) -> pb.TaskState.ValueType:
    """The observed state as coarsely as the stages distinguish it: what lies between ASSIGNED and RUNNING is one."""
    if pb.TASK_ASSIGNED <= state < pb.TASK_RUNNING:
        return pb.TASK_ASSIGNED
    return state
