"""Who may call what, over real mTLS on loopback."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509

from proto.objects_pb2 import MANAGER, WORKER, Cluster
from swarm.security import files
from swarm.security.authorize import MANAGERS, MEMBERS, RULES
from swarm.security.certificates import NodeCredentials
from swarm.security.channel import secure_channel
from tests.secured import CALL_TIMEOUT_S, SecuredCluster, call, new_cluster, secured_cluster, unary

CONTROL = "/pyswarm.Control/GetCluster"
SESSION = "/pyswarm.Dispatcher/Session"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[SecuredCluster]:
    async with secured_cluster(tmp_path) as made:
        yield made


async def refused(credentials: NodeCredentials, addr: str, method: str = CONTROL) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call(credentials, addr, method)
    assert failure.value.code() == grpc.StatusCode.PERMISSION_DENIED
    return str(failure.value.details())


def test_the_rules_cover_every_method_between_machines() -> None:
    assert {method.split("/")[1] for method, roles in RULES.items() if roles == MEMBERS} == {
        "pyswarm.Dispatcher",
        "pyswarm.Certificates",
    }
    assert RULES["/pyswarm.Certificates/Issue"] == MANAGERS
    assert RULES["/pyswarm.Certificates/Renew"] == MEMBERS
    assert RULES["/pyswarm.Control/RemoveNode"] == RULES["/pyswarm.Raft/Stream"] == MANAGERS
    assert not any("Local" in method or "Join/" in method for method in RULES)


async def test_a_manager_calls_and_is_known_by_its_node_id(cluster: SecuredCluster) -> None:
    manager = cluster.credentials("m9", MANAGER)
    assert await call(manager, cluster.leader.addr, CONTROL) == b"m9"


@pytest.mark.parametrize("method", [CONTROL, "/pyswarm.Certificates/Issue"])
async def test_a_worker_cannot_call_a_managers_methods(cluster: SecuredCluster, method: str) -> None:
    worker = cluster.credentials("w1", WORKER)
    text = await refused(worker, cluster.leader.addr, method)
    assert text == f"permission denied: {method} needs the role manager; node w1 is a worker"


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("unary_stream", "/pyswarm.Control/WatchService"),
        ("stream_unary", "/pyswarm.Raft/AddMember"),
        ("stream_stream", "/pyswarm.Raft/Stream"),
    ],
)
async def test_streams_are_guarded_in_every_shape(cluster: SecuredCluster, kind: str, method: str) -> None:
    async def answers(credentials: NodeCredentials) -> list[bytes]:
        async with credentials.open_channel(cluster.leader.addr) as channel:
            requests: Any = b"" if kind.startswith("unary") else iter([b""])
            started: Any = getattr(channel, kind)(method)(requests, timeout=CALL_TIMEOUT_S)
            return [await started] if kind.endswith("unary") else [message async for message in started]

    assert set(await answers(cluster.credentials("m9", MANAGER))) == {b"m9"}
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await answers(cluster.credentials("w1", WORKER))
    assert failure.value.code() == grpc.StatusCode.PERMISSION_DENIED


def open_session(channel: grpc.aio.Channel) -> Any:
    method: Any = channel.stream_stream(SESSION)
    return method(iter([b""]), timeout=CALL_TIMEOUT_S)


async def test_a_worker_opens_a_session(cluster: SecuredCluster) -> None:
    async with cluster.credentials("w1", WORKER).open_channel(cluster.leader.addr) as channel:
        session = open_session(channel)
        assert await session.read() == b"w1"


async def test_a_method_without_a_rule_is_refused_even_to_managers(cluster: SecuredCluster) -> None:
    manager = cluster.credentials("m9", MANAGER)
    assert "no rule permits" in await refused(manager, cluster.leader.addr, "/pyswarm.Control/Secret")


async def test_a_removed_nodes_certificate_is_refused(cluster: SecuredCluster) -> None:
    manager = cluster.credentials("m9", MANAGER)
    blocked = Cluster()
    blocked.CopyFrom(cluster.new.cluster)
    blocked.blocked_certificates["m9"] = time.time() + 60
    cluster.store.clusters.put(blocked)
    assert "m9 was removed from this cluster" in await refused(manager, cluster.leader.addr)


async def test_a_certificate_of_another_cluster_id_is_refused(cluster: SecuredCluster) -> None:
    stranger = cluster.credentials("m9", MANAGER, cluster_id="elsewhere")
    assert "belongs to another cluster (elsewhere)" in await refused(stranger, cluster.leader.addr)


async def cut_off(trusting: grpc.ChannelCredentials, addr: str) -> None:
    """Check that the connection ends in the handshake."""
    async with secure_channel(addr, trusting) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await unary(channel, CONTROL)(b"", timeout=CALL_TIMEOUT_S)
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_another_ca_does_not_get_through_the_handshake(cluster: SecuredCluster) -> None:
    stranger = new_cluster()
    # It trusts this cluster's root, so that only the server can object.
    trusting = grpc.ssl_channel_credentials(cluster.root.certificate_pem, stranger.key_pem, stranger.certificate_pem)
    await cut_off(trusting, cluster.leader.addr)


async def test_nobody_gets_through_without_a_certificate(cluster: SecuredCluster) -> None:
    await cut_off(grpc.ssl_channel_credentials(cluster.root.certificate_pem), cluster.leader.addr)


async def test_an_expired_certificate_is_refused(cluster: SecuredCluster) -> None:
    expired = cluster.credentials("m9", MANAGER, now=time.time() - 7_200, expiry_s=3_600)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call(expired, cluster.leader.addr, CONTROL)
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_connection_does_not_outlive_the_certificate_that_opened_it(cluster: SecuredCluster) -> None:
    manager = cluster.credentials("m9", MANAGER, expiry_s=3_600)
    async with manager.open_channel(cluster.leader.addr) as channel:
        ask = unary(channel, CONTROL)
        assert await ask(b"", timeout=CALL_TIMEOUT_S) == b"m9"
        cluster.offset_s = 3_700
        with pytest.raises(grpc.aio.AioRpcError, match="has expired"):
            await ask(b"", timeout=CALL_TIMEOUT_S)


async def test_a_worker_cannot_pose_as_a_manager_to_clients(cluster: SecuredCluster) -> None:
    worker = cluster.credentials("w1", WORKER)
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", worker.server_credentials())
    await server.start()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call(cluster.credentials("m9", MANAGER), f"127.0.0.1:{port}", CONTROL)
    await server.stop(0)
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE


def handshake(addr: str, version: ssl.TLSVersion, directory: Path | None = None) -> bytes:
    """Handshake of a plain TLS client; returns the server's certificate (PEM)."""
    host, port = addr.split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if directory is not None:
        context.load_cert_chain(directory / files.CERTIFICATE_FILE, directory / files.KEY_FILE)
    with (
        socket.create_connection((host, int(port)), timeout=CALL_TIMEOUT_S) as plain,
        context.wrap_socket(plain) as secured,
    ):
        shown = secured.getpeercert(binary_form=True)
        assert shown is not None
        return ssl.DER_cert_to_PEM_cert(shown).encode()


async def test_only_tls_1_3_is_spoken_on_both_listeners(cluster: SecuredCluster, tmp_path: Path) -> None:
    cluster.credentials("m9", MANAGER)
    for addr in (cluster.leader.addr, cluster.leader.join_addr):
        await asyncio.to_thread(handshake, addr, ssl.TLSVersion.TLSv1_3, tmp_path / "m9")
        with pytest.raises(OSError):
            await asyncio.to_thread(handshake, addr, ssl.TLSVersion.TLSv1_2, tmp_path / "m9")


async def test_a_renewed_certificate_is_served_without_a_restart(cluster: SecuredCluster, tmp_path: Path) -> None:
    """Another process (here: another object) writes the files; both listeners show the new certificate."""
    cluster.credentials("m9", MANAGER)
    leader = cluster.leader
    before = await asyncio.to_thread(handshake, leader.join_addr, ssl.TLSVersion.TLSv1_3)
    cluster.credentials(leader.consensus.node_id, MANAGER, directory="first")
    new_pem = files.read_pair(tmp_path / "first").certificate_pem
    for addr in (leader.addr, leader.join_addr):
        shown = await asyncio.to_thread(handshake, addr, ssl.TLSVersion.TLSv1_3, tmp_path / "m9")
        assert x509.load_pem_x509_certificate(shown) == x509.load_pem_x509_certificate(new_pem)
        assert shown != before


async def test_an_open_channel_uses_the_new_certificate_and_streams_go_on(cluster: SecuredCluster) -> None:
    credentials = cluster.credentials("n1", WORKER)
    async with credentials.open_channel(cluster.leader.addr) as channel:
        ask = unary(channel, CONTROL)  # as a stub does: made once, before the change
        with pytest.raises(grpc.aio.AioRpcError, match="node n1 is a worker"):
            await ask(b"", timeout=CALL_TIMEOUT_S)
        session = open_session(channel)
        assert await session.read() == b"n1"
        cluster.credentials("n1", MANAGER)
        assert await ask(b"", timeout=CALL_TIMEOUT_S) == b"n1"
        assert await session.read() == b"n1"


async def test_a_peer_that_falls_silent_is_noticed(cluster: SecuredCluster) -> None:
    """The connection stays open and nothing comes any more, as when a host loses power. The call itself would wait."""
    host, port = cluster.leader.addr.split(":")
    silent = asyncio.Event()
    copying: list[asyncio.Task[None]] = []

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            if silent.is_set():
                await asyncio.Event().wait()
            sink.write(data)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        copying.extend([asyncio.create_task(copy(reader, back)), asyncio.create_task(copy(there, writer))])

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    addr = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with cluster.credentials("m9", MANAGER).open_channel(addr) as channel:
        ask = unary(channel, CONTROL)
        assert await ask(b"", timeout=CALL_TIMEOUT_S) == b"m9"
        silent.set()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await ask(b"", timeout=60)
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE, "found by keepalive, not by the deadline"
    server.close()
    for task in copying:
        task.cancel()
    await asyncio.gather(*copying, return_exceptions=True)
