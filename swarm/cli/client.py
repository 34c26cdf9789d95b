"""The two sockets of this host: the agent's (service Local) and, beside it, the manager's (Control).

Every call has a deadline. Control calls are repeated while a leader is being elected, with the same
request ID, so that a write is applied once however often it was sent.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from swarm.cli import retry
from swarm.cli.failure import NOT_A_MANAGER, NOT_IN_SWARM, ApiFailure, Failure, no_daemon

# The C core writes connection attempts to stderr; what a person needs to know we say ourselves.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from proto import local_pb2
from proto.objects_pb2 import WORKER
from swarm.errors import Locked

if TYPE_CHECKING:
    from proto.control_pb2_grpc import ControlStub
    from proto.local_pb2_grpc import LocalStub

Q = TypeVar("Q")
R = TypeVar("R")

MESSAGE_BYTES_MAX = 256 << 20
"""One reply: 100,000 tasks of about 1 KiB fit; gRPC's default of 4 MiB holds 4,000."""
CONNECT_S = 2.0
LOCAL_S = 30.0
"""Info, listings and removals on this host."""
MEMBERSHIP_S = 120.0
"""Init, join and leave: joining may wait for five tries to reach a manager, leaving for tasks to stop."""
RESOLVE_S = 60.0
"""A registry that answers at all does so within seconds; the agent's own deadline is shorter than this."""
TRANSFER_S = 3600.0
"""Pulling or loading an image."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # This is what gRPC calls the time that an attempt to connect may take: a loaded machine needs more than 100 ms.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Client:
    """`agent_socket`: path of the agent's socket; the manager's stands beside it as manager.sock."""

    def __init__(self, agent_socket: Path, total_s: float = retry.TOTAL_S) -> None:
        self.agent_socket = agent_socket
        self.manager_socket = agent_socket.with_name("manager.sock")
        self._total_s = total_s
        self._channels: list[grpc.Channel] = []

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _channel(self, path: Path) -> grpc.Channel:
        channel = grpc.insecure_channel(f"unix:{path}", options=_OPTIONS)
        self._channels.append(channel)
        return channel

    @cached_property
    def local(self) -> LocalStub:
        """The agent's API; raises Failure when nobody listens."""
        from proto.local_pb2_grpc import LocalStub

        if why := refusal(self.agent_socket):
            raise no_daemon(f"unix://{self.agent_socket}", why)
        return LocalStub(self._channel(self.agent_socket))

    @cached_property
    def control(self) -> ControlStub:
        """The manager's API. Connecting happens at the first call."""
        from proto.control_pb2_grpc import ControlStub

        return ControlStub(self._channel(self.manager_socket))

    # ---- the agent

    def ask(self, method: grpc.UnaryUnaryMultiCallable[Q, R], request: Q, timeout_s: float = LOCAL_S) -> R:
        """One call to the agent, not repeated. Raises ApiFailure."""
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise api_failure(error) from None

    def info(self) -> local_pb2.InfoReply:
        return self.ask(self.local.Info, local_pb2.InfoRequest())

    @cached_property
    def node_id(self) -> str:
        return self.info().node_id

    # ---- the manager

    def call(self, method: grpc.UnaryUnaryMultiCallable[Q, R], request: Q, retry_conflict: bool = True) -> R:
        """One call to the manager, repeated while there is no leader. Raises ApiFailure or Failure.
        `retry_conflict=False` hands ABORTED back at once, for callers that must read again first."""
        started_s = time.monotonic()
        request_id = secrets.token_hex(16)
        attempt = 0
        while True:
            attempt += 1
            failure = self._attempt(method, request, request_id)
            if not isinstance(failure, ApiFailure):
                return failure
            if failure.code == "ABORTED" and not retry_conflict:
                raise failure
            pause_s = retry.delay_s(failure.code, attempt, time.monotonic() - started_s, self._total_s)
            if pause_s is None:
                raise failure
            if not retry.keeps_request_id(failure.code):
                request_id = secrets.token_hex(16)
            time.sleep(pause_s)

    def _attempt(self, method: grpc.UnaryUnaryMultiCallable[Q, R], request: Q, request_id: str) -> R | ApiFailure:
        if why := refusal(self.manager_socket):
            self.diagnose()
            return ApiFailure(f"this node's manager does not answer ({why} at {self.manager_socket})", "UNAVAILABLE")
        try:
            return method(request, timeout=retry.ATTEMPT_S, metadata=(("request-id", request_id),))
        except grpc.RpcError as error:
            return api_failure(error)

    def diagnose(self) -> None:
        """Nobody listens on the manager's socket: raise Failure if waiting cannot help."""
        info = self.info()
        if info.state == local_pb2.InfoReply.INACTIVE:
            raise Failure(NOT_IN_SWARM)
        if info.state == local_pb2.InfoReply.LOCKED:
            raise Failure(str(Locked()))
        if info.state == local_pb2.InfoReply.ERROR:
            raise Failure(f"this node's membership of the swarm has failed: {info.error}")
        if info.state == local_pb2.InfoReply.ACTIVE and info.role == WORKER and not info.manager_socket:
            raise Failure(NOT_A_MANAGER)

    def stream(self, method: grpc.UnaryStreamMultiCallable[Q, R], request: Q, timeout_s: float | None) -> Iterator[R]:
        """A server's stream, not repeated. `timeout_s` None: until it ends or the user interrupts.
        Raises ApiFailure."""
        call = method(request, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise api_failure(error) from None
        finally:
            call.cancel()

    def require_manager(self) -> None:
        """Say what is wrong when nobody listens on the manager's socket. Raises Failure."""
        if why := refusal(self.manager_socket):
            self.diagnose()
            raise ApiFailure(f"this node's manager does not answer ({why} at {self.manager_socket})", "UNAVAILABLE")

    def control_stream(self, method: grpc.UnaryStreamMultiCallable[Q, R], request: Q) -> Iterator[R]:
        """As `stream`, for the manager's socket: says what is wrong when nobody listens there."""
        self.require_manager()
        yield from self.stream(method, request, None)


def refusal(path: Path) -> str:
    """Why nobody can be reached at a unix socket ("ENOENT", "ECONNREFUSED", ...); "" = someone listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
        except TimeoutError:
            return "ETIMEDOUT"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
    return ""


def api_failure(error: grpc.RpcError) -> ApiFailure:
    """The error's one line and its status name."""
    assert isinstance(error, grpc.Call)
    code: str = error.code().name
    return ApiFailure(error.details() or code.lower().replace("_", " "), code)


def connect() -> Client:
    """The client of the running command, closed when the command ends."""
    context = click.get_current_context()
    root = context.find_root()
    client = root.meta.get("swarm.client")
    if client is None:
        client = root.meta["swarm.client"] = Client(root.meta["swarm.host"])
        root.call_on_close(client.close)
    assert isinstance(client, Client)
    return client
