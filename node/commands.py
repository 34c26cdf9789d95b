"""Commands that people run in tasks of this host (`service exec`): started, fed, read and ended as the managers relay.

Both directions have a window of WINDOW messages: whoever sends more than the other side took has to wait, so neither
a fast command nor a fast keyboard fills anybody's memory. A command ends with the session or with its caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import termios
import tty
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from node import priority
from node.interface import Runtime, RuntimeFault
from proto.dispatch_pb2 import ExecInput, ExecOutput, ExecStart

log = structlog.get_logger()

COMMANDS_MAX = 32
"""At once on one host: each may hold WINDOW chunks."""
CHUNK_BYTES = 32_768
WINDOW = 16
"""Messages of data under way in each direction; swarm/cli/exec.py, on the other side, keeps to the same."""
CREDIT_EVERY = 4
LEFTOVER_S = 0.5
"""A command has ended, but a process that it left behind still holds its output: how long to wait for more."""
END_OF_TRANSMISSION = b"\x04"


@dataclass(frozen=True, slots=True)
class _Pipes:
    process: asyncio.subprocess.Process
    outputs: tuple[tuple[str, asyncio.StreamReader], ...]
    stdin: asyncio.StreamWriter | None
    terminal: int = -1
    """The master side; -1 = there is none."""


class Commands:
    def __init__(self, runtime: Runtime, runs: Callable[[str], bool], send: Callable[[ExecOutput], None]) -> None:
        """`runs`: whether that task's container runs here. `send` queues and returns at once."""
        self._runtime, self._runs, self._send = runtime, runs, send
        self._running: dict[str, tuple[_Command, asyncio.Task[None]]] = {}

    def handle(self, message: ExecInput) -> None:
        exec_id = message.exec_id
        if message.HasField("start"):
            self._start(exec_id, message.start)
        elif exec_id in self._running:
            command, life = self._running[exec_id]
            if message.HasField("cancel") or not command.take(message):
                life.cancel()

    def _start(self, exec_id: str, start: ExecStart) -> None:
        why = ""
        if len(self._running) >= COMMANDS_MAX:
            why = f"this node already runs {COMMANDS_MAX} commands for others: end some of them, then try again"
        elif not self._runs(start.task_id):
            why = f"task {start.task_id} does not run on this node (any more)"
        if why:
            self._send(ExecOutput(exec_id=exec_id, error=why))
            return
        command = _Command(self._runtime, exec_id, start, self._send)
        life = asyncio.create_task(command.run(), name=f"exec {exec_id}")
        self._running[exec_id] = (command, life)
        life.add_done_callback(lambda _: self._running.pop(exec_id, None))

    def cancel_all(self) -> None:
        for _, life in self._running.values():
            life.cancel()

    async def close(self) -> None:
        lives = [life for _, life in self._running.values()]
        self.cancel_all()
        await asyncio.gather(*lives, return_exceptions=True)


class _Command:
    def __init__(self, runtime: Runtime, exec_id: str, start: ExecStart, send: Callable[[ExecOutput], None]) -> None:
        self._runtime, self._exec_id, self._start, self._send = runtime, exec_id, start, send
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue(WINDOW + 1)
        """Data; None = end of input."""
        self._credit = asyncio.Semaphore(WINDOW)
        self._pipes: _Pipes | None = None
        self._size = (start.rows, start.columns)
        self._set_size: Callable[[int, int], None] = lambda rows, columns: None
        self._sent = 0

    def take(self, message: ExecInput) -> bool:
        """False: the other side does not keep to the window."""
        match message.WhichOneof("what"):
            case "data" | "eof":
                if self._inbox.full():
                    return False
                self._inbox.put_nowait(message.data if message.HasField("data") else None)
            case "credit":
                for _ in range(min(message.credit, WINDOW)):
                    self._credit.release()
            case "resize":
                self._size = (message.resize.rows, message.resize.columns)
                self._resize()
        return True

    def _resize(self) -> None:
        if self._pipes is None or self._pipes.terminal < 0 or not all(self._size):
            return
        termios.tcsetwinsize(self._pipes.terminal, self._size)
        self._set_size(*self._size)

    async def run(self) -> None:
        try:
            with self._runtime.exec_command(self._start.task_id, self._start) as command:
                self._set_size = command.resize
                code = await self._run(command.argv)
        except (RuntimeFault, OSError) as error:
            self._send(ExecOutput(exec_id=self._exec_id, error=str(error)))
        except Exception as error:
            log.exception("a command failed in a way that was not foreseen", task=self._start.task_id)
            self._send(ExecOutput(exec_id=self._exec_id, error=f"internal error: {type(error).__name__}: {error}"))
        else:
            self._send(ExecOutput(exec_id=self._exec_id, exit_code=code))

    async def _run(self, argv: list[str]) -> int:
        spawn = _on_terminal(argv, self._size) if self._start.tty else _on_pipes(argv, self._start.stdin)
        async with spawn as pipes:
            self._pipes = pipes
            self._resize()
            self._send(ExecOutput(exec_id=self._exec_id, started=True))
            readers = {asyncio.create_task(self._read(name, stream)) for name, stream in pipes.outputs}
            writer = asyncio.create_task(self._write(pipes))
            try:
                code = await pipes.process.wait()
                await self._rest_of_output(readers)
            finally:
                self._pipes = None
                for task in (writer, *readers):
                    task.cancel()
                await asyncio.gather(writer, *readers, return_exceptions=True)
        return code if code >= 0 else 128 - code

    async def _rest_of_output(self, readers: set[asyncio.Task[None]]) -> None:
        """Until its end, or until nothing more comes although the caller takes all."""
        while readers:
            before = self._sent
            _, readers = await asyncio.wait(readers, timeout=LEFTOVER_S)
            if self._sent == before and not self._credit.locked():
                return

    async def _read(self, name: str, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                data = await stream.read(CHUNK_BYTES)
            except OSError:
                return  # a terminal whose last user has gone
            if not data:
                return
            await self._credit.acquire()
            self._sent += 1
            output = ExecOutput(exec_id=self._exec_id)
            setattr(output, name, data)
            self._send(output)

    async def _write(self, pipes: _Pipes) -> None:
        taken = 0
        while True:
            data = await self._inbox.get()
            taken += 1
            if taken == CREDIT_EVERY:
                self._send(ExecOutput(exec_id=self._exec_id, credit=taken))
                taken = 0
            if pipes.stdin is None:
                continue
            try:
                if data is not None:
                    pipes.stdin.write(data)
                    await pipes.stdin.drain()
                elif pipes.terminal >= 0:
                    pipes.stdin.write(END_OF_TRANSMISSION)
                else:
                    pipes.stdin.close()
            except (BrokenPipeError, ConnectionResetError):
                continue  # it closed its input; what else comes is taken and dropped


@asynccontextmanager
async def _on_pipes(argv: list[str], stdin: bool) -> AsyncIterator[_Pipes]:
    with priority.ordinary():
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    assert process.stdout is not None
    assert process.stderr is not None
    async with _ending(process):
        yield _Pipes(process, (("stdout", process.stdout), ("stderr", process.stderr)), process.stdin)


@asynccontextmanager
async def _on_terminal(argv: list[str], size: tuple[int, int]) -> AsyncIterator[_Pipes]:
    """The runtime makes a terminal inside the container and connects it with ours, which therefore must not
    interpret anything itself."""
    loop = asyncio.get_running_loop()
    master, slave = pty.openpty()
    try:
        tty.setraw(slave)
        if all(size):
            termios.tcsetwinsize(slave, size)
        with priority.ordinary():
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
            )
    except BaseException:
        os.close(master)
        raise
    finally:
        os.close(slave)
    reader = asyncio.StreamReader(limit=CHUNK_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    output, _ = await loop.connect_read_pipe(lambda: protocol, os.fdopen(os.dup(master), "rb", 0))
    input_, flow = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(os.dup(master), "wb", 0))
    try:
        async with _ending(process):
            writer = asyncio.StreamWriter(input_, flow, None, loop)
            yield _Pipes(process, (("stdout", reader),), writer, master)
    finally:
        output.close()
        input_.close()
        os.close(master)


@asynccontextmanager
async def _ending(process: asyncio.subprocess.Process) -> AsyncIterator[None]:
    try:
        yield
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.shield(process.wait())
        # What it left in the background may hold its pipes for ever, and asyncio has no public word to close ours.
        process._transport.close()  # type: ignore[attr-defined]
