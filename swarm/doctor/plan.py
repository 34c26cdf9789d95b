"""Which checks follow from the state that managers share, for one service or for the whole swarm (pure).

Every check is one attempt of one node; what it should give is known beforehand, so that results can be judged
without looking at the state again. Numbers are bounded: a node of a large swarm checks some of the others, not all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from proto.objects_pb2 import (
    DNSRR,
    INGRESS,
    TASK_RUNNING,
    Network,
    NetworkAttachment,
    Node,
    PortConfig,
    Service,
    Task,
    VirtualIP,
)
from swarm.dispatch.items import ingress_network_of, is_down, is_live, predefined_network
from swarm.doctor.checks import Check, Kind, Plan
from swarm.store import drivers
from swarm.store.states import is_runnable
from swarm.store.store import Store

NODES_MAX = 100
"""Examined at once: planning more would keep the leader from its work for more than a second."""
PEERS_MAX, PEERS_EACH_MAX = 20, 10
"""Other nodes that each node checks for one service, and for each of all."""
BACKENDS_MAX, BACKENDS_EACH_MAX = 20, 5
"""Tasks of a service that each node connects to, likewise; what ails fifty ails the first five."""
NODES_TIMES_SERVICES = 1_000
"""Examined when no service is named; of large swarms at least SERVICES_MIN services."""
SERVICES_MIN = 5
PROBES_MAX = 500
"""Of one node: about 20 s when all of them fail (node/doctor.py). Every kind has its share of them."""
CLOSED_PORT = 9
"""discard: whether it answers or refuses, TCP comes through."""


def plan(store: Store, service: Service | None = None) -> Plan:
    """All checks of the swarm, or those that concern one service."""
    return _Planner(store, service).plan()


class _Planner:
    def __init__(self, store: Store, service: Service | None) -> None:
        self._store = store
        everyone = sorted(store.services, key=lambda each: each.spec.annotations.name)
        using = {task.node_id for task in store.tasks.where("service", service.id)} if service is not None else set()
        nodes = sorted(store.nodes, key=lambda each: (each.id not in using, *_node_order(each)))[:NODES_MAX]
        self._nodes = {node.id: node for node in sorted(nodes, key=_node_order)}
        some = everyone[: max(SERVICES_MIN, NODES_TIMES_SERVICES // max(1, len(nodes)))]
        self._services = [service] if service is not None else some
        self._services_left_out = len(everyone) - len(some) if service is None else 0
        self._peers_max = PEERS_MAX if service is not None else PEERS_EACH_MAX
        self._backends_max = BACKENDS_MAX if service is not None else BACKENDS_EACH_MAX
        self._predefined = predefined_network(store)
        self._ingress_of = {each.id: ingress_network_of(store, each) for each in everyone}
        self._published_on = {each for each in self._ingress_of.values() if each}
        used = {config.network_id for each in self._services for config in each.spec.task.networks}
        used |= {self._ingress_of[each.id] for each in self._services}
        self._networks = {each.id: each for each in store.networks if each.vni and each.id in used}
        self._lans = {
            each.id: each for each in store.networks if each.id in used and drivers.driver_of(each) == drivers.MACVLAN
        }
        """Nothing is tried on them, but tasks that are on other networks as well are told names of theirs."""
        self._tasks = [task for task in sorted(store.tasks, key=lambda each: each.id) if self._runs(task)]
        self._serving: dict[tuple[str, str], list[Task]] = defaultdict(list)
        """(service, network) -> its tasks there that others can reach."""
        self._clients: dict[str, dict[str, Task]] = defaultdict(dict)
        """Network -> node -> a task of it there, from which to try; of the service in question, if there is one."""
        for task in self._tasks:
            for attachment in task.networks:
                if attachment.network_id in self._lans:
                    self._serving[task.service_id, attachment.network_id].append(task)
                if attachment.address and self._reached(task, attachment.network_id):
                    self._serving[task.service_id, attachment.network_id].append(task)
                    if task.node_id not in self._nodes:
                        continue
                    here = self._clients[attachment.network_id].setdefault(task.node_id, task)
                    if service is not None and task.service_id == service.id != here.service_id:
                        self._clients[attachment.network_id][task.node_id] = task
        self._concerned = self._concerned_nodes(service)
        self._up = [node_id for node_id in self._concerned if not is_down(self._nodes[node_id])]

    def _runs(self, task: Task) -> bool:
        """It runs, is wanted, and its node is not down: it should be in every balancer."""
        return (
            task.status.state == TASK_RUNNING and is_runnable(task) and not is_down(self._store.nodes.get(task.node_id))
        )

    def _reached(self, task: Task, network_id: str) -> bool:
        """On the predefined network others are told of tasks that receive published traffic there only."""
        return network_id in self._networks and (
            network_id != self._predefined or self._ingress_of.get(task.service_id) == network_id
        )

    def _concerned_nodes(self, service: Service | None) -> list[str]:
        if service is None or any(port.mode == INGRESS for port in service.endpoint.spec.ports):
            return list(self._nodes)
        using = {node_id for clients in self._clients.values() for node_id in clients}
        using |= {task.node_id for task in self._tasks if task.service_id == service.id}
        return [node_id for node_id in self._nodes if node_id in using]

    def plan(self) -> Plan:
        checks: dict[Check, None] = {}
        for part in (self._hosts, self._underlay, self._overlay, self._egress, self._names, self._ports):
            checks |= dict.fromkeys(part())
        kept, left_out = _bounded(checks)
        return Plan(
            checks=tuple(kept),
            left_out=left_out,
            services_left_out=self._services_left_out,
            nodes_left_out=len(self._store.nodes) - len(self._nodes),
            names=self._called(),
            endpoints=self._endpoints(),
            unserved=frozenset(each.id for each in self._services if self._is_unserved(each)),
            masquerading=frozenset(self._masquerading()),
        )

    # ---- between hosts

    def _hosts(self) -> Iterator[Check]:
        return (Check(Kind.HOST, node_id) for node_id in self._concerned)

    def _pairs(self, node_ids: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(from, to): each to the next few of the others, so that all are reached equally often."""
        usable = [node_id for node_id in node_ids if self._nodes[node_id].data_path_addr]
        for place, node_id in enumerate(usable):
            if not is_down(self._nodes[node_id]):
                for peer_id in (usable[place + 1 :] + usable[:place])[: self._peers_max]:
                    yield node_id, peer_id

    def _using(self, network_id: str) -> list[str]:
        if network_id in self._published_on:
            return list(self._nodes)
        return [node_id for node_id in self._nodes if node_id in self._clients[network_id]]

    def _underlay(self) -> Iterator[Check]:
        for node_id, peer_id in self._pairs(self._concerned):
            yield Check(Kind.UNDERLAY, node_id, peer_id=peer_id, address=self._nodes[peer_id].data_path_addr)
        for network_id in self._networks:
            for node_id, peer_id in self._pairs(self._using(network_id)):
                yield Check(Kind.PATH, node_id, peer_id=peer_id, address=self._nodes[peer_id].data_path_addr)

    def _overlay(self) -> Iterator[Check]:
        for network_id in self._networks:
            clients = self._clients[network_id]
            for node_id, peer_id in self._pairs([each for each in self._nodes if each in clients]):
                backend = clients[peer_id]
                for address in _addresses(backend, network_id):
                    for kind in (Kind.OVERLAY, Kind.FULL, Kind.TCP):
                        yield Check(
                            kind,
                            node_id,
                            clients[node_id].id,
                            peer_id,
                            network_id,
                            backend_id=backend.id,
                            address=address,
                            port=CLOSED_PORT if kind is Kind.TCP else 0,
                        )

    def _egress(self) -> Iterator[Check]:
        outside = [key for key, network in self._networks.items() if not network.spec.internal]
        for node_id, peer_id in self._pairs(self._concerned):
            for network_id in outside:
                client = self._clients[network_id].get(node_id)
                if client is not None and not is_down(self._nodes[peer_id]):
                    address = self._nodes[peer_id].data_path_addr
                    yield Check(Kind.EGRESS, node_id, client.id, peer_id, network_id, address=address)
                    break

    # ---- services

    def _names(self) -> Iterator[Check]:
        named = {**self._networks, **self._lans}
        known = {key: self._names_on(network) for key, network in named.items() if not network.spec.ingress}
        for service in self._services:
            for config in service.spec.task.networks:
                for node_id, client in self._clients[config.network_id].items() if config.network_id in known else ():
                    seen = [known[each.network_id] for each in client.networks if each.network_id in known]
                    for name in (service.spec.annotations.name, f"tasks.{service.spec.annotations.name}"):
                        answer = next(names[name] for names in seen if name in names)
                        six = frozenset(address for address in answer if ":" in address)
                        for ipv6, expected in ((False, answer - six), (True, six)):
                            if expected or not ipv6:
                                yield Check(
                                    Kind.NAMES,
                                    node_id,
                                    client.id,
                                    network_id=config.network_id,
                                    service_id=service.id,
                                    name=name,
                                    expected=expected,
                                    ipv6=ipv6,
                                )

    def _names_on(self, network: Network) -> dict[str, frozenset[str]]:
        """Names of services -> addresses; two services that share one share its answer."""
        found: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
        for service in self._store.services:
            config = next((each for each in service.spec.task.networks if each.network_id == network.id), None)
            if config is None:
                continue
            vips = [vip for vip in service.endpoint.virtual_ips if vip.network_id == network.id]
            serving = self._serving[service.id, network.id]
            tasks = frozenset(address for task in serving for address in _addresses(task, network.id))
            balanced = frozenset(address for vip in vips for address in _families(vip))
            answer = tasks if service.spec.endpoint.mode == DNSRR or not vips else balanced
            for name in {service.spec.annotations.name, *config.aliases}:
                found[name] |= answer
                found[f"tasks.{name}"] |= tasks
        return found

    def _ports(self) -> Iterator[Check]:
        for service in self._services:
            for port in service.endpoint.spec.ports:
                yield from self._backends(service, port)
                if port.published_port:
                    yield from self._published(service, port)
                for vip in service.endpoint.virtual_ips if port.mode == INGRESS else ():
                    for address in _families(vip):
                        yield from self._vip(service, port, vip.network_id, address)

    def _backends(self, service: Service, port: PortConfig) -> Iterator[Check]:
        """From every host that balances to them; what listens in host mode, from its own."""
        network_id = self._ingress_of.get(service.id, "") or self._first_network(service)
        network = self._networks.get(network_id)
        if network is None or network.spec.internal:
            return
        tasks = self._serving[service.id, network_id]
        for node_id in self._up:
            near = [task for task in tasks if task.node_id == node_id]
            far = [task for task in tasks if task.node_id != node_id] if port.mode == INGRESS else []
            for task in [*near, *far][: self._backends_max]:
                for address in _addresses(task, network_id):
                    yield Check(
                        Kind.BACKEND,
                        node_id,
                        peer_id=task.node_id,
                        network_id=network_id,
                        service_id=service.id,
                        backend_id=task.id,
                        address=address,
                        port=port.target_port,
                        protocol=port.protocol,
                    )

    def _first_network(self, service: Service) -> str:
        """Where ports in host mode lead to."""
        task = next((task for task in self._tasks if task.service_id == service.id), Task())
        networks = [self._networks.get(each.network_id) for each in task.networks]
        return next((each.id for each in networks if each is not None and not each.spec.internal), "")

    def _vip(self, service: Service, port: PortConfig, network_id: str, address: str) -> Iterator[Check]:
        if network_id not in self._networks or not self._serving[service.id, network_id]:
            return
        for node_id, client in self._clients[network_id].items():
            yield Check(
                Kind.VIP,
                node_id,
                client.id,
                network_id=network_id,
                service_id=service.id,
                address=address,
                port=port.target_port,
                protocol=port.protocol,
            )

    def _published(self, service: Service, port: PortConfig) -> Iterator[Check]:
        mine = {task.node_id for task in self._tasks if task.service_id == service.id}
        targets = {node_id for node_id in self._up if port.mode == INGRESS or node_id in mine} if mine else set()
        for node_id, peer_id in [*self._pairs(self._up), *((each, each) for each in sorted(targets))]:
            address = self._published_at(port, self._nodes[peer_id])
            if peer_id in targets and address:
                yield Check(
                    Kind.PUBLISHED,
                    node_id,
                    peer_id=peer_id,
                    service_id=service.id,
                    address=address,
                    port=port.published_port,
                    protocol=port.protocol,
                )

    @staticmethod
    def _published_at(port: PortConfig, node: Node) -> str:
        """An address of the node that takes connections to the port, "" = none of its own does."""
        if port.host_ip:
            own = {_bare(subnet) for subnet in node.description.underlay_subnets}
            return port.host_ip if port.host_ip in own else ""
        return node.data_path_addr

    # ---- facts to compare with

    def _endpoints(self) -> dict[tuple[str, str], frozenset[str]]:
        everyone: defaultdict[str, set[str]] = defaultdict(set)
        own: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for task in self._store.tasks:
            for attachment in task.networks if is_live(task) else ():
                network_id = attachment.network_id
                own[task.node_id, network_id].add(_bare(attachment.address))
                if self._reached(task, network_id):
                    everyone[network_id].add(_bare(attachment.address))
        return {
            (node_id, network_id): frozenset(everyone[network_id] | own[node_id, network_id])
            for network_id in self._networks
            for node_id in self._using(network_id)
        }

    def _is_unserved(self, service: Service) -> bool:
        if not service.endpoint.spec.ports or service.pending_delete:
            return False
        tasks = list(self._store.tasks.where("service", service.id))
        return any(is_runnable(task) for task in tasks) and not any(self._runs(task) for task in tasks)

    def _masquerading(self) -> Iterator[str]:
        published = {each.id for each in self._services if self._ingress_of.get(each.id)}
        for task in self._tasks:
            node = self._nodes.get(task.node_id)
            if task.service_id in published and node and not node.description.answers_through_ingress:
                yield node.id

    def _called(self) -> dict[str, str]:
        names = {node.id: node.description.hostname or node.id for node in self._store.nodes}
        names |= {network.id: network.spec.annotations.name for network in self._store.networks}
        names |= {each.id: each.spec.annotations.name for each in self._store.services}
        for task in self._tasks:
            place = str(task.slot) if task.slot else names.get(task.node_id, task.node_id)
            names[task.id] = f"{task.service_annotations.name}.{place}"
        return names


def _bounded(checks: Iterable[Check]) -> tuple[list[Check], int]:
    """(what is tried, how many are not): of each node PROBES_MAX, the first ones of every kind before more of one."""
    kinds = {kind: place for place, kind in enumerate(Kind)}
    counts: Counter[tuple[str, Kind]] = Counter()
    by_node: defaultdict[str, list[tuple[int, int, Check]]] = defaultdict(list)
    for check in checks:
        counts[check.node_id, check.kind] += 1
        by_node[check.node_id].append((counts[check.node_id, check.kind], kinds[check.kind], check))
    kept: list[Check] = []
    for ranked in by_node.values():
        ranked.sort(key=lambda each: each[:2])
        kept += [check for _, _, check in ranked[:PROBES_MAX]]
    return kept, counts.total() - len(kept)


def _node_order(node: Node) -> tuple[str, str]:
    return node.description.hostname, node.id


def _bare(address: str) -> str:
    return address.partition("/")[0]


def _families(has: NetworkAttachment | VirtualIP) -> list[str]:
    """The IPv4 address, and the IPv6 one if there is one."""
    return [_bare(address) for address in (has.address, has.address6) if address]


def _addresses(task: Task, network_id: str) -> list[str]:
    return next(_families(each) for each in task.networks if each.network_id == network_id)
