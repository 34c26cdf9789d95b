"""`Changes` as one line of JSON and back: the control protocol between the agent and the server."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from dns.changes import Changes, NetworkChange
from dns.interface import NetworkNames, Sandbox, ServiceNames, TaskNames

LINE_BYTES_MAX = 64 << 20
"""About 300,000 names; a longer line is a broken peer."""


def encode(changes: Changes) -> bytes:
    return json.dumps(dataclasses.asdict(changes), separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Changes:
    """Raises ValueError (bad JSON), KeyError or TypeError (wrong shape): the server answers with an error."""
    raw: dict[str, Any] = json.loads(line)
    raw["networks"] = tuple(_network_change(**item) for item in raw["networks"])
    raw["sandboxes"] = tuple(Sandbox(**_tuples(item)) for item in raw["sandboxes"])
    return Changes(**_tuples(raw))


def _network_change(names: dict[str, Any], **rest: Any) -> NetworkChange:
    services = tuple(_service(**item) for item in names.pop("services"))
    tasks = tuple(TaskNames(**_tuples(item)) for item in names.pop("tasks"))
    return NetworkChange(names=NetworkNames(**names, services=services, tasks=tasks), **_tuples(rest))


def _service(ports: list[list[Any]], **rest: Any) -> ServiceNames:
    return ServiceNames(ports=tuple((name, protocol, port) for name, protocol, port in ports), **_tuples(rest))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
