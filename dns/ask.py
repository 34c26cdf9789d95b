"""A question to a task's name server, as the task would ask it: the doctor's way to see what names answer."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct
from collections.abc import Awaitable, Callable

from dnslib import QTYPE, RCODE, DNSError, DNSRecord

from dns.interface import LISTEN_ADDRESS

SERVER = (LISTEN_ADDRESS, 53)
TRIES = 2
TRY_S = 1.0
"""The server is on the same host and answers from memory."""
TCP_S = 2.0
ANSWER_BYTES_MAX = 65_535

OpenSocket = Callable[[Callable[[], socket.socket]], Awaitable[socket.socket]]
"""Runs the function in the task's namespace."""

_identifiers = itertools.count(os.getpid())


class NoAnswer(Exception):
    """Nothing that is an answer came in time."""


async def ask(
    name: str, open_socket: OpenSocket, ipv6: bool = False, server: tuple[str, int] = SERVER
) -> tuple[str, ...]:
    """The name's addresses of one family, sorted; none when it has none or does not exist. Raises NoAnswer, OSError."""
    kind = "AAAA" if ipv6 else "A"
    question = DNSRecord.question(name, kind)
    question.header.id = next(_identifiers) & 0xFFFF
    answer = await _over_udp(question, open_socket, server)
    if answer.header.tc:
        answer = await _over_tcp(question, open_socket, server)
    if answer.header.rcode not in (RCODE.NOERROR, RCODE.NXDOMAIN):
        raise NoAnswer(f"the name server answered {RCODE[answer.header.rcode]}")
    found = {str(record.rdata) for record in answer.rr if QTYPE[record.rtype] == kind}
    return tuple(sorted(found))


async def _over_udp(question: DNSRecord, open_socket: OpenSocket, server: tuple[str, int]) -> DNSRecord:
    loop = asyncio.get_running_loop()
    with await open_socket(lambda: _made(socket.SOCK_DGRAM)) as opened:
        await loop.sock_connect(opened, server)
        for _ in range(TRIES):
            opened.send(question.pack())
            try:
                async with asyncio.timeout(TRY_S):
                    while True:
                        answer = _parsed(await loop.sock_recv(opened, ANSWER_BYTES_MAX))
                        if answer is not None and answer.header.id == question.header.id:
                            return answer
            except TimeoutError:
                continue
    raise NoAnswer(f"no answer within {TRIES * TRY_S:g} s")


async def _over_tcp(question: DNSRecord, open_socket: OpenSocket, server: tuple[str, int]) -> DNSRecord:
    loop = asyncio.get_running_loop()
    message = question.pack()
    try:
        with await open_socket(lambda: _made(socket.SOCK_STREAM)) as opened:
            async with asyncio.timeout(TCP_S):
                await loop.sock_connect(opened, server)
                await loop.sock_sendall(opened, struct.pack(">H", len(message)) + message)
                size = struct.unpack(">H", await _exactly(opened, 2))[0]
                answer = _parsed(await _exactly(opened, size))
    except TimeoutError:
        raise NoAnswer(f"no answer over TCP within {TCP_S:g} s") from None
    if answer is None:
        raise NoAnswer("what came over TCP is no answer")
    return answer


def _made(kind: int) -> socket.socket:
    return socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


async def _exactly(opened: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        piece = await loop.sock_recv(opened, size - len(data))
        if not piece:
            raise NoAnswer("the name server closed the connection early")
        data += piece
    return data


def _parsed(data: bytes) -> DNSRecord | None:
    try:
        return DNSRecord.parse(data)
    except DNSError:
        return None
