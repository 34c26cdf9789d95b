"""What a node is told of one object."""

from __future__ import annotations

from proto.objects_pb2 import DNSRR, HOST, INGRESS, PortConfig, Service
from swarm.dispatch.items import service_item
from swarm.store.store import Store


def test_nodes_hear_of_every_published_port_whose_number_is_known() -> None:
    """Also of those in host mode: they have names (SRV)."""
    ports = [
        PortConfig(target_port=80, published_port=8080, mode=HOST),
        PortConfig(target_port=81, published_port=8081, mode=INGRESS),
        PortConfig(target_port=82, mode=INGRESS),
    ]
    service = Service(id="s")
    service.endpoint.spec.mode = DNSRR
    service.endpoint.spec.ports.extend(ports)
    assert list(service_item(Store.of(), service).item.service.ports) == ports[:2]
