"""From the commit of an endpoint's change to the moment when every host of a lab of five serves the new set.

A service of a few tasks is scaled up and down. Each task that comes up (reported RUNNING) or is told to stop is one
change; its time is the leader's when it proposes the entry, so that the commit counts as well. Every host is looked at
from outside its agent, every 10 ms: the published port's backends in the host's kernel, the VIP's in the namespace of
one of its tasks, the answer of its name server to `tasks.<service>`. A change has arrived when the last host shows it
in all three.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import grpc

from proto.control_pb2 import Event, EventsRequest, Filter, GetRequest, ListRequest, ServiceUpdateRequest
from proto.control_pb2_grpc import ControlStub
from proto.objects_pb2 import TASK_RUNNING, Node, Task
from tests.labs import WEB_IMAGE, Lab, lab_up, wait_for
from tests.overlay_lab import Sockets
from tests.serving import HostView, Key, Sight, Watcher

MANAGERS, WORKERS = 3, 2
PORT = 8000
LEAST, MOST = 5, 7
"""Replicas, by turns: each step changes two endpoints."""
PERIOD_S = 0.01
STEP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Change:
    """The task's endpoint begins (or ends) to serve by an entry proposed at this time (Unix s)."""

    at: float
    task_id: str
    serves: bool


def change_of(event: Event) -> Change | None:
    """The change of an endpoint that an event tells of; None: it tells of something else."""
    if event.action == "running" and event.attributes.get("desired.new", "running") == "running":
        return Change(event.at, event.id, True)
    if event.attributes.get("desired.new") in ("shutdown", "remove"):
        return Change(event.at, event.id, False)
    return None


class ChangeLog(threading.Thread):
    """Changes of one service's endpoints, as a manager tells them; `serving`: the tasks that serve now."""

    def __init__(self, control: ControlStub, service: str, serving: Iterable[str]) -> None:
        super().__init__(name="changes", daemon=True)
        self.changes: list[Change] = []
        self._serving = set(serving)
        self._stream = control.Events(EventsRequest(types=["task"], refs=[service]))

    def run(self) -> None:
        try:
            for event in self._stream:
                change = change_of(event)
                if change is not None and change.serves != (change.task_id in self._serving):
                    self._serving ^= {change.task_id}
                    self.changes.append(change)
        except grpc.RpcError:
            return  # the lab goes down, or `stop`

    def stop(self) -> None:
        self._stream.cancel()
        self.join(10)


def delay_s(history: Sequence[Sight], address: str, change: Change) -> float | None:
    """From the change until the host was seen to serve accordingly; None = never. 0: it did already, as a host does
    that knows by itself that its own task has ended."""
    state = False
    for sight in history:
        serves = address in sight.addresses
        if sight.at >= change.at:
            if state == change.serves:
                return 0.0
            if serves == change.serves:
                return sight.at - change.at
        state = serves
    return 0.0 if state == change.serves else None


@contextmanager
def watched(
    cluster: Lab, nodes: Sequence[Node], probes: Sequence[Task], names: Sequence[str]
) -> Iterator[list[Watcher]]:
    """One watcher per host, each looking from the namespace of that host's task among `probes`."""
    with ExitStack() as stack:
        sockets = Sockets()
        stack.callback(sockets.close)
        watchers = []
        for node in nodes:
            host = cluster.host(node.description.hostname)
            task = next(task for task in probes if task.node_id == node.id)
            view = HostView(sockets, host, node.id, host.run_dir / "netns" / f"task-{task.id}")
            watcher = Watcher(view, lambda: names, PERIOD_S)
            watcher.start()
            stack.callback(watcher.stop)
            watchers.append(watcher)
        yield watchers


def delays_ms(steps: int) -> list[float]:
    """One delay per change, in ms, in the order of the changes. Needs the web image in the machine's store."""
    with lab_up("network", MANAGERS, WORKERS) as cluster:
        cluster.pyswarm("m1", "network", "create", "net")
        on_net = ("--network", "net", "--detach")
        cluster.pyswarm("m1", "service", "create", *on_net, "--name", "probe", "--mode", "global", WEB_IMAGE)
        published = ("--publish", f"{PORT}:80", "--replicas", str(LEAST))
        cluster.pyswarm("m1", "service", "create", *on_net, *published, "--name", "web", WEB_IMAGE)
        leader = cluster.host(cluster.leader())
        with grpc.insecure_channel(f"unix:{leader.run_dir}/manager.sock") as channel:
            return _measured(cluster, ControlStub(channel), steps)


def _measured(cluster: Lab, control: ControlStub, steps: int) -> list[float]:
    wait_for(lambda: len(_running(control, "probe")) == MANAGERS + WORKERS, 60, "probes")
    wait_for(lambda: len(_running(control, "web")) == LEAST, 60, "tasks")
    vip = control.GetService(GetRequest(ref="web")).endpoint.virtual_ips[0].address.partition("/")[0]
    keys: tuple[Key, ...] = (("published", str(PORT)), ("vip", vip), ("name", "tasks.web"))
    addresses = {task.id: _address(task) for task in _running(control, "web")}
    nodes = control.ListNodes(ListRequest(), timeout=10).nodes
    with watched(cluster, nodes, _running(control, "probe"), ["tasks.web"]) as watchers:
        _wait_served(watchers, keys, frozenset(addresses.values()))
        log = ChangeLog(control, "web", addresses)
        log.start()
        try:
            for number in range(steps):
                now = _scaled(control, LEAST if number % 2 else MOST)
                _wait_served(watchers, keys, frozenset(now.values()))
                addresses |= now
        finally:
            log.stop()
    return [_arrival_s(watchers, keys, addresses[each.task_id], each) * 1000 for each in log.changes]


def _arrival_s(watchers: Sequence[Watcher], keys: Sequence[Key], address: str, change: Change) -> float:
    found = [delay_s(watcher.sights[key], address, change) for watcher in watchers for key in keys]
    return max(STEP_TIMEOUT_S if each is None else each for each in found)


def _wait_served(watchers: Sequence[Watcher], keys: Sequence[Key], wanted: frozenset[str]) -> None:
    def served() -> bool:
        return all(watcher.serves(key) == wanted for watcher in watchers for key in keys)

    wait_for(served, STEP_TIMEOUT_S, f"every host serves {sorted(wanted)}")


def _scaled(control: ControlStub, replicas: int) -> dict[str, str]:
    """Task ID -> address, once so many run."""
    service = control.GetService(GetRequest(ref="web"))
    request = ServiceUpdateRequest(id=service.id, version=service.meta.version, spec=service.spec)
    request.spec.replicated.replicas = replicas
    control.UpdateService(request, timeout=10)
    wait_for(lambda: len(_running(control, "web")) == replicas, STEP_TIMEOUT_S, f"{replicas} tasks run")
    return {task.id: _address(task) for task in _running(control, "web")}


def _running(control: ControlStub, service: str) -> list[Task]:
    found = control.GetService(GetRequest(ref=service))
    listing = control.ListTasks(ListRequest(filter=Filter(service_ids=[found.id])), timeout=10)
    return [task for task in listing.tasks if task.status.state == TASK_RUNNING and task.desired_state == TASK_RUNNING]


def _address(task: Task) -> str:
    return task.networks[0].address.partition("/")[0]


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
