"""The mirror as seen by the name server (pure but for its memory: each picture is drawn from the one before, so that a
change costs what it changes and not what a host with thousands of tasks in sight knows).

Who answers to a service's names is decided by the managers alone (`NetworkEndpoint.serving`), with one exception: a
local task that is known to have ended is left out at once, without waiting for the round trip.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from dns.interface import NetworkNames, Picture, Sandbox, ServiceNames, TaskNames
from node import drivers
from node.inputs import HOSTNAME_LENGTH
from node.mirror import Mirror
from node.view import Local
from proto.dispatch_pb2 import Item, NetworkEndpoint, NetworkService
from proto.objects_pb2 import SCTP, TCP, UDP, VIP

_PROTOCOL: dict[int, str] = {TCP: "tcp", UDP: "udp", SCTP: "sctp"}


class Pictures:
    def __init__(self) -> None:
        self._items: Mapping[str, Item] = {}
        self._ended: frozenset[str] = frozenset()
        self._serving: dict[str, dict[str, dict[str, tuple[str, ...]]]] = defaultdict(lambda: defaultdict(dict))
        """Service ID -> network ID -> task ID -> addresses, of both families."""
        self._tasks: dict[str, dict[str, TaskNames]] = defaultdict(dict)
        """Network ID -> task ID -> names."""
        self._services: dict[str, dict[str, ServiceNames]] = defaultdict(dict)
        """Network ID -> service ID -> names."""
        self._named: set[str] = set()
        """IDs of the networks on which there are names: not the ingress network, whose tasks belong to strangers, nor a
        host's own bridge, where nobody of another host can be reached."""
        self._on: dict[str, tuple[str, ...]] = {}
        """Service ID -> IDs of the networks on which it has names."""
        self._drawn: dict[str, NetworkNames] = {}
        self._boxes: dict[str, tuple[Sandbox, Sandbox]] = {}
        """Task ID -> its sandbox and how it was drawn."""

    def draw(self, mirror: Mirror, local: Local, sandboxes: Iterable[Sandbox], upstreams: tuple[str, ...]) -> Picture:
        """Names for the networks that local tasks see."""
        self._follow(mirror.items, frozenset(task_id for task_id in local.states if local.has_ended(task_id)))
        self._boxes = {box.task_id: (box, self._box(box)) for box in sorted(sandboxes, key=lambda box: box.task_id)}
        boxes = tuple(drawn for _, drawn in self._boxes.values())
        seen = sorted({network_id for box in boxes for network_id in box.network_ids})
        return Picture(tuple(self._network(each) for each in seen), boxes, upstreams)

    def _box(self, box: Sandbox) -> Sandbox:
        """The same object as long as nothing about it changes."""
        before, drawn = self._boxes.get(box.task_id, (None, box))
        network_ids = tuple(each for each in box.network_ids if each in self._named)
        return drawn if before is box and drawn.network_ids == network_ids else replace(box, network_ids=network_ids)

    def _network(self, network_id: str) -> NetworkNames:
        drawn = self._drawn.get(network_id)
        if drawn is None:
            network = self._items[f"network/{network_id}"].network
            drawn = self._drawn[network_id] = NetworkNames(
                network_id=network_id,
                name=network.spec.annotations.name,
                internal=network.spec.internal,
                services=tuple(self._services[network_id].values()),
                tasks=tuple(self._tasks[network_id].values()),
            )
        return drawn

    def _follow(self, items: Mapping[str, Item], ended: frozenset[str]) -> None:
        """What has changed since the last picture: items are never changed in place, so identity tells."""
        before = self._items
        changed = {key for key, item in items.items() if before.get(key) is not item}
        toggled = self._ended ^ ended
        if toggled:
            changed.update(key for key in items if key.startswith("endpoint/") and key.rpartition("/")[2] in toggled)
        gone = before.keys() - items.keys()
        self._items, self._ended = items, ended
        services = {self._drop(before[key]) for key in gone | (changed & before.keys())}
        services |= {self._put(items[key]) for key in changed}
        for service_id in services - {""}:
            self._draw_service(service_id)

    def _drop(self, item: Item) -> str:
        """Returns the ID of the service whose names may be others now, or ""."""
        if item.HasField("endpoint"):
            end = item.endpoint
            self._tasks[end.network_id].pop(end.task_id, None)
            self._serving[end.service_id][end.network_id].pop(end.task_id, None)
            self._drawn.pop(end.network_id, None)
            return end.service_id
        if item.HasField("network"):
            self._named.discard(item.network.id)
            self._drawn.pop(item.network.id, None)
        return item.service.service_id

    def _put(self, item: Item) -> str:
        if item.HasField("endpoint"):
            end = item.endpoint
            if end.address:
                serves = end.serving and end.task_id not in self._ended
                self._tasks[end.network_id][end.task_id] = _task_names(end, serves)
                if serves:
                    addresses = (end.address, end.address6) if end.address6 else (end.address,)
                    self._serving[end.service_id][end.network_id][end.task_id] = addresses
                self._drawn.pop(end.network_id, None)
            return end.service_id
        if item.HasField("network"):
            self._drawn.pop(item.network.id, None)
            if not item.network.spec.ingress and drivers.driver(item.network) != drivers.BRIDGE:
                self._named.add(item.network.id)
        return item.service.service_id

    def _draw_service(self, service_id: str) -> None:
        item = self._items.get(f"service/{service_id}")
        names = _service_names(item.service, self._serving[service_id]) if item is not None else {}
        for network_id in {*self._serving[service_id], *names, *self._on.get(service_id, ())}:
            here = self._services[network_id]
            if here.get(service_id) != names.get(network_id):
                self._drawn.pop(network_id, None)
                here.pop(service_id, None)
                if network_id in names:
                    here[service_id] = names[network_id]
        self._on[service_id] = tuple(names)


def _service_names(
    service: NetworkService, serving: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> dict[str, ServiceNames]:
    """Network ID -> names, for the networks that the service is on."""
    vips = {vip.network_id: vip for vip in service.virtual_ips}
    configs = {config.network_id: config for config in service.networks}
    ports = tuple((port.name, _PROTOCOL[port.protocol], port.target_port) for port in service.ports)
    found: dict[str, ServiceNames] = {}
    for network_id in {**configs, **vips, **{each: None for each, tasks in serving.items() if tasks}}:
        vip = vips.get(network_id) if service.mode == VIP else None
        aliases = configs[network_id].aliases if network_id in configs else ()
        addresses = (address for each in serving.get(network_id, {}).values() for address in each)
        found[network_id] = ServiceNames(
            names=tuple(dict.fromkeys((service.name, *aliases))),
            vip=vip.address.partition("/")[0] if vip is not None else None,
            task_addresses=tuple(sorted(addresses, key=_numeric)),
            vip6=vip.address6.partition("/")[0] or None if vip is not None else None,
            ports=ports,
        )
    return found


def _numeric(address: str) -> tuple[int, int]:
    parsed = ipaddress.ip_address(address)
    return parsed.version, int(parsed)


def _task_names(endpoint: NetworkEndpoint, serves: bool) -> TaskNames:
    """The full name and the container's short ID stand for as long as the address belongs to the task, so that peers of
    a draining task can still be named; `<service>.<slot>` and `<slot>.<service>` mean the one that serves, of which an
    update has two: a slot keeps its name whatever task fills it. Tasks of global services have their node instead of a
    slot."""
    names: tuple[str, ...] = (endpoint.task_name, endpoint.task_id[:HOSTNAME_LENGTH])
    if serves:
        short = endpoint.task_name.rpartition(".")[0]
        service, _, place = short.rpartition(".")
        names += (short, f"{place}.{service}")
    return TaskNames(names=names, address=endpoint.address, address6=endpoint.address6)
