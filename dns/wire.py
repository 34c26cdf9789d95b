"""`Changes` as one line of JSON and back: the control protocol between the agent and the server. Parts travel as the
lists of their fields, in order."""

from __future__ import annotations

import json
from typing import Any

from dns.changes import Changes, NetworkChange, fields_of
from dns.interface import NetworkNames, Sandbox, ServiceNames, TaskNames

LINE_BYTES_MAX = 64 << 20
"""About 300,000 names; a longer line is a broken peer."""


def encode(changes: Changes) -> bytes:
    raw = {
        "base": changes.base,
        "digest": changes.digest,
        "networks": [
            {
                "names": fields_of(change.names),
                "services": [fields_of(service) for service in change.names.services],
                "tasks": [fields_of(task) for task in change.names.tasks],
                "gone_services": change.gone_services,
                "gone_tasks": change.gone_tasks,
            }
            for change in changes.networks
        ],
        "gone_networks": changes.gone_networks,
        "sandboxes": [fields_of(sandbox) for sandbox in changes.sandboxes],
        "gone_sandboxes": changes.gone_sandboxes,
        "upstreams": changes.upstreams,
    }
    return json.dumps(raw, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Changes:
    """Raises ValueError (bad JSON), KeyError or TypeError (wrong shape): the server answers with an error."""
    raw: dict[str, Any] = json.loads(line)
    return Changes(
        base=raw["base"],
        digest=raw["digest"],
        networks=tuple(_network_change(item) for item in raw["networks"]),
        gone_networks=tuple(raw["gone_networks"]),
        sandboxes=tuple(Sandbox(*map(_tuple, fields)) for fields in raw["sandboxes"]),
        gone_sandboxes=tuple(raw["gone_sandboxes"]),
        upstreams=tuple(raw["upstreams"]),
    )


def _network_change(raw: dict[str, Any]) -> NetworkChange:
    network_id, name, internal = raw["names"]
    names = NetworkNames(
        network_id,
        name,
        internal,
        tuple(ServiceNames(*map(_tuple, fields)) for fields in raw["services"]),
        tuple(TaskNames(*map(_tuple, fields)) for fields in raw["tasks"]),
    )
    return NetworkChange(network_id, names, tuple(raw["gone_services"]), tuple(raw["gone_tasks"]))


def _tuple(value: Any) -> Any:
    """JSON has lists only."""
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
