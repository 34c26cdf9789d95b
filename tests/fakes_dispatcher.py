"""A Dispatcher on loopback whose words the test writes, and a host of fakes for one agent to run on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import grpc

from node.agent import Agent
from node.taskfiles import TaskFiles
from proto.agent_pb2 import TaskRecord
from proto.dispatch_pb2 import (
    AgentHello,
    AgentMessage,
    AssignmentChange,
    Assignments,
    HeartbeatReply,
    Item,
    LogChunk,
    ManagerMessage,
    NetworkEndpoint,
    StatusAck,
    Welcome,
)
from proto.dispatch_pb2_grpc import DispatcherServicer, add_DispatcherServicer_to_server
from proto.objects_pb2 import (
    DNSRR,
    TASK_ASSIGNED,
    TASK_RUNNING,
    Network,
    Node,
    NodeDescription,
    Platform,
    Task,
    TaskState,
    TaskStatus,
)
from tests.fakes import FakeImages, FakeNames, FakeNetwork, FakeRuntime, Gate
from tests.waiting import until

State: TypeAlias = "TaskState.ValueType"


class Manager(DispatcherServicer):
    """Leads unless `leads` is False. Acknowledges and answers heartbeats unless told otherwise."""

    def __init__(self) -> None:
        self.addr = ""
        self.leads = True
        self.leader_addr = ""
        """What a manager that does not lead knows."""
        self.answers_heartbeats = True
        self.acknowledges = True
        self.period_s = 0.2
        self.items: dict[str, Item] = {}
        self.hellos: list[AgentHello] = []
        self.calls = 0
        self.heartbeats = 0
        self.statuses: dict[str, list[TaskStatus]] = {}
        self.batches = 0
        self.logs: list[LogChunk] = []
        self.applied: list[int] = []
        self.keys_applied: list[int] = []
        self.sequence = 0
        self._outgoing: asyncio.Queue[ManagerMessage | None] = asyncio.Queue()
        self.in_session = False

    # ---- what the test says

    def put(self, *tasks: Task, items: dict[str, Item] | None = None, confirm: bool = False) -> None:
        """Assign (or change) tasks, and any other items, in one delta."""
        changed = {f"task/{task.id}": Item(task=task) for task in tasks} | (items or {})
        self.items |= changed
        self._delta([AssignmentChange(key=key, item=item) for key, item in changed.items()], confirm)

    def want(self, task_id: str, desired: State) -> None:
        item = Item()
        item.CopyFrom(self.items[f"task/{task_id}"])
        item.task.desired_state = desired
        self.put(item.task)

    def withdraw(self, *keys: str) -> None:
        for key in keys:
            self.items.pop(key, None)
        self._delta([AssignmentChange(key=key) for key in keys])

    def send(self, message: ManagerMessage) -> None:
        self._outgoing.put_nowait(message)

    def end_session(self) -> None:
        self._outgoing.put_nowait(None)

    def _delta(self, changes: list[AssignmentChange], confirm: bool = False) -> None:
        if self.in_session:
            self.sequence += 1
            delta = Assignments(base=self.sequence - 1, result=self.sequence, changes=changes, confirm=confirm)
            self.send(ManagerMessage(assignments=delta))

    # ---- what the test sees

    def states(self, task_id: str) -> list[State]:
        return [status.state for status in self.statuses.get(task_id, [])]

    def last(self, task_id: str) -> TaskStatus:
        return self.statuses[task_id][-1] if task_id in self.statuses else TaskStatus()

    async def reported(self, task_id: str, state: State) -> TaskStatus:
        # Less than the agent's own deadlines: a step that only ends by one of those is a failure.
        what = f"{task_id} in {TaskState.Name(state)}"
        await until(lambda: self.last(task_id).state == state, timeout_s=10, what=what)
        return self.last(task_id)

    # ---- the service

    async def Session(
        self,
        request_iterator: AsyncIterator[AgentMessage],
        context: grpc.aio.ServicerContext[AgentMessage, ManagerMessage],
    ) -> AsyncIterator[ManagerMessage]:
        self.calls += 1
        if not self.leads:
            trailing = (("leader-addr", self.leader_addr),) if self.leader_addr else ()
            context.set_trailing_metadata(trailing)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this manager does not lead")
        reader = asyncio.create_task(self._read(request_iterator))
        self._outgoing = asyncio.Queue()
        try:
            yield ManagerMessage(node=Node(id="n1", index=7))  # the real one may say this before its welcome, too
            yield ManagerMessage(welcome=Welcome(session_id="s", heartbeat_period_s=self.period_s, data_path_port=4790))
            self.sequence = 100 * self.calls
            changes = [AssignmentChange(key=key, item=item) for key, item in self.items.items()]
            yield ManagerMessage(assignments=Assignments(snapshot=True, result=self.sequence, changes=changes))
            self.in_session = True
            while (message := await self._outgoing.get()) is not None:
                yield message
        finally:
            self.in_session = False
            reader.cancel()

    async def _read(self, messages: AsyncIterator[AgentMessage]) -> None:
        async for message in messages:
            match message.WhichOneof("message"):
                case "hello":
                    self.hellos.append(message.hello)
                case "heartbeat":
                    self.heartbeats += 1
                    if self.answers_heartbeats:
                        self.send(ManagerMessage(heartbeat=HeartbeatReply(sequence=message.heartbeat.sequence)))
                case "statuses":
                    self.batches += 1
                    for update in message.statuses.updates:
                        self.statuses.setdefault(update.task_id, []).append(update.status)
                    if self.acknowledges:
                        self.send(ManagerMessage(ack=StatusAck(sequence=message.statuses.sequence)))
                case "applied":
                    self.applied.append(message.applied.sequence)
                case "keys_applied":
                    self.keys_applied.append(message.keys_applied.serial)
                case "logs":
                    self.logs.append(message.logs)


@asynccontextmanager
async def serving(*managers: Manager) -> AsyncIterator[None]:
    """Each manager on a loopback port of its own, written to its `addr`."""
    servers = []
    try:
        for manager in managers:
            server = grpc.aio.server()
            add_DispatcherServicer_to_server(manager, server)
            manager.addr = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            servers.append(server)
        yield
    finally:
        for server in servers:
            await server.stop(None)


def channel(addr: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(addr, options=[("grpc.use_local_subchannel_pool", 1)])


class Host:
    """One machine: its fakes outlive the agents that run on it."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.gate = Gate()
        self.runtime = FakeRuntime(self.gate)
        self.images = FakeImages(self.gate)
        self.network = FakeNetwork(self.gate)
        self.names = FakeNames(self.gate)
        self.clock = 1000.0
        self.seen_managers: list[list[str]] = []
        self.seen_nodes: list[Node] = []
        self.running: list[asyncio.Task[None]] = []

    def agent(self, *managers: str) -> Agent:
        return Agent(
            node_id="n1",
            state_dir=self.state_dir,
            runtime=self.runtime,
            images=self.images,
            network=self.network,
            names=self.names,
            open_channel=channel,
            managers=list(managers),
            on_managers=self.seen_managers.append,
            on_node=self.seen_nodes.append,
            describe=self._describe,
            advertise_host="192.0.2.1",
            data_path_addr="192.0.2.1",
            upstreams=lambda: ("192.0.2.53",),
            now=self._now,
            rng=random.Random(1),
        )

    def _describe(self) -> NodeDescription:
        made = NodeDescription(hostname="host1", platform=Platform(os="linux", architecture="x86_64"))
        made.encrypts, made.encryption_epoch = True, self.network.epoch
        return made

    def _now(self) -> float:
        self.clock += 0.001
        return self.clock

    def run(self, *managers: str) -> Agent:
        agent = self.agent(*managers)
        self.running.append(asyncio.create_task(agent.run()))
        return agent

    async def abandon(self) -> None:
        """The agent process dies here: whatever it has not done stays undone."""
        before = self.files()
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        self.running.clear()
        assert self.files() == before, "an agent that dies must not write on its way out"
        self.gate.open()

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.state_dir.rglob("*")) if path.is_file()}

    def record(self, task_id: str) -> TaskRecord:
        """What the next agent will know of the task."""
        return next(found for found in TaskFiles(self.state_dir).load() if found.task.id == task_id)

    def nothing_left(self) -> bool:
        return not self.runtime.made and not self.network.spaces and not self.files()


@asynccontextmanager
async def host_on(state_dir: Path) -> AsyncIterator[Host]:
    host = Host(state_dir)
    try:
        yield host
    finally:
        for task in host.running:
            task.cancel()
        results = await asyncio.gather(*host.running, return_exceptions=True)
        crashes = [r for r in results if isinstance(r, Exception)]
        assert not crashes, f"the agent broke off: {crashes}"


def network(network_id: str = "net1", subnet: str = "10.0.1.0/24", **spec: bool) -> Network:
    made = Network(id=network_id, vni=4097)
    made.ipam.subnet, made.ipam.gateway = subnet, subnet.replace(".0/24", ".1")
    made.spec.annotations.name = f"{network_id}-name"
    made.spec.ingress = spec.get("ingress", False)
    made.spec.internal = spec.get("internal", False)
    return made


def task(task_id: str = "t1", slot: int = 1, desired: State = TASK_RUNNING, image: str = "web") -> Task:
    """On net1; by DNS round robin, so that stopping it needs no drain."""
    made = Task(id=task_id, service_id="svc1", slot=slot, node_id="n1", desired_state=desired)
    made.service_annotations.name = "web"
    made.status.state = TASK_ASSIGNED
    made.spec.container.image = image
    made.spec.container.stop_grace_period_s = 0.05
    made.networks.add(network_id="net1", address=f"10.0.1.{slot + 1}/24")
    made.endpoint.mode = DNSRR
    return made


def endpoint(made: Task, serving_now: bool = True, node_id: str = "n1") -> dict[str, Item]:
    leg = made.networks[0]
    value = NetworkEndpoint(
        task_id=made.id,
        network_id=leg.network_id,
        address=leg.address.partition("/")[0],
        node_id=node_id,
        service_id=made.service_id,
        task_name=f"web.{made.slot}.{made.id}",
        slot=made.slot,
        serving=serving_now,
    )
    return {f"endpoint/{leg.network_id}/{made.id}": Item(endpoint=value)}


def standing(networks: Iterable[Network] = ()) -> dict[str, Item]:
    """The items of the given networks, net1 by default."""
    return {f"network/{net.id}": Item(network=net) for net in (tuple(networks) or (network(),))}
