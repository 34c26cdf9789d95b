"""What a lab's host serves at this moment: the balancers' maps in its kernel, and its name server's answers, as one of
its tasks gets them. Nothing is asked of the agent."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dnslib import DNSRecord

from overlay import nfnl
from overlay.addressing import host_table
from overlay.netlink import NETLINK_NETFILTER, Netlink, NetlinkError
from overlay.ruleset import TASK_TABLE
from swarm.daemon import TAG_CHARS
from swarm.lab.plan import Host
from tests.overlay_lab import Sockets

RESOLVER = ("127.0.0.11", 53)
ANSWER_TIMEOUT_S = 0.25
"""An answer takes well below a millisecond; after this the name server counts as silent."""
_A_RECORD = re.compile(rb"\xc0.\x00\x01\x00\x01.{4}\x00\x04(.{4})", re.DOTALL)

Key = tuple[str, str]
"""("published", port), ("vip", address) or ("name", name)"""
Addresses = frozenset[str]
Served = Mapping[Key, Addresses]


class HostView:
    """Reads one host, from its own namespace and that of one of its tasks. May be used by one thread at a time."""

    def __init__(self, sockets: Sockets, host: Host, node_id: str, task_netns: Path) -> None:
        self.host = host
        self._table = host_table(node_id[:TAG_CHARS])
        self._host_netlink = sockets.inside(host.netns_path, lambda: Netlink(NETLINK_NETFILTER))
        self._task_netlink = sockets.inside(task_netns, lambda: Netlink(NETLINK_NETFILTER))
        self._udp = sockets.open(task_netns, socket.SOCK_DGRAM)
        self._udp.settimeout(ANSWER_TIMEOUT_S)
        self._udp.connect(RESOLVER)
        self._questions: dict[str, bytes] = {}
        self._generations = (-1, -1)
        self._maps: dict[Key, Addresses] = {}

    def close(self) -> None:
        self._host_netlink.close()
        self._task_netlink.close()
        self._udp.close()

    def maps(self) -> Served:
        """Backends of every published port of the host and of every VIP that the task sees. Read again only when the
        kernel says that something has changed."""
        generations = (nfnl.generation(self._host_netlink), nfnl.generation(self._task_netlink))
        if generations != self._generations:
            found: dict[Key, set[str]] = defaultdict(set)
            for key, address in (*self._published(), *self._vips()):
                found[key].add(address)
            self._maps = {key: frozenset(addresses) for key, addresses in found.items()}
            self._generations = generations
        return self._maps

    def _published(self) -> Iterable[tuple[Key, str]]:
        for (_, key), value in nfnl.elements(self._host_netlink, self._table, ["backends"]).items():
            assert isinstance(value, bytes)
            yield ("published", str(int.from_bytes(key[4:6], "big"))), socket.inet_ntoa(value[:4])

    def _vips(self) -> Iterable[tuple[Key, str]]:
        for (_, key), value in nfnl.elements(self._task_netlink, TASK_TABLE, ["backends"]).items():
            assert isinstance(value, bytes)
            yield ("vip", socket.inet_ntoa(key[:4])), socket.inet_ntoa(value[:4])

    def resolve(self, name: str) -> Addresses | None:
        """A records; None when the name server is silent."""
        question = self._questions.get(name)
        if question is None:
            question = self._questions[name] = bytes(DNSRecord.question(name).pack())
        try:
            self._udp.send(question)
            while True:
                answer = self._udp.recv(4096)
                if answer[:2] == question[:2] and answer[12 : len(question)] == question[12:]:
                    break
        except OSError:
            return None
        return frozenset(socket.inet_ntoa(each) for each in _A_RECORD.findall(answer, len(question)))


@dataclass(frozen=True, slots=True)
class Sight:
    """From `at` (Unix s) on the key was seen with these addresses."""

    at: float
    addresses: Addresses


class Watcher(threading.Thread):
    """Looks at one host again and again and remembers what changed. `names`: which names to resolve each time."""

    def __init__(self, view: HostView, names: Callable[[], Iterable[str]], period_s: float) -> None:
        super().__init__(name=f"watch-{view.host.name}", daemon=True)
        self.view = view
        self.sights: dict[Key, list[Sight]] = defaultdict(list)
        self.looked_at = 0.0
        """When the last look ended."""
        self._names = names
        self._period_s = period_s
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(self._period_s):
            # A namespace that goes, a table that is being replaced: the next look tells.
            with contextlib.suppress(OSError, NetlinkError):
                self._look()

    def stop(self) -> None:
        self._stopping.set()
        self.join(10)
        self.view.close()

    def _look(self) -> None:
        seen: dict[Key, Addresses] = {key: frozenset() for key in self.sights if key[0] != "name"}
        seen |= self.view.maps()
        for name in self._names():
            found = self.view.resolve(name)
            if found is not None:
                seen["name", name] = found
        self.looked_at = now = time.time()
        for key, addresses in seen.items():
            history = self.sights[key]
            if not history or history[-1].addresses != addresses:
                history.append(Sight(now, addresses))

    def serves(self, key: Key) -> Addresses:
        """As seen last."""
        history = self.sights.get(key)
        return history[-1].addresses if history else frozenset()
