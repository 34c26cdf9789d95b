"""What counts as an open connection of a task that is to stop, and when a new one serves."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import TypeVar, cast

import pytest

from node.drain import Releases, listens, quiet
from overlay.interface import NetworkError
from overlay.sockdiag import TcpSockets
from tests.fakes import NO_PID, FakeNetwork

T = TypeVar("T")


class Here(FakeNetwork):
    """The namespace of this process is that of the one task there is."""

    async def inside(self, task_id: str, function: Callable[[], T]) -> T:
        if task_id != "t1":
            raise NetworkError(f"no {task_id}")
        return function()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def server(stack: ExitStack, family: int = socket.AF_INET) -> socket.socket:
    made = stack.enter_context(socket.socket(family))
    made.bind(("", 0))
    return made


def client(stack: ExitStack, to: socket.socket) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", to.getsockname()[1])))


def sockets(stack: ExitStack) -> TcpSockets:
    made = TcpSockets()
    stack.callback(made.close)
    return made


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_only_connections_to_a_listening_port_count(stack: ExitStack, family: int) -> None:
    """An IPv6 socket serves IPv4 too."""
    seen = sockets(stack)
    serving = server(stack, family)
    port = serving.getsockname()[1]
    assert port not in seen.listening()
    serving.listen()
    assert port in seen.listening()
    assert seen.open_connections()[port] == 0
    asked = client(stack, serving)
    accepted = stack.enter_context(serving.accept()[0])
    assert seen.open_connections()[port] == 1
    serving.close()
    assert seen.open_connections()[port] == 0, "what it still sends and receives is its own business"
    asked.close()
    accepted.close()


async def test_a_task_is_quiet_when_two_looks_saw_no_connection() -> None:
    seen = [2, 1, 0, 1, 0, 0]

    class Counted(FakeNetwork):
        async def inside(self, task_id: str, function: Callable[[], T]) -> T:
            found = SimpleNamespace(open_connections=lambda: seen.pop(0), close=lambda: seen.append(-1))
            return cast("T", found)

    await quiet(Counted(), "t1")
    assert seen == [-1], "all looks were taken, and the socket is closed"


async def test_a_task_serves_when_its_ports_listen(stack: ExitStack) -> None:
    serving = server(stack)
    ports = frozenset({serving.getsockname()[1]})
    waiting = asyncio.create_task(listens(Here(), "t1", ports, os.getpid()))
    await asyncio.wait({waiting}, timeout=0.1)
    assert not waiting.done()
    serving.listen()
    await waiting


async def test_nothing_is_waited_for_where_nobody_can_look() -> None:
    await listens(Here(), "t1", frozenset({1}), NO_PID)
    await listens(Here(), "gone", frozenset({1}), os.getpid())
    await quiet(Here(), "gone")


async def test_a_word_that_came_early_is_remembered_until_the_task_is_gone() -> None:
    releases = Releases()
    releases.mark(["t1"])
    await releases.wait("t1")
    waiting = asyncio.create_task(releases.wait("t2"))
    releases.mark(["t3"])
    releases.mark(["t2"])
    await waiting
    releases.forget("t1")
    again = asyncio.create_task(releases.wait("t1"))
    releases.mark(["t1"])
    await again
