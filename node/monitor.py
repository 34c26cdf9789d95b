"""conmon: start it for a bundle, and know when it has ended. It outlives the agent by design."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from node.cgroups import CgroupLayout
from node.interface import RuntimeFault
from node.process import CommandMissing, CommandTimeout, readable, run
from node.taskdir import ProcessId, TaskPaths, command_lines, identify, remains_of

CREATE_TIMEOUT_S = 60.0
"""conmon and the runtime under it; a start takes 20 ms, so this is a host in great trouble."""
_SYNC_BYTES_MAX = 65_536
_TRANSIENT = (
    "resource temporarily unavailable",
    "cannot allocate memory",
    "no space left on device",
    "too many open files",
    "device or resource busy",
    "interrupted system call",
)


@dataclass(frozen=True, slots=True)
class Programs:
    """What is run, and the runtime's arguments common to every call."""

    conmon: str
    runtime: str
    runtime_args: tuple[str, ...]
    root: Path
    """Where the runtime keeps its state."""


def find_runtime(asked: str, layout: CgroupLayout) -> str:
    """The OCI runtime's path: "auto" prefers crun, except where crun refuses the host's cgroups.
    Raises RuntimeFault when none is installed."""
    order = (asked,) if asked != "auto" else ("runc", "crun") if layout.unified_owns_controllers else ("crun", "runc")
    for name in order:
        if path := shutil.which(name):
            return path
    raise RuntimeFault(f"no container runtime on this host: install {order[0]} (apt install crun conmon)")


def runtime_fault(message: str) -> RuntimeFault:
    """The runtime's complaint as a fault: short of resources may pass, a bad command will not."""
    text = " ".join(message.split()) or "the runtime gave no reason"
    return RuntimeFault(
        f"starting container failed: {text}", permanent=not any(word in text.lower() for word in _TRANSIENT)
    )


def conmon_argv(programs: Programs, paths: TaskPaths, name: str, tty: bool) -> list[str]:
    argv = [programs.conmon, "--api-version", "1", "-c", paths.task_id, "-u", paths.task_id, "-n", name]
    argv += ["-b", str(paths.state), "-p", str(paths.state / "pid"), "-P", str(paths.monitor_pid_file)]
    argv += ["--exit-dir", str(paths.exit_file.parent), "--persist-dir", str(paths.state)]
    # full-attach: the socket's path may be longer than AF_UNIX allows. no-sync-log: an fsync per container
    # that ends costs more than the few lines that a power failure could take.
    argv += ["-l", f"k8s-file:{paths.log}", "--full-attach", "--no-sync-log", "-r", programs.runtime]
    for argument in programs.runtime_args:
        argv += ["--runtime-arg", argument]
    return argv + (["-t"] if tty else [])


async def _first_line(fd: int) -> bytes:
    data = b""
    while b"\n" not in data and len(data) < _SYNC_BYTES_MAX:
        await readable(fd)
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        data += chunk
    return data.partition(b"\n")[0]


def _container_pid(line: bytes, errors: Path) -> int:
    """From `{"data": PID}`; negative = failed. Raises RuntimeFault with the runtime's message."""
    try:
        answer = json.loads(line)
        pid = int(answer.get("data", -1))
    except (ValueError, AttributeError):
        answer, pid = {}, -1
    if pid > 0:
        return pid
    message = str(answer.get("message") or "")
    if not message:
        with contextlib.suppress(OSError):
            message = errors.read_text(errors="replace")[-2000:]
    raise runtime_fault(message)


async def launch(programs: Programs, paths: TaskPaths, name: str, tty: bool) -> tuple[ProcessId, ProcessId]:
    """Start conmon, which has the runtime create the container. Returns (conmon, container's process 1).
    Raises RuntimeFault."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    errors_fd = os.open(paths.monitor_errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    environ = {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "_OCI_SYNCPIPE": str(write_fd)}
    try:
        async with asyncio.timeout(CREATE_TIMEOUT_S):
            done = await run(
                conmon_argv(programs, paths, name, tty),
                timeout_s=CREATE_TIMEOUT_S,
                env=environ,
                pass_fds=(write_fd,),
                errors_to=errors_fd,
                cwd=paths.state,  # conmon drops a file "oom" where it stands
            )
            os.close(write_fd)
            write_fd = -1
            line = await _first_line(read_fd)
    except (TimeoutError, CommandTimeout):
        raise RuntimeFault(
            f"starting container failed: conmon did not answer within {CREATE_TIMEOUT_S:g} s", permanent=False
        ) from None
    except CommandMissing as error:
        raise RuntimeFault(str(error)) from None
    finally:
        for fd in (read_fd, write_fd, errors_fd):
            if fd >= 0:
                os.close(fd)
    if done.code != 0 and not line:
        line = b"{}"
    container = identify(_container_pid(line, paths.monitor_errors))
    monitor = identify(int(paths.monitor_pid_file.read_text()))
    if container is None or monitor is None:
        raise RuntimeFault("starting container failed: it vanished while it was made", permanent=False)
    return monitor, container


async def ended(process: ProcessId) -> None:
    """Wait until the process has ended (or is no longer the one meant)."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if identify(process.pid) == process:
            await readable(pidfd)
    finally:
        os.close(pidfd)


def send(process: ProcessId | None, number: int) -> bool:
    """Signal exactly this process; False when it has ended."""
    if process is None:
        return False
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if identify(process.pid) != process:
            return False
        signal.pidfd_send_signal(pidfd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)


def kill_remains(paths: TaskPaths) -> None:
    """Kill the monitor and the runtime of a creation that was interrupted, whatever they were doing."""
    for pid in remains_of(paths.state, command_lines()):
        send(identify(pid), signal.SIGKILL)


def signal_of(name: str, what: str) -> int:
    """As `signal_number`, but raises RuntimeFault, which begins with `what`."""
    try:
        return signal_number(name)
    except ValueError as error:
        raise RuntimeFault(f"{what}: {error}") from None


def signal_number(name: str) -> int:
    """ "SIGTERM", "TERM", "15" or "SIGRTMIN+3" -> the number. Raises ValueError."""
    text = name.upper().removeprefix("SIG")
    base, plus, offset = text.partition("+")
    if text.isdigit() and 0 < int(text) <= signal.SIGRTMAX:
        return int(text)
    known = signal.Signals.__members__.get("SIG" + base)
    if known is None or (plus and not (base == "RTMIN" and offset.isdigit())):
        raise ValueError(f"unknown signal {name!r}")
    number = known + (int(offset) if plus else 0)
    if number > signal.SIGRTMAX:
        raise ValueError(f"unknown signal {name!r}")
    return number
