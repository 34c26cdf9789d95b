"""An event loop whose clock is virtual: waiting takes no time, and nothing outside can happen meanwhile."""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
HELD_S = 0.1
"""What a cut path holds back is looked at again after so long."""


OVERSHOOT_S = 1e-9
"""Clocks are a little late: whoever sleeps until a deadline finds that it has passed, whatever was rounded."""


class _Instant(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits for something that never happens"
        if timeout > 0:
            self._loop.now_s += timeout + OVERSHOOT_S
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Deterministic as long as what it runs is: no threads, no sockets, no order taken from addresses or hashes."""

    def __init__(self, start_s: float) -> None:
        self.now_s = start_s
        super().__init__(_Instant(self))
        self._clock_resolution = OVERSHOOT_S / 1000

    def time(self) -> float:
        return self.now_s


class Pipe(Generic[T]):
    """One direction of a connection: in order, late, and held back while the path is cut, as TCP does."""

    def __init__(self, latency_s: Callable[[], float], is_cut: Callable[[], bool], take: Callable[[T], None]) -> None:
        self._latency_s = latency_s
        self._is_cut = is_cut
        self._take = take
        self._under_way: deque[tuple[float, T]] = deque()

    def send(self, item: T) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._latency_s()
        if self._under_way:
            due = max(due, self._under_way[-1][0])
        self._under_way.append((due, item))
        loop.call_at(due, self._arrive)

    def _arrive(self) -> None:
        loop = asyncio.get_running_loop()
        if self._under_way and self._is_cut():
            loop.call_later(HELD_S, self._arrive)
            return
        while self._under_way and self._under_way[0][0] <= loop.time():
            self._take(self._under_way.popleft()[1])
