"""The real manager process, which also counts its log entries and the transitions of tasks that they hold.

Run: python -m tests.bench.swarm3k_manager --state-dir DIR --run-dir DIR (as `swarm.manager`). On SIGUSR1 it writes
`counts.json` into the run directory. With PYSWARM_PROFILE=FILE in the environment it profiles itself until its end.
"""

from __future__ import annotations

import cProfile
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from proto.objects_pb2 import Task
from swarm import manager
from swarm.hostfiles import HostPaths, Membership, write_atomically
from swarm.security.raft_key import RaftKey
from swarm.store.store import Event


class Counted(manager.Manager):
    """A transition is a task that is created, or whose observed or desired state changes: what is merged on the way
    here was no transition of the store, and does not count."""

    def __init__(self, paths: HostPaths, membership: Membership, key: RaftKey) -> None:
        super().__init__(paths, membership, key)
        self._entries = self._transitions = 0
        self._apply = self._store.apply
        setattr(self._store, "apply", self._counted)  # noqa: B010  # every entry, also one that changes nothing
        self._store.subscribe(self._count)
        self._file = paths.run / "counts.json"
        signal.signal(signal.SIGUSR1, lambda *_: self._write())

    def _counted(self, entry: bytes) -> bytes:
        self._entries += 1
        return self._apply(entry)

    def _count(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event.after, Task):
                old = event.before if isinstance(event.before, Task) else None
                self._transitions += old is None or _states(old) != _states(event.after)

    def _write(self) -> None:
        write_atomically(self._file, json.dumps({"entries": self._entries, "transitions": self._transitions}).encode())


def _states(task: Task) -> tuple[int, int]:
    return task.status.state, task.desired_state


def main() -> None:
    manager.Manager = Counted  # type: ignore[misc]
    profile = os.environ.get("PYSWARM_PROFILE")
    if not profile:
        manager.main()
        return
    profiler = cProfile.Profile()
    try:
        profiler.runcall(manager.main)
    finally:
        profiler.dump_stats(Path(profile))


if __name__ == "__main__":
    main()
