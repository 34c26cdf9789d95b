"""Examinations of nodes (`network doctor`), relayed to their sessions. A node that cannot answer, ceases to, or stays
silent answers with an error here: who asks never waits longer than ANSWER_S.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Protocol, Self

from proto.dispatch_pb2 import Examination, Examined, ManagerMessage, Probe

ANSWER_S = 25.0
"""A node ends an examination after 20 s (node/doctor.py) and has to be heard."""


class Link(Protocol):
    """The way to a node: its session."""

    def send(self, message: ManagerMessage) -> bool:
        """Queue the message; False when the session has ended."""
        ...


class Exam:
    """Iterate over it for (node ID, what it said), until each node that was asked has said its last."""

    def __init__(self, relay: ExamRelay, exam_id: str) -> None:
        self._relay, self.exam_id = relay, exam_id
        self._waiting: set[str] = set()
        self._queue: deque[tuple[str, Examined]] = deque()
        self._changed = asyncio.Event()

    def ask(self, node_id: str, probes: Iterable[Probe]) -> None:
        self._waiting.add(node_id)
        if not self._relay.send(node_id, Examination(exam_id=self.exam_id, probes=probes)):
            self.lost(node_id, "it is not connected to the leader")

    def lost(self, node_id: str, why: str) -> None:
        """The node will not say any more."""
        self.accept(node_id, Examined(done=True, error=why))

    def accept(self, node_id: str, examined: Examined) -> None:
        if node_id in self._waiting:
            self._queue.append((node_id, examined))
            if examined.done:
                self._waiting.discard(node_id)
            self._changed.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._relay.close(self)
        for node_id in self._waiting:
            self._relay.send(node_id, Examination(exam_id=self.exam_id, cancel=True))

    async def __aiter__(self) -> AsyncIterator[tuple[str, Examined]]:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._relay.answer_s
        while self._queue or self._waiting:
            while self._queue:
                yield self._queue.popleft()
            self._changed.clear()
            try:
                async with asyncio.timeout_at(ends_at):
                    while self._waiting and not self._queue:
                        await self._changed.wait()
                        self._changed.clear()
            except TimeoutError:
                for node_id in sorted(self._waiting):
                    self._relay.send(node_id, Examination(exam_id=self.exam_id, cancel=True))
                    self.lost(node_id, f"it did not answer within {self._relay.answer_s:g} s")


class ExamRelay:
    """`link(node_id)` finds the node's session, if it has one here."""

    def __init__(self, link: Callable[[str], Link | None], answer_s: float = ANSWER_S) -> None:
        self._link = link
        self.answer_s = answer_s
        self._exams: dict[str, Exam] = {}
        self._numbers = itertools.count(1)

    def open(self) -> Exam:
        """A new examination: `async with relay.open() as exam: exam.ask(...); async for node_id, said in exam: ...`"""
        exam = Exam(self, f"exam-{next(self._numbers)}")
        self._exams[exam.exam_id] = exam
        return exam

    def close(self, exam: Exam) -> None:
        self._exams.pop(exam.exam_id, None)

    def send(self, node_id: str, message: Examination) -> bool:
        link = self._link(node_id)
        return link is not None and link.send(ManagerMessage(examination=message))

    def deliver(self, node_id: str, examined: Examined) -> None:
        """The node said this."""
        exam = self._exams.get(examined.exam_id)
        if exam is not None:
            exam.accept(node_id, examined)

    def session_ended(self, node_id: str) -> None:
        for exam in self._exams.values():
            exam.lost(node_id, "its connection to the leader was lost meanwhile")
