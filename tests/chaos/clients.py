"""Clients of real managers: each reads and changes labels of a few services, and insists with its request ID."""

from __future__ import annotations

import math
import os
import random
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # managers that die are the point here, not worth a line each

import grpc

from proto.control_pb2 import GetRequest, ServiceUpdateRequest
from proto.control_pb2_grpc import ControlStub
from proto.objects_pb2 import Service
from tests.sim.linearizable import Operation

REGISTERS = ("r1", "r2", "r3")
VALUE = "value"
PADDING = "padding"
PADDING_BYTES = 20_000
"""So that the log grows to a snapshot within a run: one is taken every 64 MB."""
CALL_TIMEOUT_S = 4.0
GIVES_UP_S = 30.0
PAUSE_S = 0.02


class Client(threading.Thread):
    """`sockets`: of the managers. Runs until `stop`; a change whose outcome stays unknown stays open."""

    def __init__(self, number: int, sockets: Sequence[Path], seed: int) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self._number = number
        self._random = random.Random(f"{seed} client {number}")
        self._stubs = [ControlStub(grpc.insecure_channel(f"unix:{socket}", _OPTIONS)) for socket in sockets]
        self._stopping = threading.Event()
        self.history: list[Operation] = []
        self.acknowledged = self.reads = self.refused = 0
        self.longest_s = 0.0
        """Without any success."""
        self.error: BaseException | None = None

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        count = 0
        last_s = time.monotonic()
        try:
            while not self._stopping.wait(self._random.uniform(0, 2 * PAUSE_S)):
                key = self._random.choice(REGISTERS)
                service = self._read(key)
                if service is not None and self._random.random() < 0.6:
                    count += 1
                    self._change(key, service, f"{self._number}.{count}")
                if service is not None:
                    self.longest_s = max(self.longest_s, time.monotonic() - last_s)
                    last_s = time.monotonic()
        except BaseException as error:
            self.error = error
            raise

    def _read(self, key: str) -> Service | None:
        called = time.monotonic()
        try:
            service: Service = self._random.choice(self._stubs).GetService(GetRequest(ref=key), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError:
            return None
        value = service.spec.annotations.labels.get(VALUE, "")
        self.history.append(Operation(key, called, time.monotonic(), None, value))
        self.reads += 1
        return service

    def _change(self, key: str, service: Service, value: str) -> None:
        """Swap the value that was read, if the object is still as it was read."""
        expected = service.spec.annotations.labels.get(VALUE, "")
        request = ServiceUpdateRequest(id=service.id, version=service.meta.version, spec=service.spec)
        request.spec.annotations.labels[VALUE] = value
        request.spec.annotations.labels[PADDING] = "x" * PADDING_BYTES
        metadata = (("request-id", secrets.token_hex(16)),)
        called = time.monotonic()
        may_be_stored = False
        while time.monotonic() - called < GIVES_UP_S:
            try:
                self._random.choice(self._stubs).UpdateService(request, timeout=CALL_TIMEOUT_S, metadata=metadata)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.ABORTED:  # another was faster: this one never happened
                    self.refused += 1
                    return
                if error.code() not in _UNKNOWN:
                    raise
                may_be_stored = True
                self._stopping.wait(0.1)
                continue
            self.history.append(Operation(key, called, time.monotonic(), expected, value))
            self.acknowledged += 1
            return
        if may_be_stored:
            self.history.append(Operation(key, called, math.inf, expected, value))


_UNKNOWN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.PERMISSION_DENIED,  # the manager that was asked has just become a worker
)
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)
