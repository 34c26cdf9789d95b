"""Joining and renewing, end to end over real listeners: who gets in, as what, and who is told why not."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from proto.join_pb2 import IssueRequest, RenewRequest
from proto.join_pb2_grpc import CertificatesStub, JoinStub, add_JoinServicer_to_server
from proto.objects_pb2 import DRAINED, MANAGER, WORKER, Cluster, Node, NodeRole, NodeStatus
from swarm.api.join import JoinService, new_node
from swarm.errors import Denied, Invalid, NoLeader, SwarmError, Unreachable
from swarm.security import tokens
from swarm.security.bootstrap import JoinResult, join_cluster
from swarm.security.ca import new_key_and_csr
from swarm.security.certificates import NodeCredentials
from swarm.security.channel import secure_channel
from swarm.security.identity import CA_NAME, Identity
from tests.secured import CALL_TIMEOUT_S, SecuredCluster, call, new_cluster, secured_cluster
from tests.waiting import until


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[SecuredCluster]:
    async with secured_cluster(tmp_path) as made:
        yield made


def token_of(cluster: SecuredCluster, role: NodeRole.ValueType = WORKER) -> str:
    found = cluster.store.cluster
    assert found is not None
    return found.join_tokens.manager if role == MANAGER else found.join_tokens.worker


def node_of(cluster: SecuredCluster, node_id: str) -> Node:
    node = cluster.store.nodes.get(node_id)
    assert node is not None
    return node


def set_role(cluster: SecuredCluster, node_id: str, role: NodeRole.ValueType) -> None:
    node = Node()
    node.CopyFrom(node_of(cluster, node_id))
    node.role = node.spec.desired_role = role
    cluster.store.nodes.put(node)


async def refused(kind: type[SwarmError], cluster: SecuredCluster, token: str) -> str:
    nodes = len(cluster.store.nodes)
    with pytest.raises(kind) as failure:
        await join_cluster(cluster.leader.join_addr, token, timeout_s=CALL_TIMEOUT_S)
    assert len(cluster.store.nodes) == nodes, "a refused join must change nothing"
    return str(failure.value)


# ---- joining


async def test_a_worker_joins_and_is_a_worker(cluster: SecuredCluster, tmp_path: Path) -> None:
    await cluster.add_manager("m2")
    joined = await join_cluster(
        cluster.leader.join_addr, token_of(cluster), availability=DRAINED, hostname="host-a", data_path_addr="10.9.0.1"
    )
    credentials = joined.save(tmp_path / "joined")
    assert credentials.identity == Identity(joined.node_id, WORKER, cluster.new.cluster.id)
    assert joined.manager_addrs == (cluster.leader.addr, cluster.managers[1].addr)
    node = node_of(cluster, joined.node_id)
    assert (node.role, node.spec.desired_role, node.spec.availability) == (WORKER, WORKER, DRAINED)
    assert (
        (node.advertise_host, node.data_path_addr) == (joined.advertise_host, "10.9.0.1") == ("127.0.0.1", "10.9.0.1")
    )
    assert node.description.hostname == "host-a"
    with pytest.raises(grpc.aio.AioRpcError, match="needs the role manager"):
        await call(credentials, cluster.leader.addr, "/pyswarm.Control/GetCluster")


async def test_the_managers_token_makes_a_manager(cluster: SecuredCluster, tmp_path: Path) -> None:
    joined = await join_cluster(cluster.leader.join_addr, token_of(cluster, MANAGER), advertise_host="192.0.2.7")
    credentials = joined.save(tmp_path / "joined")
    assert node_of(cluster, joined.node_id).spec.desired_role == MANAGER
    assert node_of(cluster, joined.node_id).advertise_host == joined.advertise_host == "192.0.2.7"
    assert await call(credentials, cluster.leader.addr, "/pyswarm.Control/GetCluster") == joined.node_id.encode()


async def test_any_manager_passes_a_join_on_with_the_address_it_saw(cluster: SecuredCluster) -> None:
    follower = await cluster.add_manager("m2")
    joined = await join_cluster(follower.join_addr, token_of(cluster))
    assert node_of(cluster, joined.node_id).status.addr == "127.0.0.1"


async def test_a_join_waits_for_an_election(cluster: SecuredCluster) -> None:
    leader = cluster.leader
    cluster.group.elect(None)
    joining = asyncio.create_task(join_cluster(leader.join_addr, token_of(cluster)))
    await until(lambda: leader.service.waiting, what="the join waits for a leader")
    assert not joining.done()
    cluster.group.elect(leader.consensus.node_id)
    assert (await joining).node_id in cluster.store.nodes


async def test_a_repeated_join_is_the_same_node(cluster: SecuredCluster) -> None:
    _, csr_pem = new_key_and_csr()
    request = IssueRequest(csr_pem=csr_pem, token=token_of(cluster), seen_addr="192.0.2.1")
    first = await cluster.leader.service.issue(request)
    again = await cluster.leader.service.issue(request)
    assert first.node_id == again.node_id
    assert len(cluster.store.nodes) == 2
    request.token = token_of(cluster, MANAGER)
    with pytest.raises(Denied, match="changed its role"):
        await cluster.leader.service.issue(request)


async def test_what_a_stranger_says_about_its_address_is_not_believed(cluster: SecuredCluster) -> None:
    trusted = grpc.ssl_channel_credentials(cluster.root.certificate_pem)
    request = IssueRequest(csr_pem=new_key_and_csr()[1], token=token_of(cluster), seen_addr="203.0.113.9")
    async with secure_channel(cluster.leader.join_addr, trusted, CA_NAME) as channel:
        reply = await JoinStub(channel).Issue(request, timeout=CALL_TIMEOUT_S)
    assert reply.advertise_host == "127.0.0.1"


async def test_an_address_of_the_data_path_that_a_running_node_has_is_refused(cluster: SecuredCluster) -> None:
    joined = await join_cluster(cluster.leader.join_addr, token_of(cluster), data_path_addr="10.9.0.1")
    await join_cluster(cluster.leader.join_addr, token_of(cluster), data_path_addr="10.9.0.1")  # the first is not up
    running = Node()
    running.CopyFrom(node_of(cluster, joined.node_id))
    running.status.state, running.description.hostname = NodeStatus.READY, "host-a"
    cluster.store.nodes.put(running)
    nodes = len(cluster.store.nodes)
    with pytest.raises(Invalid, match=r"10\.9\.0\.1 is that of node host-a .* give this host another --data-path-addr"):
        await join_cluster(cluster.leader.join_addr, token_of(cluster), data_path_addr="10.9.0.1")
    assert len(cluster.store.nodes) == nodes, "a refused join must change nothing"
    await join_cluster(cluster.leader.join_addr, token_of(cluster), data_path_addr="10.9.0.2")


# ---- refused tokens


async def test_a_truncated_token_is_refused_before_anything_is_sent(cluster: SecuredCluster) -> None:
    with pytest.raises(Invalid, match="84 characters instead of 85"):
        await join_cluster("127.0.0.1:1", token_of(cluster)[:-1])
    trusted = grpc.ssl_channel_credentials(cluster.root.certificate_pem)
    async with secure_channel(cluster.leader.join_addr, trusted, CA_NAME) as channel:
        request = IssueRequest(csr_pem=new_key_and_csr()[1], token="SWMTKN-1-x")
        with pytest.raises(grpc.aio.AioRpcError, match="invalid join token") as failure:
            await JoinStub(channel).Issue(request, timeout=CALL_TIMEOUT_S)
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_wrong_secret_is_refused_also_through_a_follower(cluster: SecuredCluster) -> None:
    follower = await cluster.add_manager("m2")
    wrong = tokens.random_token(cluster.root.certificate_pem)
    assert "it may have been rotated" in await refused(Denied, cluster, wrong)
    with pytest.raises(Denied, match="it may have been rotated"):
        await join_cluster(follower.join_addr, wrong)


async def test_a_rotated_token_lets_nobody_in_any_more(cluster: SecuredCluster) -> None:
    old = token_of(cluster)
    rotated = Cluster()
    rotated.CopyFrom(cluster.new.cluster)
    rotated.join_tokens.worker = tokens.random_token(cluster.root.certificate_pem)
    cluster.store.clusters.put(rotated)
    assert "it may have been rotated" in await refused(Denied, cluster, old)
    assert (await join_cluster(cluster.leader.join_addr, token_of(cluster))).role == WORKER


async def test_the_token_of_another_cluster_is_refused_by_the_joining_machine(cluster: SecuredCluster) -> None:
    text = await refused(Denied, cluster, new_cluster().cluster.join_tokens.worker)
    assert "belongs to another cluster" in text
    assert cluster.leader.join_addr in text


# ---- imposters


async def test_a_man_in_the_middle_with_his_own_ca_is_refused(cluster: SecuredCluster, tmp_path: Path) -> None:
    async with secured_cluster(tmp_path / "imposter") as imposter:
        with pytest.raises(Denied, match="belongs to another cluster"):
            await join_cluster(imposter.leader.join_addr, token_of(cluster))


async def test_a_man_in_the_middle_who_relays_the_real_root_ca_is_refused(
    cluster: SecuredCluster, tmp_path: Path
) -> None:
    class Relay(JoinService):
        asked = False

        def __init__(self) -> None:
            super().__init__(cluster.leader.service)

        async def Issue(self, request, context):  # type: ignore[no-untyped-def]
            Relay.asked = True
            return await super().Issue(request, context)

    async with secured_cluster(tmp_path / "imposter") as imposter:
        server = grpc.aio.server()
        port = server.add_secure_port("127.0.0.1:0", imposter.leader.credentials.join_server_credentials())
        add_JoinServicer_to_server(Relay(), server)
        await server.start()
        with pytest.raises(Denied, match="somebody may sit in between; the token was not sent"):
            await join_cluster(f"127.0.0.1:{port}", token_of(cluster))
        await server.stop(0)
    assert not Relay.asked


async def test_a_worker_posing_as_a_manager_is_refused(cluster: SecuredCluster) -> None:
    worker = cluster.credentials("w1", WORKER)
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", worker.join_server_credentials())
    await server.start()
    with pytest.raises(Denied, match="is no pyswarm manager"):
        await join_cluster(f"127.0.0.1:{port}", token_of(cluster))
    await server.stop(0)


# ---- dead addresses


async def dead(remote_addr: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
    with pytest.raises(Unreachable) as failure:
        await join_cluster(remote_addr, new_cluster().cluster.join_tokens.worker, timeout_s=timeout_s)
    assert remote_addr in str(failure.value)
    return str(failure.value)


async def test_a_closed_port_is_named_with_what_to_check() -> None:
    with socket.socket() as taken:  # bound, but not listening: refused at once, and nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        text = await dead(f"127.0.0.1:{port}")
    assert "Connection refused" in text
    assert f"no firewall blocks {port}/tcp and {port + 1}/tcp" in text


async def test_an_address_that_never_answers_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        text = await dead(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
    assert "no answer within 0.2 s" in text


async def test_a_server_that_speaks_something_else_is_named() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        text = await dead(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert "does not speak TLS 1.3" in text


@pytest.mark.parametrize("addr", ["", "10.0.0.1", "10.0.0.1:", "10.0.0.1:x", ":2377"])
async def test_a_malformed_address_is_refused(addr: str) -> None:
    with pytest.raises(Invalid, match="host:port is needed"):
        await join_cluster(addr, new_cluster().cluster.join_tokens.worker)


@pytest.mark.parametrize("addr", ["somewhere", "10.0.0.1:2377", "10.0.0"])
def test_an_advertised_address_must_be_an_address(addr: str) -> None:
    request = IssueRequest(csr_pem=new_key_and_csr()[1], advertise_host=addr, seen_addr="10.0.0.9")
    with pytest.raises(Invalid, match="an IP address is needed"):
        new_node(request, WORKER)


def test_an_unspecified_advertised_address_is_replaced_by_the_seen_one() -> None:
    request = IssueRequest(csr_pem=new_key_and_csr()[1], advertise_host="0.0.0.0", seen_addr="10.0.0.9")
    assert new_node(request, WORKER).advertise_host == "10.0.0.9"


# ---- renewal


async def a_worker(cluster: SecuredCluster) -> tuple[JoinResult, NodeCredentials]:
    joined = await join_cluster(cluster.leader.join_addr, token_of(cluster))
    return joined, joined.save(cluster.directory / joined.node_id)


async def test_a_renewal_brings_a_fresh_key_and_needs_no_token(cluster: SecuredCluster) -> None:
    joined, credentials = await a_worker(cluster)
    before = credentials.refresh()
    await credentials.renew([cluster.leader.addr])
    assert credentials.refresh() == before + 1
    reloaded = NodeCredentials.load(cluster.directory / joined.node_id)
    assert reloaded.identity == Identity(joined.node_id, WORKER, cluster.new.cluster.id)
    key_pem = (cluster.directory / joined.node_id / "swarm-node.key").read_bytes()
    assert joined.key_pem not in key_pem


async def test_a_renewal_brings_the_role_that_the_cluster_gives(cluster: SecuredCluster) -> None:
    """Through a follower and past a dead manager's address; back again as well."""
    follower = await cluster.add_manager("m2")
    joined, credentials = await a_worker(cluster)
    set_role(cluster, joined.node_id, MANAGER)
    await credentials.renew(["127.0.0.1:1", follower.addr])
    assert credentials.identity.role == MANAGER
    set_role(cluster, joined.node_id, WORKER)
    await credentials.renew([follower.addr])
    assert credentials.identity.role == WORKER


async def test_a_removed_node_gets_no_certificate(cluster: SecuredCluster) -> None:
    joined, credentials = await a_worker(cluster)
    cluster.store.nodes.discard(joined.node_id)
    with pytest.raises(Denied, match="was removed from this swarm"):
        await credentials.renew([cluster.leader.addr])


async def test_a_worker_cannot_renew_for_another_node(cluster: SecuredCluster) -> None:
    _, credentials = await a_worker(cluster)
    request = RenewRequest(csr_pem=new_key_and_csr()[1], node_id=cluster.new.node.id)
    async with credentials.open_channel(cluster.leader.addr) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="may renew its own certificate only") as failure:
            await CertificatesStub(channel).Renew(request, timeout=CALL_TIMEOUT_S)
    assert failure.value.code() == grpc.StatusCode.PERMISSION_DENIED


async def test_without_a_manager_a_renewal_gives_up_and_keeps_the_old_certificate(cluster: SecuredCluster) -> None:
    _, credentials = await a_worker(cluster)
    before = credentials.refresh()
    with pytest.raises(NoLeader, match=r"no manager renewed the certificate within 0\.3 s"):
        await credentials.renew(["127.0.0.1:1"], timeout_s=0.3)
    with pytest.raises(NoLeader, match="no manager's address is known"):
        await credentials.renew([])
    assert credentials.refresh() == before


async def test_a_certificate_is_valid_as_long_as_the_cluster_says(cluster: SecuredCluster) -> None:
    short = Cluster()
    short.CopyFrom(cluster.new.cluster)
    short.spec.node_cert_expiry_s = 7_200
    cluster.store.clusters.put(short)
    _, credentials = await a_worker(cluster)
    assert 7_100 < credentials.not_after - time.time() <= 7_200
    assert time.time() < credentials.renew_at < credentials.not_after
