"""Who gets the processor first on a busy host: what keeps the swarm together, before what tasks do.

A host that starts a hundred containers at once would otherwise leave its agent so little that heartbeats come late:
the host would be declared down, its tasks be started elsewhere, and the next host be as busy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

NICENESS = -10
"""Nine shares of the processor against one of an ordinary process (the kernel's sched_prio_to_weight): half of it
against nine containers that start."""


class _This:
    niceness = 0
    """This process's own since `prefer_this`; 0 = it is not preferred."""


def prefer(pid: int) -> None:
    """The process, which has one thread yet, comes first from now on. Where that is not allowed it stays as it is. The
    kernel weighs sessions first, and only within one the niceness (autogroups, sched(7))."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(NICENESS))


def prefer_this() -> None:
    """To be called before the process has threads."""
    prefer(os.getpid())
    _This.niceness = min(0, os.getpriority(os.PRIO_PROCESS, 0))


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """What this thread starts in the block has the priority that all have. (Niceness is a thread's own.)"""
    if not _This.niceness:
        yield
        return
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, _This.niceness)
