"""Forwarding: what is not ours is asked of the host's resolvers, from the host's namespace, and relayed whole.

A question leaves with a random ID from a random port, and an answer has to come from that resolver, to that port, with
that ID and question, so that it cannot be forged by guessing one number. A question that is under way already is not
sent again: its answer serves all who wait. So a loop (a resolver of the host that is itself a task which forwards to
us) ends after one round.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import secrets
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from dns.message import HEADER_BYTES, NOERROR, NXDOMAIN, SERVFAIL, Question, Records, pack, parse

TIMEOUT_S = 2.0
"""Per resolver; three resolvers stay within the 5 s after which glibc repeats its question, nearly."""
DEAD_S = 10.0
"""For so long a resolver that said nothing comes last: only the first question after its death waits for it."""
CONCURRENT_MAX = 1024
"""Askers that wait, as in the reference; beyond it questions are dropped and the client repeats them."""
CONCURRENT_PER_TASK_MAX = 256
"""So that one task which floods leaves room for the others."""
RESOLVERS_MAX = 3
"""As in resolv.conf(5)."""
PORTS_MAX = 32
"""Per resolver: sockets in use at once; beyond them several questions share one."""
PORT_USES_MAX = 16
"""Then it makes way for another random port."""
ANSWERS_PER_WAKE = 64
ANSWER_BYTES_MAX = 65535

Deliver = Callable[[bytes], None]
_Key = tuple[bytes, tuple[str, ...], bool]
"""Question less its ID, resolvers, over TCP."""


class _Flight:
    """One question under way, and who waits for its answer."""

    def __init__(self, key: _Key, question: Question, untried: Iterable[_Resolver]) -> None:
        self.key = key
        self.body, _, self.tcp = key
        self.section = question.section.lower()
        self.untried = deque(untried)
        self.failure = pack(question, Records(), SERVFAIL)
        """Less its ID, as all answers here."""
        self.waiting: list[tuple[bytes, str, Deliver]] = []


class _Port:
    """One UDP socket, connected to one resolver."""

    def __init__(self, resolver: _Resolver) -> None:
        """Raises OSError."""
        family = socket.AF_INET6 if ":" in resolver.host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.pending: dict[bytes, tuple[_Flight, asyncio.TimerHandle]] = {}
        self.uses = 0
        self._resolver = resolver
        try:
            self.socket.connect((resolver.host, resolver.port))
        except OSError:
            self.socket.close()
            raise
        resolver.loop.add_reader(self.socket.fileno(), self._readable)

    def close(self) -> None:
        self._resolver.loop.remove_reader(self.socket.fileno())
        self.socket.close()
        pending, self.pending = self.pending, {}
        for flight, timer in pending.values():
            timer.cancel()
            self._resolver.ended(flight, None)

    def send(self, flight: _Flight) -> None:
        """Raises OSError."""
        ident = secrets.token_bytes(2)
        while ident in self.pending:
            ident = secrets.token_bytes(2)
        self.uses += 1
        self.socket.send(ident + flight.body)
        resolver = self._resolver
        timer = resolver.loop.call_later(TIMEOUT_S, self._timed_out, ident, resolver.loop.time())
        self.pending[ident] = flight, timer

    def _readable(self) -> None:
        for _ in range(ANSWERS_PER_WAKE):
            try:
                answer = self.socket.recv(ANSWER_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:  # refused: nobody listens there
                self._resolver.is_dead()
                for ident in list(self.pending):
                    self._end(ident)
                return
            ident = answer[:2]
            if ident in self.pending and _answers(answer, self.pending[ident][0].section):
                self._end(ident, answer)
                if self.socket.fileno() < 0:
                    return

    def _timed_out(self, ident: bytes, sent_at_s: float) -> None:
        if self._resolver.answered_at_s < sent_at_s:
            self._resolver.is_dead()
        self._end(ident)

    def _end(self, ident: bytes, answer: bytes | None = None) -> None:
        flight, timer = self.pending.pop(ident)
        timer.cancel()
        if not self.pending:
            self._resolver.free(self)
        self._resolver.ended(flight, answer)


class _Resolver:
    def __init__(
        self, address: str, loop: asyncio.AbstractEventLoop, ended: Callable[[_Flight, bytes | None], None]
    ) -> None:
        """Raises ValueError."""
        self.host, self.port = split(address)
        self.loop = loop
        self.dead_until_s = 0.0
        self.answered_at_s = 0.0
        self._closed = False
        self._ports: list[_Port] = []
        self._idle: list[_Port] = []
        self._ended = ended

    def is_dead(self) -> None:
        self.dead_until_s = self.loop.time() + DEAD_S

    def ended(self, flight: _Flight, answer: bytes | None) -> None:
        if answer is not None:
            self.answered_at_s, self.dead_until_s = self.loop.time(), 0.0
        self._ended(flight, answer)

    def send(self, flight: _Flight) -> None:
        """Raises OSError."""
        if self._closed:
            raise OSError("this resolver is asked no more")
        if self._idle:
            port = self._idle.pop(random.randrange(len(self._idle)))
        elif len(self._ports) < PORTS_MAX:
            port = _Port(self)
            self._ports.append(port)
        else:
            port = random.choice(self._ports)
        try:
            port.send(flight)
        except OSError:
            if not port.pending:
                self.free(port)
            raise

    def free(self, port: _Port) -> None:
        if port.uses < PORT_USES_MAX:
            self._idle.append(port)
        else:
            self._ports.remove(port)
            port.close()

    async def ask_tcp(self, body: bytes) -> bytes:
        """Raises OSError, TimeoutError, EOFError."""
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(self.host, self.port)
            try:
                question = secrets.token_bytes(2) + body
                writer.write(len(question).to_bytes(2, "big") + question)
                length = int.from_bytes(await reader.readexactly(2), "big")
                return await reader.readexactly(length)
            finally:
                writer.close()

    def close(self) -> None:
        """Whoever waits goes on to the next resolver."""
        self._closed = True
        for port in self._ports:
            port.close()


class Forwarder:
    def __init__(self) -> None:
        self._resolvers: dict[str, _Resolver] = {}
        self._flights: dict[_Key, _Flight] = {}
        self._waiting = 0
        self._waiting_of: Counter[str] = Counter()
        self._tcp_tasks: set[asyncio.Task[None]] = set()

    def ask(self, packet: bytes, resolvers: Sequence[str], task_id: str, tcp: bool, deliver: Deliver) -> bool:
        """`deliver` gets the first useful answer, under the asker's ID. Resolvers that fail, refuse or time out are
        followed by the next; the last failure is relayed, and SERVFAIL where nobody can be asked. False: too much is
        under way, drop it. Raises NotAQuestion."""
        if self._waiting >= CONCURRENT_MAX or self._waiting_of[task_id] >= CONCURRENT_PER_TASK_MAX:
            return False
        key = (packet[2:], tuple(resolvers), tcp)
        flight = self._flights.get(key)
        asked = flight is not None
        if flight is None:
            flight = self._flights[key] = _Flight(key, parse(packet), self._in_order(resolvers))
        flight.waiting.append((packet[:2], task_id, deliver))
        self._waiting += 1
        self._waiting_of[task_id] += 1
        if not asked:
            self._ask_next(flight)
        return True

    def retain(self, addresses: Iterable[str]) -> None:
        """No other resolver will be asked from now on."""
        for address in self._resolvers.keys() - set(addresses):
            self._resolvers.pop(address).close()

    def close(self) -> None:
        self.retain(())
        for task in self._tcp_tasks:
            task.cancel()

    def _in_order(self, addresses: Sequence[str]) -> list[_Resolver]:
        """As given, the dead ones last."""
        loop = asyncio.get_running_loop()
        found: list[_Resolver] = []
        for address in addresses[:RESOLVERS_MAX]:
            if address not in self._resolvers:
                try:
                    self._resolvers[address] = _Resolver(address, loop, self._ended)
                except ValueError:
                    continue  # no address: there is nobody to ask
            found.append(self._resolvers[address])
        return sorted(found, key=lambda resolver: resolver.dead_until_s > loop.time())

    def _ask_next(self, flight: _Flight) -> None:
        while flight.untried:
            resolver = flight.untried.popleft()
            if flight.tcp:
                task = asyncio.ensure_future(self._ask_tcp(resolver, flight))
                self._tcp_tasks.add(task)
                task.add_done_callback(self._tcp_tasks.discard)
                return
            try:
                resolver.send(flight)
            except OSError:
                resolver.is_dead()
            else:
                return
        self._land(flight, flight.failure)

    async def _ask_tcp(self, resolver: _Resolver, flight: _Flight) -> None:
        answer: bytes | None = None
        try:
            answer = await resolver.ask_tcp(flight.body)
        except (OSError, TimeoutError, EOFError):
            resolver.is_dead()
        if answer is not None and not _answers(answer, flight.section):
            answer = None
        resolver.ended(flight, answer)

    def _ended(self, flight: _Flight, answer: bytes | None) -> None:
        if answer is not None:
            if answer[3] & 0xF in (NOERROR, NXDOMAIN):
                self._land(flight, answer[2:])
                return
            flight.failure = answer[2:]
        self._ask_next(flight)

    def _land(self, flight: _Flight, body: bytes) -> None:
        del self._flights[flight.key]
        for ident, task_id, deliver in flight.waiting:
            self._waiting -= 1
            self._waiting_of[task_id] -= 1
            if not self._waiting_of[task_id]:
                del self._waiting_of[task_id]
            deliver(ident + body)


def _answers(packet: bytes, section: bytes) -> bool:
    """Whether this is a reply to the question; one that reports an error may come without it."""
    if len(packet) < HEADER_BYTES or not packet[2] & 0x80:
        return False
    if packet[4:6] == b"\0\0" and packet[3] & 0xF:
        return True
    return packet[HEADER_BYTES : HEADER_BYTES + len(section)].lower() == section


def split(resolver: str) -> tuple[str, int]:
    """ "10.0.0.2", "10.0.0.2:5353", "fd00::1" or "[fd00::1]:5353" as (host, port). Raises ValueError."""
    host, port = resolver, "53"
    if resolver.startswith("["):
        host, _, port = resolver[1:].partition("]")
        port = port.lstrip(":") or "53"
    elif resolver.count(":") == 1:
        host, port = resolver.split(":")
    ipaddress.ip_address(host.partition("%")[0])
    return host, int(port)
