"""The life of one task on a node, as a table.

`next_step` looks at what is (facts) and says the one thing to do now; `after_exit`, `after_fault` say
what the result means. Nothing here waits, reads a clock or touches a container, so an agent that was
killed at any instant gathers the facts again, asks, and goes on where it stopped.

    ASSIGNED -> ACCEPTED -> PREPARING -> READY -> STARTING -> RUNNING -> COMPLETE | FAILED | SHUTDOWN
                              an error before STARTING: REJECTED; from STARTING on: FAILED

READY is where a task parks while its desired state is READY (the replacement of a rolling update).
The observed state only ever grows. Desired states: READY, RUNNING, COMPLETE (jobs), SHUTDOWN, REMOVE.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias

from node.interface import ContainerStatus, Phase
from proto.objects_pb2 import (
    TASK_ACCEPTED,
    TASK_ASSIGNED,
    TASK_COMPLETE,
    TASK_FAILED,
    TASK_NEW,
    TASK_PENDING,
    TASK_PREPARING,
    TASK_READY,
    TASK_REJECTED,
    TASK_RUNNING,
    TASK_SHUTDOWN,
    TASK_STARTING,
    TaskState,
)

State: TypeAlias = "TaskState.ValueType"

TEMPORARY_ATTEMPTS_MAX = 5
"""A temporary fault that repeats this often, a second or more apart, is the task's fate: a manager then
decides whether to try again, here or elsewhere, and users see the reason."""
RETRY_MIN_S = 1.0
RETRY_MAX_S = 10.0
"""Stopping and cleaning are retried for ever; this often is enough and does not fill the log."""


class Action(enum.Enum):
    PARK = "nothing to do until something changes"
    ACCEPT = "take note of the task"
    PREPARE = "image, network namespace, names, container: all short of running it"
    START = "run the container"
    WATCH = "wait for its exit"
    LOSE = "the container is gone: the task has failed"
    STOP = "drain, signal, wait, kill"
    RELEASE = "give back the network namespace of a task that has ended"
    REMOVE = "stop if needed, then reclaim everything; the task is no longer assigned"


@dataclass(frozen=True, slots=True)
class Facts:
    observed: State
    desired: State
    assigned: bool
    """False: the managers took the task from this node."""
    phase: Phase | None
    """Of the container; None = there is none."""
    attached: bool
    """There may be a network namespace."""


@dataclass(frozen=True, slots=True)
class Step:
    action: Action
    enter: State | None = None
    """Observed state to record before acting."""


# What a task that should live does next, by its observed state.
_FORWARD: dict[State, Step] = {
    TASK_NEW: Step(Action.ACCEPT, TASK_ACCEPTED),
    TASK_PENDING: Step(Action.ACCEPT, TASK_ACCEPTED),
    TASK_ASSIGNED: Step(Action.ACCEPT, TASK_ACCEPTED),
    TASK_ACCEPTED: Step(Action.PREPARE, TASK_PREPARING),
    TASK_PREPARING: Step(Action.PREPARE),
    TASK_READY: Step(Action.START, TASK_STARTING),
    TASK_STARTING: Step(Action.START),
    TASK_RUNNING: Step(Action.WATCH),
}
_WAITS_FOR_DESIRED = frozenset({TASK_ACCEPTED, TASK_READY})
"""These go on only if more is wanted than is; the others finish what they began."""

MESSAGES: dict[State, str] = {
    TASK_ACCEPTED: "accepted",
    TASK_PREPARING: "preparing",
    TASK_READY: "prepared",
    TASK_STARTING: "starting",
    TASK_RUNNING: "started",
    TASK_COMPLETE: "finished",
    TASK_SHUTDOWN: "shutdown",
    TASK_FAILED: "started",
    TASK_REJECTED: "preparing",
}
"""Docker's words, as `service ps` users and their scripts know them."""


def ended(state: State) -> bool:
    return state > TASK_RUNNING


def next_step(facts: Facts) -> Step:
    if not facts.assigned:
        return Step(Action.REMOVE)
    if ended(facts.observed):
        # A container can outlive its task's state: ORPHANED is written by a manager while this node is away.
        if facts.phase in (Phase.CREATED, Phase.RUNNING):
            return Step(Action.STOP)
        return Step(Action.RELEASE if facts.attached else Action.PARK)
    if facts.desired >= TASK_SHUTDOWN:
        return Step(Action.STOP)
    if facts.observed in _WAITS_FOR_DESIRED and facts.observed >= facts.desired:
        # Parked; but what was prepared must still stand, e.g. not after a reboot of the host.
        return Step(Action.PARK if facts.observed < TASK_READY or _stands(facts) else Action.PREPARE)
    if facts.observed == TASK_READY and not _stands(facts):
        return Step(Action.PREPARE)
    if facts.observed >= TASK_STARTING and facts.phase is None:
        return Step(Action.LOSE)
    if facts.observed == TASK_RUNNING and facts.phase is Phase.CREATED:
        return Step(Action.LOSE)
    if facts.observed == TASK_STARTING and facts.phase is Phase.EXITED:
        return Step(Action.WATCH)  # it ran and ended while the agent was away: never run it twice
    return _FORWARD[facts.observed]


def _stands(facts: Facts) -> bool:
    return facts.attached and facts.phase in (Phase.CREATED, Phase.RUNNING)


@dataclass(frozen=True, slots=True)
class Outcome:
    state: State
    err: str = ""
    exit_code: int | None = None


def after_exit(status: ContainerStatus) -> Outcome:
    """What the end of a container that was not told to stop means for its task."""
    if status.error:
        return Outcome(TASK_FAILED, f"task: {status.error}", status.exit_code)
    if status.exit_code == 0 and not status.oom_killed:
        return Outcome(TASK_COMPLETE, exit_code=0)
    why = ": out of memory, the limit is set by --limit-memory" if status.oom_killed else ""
    shown = "unknown" if status.exit_code is None else status.exit_code
    return Outcome(TASK_FAILED, f"task: non-zero exit ({shown}){why}", status.exit_code)


def after_loss(observed: State) -> Outcome:
    step = "before it started" if observed < TASK_RUNNING else "while the agent was away or by another hand"
    return Outcome(
        TASK_FAILED, f"task: its container is gone, removed {step} (reboot of the host, or its files deleted)"
    )


def after_fault(observed: State, action: Action, error: str, permanent: bool, attempts: int) -> Outcome | None:
    """The outcome of an action that raised, or None: try again later. `attempts` counts this one."""
    if action in (Action.STOP, Action.RELEASE, Action.REMOVE, Action.WATCH, Action.PARK):
        # Giving up would leave a container or an address behind, or forget a container that runs.
        return None
    if not permanent and attempts < TEMPORARY_ATTEMPTS_MAX:
        return None
    return Outcome(TASK_REJECTED if observed < TASK_STARTING else TASK_FAILED, error)


def retry_delay_s(attempts: int) -> float:
    return min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(attempts - 1, 10))
