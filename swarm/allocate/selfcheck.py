"""The check with which a leader begins: is anything held twice, or by an object that must not hold it?

An allocation is a part of the object that holds it, so there is nothing to leak: what was freed is free. Twice the
same can come only from a fault (of an older version, or of a state that was put together by hand). Then the older
object keeps it and the younger one gets another: at once where that disturbs nobody, else it is only told, as its
`allocation_error`, and by that as an event."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from proto import objects_pb2 as pb
from proto.objects_pb2 import Network, NetworkAttachment, Service, Task, VirtualIP
from swarm.allocate import ports, subnets
from swarm.allocate.addresses import span_of
from swarm.store import drivers, states
from swarm.store.changes import Change, Group, Remove, Update, copy_of
from swarm.store.released import as_number
from swarm.store.store import Store

Finding = tuple[Change | None, str]
"""What to store, and what was wrong."""
T = TypeVar("T", Network, Service, Task)


@dataclass(frozen=True, slots=True)
class Found:
    repairs: tuple[Group, ...] = ()
    notes: tuple[str, ...] = ()


def check(store: Store) -> Found:
    """Costs one look at every object. What it returns, once stored, is not found again."""
    found = [*_networks(store), *_ports(store), *_addresses(store)]
    return Found(
        tuple((change,) for change, _ in found if change is not None), tuple(problem for _, problem in found if problem)
    )


def _oldest_first(records: Iterable[T]) -> list[T]:
    return sorted(records, key=lambda record: (record.meta.created_at, record.id))


# ---------------------------------------------------------------- networks


def _networks(store: Store) -> Iterator[Finding]:
    """A network that nobody uses is allocated anew; one in use keeps what it has, and says what is wrong with it."""
    vnis: dict[int, Network] = {}
    taken: list[subnets.Taken] = []
    used = {config.network_id for service in store.services for config in service.spec.task.networks}
    for network in _oldest_first(net for net in store.networks if drivers.is_ready(net) and not drivers.is_local(net)):
        name, problem = network.spec.annotations.name, ""
        if network.vni and network.vni in vnis:
            problem = f"VNI {network.vni} is also network {vnis[network.vni].spec.annotations.name}'s"
        own = list(subnets.subnets_of(network))
        for each in own:
            if (other := subnets.overlap(each.net, taken)) is not None:
                problem = f"subnet {each.net} overlaps {other.net} of {other.owner}"
        changed: Network = copy_of(network)
        if problem and network.id not in used and not store.tasks.count("network", network.id):
            for field in ("vni", "ipam", "ipam6"):
                changed.ClearField(field)
            yield Update(changed), f"network {name}: {problem}: allocated anew"
            continue
        vnis.setdefault(network.vni, network)
        taken.extend(own)
        changed.allocation_error = f"{problem}: remove the services of one of them, and create it anew" * bool(problem)
        yield (Update(changed) if changed != network else None), f"network {name}: {problem}" * bool(problem)


# ---------------------------------------------------------------- published ports


def _ports(store: Store) -> Iterator[Finding]:
    """Of two services that were given one port the younger loses its endpoint: it gets another number if it left that
    open, else an error."""
    seen = ports.PortMap(())
    for service in _oldest_first(store.services):
        given = service.endpoint.spec.ports
        problem = next((why for port in given if (why := seen.conflict(port, service.id))), "")
        if not problem:
            seen.add(service, given)
            continue
        changed: Service = copy_of(service)
        changed.endpoint.ClearField("spec")
        yield Update(changed), f"service {service.spec.annotations.name}: {problem}: allocated anew"


# ---------------------------------------------------------------- addresses


class _Holders:
    """Who holds which address, in the order in which they are asked about."""

    def __init__(self, store: Store) -> None:
        self._spans = {net.id: span_of(store, net) for net in store.networks if net.ipam.subnet}
        self._names: dict[tuple[str, int], str] = {}

    def refusal(self, name: str, leg: VirtualIP | NetworkAttachment) -> str:
        """Why nobody of this name may hold the address, or "": then it is his."""
        span = self._spans.get(leg.network_id)
        if span is None or not leg.address:
            return ""  # no address was given; or the network is gone, and what was on it goes as well
        number = as_number(leg.address)
        holder = self._names.get((leg.network_id, number))
        if holder is not None:
            return f"address {leg.address} is also {holder}'s"
        if not span.holds(number) or (span.prefix6 and leg.address6 != span.texts(number)[1]):
            return f"address {leg.address} {leg.address6}".strip() + f" is none that {span.subnet} has to give"
        self._names[leg.network_id, number] = name
        return ""


def _addresses(store: Store) -> Iterator[Finding]:
    """Virtual IPs are given anew; so are addresses of tasks, with another task."""
    holders = _Holders(store)
    for service in _oldest_first(store.services):
        name = f"service {service.spec.annotations.name}"
        vips = [(vip, holders.refusal(name, vip)) for vip in service.endpoint.virtual_ips]
        if problems := [why for _, why in vips if why]:
            changed: Service = copy_of(service)
            del changed.endpoint.virtual_ips[:]
            changed.endpoint.virtual_ips.extend(vip for vip, why in vips if not why)
            yield Update(changed), f"{name}: {'; '.join(problems)}: given another"
    for task in _oldest_first(task for task in store.tasks if task.networks and not states.has_stopped(task)):
        name = f"task {task.service_annotations.name}.{task.slot or task.node_id} ({task.id})"
        problems = [why for leg in task.networks if (why := holders.refusal(name, leg))]
        if problems and states.is_runnable(task):
            yield _without(task, problems[0]), f"{name}: {problems[0]}: replaced"


def _without(task: Task, why: str) -> Change:
    """Another task takes the place of this one (`orchestrate`)."""
    if task.status.state < pb.TASK_ASSIGNED:
        return Remove(task)
    changed: Task = copy_of(task)
    changed.desired_state = pb.TASK_SHUTDOWN
    changed.reason = f"{why}: replaced"
    return Update(changed)
