"""The manager process: `python -m swarm.manager --state-dir DIR --run-dir DIR`, started by the agent.

It builds and wires everything that decides: the replicated store, consensus, the APIs, and, while this
manager leads, the loops that turn desired state into assignments. It holds no container and no kernel
networking, so its end disturbs nothing that runs.

The agent writes a `Bootstrap` message to its standard input: to the first manager of a new swarm, and to one whose
files are locked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc.aio
import structlog
import uvloop

from proto.control_pb2_grpc import add_ControlServicer_to_server
from proto.join_pb2_grpc import add_CertificatesServicer_to_server, add_JoinServicer_to_server
from proto.local_pb2 import Bootstrap, KeepUnlockKeyRequest
from proto.local_pb2_grpc import LocalStub
from proto.objects_pb2 import MANAGER, Network
from swarm import recovery
from swarm.api.control import ControlService
from swarm.api.join import CertificatesService, JoinService
from swarm.consensus.disk import Directory
from swarm.consensus.grpc_transport import GrpcTransport, ask_to_join
from swarm.consensus.interface import Member
from swarm.consensus.raft import RaftNode
from swarm.dispatch.dispatcher import Dispatcher
from swarm.errors import Invalid, SwarmError
from swarm.hostfiles import HostPaths, Membership
from swarm.ids import random_id
from swarm.leader import LeaderLoop
from swarm.logs import configure
from swarm.roles import RoleManager, demotion_refusal
from swarm.security.authorize import RULES, RoleInterceptor
from swarm.security.autolock import Autolock
from swarm.security.certificates import NodeCredentials
from swarm.security.peers import peer_identity
from swarm.security.raft_key import RaftKey, has_log
from swarm.security.unlock_key import lock_of
from swarm.store.changes import Create, Group
from swarm.store.store import Store
from swarm.store.writer import Writer
from swarm.supervise import hold_lock

JOIN_TIMEOUT_S = 30.0
JOIN_RETRY_S = 0.5
STOP_TIMEOUT_S = 5.0
TELL_TIMEOUT_S = 2.0
"""The agent answers from memory; while it is down the manager's key is rewrapped all the same."""
MESSAGE_BYTES_MAX = 8 << 20
GC_THRESHOLDS = (50_000, 20, 20)
"""A manager holds much that lives long, and next to no cycles: at the interpreter's 700 it looks for garbage an eighth
of its time while it stores 100,000 tasks."""

log = structlog.get_logger()


class Manager:
    def __init__(self, paths: HostPaths, membership: Membership, key: RaftKey) -> None:
        self._paths = paths
        self._membership = membership
        self._credentials = NodeCredentials.load(paths.certificates, key.seal)
        self._me = Member(membership.node_id, membership.manager_addr)
        self._disk = key.sealed()
        self._store = Store()
        self._transport = GrpcTransport(self._me, self._credentials.open_channel, _peer_node_id)
        self._consensus = RaftNode(
            me=self._me,
            members=[self._me],
            disk=self._disk,
            machine=self._store,
            transport=self._transport,
            may_join=self._may_join,
        )
        self._autolock = Autolock(self._store, key, self._tell_agent)
        self._writer = Writer(self._consensus, time.time)
        self._dispatcher = Dispatcher(
            self._store, self._writer, self._consensus, _peer_node_id, time.time, time.monotonic
        )
        self._leading: list[asyncio.Task[None]] = []

    async def run(self, bootstrap: Bootstrap | None, stop: asyncio.Event) -> None:
        """Until `stop` is set. Raises SwarmError when this manager cannot take part."""
        host, port = self._membership.listen_host, self._membership.listen_port
        mtls = self._server(RoleInterceptor(RULES, self._credentials.identity.cluster_id, self._is_blocked))
        join, local = self._server(), self._server()
        control = self._control()
        certificates = CertificatesService(self._store, self._writer, self._consensus, self._credentials)
        self._transport.add_to(mtls)
        self._dispatcher.add_to(mtls)
        add_ControlServicer_to_server(control, mtls)
        add_CertificatesServicer_to_server(certificates, mtls)
        add_JoinServicer_to_server(JoinService(certificates), join)
        add_ControlServicer_to_server(control, local)
        _bind(mtls, f"{host}:{port + 1}", self._credentials.server_credentials())
        _bind(join, f"{host}:{port}", self._credentials.join_server_credentials())
        _bind_unix(local, self._paths.manager_socket)

        await mtls.start()  # the leader calls back before it admits this manager
        if bootstrap is None and not has_log(Directory(self._paths.raft)):
            self._consensus.begin_with(await self._ask_to_join())
        if bootstrap is not None:
            recovery.prepare(bootstrap, self._disk, self._me)
        await self._consensus.start()
        self._consensus.on_leadership(self._on_leadership)
        locking = asyncio.create_task(self._autolock.run())
        if bootstrap is not None:
            await self._bootstrap(bootstrap)
        await join.start()
        await local.start()
        log.info("manager runs", node=self._me.node_id, addr=self._me.addr)
        await stop.wait()
        log.info("manager stops")
        locking.cancel()
        self._on_leadership(False)
        await local.stop(0)
        await join.stop(0)
        await self._consensus.stop()
        await mtls.stop(0)

    def _server(self, *interceptors: grpc.aio.ServerInterceptor) -> grpc.aio.Server:
        limits = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 500),
            ("grpc.http2.max_ping_strikes", 0),
        ]
        return grpc.aio.server(interceptors=interceptors, options=limits)

    def _control(self) -> ControlService:
        return ControlService(
            self._store,
            self._writer,
            self._consensus,
            self._credentials.open_channel,
            self._dispatcher.logs,
            self._dispatcher.execs,
            self._dispatcher.exams,
            time.time,
            random_id,
            demotion_refusal,
            self._dispatcher.keys_settled,
        )

    async def _tell_agent(self, unlock_key: bytes) -> bool:
        """This host's agent keeps the key in memory, to start us again with."""
        async with grpc.aio.insecure_channel(f"unix://{self._paths.daemon_socket}") as channel:
            try:
                request = KeepUnlockKeyRequest(unlock_key=unlock_key)
                await LocalStub(channel).KeepUnlockKey(request, timeout=TELL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.debug("the agent does not hear of the unlock key", reason=error.details())
                return False
        return True

    def _may_join(self, node_id: str) -> bool:
        node = self._store.nodes.get(node_id)
        return node is not None and node.spec.desired_role == MANAGER

    def _is_blocked(self, node_id: str) -> bool:
        cluster = self._store.cluster
        return cluster is not None and node_id in cluster.blocked_certificates

    async def _ask_to_join(self) -> tuple[Member, ...]:
        """Become a member of consensus through any manager; leaders come and go, so insist."""
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while True:
            for addr in self._membership.manager_addrs:
                try:
                    return await ask_to_join(
                        self._credentials.open_channel, addr, self._me, deadline - time.monotonic()
                    )
                except SwarmError as error:
                    failure = error
                    log.info("not a member yet", via=addr, reason=str(error))
            if time.monotonic() > deadline:
                raise failure
            await asyncio.sleep(JOIN_RETRY_S)

    async def _bootstrap(self, bootstrap: Bootstrap) -> None:
        """Store the first objects of a new swarm, or what makes this manager the only one of an old."""
        led = asyncio.Event()
        self._consensus.on_leadership(lambda leads: led.set() if leads else None)
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            await led.wait()
        if recovery.is_recovery(bootstrap):
            await recovery.take_over(bootstrap, self._store, self._writer)
        elif self._store.cluster is None:
            ingress = Network(id=random_id())
            ingress.spec.annotations.name = "ingress"
            ingress.spec.driver = "overlay"
            ingress.spec.ingress = True
            group: Group = (Create(bootstrap.cluster), Create(bootstrap.node), Create(ingress))
            await self._writer.commit(group, request_id=f"bootstrap-{bootstrap.cluster.id}")

    def _on_leadership(self, leads: bool) -> None:
        for task in self._leading:
            task.cancel()
        self._leading = []
        if leads:
            loops = (
                LeaderLoop(self._store, self._writer, random_id, time.time).run(),
                RoleManager(self._store, self._writer, self._consensus, time.time).run(),
                self._dispatcher.run(),
            )
            self._leading = [asyncio.create_task(loop) for loop in loops]
        log.info("leadership", leads=leads)


def _peer_node_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    return peer_identity(context).node_id


def _bind(server: grpc.aio.Server, addr: str, credentials: grpc.ServerCredentials) -> None:
    try:
        server.add_secure_port(addr, credentials)
    except RuntimeError:
        raise Invalid(f"cannot listen on {addr}: another program has the port; use another --listen-addr") from None


def _bind_unix(server: grpc.aio.Server, path: Path) -> None:
    path.unlink(missing_ok=True)
    old_mask = os.umask(0o117)
    try:
        server.add_insecure_port(f"unix://{path}")
    finally:
        os.umask(old_mask)


async def _main(paths: HostPaths) -> int:
    membership = paths.load_membership()
    if membership is None:
        log.error("this host is no member of a swarm", file=str(paths.membership))
        return 1
    raw = sys.stdin.buffer.read() if not sys.stdin.isatty() else b""
    given = Bootstrap.FromString(raw)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        key = RaftKey.open(Directory(paths.raft), given.unlock_keys, lock_of(given.cluster))
        await Manager(paths, membership, key).run(given if given.HasField("node") else None, stop)
    except SwarmError as error:
        log.error("manager cannot run", reason=str(error))
        return 1
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m swarm.manager", description=__doc__)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args()
    configure(options.log_level)
    gc.set_threshold(*GC_THRESHOLDS)
    lock = hold_lock(options.run_dir / "manager.lock")
    if lock is None:
        log.error("another manager process runs", run_dir=str(options.run_dir))
        sys.exit(1)
    with contextlib.closing(lock), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(_main(HostPaths(options.state_dir, options.run_dir))))


if __name__ == "__main__":
    main()
