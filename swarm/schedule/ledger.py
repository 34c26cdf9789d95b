"""What each node carries and which tasks wait for one: kept up to date from the store's events, so that a pass costs
what it decides and not what the cluster holds. The same as if it were counted anew, whenever it is looked at."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from proto import objects_pb2 as pb
from proto.objects_pb2 import Task
from swarm.schedule.generic import Claim
from swarm.store import states
from swarm.store.store import Event, Store

K = TypeVar("K")
HostPort = tuple[int, int, str]
"""Protocol, port and address of the host; "" is every address."""
Alike = tuple[int, str, str]
"""Tasks of one service that share this are decided together: specification version, the node of a global service's
task, and the task's own ID if it has no service."""


@dataclass(slots=True)
class Account:
    """What was given to one node and has not stopped."""

    tasks: int = 0
    """Those that shall run: a task that is being shut down still holds, but does not count."""
    holding: int = 0
    nano_cpus: int = 0
    memory_bytes: int = 0
    host_ports: dict[HostPort, int] = field(default_factory=dict)
    generic: dict[Claim, int] = field(default_factory=dict)

    def reserve(self, task: Task, sign: int) -> None:
        """Count what the task holds besides its place (1), or no longer (-1)."""
        if not (task.spec.HasField("resources") or task.HasField("endpoint") or task.assigned_generic):
            return  # most tasks of most clusters: reading what is not there would cost more than all the rest
        reserved = task.spec.resources.reservations
        self.nano_cpus += sign * reserved.nano_cpus
        self.memory_bytes += sign * reserved.memory_bytes
        for port in host_ports_of(task):
            _count(self.host_ports, port, sign)
        for resource in task.assigned_generic:
            _count(self.generic, (resource.kind, resource.id), sign * resource.count)


class Ledger:
    """A view of the store (`Store.view`)."""

    def __init__(self, store: Store) -> None:
        self._accounts: dict[str, Account] = {}
        self._tasks_on: dict[str, dict[str, int]] = {}
        self._failed: dict[str, dict[str, Task]] = {}
        self.waiting: dict[str, dict[Alike, dict[str, Task]]] = {}
        """Tasks without a node by service, longest waiting first."""
        for task in store.tasks:
            self._file(task, task.status.state, 1)

    def account(self, node_id: str) -> Account:
        """Not to be changed."""
        return self._accounts.get(node_id) or Account()

    def tasks_on(self, service_id: str) -> dict[str, int]:
        """Tasks of the service that shall run, by the node that has them. Not to be changed."""
        return self._tasks_on.get(service_id, {})

    def failed(self, service_id: str) -> list[Task]:
        """The service's failed and rejected tasks that are still remembered."""
        return list(self._failed.get(service_id, {}).values())

    def note(self, events: Sequence[Event]) -> None:
        for before, after, old_state, new_state in events:
            if (
                (isinstance(before, Task) and isinstance(after, Task))
                and (_is_placed(old_state) and _is_placed(new_state))
                and before.desired_state == after.desired_state
            ):
                continue  # progress on the node: what it holds stays
            if isinstance(before, Task):
                self._file(before, old_state, -1)
            if isinstance(after, Task):
                self._file(after, new_state, 1)

    def _file(self, task: Task, state: pb.TaskState.ValueType, sign: int) -> None:
        """Enter the task (1), or strike it out (-1)."""
        service_id = task.service_id
        if _is_placed(state):
            self._charge(task, service_id, sign)
        elif state in (pb.TASK_FAILED, pb.TASK_REJECTED):
            _keep(self._failed, service_id, task, sign)
        elif pb.TASK_NEW < state < pb.TASK_ASSIGNED and states.is_runnable(task):
            groups = self.waiting.setdefault(service_id, {})
            _keep(groups, (task.spec_version, task.node_id, "" if service_id else task.id), task, sign)
            if not groups:
                del self.waiting[service_id]

    def _charge(self, task: Task, service_id: str, sign: int) -> None:
        node_id = task.node_id
        account = self._accounts.get(node_id)
        if account is None:
            account = self._accounts[node_id] = Account()
        account.holding += sign
        if states.is_runnable(task):
            account.tasks += sign
            counts = self._tasks_on.setdefault(service_id, {})
            _count(counts, node_id, sign)
            if not counts:
                del self._tasks_on[service_id]
        account.reserve(task, sign)
        if not account.holding:
            del self._accounts[node_id]


def host_ports_of(task: Task) -> frozenset[HostPort]:
    return frozenset((p.protocol, p.published_port, p.host_ip) for p in task.endpoint.ports if p.mode == pb.HOST)


def in_the_way(wanted: Iterable[HostPort], taken: Collection[HostPort]) -> list[HostPort]:
    """The wanted ones that a taken one meets."""
    return [port for port in wanted if any(port[:2] == other[:2] and _meet(port[2], other[2]) for other in taken)]


def _meet(one: str, other: str) -> bool:
    return not one or not other or one == other


def _is_placed(state: pb.TaskState.ValueType) -> bool:
    return pb.TASK_ASSIGNED <= state <= pb.TASK_RUNNING


def _count(counts: dict[K, int], key: K, by: int) -> None:
    left = counts.get(key, 0) + by
    if left:
        counts[key] = left
    else:
        counts.pop(key, None)


def _keep(groups: dict[K, dict[str, Task]], key: K, task: Task, sign: int) -> None:
    if sign > 0:
        groups.setdefault(key, {})[task.id] = task
    elif key in groups:
        groups[key].pop(task.id, None)
        if not groups[key]:
            del groups[key]
