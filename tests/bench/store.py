"""What the replicated state costs: memory of 100,000 tasks, one task's update, dump and load.

`python -m tests.bench.store [--json]`: a table; with --json one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time

from proto import store_pb2 as pb
from proto.objects_pb2 import TASK_RUNNING, Service, Task
from swarm.store.changes import Create, Update, copy_of, transaction
from swarm.store.store import Store

TASKS = 100_000
PER_SERVICE = 100
NODES = 1_000
PER_ENTRY = 500
UPDATES = 20_000
AIM_MIB, AIM_US = 400.0, 50.0


def a_service(number: int) -> Service:
    made = Service(id=f"{number:025}")
    made.spec.annotations.name = f"service-{number}"
    made.spec.replicated.replicas = PER_SERVICE
    _fill(made.spec.task)
    return made


def _fill(spec: object) -> None:
    container = spec.container  # type: ignore[attr-defined]
    container.image = "registry.example.com:5000/library/wordpress:6.4@sha256:" + "ab" * 32
    container.env.extend(f"VARIABLE_{each}=a value of an ordinary length {each}" for each in range(6))
    container.args.extend(["apache2-foreground", "-DFOREGROUND"])


def a_task(number: int, service: Service) -> Task:
    task = Task(id=f"t{number:024}", service_id=service.id, slot=number % PER_SERVICE + 1)
    task.node_id = f"n{number % NODES:024}"
    task.spec.CopyFrom(service.spec.task)
    task.networks.add(network_id="n" * 25, address=f"10.0.{number // 250 % 250}.{number % 250}/16")
    task.status.message = "started"
    task.desired_state = TASK_RUNNING
    return task


def _rss_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def _entry(changes: list[Create | Update], at: float) -> bytes:
    return pb.Entry(transactions=[transaction((change,), at) for change in changes]).SerializeToString()


def measure() -> dict[str, float]:
    store = Store()
    before_mib = _rss_mib()
    services = [a_service(number) for number in range(TASKS // PER_SERVICE)]
    store.apply(_entry([Create(service) for service in services], 1.0))
    for first in range(0, TASKS, PER_ENTRY):
        tasks = [a_task(number, services[number // PER_SERVICE]) for number in range(first, first + PER_ENTRY)]
        store.apply(_entry([Create(task) for task in tasks], 1.0))
    full_mib = _rss_mib() - before_mib

    entries = []
    ids = [task.id for task in store.tasks][:: TASKS // UPDATES]
    for object_id in ids:
        stored = store.tasks.get(object_id)
        assert stored is not None
        task = copy_of(stored)
        task.status.message = "running for some time"
        entries.append(_entry([Update(task)], 2.0))
    rounds = []
    for first in range(0, len(entries), 1000):
        started = time.perf_counter()
        for entry in entries[first : first + 1000]:
            store.apply(entry)
        rounds.append((time.perf_counter() - started) / 1000)
    del entries
    updated_mib = _rss_mib() - before_mib

    started = time.perf_counter()
    records = list(store.dump())
    dump_s = time.perf_counter() - started
    started = time.perf_counter()
    fresh = Store()
    fresh.load(records)
    load_s = time.perf_counter() - started
    assert fresh.digest() == store.digest()
    return {
        "tasks": TASKS,
        "memory_mib": round(max(full_mib, updated_mib), 1),
        "update_us": round(statistics.median(rounds) * 1e6, 1),
        "dump_mib": round(sum(map(len, records)) / 2**20, 1),
        "dump_s": round(dump_s, 2),
        "load_s": round(load_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    result = measure()
    print(f"{'what':<34}{'measured':>12}{'aim':>12}")
    print(f"{'memory for 100,000 tasks':<34}{result['memory_mib']:>8} MiB{AIM_MIB:>8.0f} MiB")
    print(f"{'one task updated':<34}{result['update_us']:>9} us{AIM_US:>9.0f} us")
    print(f"{'dump of ' + str(result['dump_mib']) + ' MiB':<34}{result['dump_s']:>10} s")
    print(f"{'load of the same':<34}{result['load_s']:>10} s")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
