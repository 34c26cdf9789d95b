"""What this host knows at this moment: the mirror, its own node object, the sandboxes and states of its tasks;
and the two pictures that follow from it."""

from __future__ import annotations

from collections.abc import Callable

from dns.interface import Picture, Sandbox
from node import drivers, view
from node.mirror import Mirror
from node.pictures import Pictures
from node.steps import State
from overlay.interface import Attachment, EncryptionKey, HostState
from proto.objects_pb2 import Node, NodeDescription, Task


class World:
    def __init__(
        self, node_id: str, vtep: str, upstreams: Callable[[], tuple[str, ...]], describe: Callable[[], NodeDescription]
    ) -> None:
        self.node_id = node_id
        self.vtep = vtep
        self.mirror = Mirror()
        self.node = Node()
        """Own node object as the managers last sent it; empty before the first session."""
        self.vxlan_port = view.DEFAULT_VXLAN_PORT
        self.description = describe()
        self.keys: tuple[EncryptionKey, ...] = ()
        """In memory only, as told by the session: it names them before the networks that need them."""
        self.sandboxes: dict[str, Sandbox] = {}
        self.given: dict[str, str] = {}
        """Task -> the address that this host gave it on its own bridge."""
        self.states: dict[str, State] = {}
        self._describe = describe
        self._host_states = view.HostStates()
        self._pictures = Pictures()
        self._upstreams = upstreams

    def describe(self) -> NodeDescription:
        self.description = self._describe()
        return self.description

    def local(self) -> view.Local:
        return view.Local(
            self.node_id,
            self.vtep,
            self.node.index,
            self.vxlan_port,
            self.given,
            self.states,
            self.keys,
            self.description.encrypts,
        )

    def host_state(self) -> HostState | None:
        """None until a manager has told what to be: what stands from before a restart stays untouched."""
        if not self.mirror.known or not self.node.index:
            return None
        return self._host_states.draw(self.mirror, self.local())

    def picture(self) -> Picture | None:
        if not self.mirror.known:
            return None
        return self._pictures.draw(self.mirror, self.local(), self.sandboxes.values(), self._upstreams())

    def attachment(self, task: Task) -> Attachment | None:
        found = (self.mirror.network(net.network_id) for net in task.networks)
        return drivers.attachment(task, [network for network in found if network is not None])

    def networks_without_links(self) -> frozenset[str]:
        return frozenset(n.id for n in self.mirror.networks() if drivers.driver(n) in (drivers.HOST, drivers.NONE))

    def ingress_ids(self) -> frozenset[str]:
        return view.ingress_network_ids(self.mirror)
