"""`pyswarm service exec`: a command in a task, wherever that runs; with -it, a shell as on a terminal there."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator

import click
import grpc

from proto.control_pb2 import ExecCall
from proto.dispatch_pb2 import ExecInput, ExecResize, ExecStart
from swarm.cli.client import Client, api_failure, connect
from swarm.cli.command import GoCommand
from swarm.cli.completing import service_names
from swarm.cli.failure import Failure

CHUNK_BYTES = 32_768
WINDOW = 16
"""Messages of input that the command has not taken yet, as node/commands.py counts them."""
CREDIT_EVERY = 4


@click.command("exec", cls=GoCommand, context_settings={"allow_interspersed_args": False})
@click.argument("ref", metavar="SERVICE|TASK", shell_complete=service_names)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARG]...")
@click.option("--interactive", "-i", is_flag=True, help="Send this terminal's input to the command.")
@click.option("--tty", "-t", "terminal", is_flag=True, help="Give the command a terminal.")
@click.option("--env", "-e", multiple=True, metavar="KEY=VALUE", help="Environment variable.")
@click.option("--user", "-u", default="", metavar="USER[:GROUP]", help="Who the command runs as.")
@click.option("--workdir", "-w", default="", metavar="DIR", help="Working directory inside the container.")
def exec_(
    *,
    ref: str,
    command: tuple[str, ...],
    interactive: bool,
    terminal: bool,
    env: tuple[str, ...],
    user: str,
    workdir: str,
) -> None:
    """Run a command in a task of the swarm; exits with the command's status.

    A service stands for the first of its tasks that runs, SERVICE.SLOT for that slot's.

    \b
    Example:
      pyswarm service exec -it web sh
      pyswarm service exec web.3 cat /etc/hosts
    """
    if terminal and interactive and not sys.stdin.isatty():
        raise Failure("the input device is not a terminal: leave out --tty")
    columns, rows = shutil.get_terminal_size()
    start = ExecStart(
        task_id=ref,
        command=command,
        tty=terminal,
        stdin=interactive,
        env=[entry if "=" in entry else f"{entry}={os.environ.get(entry, '')}" for entry in env],
        user=user,
        dir=workdir,
        rows=rows,
        columns=columns,
    )
    client = connect()
    client.require_manager()
    with _raw_input() if terminal and interactive else contextlib.nullcontext():
        code = _Exchange(client, start).run()
    sys.exit(code)


@contextlib.contextmanager
def _raw_input() -> Iterator[None]:
    """Keys go to the command as they are, Ctrl-C included."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class _Exchange:
    def __init__(self, client: Client, start: ExecStart) -> None:
        self._client, self._start = client, start
        self._requests: queue.SimpleQueue[ExecInput | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(WINDOW)

    def run(self) -> int:
        """The command's exit status. Raises ApiFailure, Failure."""
        self._requests.put(ExecInput(start=self._start))
        if self._start.stdin:
            threading.Thread(target=self._read_input, daemon=True).start()
        if self._start.tty:
            signal.signal(signal.SIGWINCH, lambda *_: self._resized())
        call = self._client.control.Exec(self._calls())
        taken = 0
        try:
            for output in call:
                match output.WhichOneof("what"):
                    case "stdout" | "stderr":
                        _write(1 if output.HasField("stdout") else 2, output.stdout or output.stderr)
                        taken += 1
                        if taken == CREDIT_EVERY:
                            self._requests.put(ExecInput(credit=taken))
                            taken = 0
                    case "credit":
                        for _ in range(output.credit):
                            self._room.release()
                    case "exit_code":
                        return output.exit_code
                    case "error":
                        raise Failure(output.error)
        except grpc.RpcError as error:
            raise api_failure(error) from None
        finally:
            self._requests.put(None)
            call.cancel()
        raise Failure("the manager ended the call without the command's exit status")

    def _calls(self) -> Iterator[ExecCall]:
        while (message := self._requests.get()) is not None:
            yield ExecCall(input=message)

    def _read_input(self) -> None:
        while True:
            self._room.acquire()
            data = os.read(0, CHUNK_BYTES)
            self._requests.put(ExecInput(data=data) if data else ExecInput(eof=True))
            if not data:
                return

    def _resized(self) -> None:
        columns, rows = shutil.get_terminal_size()
        self._requests.put(ExecInput(resize=ExecResize(rows=rows, columns=columns)))


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
