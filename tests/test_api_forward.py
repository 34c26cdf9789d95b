"""Any manager answers, whatever happens to the leader meanwhile."""

from __future__ import annotations

import asyncio

import grpc

from proto import control_pb2 as pb
from proto.objects_pb2 import MANAGER, Node
from tests.managing import a_cluster, a_node, a_spec, managing
from tests.test_api_services import refused
from tests.waiting import until

THREE = ("m1", "m2", "m3")


def a_manager(node_id: str) -> Node:
    made = a_node(node_id)
    made.role = MANAGER
    return made


async def test_a_follower_answers_as_the_leader_would() -> None:
    async with managing(a_cluster(), names=THREE) as made:
        reply = await made.stubs["m2"].CreateService(pb.ServiceRequest(spec=a_spec()))
        assert made.store.services.get(reply.service.id) == reply.service
        assert await refused(made.stubs["m3"].GetService(pb.GetRequest(ref="nope"))) == (
            grpc.StatusCode.NOT_FOUND,
            "no such service: nope",
        )


async def test_self_is_the_manager_that_was_asked_not_the_one_that_answers() -> None:
    async with managing(a_cluster(), *map(a_manager, THREE), names=THREE) as made:
        _, message = await refused(made.stubs["m2"].RemoveNode(pb.RemoveRequest(ref="self")))
        assert "node m2 is a" in message, message


async def test_a_read_is_answered_where_it_was_asked() -> None:
    async with managing(a_cluster(), *map(a_manager, THREE), names=THREE) as made:
        await made["m1"].server.stop(None)
        assert (await made.stubs["m2"].GetNode(pb.GetRequest(ref="self"))).id == "m2"
        assert len((await made.stubs["m3"].ListNodes(pb.ListRequest())).nodes) == 3


async def test_a_call_waits_for_an_election() -> None:
    async with managing(a_cluster(), names=THREE) as made:
        made.group.elect(None)
        creating = asyncio.ensure_future(_create(made.stubs["m2"]))
        await asyncio.wait({creating}, timeout=0.1)
        assert not creating.done()
        made.group.elect("m3")
        assert await creating in made.store.services


async def test_a_leader_that_froze_is_left_for_the_next_one() -> None:
    async with managing(a_cluster(), names=THREE) as made:
        made.group.gate.clear()
        creating = asyncio.ensure_future(_create(made.stubs["m2"]))
        await until(lambda: made.group.waiting == 1)
        made.group.elect("m2")
        made.group.gate.set()
        assert await creating in made.store.services
        assert len(made.store.services) == 1


async def test_a_dead_leader_is_only_a_pause() -> None:
    async with managing(a_cluster(), names=THREE) as made:
        await _create(made.stubs["m2"])
        await made["m1"].server.stop(None)
        creating = asyncio.ensure_future(_create(made.stubs["m2"], "db"))
        await asyncio.wait({creating}, timeout=0.1)
        made.group.elect("m3")
        assert await creating in made.store.services


async def test_without_a_leader_the_answer_says_what_to_do() -> None:
    async with managing(a_cluster(), names=THREE) as made:
        made.group.elect(None)
        # The forwarded mark spares the test the wait: who passes a call on does the waiting.
        call = made.stubs["m2"].GetCluster(pb.ClusterRequest(), metadata=(("forwarded-by", "m3"),))
        code, message = await refused(call)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert message.startswith("the swarm does not have a leader")


async def test_a_forwarded_call_is_never_forwarded_again() -> None:
    async with managing(a_cluster(), names=THREE) as made:
        call = made.stubs["m2"].RemoveService(pb.RemoveRequest(ref="web"), metadata=(("forwarded-by", "m3"),))
        code, _ = await refused(call)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert dict(await call.trailing_metadata() or ())["leader-addr"] == made["m1"].addr


async def test_a_bug_is_told_briefly_and_leaks_nothing() -> None:
    async with managing(a_cluster()) as made:
        made["m1"].consensus.members = None  # type: ignore[assignment, method-assign]
        made.store.nodes.put(a_node("w1"))
        code, message = await refused(made.stubs["m1"].RemoveNode(pb.RemoveRequest(ref="w1")))
        assert code is grpc.StatusCode.INTERNAL
        assert message == "RemoveNode failed on the manager for a reason it did not expect: see its log"


async def _create(stub: object, name: str = "web") -> str:
    reply = await stub.CreateService(pb.ServiceRequest(spec=a_spec(name)))  # type: ignore[attr-defined]
    return str(reply.service.id)
