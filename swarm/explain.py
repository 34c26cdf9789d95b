"""`explain`: why a service, a task or a node is as it is, read off the state that managers share. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from proto import objects_pb2 as pb
from proto.control_pb2 import Explanation, Finding
from proto.objects_pb2 import Node, NodeStatus, Service, Task, UpdateStatus
from swarm.orchestrate.restart import FREE_FAILURES, backoff_s
from swarm.schedule import why_pending
from swarm.store import states
from swarm.store.store import Store

TASKS_MAX = 20
"""Tasks of a service told one by one; what ails fifty ails the first twenty."""
HISTORY_MAX = 5
"""Earlier tasks of a slot that are told."""


def explain_service(store: Store, service: Service, now: float) -> Explanation:
    """`now` is Unix s."""
    made = Explanation(type="service", id=service.id, name=service.spec.annotations.name)
    tasks = list(store.tasks.where("service", service.id))
    wanted = [task for task in tasks if states.is_runnable(task) and not states.has_stopped(task)]
    running = sum(task.status.state == pb.TASK_RUNNING for task in wanted)
    made.findings.append(Finding(subject="tasks", summary=f"{running} run of {_aim(store, service, wanted)}"))
    if states.is_job(service.spec):
        done = sum(task.status.state == pb.TASK_COMPLETE for task in tasks)
        summary = f"{done} executions of iteration {service.job_status.iteration} have completed"
        made.findings.add(subject="job", summary=summary)
    if service.pending_delete:
        made.findings.add(subject="removal", summary=f"removed; {len(tasks)} tasks are still there")
    if service.allocation_error:
        made.findings.add(subject="allocation", summary=service.allocation_error)
    if service.update_status.state != UpdateStatus.NONE:
        made.findings.append(_update(service, wanted))
    late = [task for task in wanted if task.status.state < pb.TASK_RUNNING]
    late.sort(key=lambda task: (task.slot, task.node_id, task.id))
    made.findings.extend(_pending(store, task, now) for task in late[:TASKS_MAX])
    if len(late) > TASKS_MAX:
        made.findings.add(subject="others", summary=f"{len(late) - TASKS_MAX} more tasks do not run yet")
    made.findings.extend(islice(_given_up(store, tasks), TASKS_MAX))
    made.findings.extend(_failures(store, tasks))
    return made


def explain_task(store: Store, task: Task, now: float) -> Explanation:
    """`now` is Unix s."""
    made = Explanation(type="task", id=task.id, name=_task_name(store, task))
    made.findings.append(_pending(store, task, now))
    if task.reason:
        made.findings.add(subject="reason", summary=task.reason)
    if task.node_id:
        made.findings.add(subject="node", summary=_where(store, task))
    slot, others = states.slot_of(task), store.tasks.where("service", task.service_id)
    earlier = [other for other in others if states.slot_of(other) == slot and other.id != task.id]
    earlier.sort(key=lambda other: -other.meta.created_at)
    for other in earlier[:HISTORY_MAX]:
        details = [other.reason] if other.reason else []
        made.findings.add(subject=f"earlier {other.id}", summary=_state(other), details=details)
    return made


def explain_node(store: Store, node: Node) -> Explanation:
    made = Explanation(type="node", id=node.id, name=node.description.hostname or node.id)
    state = NodeStatus.State.Name(node.status.state).lower()
    takes = "takes new tasks" if states.takes_tasks(node) else "takes no new tasks"
    availability = pb.Availability.Name(node.spec.availability).lower()
    details = [node.status.message] if node.status.message else []
    made.findings.add(subject="state", summary=f"{state}, {availability}: {takes}", details=details)
    here = [task for task in store.tasks.where("node", node.id) if not states.has_stopped(task)]
    counts = Counter(task.service_annotations.name or task.service_id for task in here)
    made.findings.add(
        subject="tasks",
        summary=f"{len(here)} tasks",
        details=[f"{name}: {count}" for name, count in sorted(counts.items())],
    )
    made.findings.append(_reserved(store, node, here))
    return made


def _reserved(store: Store, node: Node, here: Iterable[Task]) -> Finding:
    has, used_cpus, used_bytes = node.description.resources, 0, 0
    offered, used = Counter[str](), Counter[str]()
    for resource in node.description.generic:
        offered[resource.kind] += resource.count
    details = []
    for task in filter(states.reserves, here):
        used_cpus += task.spec.resources.reservations.nano_cpus
        used_bytes += task.spec.resources.reservations.memory_bytes
        for resource in task.assigned_generic:
            used[resource.kind] += resource.count
            if resource.id:
                details.append(f"{resource.kind} {resource.id}: {_task_name(store, task)}")
    parts = [
        f"{used_cpus / 1e9:g} of {has.nano_cpus / 1e9:g} CPUs",
        f"{used_bytes / 2**20:.0f} of {has.memory_bytes / 2**20:.0f} MiB memory",
        *(f"{used[kind]} of {offered[kind]} {kind}" for kind in sorted(offered | used)),
    ]
    return Finding(subject="reserved", summary=", ".join(parts), details=sorted(details))


def _aim(store: Store, service: Service, wanted: list[Task]) -> str:
    if service.spec.WhichOneof("mode") == "replicated":
        return f"{service.spec.replicated.replicas} replicas"
    if service.spec.WhichOneof("mode") == "replicated_job":
        job = service.spec.replicated_job
        at_once = job.max_concurrent or job.total_completions
        return f"{job.total_completions} executions, at most {at_once} at the same time"
    return f"{len({task.node_id for task in wanted})} nodes that may have one ({len(store.nodes)} in the swarm)"


def _update(service: Service, wanted: list[Task]) -> Finding:
    status = service.update_status
    made = Finding(subject="update", summary=status.message or UpdateStatus.State.Name(status.state).lower())
    if status.state in (UpdateStatus.UPDATING, UpdateStatus.ROLLBACK_STARTED):
        fresh = [task for task in wanted if task.spec_version == service.spec_version]
        running = sum(task.status.state == pb.TASK_RUNNING for task in fresh)
        made.details.append(
            f"{running} tasks of the new specification run, {len(wanted) - len(fresh)} are of an older one"
        )
        waiting = [task for task in fresh if task.status.state < pb.TASK_RUNNING]
        made.details.extend(f"waits for {_slot(task)}: {_state(task)}" for task in waiting[:TASKS_MAX])
        if not waiting:
            made.details.append("waits for the delay between tasks, or watches the last ones (--update-monitor)")
    elif status.state in (UpdateStatus.PAUSED, UpdateStatus.ROLLBACK_PAUSED):
        made.details.append("nothing more is replaced until the next `service update` or `service rollback`")
    return made


def _pending(store: Store, task: Task, now: float) -> Finding:
    made = Finding(subject=_task_name(store, task), summary=_state(task))
    if states.waiting_for(task) == "node":
        refusals = why_pending(store, task, now)
        made.details.extend(refusals or ("a node would take it now: it will be placed in a moment",))
    elif states.waiting_for(task) == "allocation":
        made.details.append("waits for an address on its networks")
    elif task.desired_state == pb.TASK_READY:
        made.details.append("prepared, but held back: for the restart delay, or until its predecessor has stopped")
        if task.failures_before > FREE_FAILURES:
            delay_s = backoff_s(task.spec.restart, task.failures_before)
            left_s = max(0.0, task.meta.created_at + delay_s - now)
            made.details.append(
                f"crash loop: {task.failures_before} failures in a row, so it waits {delay_s:g} s ({left_s:.0f} s more)"
            )
    return made


def _given_up(store: Store, tasks: Iterable[Task]) -> Iterator[Finding]:
    """Slots where nothing shall run any more, though the service wants it: the restart policy forbids another task."""
    slots: dict[str, list[Task]] = {}
    for task in tasks:
        slots.setdefault(states.slot_of(task), []).append(task)
    for slot in sorted(slots):
        last = max(slots[slot], key=lambda task: (task.meta.created_at, task.id))
        ended = last.status.state in states.STOPPED_BY_ITSELF and last.desired_state == pb.TASK_SHUTDOWN
        if ended and not any(states.is_runnable(task) for task in slots[slot]):
            yield Finding(subject=_task_name(store, last), summary=f"given up: {last.reason}")


def _failures(store: Store, tasks: Iterable[Task]) -> Iterator[Finding]:
    failed = [task for task in tasks if task.status.state in (pb.TASK_FAILED, pb.TASK_REJECTED)]
    failed.sort(key=states.changed_at)
    if failed:
        kinds = Counter(_ended(task) for task in failed)
        where = Counter(_node_name(store, task.node_id) for task in failed)
        yield Finding(
            subject="failures",
            summary=f"{len(failed)} remembered tasks failed, last {_task_name(store, failed[-1])}",
            details=[
                *(f"{count} x {text}" for text, count in kinds.most_common(HISTORY_MAX)),
                "on " + ", ".join(f"{name} ({count})" for name, count in sorted(where.items())),
            ],
        )


def _ended(task: Task) -> str:
    return task.status.err or f"exit code {task.status.exit_code}"


def _state(task: Task) -> str:
    word = pb.TaskState.Name(task.status.state).removeprefix("TASK_").lower()
    text = f"{word}: {task.status.err or task.status.message}" if task.status.err or task.status.message else word
    if task.desired_state > pb.TASK_RUNNING and not states.has_stopped(task):
        text += f" (to be stopped: {task.reason})"
    return text


def _where(store: Store, task: Task) -> str:
    text = f"on {_node_name(store, task.node_id)}"
    return f"{text}: {task.placement_reason}" if task.placement_reason else text


def _slot(task: Task) -> str:
    return f"slot {task.slot}" if task.slot else f"node {task.node_id}"


def _task_name(store: Store, task: Task) -> str:
    return f"{task.service_annotations.name or task.service_id}.{task.slot or _node_name(store, task.node_id)}"


def _node_name(store: Store, node_id: str) -> str:
    node = store.nodes.get(node_id)
    return (node.description.hostname if node is not None else "") or node_id or "no node"
