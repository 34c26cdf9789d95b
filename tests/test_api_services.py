"""Services through the control API over gRPC: create, update, roll back, remove, and each refusal."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from proto import control_pb2 as pb
from proto import objects_pb2 as objects
from proto.objects_pb2 import Service, ServiceSpec, Task, UpdateStatus
from swarm.api import services
from swarm.store.changes import Remove, Update
from tests.managing import Managers, a_cluster, a_network, a_node, a_spec, managing


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value.code(), str(failure.value.details())


async def create(made: Managers, spec: ServiceSpec) -> Service:
    reply = await made.stubs["m1"].CreateService(pb.ServiceRequest(spec=spec))
    return reply.service


def update_of(service: Service, **fields: Any) -> pb.ServiceUpdateRequest:
    return pb.ServiceUpdateRequest(id=service.id, version=service.meta.version, spec=service.spec, **fields)


def published(name: str, number: int, mode: int = objects.INGRESS) -> ServiceSpec:
    spec = a_spec(name)
    spec.endpoint.ports.add(target_port=80, published_port=number, mode=objects.PublishMode.ValueType(mode))
    return spec


async def test_created_services_are_stored_with_networks_by_id_and_found_by_all_references() -> None:
    async with managing(a_cluster(), a_network("net1abc", "front")) as made:
        spec = a_spec()
        spec.task.networks.add(network_id="front", aliases=["www"])
        service = await create(made, spec)
        assert len(service.id) == 25
        assert [(c.network_id, list(c.aliases)) for c in service.spec.task.networks] == [("net1abc", ["www"])]
        for ref in ("web", "WEB", service.id, service.id[:6]):
            found = await made.stubs["m1"].GetService(pb.GetRequest(ref=ref))
            assert found == service
        assert await refused(made.stubs["m1"].GetService(pb.GetRequest(ref="nope"))) == (
            grpc.StatusCode.NOT_FOUND,
            "no such service: nope",
        )


async def test_refusals_that_depend_on_other_objects_change_nothing() -> None:
    going = a_network("net2", "old")
    going.pending_delete = True
    async with managing(a_cluster(), going, a_network("net0", "ingress", ingress=True)) as made:
        await create(made, published("web", 8000))
        before = made.store.digest()
        networked = a_spec("db")
        networked.task.networks.add(network_id="nope")
        on_old, on_ingress = a_spec("db"), a_spec("db")
        on_old.task.networks.add(network_id="old")
        on_ingress.task.networks.add(network_id="ingress")
        web_id = made.store.services.by_name("web").id  # type: ignore[union-attr]
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        cases = [
            (a_spec("Web"), grpc.StatusCode.ALREADY_EXISTS, "service Web already exists"),
            (networked, grpc.StatusCode.NOT_FOUND, "network nope not found"),
            (on_old, invalid, "network old is being removed"),
            (on_ingress, invalid, "cannot be attached to network ingress"),
            (
                published("db", 8000),
                invalid,
                f"port '8000' is already in use by service 'web' ({web_id}) as an ingress port",
            ),
            (published("db", 8000, objects.HOST), invalid, "port '8000' is already in use by service 'web'"),
            (published("db", 70000), invalid, "published port 70000 is out of range"),
            (a_spec("db", replicas=2**64 - 1), invalid, "replicas"),
            (a_spec("db", image=""), invalid, "image is missing"),
        ]
        for spec, code, message in cases:
            answered = await refused(create(made, spec))
            assert answered[0] is code, message
            assert message in answered[1]
        assert made.store.digest() == before


async def test_an_ambiguous_prefix_is_said_to_be_ambiguous() -> None:
    services = [Service(id=f"abc{number}") for number in range(2)]
    async with managing(a_cluster(), *services) as made:
        code, message = await refused(made.stubs["m1"].GetService(pb.GetRequest(ref="abc")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message == "service abc is ambiguous (2 matches found on ID prefix)"


async def test_an_update_keeps_the_old_spec_and_moves_the_spec_version() -> None:
    async with managing(a_cluster()) as made:
        first = await create(made, a_spec())
        first.spec.replicated.replicas = 5
        second = (await made.stubs["m1"].UpdateService(update_of(first))).service
        assert (second.spec.replicated.replicas, second.previous_spec.replicated.replicas) == (5, 2)
        assert second.previous_spec_version == first.spec_version < second.spec_version
        unchanged = (await made.stubs["m1"].UpdateService(update_of(second))).service
        assert unchanged == second


async def test_an_update_from_an_old_spec_conflicts_and_one_beside_the_systems_writes_does_not() -> None:
    async with managing(a_cluster()) as made:
        created = await create(made, a_spec("other"))
        created = await create(made, a_spec())
        allocated = Service()
        allocated.CopyFrom(created)
        allocated.endpoint.virtual_ips.add(network_id="net1", address="10.0.1.2/24")
        await made["m1"].service._backend.writer.commit((Update(allocated),))
        created.spec.replicated.replicas = 3
        updated = (await made.stubs["m1"].UpdateService(update_of(created))).service
        assert (updated.spec.replicated.replicas, len(updated.endpoint.virtual_ips)) == (3, 1)
        created.spec.replicated.replicas = 9
        code, message = await refused(made.stubs["m1"].UpdateService(update_of(created)))
        assert code is grpc.StatusCode.ABORTED
        assert "update out of sequence" in message


async def test_what_an_update_may_not_change() -> None:
    async with managing(a_cluster()) as made:
        service = await create(made, a_spec())
        renamed, switched, unversioned = update_of(service), update_of(service), update_of(service)
        renamed.spec.annotations.name = "shop"
        getattr(switched.spec, "global").SetInParent()
        unversioned.version = 0
        for request, message in (
            (renamed, "renaming service web is not supported"),
            (switched, "service mode change is not allowed"),
            (unversioned, "carries no version"),
        ):
            code, told = await refused(made.stubs["m1"].UpdateService(request))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert message in told


async def test_a_rollback_swaps_the_specs_and_says_so() -> None:
    async with managing(a_cluster()) as made:
        first = await create(made, a_spec())
        code, message = await refused(made.stubs["m1"].UpdateService(update_of(first, rollback=True)))
        assert (code, "does not have a previous spec" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        first.spec.task.container.image = "nginx:2"
        second = (await made.stubs["m1"].UpdateService(update_of(first))).service
        third = (await made.stubs["m1"].UpdateService(update_of(second, rollback=True))).service
        assert third.spec.task.container.image == "nginx"
        assert third.spec_version == first.spec_version
        assert third.update_status.state == UpdateStatus.ROLLBACK_STARTED
        fourth = (await made.stubs["m1"].UpdateService(update_of(third, rollback=True))).service
        assert fourth.spec.task.container.image == "nginx:2"


async def test_registry_credentials_are_stored_kept_by_updates_and_never_shown() -> None:
    async with managing(a_cluster()) as made:
        spec = a_spec()
        spec.task.container.registry_auth = "c2VjcmV0"
        service = await create(made, spec)
        service.spec.replicated.replicas = 3
        updated = await made.stubs["m1"].UpdateService(update_of(service))
        listed = await made.stubs["m1"].ListServices(pb.ListRequest())
        for reply in (service, updated, listed):
            assert b"c2VjcmV0" not in reply.SerializeToString()
        stored = made.store.services.get(service.id)
        assert stored is not None
        assert stored.spec.task.container.registry_auth == "c2VjcmV0"


async def test_removal_is_a_mark_and_can_be_repeated() -> None:
    async with managing(a_cluster()) as made:
        service = await create(made, a_spec())
        for _ in range(2):
            reply = await made.stubs["m1"].RemoveService(pb.RemoveRequest(ref="web"))
            assert reply.id == service.id
        stored = made.store.services.get(service.id)
        assert stored is not None
        assert stored.pending_delete
        code, _ = await refused(made.stubs["m1"].UpdateService(update_of(service)))
        assert code is grpc.StatusCode.NOT_FOUND


async def test_a_name_and_a_port_are_free_again_once_the_old_service_is_gone() -> None:
    async with managing(a_cluster()) as made:
        old = await create(made, published("web", 8000))
        await made.stubs["m1"].RemoveService(pb.RemoveRequest(ref="web"))
        creating = asyncio.ensure_future(create(made, published("web", 8000)))
        await asyncio.wait({creating}, timeout=0.05)
        assert not creating.done()
        marked = made.store.services.get(old.id)
        assert marked is not None
        await made["m1"].service._backend.writer.commit((Remove(marked),))
        assert (await creating).id != old.id


async def test_an_update_waits_for_the_port_of_a_service_that_is_being_removed() -> None:
    async with managing(a_cluster()) as made:
        old, other = await create(made, published("old", 8000)), await create(made, a_spec("other"))
        await made.stubs["m1"].RemoveService(pb.RemoveRequest(ref="old"))
        request = update_of(other)
        request.spec.endpoint.CopyFrom(published("old", 8000).endpoint)
        updating = asyncio.ensure_future(made.stubs["m1"].UpdateService(request))
        await asyncio.wait({updating}, timeout=0.05)
        assert not updating.done()
        marked = made.store.services.get(old.id)
        assert marked is not None
        await made["m1"].service._backend.writer.commit((Remove(marked),))
        assert (await updating).service.spec.endpoint == request.spec.endpoint


async def test_a_request_that_is_sent_again_creates_and_removes_once() -> None:
    async with managing(a_cluster()) as made:
        stub, again = made.stubs["m1"], (("request-id", "r1"),)
        request = pb.ServiceRequest(spec=a_spec())
        first = await stub.CreateService(request, metadata=again)
        second = await stub.CreateService(request, metadata=again)
        assert first == second
        removal, r2 = pb.RemoveRequest(ref="web"), (("request-id", "r2"),)
        await stub.RemoveService(removal, metadata=r2)
        marked = made.store.services.get(first.service.id)
        assert marked is not None
        await made["m1"].service._backend.writer.commit((Remove(marked),))
        await stub.RemoveService(removal, metadata=r2)  # the answer was lost, the service is gone by now


async def test_an_update_that_is_sent_again_changes_nothing_more() -> None:
    async with managing(a_cluster()) as made:
        service = await create(made, a_spec())
        request = update_of(service)
        request.spec.replicated.replicas = 7
        first = await made.stubs["m1"].UpdateService(request, metadata=(("request-id", "r1"),))
        second = await made.stubs["m1"].UpdateService(request, metadata=(("request-id", "r1"),))
        assert first == second


async def test_lists_count_what_runs_and_what_is_wanted() -> None:
    everywhere = Service(id="s2")
    everywhere.spec.annotations.name = "agent"
    getattr(everywhere.spec, "global").SetInParent()
    down = a_node("n2", state=objects.NodeStatus.DOWN)
    async with managing(a_cluster(), a_node("n1"), down, a_node("n3"), everywhere) as made:
        service = await create(made, a_spec(replicas=4))
        for number, (node_id, desired) in enumerate(
            [("n1", objects.TASK_RUNNING), ("n2", objects.TASK_RUNNING), ("n1", objects.TASK_SHUTDOWN)]
        ):
            task = Task(id=f"t{number}", service_id=service.id, node_id=node_id, desired_state=desired)
            task.status.state = objects.TASK_RUNNING
            made.store.tasks.put(task)
        listed = await made.stubs["m1"].ListServices(pb.ListRequest())
        assert [s.spec.annotations.name for s in listed.services] == ["agent", "web"]
        assert [(c.running, c.desired) for c in listed.counts] == [(0, 2), (1, 4)]


async def test_filters() -> None:
    async with managing(a_cluster()) as made:
        labelled = a_spec("api")
        labelled.annotations.labels["tier"] = "front"
        await create(made, labelled)
        await create(made, a_spec("web"))

        async def names(**fields: Any) -> list[str]:
            listed = await made.stubs["m1"].ListServices(pb.ListRequest(filter=pb.Filter(**fields)))
            return [service.spec.annotations.name for service in listed.services]

        assert await names(names=["w", "x"]) == ["web"]
        assert await names(labels={"tier": ""}) == ["api"]
        assert await names(labels={"tier": "back"}) == []
        assert await names(names=["web"], labels={"tier": ""}) == []


@pytest.mark.parametrize(
    ("attempts", "window_s", "delay_s", "warns"),
    [(3, 10, 5, True), (3, 16, 5, False), (3, 15, None, True), (0, 1, 5, False), (3, 0, 5, False)],
)
def test_a_limit_of_restarts_that_is_out_of_reach_is_warned_of(
    attempts: int, window_s: float, delay_s: float | None, warns: bool
) -> None:
    """The reference restarts such a task for ever and says nothing (swarmkit #2936)."""
    spec = a_spec("web")
    spec.task.restart.max_attempts, spec.task.restart.window_s = attempts, window_s
    if delay_s is not None:
        spec.task.restart.delay_s = delay_s
    assert bool(services.warnings(spec)) is warns
