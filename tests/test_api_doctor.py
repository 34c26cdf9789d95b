"""`ExamineNetworks` at the leader and through a follower: who is asked, who answers, and the report."""

from __future__ import annotations

import grpc

from proto import control_pb2 as pb
from proto.control_pb2 import Diagnosis, DoctorReply
from proto.dispatch_pb2 import Examination, Examined, ManagerMessage, ProbeResult
from swarm.dispatch.doctor import ExamRelay
from tests.doctor_swarm import a_network, a_node, a_service, a_task, good_facts
from tests.managing import Managers, a_cluster, managing
from tests.test_api_services import refused


class Answering:
    """A node's session that answers every probe at once, all being well but names."""

    def __init__(self, relay: ExamRelay, node_id: str) -> None:
        self._relay, self._node_id = relay, node_id
        self.asked: list[Examination] = []

    def send(self, message: ManagerMessage) -> bool:
        asked = message.examination
        if not asked.cancel:
            self.asked.append(asked)
            results = [
                ProbeResult(
                    number=probe.number,
                    outcome=ProbeResult.SILENT if probe.HasField("lookup") else ProbeResult.OK,
                )
                for probe in asked.probes
            ]
            facts = good_facts(("10.0.1.11",))
            self._relay.deliver(self._node_id, Examined(exam_id=asked.exam_id, results=results, facts=facts, done=True))
        return True


NODES = (a_cluster(), a_node("n1"), a_node("n2"))
RECORDS = (*NODES, a_network("net", 1), a_service("web", "net"), a_task("web", 1, "n1"))


async def replies(made: Managers, asked: str, ref: str = "") -> list[DoctorReply]:
    return [reply async for reply in made.stubs[asked].ExamineNetworks(pb.DoctorRequest(ref=ref))]


async def test_any_manager_s_report_tells_what_nodes_found_and_who_does_not_answer() -> None:
    async with managing(*RECORDS, names=("m1", "m2")) as made:
        leader = made["m1"]
        node = leader.links["n1"] = Answering(leader.exams, "n1")
        for asked in ("m1", "m2"):
            *progress, last = await replies(made, asked)
            assert (progress[-1].progress.nodes, progress[-1].progress.answered) == (2, 2)
            found = {(each.subject, each.what) for each in last.report.diagnoses if each.severity == Diagnosis.BROKEN}
            assert found == {
                ("n2", "the node does not answer"),
                ("n1", "its name server (process 77) does not answer"),
            }
        assert len(node.asked) == 2


async def test_of_one_service_only_its_nodes_are_asked() -> None:
    async with managing(*RECORDS) as made:
        made["m1"].links["n1"] = Answering(made["m1"].exams, "n1")
        *_, last = await replies(made, "m1", "web")
        assert {each.subject for each in last.report.diagnoses} == {"n1"}
        code, message = await refused(_drained(made, "nobody"))
        assert (code, message) == (grpc.StatusCode.NOT_FOUND, "no such service: nobody")


async def _drained(made: Managers, ref: str) -> None:
    await replies(made, "m1", ref)
