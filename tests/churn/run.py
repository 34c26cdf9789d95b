"""The walk on a real lab, and what every host serves meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # managers that are cut off are the point here

import grpc

from proto.control_pb2 import GetRequest, ListRequest, ServiceRequest, ServiceUpdateRequest
from proto.control_pb2_grpc import ControlStub
from proto.objects_pb2 import START_FIRST, STOP_FIRST, TASK_RUNNING, Node, Service, Task, TaskState, UpdateStatus
from swarm.lab import hosts, lab
from tests.churn import model
from tests.churn.stale import Seen, Staleness, staleness
from tests.endpoints import EventReader, address_of, all_nodes, all_tasks, changes, is_wanted, merged, serving
from tests.labs import WEB_IMAGE, Lab, wait_for
from tests.overlay_lab import Sockets
from tests.serving import Addresses, HostView, Key, Spans, Watcher

PROBE = "probe"
"""A global service on every network: each host is looked at from its task."""
NETWORKS = 5
FIRST_PORT = 20_000
LOOK_S = 0.25
"""Between two looks at a host: what is found late is late by up to so much less."""
SETTLE_S = 240.0
"""Until the managers have carried out all steps since the last pause; hundreds of containers on one small machine."""
AGREE_S = 30.0
"""Then until every host serves it: a machine that is busy with hundreds of starts may need some of it."""
CALL_S = 30.0
"""A change is tried for so long: the leader may just have been cut off."""
PACE_S = 0.2
"""Between two steps, in the mean: faster ones would only measure how long two cores need to start containers."""
SAMPLE = 3
"""Services whose every backend is really connected to at a pause, from every host."""
CONNECT_TIMEOUT_S = 10.0
"""On a busy machine a SYN may be lost, and is sent again after 1, 3 and 7 s: counted as slow, not as a failure."""
SLOW_S = 1.0
ROUNDS_MAX = 8
"""Connections per backend until each must have answered."""

Say = Callable[[str], None]


@dataclass(slots=True)
class Churn:
    cluster: Lab
    seed: int
    say: Say
    state: model.State
    rng: random.Random
    ports: dict[str, int]
    vips: dict[str, str] = field(default_factory=dict)
    controls: dict[str, ControlStub] = field(default_factory=dict)
    """Of each manager."""
    readers: list[EventReader] = field(default_factory=list)
    watchers: dict[str, Watcher] = field(default_factory=dict)
    disturbed: dict[str, Spans] = field(default_factory=lambda: defaultdict(Spans))
    """Host -> when it was cut off or had no agent."""
    addresses: dict[str, str] = field(default_factory=dict)
    """Task ID -> address, of all tasks that were seen."""
    slow: int = 0
    """Connections that took more than SLOW_S."""
    done: int = 0

    # ---- the managers

    def control(self) -> ControlStub:
        """Of some manager that is not cut off."""
        return self.controls[self.rng.choice(sorted(self.controls.keys() - self.state.cut))]

    def insist(self, what: str, call: Callable[[ControlStub], object]) -> None:
        """A leader that was just cut off, or an object that changed meanwhile: try again."""

        def made() -> bool:
            try:
                call(self.control())
            except grpc.RpcError:
                return False
            return True

        wait_for(made, CALL_S, what)

    def update(self, service: str, change: Callable[[Service], None]) -> None:
        def call(control: ControlStub) -> object:
            found = control.GetService(GetRequest(ref=service), timeout=5)
            change(found)
            return control.UpdateService(
                ServiceUpdateRequest(id=found.id, version=found.meta.version, spec=found.spec), timeout=5
            )

        self.insist(f"update of {service}", call)

    def running(self, service: str) -> list[Task]:
        tasks = all_tasks(self.control(), [self.control().GetService(GetRequest(ref=service), timeout=10).id])
        return [task for task in tasks if is_wanted(task)]

    # ---- steps

    def do(self, step: model.Step) -> None:
        match step:
            case model.Scale(service, replicas):
                self.update(service, lambda found: _set_replicas(found, replicas))
            case model.Update(service, start_first):
                self.update(service, partial(_renew, start_first=start_first, stamp=f"{self.seed}.{self.done}"))
            case model.KillContainer(service, lot):
                self.kill_container(service, lot)
            case model.KillAgent(host):
                self.kill(host, "daemon", str(self.cluster.host(host).run_dir))
            case model.StartAgent(host):
                lab.start(self.cluster.plan, self.cluster.host(host))
                self.disturbed[host].note(False)
            case model.KillNameServer(host):
                self.kill(host, "dns.server")
            case model.Cut(host):
                self.disturbed[host].note(True)
                self.partition([host])
            case model.Heal(host):
                self.partition([])
                self.disturbed[host].note(False)
            case model.Pause():
                self.check()

    def partition(self, cut: list[str]) -> None:
        plan = self.cluster.plan
        rest = [host for host in plan.hosts if host.name not in cut]
        lab.partition(plan, [[self.cluster.host(name) for name in cut], rest]) if cut else lab.heal(plan)

    def kill(self, host: str, *words: str) -> None:
        """The host's process that was started with these words."""
        if "daemon" in words:
            self.disturbed[host].note(True)
        found = self.cluster.host(host)
        pids = [pid for pid in hosts.host_pids(found) if set(words) <= _words(pid)]
        hosts.kill(pids, signal.SIGKILL)

    def kill_container(self, service: str, lot: float) -> None:
        tasks = self.running(service)
        if not tasks:
            return
        task = tasks[int(lot * len(tasks))]
        for group in Path("/sys/fs/cgroup").glob(f"*/pyswarm-lab/{self.cluster.plan.name}/*/{task.id}/cgroup.procs"):
            with contextlib.suppress(OSError):
                for pid in group.read_text().split():
                    os.kill(int(pid), signal.SIGKILL)

    # ---- what is true

    def keys(self, service: str) -> tuple[Key, ...]:
        return ("published", str(self.ports[service])), ("vip", self.vips[service]), ("name", f"tasks.{service}")

    def check(self) -> None:
        """Wait until the managers have done what was asked; then every host must serve just that."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            truth = self.settle()
            try:
                self.compare(truth)
            except (AssertionError, OSError):
                # A node that was away for a moment may be declared down only now, and its tasks move.
                if self.truth() == truth or time.monotonic() > deadline:
                    raise
            else:
                return

    def compare(self, truth: dict[str, Addresses]) -> None:
        deadline = time.monotonic() + AGREE_S
        for watcher in self.watchers.values():
            while found := self.differences(watcher, truth):
                late = f"after {AGREE_S:g} s {len(found)} answers differ: {found[:3]} ({watcher.sees()})"
                assert time.monotonic() < deadline, late
                time.sleep(LOOK_S)
        for service in self.rng.sample(sorted(self.ports), min(SAMPLE, len(self.ports))):
            for watcher in self.watchers.values():
                with watcher.lock:
                    self.ask(watcher.view, service, truth.get(service, frozenset()))

    def truth(self) -> dict[str, Addresses]:
        return serving(all_tasks(self.control()), all_nodes(self.control()))

    def settle(self) -> dict[str, Addresses]:
        """What the store says once the services have the tasks that were asked for."""

        lacking = "no manager answers"

        def settled() -> dict[str, Addresses] | None:
            nonlocal lacking
            try:
                services = self.control().ListServices(ListRequest(), timeout=30).services
                tasks, nodes = all_tasks(self.control()), all_nodes(self.control())
                self.addresses.update({task.id: address_of(task) for task in tasks if task.networks})
                self.look_from_probes(tasks, nodes)
            except (grpc.RpcError, OSError):  # OSError: that probe has just gone
                return None
            found = serving(tasks, nodes)
            lacking = self.lacking(found, services, tasks)
            return None if lacking else found

        try:
            found: dict[str, Addresses] = wait_for(settled, SETTLE_S, "the services have the tasks that were asked for")
        except AssertionError as error:
            raise AssertionError(f"{error}: {lacking}") from error
        return found

    def lacking(self, found: dict[str, Addresses], services: Iterable[Service], tasks: Iterable[Task]) -> str:
        """What is not as it was asked for yet, in words; "" = nothing."""
        wanted = {**self.state.replicas, PROBE: len(self.cluster.hosts)}
        counts = {service: len(found.get(service, ())) for service in wanted}
        wrong = [f"{name} {counts[name]}/{wanted[name]}" for name in wanted if counts[name] != wanted[name]]
        wrong += [each.spec.annotations.name for each in services if each.update_status.state == UpdateStatus.UPDATING]
        if not wrong:
            return ""
        states = Counter(TaskState.Name(task.status.state) for task in tasks if task.desired_state <= TASK_RUNNING)
        return f"{len(wrong)} services, {', '.join(wrong[:5])}; tasks are {dict(states)}"

    def differences(self, watcher: Watcher, truth: dict[str, Addresses]) -> list[str]:
        """In words, of what the host was seen to serve last."""
        found = []
        for service in self.ports:
            expected = truth.get(service, frozenset())
            for key in self.keys(service):
                served = watcher.serves(key)
                if served != expected:
                    lacks, keeps = sorted(expected - served), sorted(served - expected)
                    found.append(f"{watcher.view.host.name} {key[1]} lacks {lacks} and still has {keeps}")
        return found

    def look_from_probes(self, tasks: Iterable[Task], nodes: Iterable[Node]) -> None:
        names = {node.id: node.description.hostname for node in nodes}
        for task in tasks:
            if task.service_annotations.name == PROBE and is_wanted(task):
                host = self.cluster.host(names[task.node_id])
                watcher = self.watchers[host.name]
                with watcher.lock:
                    watcher.view.look_from(host.run_dir / "netns" / f"task-{task.id}")

    def ask(self, view: HostView, service: str, expected: Addresses) -> None:
        """From inside: the service's name is its VIP; each backend, and no other, answers there and on the host's
        published port; where there is none, connections are refused."""
        vip = self.vips[service]
        found = view.resolve(service)
        assert found == frozenset((vip,)), f"{view.host.name}: {service} is {found}, not {vip}"
        wanted = {task.id[:12] for task in self.running(service)} if expected else {""}
        self.reach(view, wanted, vip, 80, view.tcp_socket)
        self.reach(view, wanted, view.host.address, self.ports[service], socket.socket)

    def reach(
        self, view: HostView, wanted: set[str], address: str, port: int, make_socket: Callable[[], socket.socket]
    ) -> None:
        where = f"{view.host.name}: {address}:{port}"
        answers: set[str] = set()
        for _ in range(ROUNDS_MAX * len(wanted)):
            began = time.monotonic()
            try:
                answers.add(_who(make_socket(), address, port))
            except OSError as error:
                raise AssertionError(f"{where}: {error}") from error
            self.slow += time.monotonic() - began > SLOW_S
            if answers >= wanted:
                break
        assert answers == wanted, f"{where} reached {answers}, not {wanted}"

    def verdict(self) -> Staleness:
        """Of the whole run."""
        found = [each for each in changes(merged(self.readers)) if each.service in self.ports]
        seen = {
            name: Seen(watcher.sights, self.disturbed[name], watcher.blind, watcher.silent)
            for name, watcher in self.watchers.items()
        }
        keys = {service: self.keys(service) for service in self.ports}
        return staleness(found, self.addresses, keys, seen)


def _words(pid: int) -> set[str]:
    with contextlib.suppress(OSError):
        return set(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0"))
    return set()


def _set_replicas(service: Service, replicas: int) -> None:
    service.spec.replicated.replicas = replicas


def _renew(service: Service, start_first: bool, stamp: str) -> None:
    service.spec.update.order = START_FIRST if start_first else STOP_FIRST
    environment = [each for each in service.spec.task.container.env if not each.startswith("STAMP=")]
    service.spec.task.container.env[:] = [*environment, f"STAMP={stamp}"]


def _who(client: socket.socket, address: str, port: int) -> str:
    """The first 12 characters of the ID of the task that answers; "" = the connection is refused. Raises OSError."""
    with contextlib.closing(client):
        client.settimeout(CONNECT_TIMEOUT_S)
        try:
            client.connect((address, port))
        except ConnectionRefusedError:
            return ""
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while chunk := client.recv(4096):
            answer += chunk
    return answer.rpartition(b"\r\n\r\n")[2].decode().partition(" ")[0]


def begin(cluster: Lab, seed: int, state: model.State, say: Say, stack: ExitStack) -> Churn:
    """Networks and services are made, and every host is watched for as long as `stack` lives."""
    names = list(state.replicas)
    ports = {name: FIRST_PORT + number for number, name in enumerate(names)}
    churn = Churn(cluster, seed, say, state, random.Random(f"{seed} choices"), ports)
    for host in cluster.plan.hosts:
        if host.manager:
            channel = stack.enter_context(grpc.insecure_channel(f"unix:{host.run_dir}/manager.sock"))
            churn.controls[host.name] = ControlStub(channel)
            reader = EventReader(churn.controls[host.name])
            reader.start()
            stack.callback(reader.stop)
            churn.readers.append(reader)
    _make_services(churn, names)
    sockets = Sockets()
    stack.callback(sockets.close)
    for node in all_nodes(churn.control()):
        view = HostView(sockets, cluster.host(node.description.hostname), node.id)
        watcher = Watcher(view, lambda: [f"tasks.{name}" for name in names], LOOK_S)
        stack.callback(watcher.stop)
        churn.watchers[view.host.name] = watcher
        watcher.start()
    churn.check()
    say(f"{len(names)} services, {sum(state.replicas.values())} tasks: served by all {len(cluster.hosts)} hosts")
    return churn


def _make_services(churn: Churn, names: list[str]) -> None:
    """The first of each kind by the command line, the others as it is."""
    cluster = churn.cluster
    networks = [f"n{number}" for number in range(NETWORKS)]
    for number, network in enumerate(networks):
        cluster.pyswarm("m1", "network", "create", "--subnet", f"10.{210 + number}.0.0/16", network)
    attached = [word for network in networks for word in ("--network", network)]
    cluster.pyswarm("m1", "service", "create", "--name", PROBE, "--mode", "global", *attached, WEB_IMAGE)
    flags = [
        "--detach",
        "--replicas",
        str(churn.state.replicas[names[0]]),
        "--network",
        networks[0],
        "--publish",
        f"{FIRST_PORT}:80",
    ]
    flags += ["--restart-delay", "200ms", "--stop-grace-period", "2s", "--update-parallelism", "5"]
    cluster.pyswarm("m1", "service", "create", "--name", names[0], *flags, "--update-monitor", "100ms", WEB_IMAGE)
    control = churn.control()
    ids = [control.GetNetwork(GetRequest(ref=network), timeout=10).id for network in networks]
    spec = control.GetService(GetRequest(ref=names[0]), timeout=10).spec
    for number, name in enumerate(names[1:], start=1):
        spec.annotations.name = name
        spec.task.networks[0].network_id = ids[number % NETWORKS]
        spec.endpoint.ports[0].published_port = churn.ports[name]
        control.CreateService(ServiceRequest(spec=spec), timeout=10)

    def vip(name: str) -> str:
        endpoint = control.GetService(GetRequest(ref=name), timeout=10).endpoint
        return endpoint.virtual_ips[0].address.partition("/")[0] if endpoint.virtual_ips else ""

    for name in names:
        churn.vips[name] = wait_for(partial(vip, name), 30, f"{name} has a VIP")


def run(churn: Churn, tasks: int, steps: int, seconds: float = float("inf"), tells: bool = False) -> Staleness:
    """So many steps, or those that fit in the time (then up to the next pause). `tasks`: around which number services
    are scaled. `tells`: of each step, to read the logs of the hosts by. Raises AssertionError naming the seed and the
    step."""
    end = time.monotonic() + seconds
    rng, walked = random.Random(f"{churn.seed} pace"), random.Random(churn.seed)
    for number, step, state in model.walk(walked, churn.state, churn.cluster.hosts, tasks, steps):
        churn.done, churn.state = number, state
        time.sleep(rng.uniform(0, 2 * PACE_S))
        if tells:
            churn.say(f"step {number}: {step}")
        try:
            churn.do(step)
        except AssertionError as error:
            raise AssertionError(f"seed {churn.seed}, step {churn.done} ({step}): {error}") from error
        if isinstance(step, model.Pause):
            churn.say(f"step {number}: every host serves what the store says; {churn.verdict()}")
            if time.monotonic() > end:
                break
    return churn.verdict()
