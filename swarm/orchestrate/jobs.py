"""Jobs: each slot's task is to complete once per iteration; an update of the service begins the next iteration.

A task that fails is replaced as the restart policy says (`any` means on-failure here). An execution on a node that
is lost is repeated elsewhere, so it may run twice: completed is a slot when one of its tasks has said so.
"""

from __future__ import annotations

from proto import objects_pb2 as pb
from swarm.orchestrate.restart import is_given_up
from swarm.orchestrate.view import Slot, View
from swarm.store import states


def clear(view: View) -> None:
    """Former iterations go; where a lost node turns out to have completed its task, the repetition is stopped."""
    iteration = view.service.job_status.iteration
    for slot in view.slots.values():
        former = [task for task in slot.tasks if task.job_iteration != iteration]
        if former:
            view.act(slot, *(view.discard(task, f"iteration {iteration} of the job has begun") for task in former))
        elif view.is_done(slot):
            surplus = [task for task in slot.runnable if not states.has_stopped(task)]
            if surplus:
                view.act(slot, *(view.stop(task, "this execution has completed on another node") for task in surplus))


def start(view: View) -> None:
    """A replicated job: begin executions, the lowest numbers first, as many as may be under way together."""
    wanted = view.spec.replicated_job.total_completions
    limit = view.spec.replicated_job.max_concurrent or wanted
    room = limit - sum(1 for slot in view.slots.values() if slot.runnable and not view.is_done(slot))
    for number in range(1, wanted + 1):
        if room <= 0:
            return
        slot = view.slots.get(number) or Slot(number)
        if slot.settled or slot.runnable or view.is_done(slot) or is_given_up(view, slot):
            continue
        view.slots[number] = slot
        view.act(slot, view.create(slot, pb.TASK_RUNNING, f"execution {number} of {wanted}"))
        room -= 1
