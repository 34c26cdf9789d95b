"""What a lab asks of its hosts' daemons, over their unix sockets."""

from __future__ import annotations

import time

import grpc

from proto.control_pb2 import ClusterRequest, ListRequest
from proto.control_pb2_grpc import ControlStub
from proto.local_pb2 import InfoReply, InfoRequest, InitRequest, JoinRequest
from proto.local_pb2_grpc import LocalStub
from proto.objects_pb2 import Node
from swarm.lab.plan import Host, Plan
from swarm.lab.shell import LabError

CALL_TIMEOUT_S = 120.0
START_TIMEOUT_S = 120.0
"""Each takes a second or two; in an emulated machine under load, half a minute."""
POLL_S = 0.05
PORT = 2377


def _failed(host: Host, what: str, error: grpc.RpcError) -> LabError:
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return LabError(f"{host.name}: {what}: {details}; see {host.log}")


def wait_for_daemon(host: Host) -> None:
    """Until its socket answers. Raises LabError."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if host.socket.exists():
            try:
                info(host)
                return
            except LabError:
                pass
        if time.monotonic() > deadline:
            raise LabError(f"the daemon of {host.name} did not start within {START_TIMEOUT_S:g} s; see {host.log}")
        time.sleep(POLL_S)


def info(host: Host) -> InfoReply:
    with grpc.insecure_channel(f"unix://{host.socket}") as channel:
        try:
            return LocalStub(channel).Info(InfoRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise _failed(host, "the daemon does not answer", error) from None


def init(host: Host) -> None:
    with grpc.insecure_channel(f"unix://{host.socket}") as channel:
        try:
            LocalStub(channel).Init(InitRequest(advertise_addr=host.address), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise _failed(host, "swarm init", error) from None


def join(host: Host, via: Host) -> None:
    """Join `host` to the swarm of `via`, as its name says."""
    try:
        with grpc.insecure_channel(f"unix://{via.run_dir}/manager.sock") as channel:
            tokens = ControlStub(channel).GetCluster(ClusterRequest(), timeout=CALL_TIMEOUT_S).join_tokens
        request = JoinRequest(
            token=tokens.manager if host.manager else tokens.worker,
            remote_addr=f"{via.address}:{PORT}",
            advertise_addr=host.address,
        )
        with grpc.insecure_channel(f"unix://{host.socket}") as channel:
            LocalStub(channel).Join(request, timeout=CALL_TIMEOUT_S)
    except grpc.RpcError as error:
        raise _failed(host, "swarm join", error) from None


def nodes(plan: Plan) -> list[Node]:
    """As the first manager says that answers. Raises LabError."""
    failure = LabError(f"no manager of lab {plan.name} runs: `pyswarm lab start m1`")
    for host in plan.hosts:
        if not host.manager or not host.socket.exists():
            continue
        with grpc.insecure_channel(f"unix://{host.run_dir}/manager.sock") as channel:
            try:
                return list(ControlStub(channel).ListNodes(ListRequest(), timeout=CALL_TIMEOUT_S).nodes)
            except grpc.RpcError as error:
                failure = _failed(host, "node ls", error)
    raise failure
