"""Numbers that must be unique in the cluster: subnets, VNIs, addresses, virtual IPs, published ports."""

from swarm.allocate.ports import port_conflict
from swarm.allocate.predefined import needs_ingress
from swarm.allocate.stage import decide
from swarm.allocate.subnets import subnet_conflict

__all__ = ["decide", "needs_ingress", "port_conflict", "subnet_conflict"]
