"""The service Control, on the manager's unix socket and between managers.

Each method is two lines: which part of the package answers, and with what. Where it is answered (here
or at the leader), how long that may take and how errors are told is `forward.py`'s business.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from proto import control_pb2 as pb
from proto.control_pb2_grpc import ControlServicer
from proto.dispatch_pb2 import ExecOutput
from proto.objects_pb2 import Cluster, Network, Node, Service, Task
from swarm.api import (
    backup,
    doctor,
    encryption,
    events,
    execs,
    explaining,
    find,
    logs,
    networks,
    nodes,
    services,
    views,
    watch,
)
from swarm.api.backend import Backend, Demotion, LostLeadership
from swarm.api.forward import Call, Router
from swarm.consensus.interface import Consensus
from swarm.dispatch.doctor import ExamRelay
from swarm.dispatch.execs import ExecRelay
from swarm.dispatch.logs import LogRelay
from swarm.security.unlock_key import text_of
from swarm.store.store import Store
from swarm.store.writer import Writer

Context = grpc.aio.ServicerContext[Any, Any]
Req = TypeVar("Req", bound=Message)
Rep = TypeVar("Rep", bound=Message)

_METHODS = pb.DESCRIPTOR.services_by_name["Control"].methods_by_name


def _path(name: str) -> str:
    return f"/{_METHODS[name].containing_service.full_name}/{name}"


def _reply_type(name: str) -> Any:
    return GetMessageClass(_METHODS[name].output_type)


def _unary(
    handler: Callable[[ControlService, Req, Call], Awaitable[Rep]], *, reads: bool = False
) -> Callable[[ControlService, Req, Context], Awaitable[Rep]]:
    """The handler runs on the leader, wherever the call came in."""
    name = handler.__name__

    @functools.wraps(handler)
    async def method(self: ControlService, request: Req, context: Context) -> Rep:
        local = functools.partial(handler, self)
        reply: Rep = await self.router.unary(
            _path(name), self.localised(name, request), _reply_type(name), context, local, reads=reads
        )
        return reply

    return method


_read = functools.partial(_unary, reads=True)
"""The handler runs on the manager that was asked, once its state is as new as the leader's."""


def _stream(
    handler: Callable[[ControlService, Req, Call], AsyncIterator[Rep]],
) -> Callable[[ControlService, Req, Context], AsyncGenerator[Rep, None]]:
    name = handler.__name__

    @functools.wraps(handler)
    async def method(self: ControlService, request: Req, context: Context) -> AsyncGenerator[Rep, None]:
        local = functools.partial(handler, self)
        async for reply in self.router.stream(_path(name), request, _reply_type(name), context, local):
            yield reply

    return method


class ControlService(ControlServicer):
    """`open_channel` makes an mTLS channel to another manager; `now` is Unix s."""

    def __init__(  # noqa: PLR0917  # the parts of a manager, in the order in which they are made
        self,
        store: Store,
        writer: Writer,
        consensus: Consensus,
        open_channel: Callable[[str], grpc.aio.Channel],
        relay: LogRelay,
        exec_relay: ExecRelay,
        exam_relay: ExamRelay,
        now: Callable[[], float],
        new_id: Callable[[], str],
        demotion_refusal: Demotion,
        keys_settled: Callable[[float], Awaitable[list[str]]],
    ) -> None:
        lost_leadership = LostLeadership()
        consensus.on_leadership(lost_leadership.changed)
        self._own_id = consensus.node_id
        self._backend = Backend(
            store,
            writer,
            consensus,
            relay,
            exec_relay,
            exam_relay,
            now,
            demotion_refusal,
            keys_settled,
            lost_leadership,
        )
        self._store = store
        self._events = events.EventLog(store, now)
        self.router = Router(consensus, open_channel, new_id)

    async def close(self) -> None:
        """Close the channels to other managers."""
        await self.router.close()

    def localised(self, name: str, request: Req) -> Req:
        """ "self" means this node; the leader, if the call goes there, would take it for its own."""
        field = {"RemoveNode": "ref", "UpdateNode": "id"}.get(name)
        if field is None or getattr(request, field) != find.SELF:
            return request
        copy = type(request)()
        copy.CopyFrom(request)
        setattr(copy, field, self._own_id)
        return copy

    # ---- cluster

    @_read
    async def GetCluster(self, request: pb.ClusterRequest, call: Call) -> Cluster:
        return views.shown_cluster(nodes.the_cluster(self._store))

    @_unary
    async def RotateJoinToken(self, request: pb.RotateTokenRequest, call: Call) -> Cluster:
        return views.shown_cluster(await nodes.rotate_token(self._backend, request.role, call.request_id))

    @_unary
    async def UpdateCluster(self, request: pb.ClusterUpdateRequest, call: Call) -> Cluster:
        return views.shown_cluster(await encryption.update(self._backend, request, call.request_id))

    @_read
    async def GetUnlockKey(self, request: pb.UnlockKeyRequest, call: Call) -> pb.UnlockKeyReply:
        return pb.UnlockKeyReply(unlock_key=text_of(nodes.the_cluster(self._store).unlock_key))

    @_stream
    def Backup(self, request: pb.BackupRequest, call: Call) -> AsyncIterator[pb.BackupPiece]:
        return backup.backup(self._backend)

    # ---- nodes

    @_read
    async def GetNode(self, request: pb.GetRequest, call: Call) -> Node:
        node = find.find_node(self._store, request.ref, self._own_id)
        return views.shown_node(node, self._backend.consensus)

    @_read
    async def ListNodes(self, request: pb.ListRequest, call: Call) -> pb.NodeList:
        found = [node for node in self._store.nodes if views.node_matches(node, request.filter)]
        found.sort(key=lambda node: (node.description.hostname, node.id))
        return pb.NodeList(nodes=[views.shown_node(node, self._backend.consensus) for node in found])

    @_unary
    async def UpdateNode(self, request: pb.NodeUpdateRequest, call: Call) -> Node:
        node = await nodes.update(self._backend, request, self._own_id, call.request_id)
        return views.shown_node(node, self._backend.consensus)

    @_unary
    async def RemoveNode(self, request: pb.RemoveRequest, call: Call) -> pb.RemoveReply:
        return await nodes.remove(self._backend, request.ref, request.force, self._own_id, call.request_id)

    # ---- services

    @_unary
    async def CreateService(self, request: pb.ServiceRequest, call: Call) -> pb.ServiceReply:
        return await services.create(self._backend, request.spec, call.request_id)

    @_read
    async def GetService(self, request: pb.GetRequest, call: Call) -> Service:
        return views.inspected_service(self._store, find.find_service(self._store, request.ref))

    @_read
    async def ListServices(self, request: pb.ListRequest, call: Call) -> pb.ServiceList:
        found = [service for service in self._store.services if views.service_matches(service, request.filter)]
        found.sort(key=lambda service: service.spec.annotations.name)
        return pb.ServiceList(
            services=[views.shown_service(service) for service in found],
            counts=[views.counts(self._store, service) for service in found],
        )

    @_unary
    async def UpdateService(self, request: pb.ServiceUpdateRequest, call: Call) -> pb.ServiceReply:
        return await services.update(self._backend, request, call.request_id)

    @_unary
    async def RebalanceService(self, request: pb.RebalanceRequest, call: Call) -> pb.RebalanceReply:
        return await services.rebalance(self._backend, request.ref, call.request_id)

    @_unary
    async def RemoveService(self, request: pb.RemoveRequest, call: Call) -> pb.RemoveReply:
        return await services.remove(self._backend, request.ref, call.request_id)

    @_stream
    def WatchService(self, request: pb.WatchRequest, call: Call) -> AsyncIterator[pb.WatchEvent]:
        return watch.watch(self._backend, request.service_id)

    # ---- tasks

    @_read
    async def ListTasks(self, request: pb.ListRequest, call: Call) -> pb.TaskList:
        wanted = request.filter
        if len(wanted.service_ids) == 1:
            tasks = self._store.tasks.where("service", wanted.service_ids[0])
        elif len(wanted.node_ids) == 1:
            tasks = self._store.tasks.where("node", wanted.node_ids[0])
        elif len(wanted.network_ids) == 1:
            tasks = self._store.tasks.where("network", wanted.network_ids[0])
        else:
            tasks = list(self._store.tasks)
        return pb.TaskList(tasks=[views.shown_task(task) for task in tasks if views.task_matches(task, wanted)])

    @_read
    async def GetTask(self, request: pb.GetRequest, call: Call) -> Task:
        return views.shown_task(find.find_task(self._store, request.ref))

    @_stream
    def Logs(self, request: pb.LogsRequest, call: Call) -> AsyncIterator[pb.LogsReply]:
        return logs.logs(self._backend, request)

    async def Exec(self, calls: AsyncIterator[pb.ExecCall], context: Context) -> AsyncGenerator[ExecOutput, None]:
        local = functools.partial(execs.run, self._backend)
        async for output in self.router.exchange(_path("Exec"), calls, pb.ExecCall, ExecOutput, context, local):
            yield output

    async def Events(self, request: pb.EventsRequest, context: Context) -> AsyncGenerator[pb.Event, None]:
        async for event in self.router.here(_path("Events"), context, lambda: self._events.read(request)):
            yield event

    @_read
    async def Explain(self, request: pb.ExplainRequest, call: Call) -> pb.Explanation:
        return explaining.explain(self._backend, request.ref)

    # ---- networks

    @_stream
    def ExamineNetworks(self, request: pb.DoctorRequest, call: Call) -> AsyncIterator[pb.DoctorReply]:
        return doctor.examine(self._backend, request.ref)

    @_unary
    async def CreateNetwork(self, request: pb.NetworkRequest, call: Call) -> Network:
        return await networks.create(self._backend, request.spec, call.request_id)

    @_read
    async def GetNetwork(self, request: pb.GetRequest, call: Call) -> Network:
        return views.inspected_network(self._store, find.find_network(self._store, request.ref))

    @_read
    async def ListNetworks(self, request: pb.ListRequest, call: Call) -> pb.NetworkList:
        found = [network for network in self._store.networks if views.network_matches(network, request.filter)]
        found.sort(key=lambda network: network.spec.annotations.name)
        return pb.NetworkList(networks=found)

    @_unary
    async def RemoveNetwork(self, request: pb.RemoveRequest, call: Call) -> pb.RemoveReply:
        return await networks.remove(self._backend, request.ref, call.request_id)

    @_unary
    async def RotateNetworkKeys(self, request: pb.RotateNetworkKeysRequest, call: Call) -> pb.RotateNetworkKeysReply:
        return await networks.rotate_keys(self._backend, call.request_id)
