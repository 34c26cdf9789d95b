"""From the commit of an endpoint's change to the moment when every host of a lab of five serves the new set.

A service of a few tasks is scaled up and down. Each task that comes up (reported RUNNING) or is told to stop is one
change; its time is the leader's when it proposes the entry, so that the commit counts as well. Every host is looked at
from outside its agent, every 10 ms: the published port's backends in the host's kernel, the VIP's in the namespace of
one of its tasks, the answer of its name server to `tasks.<service>`. A change has arrived when the last host shows it
in all three.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import grpc

from proto.control_pb2 import GetRequest, ServiceUpdateRequest
from proto.control_pb2_grpc import ControlStub
from proto.objects_pb2 import Node, Task
from tests.endpoints import Change, EventReader, address_of, all_nodes, all_tasks, changes, delay_s, is_wanted
from tests.labs import WEB_IMAGE, Lab, lab_up, wait_for
from tests.overlay_lab import Sockets
from tests.serving import HostView, Key, Watcher

MANAGERS, WORKERS = 3, 2
PORT = 8000
LEAST, MOST = 5, 7
"""Replicas, by turns: each step changes two endpoints."""
PERIOD_S = 0.01
STEP_TIMEOUT_S = 30.0


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
            view = HostView(sockets, host, node.id)
            view.look_from(host.run_dir / "netns" / f"task-{task.id}")
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
    addresses = {task.id: address_of(task) for task in _running(control, "web")}
    with watched(cluster, all_nodes(control), _running(control, "probe"), ["tasks.web"]) as watchers:
        _wait_served(watchers, keys, frozenset(addresses.values()))
        reader = EventReader(control)
        reader.start()
        began_at = time.time()
        for number in range(steps):
            now = _scaled(control, LEAST if number % 2 else MOST)
            _wait_served(watchers, keys, frozenset(now.values()))
            addresses |= now
        reader.stop()
    found = [each for each in changes(reader.events) if each.service == "web" and each.at > began_at]
    return [_arrival_s(watchers, keys, addresses[each.task_id], each) * 1000 for each in found]


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
    return {task.id: address_of(task) for task in _running(control, "web")}


def _running(control: ControlStub, service: str) -> list[Task]:
    tasks = all_tasks(control, [control.GetService(GetRequest(ref=service)).id])
    return [task for task in tasks if is_wanted(task)]


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
