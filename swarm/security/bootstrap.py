"""Becoming a member: making a new cluster, or joining one by a token.

Joining trusts nobody until the token says whom: the root CA is fetched over a connection that is
encrypted but not yet believed, its bytes must have the digest that the token carries, and only then,
over a connection that this root CA vouches for, is the token's secret sent.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from proto.join_pb2 import IssueReply, IssueRequest, RootCaRequest
from proto.join_pb2_grpc import JoinStub
from proto.local_pb2 import Bootstrap
from proto.objects_pb2 import ACTIVE, MANAGER, Availability, Cluster, Node, NodeRole
from swarm.errors import Denied, Invalid, SwarmError, Unreachable
from swarm.security import tokens
from swarm.security.ca import RootCa, create_root, new_key_and_csr, sign_node
from swarm.security.certificates import NodeCredentials
from swarm.security.channel import secure_channel
from swarm.security.files import OPEN, Seal
from swarm.security.identity import CA_NAME, MANAGER_NAME, Identity

JOIN_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 10.0
"""An address that has not even accepted a connection by then is reported as dead."""
ISSUE_RETRY_S = 0.5
_TRY_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
ROOT_CA_BYTES_MAX = 16_384
"""A root certificate has under 1,000 bytes; a stranger's answer is not parsed beyond this."""


@dataclass(frozen=True, slots=True)
class NewCluster:
    """What `swarm init` makes: the first two objects of the store and the first node's credentials."""

    cluster: Cluster
    node: Node
    root_ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes

    def save(self, directory: Path, seal: Callable[[], Seal] = lambda: OPEN) -> NodeCredentials:
        """Write the node's credentials."""
        return NodeCredentials.save(directory, self.root_ca_pem, self.certificate_pem, self.key_pem, seal)

    def message(self) -> Bootstrap:
        """For the first manager process."""
        return Bootstrap(cluster=self.cluster, node=self.node)


def create_cluster(template: Cluster, new_id: Callable[[], str], now: float) -> NewCluster:
    """A new cluster as `template` (spec, address pools) describes it, with its ID, root CA and join tokens; and its
    first node, a manager. `now` in Unix s. Keys and the tokens' secrets come from the system's randomness."""
    root = create_root(now)
    cluster = Cluster()
    cluster.CopyFrom(template)
    cluster.id = new_id()
    cluster.root_ca_cert_pem, cluster.root_ca_key_pem = root.certificate_pem, root.key_pem
    cluster.join_tokens.worker = tokens.random_token(root.certificate_pem)
    cluster.join_tokens.manager = tokens.random_token(root.certificate_pem)
    return _first_manager(cluster, root, new_id(), now)


def restored_manager(cluster: Cluster, new_id: Callable[[], str], now: float) -> NewCluster:
    """A new node for a cluster whose state is restored, with a manager's certificate of that cluster's own CA."""
    root = RootCa(cluster.root_ca_cert_pem, cluster.root_ca_key_pem)
    return _first_manager(cluster, root, new_id(), now)


def _first_manager(cluster: Cluster, root: RootCa, node_id: str, now: float) -> NewCluster:
    node = Node(id=node_id, role=MANAGER)
    node.spec.desired_role = MANAGER
    key_pem, csr_pem = new_key_and_csr()
    identity = Identity(node.id, MANAGER, cluster.id)
    certificate_pem = sign_node(root, csr_pem, identity, now, cluster.spec.node_cert_expiry_s)
    return NewCluster(cluster, node, root.certificate_pem, certificate_pem, key_pem)


@dataclass(frozen=True, slots=True)
class JoinResult:
    """What a machine has once it was let in."""

    node_id: str
    role: NodeRole.ValueType
    root_ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes
    manager_addrs: tuple[str, ...]
    """host:port of mTLS listeners, the leader's first."""
    advertise_host: str

    def save(self, directory: Path, seal: Callable[[], Seal] = lambda: OPEN) -> NodeCredentials:
        """Write the node's credentials. Raises Invalid when the manager sent what does not fit together."""
        return NodeCredentials.save(directory, self.root_ca_pem, self.certificate_pem, self.key_pem, seal)


async def join_cluster(
    remote_addr: str,
    token: str,
    *,
    advertise_host: str = "",
    availability: Availability.ValueType = ACTIVE,
    data_path_addr: str = "",
    hostname: str = "",
    timeout_s: float = JOIN_TIMEOUT_S,
) -> JoinResult:
    """Join through the manager whose listener for joining is `remote_addr` (host:port).

    Raises Invalid (garbled token or address), Denied (wrong or rotated token, other cluster, an imposter),
    Unreachable (nobody answers there, within 10 s at most), or what else the cluster refuses.
    """
    parsed = tokens.parse(token)
    deadline = time.monotonic() + timeout_s
    shown_pem = await asyncio.to_thread(shown_certificate, remote_addr, min(timeout_s, CONNECT_TIMEOUT_S))
    root_ca_pem = await _fetch_root_ca(remote_addr, shown_pem, deadline)
    tokens.check_root_ca(parsed, root_ca_pem, remote_addr)
    _check_shown(remote_addr, shown_pem, root_ca_pem)
    key_pem, csr_pem = new_key_and_csr()
    request = IssueRequest(
        csr_pem=csr_pem,
        token=token.strip(),
        advertise_host=advertise_host,
        availability=availability,
        data_path_addr=data_path_addr,
        hostname=hostname or socket.gethostname(),
    )
    reply = await _issue(remote_addr, root_ca_pem, request, deadline)
    return JoinResult(
        reply.node_id,
        reply.role,
        root_ca_pem,
        reply.certificate_pem,
        key_pem,
        tuple(reply.manager_addrs),
        reply.advertise_host,
    )


# ---- the steps


def shown_certificate(remote_addr: str, timeout_s: float) -> bytes:
    """The certificate (PEM) that the server at host:port shows, believed by nobody yet. Blocks. Raises Unreachable."""
    host, _, port = remote_addr.rpartition(":")
    if not host or not port.isdigit():
        raise Invalid(f"invalid address {remote_addr!r}: host:port is needed, for example 10.0.0.1:2377")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the token's digest decides, in a moment
    context.set_alpn_protocols(["h2"])
    advice = (
        "check that a manager runs there (`pyswarm swarm join-token worker` on it prints its address), that the port"
        f" is right, and that no firewall blocks {port}/tcp and {int(port) + 1}/tcp"
    )
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=CA_NAME) as secured,
        ):
            shown = secured.getpeercert(binary_form=True)
    except TimeoutError:
        raise Unreachable(f"cannot reach {remote_addr}: no answer within {timeout_s:g} s; {advice}") from None
    except ssl.SSLError:
        raise Unreachable(f"the server at {remote_addr} does not speak TLS 1.3: it is no pyswarm manager") from None
    except (OSError, OverflowError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise Unreachable(f"cannot reach {remote_addr}: {why}; {advice}") from None
    assert shown is not None, "a TLS server always shows a certificate"
    return ssl.DER_cert_to_PEM_cert(shown).encode()


async def _fetch_root_ca(remote_addr: str, shown_pem: bytes, deadline: float) -> bytes:
    """The root CA as the server says, over a connection to exactly the holder of the shown certificate."""
    names = _names(shown_pem)
    if MANAGER_NAME not in names:
        raise Denied(f"the server at {remote_addr} is no pyswarm manager: its certificate is for {sorted(names)}")
    trusted = grpc.ssl_channel_credentials(shown_pem)
    async with secure_channel(remote_addr, trusted) as channel:
        try:
            reply = await JoinStub(channel).RootCa(RootCaRequest(), timeout=_left(deadline))
        except grpc.aio.AioRpcError as error:
            raise Unreachable(f"the manager at {remote_addr} does not tell its root CA: {error.details()}") from None
    if len(reply.root_ca_pem) > ROOT_CA_BYTES_MAX:
        raise Denied(f"the root CA of {remote_addr} has {len(reply.root_ca_pem)} bytes: it is no pyswarm manager")
    return reply.root_ca_pem


def _names(shown_pem: bytes) -> set[str]:
    try:
        shown = x509.load_pem_x509_certificate(shown_pem)
        alternative = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return set(alternative.value.get_values_for_type(x509.DNSName))
    except (ValueError, x509.ExtensionNotFound):
        return set()


def _check_shown(remote_addr: str, shown_pem: bytes, root_ca_pem: bytes) -> None:
    """gRPC will check this too, but says only that a handshake failed. Raises Denied."""
    shown = x509.load_pem_x509_certificate(shown_pem)
    try:
        shown.verify_directly_issued_by(x509.load_pem_x509_certificate(root_ca_pem))
    except (ValueError, TypeError, InvalidSignature):
        raise Denied(
            f"the server at {remote_addr} knows the cluster's root CA but has no certificate from it:"
            " somebody may sit in between; the token was not sent"
        ) from None


async def _issue(remote_addr: str, root_ca_pem: bytes, request: IssueRequest, deadline: float) -> IssueReply:
    """Repeated until the deadline while the cluster elects a leader: a repeated request is the same node."""
    trusted = grpc.ssl_channel_credentials(root_ca_pem)
    async with secure_channel(remote_addr, trusted, CA_NAME) as channel:
        while True:
            try:
                reply: IssueReply = await JoinStub(channel).Issue(request, timeout=_left(deadline))
                return reply
            except grpc.aio.AioRpcError as error:
                if error.code() not in _TRY_AGAIN or time.monotonic() + ISSUE_RETRY_S > deadline:
                    raise _refusal(remote_addr, error) from None
            await asyncio.sleep(ISSUE_RETRY_S)


def _refusal(remote_addr: str, error: grpc.aio.AioRpcError) -> SwarmError:
    text = error.details() or str(error.code())
    if error.code() == grpc.StatusCode.PERMISSION_DENIED:
        return Denied(text)
    if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
        return Invalid(text)
    return Unreachable(f"the manager at {remote_addr} did not let this node in: {text}")


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())
