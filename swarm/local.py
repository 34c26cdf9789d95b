"""This host's membership: becoming, being and ceasing to be a node of a swarm.

`HostMembership` owns the certificates and the manager process of the host and starts the agent when the
host is a node. It is the shell behind the membership half of the API `Local`; the image half is
`node.image_api`.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import structlog

from proto.local_pb2 import (
    Bootstrap,
    InfoReply,
    InfoRequest,
    InitReply,
    InitRequest,
    JoinReply,
    JoinRequest,
    KeepUnlockKeyReply,
    KeepUnlockKeyRequest,
    LeaveReply,
    LeaveRequest,
    RestoreRequest,
    UnlockReply,
    UnlockRequest,
)
from proto.objects_pb2 import MANAGER, Cluster, Node, NodeRole, NodeStatus
from swarm.addresses import check_listen, choose_advertise_host, host_addresses, split_host_port, vtep_of
from swarm.config import DaemonConfig
from swarm.errors import Invalid, Locked, NoLeader, SwarmError
from swarm.founding import cluster_of, first_membership
from swarm.hostfiles import HostPaths, Membership
from swarm.ids import random_id
from swarm.own_manager import OwnManager
from swarm.recovery import cluster_of_backup
from swarm.security.bootstrap import create_cluster, join_cluster, restored_manager
from swarm.security.certificates import NodeCredentials
from swarm.security.unlock_key import locked, random_key, text_of
from swarm.supervise import Runs, Supervisor, keep_running
from swarm.unlocking import HostLock
from swarm.version import __version__

MANAGER_START_TIMEOUT_S = 30.0
MANAGER_STOP_TIMEOUT_S = 10.0
SILENT = "the manager process does not answer"
ROLE_TIMEOUT_S = 16.0
"""As long as the reference waits for a role change to arrive (research, section 7)."""
JOIN_TIMEOUT_S = 20.0
READY_TIMEOUT_S = 15.0
POLL_S = 0.05
AGENT_PAUSE_S = 1.0
"""Before the next agent, after one that failed: less than the time in which a silent node is taken for dead."""

log = structlog.get_logger()


class RunningAgent(Runs, Protocol):
    """The part of `node.agent.Agent` that membership needs."""

    async def stop(self) -> None: ...

    async def leave(self) -> None: ...


MakeAgent = Callable[[Membership, NodeCredentials, "HostMembership"], RunningAgent]


class HostMembership:
    def __init__(
        self, config: DaemonConfig, paths: HostPaths, make_agent: MakeAgent, on_start: Callable[[int], None]
    ) -> None:
        """`on_start` is told the process ID of each manager that is started."""
        self._config = config
        self._paths = paths
        self._make_agent = make_agent
        self._membership: Membership | None = None
        self._credentials: NodeCredentials | None = None
        self._agent: RunningAgent | None = None
        self._agent_run: asyncio.Task[None] | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._role_change = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._node: Node | None = None
        self._lock = HostLock(paths)
        self._own_manager = OwnManager(paths.manager_socket)
        self._manager = Supervisor(
            "manager",
            [sys.executable, "-m", "swarm.manager", "--state-dir", str(paths.state), "--run-dir", str(paths.run)],
            paths.run / "manager.lock",
            paths.manager_log,
            self._lock.manager_input,
            on_start=on_start,
        )

    # ---- life of the daemon

    async def resume(self) -> None:
        """Go on as the node that this host was before, if it was one."""
        membership = self._paths.load_membership()
        if membership is None:
            return
        self._membership = membership
        self._credentials = NodeCredentials.load(self._paths.certificates, self._lock.seal)
        await self._follow_role(self._credentials)
        self._start_agent()

    async def stop(self) -> None:
        """End our processes; containers, names and networks stay."""
        await self._stop_agent()
        await self._manager.stop(MANAGER_STOP_TIMEOUT_S)

    def _start_agent(self) -> None:
        self._agent_run = asyncio.create_task(keep_running(self._next_agent, AGENT_PAUSE_S))
        self._renewal = asyncio.create_task(self._keep_certificate())

    def _next_agent(self) -> RunningAgent:
        assert self._membership is not None
        assert self._credentials is not None
        self._agent = self._make_agent(self._membership, self._credentials, self)
        return self._agent

    async def _stop_agent(self) -> None:
        if self._agent is not None:
            await self._agent.stop()
        for task in (self._agent_run, self._renewal):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._agent = self._agent_run = self._renewal = None

    # ---- what the agent hears from managers

    def on_managers(self, addrs: list[str]) -> None:
        if self._membership is not None and addrs and tuple(addrs) != self._membership.manager_addrs:
            self._membership = self._membership.knowing(tuple(addrs))
            self._paths.save_membership(self._membership)

    def on_node(self, node: Node) -> None:
        """A changed role needs another certificate, and a manager process more or less."""
        self._node = node
        if self._credentials is not None and node.role != self._credentials.identity.role:
            self._role_task = asyncio.create_task(self._change_role(node.role))

    async def _change_role(self, role: NodeRole.ValueType) -> None:
        async with self._role_change:
            credentials, membership = self._credentials, self._membership
            if credentials is None or membership is None or credentials.identity.role == role:
                return
            log.info("role changes", role=NodeRole.Name(role))
            try:
                await credentials.renew(membership.manager_addrs)
            except SwarmError as error:
                log.warning("no certificate for the new role yet", reason=str(error))
                return  # the session reports the role again when it reconnects
            await self._follow_role(credentials)

    async def _follow_role(self, credentials: NodeCredentials) -> None:
        """A manager process where the certificate says manager; otherwise none, and no log of an earlier time: as
        the same member with an old log this node could break its promises when it is promoted again."""
        if credentials.identity.role == MANAGER:
            self._manager.start()
        else:
            await self._manager.stop(MANAGER_STOP_TIMEOUT_S)
            shutil.rmtree(self._paths.raft, ignore_errors=True)
            self._lock.forget()
            self._paths.manager_socket.unlink(missing_ok=True)

    async def _keep_certificate(self) -> None:
        """Renew before expiry, at a random point of 50 to 80 % of the validity."""
        assert self._credentials is not None
        while True:
            await asyncio.sleep(max(0.0, self._credentials.renew_at - time.time()))
            assert self._membership is not None
            try:
                await self._credentials.renew(self._membership.manager_addrs)
                log.info("certificate renewed")
            except SwarmError as error:
                log.warning("certificate not renewed, trying again in a minute", reason=str(error))
                await asyncio.sleep(60)

    # ---- the API

    async def info(self, request: InfoRequest) -> InfoReply:
        reply = InfoReply(version=__version__, state=InfoReply.INACTIVE)
        if self._membership is not None and self._credentials is not None:
            reply.state = InfoReply.ACTIVE
            reply.node_id = self._membership.node_id
            reply.cluster_id = self._membership.cluster_id
            reply.role = self._credentials.identity.role
            reply.node_addr = self._membership.advertise_host
            reply.manager_addrs.extend(self._membership.manager_addrs)
            reply.manager_pid = self._manager.pid
            if self._is_locked():
                reply.state = InfoReply.LOCKED
            elif reply.role == MANAGER:
                reply.manager_socket = str(self._paths.manager_socket)
        return reply

    async def init(self, request: InitRequest) -> InitReply:
        """`swarm init`. Raises SwarmError and leaves nothing behind."""
        async with self._changing:
            if request.force_new_cluster:
                return await self._force_new_cluster(request)
            self._refuse_if_member()
            listen_addr = check_listen(request.listen_addr)
            host = choose_advertise_host(request.advertise_addr, host_addresses())
            cluster = cluster_of(request)
            if request.auto_lock_managers:
                cluster = locked(cluster, random_key())
                self._lock.keep(cluster.unlock_key)
            bootstrap = create_cluster(cluster, random_id, time.time())
            bootstrap.node.spec.availability = request.availability
            membership = first_membership(bootstrap, host, listen_addr, request.data_path_addr)
            self._credentials = bootstrap.save(self._paths.certificates, self._lock.seal)
            await self._become(membership, bootstrap.message().SerializeToString())
            return InitReply(
                node_id=membership.node_id,
                tokens=bootstrap.cluster.join_tokens,
                join_addr=membership.join_addr,
                unlock_key=text_of(cluster.unlock_key),
            )

    async def _force_new_cluster(self, request: InitRequest) -> InitReply:
        """Go on as the only manager, with what this one's log holds. What runs on this host goes on running."""
        membership, credentials = self._membership, self._credentials
        if membership is None or credentials is None or credentials.identity.role != MANAGER:
            raise Invalid("this node is no manager of a swarm: there is nothing that --force-new-cluster could recover")
        if self._is_locked():
            raise Locked
        others = [each for each in await self._own_manager.managers() if each.manager_status.reachable]
        if len(others) > 1:
            names = ", ".join(each.description.hostname or each.id for each in others)
            raise Invalid(
                f"the swarm has a quorum ({names}): there is nothing to recover. To do without another manager,"
                " demote it (`pyswarm node demote`); to make a swarm of its own of this host, let it leave first"
            )
        if request.advertise_addr:
            host = choose_advertise_host(request.advertise_addr, host_addresses())
            data_path = vtep_of(request.data_path_addr, host, host_addresses())
            membership = replace(membership, advertise_host=host, data_path_addr=data_path)
        membership = membership.knowing((membership.manager_addr,))
        node = Node(id=membership.node_id, advertise_host=membership.advertise_host)
        node.data_path_addr = membership.data_path_addr
        await self._manager.stop(MANAGER_STOP_TIMEOUT_S)
        self._membership = membership
        self._paths.save_membership(membership)
        self._manager.start(Bootstrap(force_new_cluster=True, node=node).SerializeToString())
        await self._until(self._own_manager.answers, MANAGER_START_TIMEOUT_S, SILENT)
        cluster = await self._own_manager.cluster() or Cluster()
        return InitReply(node_id=node.id, tokens=cluster.join_tokens, join_addr=membership.join_addr)

    async def restore(self, request: RestoreRequest) -> InitReply:
        """`swarm restore`: be the only manager of the swarm that a backup holds. Raises SwarmError and leaves nothing
        behind."""
        async with self._changing:
            self._refuse_if_member()
            listen_addr = check_listen(request.listen_addr)
            host = choose_advertise_host(request.advertise_addr, host_addresses())
            cluster = await asyncio.to_thread(cluster_of_backup, Path(request.path))
            if cluster.unlock_key:
                self._lock.keep(cluster.unlock_key)
            bootstrap = restored_manager(cluster, random_id, time.time())
            membership = first_membership(bootstrap, host, listen_addr, request.data_path_addr)
            self._credentials = bootstrap.save(self._paths.certificates, self._lock.seal)
            await self._become(membership, Bootstrap(backup=request.path, node=bootstrap.node).SerializeToString())
            return InitReply(node_id=membership.node_id, tokens=cluster.join_tokens, join_addr=membership.join_addr)

    async def join(self, request: JoinRequest) -> JoinReply:
        """`swarm join`. Raises SwarmError and leaves nothing behind."""
        async with self._changing:
            self._refuse_if_member()
            listen_addr = check_listen(request.listen_addr)
            advertise = ""
            if request.advertise_addr:
                advertise = choose_advertise_host(request.advertise_addr, host_addresses())
            data_path = vtep_of(request.data_path_addr, advertise, host_addresses())
            remote_host, remote_port = split_host_port(request.remote_addr)
            if not remote_host:
                raise Invalid("give the address of a manager: pyswarm swarm join --token TOKEN HOST:2377")
            joined = await join_cluster(
                f"{remote_host}:{remote_port}",
                request.token,
                advertise_host=advertise,
                availability=request.availability,
                data_path_addr=data_path,
                hostname=self._config.hostname,
                timeout_s=JOIN_TIMEOUT_S,
            )
            self._credentials = joined.save(self._paths.certificates, self._lock.seal)
            membership = Membership(
                node_id=joined.node_id,
                cluster_id=self._credentials.identity.cluster_id,
                advertise_host=joined.advertise_host,
                listen_addr=listen_addr,
                data_path_addr=data_path or joined.advertise_host,
                manager_addrs=tuple(joined.manager_addrs),
            )
            await self._become(membership, b"")
            return JoinReply(node_id=joined.node_id, role=joined.role)

    def _refuse_if_member(self) -> None:
        if self._membership is not None:
            raise Invalid(
                "this node is already part of a swarm. "
                "Use `pyswarm swarm leave` to leave this swarm and join another one"
            )

    async def _become(self, membership: Membership, bootstrap: bytes) -> None:
        """Start being this node; returns when it is ready. Undone if it does not get so far."""
        self._membership = membership
        self._paths.save_membership(membership)
        assert self._credentials is not None
        try:
            if self._credentials.identity.role == MANAGER:
                self._manager.start(bootstrap)
                await self._until(
                    self._own_manager.answers, MANAGER_START_TIMEOUT_S, "the manager process does not answer"
                )
            self._start_agent()
            await self._until(self._session_stands, READY_TIMEOUT_S, "no manager took this node's session")
        except BaseException:
            await self._forget()
            raise

    async def _until(self, check: Callable[[], Awaitable[bool]], timeout_s: float, failure: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not await check():
            if time.monotonic() > deadline:
                raise NoLeader(f"{failure} within {timeout_s:g} s; see {self._paths.manager_log} and the daemon's log")
            await asyncio.sleep(POLL_S)

    async def _session_stands(self) -> bool:
        return self._node is not None and self._node.status.state == NodeStatus.READY

    def _is_locked(self) -> bool:
        """Whether this host's manager waits for its unlock key."""
        return (
            self._credentials is not None
            and self._credentials.identity.role == MANAGER
            and not self._manager.pid
            and self._lock.is_locked()
        )

    async def unlock(self, request: UnlockRequest) -> UnlockReply:
        """`swarm unlock`: start the manager with this key, if it is the right one. Raises Invalid, NoLeader."""
        async with self._changing:
            if self._membership is None:
                raise Invalid("this node is not part of a swarm")
            if not self._is_locked():
                raise Invalid("swarm is not locked")
            self._lock.unlock(request.unlock_key)
            if self._credentials is not None:
                self._credentials.refresh()
            log.info("unlocked")
            self._manager.wake()
            await self._until(self._manager_listens, MANAGER_START_TIMEOUT_S, SILENT)
        return UnlockReply()

    async def _manager_listens(self) -> bool:
        return bool(self._manager.pid) and await self._own_manager.listens()

    async def keep_unlock_key(self, request: KeepUnlockKeyRequest) -> KeepUnlockKeyReply:
        """From this host's manager, before and after it wraps its key with this one. Raises Invalid."""
        if request.unlock_key:
            self._lock.keep(request.unlock_key)
        if self._credentials is not None and self._membership is not None:
            try:
                await self._credentials.reseal()
            except (OSError, SwarmError) as error:
                log.error("the node's private key cannot be rewritten, trying again", reason=str(error))
        return KeepUnlockKeyReply()

    async def leave(self, request: LeaveRequest) -> LeaveReply:
        """`swarm leave`: stop every task and forget the swarm. A manager needs --force."""
        async with self._changing:
            if self._membership is None or self._credentials is None:
                raise Invalid("this node is not part of a swarm")
            if self._credentials.identity.role == MANAGER and not request.force:
                raise Invalid(await self._why_managers_stay())
            await self._forget()
        return LeaveReply()

    async def _why_managers_stay(self) -> str:
        text = (
            "you are attempting to leave the swarm on a node that is participating as a manager. "
            "Demote it first (`pyswarm node demote`), or use --force to leave regardless"
        )
        count = len(await self._own_manager.managers())
        if count == 1:
            return f"{text}. Removing the last manager erases all current state of the swarm"
        if count == 2:
            return f"{text}. Removing this node leaves 1 of 2 managers: without a quorum the swarm is inaccessible"
        return text

    async def _forget(self) -> None:
        """Undo everything that being a node made on this host; volumes and images stay."""
        agent, self._agent = self._agent, None
        for task in (self._agent_run, self._renewal):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._agent_run = self._renewal = None
        if agent is not None:
            await agent.leave()
        await self._manager.stop(MANAGER_STOP_TIMEOUT_S)
        shutil.rmtree(self._paths.raft, ignore_errors=True)
        self._lock.forget()
        self._paths.forget_membership()
        shutil.rmtree(self._paths.certificates, ignore_errors=True)
        self._paths.manager_socket.unlink(missing_ok=True)
        self._paths.make()
        self._membership = self._credentials = self._node = None
