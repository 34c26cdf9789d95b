"""Deleting links: the kernel waits 18 ms for packets under way each time, and lets nobody make a link meanwhile. So
what many tasks leave behind at once is deleted at once."""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from overlay.netlink import Netlink, acknowledged
from overlay.rtnl import DOOMED_GROUP, delete_group, delete_link, set_group


@dataclass(frozen=True, slots=True)
class Port:
    """A link of a task in a namespace, and a socket there."""

    namespace: Path
    netlink: Netlink
    name: str

    def delete(self) -> None:
        """From any thread; closes the socket. No such link: fine."""
        with self.netlink:
            self.netlink.batch(acknowledged([delete_link(self.name)]))


class Removal:
    """One deletion at a time, of all ports in a namespace that wait by then."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="unlink")
        self._lock = threading.Lock()
        self._waiting: list[tuple[Port, Future[None]]] = []

    def delete(self, port: Port) -> Future[None]:
        """From any thread; returns at once. The port's socket is closed when the link is gone, or was."""
        done: Future[None] = Future()
        with self._lock:
            self._waiting.append((port, done))
            if len(self._waiting) == 1:
                self._executor.submit(self._run)
        return done

    def _run(self) -> None:
        with self._lock:
            taken, self._waiting = self._waiting, []
        for _, done in taken:
            done.set_running_or_notify_cancel()  # from here on nobody can give up waiting
        together: defaultdict[Path, list[tuple[Port, Future[None]]]] = defaultdict(list)
        for port, done in taken:
            together[port.namespace].append((port, done))
        for items in together.values():
            error = _delete([port for port, _ in items])
            for _, done in items:
                if done.cancelled():
                    continue  # whoever waited gave up
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

    def close(self) -> None:
        """After what waits is done."""
        self._executor.shutdown(wait=True)


def _delete(ports: list[Port]) -> OSError | None:
    """All in one namespace; returns what the kernel refused."""
    marks = [set_group(port.name, DOOMED_GROUP) for port in ports]
    try:
        ports[0].netlink.batch(acknowledged([*marks, delete_group(DOOMED_GROUP)]))
    except OSError as error:
        return error
    finally:
        for port in ports:
            port.netlink.close()
    return None
