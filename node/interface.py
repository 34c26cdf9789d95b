"""The agent's narrow views of the container runtime and the image store.

Each has one real implementation (`node/conmon.py`, `node/images.py`) and one fake for the simulator
(`tests/fakes.py`), held to the same tests.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from proto.dispatch_pb2 import ExecStart, LogLine, LogOptions
from proto.objects_pb2 import ContainerSpec, HealthConfig, Resources


class RuntimeFault(Exception):
    """A container could not be made, started or stopped; the message is what `service ps` shows.
    `permanent` faults reject the task; others are retried by the agent."""

    def __init__(self, message: str, permanent: bool = True) -> None:
        super().__init__(message)
        self.permanent = permanent


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The OCI image configuration, as far as running it needs."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    dir: str = ""
    user: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    health: HealthConfig = field(default_factory=HealthConfig)


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    image_id: str
    layers: tuple[Path, ...]
    """Directories of the unpacked layers, topmost first: overlayfs's lowerdir."""
    config: ImageConfig


class ImageFault(Exception):
    """One clear line: what was looked for, where, and why it failed. `kind` chooses the gRPC status."""

    def __init__(self, message: str, kind: str = "failed") -> None:
        super().__init__(message)
        self.kind = kind
        """not_found | denied | unreachable | no_space | in_use | invalid | failed"""


@dataclass(frozen=True, slots=True)
class StoredImage:
    image_id: str
    names: tuple[str, ...]
    digests: tuple[str, ...]
    size_bytes: int
    created_at: float
    read_only: bool


class Images(Protocol):
    async def ensure(self, name: str, registry_auth: str = "") -> ResolvedImage:
        """The image from the store, else pulled. Concurrent calls for one name pull once. Raises ImageFault."""
        ...

    async def resolve(self, name: str, registry_auth: str = "") -> tuple[str, bool]:
        """(name pinned by digest when one is known, whether it is in the store). Raises ImageFault."""
        ...

    async def pull(self, name: str, registry_auth: str, progress: Callable[[str], None]) -> StoredImage: ...

    async def load(self, archive: Path, name: str, progress: Callable[[str], None]) -> list[str]:
        """docker-archive or oci-archive; returns the names loaded."""
        ...

    async def stored(self) -> list[StoredImage]: ...

    async def remove(self, ref: str, force: bool, in_use: frozenset[str]) -> tuple[list[str], str]:
        """(names removed, ID deleted or ""). `in_use`: image IDs that local tasks use."""
        ...


class Phase(enum.Enum):
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class ContainerStatus:
    task_id: str
    phase: Phase
    pid: int = 0
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""
    """Set when the outcome is not the container's own, e.g. its monitor was killed."""


@dataclass(frozen=True, slots=True)
class CreateRequest:
    task_id: str
    name: str
    """wpinst.3.<task id>"""
    spec: ContainerSpec
    """Templates already expanded."""
    image: ResolvedImage
    netns: Path | None
    """None: the host's network."""
    hostname: str
    addresses: tuple[str, ...] = ()
    """The task's own addresses, for /etc/hosts."""
    limits: Resources = field(default_factory=Resources)
    reservations: Resources = field(default_factory=Resources)
    nameservers: tuple[str, ...] = ("127.0.0.11",)
    dns_options: tuple[str, ...] = ("ndots:0",)
    labels: dict[str, str] = field(default_factory=dict)
    log_max_bytes: int = 10_000_000
    log_max_files: int = 3


@dataclass(frozen=True, slots=True)
class ExecCommand:
    argv: list[str]
    resize: Callable[[int, int], None]
    """Set rows and columns of its terminal, once it runs."""


class Runtime(Protocol):
    """Every call is idempotent and safe to repeat after kill -9 of the agent at any instant."""

    async def create(self, request: CreateRequest) -> None:
        """Everything short of running the process. Raises RuntimeFault."""
        ...

    async def start(self, task_id: str) -> ContainerStatus: ...

    async def stop(self, task_id: str, signal: str, grace_s: float) -> ContainerStatus:
        """Signal ("" = the one given at creation), wait, then SIGKILL; returns the exited status."""
        ...

    async def wait(self, task_id: str) -> ContainerStatus:
        """Return once the container has exited (or its monitor is gone)."""
        ...

    async def status(self, task_id: str) -> ContainerStatus | None: ...

    async def remove(self, task_id: str) -> None:
        """Kill if needed and reclaim all of it: mounts, cgroup, writable layer, anonymous volumes, logs."""
        ...

    async def containers(self) -> list[ContainerStatus]:
        """All containers of this agent that exist, whatever process made them."""
        ...

    def logs(self, task_id: str, options: LogOptions) -> AsyncIterator[LogLine]: ...

    async def rotate_logs(self) -> None:
        """Rotate what has grown past its limit; called by the agent every few seconds."""
        ...

    async def exec(self, task_id: str, argv: Sequence[str], timeout_s: float) -> tuple[int, bytes]:
        """(exit code, output and errors) of a command in the container. Raises RuntimeFault when it did not end in
        time; it has been killed then."""
        ...

    def exec_command(self, task_id: str, wanted: ExecStart) -> AbstractContextManager[ExecCommand]:
        """A command in the container, not yet started: its terminal or pipes are those of the argv's own process.
        At the end of the block nothing of it runs any more. Raises RuntimeFault."""
        ...
