"""Commands run beside a task's process: output, input, flow control, and their end. The fake runtime runs them here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from node.commands import COMMANDS_MAX, WINDOW, Commands
from node.interface import CreateRequest, ImageConfig, ResolvedImage
from proto.dispatch_pb2 import ExecInput, ExecOutput, ExecResize, ExecStart
from proto.objects_pb2 import ContainerSpec
from tests.fakes import FakeRuntime
from tests.waiting import until


class Person:
    """Runs commands in task t1; takes output only as told."""

    def __init__(self) -> None:
        self.runtime = FakeRuntime()
        self.said: list[ExecOutput] = []
        self.commands = Commands(self.runtime, lambda task_id: task_id == "t1", self.said.append)

    def start(self, *argv: str, exec_id: str = "e1", task_id: str = "t1", **fields: Any) -> None:
        start = ExecStart(task_id=task_id, command=argv, **fields)
        self.commands.handle(ExecInput(exec_id=exec_id, start=start))

    def send(self, **what: Any) -> None:
        self.commands.handle(ExecInput(exec_id="e1", **what))

    def text(self, stream: str = "stdout") -> bytes:
        return b"".join(getattr(output, stream) for output in self.said)

    async def ended(self) -> ExecOutput:
        await until(lambda: self.said and self.said[-1].WhichOneof("what") in ("exit_code", "error"), what="its end")
        return self.said[-1]


@pytest.fixture
async def person() -> AsyncIterator[Person]:
    made = Person()
    spec = ContainerSpec(image="web")
    request = CreateRequest("t1", "web.1.t1", spec, ResolvedImage("web", (), ImageConfig()), None, "box")
    await made.runtime.create(request)
    await made.runtime.start("t1")
    yield made
    await made.commands.close()


async def test_output_errors_and_the_exit_status(person: Person) -> None:
    person.start("sh", "-c", "echo out; echo err >&2; exit 3")
    assert (await person.ended()).exit_code == 3
    assert person.said[0].started
    assert (person.text(), person.text("stderr")) == (b"out\n", b"err\n")


async def test_input_until_its_end(person: Person) -> None:
    person.start("sort", stdin=True)
    person.send(data=b"b\na\n")
    person.send(eof=True)
    assert (await person.ended()).exit_code == 0
    assert person.text() == b"a\nb\n"


async def test_output_waits_for_whoever_reads_it(person: Person) -> None:
    person.start("sh", "-c", "head -c 5000000 /dev/zero")
    await until(lambda: sum(output.HasField("stdout") for output in person.said) == WINDOW)
    taken = 0
    while person.said[-1].WhichOneof("what") != "exit_code":
        got = sum(output.HasField("stdout") for output in person.said)
        assert got <= taken + WINDOW
        person.send(credit=got - taken)
        taken = got
        await asyncio.sleep(0)
    assert len(person.text()) == 5_000_000


async def test_whoever_ignores_the_window_is_cut_off(person: Person) -> None:
    person.start("sleep", "100", stdin=True)
    await until(lambda: person.said)
    for _ in range(10 * WINDOW):
        person.send(data=b"x" * 32_768)
    await until(lambda: not person.commands._running)


async def test_a_terminal_and_its_size(person: Person) -> None:
    person.start("sh", "-c", "stty size; read x; stty size; echo got $x", tty=True, stdin=True, rows=33, columns=99)
    await until(lambda: b"33 99" in person.text())
    person.send(resize=ExecResize(rows=40, columns=120))
    person.send(data=b"this\n")
    assert (await person.ended()).exit_code == 0
    assert b"40 120" in person.text()
    assert b"got this" in person.text()


async def test_cancelling_ends_the_command_and_nobody_hears_of_it(person: Person) -> None:
    person.start("sleep", "100")
    await until(lambda: person.said)
    person.send(cancel=True)
    await until(lambda: not person.commands._running)
    assert [output.WhichOneof("what") for output in person.said] == ["started"]


async def test_a_process_left_behind_does_not_hold_the_end_back(person: Person) -> None:
    person.start("sh", "-c", "sleep 100 & echo done; kill $! >/dev/null 2>&1; (sleep 3 &) ; exit 5")
    assert (await person.ended()).exit_code == 5
    assert person.text() == b"done\n"


async def test_refusals(person: Person) -> None:
    person.start("true", task_id="t9")
    assert "t9 does not run on this node" in (await person.ended()).error
    person.start("/no/such/program", exec_id="e2")
    await until(lambda: person.said[-1].exec_id == "e2")
    assert "No such file" in person.said[-1].error
    for number in range(COMMANDS_MAX + 1):
        person.start("sleep", "100", exec_id=f"m{number}")
    assert f"already runs {COMMANDS_MAX} commands" in person.said[-1].error
