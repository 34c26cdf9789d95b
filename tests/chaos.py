"""Faults on real managers under load: `python -m tests.chaos --managers 3 --seed 1 --seconds 300`.

Clients read and compare-and-swap a few registers (a label of services without tasks) and race to create networks of
the same name, over all managers' sockets. Meanwhile a schedule that follows from the seed does harm. What the clients
saw is then searched for a contradiction. The schedule repeats with its seed; the timing of real processes does not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import swarm  # noqa: F401 - first: it pins TLS 1.3, which must happen before grpc is imported

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from proto.control_pb2 import GetRequest, ListRequest, NetworkRequest, ServiceRequest, ServiceUpdateRequest
from proto.control_pb2_grpc import ControlStub
from proto.objects_pb2 import NetworkSpec, Service, ServiceSpec
from swarm.lab.plan import Host
from tests.chaos_faults import FAULTS, Harm
from tests.labs import Lab, keep_logs, lab_up, wait_for
from tests.sim.linearizable import Operation, contradiction

NAMES = tuple(FAULTS)
REGISTERS = ("r0", "r1", "r2")
LABEL = "value"
CLIENTS = 4
PAUSE_S = 0.03
"""Between a client's operations: the load of all stays near a hundred calls a second on two shared cores."""
ATTEMPT_S = 2.5
"""Then the same request goes to another manager: a stopped process answers nobody."""
GIVES_UP_S = 20.0
"""Then the outcome stays open."""
RETRY_S = 0.1
RACE_EVERY = 6
"""Every so many operations a network is created."""
RECOVERY_S = 45.0
"""Within this after a fault, writes are acknowledged again."""

DEFINITE = frozenset({grpc.StatusCode.ABORTED, grpc.StatusCode.ALREADY_EXISTS})
"""Answers that say: this request changed nothing and never will."""
PASSING = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
"""Tried again with the same request ID. Any other code is tried again, too, but counted as strange."""


class Refused(Exception):
    """The definite no of a manager."""


class Unanswered(Exception):
    """Nobody said what became of the request."""


@dataclass
class Record:
    """What all clients saw. Lists are only appended to, which threads may do."""

    operations: list[Operation] = field(default_factory=list)
    created: list[tuple[str, str]] = field(default_factory=list)
    """Name and ID of each network whose creation was acknowledged."""
    undecided: list[str] = field(default_factory=list)
    """Names with a creation whose outcome is open."""
    taken: list[str] = field(default_factory=list)
    """Names that someone was told are taken."""
    codes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    """Seconds from the start of each fault to the first write acknowledged after its end."""

    @property
    def acknowledged(self) -> int:
        swaps = sum(1 for each in self.operations if each.expected is not None and not each.is_open)
        return swaps + len(self.created)

    @property
    def open(self) -> int:
        return sum(each.is_open for each in self.operations) + len(self.undecided)


class Client:
    """One thread, one operation at a time."""

    def __init__(self, number: int, hosts: Sequence[Host], seed: int, record: Record) -> None:
        self._number = number
        self._random = random.Random(f"{seed}/{number}")
        self._channels = [
            grpc.insecure_channel(
                f"unix:{host.run_dir}/manager.sock",
                options=(("grpc.max_reconnect_backoff_ms", 300), ("grpc.use_local_subchannel_pool", 1)),
            )
            for host in hosts
        ]
        self._stubs = [ControlStub(channel) for channel in self._channels]
        self._record = record

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def call(self, method: str, request: object, request_id: str = "", at: int | None = None) -> object:
        """Insist, with the same ID, at one manager after the other (or at the one given).
        Raises Refused, or Unanswered after GIVES_UP_S."""
        deadline = time.monotonic() + GIVES_UP_S
        while time.monotonic() < deadline:
            stub = self._random.choice(self._stubs) if at is None else self._stubs[at]
            metadata = (("request-id", request_id),) if request_id else ()
            try:
                return getattr(stub, method)(request, timeout=ATTEMPT_S, metadata=metadata)
            except grpc.RpcError as error:
                code = error.code()
                self._record.codes[code.name if code in DEFINITE | PASSING else f"{code.name}: {error.details()}"] += 1
                if code in DEFINITE:
                    raise Refused(error.details()) from None
            time.sleep(RETRY_S)
        raise Unanswered(method)

    def read(self, key: str, at: int | None = None) -> Service:
        called = time.monotonic()
        service = self.call("GetService", GetRequest(ref=key), at=at)
        assert isinstance(service, Service)
        value = service.spec.annotations.labels.get(LABEL, "")
        self._record.operations.append(Operation(key, called, time.monotonic(), None, value))
        return service

    def swap(self, key: str, value: str) -> None:
        """A refused swap is no operation: should its value be read all the same, then no order explains that."""
        service = self.read(key)
        expected = service.spec.annotations.labels.get(LABEL, "")
        request = ServiceUpdateRequest(id=service.id, version=service.meta.version, spec=service.spec)
        request.spec.annotations.labels[LABEL] = value
        called = time.monotonic()
        returned = math.inf
        with contextlib.suppress(Unanswered):
            self.call("UpdateService", request, f"swap-{value}")
            returned = time.monotonic()
        self._record.operations.append(Operation(key, called, returned, expected, value))

    def race(self, name: str) -> None:
        request = NetworkRequest(spec=NetworkSpec(driver="overlay"))
        request.spec.annotations.name = name
        try:
            network = self.call("CreateNetwork", request, f"{name}-{self._number}")
            self._record.created.append((name, str(getattr(network, "id", ""))))
        except Refused:
            self._record.taken.append(name)
        except Unanswered:
            self._record.undecided.append(name)

    def work(self, stop: threading.Event) -> None:
        for count in itertools.count():
            if stop.wait(PAUSE_S):
                return
            with contextlib.suppress(Refused, Unanswered):
                if count % RACE_EVERY == 0:
                    self.race(f"race-{count // RACE_EVERY}")
                else:
                    self.swap(self._random.choice(REGISTERS), f"{self._number}-{count}")


def make_registers(client: Client) -> None:
    for key in REGISTERS:
        spec = ServiceSpec()
        spec.annotations.name = key
        spec.task.container.image = "pyswarm/none:1"
        spec.replicated.replicas = 0
        client.call("CreateService", ServiceRequest(spec=spec), f"make-{key}")


def faults_found(record: Record, names: Sequence[tuple[str, str]]) -> list[str]:
    """What contradicts the promises. `names`: name and ID of every network at the end."""
    found = [why] if (why := contradiction(record.operations)) else []
    there = Counter(name for name, _ in names)
    acknowledged = Counter(name for name, _ in record.created)
    found += [f"lost: network {each}" for each in record.created if each not in names]
    found += [f"twice: network {name} exists {count} times" for name, count in there.items() if count > 1]
    found += [f"twice: network {name} acknowledged to {count}" for name, count in acknowledged.items() if count > 1]
    possible = {*acknowledged, *record.undecided}
    found += [f"invented: {name} is taken, by nobody" for name in {*record.taken} - possible]
    found += [f"invented: network {name}" for name in there if name.startswith("race-") and name not in possible]
    return found


@contextmanager
def load(hosts: Sequence[Host], seed: int, record: Record) -> Iterator[None]:
    """Clients at work for the time of the block."""
    stop = threading.Event()
    clients = [Client(number, hosts, seed, record) for number in range(CLIENTS)]
    threads = [threading.Thread(target=client.work, args=(stop,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(2 * GIVES_UP_S + RETRY_S)
        for client in clients:
            client.close()


def harm(cluster: Lab, seed: int, seconds: float, names: Sequence[str], record: Record) -> None:
    """Each named fault once, in the seed's order; again and again until the time is up."""
    generator = random.Random(seed)
    doer = Harm(cluster, generator)
    until = time.monotonic() + seconds
    while True:
        for name in generator.sample(list(names), len(names)):
            started = time.monotonic()
            record.faults.append(FAULTS[name](doer) or name)
            before = record.acknowledged
            wait_for(functools.partial(_wrote, record, before), RECOVERY_S, f"writes after {name}")
            record.pauses.append(time.monotonic() - started)
            print(f"{record.pauses[-1]:6.1f} s  {record.faults[-1]}", flush=True)
        if time.monotonic() >= until:
            return


def _wrote(record: Record, before: int) -> bool:
    """Every client could have written since."""
    return record.acknowledged > before + CLIENTS


def run(
    cluster: Lab, seed: int, seconds: float = 0.0, names: Sequence[str] = tuple(FAULTS)
) -> tuple[Record, list[str]]:
    """One round of the faults at least. The record, and what contradicts the promises (nothing should)."""
    record = Record()
    managers = [host for host in cluster.plan.hosts if host.manager]
    last = Client(CLIENTS, managers, seed, record)
    make_registers(last)
    with load(managers, seed, record):
        harm(cluster, seed, seconds, names, record)
    for key, at in itertools.product(REGISTERS, range(len(managers))):
        last.read(key, at)
    networks = last.call("ListNetworks", ListRequest(), at=0)
    there = [(network.spec.annotations.name, network.id) for network in networks.networks]  # type: ignore[attr-defined]
    last.close()
    return record, faults_found(record, there)


def summary(record: Record) -> str:
    reads = sum(each.expected is None for each in record.operations)
    strange = {code: count for code, count in record.codes.items() if ":" in code}
    return (
        f"{len(record.faults)} faults, {record.acknowledged} writes acknowledged, {reads} reads, {record.open} open, "
        f"{len(record.taken)} races lost; refusals {sum(record.codes.values())}, unexpected codes: {strange or 'none'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--managers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.0, help="0: each fault once")
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of them, separated by commas")
    given = parser.parse_args()
    with lab_up(f"chaosrun{given.managers}", given.managers, 0) as cluster:
        try:
            record, found = run(cluster, given.seed, given.seconds, given.faults.split(","))
        except BaseException:
            print(f"logs of the hosts: {keep_logs(cluster)}")
            raise
        print(summary(record))
        print("\n".join(found) or "nothing lost, nothing twice, linearizable")
        if found:
            print(f"logs of the hosts: {keep_logs(cluster)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
