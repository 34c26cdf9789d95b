"""One directory per task: its paths, and the record that is replaced atomically before each step.

Whatever kill -9 leaves behind, the record says how far things had come:
    PREPARING -> CREATING -> CREATED -> STARTING -> STARTED -> EXITED,  any -> REMOVING
Up to CREATING nothing ran and the remains are cleared; from CREATED on the container is adopted.
"""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from node.interface import ContainerStatus, Phase


class Step(enum.StrEnum):
    PREPARING = "preparing"
    CREATING = "creating"
    CREATED = "created"
    STARTING = "starting"
    STARTED = "started"
    EXITED = "exited"
    REMOVING = "removing"


UNFINISHED = frozenset({Step.PREPARING, Step.CREATING, Step.REMOVING})
"""Steps after whose interruption no container exists: what is left of it is cleared."""


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    start_ticks: int
    """Field 22 of /proc/<pid>/stat: clock ticks since boot."""


@dataclass(frozen=True, slots=True)
class Record:
    task_id: str
    step: Step
    boot_id: str = ""
    image_id: str = ""
    runtime: str = ""
    """Path of the OCI runtime that made it: another one does not know it."""
    stop_signal: str = "SIGTERM"
    log_max_bytes: int = 0
    log_max_files: int = 1
    monitor: ProcessId | None = None
    container: ProcessId | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""


def encode(record: Record) -> str:
    return json.dumps(asdict(record))


def decode(text: str) -> Record:
    """Raises ValueError for a record that is not ours."""
    try:
        raw: dict[str, Any] = json.loads(text)
        for name in ("monitor", "container"):
            raw[name] = ProcessId(**raw[name]) if raw.get(name) else None
        return Record(**{**raw, "step": Step(raw["step"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"task record: {error}") from None


def status_of(record: Record) -> ContainerStatus | None:
    """What the record says; None while no container exists. STARTING counts as created: start() is repeated."""
    pid = record.container.pid if record.container else 0
    match record.step:
        case Step.PREPARING | Step.CREATING | Step.REMOVING:
            return None
        case Step.CREATED | Step.STARTING:
            return ContainerStatus(record.task_id, Phase.CREATED, pid)
        case Step.STARTED:
            return ContainerStatus(record.task_id, Phase.RUNNING, pid)
        case Step.EXITED:
            return ContainerStatus(
                record.task_id, Phase.EXITED, 0, record.exit_code, record.oom_killed, error=record.error
            )


def settle(record: Record, exit_text: str | None, oom_killed: bool, same_boot: bool) -> Record:
    """The record of a container whose monitor is gone. `exit_text`: what the monitor wrote, if it did."""
    code = (exit_text or "").strip()
    if code.lstrip("-").isdigit():
        return replace(record, step=Step.EXITED, exit_code=int(code), oom_killed=oom_killed)
    why = "its monitor (conmon) was killed" if same_boot else "the host was restarted"
    return replace(record, step=Step.EXITED, error=f"{why}: the exit code of the container is unknown")


@dataclass(frozen=True, slots=True)
class TaskPaths:
    task_id: str
    state: Path
    """<state>/tasks/<task id>: the bundle, the writable layer, logs, anonymous volumes."""
    rootfs: Path
    """<run>/tasks/<task id>/rootfs"""
    exit_file: Path

    @property
    def record(self) -> Path:
        return self.state / "state.json"

    @property
    def config(self) -> Path:
        return self.state / "config.json"

    @property
    def upper(self) -> Path:
        return self.state / "upper"

    @property
    def work(self) -> Path:
        return self.state / "work"

    @property
    def etc(self) -> Path:
        return self.state / "etc"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def log(self) -> Path:
        return self.logs / "log"

    @property
    def control(self) -> Path:
        """conmon's control FIFO."""
        return self.state / "ctl"

    @property
    def monitor_pid_file(self) -> Path:
        return self.state / "conmon.pid"

    @property
    def monitor_errors(self) -> Path:
        return self.state / "conmon.err"

    @property
    def oom_file(self) -> Path:
        return self.state / "oom"


def task_paths(state_dir: Path, run_dir: Path, task_id: str) -> TaskPaths:
    """Raises ValueError for an ID that is not one plain path component."""
    if not task_id or not task_id.isascii() or not task_id.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"task ID {task_id!r} is not usable as a directory name")
    return TaskPaths(
        task_id,
        state_dir / "tasks" / task_id,
        run_dir / "tasks" / task_id / "rootfs",
        state_dir / "exits" / task_id,
    )


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically. Not synced: after a power failure no container is left to describe."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def load(paths: TaskPaths) -> Record | None:
    """The task's record; None when there is none. A torn one counts as interrupted preparation."""
    try:
        return decode(paths.record.read_text())
    except FileNotFoundError:
        return Record(paths.task_id, Step.PREPARING) if paths.state.is_dir() else None
    except ValueError:
        return Record(paths.task_id, Step.PREPARING)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> ProcessId | None:
    """The running process with this number, None when there is none (zombies have ended)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may contain anything; fields are counted after the last parenthesis.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else ProcessId(pid, int(fields[19]))


def alive(process: ProcessId | None) -> bool:
    return process is not None and identify(process.pid) == process


def remains_of(bundle: Path, cmdlines: Mapping[int, bytes]) -> list[int]:
    """Processes (conmon, or the runtime under it) that work on this bundle, found by their arguments."""
    wanted = os.fsencode(bundle)
    return [pid for pid, cmdline in cmdlines.items() if wanted in cmdline.split(b"\0")]


def command_lines() -> dict[int, bytes]:
    result: dict[int, bytes] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                result[int(name)] = Path("/proc", name, "cmdline").read_bytes()
            except OSError:
                continue
    return result
