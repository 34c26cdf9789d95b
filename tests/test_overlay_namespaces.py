"""The one thread that changes namespace: in which order it does what it is given."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from overlay.namespaces import NamespaceThread

pytestmark = pytest.mark.root


def occupied(thread: NamespaceThread) -> threading.Event:
    """The thread runs something until this is set."""
    started, go = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        go.wait(10)

    thread.submit(work)
    assert started.wait(10)
    return go


async def test_what_is_urgent_overtakes_what_waits() -> None:
    thread, done = NamespaceThread(), list[str]()
    go = occupied(thread)
    others = [asyncio.create_task(thread.run(partial(done.append, name))) for name in ("first", "second")]
    await asyncio.sleep(0)
    urgent = asyncio.create_task(thread.run(partial(done.append, "urgent"), urgent=True))
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(urgent, *others)
    thread.close()
    assert done == ["urgent", "first", "second"]


async def test_an_urgent_one_raises_where_it_is_awaited_and_not_if_nobody_waits_any_more() -> None:
    thread = NamespaceThread()

    def fail() -> None:
        raise OSError("refused")

    with pytest.raises(OSError, match="refused"):
        await thread.run(fail, urgent=True)
    go = occupied(thread)
    given_up = asyncio.create_task(thread.run(fail, urgent=True))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    go.set()
    assert await thread.run(lambda: "next") == "next"
    thread.close()
