"""The agent: everything of one node but membership. Composes the session, the mirror, the tasks and the appliers.

It re-adopts first, from what the runtime, the network and the task files show, and only then looks for a manager.
Without managers it keeps every container running, starts nothing on its own, and remembers what it will
have to report. Killing it at any instant costs nothing but time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import structlog

from dns.interface import DnsError, NameServer
from node import inputs
from node.commands import Commands
from node.doctor import Examiner
from node.interface import Images, Runtime, RuntimeFault
from node.logrelay import LogRelay
from node.mirror import applied, touched_tasks
from node.outbox import Outbox
from node.session import Session
from node.shell import NAMES_APPLY_DEADLINE_S, NETWORK_APPLY_DEADLINE_S, Shell
from node.taskfiles import TaskFiles
from node.tasks import TaskSet
from node.world import World
from overlay.interface import EncryptionKey, EncryptionStatus, HostNetwork, NetworkError
from proto.dispatch_pb2 import AgentHello, Assignments, Examination, ExecInput, LogRequest, Welcome
from proto.objects_pb2 import NetworkKey, Node, NodeDescription, Task

log = structlog.get_logger()

AUDIT_PERIOD_S = 4.0
"""Networks and names are applied again this often though nothing changed: whatever another hand broke is
repaired within 5 s."""
ROTATE_PERIOD_S = 5.0
"""A container that writes 100 MB/s overshoots its log limit by half a gigabyte between two looks; one that writes
as applications do, by nothing worth mentioning."""
ROTATE_DEADLINE_S = 30.0


class LeaveIncomplete(Exception):
    """Something of this node could not be removed; the message says what, why, and that leaving again retries."""


class Agent:
    def __init__(
        self,
        *,
        node_id: str,
        state_dir: Path,
        runtime: Runtime,
        images: Images,
        network: HostNetwork,
        names: NameServer,
        open_channel: Callable[[str], grpc.aio.Channel],
        managers: list[str],
        on_managers: Callable[[list[str]], None],
        on_node: Callable[[Node], None],
        describe: Callable[[], NodeDescription],
        advertise_host: str,
        data_path_addr: str,
        upstreams: Callable[[], tuple[str, ...]],
        now: Callable[[], float],
        rng: random.Random | None = None,
    ) -> None:
        """`managers`: mTLS addresses host:port. `data_path_addr`: this node's VTEP, "" = `advertise_host`.
        `on_managers` (persist them), `on_node` (role, availability) and `describe` must return at once."""
        self._runtime = runtime
        self._network = network
        self._names = names
        self._on_managers = on_managers
        self._on_node = on_node
        self._advertise_host = advertise_host
        self._outbox = Outbox()
        self._world = World(node_id, data_path_addr or advertise_host, upstreams, describe)
        self._shell = Shell(
            world=self._world,
            runtime=runtime,
            images=images,
            network=network,
            names=names,
            files=TaskFiles(state_dir),
            statuses=self._outbox.statuses,
            report=self._outbox.poke,
            now=now,
        )
        self._tasks = TaskSet(self._shell)
        self._logs = LogRelay(runtime, node_id, self._tasks.has, self._outbox.put_log)
        self._commands = Commands(runtime, self._tasks.runs, self._outbox.put_exec)
        self._examiner = Examiner(network, self._world, self._shell, lambda: names.pid, self._outbox.put_examined)
        self._session = Session(
            open_channel=open_channel,
            managers=managers,
            hello=self._hello,
            outbox=self._outbox,
            handler=_Handler(self),
            rng=rng or random.Random(),
        )
        self._told_encryption = EncryptionStatus(False, 0)
        self._sessions_lost = 0
        self._to_confirm = 0
        self._confirm = asyncio.Event()
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._stopped.set()

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Re-adopt, then serve until `stop` or `leave`. Raises what a broken part raises: another agent should
        then follow, which disturbs no container."""
        self._stopped.clear()
        try:
            await self._tasks.adopt()
            parts = (
                self._session.run(),
                self._shell.networks.run(),
                self._shell.names.run(),
                self._confirm_assignments(),
                self._tell_encryption(),
                _every(AUDIT_PERIOD_S, self._audit),
                _every(ROTATE_PERIOD_S, self._rotate_logs),
            )
            await _until(self._stopping, parts)
        finally:
            await self._logs.close()
            await self._commands.close()
            await self._examiner.close()
            await self._tasks.stop()
            await self._shell.close()
            self._stopped.set()

    async def stop(self) -> None:
        """End `run` and return when it has ended; containers, networks and names stay as they are."""
        self._stopping.set()
        await self._stopped.wait()

    async def leave(self) -> None:
        """End `run`, stop and remove every task of this host, its networks and its name server.
        Raises LeaveIncomplete; calling it again tries again."""
        await self.stop()
        await self._tasks.adopt()
        left = await self._tasks.remove_all()
        await self._tasks.stop()
        problems = [f"tasks {', '.join(left)} could not be removed (see the daemon's log)"] if left else []
        for what, work, deadline_s in (
            ("networks", self._network.teardown, NETWORK_APPLY_DEADLINE_S),
            ("name server", self._names.stop, NAMES_APPLY_DEADLINE_S),
        ):
            try:
                async with asyncio.timeout(deadline_s):
                    await work()
            except (NetworkError, DnsError, OSError, TimeoutError) as error:
                problems.append(f"{what}: {error or f'not done within {deadline_s:g} s'}")
        if problems:
            raise LeaveIncomplete(f"this node has left but {'; '.join(problems)}: leave again to retry")

    # ------------------------------------------------------------ what others ask

    @property
    def manager(self) -> str:
        """host:port of the leader with which there is a session, "" = none at the moment."""
        return self._session.connected_to

    @property
    def managers(self) -> list[str]:
        return list(self._session.managers)

    @property
    def node(self) -> Node:
        """Own node object as last heard; empty before the first session of this process."""
        return self._world.node

    def tasks(self) -> list[Task]:
        """Copies of this node's tasks with the status observed last."""
        return self._tasks.tasks()

    def running_count(self) -> int:
        return self._tasks.running_count()

    def image_ids(self) -> frozenset[str]:
        """Images in use by containers of this host: `in_use` of Images.remove."""
        return self._tasks.image_ids()

    def volume_names(self) -> frozenset[str]:
        """Named volumes that tasks of this host want, whether they exist yet or not."""
        world, labels = self._world, self._world.node.spec.annotations.labels
        return frozenset().union(*(inputs.volume_names(task, world.description, labels) for task in self.tasks()))

    # ------------------------------------------------------------ parts

    def _hello(self) -> AgentHello:
        return AgentHello(description=self._world.describe(), advertise_host=self._advertise_host)

    async def _audit(self) -> None:
        self._shell.networks.poke(force=True)
        self._shell.names.poke(force=True)

    async def _rotate_logs(self) -> None:
        try:
            async with asyncio.timeout(ROTATE_DEADLINE_S):
                await self._runtime.rotate_logs()
        except (RuntimeFault, OSError, TimeoutError) as error:
            log.warning("logs could not be rotated: trying again", reason=str(error) or "deadline passed")

    def _poke(self) -> None:
        self._shell.networks.poke()
        self._shell.names.poke()

    async def _confirm_assignments(self) -> None:
        """Tell the managers once this host is as they said. Latest wins: a later sequence includes the earlier."""
        networks, names = self._shell.networks, self._shell.names
        while True:
            await self._confirm.wait()
            self._confirm.clear()
            sequence, session = self._to_confirm, self._sessions_lost
            await networks.settled(networks.poke())
            await names.settled(names.poke())
            if session == self._sessions_lost:  # another session counts from the beginning
                self._outbox.put_applied(sequence)

    async def _tell_encryption(self) -> None:
        """To the managers at once: the newest key that the kernel accepts, and, for the peers, another epoch."""
        network = self._network
        while True:
            await self._shell.networks.wait_until(lambda: network.encryption() != self._told_encryption)
            told, self._told_encryption = self._told_encryption, network.encryption()
            now = self._told_encryption
            if now.serial and now.serial != told.serial:
                self._outbox.put_keys_applied(now.serial)
            if (now.supported, now.epoch) != (told.supported, told.epoch):
                self._outbox.ask_hello()


class _Handler:
    """The session's words, turned into changes of the world. Apart from Agent so that its API stays small."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def on_welcome(self, welcome: Welcome) -> None:
        if welcome.data_path_port:
            self._agent._world.vxlan_port = welcome.data_path_port

    def on_assignments(self, message: Assignments) -> None:
        agent = self._agent
        before = agent._world.mirror
        after = applied(before, message)
        agent._world.mirror = after
        agent._tasks.follow(after, touched_tasks(before, message), message.snapshot)
        agent._poke()
        if message.confirm:
            agent._to_confirm = message.result
            agent._confirm.set()

    def on_released(self, task_ids: list[str]) -> None:
        self._agent._shell.releases.mark(task_ids)

    def on_keys(self, keys: list[NetworkKey]) -> None:
        self._agent._world.keys = tuple(EncryptionKey(key.serial, key.key) for key in keys)
        self._agent._poke()

    def on_managers(self, addrs: list[str]) -> None:
        self._agent._on_managers(list(addrs))

    def on_node(self, node: Node) -> None:
        self._agent._world.node = node
        self._agent._poke()
        self._agent._on_node(node)

    def on_exec(self, message: ExecInput) -> None:
        self._agent._commands.handle(message)

    def on_logs(self, request: LogRequest) -> None:
        self._agent._logs.handle(request)

    def on_examination(self, message: Examination) -> None:
        self._agent._examiner.handle(message)

    def on_lost(self) -> None:
        self._agent._logs.cancel_all()
        self._agent._commands.cancel_all()
        self._agent._examiner.cancel_all()
        self._agent._sessions_lost += 1
        self._agent._told_encryption = replace(self._agent._told_encryption, serial=0)


async def _every(period_s: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    while True:
        await asyncio.sleep(period_s)
        await work()


async def _until(stopping: asyncio.Event, parts: tuple[Coroutine[Any, Any, None], ...]) -> None:
    """Run the parts until `stopping` is set or one of them fails, which is raised."""
    tasks = [asyncio.create_task(part) for part in parts]
    stop = asyncio.create_task(stopping.wait())
    try:
        done, _ = await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stop}:
            task.result()
    finally:
        for task in (stop, *tasks):
            task.cancel()
        await asyncio.gather(stop, *tasks, return_exceptions=True)
