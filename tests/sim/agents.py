"""Simulated hosts: the real session, mirror, outbox and table of steps, over containers that are only pretended."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from node.interface import Phase
from node.mirror import TASK_PREFIX, Mirror, applied, touched_tasks
from node.outbox import Outbox
from node.session import Session
from node.steps import MESSAGES, Action, Facts, State, after_loss, ended, next_step
from proto import objects_pb2 as pb
from proto.dispatch_pb2 import AgentHello, Assignments, Examination, ExecInput, LogRequest, Welcome
from proto.objects_pb2 import NetworkKey, Node, NodeDescription, Task, TaskStatus
from tests.sim.calls import Call, Channel

PREPARE_S = (0.05, 0.8)
START_S = (0.02, 0.3)
STOP_S = (0.02, 1.5)
JOB_S = (0.2, 5.0)
NEVER_S = 1e9
CARDS = ("A", "B", "C")
"""Named resources that a sound host offers."""


def _of_tasks(message: Assignments) -> Assignments:
    """Networks are not simulated: what a thousand hosts would remember of each other is a million objects."""
    kept = Assignments(snapshot=message.snapshot, base=message.base, result=message.result, confirm=message.confirm)
    kept.changes.extend(change for change in message.changes if change.key.startswith(TASK_PREFIX))
    return kept


@dataclass
class Container:
    """One task on one host; survives the agent, but not the host's power."""

    task: Task
    status: TaskStatus
    phase: Phase | None = None
    is_attached: bool = False
    exits_at_s: float = NEVER_S
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Host:
    """`dial(host, addr)` opens a call to a manager; `fails()` draws whether a container misbehaves now."""

    def __init__(
        self,
        node_id: str,
        chance: random.Random,
        dial: Callable[[Host, str], Call],
        managers: list[str],
        fails: Callable[[], bool],
    ) -> None:
        self.node_id = node_id
        self.containers: dict[str, Container] = {}
        self.executions: dict[str, int] = {}
        """Of job tasks: how often each was run to its end."""
        self.cards: tuple[str, ...] = CARDS
        """What the agent finds when it starts."""
        self._chance = chance
        self._dial = dial
        self._managers = managers
        self._fails = fails
        self._life: _Life | None = None

    @property
    def is_up(self) -> bool:
        return self._life is not None

    def start(self) -> None:
        """The agent begins."""
        self._life = _Life(self, self._chance, self._dial, self._managers, self._fails)

    def kill_agent(self) -> None:
        if self._life is not None:
            self._life.end()
            self._life = None

    def power_off(self) -> None:
        self.kill_agent()
        for container in self.containers.values():
            container.phase, container.is_attached = None, False

    def running(self) -> set[str]:
        return {task_id for task_id, each in self.containers.items() if each.phase is Phase.RUNNING}

    def cards_in_use(self) -> list[str]:
        """One entry for each container that has it."""
        tasks = (each.task for each in self.containers.values() if each.phase is Phase.RUNNING)
        return [resource.id for task in tasks for resource in task.assigned_generic]


class _Life:
    """One agent process."""

    def __init__(
        self,
        host: Host,
        chance: random.Random,
        dial: Callable[[Host, str], Call],
        managers: list[str],
        fails: Callable[[], bool],
    ) -> None:
        self._host = host
        self._chance = chance
        self._fails = fails
        self._mirror = Mirror()
        self._outbox = Outbox()
        self._loop = asyncio.get_running_loop()
        self._running: dict[str, asyncio.Task[None]] = {}
        description = NodeDescription(hostname=host.node_id)
        description.platform.os, description.platform.architecture = "linux", "x86_64"
        description.resources.nano_cpus, description.resources.memory_bytes = 8 * 10**9, 16 << 30
        for card in host.cards:
            description.generic.add(kind="gpu", count=1, id=card)
        session = Session(
            open_channel=lambda addr: cast("Any", Channel(lambda: dial(host, addr))),
            managers=managers,
            hello=lambda: AgentHello(description=description, advertise_host="192.0.2.1"),
            outbox=self._outbox,
            handler=self,
            rng=chance,
        )
        self._session = self._loop.create_task(session.run())
        for task_id, container in host.containers.items():
            self._outbox.statuses.record(task_id, container.status)
            self._begin(task_id)

    def end(self) -> None:
        self._session.cancel()
        for task in self._running.values():
            task.cancel()

    # ---- what the session says

    def on_welcome(self, welcome: Welcome) -> None: ...

    def on_managers(self, addrs: list[str]) -> None: ...

    def on_node(self, node: Node) -> None: ...

    def on_released(self, task_ids: list[str]) -> None:
        pass

    def on_keys(self, keys: list[NetworkKey]) -> None:
        pass

    def on_exec(self, message: ExecInput) -> None:
        pass

    def on_logs(self, request: LogRequest) -> None: ...

    def on_examination(self, message: Examination) -> None: ...

    def on_lost(self) -> None: ...

    def on_assignments(self, message: Assignments) -> None:
        message = _of_tasks(message)
        touched = touched_tasks(self._mirror, message)
        self._mirror = applied(self._mirror, message)
        known = self._host.containers
        for task_id in dict.fromkeys((*touched, *(known if message.snapshot else ()))):
            assigned = self._mirror.task(task_id)
            if task_id in known:
                if assigned is not None:
                    known[task_id].task = assigned
                known[task_id].changed.set()
            elif assigned is not None:
                status = TaskStatus()
                status.CopyFrom(assigned.status)
                known[task_id] = Container(assigned, status)
                self._begin(task_id)

    # ---- tasks

    def _begin(self, task_id: str) -> None:
        self._running[task_id] = self._loop.create_task(self._live(task_id, self._host.containers[task_id]))

    async def _live(self, task_id: str, container: Container) -> None:
        while True:
            container.changed.clear()
            assigned = not self._mirror.known or self._mirror.task(task_id) is not None
            step = next_step(
                Facts(
                    container.status.state,
                    container.task.desired_state,
                    assigned,
                    container.phase,
                    container.is_attached,
                )
            )
            if step.enter is not None:
                self._record(task_id, container, step.enter)
            if step.action is Action.REMOVE:
                await self._stop(container)
                self._outbox.statuses.forget(task_id)
                del self._host.containers[task_id], self._running[task_id]
                return
            await self._do(task_id, container, step.action)

    async def _do(self, task_id: str, container: Container, action: Action) -> None:
        match action:
            case Action.PREPARE:
                await asyncio.sleep(self._chance.uniform(*PREPARE_S))
                if self._fails():
                    self._record(task_id, container, pb.TASK_REJECTED, "no such image")
                    return
                container.phase, container.is_attached = Phase.CREATED, True
                if container.status.state < pb.TASK_READY:
                    self._record(task_id, container, pb.TASK_READY)
            case Action.START:
                await asyncio.sleep(self._chance.uniform(*START_S))
                container.phase = Phase.RUNNING
                container.exits_at_s = self._exit_time(container)
                self._record(task_id, container, pb.TASK_RUNNING)
            case Action.WATCH:
                await self._watch(task_id, container)
            case Action.STOP:
                await self._stop(container)
                if not ended(container.status.state):
                    self._record(task_id, container, pb.TASK_SHUTDOWN)
            case Action.RELEASE:
                container.is_attached = False
            case Action.LOSE:
                self._record(task_id, container, pb.TASK_FAILED, after_loss(container.status.state).err)
            case Action.PARK:
                await container.changed.wait()
            case _:
                await asyncio.sleep(0)

    def _exit_time(self, container: Container) -> float:
        if container.task.desired_state == pb.TASK_COMPLETE or container.task.HasField("job_iteration"):
            return self._loop.time() + self._chance.uniform(*JOB_S)
        return self._loop.time() + self._chance.uniform(0.5, 20.0) if self._fails() else NEVER_S

    async def _watch(self, task_id: str, container: Container) -> None:
        try:
            async with asyncio.timeout_at(container.exits_at_s):
                await container.changed.wait()
            return
        except TimeoutError:
            container.phase, container.exits_at_s = Phase.EXITED, NEVER_S
        if container.task.HasField("job_iteration") and not self._fails():
            self._host.executions[task_id] = self._host.executions.get(task_id, 0) + 1
            self._record(task_id, container, pb.TASK_COMPLETE)
            return
        self._record(task_id, container, pb.TASK_FAILED, "task: non-zero exit (1)")

    async def _stop(self, container: Container) -> None:
        if container.phase in (Phase.CREATED, Phase.RUNNING):
            await asyncio.sleep(self._chance.uniform(*STOP_S))
            container.phase = Phase.EXITED
        container.is_attached = False

    def _record(self, task_id: str, container: Container, state: State, err: str = "") -> None:
        assert state >= container.status.state, "the agent went back in time"
        status = TaskStatus(state=state, timestamp=self._loop.time(), message=MESSAGES.get(state, ""), err=err)
        container.status = status
        self._outbox.statuses.record(task_id, status)
        self._outbox.poke()
