"""What a new swarm begins with: its cluster object, as `swarm init` asks for it, and its first manager's membership."""

from __future__ import annotations

from proto.local_pb2 import InitRequest
from proto.objects_pb2 import Cluster
from swarm.addresses import check_pools, host_addresses, vtep_of
from swarm.hostfiles import Membership
from swarm.security.bootstrap import NewCluster

DEFAULT_POOL = "10.0.0.0/8"
DEFAULT_SUBNET_BITS = 24
DEFAULT_VXLAN_PORT = 4789
DEFAULT_HISTORY_LIMIT = 5


def cluster_of(request: InitRequest) -> Cluster:
    """The cluster with the specification and pools that were asked for, or Docker's. Raises Invalid."""
    cluster = Cluster(
        default_addr_pool=request.default_addr_pool or [DEFAULT_POOL],
        subnet_size=request.subnet_size or DEFAULT_SUBNET_BITS,
        data_path_port=request.data_path_port or DEFAULT_VXLAN_PORT,
    )
    cluster.spec.annotations.name = "default"
    cluster.spec.task_history_limit = request.task_history_limit or DEFAULT_HISTORY_LIMIT
    cluster.spec.heartbeat_period_s = request.heartbeat_period_s
    cluster.spec.node_cert_expiry_s = request.node_cert_expiry_s
    check_pools(cluster.default_addr_pool, cluster.subnet_size)
    return cluster


def first_membership(bootstrap: NewCluster, host: str, listen_addr: str, data_path_addr: str) -> Membership:
    """Of the first manager, whose node object gets its addresses."""
    node = bootstrap.node
    node.advertise_host = host
    node.data_path_addr = vtep_of(data_path_addr, host, host_addresses())
    membership = Membership(
        node_id=node.id,
        cluster_id=bootstrap.cluster.id,
        advertise_host=host,
        listen_addr=listen_addr,
        data_path_addr=node.data_path_addr,
    )
    membership = membership.knowing((membership.manager_addr,))
    node.manager_addr = membership.manager_addr
    return membership
