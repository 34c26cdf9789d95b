"""Letting machines in and keeping them in: the services `Join` (no client certificate) and `Certificates` (mTLS).

The leader alone decides and signs, since it alone knows the newest tokens and roles; another manager passes the
call on, with what only it can know (the address it saw, or who the caller is). A join may be repeated: the node's
ID follows from its key, so the repetition finds the node that the first try made.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
import grpc.aio
import structlog

from proto.join_pb2 import IssueReply, IssueRequest, RenewReply, RenewRequest, RootCaReply, RootCaRequest
from proto.join_pb2_grpc import CertificatesServicer, CertificatesStub, JoinServicer
from proto.objects_pb2 import MANAGER, Cluster, Node, NodeRole, NodeStatus
from swarm.api.status import status_of
from swarm.consensus.interface import Consensus
from swarm.errors import AlreadyExists, Denied, Invalid, NoLeader, OutcomeUnknown, SwarmError
from swarm.security import tokens
from swarm.security.ca import RootCa, node_id_of, request_key, sign_node
from swarm.security.certificates import NodeCredentials
from swarm.security.identity import Identity
from swarm.security.peers import peer_host, peer_identity
from swarm.store.changes import Create
from swarm.store.store import Store
from swarm.store.writer import Writer

if TYPE_CHECKING:
    from proto.join_pb2_grpc import CertificatesAsyncStub

LEADER_WAIT_S = 5.0
"""Several elections: a join in the middle of one is slow, not refused."""
LEADER_POLL_S = 0.05
FORWARD_TIMEOUT_S = 5.0
"""One call to the leader, which must reach a quorum in it."""
COMMIT_TIMEOUT_S = 4.0
"""Less than a call, so that the one who passed it on hears the outcome."""
BARRIER_TIMEOUT_S = 2.0
SHARED_WAIT_S = 2.5
"""Until a node that left is declared down (`swarm/dispatch/liveness.py`; later where heartbeats are slower)."""
HOSTNAME_CHARS_MAX = 253
"""As long as a DNS name may be."""
_TRY_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.ABORTED)

Context = grpc.aio.ServicerContext[Any, Any]
Reply = TypeVar("Reply")

log = structlog.get_logger()


class CertificatesService(CertificatesServicer):
    """For members, on the mTLS listener. `now` is the wall clock (Unix s) that certificates are dated by."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        consensus: Consensus,
        credentials: NodeCredentials,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._writer = writer
        self._consensus = consensus
        self._credentials = credentials
        self._now = now
        self.waiting = 0
        """Calls that found no leader and wait for one."""

    @property
    def root_ca_pem(self) -> bytes:
        return self._credentials.root_ca_pem

    async def Issue(self, request: IssueRequest, context: Context) -> IssueReply:
        """A manager passes on a join; `request.seen_addr` is its word."""
        return await _answered(self._issue_here(request), context)

    async def Renew(self, request: RenewRequest, context: Context) -> RenewReply:
        """For the caller itself, or, when a manager passes it on, for the node that it names."""
        return await _answered(self._renew(request, peer_identity(context)), context)

    async def issue(self, request: IssueRequest) -> IssueReply:
        """A join that arrived at this manager. `request.seen_addr` must be set by the caller. Raises SwarmError."""
        return await self._at_leader(
            lambda: self._issue_here(request),
            lambda stub, timeout_s: stub.Issue(request, timeout=timeout_s),
        )

    async def _renew(self, request: RenewRequest, caller: Identity) -> RenewReply:
        if request.node_id:
            if caller.role != MANAGER:
                raise Denied(f"node {caller.node_id} is a worker and may renew its own certificate only")
            return await self._renew_here(request)
        named = RenewRequest(csr_pem=request.csr_pem, node_id=caller.node_id)
        return await self._at_leader(
            lambda: self._renew_here(named),
            lambda stub, timeout_s: stub.Renew(named, timeout=timeout_s),
        )

    # ---- finding the leader

    async def _at_leader(
        self,
        here: Callable[[], Awaitable[Reply]],
        there: Callable[[CertificatesAsyncStub, float], Awaitable[Reply]],
    ) -> Reply:
        """Run `here` if we lead, else `there` at the leader; again while leadership moves. Both may be repeated."""
        deadline = time.monotonic() + LEADER_WAIT_S
        while True:
            failure = "the swarm does not have a leader: a majority of its managers must be up and reach each other"
            leader = self._consensus.leader()
            try:
                if self._consensus.is_leader():
                    return await here()
                if leader is not None and leader.node_id != self._consensus.node_id:
                    async with self._credentials.open_channel(leader.addr) as channel:
                        return await there(CertificatesStub(channel), FORWARD_TIMEOUT_S)
            except (NoLeader, OutcomeUnknown) as error:
                failure = str(error)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _TRY_AGAIN:
                    raise _error_of(error) from None
                failure = f"the leader {leader.addr if leader else ''} does not answer: {error.details()}"
            if time.monotonic() > deadline:
                raise NoLeader(failure)
            self.waiting += 1
            try:
                await asyncio.sleep(LEADER_POLL_S)
            finally:
                self.waiting -= 1

    # ---- on the leader

    def _cluster(self) -> Cluster:
        if not self._consensus.is_leader():
            raise NoLeader("this manager does not lead the swarm any more; try again")
        cluster = self._store.cluster
        if cluster is None:
            raise NoLeader("this swarm is still being initialised; try again in a moment")
        return cluster

    async def _issue_here(self, request: IssueRequest) -> IssueReply:
        cluster = self._cluster()
        role = tokens.role_of(request.token, cluster.join_tokens, cluster.root_ca_cert_pem)
        wanted = new_node(request, role)
        if wanted.id in cluster.blocked_certificates:
            raise Denied(f"node {wanted.id} was removed from this swarm: join with a new key")
        await self._data_path_alone(wanted)
        try:
            await self._writer.commit((Create(wanted),), timeout_s=COMMIT_TIMEOUT_S)
            log.info("node joined", node=wanted.id, role=NodeRole.Name(role), addr=wanted.advertise_host)
        except AlreadyExists:
            await self._consensus.read_barrier(BARRIER_TIMEOUT_S)
        node = self._store.nodes.get(wanted.id)
        if node is None or node.role != role:
            raise Denied(f"node {wanted.id} has been removed or changed its role meanwhile: join with a new key")
        reply = IssueReply(node_id=node.id, role=role, advertise_host=node.advertise_host)
        reply.certificate_pem = self._sign(cluster, request.csr_pem, node)
        reply.manager_addrs.extend(self._manager_addrs())
        return reply

    async def _data_path_alone(self, wanted: Node) -> None:
        """Neither of two hosts with one such address could be told from the other: both would stop following changes of
        the networks. The other may be this very host, which has just left: then it is down in a moment. Raises
        Invalid."""
        deadline = time.monotonic() + SHARED_WAIT_S
        while (other := next((node for node in self._store.nodes if _share_data_path(node, wanted)), None)) is not None:
            if time.monotonic() > deadline:
                raise Invalid(
                    f"data path address {wanted.data_path_addr} is that of node {other.description.hostname}"
                    f" ({other.id}), which is up: give this host another --data-path-addr or --advertise-addr"
                )
            await asyncio.sleep(LEADER_POLL_S)

    async def _renew_here(self, request: RenewRequest) -> RenewReply:
        self._cluster()
        await self._consensus.read_barrier(BARRIER_TIMEOUT_S)  # not a role that a newer leader has taken back
        cluster = self._cluster()
        node = self._store.nodes.get(request.node_id)
        if node is None or request.node_id in cluster.blocked_certificates:
            raise Denied(
                f"node {request.node_id} was removed from this swarm: leave it with"
                " `pyswarm swarm leave --force`, then join again"
            )
        return RenewReply(certificate_pem=self._sign(cluster, request.csr_pem, node), role=node.role)

    def _sign(self, cluster: Cluster, csr_pem: bytes, node: Node) -> bytes:
        root = RootCa(cluster.root_ca_cert_pem, cluster.root_ca_key_pem)
        identity = Identity(node.id, node.role, cluster.id)
        return sign_node(root, csr_pem, identity, self._now(), cluster.spec.node_cert_expiry_s)

    def _manager_addrs(self) -> list[str]:
        """mTLS listeners of all managers, this leader's first: it is the one the new node needs."""
        me = self._consensus.node_id
        return [member.addr for member in sorted(self._consensus.members(), key=lambda m: (m.node_id != me, m.addr))]


class JoinService(JoinServicer):
    """For strangers, on the listener that asks for no certificate."""

    def __init__(self, certificates: CertificatesService) -> None:
        self._certificates = certificates

    async def RootCa(self, request: RootCaRequest, context: Context) -> RootCaReply:
        return RootCaReply(root_ca_pem=self._certificates.root_ca_pem)

    async def Issue(self, request: IssueRequest, context: Context) -> IssueReply:
        seen = IssueRequest()
        seen.CopyFrom(request)
        seen.seen_addr = peer_host(context)  # never what a stranger says about itself
        return await _answered(self._certificates.issue(seen), context)


def new_node(request: IssueRequest, role: NodeRole.ValueType) -> Node:
    """The object of a node that joins by this request. Raises Invalid for a bad key or address."""
    node = Node(id=node_id_of(request_key(request.csr_pem)), role=role)
    node.spec.desired_role = role
    node.spec.availability = request.availability
    node.advertise_host = _address("advertise address", request.advertise_host) or request.seen_addr
    if not node.advertise_host:
        raise Invalid("no address of the joining node is known: give --advertise-addr")
    node.data_path_addr = _address("data path address", request.data_path_addr) or node.advertise_host
    node.description.hostname = request.hostname[:HOSTNAME_CHARS_MAX]
    node.status.state = NodeStatus.UNKNOWN
    node.status.message = "joined, has not opened a session yet"
    node.status.addr = request.seen_addr
    return node


def _share_data_path(node: Node, wanted: Node) -> bool:
    ready = node.status.state == NodeStatus.READY
    return ready and node.id != wanted.id and node.data_path_addr == wanted.data_path_addr


def _address(what: str, text: str) -> str:
    """The address as given; "" when none or only "any" was given, which nobody else could reach."""
    if not text:
        return ""
    try:
        return "" if ipaddress.ip_address(text).is_unspecified else text
    except ValueError:
        raise Invalid(f"invalid {what} {text!r}: an IP address is needed, without port") from None


_ERRORS = {grpc.StatusCode.PERMISSION_DENIED: Denied, grpc.StatusCode.INVALID_ARGUMENT: Invalid}


def _error_of(error: grpc.aio.AioRpcError) -> SwarmError:
    """The leader's refusal, to be told as our own."""
    return _ERRORS.get(error.code(), SwarmError)(error.details() or str(error.code()))


async def _answered(answer: Awaitable[Reply], context: Context) -> Reply:
    try:
        return await answer
    except SwarmError as error:
        await _abort(context, error)


async def _abort(context: Context, error: SwarmError) -> NoReturn:
    await context.abort(status_of(error), str(error))
