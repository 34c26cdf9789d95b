"""What a lab's host serves at this moment: the balancers' maps in its kernel, and its name server's answers, as one of
its tasks gets them. Nothing is asked of the agent."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dnslib import DNSRecord

from overlay import nfnl
from overlay.addressing import host_table
from overlay.elements import BACKENDS
from overlay.netlink import NETLINK_NETFILTER, Netlink, NetlinkError
from overlay.ruleset import TASK_TABLE
from swarm.daemon import TAG_CHARS
from swarm.lab.plan import Host
from tests.overlay_lab import Sockets

RESOLVER = ("127.0.0.11", 53)
ANSWER_TIMEOUT_S = 1.0
"""An answer takes well below a millisecond; after this the name server counts as silent."""
_A_RECORD = re.compile(rb"\xc0.\x00\x01\x00\x01.{4}\x00\x04(.{4})", re.DOTALL)

Key = tuple[str, str]
"""("published", port), ("vip", address) or ("name", name)"""
Addresses = frozenset[str]
Served = Mapping[Key, Addresses]


class _Inside:
    """Sockets in the namespace of one task."""

    def __init__(self, sockets: Sockets, netns: Path) -> None:
        self.netlink = sockets.inside(netns, lambda: Netlink(NETLINK_NETFILTER))
        self.udp = sockets.open(netns, socket.SOCK_DGRAM)
        self.udp.settimeout(ANSWER_TIMEOUT_S)
        self.udp.connect(RESOLVER)
        self.netns, self._inode = netns, netns.stat().st_ino

    def exists(self) -> bool:
        """Sockets keep a namespace alive whose task is long gone."""
        try:
            return self.netns.stat().st_ino == self._inode
        except OSError:
            return False

    def close(self) -> None:
        self.netlink.close()
        self.udp.close()


class HostView:
    """Reads one host, from its own namespace and, after `look_from`, that of one of its tasks. One thread at a time."""

    def __init__(self, sockets: Sockets, host: Host, node_id: str) -> None:
        self.host = host
        self._sockets = sockets
        self._table = host_table(node_id[:TAG_CHARS])
        self._netlink = sockets.inside(host.netns_path, lambda: Netlink(NETLINK_NETFILTER))
        self._inside: _Inside | None = None
        self._questions: dict[str, bytes] = {}
        self._known: dict[str, tuple[int, dict[Key, Addresses]]] = {}
        """Kind -> (generation, the map as it was then)."""

    def close(self) -> None:
        self._netlink.close()
        self._leave()

    def look_from(self, netns: Path) -> None:
        """Nothing happens if it does already. Raises OSError when there is no such namespace."""
        if self.is_inside() and self._inside is not None and self._inside.netns == netns:
            return
        self._leave()
        self._inside = _Inside(self._sockets, netns)

    def _leave(self) -> None:
        if self._inside is not None:
            self._inside.close()
            self._inside = None
        self._known.pop("vip", None)

    def is_inside(self) -> bool:
        """Whether the task from whose namespace it looks is still there."""
        if self._inside is not None and not self._inside.exists():
            self._leave()
        return self._inside is not None

    def _there(self) -> _Inside:
        """Raises OSError when there is no task to look from."""
        if self._inside is None:
            raise OSError(f"{self.host.name} has no task to look from")
        return self._inside

    def published(self) -> Served:
        """Port -> backends, in the host's kernel."""
        return self._map("published", self._netlink, self._table, lambda key: str(int.from_bytes(key[4:6], "big")))

    def vips(self) -> Served:
        """VIP -> backends, in the namespace of the task."""
        return self._map("vip", self._there().netlink, TASK_TABLE, lambda key: socket.inet_ntoa(key[:4]))

    def _map(self, kind: str, netlink: Netlink, table: str, name: Callable[[bytes], str]) -> Served:
        """Read again only when the kernel says that something in the namespace has changed."""
        generation = nfnl.generation(netlink)
        if self._known.get(kind, (-1, {}))[0] != generation:
            found: dict[Key, set[str]] = defaultdict(set)
            for (_, _, key), value in nfnl.elements(netlink, socket.AF_INET, table, [BACKENDS]).items():
                assert isinstance(value, bytes)
                found[kind, name(key)].add(socket.inet_ntoa(value[:4]))
            self._known[kind] = generation, {key: frozenset(addresses) for key, addresses in found.items()}
        return self._known[kind][1]

    def tcp_socket(self) -> socket.socket:
        """A TCP socket in the task's namespace."""
        return self._sockets.open(self._there().netns, socket.SOCK_STREAM)

    def resolve(self, name: str) -> Addresses | None:
        """A records, as the task gets them; None when the name server is silent."""
        udp = self._there().udp
        question = self._questions.get(name)
        if question is None:
            question = self._questions[name] = bytes(DNSRecord.question(name).pack())
        try:
            udp.send(question)
            while True:
                answer = udp.recv(4096)
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


@dataclass(slots=True)
class Spans:
    """When something was the case: (from, until), Unix s."""

    ended: list[tuple[float, float]] = field(default_factory=list)
    since: float | None = None

    def note(self, holds: bool) -> None:
        """As it is now."""
        if holds and self.since is None:
            self.since = time.time()
        elif not holds and self.since is not None:
            self.ended.append((self.since, time.time()))
            self.since = None

    def drop(self) -> None:
        """What is the case now was nothing."""
        self.since = None


class Watcher(threading.Thread):
    """Looks at one host again and again and remembers what changed. `names`: which names to resolve each time."""

    def __init__(self, view: HostView, names: Callable[[], Iterable[str]], period_s: float) -> None:
        super().__init__(name=f"watch-{view.host.name}", daemon=True)
        self.view = view
        self.sights: dict[Key, list[Sight]] = defaultdict(list)
        self.lock = threading.Lock()
        """Held while it looks: whoever else uses the view takes it."""
        self.blind = Spans()
        """No task to look from."""
        self.silent = Spans()
        """The name server did not answer, and then did."""
        self.failure = ""
        """Of the last look; "" = it could see everything."""
        self._names = names
        self._period_s = period_s
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(self._period_s):
            try:
                with self.lock:
                    self._look()
            except (OSError, NetlinkError) as error:
                self.failure = str(error)  # a namespace that goes, a table that is being replaced: the next look tells
            else:
                self.failure = ""

    def stop(self) -> None:
        self._stopping.set()
        self.join(10)
        self.view.close()

    def _look(self) -> None:
        self._note("published", self.view.published())
        self.blind.note(not self.view.is_inside())
        if not self.view.is_inside():
            self.silent.drop()  # in a namespace on its way out
            return
        self._note("vip", self.view.vips())
        found: dict[Key, Addresses] = {}
        addresses: Addresses | None = frozenset()
        for name in self._names():
            addresses = self.view.resolve(name)
            if addresses is None:
                break  # each further name would cost ANSWER_TIMEOUT_S
            found["name", name] = addresses
        else:
            self._note("name", found, gone=False)
        self.silent.note(addresses is None)

    def _note(self, kind: str, seen: Served, gone: bool = True) -> None:
        """`gone`: a key that is not there serves nothing."""
        now = time.time()
        missing: Served = {key: frozenset() for key in self.sights if key[0] == kind and key not in seen and gone}
        for key, addresses in {**seen, **missing}.items():
            history = self.sights[key]
            if not history or history[-1].addresses != addresses:
                history.append(Sight(now, addresses))

    def sees(self) -> str:
        """In words, how well."""
        state = "has no task to look from" if self.blind.since else "gets no names" if self.silent.since else "sees all"
        return f"{self.view.host.name} {state}{self.failure and ': '}{self.failure}"

    def serves(self, key: Key) -> Addresses:
        """As seen last."""
        history = self.sights.get(key)
        return history[-1].addresses if history else frozenset()
