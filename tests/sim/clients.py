"""Clients of the store: each reads and swaps the values of a few registers, and insists with its request ID."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from proto import store_pb2 as pb
from proto.objects_pb2 import Service
from swarm.errors import OutcomeUnknown, SwarmError
from swarm.store.changes import Create, Update, copy_of, transaction
from swarm.store.store import Store
from tests.sim.linearizable import Operation
from tests.sim.net import Net, Outcome

REGISTERS = ("a", "b", "c")
VALUE = "value"
PATIENCE_S = 1.0
"""After this long without an answer the same request is sent again."""
GIVES_UP_S = 6.0
"""Then the outcome stays open."""


def registers() -> bytes:
    """The entry that creates them, empty."""
    made = [Service(id=key) for key in REGISTERS]
    for service in made:
        service.spec.annotations.name = service.id
    return pb.Entry(transactions=[transaction([Create(each) for each in made], 0.0, "registers")]).SerializeToString()


def value_of(store: Store, key: str) -> str:
    service = store.services.get(key)
    return service.spec.annotations.labels.get(VALUE, "") if service is not None else ""


@dataclass
class _Request:
    operation: Operation
    entry: bytes
    sent_at: float
    outcome: Outcome
    may_be_stored: bool = False
    """An earlier attempt ended in the open."""


class Client:
    """One operation at a time. `history` gets those that had, or may have had, an effect or an answer."""

    def __init__(self, net: Net, number: int, history: list[Operation]) -> None:
        self._net = net
        self._number = number
        self._random: random.Random = net.generator("client", number)
        self._history = history
        self._request: _Request | None = None
        self._reading: Operation | None = None
        self._count = 0
        self.acknowledged = 0
        self.reads = 0

    @property
    def is_idle(self) -> bool:
        return self._request is None and self._reading is None

    def step(self, may_begin: bool) -> None:
        if self._request is not None:
            self._follow(self._request)
        elif self._reading is not None:
            if self._net.now_s - self._reading.called > GIVES_UP_S:
                self._reading = None
        elif may_begin:
            if self._random.random() < 0.5:
                self._read()
            else:
                self._swap()

    def end(self) -> None:
        """What is still open stays open."""
        if self._request is not None:
            self._history.append(self._request.operation)
            self._request = None

    # ---- reads

    def _read(self) -> None:
        name = self._random.choice(sorted(self._net.engines))
        engine = self._net.engines[name]
        reading = Operation(self._random.choice(REGISTERS), self._net.now_s, math.inf, None, "")
        machine = self._net.machines[name]
        self._reading = reading

        def done(refused: SwarmError | None) -> None:
            if self._reading is not reading:
                return
            self._reading = None
            if refused is None and self._net.engines.get(name) is engine:
                value = value_of(machine, reading.key)
                self._history.append(replace(reading, returned=self._net.now_s, value=value))
                self.reads += 1

        engine.reads.add(done)
        self._net.poke(name)

    # ---- swaps

    def _leader(self) -> str | None:
        """Whoever some manager believes to lead, as clients are told."""
        asked = self._net.engines[self._random.choice(sorted(self._net.engines))]
        leader = asked.leader()
        return leader.node_id if leader is not None and leader.node_id in self._net.engines else None

    def _swap(self) -> None:
        name = self._leader()
        if name is None:
            return
        key = self._random.choice(REGISTERS)
        service = self._net.machines[name].services.get(key)
        if service is None:
            return
        self._count += 1
        value = f"{self._number}.{self._count}"
        operation = Operation(key, self._net.now_s, math.inf, service.spec.annotations.labels.get(VALUE, ""), value)
        wanted = copy_of(service)
        wanted.spec.annotations.labels[VALUE] = value
        message = transaction([Update(wanted)], 0.0, f"request {value}")
        entry = pb.Entry(transactions=[message]).SerializeToString()
        request = _Request(operation, entry, self._net.now_s, Outcome())
        if self._send(request, name):
            self._request = request

    def _send(self, request: _Request, name: str) -> bool:
        request.outcome, request.sent_at = Outcome(), self._net.now_s
        try:
            self._net.engines[name].propose(request.entry, request.outcome)
        except SwarmError:
            return False
        self._net.poke(name)
        return True

    def _follow(self, request: _Request) -> None:
        answer = request.outcome.value
        if isinstance(answer, bytes):
            (verdict,) = pb.EntryResult.FromString(answer).verdicts
            assert verdict.code in (pb.Verdict.OK, pb.Verdict.CONFLICT), verdict
            is_ok = verdict.code == pb.Verdict.OK
            self._history.append(replace(request.operation, returned=self._net.now_s, succeeded=is_ok))
            self.acknowledged += is_ok
            self._request = None
        elif self._net.now_s - request.operation.called > GIVES_UP_S:
            self.end()
        elif answer is None and self._net.now_s - request.sent_at < PATIENCE_S:
            return
        else:
            request.may_be_stored |= answer is None or isinstance(answer, OutcomeUnknown)
            if not request.may_be_stored:
                self._request = None  # refused: it never happened
            elif (name := self._leader()) is not None:
                self._send(request, name)
