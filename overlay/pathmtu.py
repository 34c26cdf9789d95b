"""How large a packet gets through to each peer: asked with echo requests that no router may fragment.

Where a router says what it takes (ICMP "fragmentation needed"), its word is tried; where one drops large packets in
silence, the size is narrowed down. What the kernel hears meanwhile it keeps for itself, too: its VXLAN devices then
tell tasks that send too much.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import structlog

from overlay.addressing import VXLAN_OVERHEAD_BYTES
from overlay.plan import MIN_MTU_BYTES

log = structlog.get_logger("overlay")

PROBE_PERIOD_S = 60.0
"""The kernel forgets what it heard of a path after 10 minutes; routes change more often."""
ROUND_S = 0.3
"""How long an answer may take: more than any path between hosts of one swarm."""
ATTEMPTS = 3
"""Echo requests of one size without an answer, before it counts as too large."""
PEERS_AT_ONCE = 128
"""Asked in one burst: 192 KB, and as much comes back."""
STEP_BYTES = 8
"""How precisely a size is narrowed down."""
FLOOR_BYTES = MIN_MTU_BYTES + VXLAN_OVERHEAD_BYTES
"""A path that passes less is of no use to an overlay: as if nobody answered."""
_HEADERS_BYTES = 28  # IPv4 20, ICMP 8
_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE, _IP_RECVERR = 10, 3, 11
_SOL_RAW, _ICMP_FILTER = 255, 1
_EMSGSIZE = 90


@dataclass(frozen=True, slots=True)
class Search:
    """What is known of one path: packets of `passes` bytes get through (0: not known of any), of `fails` do not."""

    passes: int
    fails: int
    trying: int
    """Bytes to try next; 0 = done."""
    silent: int = 0
    """Requests of that size without an answer."""

    def answered(self) -> Search:
        return _between(self.trying, self.fails)

    def told(self, mtu_bytes: int) -> Search:
        """A router takes no more than this."""
        if not FLOOR_BYTES <= mtu_bytes < self.trying:
            return self
        return Search(self.passes if self.passes <= mtu_bytes else 0, mtu_bytes + 1, mtu_bytes)

    def unanswered(self) -> Search:
        if self.silent + 1 < ATTEMPTS:
            return replace(self, silent=self.silent + 1)
        if self.passes:
            return _between(self.passes, self.trying)
        # Either large ones vanish, or nobody answers at all.
        return Search(0, self.trying, FLOOR_BYTES if self.trying > FLOOR_BYTES else 0)


def search(link_mtu_bytes: int) -> Search:
    """From the beginning: as a rule all that the link takes gets through."""
    return Search(0, link_mtu_bytes + 1, link_mtu_bytes)


def _between(passes: int, fails: int) -> Search:
    return Search(passes, fails, passes + (fails - passes) // 2 if fails - passes > STEP_BYTES else 0)


class PathProbe:
    """Made in the host's namespace (its socket stays there), then used by one thread at a time."""

    def __init__(self, identity: int) -> None:
        """`identity`: 16 bits that tell these requests from those of other programs. Raises OSError."""
        self._identity = identity
        self._stopped = False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMP)
        self._socket.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        self._socket.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        self._socket.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << _ECHO_REPLY) & 0xFFFFFFFF))
        self._socket.setblocking(False)

    def stop(self) -> None:
        """From any thread: `measure` returns within ROUND_S."""
        self._stopped = True

    def close(self) -> None:
        self._socket.close()

    def measure(self, peers: Sequence[str], link_mtu_bytes: int) -> dict[str, int]:
        """IPv4 address -> path MTU, of those that answer. Takes no time where all do, 2 s where one is silent, up to
        14 s where a router drops large packets in silence."""
        found = self._measure_once(peers, link_mtu_bytes)
        # One that was cut for a second while it was asked looks smaller than it is.
        doubtful = [peer for peer, passes in found.items() if passes < link_mtu_bytes]
        again = self._measure_once(doubtful, link_mtu_bytes)
        return found | {peer: max(found[peer], passes) for peer, passes in again.items()}

    def _measure_once(self, peers: Sequence[str], link_mtu_bytes: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for start in range(0, len(peers), PEERS_AT_ONCE):
            searches = dict.fromkeys(peers[start : start + PEERS_AT_ONCE], search(link_mtu_bytes))
            while any(path.trying for path in searches.values()) and not self._stopped:
                self._round(searches)
            found |= {peer: path.passes for peer, path in searches.items() if path.passes}
        return found

    def _round(self, searches: dict[str, Search]) -> None:
        """One request to each that is not done, and what comes of it."""
        waiting = {peer for peer, path in searches.items() if path.trying}
        for peer in waiting:
            self._ask(peer, searches[peer].trying)
        end_s = time.monotonic() + ROUND_S
        while waiting and (rest_s := end_s - time.monotonic()) > 0:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            poll.poll(rest_s * 1000)
            for peer, mtu_bytes in self._complaints():
                path = searches.get(peer)
                if path is not None and peer in waiting and path.told(mtu_bytes) != path:
                    searches[peer] = path.told(mtu_bytes)
                    waiting.remove(peer)
            for peer, size in self._answers():
                if peer in waiting and searches[peer].trying == size:
                    searches[peer] = searches[peer].answered()
                    waiting.remove(peer)
        for peer in waiting:
            searches[peer] = searches[peer].unanswered()

    def _ask(self, peer: str, size: int) -> None:
        """The size is the sequence number as well: the answer names it."""
        rest = (self._identity, size)
        header = struct.pack(">BBHHH", _ECHO_REQUEST, 0, checksum(_ECHO_REQUEST << 8, *rest), *rest)
        packet = header + bytes(max(size - _HEADERS_BYTES, 0))
        for _ in range(2):  # an error of an earlier request is reported by the next call, whatever its destination
            with contextlib.suppress(OSError):  # no route, or larger than the link: as one without an answer
                self._socket.sendto(packet, (peer, 0))
                return

    def _complaints(self) -> Iterable[tuple[str, int]]:
        """(whose path, its MTU)"""
        with contextlib.suppress(BlockingIOError):
            while True:
                _, control, _, address = self._socket.recvmsg(256, 256, socket.MSG_ERRQUEUE)
                for level, kind, data in control:
                    if (level, kind) == (socket.IPPROTO_IP, _IP_RECVERR):
                        error, _, _, _, _, mtu_bytes, _ = struct.unpack_from("=IBBBBII", data)
                        if error == _EMSGSIZE:
                            yield address[0], mtu_bytes

    def _answers(self) -> Iterable[tuple[str, int]]:
        """(who, size)"""
        while True:
            try:
                packet, address = self._socket.recvfrom(65536)
            except BlockingIOError:
                return
            except OSError:
                continue  # of an earlier request; the queue of errors says more
            header = (packet[0] & 15) * 4
            if len(packet) >= header + 8:
                kind, _, _, identity, size = struct.unpack_from(">BBHHH", packet, header)
                if (kind, identity) == (_ECHO_REPLY, self._identity):
                    yield address[0], size


class PathWatch:
    """Measures the paths in a thread of its own, again whenever the peers change and each PROBE_PERIOD_S."""

    def __init__(
        self,
        open_probe: Callable[[], PathProbe],
        learned: Callable[[dict[str, int]], None],
        clock: Callable[[], float],
    ) -> None:
        """`open_probe`, `learned` (peer -> path MTU) are called on that thread."""
        self._open_probe, self._learned, self._clock = open_probe, learned, clock
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pathmtu")
        self._probe: PathProbe | None = None
        self._under_way: Future[None] | None = None
        self._asked: tuple[frozenset[str], int] | None = None
        self._asked_at_s = 0.0

    def look(self, peers: Iterable[str], link_mtu_bytes: int) -> None:
        """Begin to measure if it is time to. Returns at once."""
        asked = (frozenset(peers), link_mtu_bytes)
        due = asked != self._asked or self._clock() - self._asked_at_s >= PROBE_PERIOD_S
        if due and (self._under_way is None or self._under_way.done()):
            self._asked, self._asked_at_s = asked, self._clock()
            self._under_way = self._executor.submit(self._measure, sorted(asked[0]), link_mtu_bytes)

    def _measure(self, peers: Sequence[str], link_mtu_bytes: int) -> None:
        try:
            if self._probe is None:
                self._probe = self._open_probe()
            self._learned(self._probe.measure(peers, link_mtu_bytes))
        except OSError as error:
            log.warning("path_mtu_not_measured", error=str(error))

    def close(self) -> None:
        if self._probe is not None:
            self._probe.stop()
        self._executor.shutdown(wait=True)
        if self._probe is not None:
            self._probe.close()


def checksum(*words: int) -> int:
    """RFC 1071, of 16-bit words."""
    total = sum(words)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
