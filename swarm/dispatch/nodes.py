"""What the dispatcher writes into Node objects. Pure; each function returns None when nothing changes."""

from __future__ import annotations

from proto.dispatch_pb2 import AgentHello
from proto.objects_pb2 import Node, NodeStatus


def registered(node: Node, hello: AgentHello, seen_addr: str) -> Node | None:
    """The node with what its agent told about it, and READY. `seen_addr` is the host the manager sees."""
    updated = Node()
    updated.CopyFrom(node)
    updated.description.CopyFrom(hello.description)
    if hello.advertise_host and hello.advertise_host != node.advertise_host:
        if node.data_path_addr == node.advertise_host:
            updated.data_path_addr = hello.advertise_host  # it followed the advertised address, so it goes on to
        updated.advertise_host = hello.advertise_host
    updated.status.CopyFrom(NodeStatus(state=NodeStatus.READY, addr=seen_addr))
    return updated if updated != node else None


def with_state(node: Node, state: NodeStatus.State.ValueType, message: str) -> Node | None:
    """The node in this state; the message says why."""
    if node.status.state == state:
        return None
    updated = Node()
    updated.CopyFrom(node)
    updated.status.state = state
    updated.status.message = message
    return updated


def host_of_peer(peer: str) -> str:
    """The host in grpc's name of a connection's other end: "ipv4:10.0.0.1:4242", "ipv6:%5B::1%5D:4242"."""
    kind, _, rest = peer.partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return ""
    host = rest.rpartition(":")[0]
    return host.replace("%5B", "").replace("%5D", "").strip("[]")
