"""The first moment of the agent process, before what it consists of is imported."""

from __future__ import annotations

from node.priority import prefer_this
from swarm.config import DaemonConfig


def start(config: DaemonConfig) -> None:
    """As `swarm.daemon.run`. The imports take half a second of the processor: on a host that is busy with its tasks a
    process that is not preferred yet would wait for it for many seconds."""
    prefer_this()
    from swarm.daemon import run

    run(config)
