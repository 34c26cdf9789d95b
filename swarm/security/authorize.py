"""Who may call what on the mTLS listener: a table by full method name. What is not in it is refused."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from proto import control_pb2, dispatch_pb2, join_pb2, raft_pb2
from proto.objects_pb2 import MANAGER, WORKER, NodeRole
from swarm.errors import Denied
from swarm.security.peers import peer_certified

Roles = frozenset[NodeRole.ValueType]
MANAGERS: Roles = frozenset({MANAGER})
MEMBERS: Roles = frozenset({MANAGER, WORKER})

TRequest = TypeVar("TRequest")
TResponse = TypeVar("TResponse")
Context = grpc.aio.ServicerContext[Any, Any]


def _methods(service: ServiceDescriptor, roles: Roles) -> dict[str, Roles]:
    return {f"/{service.full_name}/{method.name}": roles for method in service.methods}


RULES: Mapping[str, Roles] = {
    **_methods(control_pb2.DESCRIPTOR.services_by_name["Control"], MANAGERS),
    **_methods(raft_pb2.DESCRIPTOR.services_by_name["Raft"], MANAGERS),
    **_methods(dispatch_pb2.DESCRIPTOR.services_by_name["Dispatcher"], MEMBERS),
    **_methods(join_pb2.DESCRIPTOR.services_by_name["Certificates"], MANAGERS),
    "/pyswarm.Certificates/Renew": MEMBERS,
}
"""Services are taken whole, so a method added to one is never open to workers by oversight."""


class RoleInterceptor(grpc.aio.ServerInterceptor):
    """Refuses, with PERMISSION_DENIED, callers whose certificate does not permit the method.

    `blocked` says of a node ID whether it was removed from the cluster: its certificate is still signed and valid.
    The validity is checked at each call as well, since a connection may outlive the certificate that opened it.
    """

    def __init__(
        self,
        rules: Mapping[str, Roles],
        cluster_id: str,
        blocked: Callable[[str], bool],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._rules = rules
        self._cluster_id = cluster_id
        self._blocked = blocked
        self._now = now

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[TRequest, TResponse] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[TRequest, TResponse] | None:
        handler = await continuation(handler_call_details)
        return None if handler is None else self._guarded(handler, handler_call_details.method)

    def refusal(self, method: str, context: Context) -> str | None:
        """Why this caller may not call this method, or None."""
        roles = self._rules.get(method)
        if roles is None:
            return f"permission denied: no rule permits {method}"
        try:
            peer = peer_certified(context)
        except Denied as error:
            return f"permission denied: {error}"
        who = peer.identity
        if who.cluster_id != self._cluster_id:
            return f"permission denied: node {who.node_id} belongs to another cluster ({who.cluster_id})"
        if who.role not in roles:
            wanted = " or ".join(sorted(NodeRole.Name(role).lower() for role in roles))
            return f"permission denied: {method} needs the role {wanted}; node {who.node_id} is a " + (
                NodeRole.Name(who.role).lower()
            )
        if not peer.not_before <= self._now() <= peer.not_after:
            return (
                f"permission denied: the certificate of node {who.node_id} has expired; it must renew it or join again"
            )
        if self._blocked(who.node_id):
            return f"permission denied: node {who.node_id} was removed from this cluster; it must leave and join again"
        return None

    def _guarded(self, handler: Any, method: str) -> Any:
        """The handler with the check in front, in the same of gRPC's four shapes."""
        kind = f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}"
        inner = getattr(handler, kind)

        async def check(context: Context) -> None:
            if (why := self.refusal(method, context)) is not None:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)

        async def answer(request: Any, context: Context) -> Any:
            await check(context)
            return await inner(request, context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            await check(context)
            async with contextlib.aclosing(inner(request, context)) as messages:
                async for message in messages:
                    yield message

        # gRPC tells generators from coroutines that call context.write by looking at the function.
        outer = stream if inspect.isasyncgenfunction(inner) else answer
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(outer, handler.request_deserializer, handler.response_serializer)


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"
