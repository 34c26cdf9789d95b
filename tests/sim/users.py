"""What the users of a simulated swarm want: services made, changed, scaled, removed; nodes drained and brought back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from proto import objects_pb2 as pb
from proto.objects_pb2 import Cluster, Network, Node, Service, ServiceSpec
from swarm import schedule
from swarm.orchestrate.moves import planned
from swarm.store import states
from swarm.store.changes import Change, Create, Update, copy_of
from swarm.store.store import Store

NETWORKS_MIN, SERVICES_PER_NETWORK = 4, 10
REPLICAS_MAX = 12


def networks_for(services: int) -> int:
    """How many networks so many services share: a node is told of all that is on its networks, so a thousand services
    on four of them would be a thousand nodes that know everything."""
    return max(NETWORKS_MIN, services // SERVICES_PER_NETWORK)


def founding(hosts: list[str], networks: int) -> tuple[Change, ...]:
    """The objects of a new cluster."""
    # Room for a few services with two tasks on each host at once, as updates that start first have.
    cluster = Cluster(id="cluster", default_addr_pool=["10.0.0.0/8"], subnet_size=22 if len(hosts) <= 100 else 16)
    made: list[Change] = [Create(cluster)]
    for number in range(networks + 1):
        network = Network(id=f"net{number}")
        network.spec.annotations.name = network.id if number else "ingress"
        network.spec.ingress = not number
        if not number:
            network.spec.ipam.subnet = "10.255.0.0/16"
        made.append(Create(network))
    made.extend(Create(Node(id=host, advertise_host="192.0.2.1", data_path_addr="192.0.2.1")) for host in hosts)
    return tuple(made)


class Users:
    """Draws one wish at a time; `wish` returns the change that states it, in terms of the store as it is now."""

    def __init__(self, chance: random.Random, services_max: int, hosts: int) -> None:
        self._chance = chance
        self._services_max = services_max
        self._networks = networks_for(services_max)
        self._stride = max(1, hosts // 50)
        """Nobody updates a task on each of a thousand hosts one by one: that would not end in the time there is."""
        self._made = 0

    def wish(self, store: Store) -> tuple[str, Change] | None:
        """What is wanted, in words and as a change; None: nothing at the moment."""
        services = sorted((s for s in store.services if not s.pending_delete), key=lambda service: service.id)
        if len(services) < self._services_max and (not services or self._chance.random() < 0.5):
            return self._create(store.services)
        draw = self._chance.random()
        if draw < 0.15:
            return self._node(store)
        service = copy_of(self._chance.choice(services))
        if draw < 0.3:
            service.pending_delete = True
            return f"remove {service.id}", Update(service)
        return self._change(store, service)

    def _create(self, services: Iterable[Service]) -> tuple[str, Change]:
        chance = self._chance
        self._made += 1
        service = Service(id=f"s{self._made:04}", spec_version=1)
        spec = service.spec
        spec.annotations.name = service.id
        spec.task.container.image = "image:1"
        spec.task.restart.delay_s = chance.choice((0.0, 1.0, 5.0))
        if (draw := chance.random()) < 0.2:
            getattr(spec, "global").SetInParent()
        elif draw < 0.3:
            spec.replicated_job.total_completions = chance.randint(0, REPLICAS_MAX)
            spec.replicated_job.max_concurrent = chance.randint(0, 4)
        elif draw < 0.35:
            spec.global_job.SetInParent()
        else:
            spec.replicated.replicas = chance.randint(0, REPLICAS_MAX)
            spec.max_unavailable = chance.randint(0, 3)
        for number in chance.sample(range(1, self._networks + 1), chance.randint(0, 2)):
            spec.task.networks.add(network_id=f"net{number}")
        if chance.random() < 0.4:
            spec.task.resources.reservations.nano_cpus = chance.choice((10**7, 10**8))
        if chance.random() < 0.5 and not any(each.spec.task.resources.reservations.generic for each in services):
            spec.task.resources.reservations.generic.add(kind="gpu", count=1)  # one service at a time: all find room
        if chance.random() < 0.3:
            spec.endpoint.ports.add(target_port=80, published_port=8000 + self._made)
        if states.is_job(spec):
            return f"create job {service.id}", Create(service)
        is_global = spec.WhichOneof("mode") == "global"
        for config in (spec.update, spec.rollback):
            config.parallelism = chance.choice((0, 1, 2, 4)) * (self._stride if is_global else 1)
            config.monitor_s = chance.choice((0.5, 5.0))
            config.order = chance.choice((pb.STOP_FIRST, pb.START_FIRST))
            config.failure_action = chance.choice((pb.PAUSE, pb.CONTINUE))
        spec.update.failure_action = chance.choice((pb.PAUSE, pb.CONTINUE, pb.ROLLBACK))
        return f"create {service.id}", Create(service)

    def _change(self, store: Store, service: Service) -> tuple[str, Change]:
        if service.spec.WhichOneof("mode") == "replicated" and self._chance.random() < 0.2:
            service.rebalance_moves = planned(store, service, schedule.fits)
            return f"rebalance {service.id}", Update(service)
        replicated = service.spec.WhichOneof("mode") in ("replicated", "replicated_job")
        if replicated and self._chance.random() < 0.5:
            replicas = self._chance.randint(0, REPLICAS_MAX)
            return self._respecify(store, service, f"scale to {replicas}", lambda spec: _scale(spec, replicas))
        image = f"image:{self._chance.randint(1, 9)}"
        return self._respecify(store, service, f"update to {image}", lambda spec: _set_image(spec, image))

    @staticmethod
    def _respecify(
        store: Store, service: Service, what: str, change: Callable[[ServiceSpec], None]
    ) -> tuple[str, Change]:
        """As the control API does it: one level of rollback, a new spec version."""
        service.previous_spec.CopyFrom(service.spec)
        service.previous_spec_version = service.spec_version
        change(service.spec)
        service.spec_version = store.version + 1
        if states.is_job(service.spec):
            service.job_status.iteration += 1
        return f"{what}: {service.id}", Update(service)

    def _node(self, store: Store) -> tuple[str, Change]:
        node = copy_of(self._chance.choice(sorted(store.nodes, key=lambda each: each.id)))
        node.spec.availability = self._chance.choice((pb.ACTIVE, pb.ACTIVE, pb.PAUSED, pb.DRAINED))
        return f"{pb.Availability.Name(node.spec.availability)}: {node.id}", Update(node)


def _scale(spec: ServiceSpec, replicas: int) -> None:
    if states.is_job(spec):
        spec.replicated_job.total_completions = replicas
    else:
        spec.replicated.replicas = replicas


def _set_image(spec: ServiceSpec, image: str) -> None:
    spec.task.container.image = image
