"""Many simulated agents in one process: real certificates through the real join, the agents' own session
(`node.session`), outbox and mirror of statuses; only containers are left out.

Told by one line of JSON on standard input: {"join", "token", "directory", "first", "count"}. Prints "connected"
when every agent is a member and has its snapshot. Ends when standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import uvloop

from node.outbox import Outbox
from node.session import Session
from proto.dispatch_pb2 import AgentHello, Assignments, Examination, ExecInput, LogRequest, Welcome
from proto.join_pb2 import IssueRequest
from proto.join_pb2_grpc import JoinStub
from proto.objects_pb2 import (
    TASK_ACCEPTED,
    TASK_PREPARING,
    TASK_READY,
    TASK_RUNNING,
    TASK_SHUTDOWN,
    TASK_STARTING,
    NetworkKey,
    Node,
    TaskState,
    TaskStatus,
)
from swarm.logs import configure
from swarm.security.bootstrap import join_cluster
from swarm.security.ca import new_key_and_csr
from swarm.security.certificates import NodeCredentials
from swarm.security.channel import secure_channel
from swarm.security.identity import CA_NAME
from tests.waiting import until

if TYPE_CHECKING:
    from proto.join_pb2_grpc import JoinAsyncStub

STEPS: tuple[tuple[float, TaskState.ValueType], ...] = (
    (0.0, TASK_ACCEPTED),
    (0.01, TASK_PREPARING),
    (0.2, TASK_READY),
    (0.21, TASK_STARTING),
    (0.4, TASK_RUNNING),
)
"""Seconds after its assignment at which a task gets there: about what the real agent needs for a container."""
AT_ONCE = 32
"""Agents that join, or connect for the first time, together."""
CALL_TIMEOUT_S = 60.0


class Agent:
    """The session's handler: walks each assigned task through its states."""

    def __init__(self, number: int, credentials: NodeCredentials, managers: list[str]) -> None:
        self._number = number
        self._tasks: dict[str, TaskState.ValueType] = {}
        self._sequence = 0
        self._outbox = Outbox()
        self.connected = False
        self._session = Session(
            open_channel=credentials.open_channel,
            managers=managers,
            hello=self._hello,
            outbox=self._outbox,
            handler=self,
            rng=random.Random(number),
        )

    async def run(self) -> None:
        await self._session.run()

    def _hello(self) -> AgentHello:
        hello = AgentHello(advertise_host=address_of(self._number))
        hello.description.hostname = f"sim{self._number}"
        hello.description.platform.os, hello.description.platform.architecture = "linux", "x86_64"
        hello.description.resources.nano_cpus = 64_000_000_000
        hello.description.resources.memory_bytes = 256 << 30
        return hello

    def on_welcome(self, welcome: Welcome) -> None:
        pass

    def on_assignments(self, message: Assignments) -> None:
        assert message.snapshot or message.base == self._sequence
        self._sequence = message.result
        self.connected = True
        for change in message.changes:
            if not change.key.startswith("task/"):
                continue
            task_id = change.key[5:]
            if not change.HasField("item"):
                self._tasks.pop(task_id, None)
                self._outbox.statuses.forget(task_id)
            elif change.item.task.desired_state > TASK_RUNNING:
                if self._tasks.get(task_id, TASK_SHUTDOWN) < TASK_SHUTDOWN:
                    self._report(task_id, TASK_SHUTDOWN)
            elif task_id not in self._tasks:
                self._tasks[task_id] = change.item.task.status.state
                for after_s, state in STEPS:
                    asyncio.get_running_loop().call_later(after_s, self._report, task_id, state)

    def _report(self, task_id: str, state: TaskState.ValueType) -> None:
        if self._tasks.get(task_id, TASK_SHUTDOWN) >= state:
            return  # stopped or taken away meanwhile
        self._tasks[task_id] = state
        name = TaskState.Name(state).removeprefix("TASK_").lower()
        self._outbox.statuses.record(task_id, TaskStatus(state=state, timestamp=time.time(), message=name))
        self._outbox.poke()

    def on_managers(self, addrs: list[str]) -> None:
        pass

    def on_node(self, node: Node) -> None:
        pass

    def on_released(self, task_ids: list[str]) -> None:
        pass

    def on_keys(self, keys: list[NetworkKey]) -> None:
        pass

    def on_exec(self, message: ExecInput) -> None:
        pass

    def on_examination(self, message: Examination) -> None:
        pass

    def on_logs(self, request: LogRequest) -> None:
        pass

    def on_lost(self) -> None:
        self.connected = False


def address_of(number: int) -> str:
    """One of 127.1.0.0/16 each: nothing is ever sent there."""
    return f"127.1.{number // 250}.{number % 250 + 1}"


class Crowd:
    """The agents of this process: each opens its session as soon as it has joined."""

    def __init__(self, join_addr: str, token: str, directory: Path) -> None:
        self._join_addr = join_addr
        self._token = token
        self._directory = directory
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._sessions: list[asyncio.Task[None]] = []

    async def begin(self, numbers: range) -> None:
        """The first agent joins as every machine does; the others trust its root CA and ask over one connection."""
        number = numbers[0]
        first = await join_cluster(
            self._join_addr, self._token, advertise_host=address_of(number), hostname=f"sim{number}"
        )
        await self._connect(number, first.save(self._directory / str(number)), list(first.manager_addrs))
        trusted = first.root_ca_pem
        async with secure_channel(self._join_addr, grpc.ssl_channel_credentials(trusted), CA_NAME) as channel:
            stub: JoinAsyncStub = JoinStub(channel)
            await asyncio.gather(*(self._join(stub, trusted, other) for other in numbers[1:]))

    async def _join(self, stub: JoinAsyncStub, root_ca_pem: bytes, number: int) -> None:
        async with self._gate:
            key_pem, csr_pem = new_key_and_csr()
            host = address_of(number)
            request = IssueRequest(csr_pem=csr_pem, token=self._token, advertise_host=host, hostname=f"sim{number}")
            reply = await stub.Issue(request, timeout=CALL_TIMEOUT_S)
            place = self._directory / str(number)
            credentials = NodeCredentials.save(place, root_ca_pem, reply.certificate_pem, key_pem)
            await self._connect(number, credentials, list(reply.manager_addrs))

    async def _connect(self, number: int, credentials: NodeCredentials, managers: list[str]) -> None:
        agent = Agent(number, credentials, managers)
        self._sessions.append(asyncio.create_task(agent.run()))
        await until(lambda: agent.connected, CALL_TIMEOUT_S, "a session")

    async def end(self) -> None:
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)


async def main() -> None:
    orders = json.loads(sys.stdin.readline())
    crowd = Crowd(orders["join"], orders["token"], Path(orders["directory"]))
    await crowd.begin(range(orders["first"], orders["first"] + orders["count"]))
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await crowd.end()


if __name__ == "__main__":
    configure("warning")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
