"""What happens in a slot whose task ended, or whose node is gone: judged by the restart policy.

A replacement is created in the same group that gives up the old task, so a slot never goes unnoticed:
a slot without a runnable task is one that was given up (the policy forbids more), and stays so until
the spec changes. Nothing is remembered outside the store: attempts are counted from the tasks that the
reaper keeps for that purpose.
"""

from __future__ import annotations

from proto import objects_pb2 as pb
from proto.objects_pb2 import Node, RestartPolicy, Task
from swarm.orchestrate.outdated import is_outdated
from swarm.orchestrate.view import Slot, View, describe_end
from swarm.store import states
from swarm.store.changes import Change

DELAY_S = 5.0
"""Between a failure and the next start, unless the policy says otherwise (Docker's default)."""
STOP_WAIT_S = 60.0
"""A replacement waits this long, and the grace period besides, for its predecessor to stop: a node that cannot
stop a container must not keep the slot down for ever."""
GRACE_S = 10.0
"""Docker's default stop grace period."""
FREE_FAILURES = 3
"""So many failures in a row are met with the policy's own delay: what they wait for may be about to come up."""
BACKOFF_MAX_S = 300.0
"""Each further one doubles the delay, up to this (Kubernetes' CrashLoopBackOff)."""
STEADY_S = 300.0
"""A task that lived so long was no crash: the next failure is the first one again."""


def backoff_s(policy: RestartPolicy, failures: int) -> float:
    """The delay before the start that follows so many failures in a row. Where the attempts are limited the loop ends
    by itself, and a growing delay could outgrow the window in which they are counted: there it stays as it is."""
    delay_s = policy.delay_s if policy.HasField("delay_s") else DELAY_S
    doublings = failures - FREE_FAILURES
    if doublings <= 0 or policy.max_attempts or delay_s >= BACKOFF_MAX_S:
        return delay_s
    return min(BACKOFF_MAX_S, max(delay_s, 1.0) * 2.0 ** min(doublings, 20))


def is_limit_out_of_reach(policy: RestartPolicy) -> bool:
    """The window in which attempts are counted is too short for as many as are allowed, with the delay between."""
    delay_s = policy.delay_s if policy.HasField("delay_s") else DELAY_S
    return 0 < policy.window_s <= policy.max_attempts * delay_s


def failures_up_to(policy: RestartPolicy, task: Task) -> int:
    """How many tasks in a row, this one the last, ended by themselves soon after their start."""
    if task.status.state not in states.STOPPED_BY_ITSELF:
        return task.failures_before  # it was moved: that says nothing about it
    waited_s = backoff_s(policy, task.failures_before) if task.failures_before else 0.0
    is_steady = states.changed_at(task) - task.meta.created_at - waited_s >= STEADY_S
    return 1 if is_steady and task.status.state != pb.TASK_REJECTED else task.failures_before + 1


def exits(slot: Slot, like: Task, window_s: float) -> int:
    """How often tasks of the spec of `like` ended by themselves in this slot, up to `like`'s own end and not
    longer than the window before it (0: since ever)."""
    until = states.changed_at(like)
    return sum(
        1
        for task in slot.tasks
        if task.status.state in states.STOPPED_BY_ITSELF
        and task.spec_version == like.spec_version
        and (not window_s or states.changed_at(task) > until - window_s)
    )


def refusal(policy: RestartPolicy, slot: Slot, task: Task) -> str | None:
    """Why the policy forbids to replace this task, or None."""
    if policy.condition == pb.RESTART_NONE:
        return "restart condition is none"
    if policy.condition == pb.RESTART_ON_FAILURE and task.status.state == pb.TASK_COMPLETE:
        return "complete, and restart condition is on-failure"
    if policy.max_attempts and task.status.state in states.STOPPED_BY_ITSELF:
        within = f" within {policy.window_s:g} s" if policy.window_s else ""
        if exits(slot, task, policy.window_s) > policy.max_attempts:
            return f"restarted {policy.max_attempts} times{within}: no attempts left"
    return None


def is_given_up(view: View, slot: Slot) -> bool:
    """No task of the slot shall run, and the policy forbids another one. A rollback always brings the slot back."""
    if not slot.tasks or slot.runnable:
        return False
    status = view.service.update_status
    if status.state == pb.UpdateStatus.ROLLBACK_STARTED and status.spec_version == view.service.spec_version:
        return False
    return refusal(view.spec.task.restart, slot, slot.tasks[-1]) is not None


def misplaced(view: View, task: Task, node: Node | None) -> str | None:
    """Why this task cannot stay on its node, or None."""
    if not task.node_id:
        return None
    if node is None:
        return f"node {task.node_id} was removed"
    name = node.description.hostname or node.id
    if node.status.state == pb.NodeStatus.DOWN:
        return f"node {name} is down"
    if node.spec.availability == pb.DRAINED and not _leaves_in_turn(view, task):
        return f"node {name} is drained"
    if node.spec.availability == pb.PAUSED:
        return None  # it is left as it is until somebody makes it active again
    # Where the placement changed, the rollout moves replicas; else the node changed (its labels, its role). A global
    # service has nothing to move: what does not belong on a node any more just stops.
    if (view.is_global or task.spec.placement == view.spec.task.placement) and not view.fits_on(node):
        return f"node {name} no longer satisfies the placement constraints"
    if not view.has_room_for(node, task):
        return f"node {name} no longer has the resources that were reserved there"
    return None


def _leaves_in_turn(view: View, task: Task) -> bool:
    """What serves leaves a drained node within the service's budget (moves.py); the rest at once."""
    return not view.is_global and not view.is_job and task.status.state == pb.TASK_RUNNING


def replace_ended(view: View) -> None:
    """Give up each task that ended or cannot stay, with its replacement where the policy wants one."""
    for slot in view.slots.values():
        if slot.settled:
            continue
        runnable = slot.runnable
        for task in runnable:
            if view.is_job and task.status.state == pb.TASK_COMPLETE:
                continue
            moved = None
            if task.status.state not in states.STOPPED_BY_ITSELF:
                moved = misplaced(view, task, view.node_of(task))
            elif _is_early(view, slot, task):
                continue
            if moved or states.has_stopped(task):
                _replace(view, slot, task, moved)
                break
        if len(runnable) > 1 and not slot.settled:
            _keep_one(view, slot)


def _is_early(view: View, slot: Slot, task: Task) -> bool:
    """A replacement that was rejected while it waited its delay is replaced when that delay is over, not sooner:
    else what cannot be prepared at all (a missing image, say) is tried as fast as nodes can refuse it."""
    if task.desired_state != pb.TASK_READY or is_outdated(view, task):
        return False
    at = _promotion_at(view, slot, slot.tasks.index(task))
    if at > view.now:
        view.wake(at)
    return at > view.now


def _replace(view: View, slot: Slot, task: Task, moved: str | None) -> None:
    why = moved or describe_end(task)
    stop = view.stop(task, why)
    others = [other for other in slot.runnable if other.id != task.id and not states.has_stopped(other)]
    if any(not is_outdated(view, other) for other in others):
        view.act(slot, stop)  # start-first: its successor is there already
        return
    refused = refusal(view.spec.task.restart, slot, task)
    if refused:
        view.act(slot, view.stop(task, f"{why}; {refused}"))
        return
    if not may_start_in(view, slot):
        view.act(slot, stop)
        return
    policy = view.spec.task.restart
    failures = failures_up_to(policy, task)
    delay_s = backoff_s(policy, failures) if moved is None else 0.0
    desired = pb.TASK_READY if delay_s > 0 or not view.is_gone(task) else pb.TASK_RUNNING
    loop = f"; failure {failures} in a row: waits {delay_s:g} s" if failures > FREE_FAILURES and delay_s else ""
    view.act(slot, stop, view.create(slot, desired, f"replaces {task.id}: {why}{loop}", failures))


def may_start_in(view: View, slot: Slot) -> bool:
    """A global service's slot is its node: nothing new starts on one that is not READY and ACTIVE, or does not fit."""
    if not isinstance(slot.key, str):
        return True
    node = view.store.nodes.get(slot.key)
    return node is not None and states.takes_tasks(node) and view.fits_on(node)


def _keep_one(view: View, slot: Slot) -> None:
    """Two up-to-date tasks in one slot (two leaders' work, say): the one that is further on stays."""
    current = [task for task in slot.runnable if not is_outdated(view, task)]
    ids = {task.id for task in current}
    if len(current) < 2 or any(task.replaces in ids for task in current):  # one that moves: see moves.py
        return
    best = max(current, key=lambda task: (task.status.state, task.desired_state, task.id))
    changes: list[Change] = [view.stop(task, f"{best.id} runs in this slot") for task in current if task is not best]
    view.act(slot, *changes)


def promote(view: View) -> None:
    """Let replacements that stand READY run: after the delay, and once their predecessor has stopped."""
    for slot in view.slots.values():
        if slot.settled:
            continue
        for index, task in enumerate(slot.tasks):
            if task.desired_state != pb.TASK_READY:
                continue
            at = _promotion_at(view, slot, index)
            if at <= view.now:
                view.act(slot, view.promote(task))
            else:
                view.wake(at)


def _promotion_at(view: View, slot: Slot, index: int) -> float:
    """When the task may run at the earliest, as far as known now (the predecessor's end changes it)."""
    task = slot.tasks[index]
    created_at = task.meta.created_at
    at = created_at
    before = slot.tasks[index - 1] if index else None
    if (
        before is not None
        and before.status.state in states.STOPPED_BY_ITSELF
        and before.spec_version == task.spec_version  # else a rollout replaced it: its own delay applies
    ):
        at = created_at + backoff_s(view.spec.task.restart, task.failures_before)
    for other in slot.tasks:
        if not states.is_runnable(other) and not view.is_gone(other):
            container = other.spec.container
            grace_s = container.stop_grace_period_s if container.HasField("stop_grace_period_s") else GRACE_S
            at = max(at, created_at + STOP_WAIT_S + grace_s)
    return at
