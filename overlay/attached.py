"""A task that is wired here, and what is left of one that goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from overlay import namespaces
from overlay.balance import TaskBalance
from overlay.interface import Interface
from overlay.plan import Task
from overlay.removal import Port


@dataclass(slots=True)
class Attached:
    interfaces: tuple[Interface, ...]
    task: Task | None
    """None until its networks are known (again)."""
    balance: TaskBalance

    def network_ids(self) -> tuple[str, ...]:
        return tuple(interface.network_id for interface in self.interfaces)


@dataclass(frozen=True, slots=True)
class Detached:
    """What is left of a task: its ports first, then `finish`, on any thread."""

    ports: tuple[Port, ...]
    path: Path
    balance: TaskBalance | None

    def finish(self) -> None:
        if self.balance is not None:
            self.balance.close()
        namespaces.remove(self.path)
