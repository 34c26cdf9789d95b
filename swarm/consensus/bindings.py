"""pysyncobj reads the clock, randomness, pickle, the journal and the serializer from module globals. They are bound
here, once, to look at the member that is running: the whole process is one thread, and `enter` says whose turn it is.

So a simulation can give each member its own clock, and no pickle is ever reachable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pysyncobj.journal
import pysyncobj.pickle
import pysyncobj.serializer
import pysyncobj.syncobj
import pysyncobj.tcp_connection
import pysyncobj.version

from swarm.consensus import codec

EXPECTED_VERSION = "0.3.17"


@dataclass(frozen=True, slots=True)
class Host:
    """What one member lends to the kernel: a monotonic clock (s), random numbers in [0, 1), its log, its snapshots."""

    clock: Callable[[], float]
    random: Callable[[], float]
    journal: Any
    serializer: Any


_active: Host | None = None


def enter(host: Host) -> None:
    """From now on the kernel's globals mean this member's."""
    global _active  # noqa: PLW0603  # a global is what pysyncobj has
    _active = host


def _host() -> Host:
    assert _active is not None, "the kernel runs outside enter()"
    return _active


class _Random:
    @staticmethod
    def random() -> float:
        return _host().random()


class _NoPoller:
    """The kernel's sockets are not used; the event loop does the waiting."""

    def subscribe(self, *_: object) -> None: ...

    def unsubscribe(self, *_: object) -> None: ...

    def poll(self, timeout: float) -> None: ...


def _install() -> None:
    if pysyncobj.version.VERSION != EXPECTED_VERSION:
        raise ImportError(
            f"pysyncobj {pysyncobj.version.VERSION} is installed, but the safety shell is written for"
            f" {EXPECTED_VERSION}: install pysyncobj=={EXPECTED_VERSION}"
        )
    kernel: Any = pysyncobj.syncobj
    kernel.monotonicTime = lambda: _host().clock()
    kernel.random = _Random
    kernel.createJournal = lambda _path: _host().journal
    kernel.Serializer = lambda *_: _host().serializer
    kernel.createPoller = lambda _kind: _NoPoller()
    kernel.PIPE_NOTIFIER_ENABLED = False
    modules: list[Any] = [kernel, pysyncobj.serializer, pysyncobj.tcp_connection]
    for module in modules:
        module.pickle = codec
    holders: list[Any] = [pysyncobj.pickle, pysyncobj.journal]
    for holder in holders:
        for name in ("dumps", "loads", "dump", "load"):
            if hasattr(holder, name):
                setattr(holder, name, getattr(codec, name))


_install()
