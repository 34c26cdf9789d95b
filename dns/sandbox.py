"""The server's sockets inside one task's network namespace.

A socket belongs for ever to the namespace in which it was made, so the one thread that hops namespaces
only makes them; the event loop of the host's namespace then serves them all.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections.abc import Sequence
from functools import partial

from dns.answer import NotAQuestion, Responder
from dns.datagrams import Client, Datagrams
from dns.forward import Forwarder
from dns.interface import LISTEN_ADDRESS, LISTEN_PORT, Sandbox

CLONE_NEWNET = 0x40000000  # linux/sched.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
RECEIVE_BUFFER_BYTES = 1 << 20
"""A burst of a thousand questions waits here for its turn; the kernel's default holds some 250."""
TCP_CONNECTIONS_MAX = 32
"""Per task; a further one is closed at once."""
TCP_IDLE_S = 5.0
TCP_ANSWER_S = 10.0
"""For the answer of other resolvers, and for a client that does not read."""
TCP_BACKLOG = 32

_libc = ctypes.CDLL(None, use_errno=True)


Sockets = tuple[socket.socket, socket.socket, int]
"""UDP, listening TCP, and the inode of the namespace that they are in."""


def sockets_in_each(netns_paths: Sequence[str]) -> list[Sockets | OSError]:
    """Sockets on LISTEN_ADDRESS in these namespaces, or why there are none: the namespace is gone or has no loopback
    up. Runs in the hopping thread."""
    found: list[Sockets | OSError] = []
    for path in netns_paths:
        try:
            found.append(_sockets_in(path))
        except OSError as error:
            found.append(error)
    return found


def _sockets_in(netns_path: str) -> Sockets:
    """Raises OSError."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            inode = os.fstat(there).st_ino
            _setns(there)
        finally:
            os.close(there)
        try:
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                udp.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
                udp.bind((LISTEN_ADDRESS, LISTEN_PORT))
                tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tcp.bind((LISTEN_ADDRESS, LISTEN_PORT))
                tcp.listen(TCP_BACKLOG)
            except OSError:
                udp.close()
                tcp.close()
                raise
        finally:
            _setns(home)
    finally:
        os.close(home)
    return udp, tcp, inode


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


class SandboxListener:
    """Serves one namespace until closed."""

    def __init__(
        self,
        sandbox: Sandbox,
        responder: Responder,
        upstreams: Sequence[str],
        forwarder: Forwarder,
        datagrams: Datagrams,
    ) -> None:
        self.responder = responder
        self.upstreams = upstreams
        self._task_id = sandbox.task_id
        self._netns_path = sandbox.netns_path
        self._forwarder = forwarder
        self._datagrams = datagrams
        self._udp: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._inode = 0
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self, sockets: Sockets) -> None:
        self._udp, tcp, self._inode = sockets
        # By its number: asyncio would first make a KeyError with the socket's description, for 50 us.
        asyncio.get_running_loop().add_reader(self._udp.fileno(), self._readable)
        self._server = await asyncio.start_server(self._serve_tcp, sock=tcp)

    def is_in(self, netns_path: str) -> bool:
        """Whether it listens in the namespace that is there now: another one may have taken over the path."""
        try:
            return netns_path == self._netns_path and os.stat(netns_path).st_ino == self._inode
        except OSError:
            return False

    def close(self) -> None:
        if self._udp is not None:
            asyncio.get_running_loop().remove_reader(self._udp.fileno())
            self._udp.close()
            self._udp = None
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()

    def _readable(self) -> None:
        if self._udp is not None:
            self._datagrams.serve(self._udp.fileno(), self.responder.replies, self._answer)

    def _answer(self, packet: bytes, number: int) -> bytes | None:
        try:
            reply = self.responder.answer(packet)
            if reply is None:
                client = self._datagrams.client(number)
                self._forwarder.ask(packet, self.upstreams, self._task_id, False, partial(self._send, client))
        except NotAQuestion:
            return None
        return reply

    def _send(self, client: Client, reply: bytes) -> None:
        if self._udp is None:
            return
        try:
            self._udp.sendto(reply, client)
        except OSError:
            return  # full buffer or vanished client: DNS clients repeat their question

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while len(self._connections) <= TCP_CONNECTIONS_MAX:
                async with asyncio.timeout(TCP_IDLE_S):
                    length = int.from_bytes(await reader.readexactly(2), "big")
                    packet = await reader.readexactly(length)
                async with asyncio.timeout(TCP_ANSWER_S):
                    reply = await self._answer_tcp(packet)
                    writer.write(len(reply).to_bytes(2, "big") + reply)
                    await writer.drain()
        except (OSError, TimeoutError, EOFError, NotAQuestion):
            return  # idle, gone, or not speaking DNS
        except asyncio.CancelledError:
            return  # `close`; see server.py
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer_tcp(self, packet: bytes) -> bytes:
        """Raises NotAQuestion, TimeoutError."""
        reply = self.responder.answer(packet, tcp=True)
        if reply is not None:
            return reply
        found: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def deliver(answer: bytes) -> None:
            if not found.done():
                found.set_result(answer)

        if not self._forwarder.ask(packet, self.upstreams, self._task_id, True, deliver):
            raise TimeoutError("too much is under way")
        return await found
