"""From services to tasks: how many, where a global one goes, what to restart, update, move and forget."""

from swarm.orchestrate.stage import decide

__all__ = ["decide"]
