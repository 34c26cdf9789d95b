"""`Picture` as one line of JSON and back: the control protocol between the agent and the server."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from dns.interface import NetworkNames, Picture, Sandbox, ServiceNames, TaskNames

LINE_BYTES_MAX = 64 << 20
"""About 300,000 names; a longer line is a broken peer."""


def encode(picture: Picture) -> bytes:
    return json.dumps(dataclasses.asdict(picture), separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Picture:
    """Raises ValueError (bad JSON), KeyError or TypeError (wrong shape): the server answers with an error."""
    raw: dict[str, Any] = json.loads(line)
    return Picture(
        networks=tuple(_network(item) for item in raw["networks"]),
        sandboxes=tuple(
            Sandbox(
                task_id=item["task_id"],
                netns_path=item["netns_path"],
                network_ids=tuple(item["network_ids"]),
                upstreams=tuple(item["upstreams"]),
            )
            for item in raw["sandboxes"]
        ),
        upstreams=tuple(raw["upstreams"]),
    )


def _network(raw: dict[str, Any]) -> NetworkNames:
    return NetworkNames(
        network_id=raw["network_id"],
        name=raw["name"],
        internal=raw["internal"],
        services=tuple(
            ServiceNames(tuple(item["names"]), item["vip"], tuple(item["task_addresses"])) for item in raw["services"]
        ),
        tasks=tuple(TaskNames(tuple(item["names"]), item["address"]) for item in raw["tasks"]),
    )
