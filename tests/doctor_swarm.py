"""A swarm of three hosts as managers have it in their store, and what its nodes answer to the doctor."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from proto import objects_pb2 as pb
from proto.control_pb2 import Diagnosis, DoctorReport
from proto.dispatch_pb2 import HostFacts, NetworkFacts, ProbeResult
from swarm.doctor.checks import Check, Kind
from swarm.doctor.evidence import evidence
from swarm.doctor.plan import plan
from swarm.doctor.rules import report
from swarm.store.store import Store

NODES = ("n1", "n2", "n3")
FULL_BYTES = 1500
Answer = Callable[[Check], ProbeResult | None]


def vtep(node_id: str) -> str:
    return f"192.0.2.{node_id[1:]}"


def a_node(node_id: str, state: int = pb.NodeStatus.READY) -> pb.Node:
    made = pb.Node(id=node_id, index=int(node_id[1:]), data_path_addr=vtep(node_id))
    made.description.hostname = node_id
    made.description.answers_through_ingress = True
    made.status.state = pb.NodeStatus.State.ValueType(state)
    return made


def a_network(network_id: str, third: int, ingress: bool = False) -> pb.Network:
    made = pb.Network(id=network_id, vni=4096 + third, ipam=pb.IpamConfig(subnet=f"10.0.{third}.0/24"))
    made.spec.annotations.name = network_id
    made.spec.ingress = ingress
    return made


def a_service(name: str = "web", network: str = "net", *ports: tuple[int, int]) -> pb.Service:
    """`ports`: (published, target)"""
    made = pb.Service(id=name)
    made.spec.annotations.name = name
    made.spec.replicated.replicas = 3
    if network:
        made.spec.task.networks.add(network_id=network)
        made.endpoint.virtual_ips.add(network_id=network, address="10.0.1.2/24")
    for published, target in ports:
        made.endpoint.spec.ports.add(published_port=published, target_port=target)
    return made


def a_task(service: str, slot: int, node_id: str, network: str = "net", state: int = pb.TASK_RUNNING) -> pb.Task:
    made = pb.Task(id=f"{service}{slot}", service_id=service, slot=slot, node_id=node_id)
    made.service_annotations.name = service
    made.status.state = pb.TaskState.ValueType(state)
    made.desired_state = pb.TASK_RUNNING
    made.networks.add(network_id=network, address=f"10.0.1.{10 + slot}/24")
    return made


Record = pb.Node | pb.Network | pb.Service | pb.Task


def a_swarm(*more: Record, state_of_n3: int = pb.NodeStatus.READY) -> Store:
    """`web` on `net`, a task on each node, published at 8000."""
    nodes = [a_node("n1"), a_node("n2"), a_node("n3", state_of_n3)]
    tasks = [a_task("web", number, node_id) for number, node_id in enumerate(NODES, 1)]
    networks = [a_network("net", 1), a_network("ingress", 255, ingress=True)]
    return Store.of(*nodes, *networks, a_service("web", "net", (8000, 80)), *tasks, *more)


def good_facts(known: Iterable[str] = ("10.0.1.11", "10.0.1.12", "10.0.1.13")) -> HostFacts:
    return HostFacts(
        networks=[NetworkFacts(network_id="net", mtu_bytes=FULL_BYTES - 50, endpoints=known)],
        forwards=True,
        names_pid=77,
        underlay_link="eth0",
        underlay_mtu_bytes=1500,
    )


def good_result(check: Check) -> ProbeResult:
    if check.kind in (Kind.PATH, Kind.FULL):
        return ProbeResult(sizes=[84, FULL_BYTES], full_size=FULL_BYTES)
    return ProbeResult(answers=sorted(check.expected)) if check.kind is Kind.NAMES else ProbeResult()


def examined(
    store: Store,
    differs: Answer = lambda check: None,
    facts: dict[str, HostFacts] | None = None,
    silent: dict[str, str] | None = None,
    later: Store | None = None,
) -> DoctorReport:
    """What the doctor says when all is well but what `differs` answers (None: as it should), `facts` and `silent`."""
    before, away = plan(store), silent or {}
    results = {
        check: differs(check) or good_result(check)
        for check in before.checks
        if check.node_id not in away and check.kind is not Kind.HOST
    }
    told = {node.id: (facts or {}).get(node.id, good_facts()) for node in store.nodes if node.id not in away}
    return report(evidence(before, plan(later or store), results, told, away))


def broken(found: DoctorReport) -> list[Diagnosis]:
    return [each for each in found.diagnoses if each.severity == Diagnosis.BROKEN]


def the_one(found: DoctorReport) -> Diagnosis:
    [only] = broken(found)
    return only
