"""What counts as an open connection of a task that is to stop."""

from __future__ import annotations

import asyncio
import os
import socket

from hypothesis import given
from hypothesis import strategies as st

from node.drain import POLL_S, Releases, listening, listens, open_connections
from tests.fakes import NO_PID

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"


def row(port: int, state: str, peer: int = 0) -> str:
    return f"   0: 0200000A:{port:04X} 0300000A:{peer:04X} {state} 00000000:00000000 00:00000000 00000000     0\n"


def test_only_connections_to_a_listening_port_count() -> None:
    table = HEAD + row(80, "0A") + row(80, "01", 4000) + row(80, "03", 4001) + row(80, "06", 4002) + row(5000, "01", 80)
    assert open_connections([table, HEAD]) == 2
    assert open_connections([HEAD + row(80, "01"), HEAD + row(80, "0A")]) == 1, "IPv6 sockets serve IPv4 too"
    assert open_connections([]) == 0


def test_ports_that_listen() -> None:
    assert listening([HEAD + row(80, "0A") + row(81, "01"), HEAD + row(443, "0A")]) == {80, 443}


async def test_waiting_for_a_listener_in_the_namespace_of_a_process() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        waiting = asyncio.create_task(listens(os.getpid(), frozenset({port})))
        await asyncio.wait({waiting}, timeout=3 * POLL_S)
        assert not waiting.done()
        server.listen()
        await waiting
    await listens(NO_PID, frozenset({1}))


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["01", "03", "06", "08", "0A"]))))
def test_never_more_than_the_rows(rows: list[tuple[int, str]]) -> None:
    table = HEAD + "".join(row(*each) for each in rows)
    assert 0 <= open_connections([table]) <= len(rows)


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
