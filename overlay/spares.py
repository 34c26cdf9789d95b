"""Task namespaces made before they are needed: half of what attaching a task costs is then paid already.

A spare is held by its descriptor alone, so nothing is left of it when the agent dies.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import structlog

from overlay import namespaces, rtnl
from overlay.balance import TaskBalance
from overlay.namespaces import NamespaceThread
from overlay.netlink import NETLINK_ROUTE, Netlink, acknowledged
from overlay.sysctls import IPV6_SYSCTLS, TASK_SYSCTLS, set_all_optional

log = structlog.get_logger("overlay")

SPARES = 4
"""Made beside the tasks that take them, one is ready each time; each holds about 100 KB of the kernel's memory."""


@dataclass(frozen=True, slots=True)
class Spare:
    """A namespace with its settings, its loopback up, and sockets in it."""

    descriptor: int
    route: Netlink
    balance: TaskBalance

    def release(self) -> None:
        """What only attaching needs: the namespace lives on where it was mounted."""
        self.route.close()
        os.close(self.descriptor)

    def close(self) -> None:
        self.release()
        self.balance.close()


class Spares:
    def __init__(self, open_balance: Callable[[], TaskBalance]) -> None:
        """`open_balance` is called inside each new namespace."""
        self._open_balance = open_balance
        self._ready: SimpleQueue[Spare] = SimpleQueue()
        self._thread = NamespaceThread()
        self._closed = False

    def take(self, thread: NamespaceThread) -> Spare:
        """One that is ready, else a new one, made on this (the calling) thread. Raises OSError."""
        try:
            spare = self._ready.get_nowait()
        except Empty:
            spare = self._make(thread)
        self.refill()
        return spare

    def refill(self) -> None:
        """Returns at once."""
        self._thread.submit(self._fill)

    def _fill(self) -> None:
        """Any failure is met again, and told, by the `take` that finds none."""
        try:
            while self._ready.qsize() < SPARES and not self._closed:
                self._ready.put(self._make(self._thread))
        except OSError as error:
            log.warning("no_spare_namespace", error=str(error))

    def _make(self, thread: NamespaceThread) -> Spare:
        with thread.fresh() as descriptor:
            for name, value in TASK_SYSCTLS.items():
                namespaces.sysctl(name, value)
            set_all_optional(IPV6_SYSCTLS)
            route = Netlink(NETLINK_ROUTE)
            route.batch(acknowledged([rtnl.set_link("lo")]))
            return Spare(descriptor, route, self._open_balance())

    def close(self) -> None:
        self._closed = True
        self._thread.close()
        self.clear()

    def clear(self) -> None:
        while not self._ready.empty():
            self._ready.get_nowait().close()
