"""Commands beside a container's own process, through the OCI runtime's `exec`.

Killing the runtime does not end what it started inside, so each command leaves its PID in a file beside the
container, and whatever of it outlives its caller is killed by that.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from node import monitor
from node.interface import RuntimeFault
from node.process import CommandMissing, CommandTimeout, Finished, run
from node.taskdir import TaskPaths, identify


@contextmanager
def pid_file(paths: TaskPaths, token: str) -> Iterator[Path]:
    """Where the runtime writes the command's PID; the command has ended once the block has."""
    path = paths.state / f"exec-{token}.pid"
    try:
        yield path
    finally:
        _kill(path, paths.task_id)
        path.unlink(missing_ok=True)


def _kill(path: Path, task_id: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        process = identify(int(path.read_text()))
        # A number may be another process's by now: it is ours if it lies in the task's cgroup.
        if process is not None and task_id in Path(f"/proc/{process.pid}/cgroup").read_text():
            monitor.send(process, signal.SIGKILL)


async def run_in(
    runtime: Sequence[str], paths: TaskPaths, token: str, argv: Sequence[str], timeout_s: float
) -> Finished:
    """Run `argv` in the container to its end. `runtime`: the runtime's program and common arguments; `token` is
    unlike those of other commands in this container. Raises RuntimeFault: it did not end in time (and was
    killed), or the runtime is missing."""
    with pid_file(paths, token) as path:
        try:
            return await run([*runtime, "exec", "--pid-file", str(path), paths.task_id, *argv], timeout_s=timeout_s)
        except CommandTimeout:
            raise RuntimeFault(f"{argv[0]} did not finish within {timeout_s:g} s", permanent=False) from None
        except CommandMissing as error:
            raise RuntimeFault(str(error), permanent=False) from None
