"""A small secured cluster for tests: real listeners, certificates and channels; consensus is the fake."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from proto.join_pb2_grpc import add_CertificatesServicer_to_server, add_JoinServicer_to_server
from proto.objects_pb2 import MANAGER, Cluster, Node, NodeRole
from swarm.api.join import CertificatesService, JoinService
from swarm.ids import random_id
from swarm.security.authorize import RULES, RoleInterceptor
from swarm.security.bootstrap import NewCluster, create_cluster
from swarm.security.ca import RootCa, new_key_and_csr, sign_node
from swarm.security.certificates import NodeCredentials
from swarm.security.identity import Identity
from swarm.security.peers import peer_identity
from swarm.store.store import Store
from swarm.store.writer import Writer
from tests.fakes_consensus import FakeConsensus, FakeGroup

Context = grpc.aio.ServicerContext[Any, Any]
CALL_TIMEOUT_S = 5.0


@dataclass
class SecuredManager:
    credentials: NodeCredentials
    consensus: FakeConsensus
    service: CertificatesService
    addr: str
    join_addr: str
    server: grpc.aio.Server
    join_server: grpc.aio.Server

    async def stop(self) -> None:
        await self.server.stop(0)
        await self.join_server.stop(0)


@dataclass
class SecuredCluster:
    """`now` may be moved by a test: it is the clock of the managers' checks and signatures."""

    directory: Path
    new: NewCluster
    store: Store = field(init=False)
    group: FakeGroup = field(init=False)
    offset_s: float = 0.0
    managers: list[SecuredManager] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store.of(self.new.cluster, self.new.node)
        self.group = FakeGroup(self.store)

    def now(self) -> float:
        return time.time() + self.offset_s

    @property
    def root(self) -> RootCa:
        return RootCa(self.new.cluster.root_ca_cert_pem, self.new.cluster.root_ca_key_pem)

    @property
    def leader(self) -> SecuredManager:
        return next(manager for manager in self.managers if manager.consensus.is_leader())

    def credentials(
        self,
        node_id: str,
        role: NodeRole.ValueType,
        *,
        cluster_id: str = "",
        now: float | None = None,
        expiry_s: float = 0.0,
        directory: str = "",
    ) -> NodeCredentials:
        """Credentials signed by this cluster's CA, in a directory of their own."""
        key_pem, csr_pem = new_key_and_csr()
        identity = Identity(node_id, role, cluster_id or self.new.cluster.id)
        certificate_pem = sign_node(self.root, csr_pem, identity, time.time() if now is None else now, expiry_s)
        place = self.directory / (directory or node_id)
        return NodeCredentials.save(place, self.root.certificate_pem, certificate_pem, key_pem)

    def blocked(self, node_id: str) -> bool:
        cluster = self.store.cluster
        return cluster is not None and node_id in cluster.blocked_certificates

    async def start_manager(self, credentials: NodeCredentials) -> SecuredManager:
        interceptor = RoleInterceptor(RULES, self.new.cluster.id, self.blocked, self.now)
        server = grpc.aio.server(interceptors=[interceptor])
        addr = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials.server_credentials())}"
        consensus = self.group.member(credentials.identity.node_id, addr)
        service = CertificatesService(self.store, Writer(consensus, self.now), consensus, credentials, self.now)
        add_CertificatesServicer_to_server(service, server)
        server.add_generic_rpc_handlers(tuple(_echoes()))
        join_server = grpc.aio.server()
        join_port = join_server.add_secure_port("127.0.0.1:0", credentials.join_server_credentials())
        add_JoinServicer_to_server(JoinService(service), join_server)
        await server.start()
        await join_server.start()
        manager = SecuredManager(credentials, consensus, service, addr, f"127.0.0.1:{join_port}", server, join_server)
        self.managers.append(manager)
        return manager

    async def add_manager(self, node_id: str) -> SecuredManager:
        """A further manager: in the store, in consensus, and listening."""
        node = Node(id=node_id, role=MANAGER)
        node.spec.desired_role = MANAGER
        self.store.nodes.put(node)
        return await self.start_manager(self.credentials(node_id, MANAGER))


def _echoes() -> list[grpc.GenericRpcHandler]:
    """Methods of other services that answer with the caller's node ID, in gRPC's shapes."""

    async def unary(request: bytes, context: Context) -> bytes:
        return peer_identity(context).node_id.encode()

    async def generate(request: Any, context: Context) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield peer_identity(context).node_id.encode()

    async def write(request: Any, context: Context) -> None:
        await context.write(peer_identity(context).node_id.encode())

    make = grpc.method_handlers_generic_handler
    handlers: dict[str, dict[str, Any]] = {
        "pyswarm.Control": {
            "GetCluster": grpc.unary_unary_rpc_method_handler(unary),
            "WatchService": grpc.unary_stream_rpc_method_handler(generate),
            "Secret": grpc.unary_unary_rpc_method_handler(unary),  # in no .proto, hence without a rule
        },
        "pyswarm.Raft": {
            "AddMember": grpc.stream_unary_rpc_method_handler(unary),
            "Stream": grpc.stream_stream_rpc_method_handler(write),
        },
        "pyswarm.Dispatcher": {"Session": grpc.stream_stream_rpc_method_handler(generate)},
    }
    return [make(service, methods) for service, methods in handlers.items()]


def new_cluster() -> NewCluster:
    return create_cluster(Cluster(subnet_size=24), random_id, time.time())


@asynccontextmanager
async def secured_cluster(directory: Path) -> AsyncIterator[SecuredCluster]:
    """One manager, which leads."""
    cluster = SecuredCluster(directory, new_cluster())
    first = await cluster.start_manager(cluster.new.save(directory / "first"))
    cluster.group.elect(first.consensus.node_id)
    try:
        yield cluster
    finally:
        for manager in cluster.managers:
            await manager.stop()


async def call(credentials: NodeCredentials, addr: str, method: str) -> bytes:
    """The answer of a unary method, over a channel of its own. Raises AioRpcError."""
    async with credentials.open_channel(addr) as channel:
        return await unary(channel, method)(b"", timeout=CALL_TIMEOUT_S)


def unary(channel: grpc.aio.Channel, method: str) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
    """A unary method without any coding, as a stub would hold it."""
    return channel.unary_unary(method)
