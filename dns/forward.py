"""Forwarding: what is not ours is asked of the host's resolvers and relayed whole.

Each question leaves from a socket of its own (a random port) with a random ID, so that an answer cannot
be forged by guessing one number; the client's ID is put back on the way.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

TIMEOUT_S = 2.0
"""Per resolver; three resolvers stay within the 5 s after which glibc repeats its question, nearly."""
CONCURRENT_MAX = 1024
"""As in the reference; beyond it questions are dropped and the client repeats them."""
RESOLVERS_MAX = 3
"""As in resolv.conf(5)."""
SERVFAIL, NXDOMAIN_OR_BETTER = 2, (0, 3)


class _Exchange(asyncio.DatagramProtocol):
    def __init__(self, ident: bytes) -> None:
        self._ident = ident
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if data[:2] == self._ident and not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


class Forwarder:
    def __init__(self) -> None:
        self._under_way = 0

    async def ask(self, packet: bytes, resolvers: Sequence[str], tcp: bool = False) -> bytes | None:
        """The first useful answer, under the client's ID; None when too much is under way (drop it).
        Resolvers that fail, refuse or time out are followed by the next; the last failure is relayed."""
        if self._under_way >= CONCURRENT_MAX:
            return None
        self._under_way += 1
        try:
            failure = packet[:2] + bytes([packet[2] | 0x80, 0x80 | SERVFAIL]) + packet[4:]
            for resolver in list(resolvers)[:RESOLVERS_MAX]:
                host, port = split(resolver)
                ident = secrets.token_bytes(2)
                question = ident + packet[2:]
                try:
                    async with asyncio.timeout(TIMEOUT_S):
                        answer = await (_ask_tcp if tcp else _ask_udp)(question, host, port)
                except (OSError, TimeoutError, asyncio.IncompleteReadError):
                    continue
                if len(answer) >= 12:
                    if answer[3] & 0xF in NXDOMAIN_OR_BETTER:
                        return packet[:2] + answer[2:]
                    failure = packet[:2] + answer[2:]
            return failure
        finally:
            self._under_way -= 1


async def _ask_udp(question: bytes, host: str, port: int) -> bytes:
    loop = asyncio.get_running_loop()
    transport, exchange = await loop.create_datagram_endpoint(lambda: _Exchange(question[:2]), remote_addr=(host, port))
    try:
        transport.sendto(question)
        return await exchange.answer
    finally:
        transport.close()


async def _ask_tcp(question: bytes, host: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(len(question).to_bytes(2, "big") + question)
        length = int.from_bytes(await reader.readexactly(2), "big")
        return await reader.readexactly(length)
    finally:
        writer.close()


def split(resolver: str) -> tuple[str, int]:
    """ "10.0.0.2", "10.0.0.2:5353", "fd00::1" or "[fd00::1]:5353" as (host, port)."""
    if resolver.startswith("["):
        host, _, port = resolver[1:].partition("]")
        return host, int(port.lstrip(":") or 53)
    if resolver.count(":") == 1:
        host, port = resolver.split(":")
        return host, int(port)
    return resolver, 53
