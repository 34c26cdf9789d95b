"""Managers with a control API on loopback, over one shared in-memory log."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import grpc

from proto.control_pb2_grpc import ControlStub, add_ControlServicer_to_server
from proto.objects_pb2 import Cluster, Network, Node, NodeStatus, ServiceSpec
from swarm.api.control import ControlService
from swarm.consensus.interface import Consensus, Member
from swarm.dispatch.doctor import ExamRelay
from swarm.dispatch.execs import ExecRelay
from swarm.dispatch.logs import Link, LogRelay
from swarm.store.changes import Record
from swarm.store.store import Store
from swarm.store.writer import Writer
from tests.fakes_consensus import FakeConsensus, FakeGroup

if TYPE_CHECKING:
    from proto.control_pb2_grpc import ControlAsyncStub


class Manager:
    """One manager; `refusal` is what the quorum guard answers."""

    def __init__(self, group: FakeGroup, consensus: FakeConsensus) -> None:
        self.group = group
        self.consensus = consensus
        self.links: dict[str, Link] = {}
        self.relay = LogRelay(self.links.get)
        self.execs = ExecRelay(self.links.get)
        self.exams = ExamRelay(self.links.get)
        self.refusal: str | None = None
        self.behind: list[str] = []
        """Nodes that do not confirm keys."""
        ids = itertools.count(1)
        self.service = ControlService(
            group.store,
            Writer(consensus, time.time),
            consensus,
            lambda addr: grpc.aio.insecure_channel(addr, options=[("grpc.use_local_subchannel_pool", 1)]),
            self.relay,
            self.execs,
            self.exams,
            time.time,
            lambda: f"{consensus.node_id}-request-{next(ids)}",
            self._demotion_refusal,
            self._keys_settled,
        )
        self.server = grpc.aio.server()
        add_ControlServicer_to_server(self.service, self.server)
        self.addr = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        consensus.member = Member(consensus.node_id, self.addr)

    async def _keys_settled(self, timeout_s: float) -> list[str]:
        return self.behind

    def _demotion_refusal(self, store: Store, consensus: Consensus, node: Node) -> str | None:
        return self.refusal


class Managers:
    def __init__(self, store: Store, names: Sequence[str]) -> None:
        self.store = store
        store.version = 100  # beyond the versions of the records that tests put in
        self.group = FakeGroup(store)
        self.managers = {name: Manager(self.group, self.group.member(name)) for name in names}
        self.group.elect(names[0])
        self.stubs: dict[str, ControlAsyncStub] = {}

    def __getitem__(self, name: str) -> Manager:
        return self.managers[name]


@asynccontextmanager
async def managing(*records: Record, names: Sequence[str] = ("m1",)) -> AsyncIterator[Managers]:
    """The first of `names` leads. There is an ingress network, as in every swarm, if the records have none."""
    if not any(isinstance(record, Network) and record.spec.ingress for record in records):
        records = (*records, a_network("ingress0", "ingress", ingress=True))
    made = Managers(Store.of(*records), names)
    async with AsyncExitStack() as stack:
        for name, manager in made.managers.items():
            await manager.server.start()
            stack.push_async_callback(manager.server.stop, None)
            stack.push_async_callback(manager.service.close)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(manager.addr))
            made.stubs[name] = ControlStub(channel)
        yield made


def a_cluster() -> Cluster:
    made = Cluster(id="c1", root_ca_cert_pem=b"-----CERT-----", root_ca_key_pem=b"-----KEY-----")
    made.join_tokens.worker, made.join_tokens.manager = "SWMTKN-1-old-worker", "SWMTKN-1-old-manager"
    return made


def a_node(node_id: str, hostname: str = "", state: int = NodeStatus.READY) -> Node:
    made = Node(id=node_id)
    made.description.hostname = hostname or node_id
    made.status.state = NodeStatus.State.ValueType(state)
    return made


def a_network(network_id: str, name: str, ingress: bool = False) -> Network:
    made = Network(id=network_id, vni=4096)
    made.spec.annotations.name = name
    made.spec.ingress = ingress
    return made


def a_spec(name: str = "web", replicas: int = 2, image: str = "nginx") -> ServiceSpec:
    made = ServiceSpec()
    made.annotations.name = name
    made.replicated.replicas = replicas
    made.task.container.image = image
    return made
