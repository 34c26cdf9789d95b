"""All tasks of this node: one runner each. Adopts what an earlier process left, follows the mirror, and knows what
is left over (containers and namespaces that belong to no assigned task)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from node import shell as limits
from node.interface import ContainerStatus, Phase
from node.mirror import Mirror
from node.runner import TaskRunner
from node.shell import Shell
from proto.agent_pb2 import TaskRecord
from proto.objects_pb2 import TASK_RUNNING, Task

log = structlog.get_logger()

LIST_DEADLINE_S = 60.0
"""Reading back all containers of a full host after a cold start."""
LEAVE_MARGIN_S = 60.0
"""On top of the longest grace period: removing some hundred containers."""


class TaskSet:
    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._runners: dict[str, TaskRunner] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._found: dict[str, ContainerStatus] = {}
        self._attached: set[str] = set()
        self.adopted = False

    async def adopt(self) -> None:
        """Take over what stands on this host. Needs no manager. Again only after `stop`."""
        if self.adopted:
            return
        async with asyncio.timeout(LIST_DEADLINE_S):
            found = await self._shell.runtime.containers()
            self._attached = set(await self._shell.network.attached())
        self._found = {status.task_id: status for status in found}
        self.adopted = True
        records = self._shell.files.load()
        log.info("tasks are taken over", tasks=len(records), containers=len(found), namespaces=len(self._attached))
        for record in records:
            runner = self._start(record)
            self._shell.statuses.record(record.task.id, runner.status)

    def follow(self, mirror: Mirror, touched: Iterable[str], complete: bool) -> None:
        """Start, change or withdraw the touched tasks. `complete`: the mirror comes from a snapshot, so whatever it
        does not name is not ours any more."""
        for task_id in touched:
            task = mirror.task(task_id)
            if task is not None:
                self._assign(task)
            elif task_id in self._runners:
                self._runners[task_id].withdraw()
        if complete:
            self._withdraw_all(keep=frozenset(task.id for task in mirror.tasks()))

    def _withdraw_all(self, keep: frozenset[str]) -> None:
        for task_id, runner in self._runners.items():
            if task_id not in keep:
                runner.withdraw()
        for task_id in sorted((self._found.keys() | self._attached) - keep - self._runners.keys()):
            self._start(TaskRecord(task=Task(id=task_id))).withdraw()

    def _assign(self, task: Task) -> None:
        runner = self._runners.get(task.id)
        if runner is not None:
            runner.assign(task)
        else:
            self._start(TaskRecord(task=task))

    def _start(self, record: TaskRecord) -> TaskRunner:
        task = record.task
        # What was found is used up: a later task of the same ID (assigned again after its removal) starts anew.
        found = self._found.pop(task.id, None)
        attached = task.id in self._attached
        self._attached.discard(task.id)
        runner = TaskRunner(self._shell, record, found.phase if found is not None else None, attached)
        self._runners[task.id] = runner
        life = asyncio.create_task(runner.run(), name=f"task {task.id}")
        self._running[task.id] = life
        life.add_done_callback(lambda done: self._ended(task.id, runner, done))
        return runner

    def _ended(self, task_id: str, runner: TaskRunner, life: asyncio.Task[None]) -> None:
        if self._runners.get(task_id) is not runner:
            return
        self._running.pop(task_id, None)
        if not life.cancelled() and (error := life.exception()) is not None:
            log.error("a task's runner broke off: the next snapshot starts it again", task=task_id, exc_info=error)
        del self._runners[task_id]
        wanted = self._shell.world.mirror.task(task_id)
        if runner.removed and wanted is not None and not self._shell.leaving:
            self._start(TaskRecord(task=wanted))  # assigned again in the moment in which its removal ended

    async def stop(self) -> None:
        """End the runners; containers, namespaces and files stay for the next process."""
        lives = list(self._running.values())
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        self._runners.clear()
        self._running.clear()
        self.adopted = False

    async def remove_all(self) -> list[str]:
        """Stop and reclaim every task and leftover. Returns the IDs of those that could not be removed in time."""
        self._shell.leaving = True
        self._withdraw_all(keep=frozenset())
        lives = list(self._running.values())
        if lives:
            await asyncio.wait(lives, timeout=self._longest_grace_s() + LEAVE_MARGIN_S)
        return sorted(self._runners)

    def _longest_grace_s(self) -> float:
        return max((runner.grace_s for runner in self._runners.values()), default=limits.STOP_MARGIN_S)

    def tasks(self) -> list[Task]:
        """Copies, each with the status observed last, by ID."""
        return [self._runners[task_id].snapshot() for task_id in sorted(self._runners)]

    def has(self, task_id: str) -> bool:
        return task_id in self._runners

    def runs(self, task_id: str) -> bool:
        """Its container runs, so that a command can run in it."""
        return task_id in self._runners and self._runners[task_id].phase is Phase.RUNNING

    def running_count(self) -> int:
        return sum(runner.status.state == TASK_RUNNING for runner in self._runners.values())

    def image_ids(self) -> frozenset[str]:
        """Images that containers of this host stand on; also those of ended tasks, whose files remain until removal."""
        return frozenset(r.image_id for r in self._runners.values() if r.image_id and r.phase in tuple(Phase))
