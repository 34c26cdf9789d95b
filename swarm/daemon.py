"""The agent process, `pyswarm daemon`: the only place where the host's real parts are built and wired."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import structlog

from dns.client import NameServerProcess
from dns.interface import LISTEN_PORT
from node import priority
from node.agent import Agent
from node.conmon import ConmonRuntime
from node.description import describe
from node.disk_api import DiskApi
from node.image_api import ImageApi
from node.images import ImageStore
from node.interface import Phase
from node.mounts import prepare_mount_namespace
from node.resolvers import host_resolvers
from overlay import probe
from overlay.host import KernelNetwork
from overlay.interface import Balancer, NetworkError
from proto.local_pb2 import (
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
from proto.local_pb2_grpc import LocalServicer, add_LocalServicer_to_server
from proto.objects_pb2 import NodeDescription
from swarm.api.status import status_of
from swarm.config import DaemonConfig
from swarm.errors import SwarmError
from swarm.hostfiles import HostPaths, Membership
from swarm.local import HostMembership
from swarm.logs import configure
from swarm.security.certificates import NodeCredentials
from swarm.supervise import hold_lock
from swarm.version import __version__

LINK_PREFIX = "pys"
"""Of the overlays' links on the host: their addresses are not the machine's own."""
TAG_CHARS = 5
"""Of the node ID, in names of links: with the prefix and a number they must fit 15 characters."""

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger()


class LocalService(ImageApi, DiskApi, LocalServicer):
    """The API on the daemon's unix socket: membership and images of this host."""

    def __init__(
        self,
        *,
        images: ImageStore,
        runtime: ConmonRuntime,
        names: NameServerProcess,
        host: HostMembership,
        wanted_volumes: Callable[[], frozenset[str]],
        spool_dir: Path,
    ) -> None:
        ImageApi.__init__(self, images, runtime.images_in_use, spool_dir)
        DiskApi.__init__(self, images, runtime, runtime.images_in_use, wanted_volumes, spool_dir)
        self._containers = runtime
        self._names = names
        self._host = host

    async def Info(self, request: InfoRequest, context: Context) -> InfoReply:
        reply = await _answer(self._host.info, request, context)
        reply.containers_running = sum(
            1 for container in await self._containers.containers() if container.phase is Phase.RUNNING
        )
        reply.agent_pid = os.getpid()
        reply.dns_pid = self._names.pid
        return reply

    async def Init(self, request: InitRequest, context: Context) -> InitReply:
        return await _answer(self._host.init, request, context)

    async def Restore(self, request: RestoreRequest, context: Context) -> InitReply:
        return await _answer(self._host.restore, request, context)

    async def Join(self, request: JoinRequest, context: Context) -> JoinReply:
        return await _answer(self._host.join, request, context)

    async def Leave(self, request: LeaveRequest, context: Context) -> LeaveReply:
        return await _answer(self._host.leave, request, context)

    async def Unlock(self, request: UnlockRequest, context: Context) -> UnlockReply:
        return await _answer(self._host.unlock, request, context)

    async def KeepUnlockKey(self, request: KeepUnlockKeyRequest, context: Context) -> KeepUnlockKeyReply:
        return await _answer(self._host.keep_unlock_key, request, context)


async def _answer(
    call: Callable[[Request], Awaitable[Reply]], request: Request, context: grpc.aio.ServicerContext[Any, Any]
) -> Reply:
    try:
        return await call(request)
    except SwarmError as error:
        await context.abort(status_of(error), str(error))
        raise AssertionError("unreachable: abort raises") from None


class Daemon:
    def __init__(self, config: DaemonConfig, paths: HostPaths, balancer: Balancer) -> None:
        self._config = config
        self._paths = paths
        self._balancer = balancer
        self._images = ImageStore(
            paths.state / "storage",
            paths.run / "storage",
            config.image_stores,
            frozenset(config.insecure_registries),
        )
        self._runtime = ConmonRuntime(paths.state, paths.run, config.cgroup_parent, runtime=config.runtime)
        self._names = NameServerProcess(paths.run, paths.dns_log, priority.prefer)
        self._agent: Agent | None = None
        self._host = HostMembership(config, paths, self._make_agent, priority.prefer)

    async def run(self) -> None:
        """Until SIGTERM or SIGINT; containers, names and networks go on without us."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        server = grpc.aio.server()
        add_LocalServicer_to_server(
            LocalService(
                images=self._images,
                runtime=self._runtime,
                names=self._names,
                host=self._host,
                wanted_volumes=self._wanted_volumes,
                spool_dir=self._paths.state,
            ),
            server,
        )
        self._paths.daemon_socket.unlink(missing_ok=True)
        old_mask = os.umask(0o117)
        server.add_insecure_port(f"unix://{self._paths.daemon_socket}")
        os.umask(old_mask)
        await self._host.resume()
        await server.start()
        log.info("daemon runs", socket=str(self._paths.daemon_socket), pid=os.getpid())
        await stop.wait()
        log.info("daemon stops; containers stay")
        await server.stop(0)
        await self._host.stop()

    def _make_agent(self, membership: Membership, credentials: NodeCredentials, host: HostMembership) -> Agent:
        network = KernelNetwork(
            self._paths.run,
            membership.node_id[:TAG_CHARS],
            LISTEN_PORT,
            balancer=self._balancer,
            answers_through_ingress=probe.answers_through_ingress(),
        )
        self._agent = Agent(
            node_id=membership.node_id,
            state_dir=self._paths.state,
            runtime=self._runtime,
            images=self._images,
            network=network,
            names=self._names,
            open_channel=credentials.open_channel,
            managers=list(membership.manager_addrs),
            on_managers=host.on_managers,
            on_node=host.on_node,
            describe=lambda: self._describe(network),
            advertise_host=membership.advertise_host,
            data_path_addr=membership.data_path_addr,
            upstreams=host_resolvers,
            now=time.time,
        )
        return self._agent

    def _wanted_volumes(self) -> frozenset[str]:
        return self._agent.volume_names() if self._agent is not None else frozenset()

    def _describe(self, network: KernelNetwork) -> NodeDescription:
        hostname = self._config.hostname or socket.gethostname()
        description = describe(hostname, __version__, lambda link: link.startswith(LINK_PREFIX), self._config.labels)
        description.generic.extend(self._config.generic_resources)
        description.balancer = self._balancer
        description.answers_through_ingress = probe.answers_through_ingress()
        encryption = network.encryption()
        description.encrypts, description.encryption_epoch = encryption.supported, encryption.epoch
        return description


def run(config: DaemonConfig) -> None:
    """The daemon's life, from `pyswarm daemon`, in a process that is preferred (node/priority.py). Exits with status 1
    and a reason if it cannot start."""
    configure(config.log_level)
    paths = HostPaths(config.state_dir, config.run_dir)
    if os.geteuid() != 0:
        sys.exit("pyswarm daemon makes namespaces, mounts and cgroups: run it as root")
    paths.make()
    lock = hold_lock(config.run_dir / "daemon.lock")
    if lock is None:
        sys.exit(f"another pyswarm daemon uses {config.run_dir}: give this one another --run-dir and --state-dir")
    try:
        balancer = probe.choose_balancer(config.balancer, probe.has_ipvs())
    except NetworkError as error:
        sys.exit(str(error))
    prepare_mount_namespace(config.run_dir, config.runtime)
    # A task costs a few descriptors (pidfd, netlink, log): the usual soft limit of 1,024 would hold some 200.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _close_oom_gap(Path("/proc/self/oom_score_adj"))
    asyncio.run(Daemon(config, paths, balancer).run())
    lock.close()


def _close_oom_gap(path: Path) -> None:
    """Prefer to lose a container rather than the agent when memory runs out, as dockerd does."""
    try:
        path.write_text("-500")
    except OSError:
        log.debug("oom_score_adj cannot be lowered here")
