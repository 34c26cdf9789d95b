"""The doctor's relay: answers of several nodes in one stream; whoever cannot answer is told, never waited for."""

from __future__ import annotations

import asyncio

from proto.dispatch_pb2 import Connect, Examined, ManagerMessage, Probe, ProbeResult
from swarm.dispatch.doctor import Exam, ExamRelay

PROBES = [Probe(number=1, connect=Connect(address="192.0.2.1", port=80))]
PATIENT_S = 20.0


class FakeLink:
    def __init__(self) -> None:
        self.sent: list[ManagerMessage] = []

    def send(self, message: ManagerMessage) -> bool:
        self.sent.append(message)
        return True

    def cancelled(self) -> bool:
        return any(message.examination.cancel for message in self.sent)


class Rig:
    def __init__(self, answer_s: float = PATIENT_S) -> None:
        self.links = {"n1": FakeLink(), "n2": FakeLink()}
        self.relay = ExamRelay(self.links.get, answer_s)

    def answer(self, node_id: str, exam_id: str, done: bool = True, number: int = 1) -> None:
        self.relay.deliver(node_id, Examined(exam_id=exam_id, results=[ProbeResult(number=number)], done=done))


async def heard(exam: Exam) -> list[tuple[str, int, bool, str]]:
    return [(node_id, len(said.results), said.done, said.error) async for node_id, said in exam]


async def test_it_ends_when_every_node_has_said_its_last() -> None:
    rig = Rig()
    async with rig.relay.open() as exam:
        exam.ask("n1", PROBES)
        exam.ask("n2", PROBES)
        assert rig.links["n1"].sent[0].examination.probes == PROBES
        rig.answer("n1", exam.exam_id, done=False)
        rig.answer("n1", exam.exam_id)
        rig.answer("n2", exam.exam_id)
        assert await heard(exam) == [("n1", 1, False, ""), ("n1", 1, True, ""), ("n2", 1, True, "")]
    assert not rig.links["n1"].cancelled()


async def test_a_node_without_a_session_or_whose_session_ends_is_told() -> None:
    rig = Rig()
    async with rig.relay.open() as exam:
        exam.ask("n3", PROBES)
        exam.ask("n1", PROBES)
        rig.relay.session_ended("n1")
        rig.answer("n1", exam.exam_id)
        assert await heard(exam) == [
            ("n3", 0, True, "it is not connected to the leader"),
            ("n1", 0, True, "its connection to the leader was lost meanwhile"),
        ]


async def test_a_silent_node_is_given_up_and_told_to_stop() -> None:
    rig = Rig(answer_s=0.05)
    async with rig.relay.open() as exam:
        exam.ask("n1", PROBES)
        exam.ask("n2", PROBES)
        rig.answer("n2", exam.exam_id)
        assert await heard(exam) == [("n2", 1, True, ""), ("n1", 0, True, "it did not answer within 0.05 s")]
    assert rig.links["n1"].cancelled()
    assert not rig.links["n2"].cancelled()


async def test_whoever_leaves_ends_the_examination_on_the_nodes() -> None:
    rig = Rig()
    async with rig.relay.open() as exam:
        exam.ask("n1", PROBES)
        rig.answer("n1", exam.exam_id, done=False)
        async for _ in exam:
            break
    assert rig.links["n1"].cancelled()
    rig.answer("n1", exam.exam_id)  # too late: nobody listens, nothing is kept
    assert not rig.relay._exams


async def test_answers_that_nobody_asked_for_are_dropped() -> None:
    rig = Rig()
    async with rig.relay.open() as exam, rig.relay.open() as other:
        exam.ask("n1", PROBES)
        rig.answer("n2", exam.exam_id)
        rig.answer("n1", other.exam_id)
        rig.answer("n1", exam.exam_id)
        async with asyncio.timeout(PATIENT_S):
            assert await heard(exam) == [("n1", 1, True, "")]
