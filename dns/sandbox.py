"""The server's sockets inside one task's network namespace.

A socket belongs for ever to the namespace in which it was made, so the one thread that hops namespaces
only makes them; the event loop of the host's namespace then serves them all.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from dns.interface import LISTEN_ADDRESS, LISTEN_PORT

CLONE_NEWNET = 0x40000000  # linux/sched.h
PACKETS_PER_WAKE = 64
"""Drained before other sandboxes get their turn."""
TCP_CONNECTIONS_MAX = 32
"""Per task; a further one is closed at once."""
TCP_IDLE_S = 5.0
TCP_BACKLOG = 32

Ask = Callable[[bytes, bool], Awaitable[bytes | None]]
"""(packet, over TCP) -> reply or None (drop)."""
AnswerNow = Callable[[bytes], bytes | None]
"""Own answer over UDP without waiting; None = ask. Raises ValueError for garbage."""

_libc = ctypes.CDLL(None, use_errno=True)


def _sockets_in(netns_path: str) -> tuple[socket.socket, socket.socket]:
    """UDP and listening TCP socket on LISTEN_ADDRESS in that namespace. Runs in the hopping thread.
    Raises OSError."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
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
    return udp, tcp


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


class SandboxListener:
    """Serves one namespace until closed."""

    def __init__(self, netns_path: str, answer_now: AnswerNow, ask: Ask) -> None:
        self.netns_path = netns_path
        self.answer_now = answer_now
        self.ask = ask
        self._udp: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._under_way: set[asyncio.Task[None]] = set()
        self._connections = 0

    async def open(self, hopper: ThreadPoolExecutor) -> None:
        """Raises OSError when the namespace is gone or has no loopback up."""
        loop = asyncio.get_running_loop()
        udp, tcp = await loop.run_in_executor(hopper, _sockets_in, self.netns_path)
        self._udp = udp
        loop.add_reader(udp, self._readable)
        self._server = await asyncio.start_server(self._serve_tcp, sock=tcp)

    def close(self) -> None:
        if self._udp is not None:
            asyncio.get_running_loop().remove_reader(self._udp)
            self._udp.close()
        if self._server is not None:
            self._server.close()
        for task in list(self._under_way):
            task.cancel()

    def _readable(self) -> None:
        assert self._udp is not None
        for _ in range(PACKETS_PER_WAKE):
            try:
                packet, client = self._udp.recvfrom(4096)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of an earlier reply: the client is gone
            try:
                reply = self.answer_now(packet)
            except ValueError:
                continue  # no question: dropped
            if reply is not None:
                self._send(reply, client)
                continue
            task = asyncio.ensure_future(self._forward(packet, client))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _forward(self, packet: bytes, client: tuple[str, int]) -> None:
        reply = await self.ask(packet, False)
        if reply is not None:
            self._send(reply, client)

    def _send(self, reply: bytes, client: tuple[str, int]) -> None:
        assert self._udp is not None
        try:
            self._udp.sendto(reply, client)
        except OSError:
            return  # full buffer or vanished client: DNS clients repeat their question

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            while self._connections <= TCP_CONNECTIONS_MAX:
                async with asyncio.timeout(TCP_IDLE_S):
                    length = int.from_bytes(await reader.readexactly(2), "big")
                    packet = await reader.readexactly(length)
                reply = await self.ask(packet, True)
                if reply is None:
                    return
                writer.write(len(reply).to_bytes(2, "big") + reply)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            return  # idle, gone, or not speaking DNS
        finally:
            self._connections -= 1
            writer.close()
