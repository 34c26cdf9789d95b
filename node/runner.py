"""One task's life: asks `steps` what to do, does it, records what came of it. A level-triggered loop: `changed`
wakes it, the facts are gathered anew, and nothing is remembered that a restarted agent could not find again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from dns.interface import DnsError
from node import drain, inputs, steps
from node import shell as limits
from node.awaiting import both, either, within
from node.health import HEALTHY, UNHEALTHY, Check, Health, check_of, complaint, merged
from node.interface import ContainerStatus, ImageFault, Phase, RuntimeFault
from node.prober import Prober
from node.resolvers import search_domains
from node.shell import Shell
from node.steps import Action, Facts, Outcome
from overlay.interface import Attachment, NetworkError
from proto.agent_pb2 import TaskRecord
from proto.objects_pb2 import HOST, TASK_FAILED, TASK_READY, TASK_RUNNING, TASK_SHUTDOWN, Task, TaskStatus

log = structlog.get_logger()

T = TypeVar("T")
U = TypeVar("U")


class _Ending(Exception):
    """The task is no longer wanted: stop waiting and ask what to do now."""


class TaskRunner:
    def __init__(self, shell: Shell, record: TaskRecord, phase: Phase | None, attached: bool) -> None:
        """`phase`, `attached`: what an earlier process left standing. The record's status is the last observed."""
        self.task = task = record.task
        self.status: TaskStatus = task.status
        self.assigned = True
        self.removed = False
        """True once everything of the task has been reclaimed."""
        self.image_id = record.image_id
        self._health = record.health
        self._check = check_of(record.health)
        self.phase = phase
        self._shell = shell
        self._attached = attached
        self._home = ""  # the task in whose network namespace it lives, which is itself; "" = in the host's
        self._changed = asyncio.Event()
        self._ending = asyncio.Event()
        self._adoption: asyncio.Task[None] | None = None
        self._actions: dict[Action, Callable[[], Coroutine[Any, Any, None]]] = {
            Action.PREPARE: self._prepare,
            Action.START: self._start,
            Action.WATCH: self._watch,
            Action.STOP: self._stop,
            Action.RELEASE: self._release,
            Action.REMOVE: self._remove,
        }
        self._note_ending()
        self._shell.world.states[task.id] = self.status.state
        if attached and record.given_address:
            self._shell.world.given[task.id] = record.given_address

    # ------------------------------------------------------------ what the agent says

    def assign(self, task: Task) -> None:
        """The task as the managers want it now (desired state, in practice). Their view of the observed state
        counts only where it is ahead of ours."""
        if task.status.state > self.status.state:
            self.status = task.status
            self._shell.world.states[task.id] = self.status.state
        if self.task.desired_state != task.desired_state or not self.assigned:
            self.assigned = True
            self.task = task
            if not steps.ended(self.status.state):
                self._save()
        self._note_ending()
        self._keep_names()
        self._changed.set()

    def withdraw(self) -> None:
        """The managers took the task away: stop it and reclaim everything."""
        self.assigned = False
        self._note_ending()
        self._keep_names()
        self._changed.set()

    def _note_ending(self) -> None:
        gone = not self.assigned or steps.ended(self.status.state)
        if gone or self.task.desired_state >= TASK_SHUTDOWN:
            self._ending.set()
        else:
            self._ending.clear()

    @property
    def grace_s(self) -> float:
        return inputs.stop_grace_s(self.task)

    def snapshot(self) -> Task:
        """A copy of the task with the status observed last."""
        copy = Task()
        copy.CopyFrom(self.task)
        copy.status.CopyFrom(self.status)
        return copy

    def facts(self) -> Facts:
        return Facts(self.status.state, self.task.desired_state, self.assigned, self.phase, self._attached)

    # ------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Until the task is removed. Cancelling leaves everything as it stands, as kill -9 would."""
        try:
            await self._live()
        finally:
            if self._adoption is not None:
                self._adoption.cancel()
                await asyncio.gather(self._adoption, return_exceptions=True)

    async def _live(self) -> None:
        self._adopt()
        attempts = 0
        while True:
            self._changed.clear()
            step = steps.next_step(self.facts())
            if step.enter is not None:
                self._enter(Outcome(step.enter))
            if step.action is Action.PARK:
                await self._changed.wait()
            elif step.action is Action.LOSE:
                self._enter(steps.after_loss(self.status.state))
            elif step.action in self._actions:
                error = await self._attempt(step.action)
                if error is None:
                    attempts = 0
                    if not self.assigned and step.action is Action.REMOVE:
                        return
                    continue
                attempts += 1
                await self._after_fault(step.action, error, attempts)

    async def _attempt(self, action: Action) -> Exception | None:
        try:
            await self._actions[action]()
        except _Ending:
            return None
        except (RuntimeFault, ImageFault, NetworkError, DnsError, OSError) as error:
            return error
        except Exception as error:
            log.exception("a step of a task raised what it must not", task=self.task.id, action=action.name)
            return RuntimeFault(f"internal error in {action.name.lower()}: {type(error).__name__}: {error}")
        return None

    async def _after_fault(self, action: Action, error: Exception, attempts: int) -> None:
        permanent = not isinstance(error, RuntimeFault) or error.permanent
        outcome = steps.after_fault(self.status.state, action, str(error), permanent, attempts)
        if outcome is not None:
            self._enter(outcome)
            return
        log.warning("a step of a task failed: trying again", task=self.task.id, action=action.name, reason=str(error))
        try:
            async with asyncio.timeout(steps.retry_delay_s(attempts)):
                await self._changed.wait()
        except TimeoutError:
            return

    def _enter(self, outcome: Outcome, pid: int = 0, health: str = "") -> None:
        self.status = TaskStatus(
            state=outcome.state,
            timestamp=self._shell.now(),
            message=steps.MESSAGES[outcome.state],
            err=outcome.err,
            pid=pid,
            exit_code=outcome.exit_code or 0,
            container_id=self.task.id if self.phase is not None else "",
            health=health if self._check is not None else "",
        )
        self._tell()

    def _tell(self) -> None:
        self._save()
        has_host_ports = any(port.mode == HOST for port in self.task.endpoint.ports)
        self._shell.observed(self.task.id, self.status, has_host_ports)

    def _save(self) -> None:
        try:
            given = self._shell.world.given.get(self.task.id, "")
            record = TaskRecord(task=self.snapshot(), image_id=self.image_id, health=self._health, given_address=given)
            self._shell.files.save(record)
        except OSError as error:
            # Not fatal: a restarted agent then finds the container and asks the managers about the rest.
            log.warning("task file could not be written", task=self.task.id, reason=str(error))

    # ------------------------------------------------------------ adopting what an earlier process left

    def _adopt(self) -> None:
        """Take over the namespace of a container that exists, beside whatever the next step is."""
        if self.phase in (Phase.CREATED, Phase.RUNNING) and self._attached and not steps.ended(self.status.state):
            self._adoption = asyncio.create_task(self._adopt_namespace())
            self._keep_names()

    def _keep_names(self) -> None:
        """The name server serves the namespace from before: the pictures that it gets while hundreds of namespaces
        are taken over, which takes seconds, have it too."""
        adoption, world = self._adoption, self._shell.world
        if adoption is None or adoption.done() or adoption.cancelling() or not world.mirror.known:
            return
        attachment = world.attachment(self.task)
        if attachment is not None:
            self._name(self._shell.network.namespace(self.task.id), attachment)
            self._shell.names.poke()

    def _name(self, netns: Path, attachment: Attachment) -> None:
        if attachment.interfaces:
            search = search_domains(self.task.spec.container.dns_search)
            self._shell.world.sandboxes[self.task.id] = inputs.sandbox(self.task, netns, attachment, search)

    async def _adopt_namespace(self) -> None:
        attempts = 0
        while True:
            try:
                await self._wire()
            except (NetworkError, OSError, RuntimeFault) as error:
                log.warning("namespace not taken over yet", task=self.task.id, reason=str(error))
                attempts += 1
                await asyncio.sleep(steps.retry_delay_s(attempts))
            else:
                return

    # ------------------------------------------------------------ the actions

    async def _wire(self) -> Path | None:
        """The task's namespace on its networks, and in the picture of names; None: it lives in the host's.
        Raises NetworkError."""
        shell, world = self._shell, self._shell.world
        await shell.networks_ready(inputs.network_ids(self.task))
        attachment = world.attachment(self.task)
        self._attached = True
        if attachment is None:
            return None
        netns = await within(shell.network.attach(attachment), limits.ATTACH_DEADLINE_S, "attaching to networks")
        self._home = self.task.id
        if not all(interface.address for interface in attachment.interfaces):
            world.given[self.task.id] = await within(
                shell.network.given_address(self.task.id), limits.ATTACH_DEADLINE_S, "asking for the task's address"
            )
            shell.networks.poke()
        self._name(netns, attachment)
        return netns

    async def _wire_in_slot(self) -> Path | None:
        await self._shell.networks_ready(inputs.network_ids(self.task))
        async with self._shell.slots:
            return await self._wire()

    async def _prepare(self) -> None:
        """Image and namespace at once, then the container, while the name server learns of the namespace:
        it must answer there before the first process asks."""
        shell, spec = self._shell, self.task.spec.container
        if self.phase is Phase.EXITED:  # its monitor died before it ever ran
            await within(shell.runtime.remove(self.task.id), limits.REMOVE_DEADLINE_S, "removing the container")
            self.phase = None
        netns, image = await self._unless_ending(
            both(self._wire_in_slot(), shell.image(spec.image, spec.registry_auth))
        )
        self.image_id = image.image_id
        self._health = merged(spec.health, image.config.health)
        self._check = check_of(self._health)
        named = shell.names.poke()
        world = shell.world
        request = inputs.create_request(self.task, image, netns, world.description, world.node.spec.annotations.labels)
        if self.task.id in world.given:
            request = replace(request, addresses=(*request.addresses, world.given[self.task.id]))
        async with shell.slots:
            if self._ending.is_set():
                raise _Ending
            self.phase = Phase.CREATED
            await within(shell.runtime.create(request), limits.CREATE_DEADLINE_S, "creating the container")
        await self._unless_ending(self._names_settled(named))
        if self.status.state < TASK_READY:
            self._enter(Outcome(TASK_READY))

    async def _names_settled(self, generation: int) -> None:
        try:
            async with asyncio.timeout(limits.NAMES_DEADLINE_S):
                await self._shell.names.settled(generation)
        except TimeoutError:
            reason = self._shell.names.error or "no answer"
            raise DnsError(
                f"the name server does not serve the task after {limits.NAMES_DEADLINE_S:g} s: {reason}"
            ) from None

    async def _start(self) -> None:
        if self._adoption is not None:
            await self._unless_ending(asyncio.shield(self._adoption))
        async with self._shell.slots:
            if self._ending.is_set():
                return
            status = await within(
                self._shell.runtime.start(self.task.id), limits.START_DEADLINE_S, "starting the container"
            )
        self.phase = status.phase
        if status.phase is Phase.CREATED:
            raise RuntimeFault("the container did not start and gave no reason", permanent=False)
        health = ""
        if self._check is not None and status.phase is Phase.RUNNING:
            turned = await self._turned(self._check, Health())
            if turned is None:
                self.phase = Phase.EXITED  # before it was healthy, so it never ran: what that means is for WATCH
                return
            if turned.status == UNHEALTHY:
                await self._fail_unhealthy(self._check, turned)
                return
            health = turned.status
        elif ports := inputs.published_tcp_ports(self.task):
            await self._unless_ending(drain.listens(self._shell.network, self._home, ports, status.pid))
        self._enter(Outcome(TASK_RUNNING), pid=status.pid, health=health)

    async def _turned(self, check: Check, health: Health) -> Health | None:
        prober = Prober(self._shell, self.task.id, check, self._note_failure)
        return await self._unless_ending(prober.turned(health, self.status.timestamp))

    def _note_failure(self, health: Health) -> None:
        """So that `service ps` says what a task that does not become healthy waits for."""
        assert self._check is not None
        status = TaskStatus()
        status.CopyFrom(self.status)
        status.err = complaint(self._check, health)
        self.status = status
        self._tell()

    async def _fail_unhealthy(self, check: Check, health: Health) -> None:
        status = await self._halt(drain=False)  # whoever is sent to it gets no answer anyway
        await self._release()
        code = status.exit_code if status is not None else None
        self._enter(Outcome(TASK_FAILED, complaint(check, health), code), health=health.status)

    async def _watch(self) -> None:
        if self._check is not None and self.phase is Phase.RUNNING:
            turned = await self._turned(self._check, Health(HEALTHY))
            if turned is not None:
                await self._fail_unhealthy(self._check, turned)
                return
        # No deadline: a service runs for years; the monitor's own death ends the wait as well.
        status = await self._unless_ending(self._shell.runtime.wait(self.task.id))
        self.phase = status.phase
        if status.phase is Phase.EXITED:
            await self._release()
            self._enter(steps.after_exit(status))

    async def _stop(self) -> None:
        status = await self._halt()
        await self._release()
        if not steps.ended(self.status.state):
            self._enter(Outcome(TASK_SHUTDOWN, exit_code=status.exit_code if status is not None else None))

    async def _remove(self) -> None:
        await self._halt()
        await within(self._shell.runtime.remove(self.task.id), limits.REMOVE_DEADLINE_S, "removing the container")
        self.phase = None
        await self._release()
        if self.assigned:
            return  # assigned again meanwhile: what is missing will be found missing
        self._shell.files.remove(self.task.id)
        self.removed = True
        self._shell.forget(self.task.id)

    async def _halt(self, drain: bool = True) -> ContainerStatus | None:
        """Drain, then end the container however far it is. Returns what is left of it."""
        runtime = self._shell.runtime
        status = await within(runtime.status(self.task.id), limits.STATUS_DEADLINE_S, "reading the container's status")
        if status is not None and status.phase is Phase.RUNNING:
            if drain and self.status.state == TASK_RUNNING:
                await self._drain()
            grace_s = inputs.stop_grace_s(self.task)
            status = await within(
                runtime.stop(self.task.id, "", grace_s), grace_s + limits.STOP_MARGIN_S, "stopping the container"
            )
        elif status is not None and status.phase is Phase.CREATED:
            # It never ran: there is nothing to end gracefully and no log to keep.
            await within(runtime.remove(self.task.id), limits.REMOVE_DEADLINE_S, "removing the container")
            status = None
        self.phase = status.phase if status is not None else None
        return status

    async def _drain(self) -> None:
        """Out of every balancer, then until open connections have ended; see node/drain.py. Skipped when this host
        leaves the swarm (nobody would notice), and its first half when the managers forgot the task."""
        shell = self._shell
        if shell.leaving or not inputs.drains(self.task, shell.world.ingress_ids()):
            return
        exited = asyncio.create_task(shell.runtime.wait(self.task.id))
        try:
            if self.assigned:
                await either(exited, shell.releases.wait(self.task.id), drain.RELEASE_MAX_S)
            if not exited.done():
                await either(exited, drain.quiet(shell.network, self._home), drain.CONNECTIONS_MAX_S)
        finally:
            exited.cancel()
            await asyncio.gather(exited, return_exceptions=True)

    async def _release(self) -> None:
        if self._adoption is not None:
            self._adoption.cancel()
        self._shell.world.sandboxes.pop(self.task.id, None)
        self._shell.world.given.pop(self.task.id, None)
        self._shell.names.poke()
        if self._attached:
            await within(self._shell.network.detach(self.task.id), limits.ATTACH_DEADLINE_S, "detaching from networks")
        self._attached = False
        self._home = ""

    async def _unless_ending(self, awaitable: Awaitable[T]) -> T:
        """The result, unless the task is to end before there is one: then `_Ending`."""
        work: asyncio.Future[T] = asyncio.ensure_future(awaitable)
        ending = asyncio.create_task(self._ending.wait())
        try:
            watched: set[asyncio.Future[Any]] = {work, ending}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _Ending
            return work.result()
        finally:
            ending.cancel()
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
