"""In-memory stand-ins for what the agent drives: the runtime, the image store, the host's networking and the name
server. They keep the contracts of node/interface.py, overlay/interface.py and dns/interface.py (idempotent, errors
of the named types) and refuse what the real ones would refuse, so a wrong order of calls fails a test.

A `Gate` stops any call before or after its effect: what is done when an agent is abandoned there is what kill -9
would have left.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dns.interface import Picture
from node.interface import (
    ContainerStatus,
    CreateRequest,
    ExecCommand,
    ImageConfig,
    ImageFault,
    Phase,
    ResolvedImage,
    RuntimeFault,
    StoredImage,
)
from overlay.interface import Attachment, EncryptionStatus, HostState, Inspection, NetworkError
from proto.dispatch_pb2 import ExecStart, LogLine, LogOptions

T = TypeVar("T")

NO_PID = (1 << 22) + 1
"""Beyond the kernel's PID_MAX_LIMIT: no process has it."""


class Gate:
    """Points are "<call>:before" and "<call>:after", such as "create:after"."""

    def __init__(self) -> None:
        self.passed: Counter[str] = Counter()
        self.reached = asyncio.Event()
        """Some call stands at a closed point."""
        self._closed: dict[str, asyncio.Event] = {}

    def close(self, point: str) -> None:
        self._closed[point] = asyncio.Event()
        self.reached.clear()

    def open(self, *points: str) -> None:
        """These points, or all."""
        for point in points or tuple(self._closed):
            self._closed.pop(point).set()

    async def at(self, point: str) -> None:
        closed = self._closed.get(point)
        if closed is not None:
            self.reached.set()
            await closed.wait()
        self.passed[point] += 1


@dataclass
class FakeContainer:
    request: CreateRequest
    phase: Phase = Phase.CREATED
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""
    signals: list[str] = field(default_factory=list)
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    lines: list[LogLine] = field(default_factory=list)
    starts: int = 0

    def status(self) -> ContainerStatus:
        pid = NO_PID if self.phase is Phase.RUNNING else 0
        return ContainerStatus(self.request.task_id, self.phase, pid, self.exit_code, self.oom_killed, self.error)


class FakeRuntime:
    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.made: dict[str, FakeContainer] = {}
        self.faults: dict[str, list[RuntimeFault]] = {}
        """Call name -> what its next calls raise."""
        self.on_start: Callable[[str], None] = lambda task_id: None
        self.ignores_signals = False
        """Containers end by SIGKILL only."""
        self.answers: list[tuple[int, bytes]] = []
        """Of the next `exec`s; then they succeed."""
        self.rotations = 0
        self.in_flight = 0
        self.in_flight_max = 0

    # ---- what happens to containers by themselves

    def exit(self, task_id: str, code: int | None, oom_killed: bool = False, error: str = "") -> None:
        container = self.made[task_id]
        container.phase, container.exit_code = Phase.EXITED, code
        container.oom_killed, container.error = oom_killed, error
        container.exited.set()

    def phase_of(self, task_id: str) -> Phase | None:
        return self.made[task_id].phase if task_id in self.made else None

    # ---- the Protocol

    async def create(self, request: CreateRequest) -> None:
        await self._enter("create")
        if request.task_id not in self.made:
            self.made[request.task_id] = FakeContainer(request)
        await self._leave("create")

    async def start(self, task_id: str) -> ContainerStatus:
        await self._enter("start")
        container = self.made.get(task_id)
        if container is None:
            raise RuntimeFault(f"container {task_id} does not exist")
        if container.phase is Phase.CREATED:
            self.on_start(task_id)
            container.phase = Phase.RUNNING
            container.starts += 1
        await self._leave("start")
        return container.status()

    async def stop(self, task_id: str, signal: str, grace_s: float) -> ContainerStatus:
        await self._enter("stop")
        container = self.made.get(task_id)
        if container is None:
            raise RuntimeFault(f"container {task_id} does not exist")
        if container.phase is Phase.RUNNING:
            container.signals.append(signal or "TERM")
            if self.ignores_signals:
                try:
                    async with asyncio.timeout(grace_s):
                        await container.exited.wait()
                except TimeoutError:
                    container.signals.append("KILL")
            if container.phase is Phase.RUNNING:
                self.exit(task_id, 137 if "KILL" in container.signals else 0)
        await self._leave("stop")
        return container.status()

    async def wait(self, task_id: str) -> ContainerStatus:
        container = self.made.get(task_id)
        if container is None:
            raise RuntimeFault(f"container {task_id} does not exist")
        await container.exited.wait()
        return container.status()

    async def status(self, task_id: str) -> ContainerStatus | None:
        container = self.made.get(task_id)
        return container.status() if container is not None else None

    async def remove(self, task_id: str) -> None:
        await self._enter("remove")
        container = self.made.pop(task_id, None)
        if container is not None:
            container.exited.set()
        await self._leave("remove")

    async def containers(self) -> list[ContainerStatus]:
        return [container.status() for container in self.made.values()]

    async def logs(self, task_id: str, options: LogOptions) -> AsyncIterator[LogLine]:
        if task_id not in self.made:
            raise RuntimeFault(f"container {task_id} does not exist")
        container = self.made[task_id]
        for line in container.lines:
            yield line
        if options.follow:
            await container.exited.wait()

    async def rotate_logs(self) -> None:
        self.rotations += 1

    async def exec(self, task_id: str, argv: Sequence[str], timeout_s: float) -> tuple[int, bytes]:
        await self._enter("exec")
        if self.phase_of(task_id) is not Phase.RUNNING:
            raise RuntimeFault(f"task {task_id} does not run", permanent=False)
        return self.answers.pop(0) if self.answers else (0, b"")

    @contextmanager
    def exec_command(self, task_id: str, wanted: ExecStart) -> Iterator[ExecCommand]:
        """Runs on this machine, without a container."""
        if self.phase_of(task_id) is not Phase.RUNNING:
            raise RuntimeFault(f"task {task_id} does not run", permanent=False)
        yield ExecCommand(list(wanted.command), lambda rows, columns: None)

    async def _enter(self, call: str) -> None:
        await self.gate.at(f"{call}:before")
        if self.faults.get(call):
            raise self.faults[call].pop(0)
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()  # let others run, as a real process would
        except TimeoutError:
            pass
        finally:
            self.in_flight -= 1

    async def _leave(self, call: str) -> None:
        await self.gate.at(f"{call}:after")


class FakeImages:
    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.known: set[str] = {"web"}
        self.fault: ImageFault | None = None
        self.config = ImageConfig()
        self.asked: list[tuple[str, str]] = []

    async def ensure(self, name: str, registry_auth: str = "") -> ResolvedImage:
        self.asked.append((name, registry_auth))
        await self.gate.at("ensure:before")
        if self.fault is not None:
            raise self.fault
        if name not in self.known:
            raise ImageFault(f"No such image: {name}", "not_found")
        await self.gate.at("ensure:after")
        return ResolvedImage(image_id=f"sha256:{name}", layers=(), config=self.config)

    async def resolve(self, name: str, registry_auth: str = "") -> tuple[str, bool]:
        return name, name in self.known

    async def pull(self, name: str, registry_auth: str, progress: Callable[[str], None]) -> StoredImage:
        self.known.add(name)
        return StoredImage(f"sha256:{name}", (name,), (), 0, 0.0, False)

    async def load(self, archive: Path, name: str, progress: Callable[[str], None]) -> list[str]:
        self.known.add(name)
        return [name]

    async def stored(self) -> list[StoredImage]:
        return [StoredImage(f"sha256:{name}", (name,), (), 0, 0.0, False) for name in sorted(self.known)]

    async def remove(self, ref: str, force: bool, in_use: frozenset[str]) -> tuple[list[str], str]:
        self.known.discard(ref)
        return [ref], f"sha256:{ref}"


class FakeNetwork:
    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.states: list[HostState] = []
        self.spaces: dict[str, Attachment] = {}
        self.attach_fault: NetworkError | None = None
        self.apply_faults: list[NetworkError] = []
        self.attach_calls = 0
        self.torn_down = False
        self.epoch = 1

    @property
    def state(self) -> HostState:
        return self.states[-1]

    async def apply(self, state: HostState) -> None:
        await self.gate.at("apply:before")
        if self.apply_faults:
            raise self.apply_faults.pop(0)
        self.states.append(state)
        await self.gate.at("apply:after")

    async def attach(self, attachment: Attachment) -> Path:
        self.attach_calls += 1
        await self.gate.at("attach:before")
        if self.attach_fault is not None:
            raise self.attach_fault
        standing = self.state.network_ids() if self.states else set()
        missing = {leg.network_id for leg in attachment.interfaces} - standing
        if missing:
            raise NetworkError(f"networks {sorted(missing)} are not in the last applied state")
        self.spaces[attachment.task_id] = attachment
        await self.gate.at("attach:after")
        return self.namespace(attachment.task_id)

    def namespace(self, task_id: str) -> Path:
        return Path(f"/run/fake/netns/{task_id}")

    async def given_address(self, task_id: str) -> str:
        legs = self.spaces[task_id].interfaces if task_id in self.spaces else ()
        return "172.17.0.2" if not all(leg.address for leg in legs) else ""

    async def detach(self, task_id: str) -> None:
        await self.gate.at("detach:before")
        self.spaces.pop(task_id, None)
        await self.gate.at("detach:after")

    async def attached(self) -> frozenset[str]:
        return frozenset(self.spaces)

    def encryption(self) -> EncryptionStatus:
        keys = self.states[-1].keys if self.states else ()
        return EncryptionStatus(True, self.epoch, keys[0].serial if keys else 0)

    async def inspect(self) -> Inspection:
        return Inspection()

    async def inside(self, task_id: str, function: Callable[[], T]) -> T:
        raise NetworkError(f"task {task_id} has no network namespace on this host")

    async def teardown(self) -> None:
        self.spaces.clear()
        self.torn_down = True


class FakeNames:
    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.pictures: list[Picture] = []
        self.stopped = False

    @property
    def sandboxes(self) -> frozenset[str]:
        return frozenset(box.task_id for box in self.pictures[-1].sandboxes) if self.pictures else frozenset()

    async def apply(self, picture: Picture) -> None:
        await self.gate.at("names:before")
        self.pictures.append(picture)
        await self.gate.at("names:after")

    async def stop(self) -> None:
        self.stopped = True

    @property
    def pid(self) -> int:
        return 0 if self.stopped else 1
