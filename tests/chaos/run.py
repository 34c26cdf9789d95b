"""One run: a lab, clients, faults one after the other, and the verdict."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from tests.chaos.clients import REGISTERS, VALUE, Client
from tests.chaos.faults import Chaos, every_fault
from tests.labs import Lab, wait_for
from tests.sim.linearizable import Operation, contradiction

CLIENTS = 6
CALM_S = 1.0
"""Between two faults."""


@dataclass(frozen=True, slots=True)
class Verdict:
    faults: int
    acknowledged: int
    reads: int
    refused: int
    is_open: int
    longest_pause_s: float
    """Of one client, without any answer."""
    contradiction: str
    """"" if the history is one that a single copy could have."""

    def __str__(self) -> str:
        return (
            f"{self.faults} faults, {self.acknowledged} changes acknowledged, {self.reads} reads,"
            f" {self.refused} refused as outdated, {self.is_open} open; longest pause {self.longest_pause_s:.1f} s:"
            f" {self.contradiction or 'linearizable, nothing lost, nothing twice'}"
        )


def make_registers(cluster: Lab, image: str) -> None:
    """Services without tasks, whose labels the clients change."""
    for name in REGISTERS:
        cluster.pyswarm("m1", "service", "create", "--quiet", "--detach", "--name", name, "--replicas", "0", image)


def run(cluster: Lab, seed: int, say: Callable[[str], None], seconds: float = 0.0, only: Iterable[str] = ()) -> Verdict:
    """Every fault once (those named in `only`), or for so many seconds in random order. Raises AssertionError when
    the managers do not come back."""
    chaos = Chaos(cluster, seed, say)
    faults = [fault for fault in every_fault(chaos) if not only or fault.__name__ in only]
    sockets = [cluster.host(name).run_dir / "manager.sock" for name in chaos.names]
    clients = [Client(number, sockets, seed) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    done = 0
    end = time.monotonic() + seconds
    try:
        while done < len(faults) or time.monotonic() < end:
            fault = faults[done] if done < len(faults) else chaos.random.choice(faults)
            fault()
            chaos.settle()
            done += 1
            time.sleep(CALM_S)
    finally:
        for client in clients:
            client.stop()
        for client in clients:
            client.join(60)
        for name in chaos.names:
            raft = cluster.host(name).state_dir / "raft"
            if raft.is_mount():
                subprocess.run(["umount", "--lazy", str(raft)], check=True)
    return _verdict(cluster, chaos, clients, done)


def _verdict(cluster: Lab, chaos: Chaos, clients: list[Client], faults: int) -> Verdict:
    for client in clients:
        assert not client.is_alive(), f"{client.name} hangs"
        assert client.error is None, f"{client.name}: {client.error!r}"
    history = [operation for client in clients for operation in client.history]
    # At the end every manager says the same, and it fits.
    history += [
        wait_for(partial(_read, cluster, name, key), 30, f"{name} answers") for name in chaos.names for key in REGISTERS
    ]
    return Verdict(
        faults=faults,
        acknowledged=sum(client.acknowledged for client in clients),
        reads=sum(client.reads for client in clients),
        refused=sum(client.refused for client in clients),
        is_open=sum(operation.is_open for operation in history),
        longest_pause_s=max(client.longest_s for client in clients),
        contradiction=contradiction(history),
    )


def _read(cluster: Lab, name: str, key: str) -> Operation:
    called = time.monotonic()
    label = f'{{{{index .Spec.Labels "{VALUE}"}}}}'
    value = cluster.pyswarm(name, "service", "inspect", "--format", label, key).strip()
    return Operation(key, called, time.monotonic(), None, value)
