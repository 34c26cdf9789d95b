"""Everything the server has been told, moved by changes. A change whose base is another digest is refused: the agent
then tells the whole picture."""

from __future__ import annotations

from dns.changes import EMPTY_DIGEST, Changes, NetworkChange, Part, hash_of, moved
from dns.interface import Sandbox
from dns.names import NetworkView


class OutOfStep(Exception):
    """The change is on top of a picture that is not the one known here."""


class Zones:
    def __init__(self) -> None:
        self.digest = EMPTY_DIGEST
        self.networks: dict[str, NetworkView] = {}
        self.sandboxes: dict[str, Sandbox] = {}
        self.upstreams: tuple[str, ...] = ()

    def apply(self, changes: Changes) -> frozenset[str] | None:
        """IDs of the networks of which a name changed; None: networks came or went, so every view is another.
        Raises OutOfStep, and nothing has changed then."""
        if changes.base is not None and changes.base != self.digest:
            raise OutOfStep
        before = set(self.networks.values())
        if changes.base is None:
            self.digest, self.networks, self.sandboxes, self.upstreams = EMPTY_DIGEST, {}, {}, ()
        gone, come = [hash_of(self.upstreams)], [hash_of(changes.upstreams)]
        for network_id in changes.gone_networks:
            gone += _hashes(network_id, self.networks.pop(network_id))
        for change in changes.networks:
            self._change_network(change, gone, come)
        for task_id in changes.gone_sandboxes:
            gone.append(hash_of(self.sandboxes.pop(task_id)))
        for box in changes.sandboxes:
            if box.task_id in self.sandboxes:
                gone.append(hash_of(self.sandboxes[box.task_id]))
            self.sandboxes[box.task_id] = box
            come.append(hash_of(box))
        self.upstreams = changes.upstreams
        self.digest = moved(self.digest, gone, come)
        if before != set(self.networks.values()):
            return None
        return frozenset(change.network_id for change in changes.networks)

    def _change_network(self, change: NetworkChange, gone: list[int], come: list[int]) -> None:
        names = change.names
        view = self.networks.get(change.network_id)
        if view is None or (view.name, view.internal) != (names.name, names.internal):
            if view is not None:
                gone += _hashes(change.network_id, view)
            self.networks[change.network_id] = view = NetworkView(names)
            come += _hashes(change.network_id, view)
            return
        for service in names.services:
            if service.names[0] in view.services:
                gone.append(hash_of(view.services[service.names[0]], change.network_id))
            view.put_service(service)
            come.append(hash_of(service, change.network_id))
        for task in names.tasks:
            if task.names[0] in view.tasks:
                gone.append(hash_of(view.tasks[task.names[0]], change.network_id))
            view.put_task(task)
            come.append(hash_of(task, change.network_id))
        for name in change.gone_services:
            gone.append(hash_of(view.services[name], change.network_id))
            view.drop_service(name)
        for name in change.gone_tasks:
            gone.append(hash_of(view.tasks[name], change.network_id))
            view.drop_task(name)


def _hashes(network_id: str, view: NetworkView) -> list[int]:
    parts: tuple[Part, ...] = (view.names, *view.services.values(), *view.tasks.values())
    return [hash_of(part, network_id) for part in parts]
