"""Which objects a stage must look at again: gathered from the store's events, so that one task's change
never costs a scan of all tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from proto import objects_pb2 as pb
from proto.objects_pb2 import Cluster, Network, Node, Service, Task
from swarm.store import states
from swarm.store.changes import Record
from swarm.store.store import Event


@dataclass(slots=True)
class Dirty:
    """Mutable on purpose: the leader's loop collects into one and hands it over."""

    everything: bool = False
    services: set[str] = field(default_factory=set)
    """Services whose object or one of whose tasks changed (or is gone)."""
    nodes: set[str] = field(default_factory=set)
    networks: set[str] = field(default_factory=set)
    freed: bool = False
    """Something stopped or was removed: what found no room before may find it now."""

    def __bool__(self) -> bool:
        return self.everything or self.freed or bool(self.services or self.nodes or self.networks)

    def merge(self, other: Dirty) -> None:
        self.everything |= other.everything
        self.freed |= other.freed
        self.services |= other.services
        self.nodes |= other.nodes
        self.networks |= other.networks

    def note(self, events: Iterable[Event]) -> None:
        """Take in what one entry changed."""
        for event in events:
            self._note_one(event)

    def touch(self, record: Record) -> None:
        """Have this object looked at again (its change was refused, say)."""
        match record:
            case Task():
                self.services.add(record.service_id)
            case Service():
                self.services.add(record.id)
            case Node():
                self.nodes.add(record.id)
            case Network():
                self.networks.add(record.id)
            case Cluster():
                self.everything = True

    def _note_one(self, event: Event) -> None:
        before, after, old_state, new_state = event
        match before, after:
            case (Task() as old, Task() as new):
                self.freed |= old_state <= pb.TASK_RUNNING < new_state
                if states.milestone(old_state) != states.milestone(new_state) or not _same_to_stages(old, new):
                    self.services.add(new.service_id)
                return
            case (Service() as old_service, Service() as new_service):
                if old_service.endpoint != new_service.endpoint:
                    self.freed |= bool(_held(old_service) - _held(new_service))
            case (Cluster() as old_cluster, Cluster() as new_cluster):
                # Certificates and tokens change the cluster object too; only its spec and pools concern stages.
                if (
                    old_cluster.spec != new_cluster.spec
                    or old_cluster.default_addr_pool != new_cluster.default_addr_pool
                ):
                    self.everything = True
                return
        self.freed |= after is None
        record = after if after is not None else before
        if record is not None:
            self.touch(record)


def _same_to_stages(old: Task, new: Task) -> bool:
    """Of one milestone: progress between ASSIGNED and RUNNING and messages about it decide nothing."""
    return old.desired_state == new.desired_state and old.node_id == new.node_id and old.running_at == new.running_at


def _held(service: Service) -> set[tuple[str, str] | tuple[int, int]]:
    """What others have to wait for while this service has it: virtual IPs and published ports."""
    vips = {(vip.network_id, vip.address) for vip in service.endpoint.virtual_ips}
    return vips | {(port.protocol, port.published_port) for port in service.endpoint.spec.ports}
