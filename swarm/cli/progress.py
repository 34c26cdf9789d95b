"""How far a service is from what its spec wants. Pure: one picture in, one progress out."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from proto import objects_pb2 as pb
from swarm.cli.rows import ID_SHORT, task_error

BARS_MAX = 20
"""As Docker: beyond this only the overall line is drawn."""
STABLE_S = 1.0
"""A service is called converged when it has stayed so for this long. Docker waits 5 s (its monitor);
here a task is reported running only once its process runs, and a second catches one that exits at once."""

STEPS: dict[pb.TaskState.ValueType, int] = {
    pb.TASK_NEW: 1,
    pb.TASK_PENDING: 2,
    pb.TASK_ASSIGNED: 3,
    pb.TASK_ACCEPTED: 4,
    pb.TASK_PREPARING: 5,
    pb.TASK_READY: 6,
    pb.TASK_STARTING: 7,
    pb.TASK_RUNNING: 9,
    pb.TASK_COMPLETE: 9,
}
STEPS_ALL = 9


class Outcome(enum.Enum):
    WORKING = "working"
    CONVERGED = "converged"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Bar:
    """One wanted task: "3/15" or a global service's node, its state, steps done of STEPS_ALL, and what is wrong."""

    key: str
    state: str
    step: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    running: int
    wanted: int
    bars: tuple[Bar, ...]
    outcome: Outcome
    note: str = ""
    """WORKING: what holds it up; FAILED: why."""
    is_job: bool = False
    """Then `running` counts what has completed."""

    @property
    def overall(self) -> str:
        if self.is_job:
            return f"job progress: {self.running} out of {self.wanted} complete"
        return f"overall progress: {self.running} out of {self.wanted} tasks"


def measure(service: pb.Service, tasks: Iterable[pb.Task], nodes_eligible: int, rolling_back: bool = False) -> Progress:
    """`nodes_eligible` counts for global services only; `rolling_back`: the user asked for a rollback,
    so that completing one is success."""
    if service.HasField("job_status"):
        return _measure_job(service, tasks, nodes_eligible)
    is_global = service.spec.WhichOneof("mode") == "global"
    wanted = nodes_eligible if is_global else service.spec.replicated.replicas
    current, errors = _current(tasks)
    running = sum(1 for task in current.values() if _is_done(task, service))
    outcome, note = _verdict(service, running >= wanted and len(current) == wanted, rolling_back)
    if outcome is Outcome.WORKING and not note:
        note = service.allocation_error
    keys = sorted(current) if is_global else _slots(current, wanted)
    bars = tuple(_bar(key, current.get(key), errors.get(key, ""), wanted) for key in keys[:BARS_MAX])
    return Progress(running, wanted, bars if wanted <= BARS_MAX else (), outcome, note)


Key = tuple[int, str]


def _measure_job(service: pb.Service, tasks: Iterable[pb.Task], nodes_eligible: int) -> Progress:
    """A job has converged when it is complete, and failed when what is not complete will not be tried again."""
    newest: dict[Key, pb.Task] = {}
    for task in sorted(tasks, key=lambda task: (task.meta.created_at, task.id)):
        key = (task.slot, "" if task.slot else task.node_id)
        if task.job_iteration != service.job_status.iteration or task.desired_state == pb.TASK_REMOVE:
            continue
        if key not in newest or newest[key].status.state != pb.TASK_COMPLETE:
            newest[key] = task
    is_global = service.spec.WhichOneof("mode") == "global_job"
    wanted = max(nodes_eligible, len(newest)) if is_global else service.spec.replicated_job.total_completions
    done = sum(task.status.state == pb.TASK_COMPLETE for task in newest.values())
    lost = [task for task in newest.values() if _is_given_up(task)]
    outcome, note = Outcome.WORKING, service.allocation_error
    if done >= wanted:
        outcome, note = Outcome.CONVERGED, ""
    elif lost and done + len(lost) >= wanted:
        outcome, note = Outcome.FAILED, f"{len(lost)} of {wanted} executions failed for good: {lost[0].reason}"
    keys = sorted(newest) if is_global else _slots(newest, wanted)
    bars = (_bar(key, newest.get(key), task_error(newest[key]) if key in newest else "", wanted) for key in keys)
    return Progress(done, wanted, tuple(bars) if wanted <= BARS_MAX else (), outcome, note, is_job=True)


def _is_given_up(task: pb.Task) -> bool:
    return task.desired_state == pb.TASK_SHUTDOWN and task.status.state in (pb.TASK_FAILED, pb.TASK_REJECTED)


def _slots(current: dict[Key, pb.Task], wanted: int) -> list[Key]:
    """The slots in use, and the lowest free ones for what is missing: scaling down may leave gaps."""
    numbers = {slot for slot, _ in current}
    free = (number for number in itertools.count(1) if number not in numbers)
    missing = itertools.islice(free, max(0, wanted - len(numbers)))
    return [(number, "") for number in sorted({*numbers, *missing})]


def _current(tasks: Iterable[pb.Task]) -> tuple[dict[Key, pb.Task], dict[Key, str]]:
    """Per slot (or node) the task that is wanted now, newest spec first; and the newest task's error."""
    current: dict[Key, pb.Task] = {}
    errors: dict[Key, str] = {}
    for task in sorted(tasks, key=lambda task: (task.spec_version, task.meta.created_at, task.id)):
        key = (task.slot, "" if task.slot else task.node_id)
        if error := task_error(task):
            errors[key] = error
        if task.desired_state <= pb.TASK_RUNNING and task.status.state <= pb.TASK_RUNNING:
            current[key] = task
    return current, errors


def _is_done(task: pb.Task, service: pb.Service) -> bool:
    if task.status.state != pb.TASK_RUNNING or task.desired_state != pb.TASK_RUNNING:
        return False
    return task.spec_version == service.spec_version or _same_spec(task.spec, service.spec.task)


def _same_spec(left: pb.TaskSpec, right: pb.TaskSpec) -> bool:
    """Whether a task of one spec may go on under the other, as the orchestrator sees it: scaling moves the
    service's spec version only, and neither placement nor credentials replace a task that runs."""
    return left == right or _essence(left) == _essence(right)


def _essence(spec: pb.TaskSpec) -> pb.TaskSpec:
    kept = pb.TaskSpec()
    kept.CopyFrom(spec)
    kept.ClearField("placement")
    kept.container.ClearField("registry_auth")
    for field in ("resources", "restart"):
        if not getattr(kept, field).ByteSize():  # an empty message means the same as none
            kept.ClearField(field)
    return kept


def _verdict(service: pb.Service, all_run: bool, rolling_back: bool) -> tuple[Outcome, str]:
    """The update's state speaks first: it ends a wait that counting tasks alone would never end."""
    status = service.update_status
    is_stale = status.spec_version not in (0, service.spec_version)  # of an earlier update: this one has not begun
    match pb.UpdateStatus.NONE if is_stale else status.state:
        case pb.UpdateStatus.PAUSED:
            return Outcome.FAILED, f"service update paused: {status.message}"
        case pb.UpdateStatus.ROLLBACK_PAUSED:
            return Outcome.FAILED, f"service rollback paused: {status.message}"
        case pb.UpdateStatus.ROLLBACK_COMPLETED if not rolling_back and all_run:
            return Outcome.FAILED, f"service rolled back: {status.message}"
        case pb.UpdateStatus.ROLLBACK_STARTED if not rolling_back:
            return Outcome.WORKING, f"rolling back: {status.message}"
        case pb.UpdateStatus.UPDATING | pb.UpdateStatus.ROLLBACK_STARTED:
            return Outcome.WORKING, ""
        case _:
            return (Outcome.CONVERGED if all_run else Outcome.WORKING), ""


def _bar(key: Key, task: pb.Task | None, error: str, wanted: int) -> Bar:
    slot, node_id = key
    name = f"{slot}/{wanted}" if slot else node_id[:ID_SHORT]
    if task is None:
        return Bar(name, "", 0, error)
    state = pb.TaskState.Name(task.status.state).removeprefix("TASK_").lower()
    return Bar(name, state, STEPS.get(task.status.state, 0), "" if task.status.state == pb.TASK_RUNNING else error)
