"""Rolling updates: outdated slots are replaced a few at a time, watched, and stopped or rolled back on failure.

Everything is read off the store at each look, so a new leader carries on where the old one was:
`Service.update_status` says which spec version is being rolled out and since when, a task's `spec_version` says
whether it belongs to it, `Task.running_at` when it got there. A new spec version supersedes the running update.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto import objects_pb2 as pb
from proto.objects_pb2 import Service, Task, UpdateConfig, UpdateStatus
from swarm.orchestrate.outdated import is_outdated, needs_update
from swarm.orchestrate.restart import is_given_up, may_start_in
from swarm.orchestrate.view import Slot, View, describe_end
from swarm.store import states
from swarm.store.changes import Change, Update, copy_of

MONITOR_S = 5.0
"""How long a new task is watched after it runs (Docker's default)."""
PARALLELISM = 1
PROGRESS_DEADLINE_S = 600.0
"""An update in which no slot got ahead for so long has failed, unless its config says otherwise (Kubernetes' default
for its deployments; Docker waits for ever)."""

MOVING = (UpdateStatus.UPDATING, UpdateStatus.ROLLBACK_STARTED)
HALTED = (UpdateStatus.PAUSED, UpdateStatus.ROLLBACK_PAUSED)


@dataclass(frozen=True, slots=True)
class Progress:
    """One slot's way to the new spec."""

    slot: Slot
    fresh: list[Task]
    """Tasks that this update made, oldest first."""
    done_at: float | None
    """When the first of them ran or ended; None = still on its way, or not begun."""

    @property
    def is_on_its_way(self) -> bool:
        """Replaced, and not done. A slot that a scale added meanwhile replaces nothing and holds nothing up."""
        return self.replaces and self.done_at is None

    @property
    def replaces(self) -> bool:
        return 0 < len(self.fresh) < len(self.slot.tasks)


def advance(view: View) -> None:
    """One step of the service's update, if there is anything to update."""
    service = view.service
    status = service.update_status
    outdated = [slot for slot in view.slots.values() if _is_updatable(view, slot) and needs_update(view, slot)]
    is_ours = status.spec_version == service.spec_version and status.state != UpdateStatus.NONE
    if not is_ours and status.state in MOVING and not outdated:
        _finish(view)  # the spec moved on (a scale, say), nothing is left to replace
    elif outdated and (not is_ours or status.state not in (*MOVING, *HALTED)):
        _begin(view, len(outdated))
    elif is_ours and (status.state in MOVING or status.state in HALTED):
        _step(view, outdated)


def _is_updatable(view: View, slot: Slot) -> bool:
    """A global service's task on a node that is paused, or not heard of, is left as it is until the node is back."""
    return not isinstance(slot.key, str) or may_start_in(view, slot)


def _begin(view: View, slots: int) -> None:
    service = copy_of(view.service)
    asked = service.update_status
    rolling_back = asked.state == UpdateStatus.ROLLBACK_STARTED and asked.spec_version in (0, service.spec_version)
    message = asked.message if rolling_back else "update in progress"
    service.update_status.Clear()
    service.update_status.state = UpdateStatus.ROLLBACK_STARTED if rolling_back else UpdateStatus.UPDATING
    service.update_status.started_at = view.now
    service.update_status.message = message
    service.update_status.spec_version = service.spec_version
    service.update_status.slots = slots
    view.act(None, Update(service))


def _step(view: View, outdated: list[Slot]) -> None:
    halted = view.service.update_status.state in HALTED
    config = config_of(view.service)
    progress = [_progress(view, slot) for slot in view.slots.values()]
    _note_running(view, progress)
    if not halted and _fail(view, progress, config, outdated):
        return
    ahead = {item.slot.key: item for item in progress}
    for slot in outdated:
        if not slot.settled:
            _keep_one(view, slot)
        if not slot.settled:
            _retire(view, ahead[slot.key], config, halted)
    if halted:
        return
    busy = sum(1 for item in progress if item.is_on_its_way or _cools(view, item, config))
    parallelism = config.parallelism if config.HasField("parallelism") else PARALLELISM
    room = len(outdated) if parallelism == 0 else max(0, parallelism - busy)
    waiting = [slot for slot in outdated if not slot.settled and not _has_current(view, slot, ahead[slot.key])]
    waiting.sort(key=lambda slot: (_serves(slot), slot.key))
    for slot in waiting[:room]:
        _replace(view, slot, config)
    if not outdated:
        _watch(view, progress, config)


def config_of(service: Service) -> UpdateConfig:
    rolling_back = service.update_status.state in (UpdateStatus.ROLLBACK_STARTED, UpdateStatus.ROLLBACK_PAUSED)
    return service.spec.rollback if rolling_back else service.spec.update


def _progress(view: View, slot: Slot) -> Progress:
    status = view.service.update_status
    # A rollback returns to an old spec version: tasks of its first life are none of this update's.
    since = status.started_at if status.state in (UpdateStatus.ROLLBACK_STARTED, UpdateStatus.ROLLBACK_PAUSED) else 0.0
    fresh = [t for t in slot.tasks if t.spec_version == view.service.spec_version and t.meta.created_at >= since]
    ends = [at for at in (_arrived_at(task) for task in fresh) if at is not None]
    return Progress(slot, fresh, min(ends, default=None))


def _arrived_at(task: Task) -> float | None:
    if task.running_at:
        return task.running_at
    return states.changed_at(task) if task.status.state >= pb.TASK_RUNNING else None


def _note_running(view: View, progress: list[Progress]) -> None:
    """Keep when each new task began to run: its status forgets that when it ends."""
    for item in progress:
        for task in item.fresh:
            if task.status.state == pb.TASK_RUNNING and not task.running_at and not item.slot.settled:
                noted = copy_of(task)
                noted.running_at = states.changed_at(task) or view.now
                view.act(item.slot, Update(noted))


def _cools(view: View, item: Progress, config: UpdateConfig) -> bool:
    """The slot is done, but the update delay after it is not over."""
    if item.done_at is None or not config.delay_s or not item.replaces:
        return False
    until = item.done_at + config.delay_s
    if until <= view.now:
        return False
    view.wake(until)
    return True


def _serves(slot: Slot) -> bool:
    return any(task.status.state == pb.TASK_RUNNING for task in slot.runnable)


def _has_current(view: View, slot: Slot, item: Progress) -> bool:
    return bool(item.fresh) or any(not is_outdated(view, task) for task in slot.runnable)


def is_start_first(view: View, config: UpdateConfig) -> bool:
    """Start-first needs room for two tasks of a slot; where a host-mode port or a limit of replicas per node can
    deny that, the new task would wait for ever: such services are updated stop-first."""
    return config.order == pb.START_FIRST and has_room_for_two(view)


def has_room_for_two(view: View) -> bool:
    """Nothing that only one task of a slot, or of a node, can have."""
    if view.spec.task.placement.max_replicas_per_node:
        return False
    return not any(port.mode == pb.HOST for port in view.spec.endpoint.ports)


def _replace(view: View, slot: Slot, config: UpdateConfig) -> None:
    """Begin the slot's update."""
    old = slot.runnable
    if old and is_start_first(view, config):
        view.act(slot, view.create(slot, pb.TASK_RUNNING, f"update: starts before {old[0].id} stops"))
        return
    changes: list[Change] = [view.stop(task, "updated to a newer spec") for task in old]
    waits = any(not view.is_gone(task) and task.status.state >= pb.TASK_ASSIGNED for task in slot.tasks)
    reason = f"update: replaces {old[0].id}" if old else "update"
    view.act(slot, *changes, view.create(slot, pb.TASK_READY if waits else pb.TASK_RUNNING, reason))


def _keep_one(view: View, slot: Slot) -> None:
    """A superseded start-first update may leave two tasks in a slot, none of today's spec: the one that is further
    on, or else has been there longer, stays until its own replacement serves."""
    if any(not is_outdated(view, task) for task in slot.runnable):
        return
    kept = max(slot.runnable, key=lambda task: (task.status.state, -slot.tasks.index(task)), default=None)
    surplus = [view.stop(task, "its update was superseded") for task in slot.runnable if task is not kept]
    if surplus:
        view.act(slot, *surplus)


def _retire(view: View, item: Progress, config: UpdateConfig, halted: bool) -> None:
    """Stop a slot's outdated tasks once an up-to-date one serves in their place (start-first), or need not wait for."""
    slot = item.slot
    old = [task for task in slot.runnable if is_outdated(view, task)]
    current = [task for task in slot.runnable if not is_outdated(view, task)]
    if not old:
        return
    served = any(task.status.state == pb.TASK_RUNNING for task in current)
    failed_for_good = bool(item.fresh) and not current and not halted
    if served or failed_for_good or (current and not is_start_first(view, config)):
        view.act(slot, *(view.stop(task, "updated to a newer spec") for task in old))


def _fail(view: View, progress: list[Progress], config: UpdateConfig, outdated: list[Slot]) -> bool:
    """Act on too many failures; True when that ends this step."""
    if config.failure_action == pb.CONTINUE:
        return False
    monitor_s = config.monitor_s if config.HasField("monitor_s") else MONITOR_S
    failed = [task for item in progress for task in item.fresh if _has_failed(task, monitor_s)]
    status = view.service.update_status
    slots = status.slots or len(view.slots) or 1  # a rollback that the user asked for comes without a count
    why = ""
    if failed and len(failed) / slots > config.max_failure_ratio:
        why = f"due to failure or early termination of task {failed[-1].id} ({describe_end(failed[-1])})"
    elif stuck := _stuck(view, progress, config, outdated):
        why = f"because {stuck}"
    if not why:
        return False
    service = copy_of(view.service)
    rolling_back = status.state == UpdateStatus.ROLLBACK_STARTED
    if config.failure_action == pb.ROLLBACK and not rolling_back and service.HasField("previous_spec"):
        service.spec.CopyFrom(service.previous_spec)
        service.spec_version = service.previous_spec_version
        service.ClearField("previous_spec")
        service.ClearField("previous_spec_version")
        service.update_status.state = UpdateStatus.ROLLBACK_STARTED
        service.update_status.started_at = view.now
        service.update_status.message = f"update rolled back {why}"
        service.update_status.spec_version = service.spec_version
    else:
        word = "rollback" if rolling_back else "update"
        service.update_status.state = UpdateStatus.ROLLBACK_PAUSED if rolling_back else UpdateStatus.PAUSED
        service.update_status.message = f"{word} paused {why}"
    view.act(None, Update(service))
    return True


def _stuck(view: View, progress: list[Progress], config: UpdateConfig, outdated: list[Slot]) -> str:
    """What the update has been waiting for until its deadline; "" while it gets ahead, or may yet."""
    deadline_s = config.progress_deadline_s or PROGRESS_DEADLINE_S
    waited_for = [item for item in progress if item.is_on_its_way]
    if deadline_s < 0 or not (waited_for or outdated):
        return ""
    steps = [view.service.update_status.started_at, *(item.done_at for item in progress if item.done_at is not None)]
    until = max(steps) + config.delay_s + deadline_s
    if until > view.now:
        view.wake(until)
        return ""
    tasks = "".join(f"; task {item.fresh[-1].id}: {_describe_wait(item.fresh[-1])}" for item in waited_for[:1])
    return f"no task got ready within {deadline_s:g} s{tasks}"


def _describe_wait(task: Task) -> str:
    state = pb.TaskState.Name(task.status.state).removeprefix("TASK_").lower()
    return f"{state}: {task.status.err}" if task.status.err else state


def _has_failed(task: Task, monitor_s: float) -> bool:
    """Ended by itself before it ran, or within the monitored time after. A task that completes is as expected
    where the restart policy says that completing is fine."""
    state = task.status.state
    if state not in states.STOPPED_BY_ITSELF:
        return False
    if state == pb.TASK_COMPLETE and task.spec.restart.condition != pb.RESTART_ANY:
        return False
    return not task.running_at or states.changed_at(task) - task.running_at <= monitor_s


def _watch(view: View, progress: list[Progress], config: UpdateConfig) -> None:
    """Nothing is outdated any more: complete once every slot is done and the last one was watched long enough."""
    if any(item.is_on_its_way for item in progress if not is_given_up(view, item.slot)):
        return
    monitor_s = config.monitor_s if config.HasField("monitor_s") else MONITOR_S
    until = max((item.done_at for item in progress if item.done_at is not None), default=0.0) + monitor_s
    if until <= view.now:
        _finish(view)
    else:
        view.wake(until)


def _finish(view: View) -> None:
    service = copy_of(view.service)
    status = service.update_status
    rolling_back = status.state == UpdateStatus.ROLLBACK_STARTED
    status.state = UpdateStatus.ROLLBACK_COMPLETED if rolling_back else UpdateStatus.COMPLETED
    status.completed_at = view.now
    status.message = "rollback completed" if rolling_back else "update completed"
    view.act(None, Update(service))
