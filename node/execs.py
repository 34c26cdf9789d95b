"""Commands beside a container's own process, through the OCI runtime's `exec`.

Killing the runtime does not end what it started inside, so each command leaves its PID in a file beside the
container, and whatever of it outlives its caller is killed by that.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from node import monitor
from node.interface import ExecCommand, RuntimeFault
from node.process import CommandMissing, CommandTimeout, Finished, run
from node.rootfs import Account, find_account, read_small_file
from node.taskdir import TaskPaths, identify
from proto.dispatch_pb2 import ExecStart


@contextmanager
def pid_file(paths: TaskPaths, token: str) -> Iterator[Path]:
    """Where the runtime writes the command's PID; the command has ended once the block has."""
    path = paths.state / f"exec-{token}.pid"
    try:
        yield path
    finally:
        _kill(path, paths.task_id)
        path.unlink(missing_ok=True)


@contextmanager
def command(runtime: Sequence[str], paths: TaskPaths, token: str, wanted: ExecStart) -> Iterator[ExecCommand]:
    """What a person asked for in the container; it has ended once the block has.
    Raises RuntimeFault for a user that the image does not know."""
    account = _account(paths, wanted.user) if wanted.user else None
    # The runtimes' own options for this differ: crun's --env takes the place of the container's environment.
    process = process_of(json.loads(paths.config.read_text())["process"], wanted, account)
    file = paths.state / f"exec-{token}.json"
    with pid_file(paths, token) as path:
        try:
            file.write_text(json.dumps(process))
            argv = [*runtime, "exec", "--pid-file", str(path), "--process", str(file), paths.task_id]
            yield ExecCommand(argv, lambda rows, columns: _resize(path, rows, columns))
        finally:
            file.unlink(missing_ok=True)


def process_of(own: Mapping[str, Any], wanted: ExecStart, account: Account | None) -> dict[str, Any]:
    """The OCI process: as the container's own, but for what is wanted. Pure."""
    env = dict(entry.partition("=")[::2] for entry in own["env"])
    if wanted.tty:
        env["TERM"] = "xterm"
    if account is not None:
        env["HOME"] = account.home
    env |= dict(entry.partition("=")[::2] for entry in wanted.env)
    process = {**own, "args": list(wanted.command), "terminal": wanted.tty, "env": [f"{k}={v}" for k, v in env.items()]}
    if wanted.dir:
        process["cwd"] = wanted.dir
    if account is not None:
        process["user"] = {"uid": account.uid, "gid": account.gid, "additionalGids": list(account.additional_gids)}
        if account.uid != 0:  # as for the container's own process: other users hold none
            process["capabilities"] = {"bounding": own["capabilities"]["bounding"]}
    return process


def _account(paths: TaskPaths, user: str) -> Account:
    passwd, group = (read_small_file(paths.rootfs, f"/etc/{name}") for name in ("passwd", "group"))
    try:
        return find_account(user, (), passwd, group)
    except ValueError as error:
        raise RuntimeFault(str(error)) from None


def _resize(path: Path, rows: int, columns: int) -> None:
    """Of the terminal inside the container: crun tells the command that its window changed, but not to what."""
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(f"/proc/{int(path.read_text())}/fd/0", os.O_RDWR | os.O_NOCTTY)
        try:
            termios.tcsetwinsize(fd, (rows, columns))
        finally:
            os.close(fd)


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
