"""What one look at a service works on: its tasks by slot, and the plan that collects what to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from proto import objects_pb2 as pb
from proto.objects_pb2 import Node, Service, ServiceSpec, Task, TaskSpec
from swarm.store import states
from swarm.store.changes import Change, Create, Group, Remove, Update, copy_of
from swarm.store.store import Store

Fits = Callable[[Node, TaskSpec], bool]
"""Whether a node satisfies the constraints and platforms of a task (the scheduler's own filters, handed in)."""
Surplus = Callable[[Store, Node], frozenset[str]]
"""Tasks (IDs) for which the node has no room any more since it has less than it had (handed in as well)."""


@dataclass(slots=True)
class Slot:
    """A replica's place: its number, or for a global service its node's ID. It outlives each of its tasks."""

    key: int | str
    tasks: list[Task] = field(default_factory=list)
    """Oldest first, without those that are to be removed."""
    runnable: list[Task] = field(default_factory=list)
    """Those of them that shall run."""
    leaving: list[Task] = field(default_factory=list)
    """Desired REMOVE: the user does not want them any more; they wait for their end only."""
    settled: bool = False
    """Something was decided for it in this look: leave the rest to the next one."""


@dataclass(slots=True)
class View:
    store: Store
    now: float
    new_id: Callable[[], str]
    fits: Fits
    surplus: Surplus
    service: Service
    slots: dict[int | str, Slot]
    groups: list[Group] = field(default_factory=list)
    wake_at: float | None = None
    outdated_versions: dict[int, bool] = field(default_factory=dict)
    """Spec versions of tasks seen, and whether their spec differs from today's: tasks of one version are alike."""
    fitting: dict[str, bool] = field(default_factory=dict)
    surplus_on: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def spec(self) -> ServiceSpec:
        return self.service.spec

    @property
    def is_global(self) -> bool:
        return states.is_global(self.spec)

    @property
    def is_job(self) -> bool:
        return states.is_job(self.spec)

    def is_done(self, slot: Slot) -> bool:
        """A job's slot: an execution of it has completed."""
        return self.is_job and any(task.status.state == pb.TASK_COMPLETE for task in slot.tasks)

    def fits_on(self, node: Node) -> bool:
        """The node satisfies today's placement of the service."""
        known = self.fitting.get(node.id)
        if known is None:
            known = self.fitting[node.id] = self.fits(node, self.spec.task)
        return known

    def has_room_for(self, node: Node, task: Task) -> bool:
        """The node still has what the task was given there."""
        known = self.surplus_on.get(node.id)
        if known is None:
            known = self.surplus_on[node.id] = self.surplus(self.store, node)
        return task.id not in known

    def node_of(self, task: Task) -> Node | None:
        return self.store.nodes.get(task.node_id)

    def is_gone(self, task: Task) -> bool:
        """Nothing of it runs any more, or its node is lost and nobody can tell."""
        if states.has_stopped(task):
            return True
        return bool(task.node_id) and states.is_lost(self.node_of(task))

    def wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)

    # ---- what a look can want; each of these settles the slot

    def act(self, slot: Slot | None, *changes: Change) -> None:
        if slot is not None:
            slot.settled = True
        self.groups.append(changes)

    def create(
        self,
        slot: Slot,
        desired: pb.TaskState.ValueType,
        reason: str,
        failures_before: int = 0,
        *,
        replaces: str = "",
    ) -> Create:
        """`desired`: READY or RUNNING (for a job that means COMPLETE)."""
        task = Task(id=self.new_id(), service_id=self.service.id, desired_state=self._goal(desired), reason=reason)
        task.failures_before, task.replaces = failures_before, replaces
        if self.is_job:
            task.job_iteration = self.service.job_status.iteration
        task.spec_version = self.service.spec_version
        task.spec.CopyFrom(self.spec.task)
        task.service_annotations.CopyFrom(self.spec.annotations)
        if isinstance(slot.key, int):
            task.slot = slot.key
        else:
            task.node_id = slot.key
        task.status.state = pb.TASK_NEW
        task.status.timestamp = task.status.applied_at = self.now
        task.status.message = "created"
        return Create(task)

    def stop(self, task: Task, reason: str) -> Change:
        """No longer wanted, but remembered. A task that no node knows of yet has nothing to remember."""
        if task.status.state < pb.TASK_ASSIGNED:
            return Remove(task)
        return self._desire(task, pb.TASK_SHUTDOWN, reason)

    def discard(self, task: Task, reason: str) -> Change:
        """Stop it, then forget it."""
        return self._desire(task, pb.TASK_REMOVE, reason)

    def promote(self, task: Task) -> Change:
        return self._desire(task, self._goal(pb.TASK_RUNNING), task.reason)

    def _goal(self, desired: pb.TaskState.ValueType) -> pb.TaskState.ValueType:
        return pb.TASK_COMPLETE if self.is_job and desired == pb.TASK_RUNNING else desired

    def _desire(self, task: Task, state: pb.TaskState.ValueType, reason: str) -> Change:
        changed = copy_of(task)
        changed.desired_state = state
        changed.reason = reason
        return Update(changed)


def slots_of(store: Store, service: Service) -> dict[int | str, Slot]:
    """The service's tasks by slot, each slot's in order of creation."""
    slots: dict[int | str, Slot] = {}
    for task in store.tasks.where("service", service.id):
        key = task.slot or task.node_id
        slot = slots.get(key)
        if slot is None:
            slot = slots[key] = Slot(key)
        (slot.leaving if task.desired_state == pb.TASK_REMOVE else slot.tasks).append(task)
    for slot in slots.values():
        if len(slot.tasks) > 1:
            slot.tasks.sort(key=lambda task: (task.meta.created_at, task.id))
        slot.runnable = [task for task in slot.tasks if states.is_runnable(task)]
    return slots


def describe_end(task: Task) -> str:
    """How a task ended, in the few words that a `reason` has room for."""
    state = pb.TaskState.Name(task.status.state).removeprefix("TASK_").lower()
    if task.status.err:
        return f"{state}: {task.status.err}"
    if task.status.exit_code:
        return f"{state} with exit code {task.status.exit_code}"
    return state
