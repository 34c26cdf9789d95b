"""Assignments: whatever happens, a node that applies the deltas holds what a fresh look at the store says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proto import objects_pb2 as pb
from proto import store_pb2
from proto.dispatch_pb2 import Assignments, Item
from proto.objects_pb2 import Network, Node, NodeStatus, PortConfig, Service, Task
from swarm.dispatch import items
from swarm.dispatch.assignments import AssignmentIndex, View
from swarm.store.changes import Change, Create, Remove, Update, transaction
from swarm.store.store import Event, Store

NODES = ("n1", "n2", "n3")
NETWORKS = ("ingress", "front", "back", "host")
SERVICES = ("web", "db")
TASKS = tuple(f"t{number}" for number in range(6))
STATES = (pb.TASK_PENDING, pb.TASK_ASSIGNED, pb.TASK_STARTING, pb.TASK_RUNNING, pb.TASK_FAILED, pb.TASK_SHUTDOWN)


class Mirror:
    """An agent's side: checks the chain, and applies."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        self.sequence: int | None = None

    def take(self, message: Assignments) -> None:
        if message.snapshot:
            self.items.clear()
        else:
            assert message.base == self.sequence
        self.sequence = message.result
        for change in message.changes:
            if change.HasField("item"):
                self.items[change.key] = change.item
            else:
                del self.items[change.key]  # only what the node has is ever removed


def expected(store: Store, node_id: str) -> dict[str, Item]:
    """By brute force, straight from the rules: the oracle."""
    used = {leg.network_id for t in store.tasks if t.node_id == node_id and items.is_live(t) for leg in t.networks}
    used |= {network.id for network in store.networks if network.spec.driver == "host"}
    used |= {items.ingress_network_of(store, service) for service in store.services} - {""}
    found: dict[str, Item] = {}
    for task in store.tasks:
        if task.node_id == node_id and task.status.state >= pb.TASK_ASSIGNED:
            found[f"task/{task.id}"] = Item(task=items.for_agent(task))
        if items.is_live(task):
            owner = store.nodes.get(task.node_id)
            down = owner is not None and owner.status.state == NodeStatus.DOWN
            for key, scoped in items.task_items(task, down, weight=weight(store, task)).items():
                if key.startswith("endpoint/") and is_told(store, task, scoped.item, node_id, used):
                    found[key] = scoped.item
    for network_id in used:
        network = store.networks.get(network_id)
        if network is not None and (network.vni or network.spec.driver == "host"):
            copy = Network()
            copy.CopyFrom(network)
            copy.ClearField("meta")
            found[f"network/{network_id}"] = Item(network=copy)
    used.discard("host")
    for service in store.services:
        on = {config.network_id for config in service.spec.task.networks}
        if on & used or items.ingress_network_of(store, service):
            found[f"service/{service.id}"] = items.service_item(store, service).item
    for node in store.nodes:
        peer = items.peer_item(node, ())
        if node.id != node_id and peer is not None and spoken_on(store, node.id) & used:
            found[f"peer/{node.id}"] = peer.item
    return found


def weight(store: Store, task: Task) -> int:
    service, node = store.services.get(task.service_id), store.nodes.get(task.node_id)
    if service is None or node is None or service.endpoint.spec.weight_label != "node.labels.size":
        return 1
    return {"5": 5, "500": 100}.get(node.spec.annotations.labels.get("size", ""), 1)


def is_told(store: Store, task: Task, item: Item, node_id: str, used: set[str]) -> bool:
    """Endpoints on the predefined network reach other nodes only while their service is published there."""
    network_id = item.endpoint.network_id
    if network_id != "ingress" or "ingress" not in store.networks or task.node_id == node_id:
        return network_id in used
    service = store.services.get(task.service_id)
    return service is not None and items.ingress_network_of(store, service) == "ingress"


def spoken_on(store: Store, node_id: str) -> set[str]:
    """The networks on which this node and others send each other anything."""
    tasks = (task for task in store.tasks if task.node_id == node_id and items.is_live(task))
    own = {attachment.network_id for task in tasks for attachment in task.networks if attachment.address}
    published = {items.ingress_network_of(store, service) for service in store.services} - {""}
    return (own - {"ingress"} if "ingress" in store.networks else own) | published


def make_task(task_id: str, node_id: str, service_id: str, state: int, networks: frozenset[str]) -> Task:
    task = Task(id=task_id, service_id=service_id, node_id=node_id, slot=1, desired_state=pb.TASK_RUNNING)
    task.service_annotations.name = service_id
    task.status.state = pb.TaskState.ValueType(state)
    for network_id in sorted(networks):
        address = f"10.0.{NETWORKS.index(network_id)}.{ord(task_id[1])}/24" if network_id != "host" else ""
        task.networks.add(network_id=network_id, address=address)
    return task


def make_network(network_id: str, internal: bool = False) -> Network:
    network = Network(id=network_id, vni=4096 + NETWORKS.index(network_id))
    network.spec.annotations.name = network_id
    network.spec.internal = internal
    network.spec.ingress = network_id == "ingress"
    if network_id == "host":
        network.spec.driver, network.vni = "host", 0
    return network


def make_service(service_id: str, networks: frozenset[str], published: bool, weighed: bool = False) -> Service:
    service = Service(id=service_id)
    service.spec.annotations.name = service_id
    for network_id in sorted(networks):
        service.spec.task.networks.add(network_id=network_id)
        service.endpoint.virtual_ips.add(network_id=network_id, address="10.0.9.2/24")
    if published:
        service.endpoint.spec.ports.append(PortConfig(target_port=80, published_port=8000))
    service.endpoint.spec.weight_label = "node.labels.size" if weighed else ""
    return service


def make_node(node_id: str) -> Node:
    node = Node(id=node_id, index=1 + NODES.index(node_id), data_path_addr=f"192.168.0.{node_id[1]}")
    node.status.state = NodeStatus.READY
    return node


class Cluster:
    """A store with an index that follows it, and the mirrors of connected nodes."""

    def __init__(self) -> None:
        self.store = Store()
        self.index = AssignmentIndex(self.store)
        self.store.subscribe(self._follow)
        self.views: dict[str, View] = {}
        self.mirrors: dict[str, Mirror] = {}

    def _follow(self, events: Sequence[Event]) -> None:
        self.index.apply(events)

    def apply(self, *changes: Change) -> None:
        entry = store_pb2.Entry(transactions=[transaction(changes, 1.0)])
        result = store_pb2.EntryResult.FromString(self.store.apply(entry.SerializeToString()))
        assert [verdict.code for verdict in result.verdicts] == [store_pb2.Verdict.OK]

    def put(self, record: pb.Task | pb.Node | pb.Service | pb.Network) -> None:
        table = {Task: self.store.tasks, Node: self.store.nodes, Service: self.store.services}.get(
            type(record), self.store.networks
        )
        existing = table.get(record.id)  # type: ignore[attr-defined]
        if existing is None:
            self.apply(Create(record))
        else:
            record.meta.CopyFrom(existing.meta)
            self.apply(Update(record))

    def drop(self, record: pb.Task | pb.Node | pb.Service | pb.Network | None) -> None:
        if record is not None:
            self.apply(Remove(record))

    def connect(self, node_id: str) -> None:
        self.views[node_id] = self.index.attach(node_id)
        self.mirrors[node_id] = Mirror()

    def flush(self, node_id: str) -> Assignments | None:
        message = self.views[node_id].take()
        if message is not None:
            self.mirrors[node_id].take(message)
        return message

    def check(self, node_id: str) -> None:
        self.flush(node_id)
        assert self.mirrors[node_id].items == expected(self.store, node_id)
        assert self.flush(node_id) is None, "nothing is said twice"


class AnyHistory(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.cluster = Cluster()
        for node_id in NODES:
            self.cluster.put(make_node(node_id))
        self.cluster.connect("n1")

    @rule(
        task_id=st.sampled_from(TASKS),
        owners=st.tuples(st.sampled_from(("", *NODES)), st.sampled_from(SERVICES)),
        state=st.sampled_from(STATES),
        networks=st.frozensets(st.sampled_from(NETWORKS), max_size=3),
        wanted=st.sampled_from((pb.TASK_RUNNING, pb.TASK_SHUTDOWN)),
    )
    def task(self, task_id: str, owners: tuple[str, str], state: int, networks: frozenset[str], wanted: int) -> None:
        task = make_task(task_id, *owners, state, networks)
        task.desired_state = pb.TaskState.ValueType(wanted)
        self.cluster.put(task)

    @rule(task_id=st.sampled_from(TASKS))
    def task_removed(self, task_id: str) -> None:
        self.cluster.drop(self.cluster.store.tasks.get(task_id))

    @rule(network_id=st.sampled_from(NETWORKS), internal=st.booleans())
    def network(self, network_id: str, internal: bool) -> None:
        if network_id not in self.cluster.store.networks:  # whether a network is internal never changes
            self.cluster.put(make_network(network_id, internal and network_id != "ingress"))

    @rule(network_id=st.sampled_from(NETWORKS))
    def network_removed(self, network_id: str) -> None:
        self.cluster.drop(self.cluster.store.networks.get(network_id))

    @rule(
        service_id=st.sampled_from(SERVICES),
        networks=st.frozensets(st.sampled_from(NETWORKS[1:]), max_size=2),
        published=st.booleans(),
        weighed=st.booleans(),
    )
    def service(self, service_id: str, networks: frozenset[str], published: bool, weighed: bool) -> None:
        self.cluster.put(make_service(service_id, networks, published, weighed))

    @rule(service_id=st.sampled_from(SERVICES))
    def service_removed(self, service_id: str) -> None:
        self.cluster.drop(self.cluster.store.services.get(service_id))

    @rule(
        node_id=st.sampled_from(NODES),
        state=st.sampled_from((NodeStatus.READY, NodeStatus.DOWN)),
        size=st.sampled_from(("", "5", "500", "-3", "many")),
    )
    def node(self, node_id: str, state: int, size: str) -> None:
        node = make_node(node_id)
        node.spec.annotations.labels["size"] = size
        node.status.state = NodeStatus.State.ValueType(state)
        self.cluster.put(node)

    @rule(node_id=st.sampled_from(NODES))
    def node_removed(self, node_id: str) -> None:
        self.cluster.drop(self.cluster.store.nodes.get(node_id))

    @rule(node_id=st.sampled_from(NODES))
    def reconnect(self, node_id: str) -> None:
        self.cluster.connect(node_id)

    @rule(node_id=st.sampled_from(NODES))
    def flushed_by_itself(self, node_id: str) -> None:
        """Some nodes get their deltas at other times than others."""
        if node_id in self.cluster.views:
            self.cluster.flush(node_id)

    @rule()
    def store_replaced(self) -> None:
        """A snapshot was installed: all is built anew."""
        self.cluster.store.load(list(self.cluster.store.dump()))

    @invariant()
    def the_first_node_is_up_to_date(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check("n1")

    def teardown(self) -> None:
        if hasattr(self, "cluster"):
            for node_id in self.cluster.views:
                self.cluster.check(node_id)


AnyHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestAnyHistory = AnyHistory.TestCase


def busy_cluster() -> Cluster:
    cluster = Cluster()
    for node_id in NODES:
        cluster.put(make_node(node_id))
    for network_id in NETWORKS:
        cluster.put(make_network(network_id))
    cluster.put(make_service("web", frozenset({"front"}), published=False))
    cluster.put(make_task("t1", "n1", "web", pb.TASK_RUNNING, frozenset({"front"})))
    cluster.put(make_task("t2", "n2", "web", pb.TASK_RUNNING, frozenset({"front"})))
    for node_id in NODES:
        cluster.connect(node_id)
        cluster.check(node_id)
    return cluster


def touched(cluster: Cluster, change: Callable[[], None]) -> set[str]:
    """The nodes that get a message because of the change."""
    change()
    return {node_id for node_id in NODES if cluster.flush(node_id) is not None}


def test_a_report_of_a_node_is_not_sent_back_to_it() -> None:
    cluster = busy_cluster()
    task = make_task("t3", "n1", "web", pb.TASK_ASSIGNED, frozenset({"front"}))
    assert touched(cluster, lambda: cluster.put(task)) == {"n1", "n2"}
    preparing = make_task("t3", "n1", "web", pb.TASK_STARTING, frozenset({"front"}))
    preparing.status.pid = 42
    assert touched(cluster, lambda: cluster.put(preparing)) == set()


def test_a_task_serves_only_while_it_runs_is_wanted_and_its_node_is_up() -> None:
    cluster = busy_cluster()
    key = "endpoint/front/t2"
    serving = [cluster.mirrors["n1"].items[key].endpoint.serving]
    stopping = make_task("t2", "n2", "web", pb.TASK_RUNNING, frozenset({"front"}))
    stopping.desired_state = pb.TASK_SHUTDOWN
    down = make_node("n2")
    down.status.state = NodeStatus.DOWN
    for record in (stopping, make_task("t2", "n2", "web", pb.TASK_RUNNING, frozenset({"front"})), down):
        cluster.put(record)
        cluster.flush("n1")
        serving.append(cluster.mirrors["n1"].items[key].endpoint.serving)
    assert serving == [True, False, True, False]


def test_a_network_is_known_only_where_it_is_used_until_a_port_is_published_on_it() -> None:
    cluster = busy_cluster()
    known = [key for key in cluster.mirrors["n3"].items if key.startswith(("network/", "endpoint/", "service/"))]
    assert known == [key for key in known if key == "network/host"]  # each node has one of its own
    cluster.put(make_service("web", frozenset({"front"}), published=True))
    cluster.check("n3")
    assert {"network/front", "endpoint/front/t1", "endpoint/front/t2", "service/web"} <= set(
        cluster.mirrors["n3"].items
    )
    assert cluster.mirrors["n3"].items["service/web"].service.ingress_network_id == "front"


def test_published_ports_of_a_service_on_internal_networks_go_through_the_ingress_network() -> None:
    cluster = busy_cluster()
    cluster.drop(cluster.store.networks.get("back"))
    cluster.put(make_network("back", internal=True))
    cluster.put(make_service("db", frozenset({"back"}), published=True))
    cluster.check("n3")
    assert cluster.mirrors["n3"].items["service/db"].service.ingress_network_id == "ingress"


def test_credentials_reach_only_the_node_of_the_task() -> None:
    cluster = busy_cluster()
    task = make_task("t4", "n1", "web", pb.TASK_ASSIGNED, frozenset({"front"}))
    task.spec.container.registry_auth = "c2VjcmV0"
    cluster.put(task)
    message = cluster.flush("n1")
    assert message is not None
    assert b"c2VjcmV0" in message.SerializeToString()
    other = cluster.flush("n2")
    assert other is not None
    assert b"c2VjcmV0" not in other.SerializeToString()


def test_a_slow_node_gets_the_latest_state_once() -> None:
    cluster = busy_cluster()
    for state in (pb.TASK_ASSIGNED, pb.TASK_STARTING, pb.TASK_RUNNING):
        cluster.put(make_task("t5", "n2", "web", state, frozenset({"front"})))
    message = cluster.flush("n1")
    assert message is not None
    assert [change.key for change in message.changes] == ["endpoint/front/t5"]
    assert message.changes[0].item.endpoint.serving


def released_cluster() -> tuple[Cluster, Task]:
    cluster = Cluster()
    front = frozenset({"front"})
    for node in NODES:
        cluster.put(make_node(node))
    cluster.put(make_network("front"))
    cluster.put(make_service("web", front, published=False))
    for number, node in enumerate(NODES[:2]):
        cluster.put(make_task(f"t{number}", node, "web", pb.TASK_RUNNING, front))
    for node in NODES:
        cluster.connect(node)
        cluster.flush(node)
    task = cluster.store.tasks.get("t0")
    assert task is not None
    stopping = Task()
    stopping.CopyFrom(task)
    stopping.desired_state = pb.TASK_SHUTDOWN
    return cluster, stopping


def test_a_task_is_released_when_the_last_node_that_served_it_has_confirmed() -> None:
    cluster, stopping = released_cluster()
    cluster.put(stopping)
    messages = {node: cluster.views[node].take() for node in ("n1", "n2")}
    assert all(message is not None and message.confirm for message in messages.values())
    assert cluster.views["n3"].take() is None, "not on the network: nothing to confirm"
    assert cluster.index.releases.take() == {}
    for node, released in (("n2", {}), ("n1", {"n1": ["t0"]})):
        message = messages[node]
        assert message is not None
        view = cluster.views[node]
        assert view.confirmed(message.result - 1) == []
        cluster.index.releases.confirmed(node, view.confirmed(message.result))
        assert cluster.index.releases.take() == released


def test_a_node_whose_session_ends_is_not_waited_for() -> None:
    cluster, stopping = released_cluster()
    cluster.put(stopping)
    message = cluster.views["n1"].take()
    assert message is not None
    cluster.index.releases.confirmed("n1", cluster.views["n1"].confirmed(message.result))
    assert cluster.index.releases.take() == {}
    cluster.index.detach(cluster.views["n2"])
    assert cluster.index.releases.take() == {"n1": ["t0"]}


def test_a_task_that_served_nobody_is_released_at_once_and_an_ended_one_needs_no_release() -> None:
    cluster, stopping = released_cluster()
    starting = make_task("t2", "n1", "web", pb.TASK_STARTING, frozenset({"front"}))
    cluster.put(starting)
    starting.desired_state = pb.TASK_SHUTDOWN
    cluster.put(starting)
    assert cluster.index.releases.take() == {"n1": ["t2"]}
    cluster.put(stopping)
    stopping.status.state = pb.TASK_SHUTDOWN
    cluster.put(stopping)
    for node in ("n1", "n2"):
        cluster.views[node].take()
        cluster.index.releases.confirmed(node, cluster.views[node].confirmed(1000))
    assert cluster.index.releases.take() == {}


def test_a_node_whose_tasks_cannot_answer_through_others_is_told_as_one_to_masquerade_for() -> None:
    node = make_node("n1")
    assert items.peer_item(node, ()).item.peer.masquerade  # type: ignore[union-attr]
    node.description.answers_through_ingress = True
    assert not items.peer_item(node, ()).item.peer.masquerade  # type: ignore[union-attr]


def test_endpoints_carry_both_addresses_and_services_their_balance() -> None:
    store = Store.of(make_network("front"))
    task = make_task("t1", "n1", "web", pb.TASK_RUNNING, frozenset({"front"}))
    task.networks[0].address6 = "fd00::3/64"
    (endpoint,) = (each.item.endpoint for key, each in items.task_items(task, False).items() if "endpoint" in key)
    assert (endpoint.address, endpoint.address6, endpoint.weight) == ("10.0.1.49", "fd00::3", 1)
    service = make_service("web", frozenset({"front"}), published=False)
    service.endpoint.spec.balance = pb.SOURCE_HASH
    assert items.service_item(store, service).item.service.balance == pb.SOURCE_HASH
