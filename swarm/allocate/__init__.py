"""Numbers that must be unique in the cluster: subnets, VNIs, addresses, virtual IPs, published ports."""

from swarm.allocate.ports import port_conflict
from swarm.allocate.stage import attachments, decide, ingress_network
from swarm.allocate.subnets import subnet_conflict

__all__ = ["attachments", "decide", "ingress_network", "port_conflict", "subnet_conflict"]
