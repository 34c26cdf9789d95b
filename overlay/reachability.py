"""Probes of a network: each from the namespace in which its socket is made, each with a deadline.

A socket stays in the namespace it was made in, so only the making runs on the namespace thread (`open_socket`).
"""

from __future__ import annotations

import array
import asyncio
import errno
import itertools
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from overlay.hostkernel import read_host
from proto.dispatch_pb2 import Connect, Ping, ProbeResult
from proto.objects_pb2 import SCTP, UDP

OpenSocket = Callable[[Callable[[], socket.socket]], Awaitable[socket.socket]]
"""Runs the function in the probe's namespace. Raises OSError, NetworkError."""

PING_TRIES = 2
PING_TRY_S = 0.8
"""Between hosts of one site an answer takes some milliseconds; a machine under load, some hundred."""
CONNECT_S = 2.5
"""The kernel repeats a lost SYN after 1 s: time for that, and for the answer."""
UDP_REFUSAL_S = 0.5
"""A port that nobody serves is refused at once; from one that is served nothing may ever come."""
_ICMP_HEADER_BYTES = 8
_identifiers = itertools.count(os.getpid())

Outcome = ProbeResult.Outcome


@dataclass(frozen=True, slots=True)
class Family:
    number: socket.AddressFamily
    header_bytes: int
    """Of an IP packet."""
    icmp: int
    request: int
    reply: int
    never_fragment: tuple[tuple[int, int, int], ...]
    """Socket options: never fragmented, and sent whatever the kernel has learned of the path so far."""
    shows_header: bool
    """Whether received packets begin with their IP header."""


_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE, _IPV6_DONTFRAG = 10, 23, 3, 62  # linux/in.h, linux/in6.h
IPV4 = Family(
    socket.AF_INET,
    20,
    socket.IPPROTO_ICMP,
    8,
    0,
    ((socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE),),
    True,
)
IPV6 = Family(
    socket.AF_INET6,
    40,
    socket.IPPROTO_ICMPV6,
    128,
    129,
    ((socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE), (socket.IPPROTO_IPV6, _IPV6_DONTFRAG, 1)),
    False,
)


def family_of(address: str) -> Family:
    return IPV6 if ":" in address else IPV4


def echo_request(family: Family, identifier: int, sequence: int, size_bytes: int) -> bytes:
    """The ICMP part of an IP packet of this size. Payloads differ, so an answer is to be the whole of its own."""
    header = struct.pack(">HH", identifier, sequence)
    payload = bytes((sequence + place) & 0xFF for place in range(size_bytes - family.header_bytes - _ICMP_HEADER_BYTES))
    # Of ICMPv6 the kernel computes it, which alone knows the source address that goes into it.
    checksum = _checksum(struct.pack(">BBH", family.request, 0, 0) + header + payload)
    return struct.pack(">BBH", family.request, 0, checksum) + header + payload


def _checksum(data: bytes) -> int:
    """RFC 1071, of any length."""
    words = array.array("H", data + b"\0" * (len(data) % 2))
    total = sum(words)
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return socket.htons(~total & 0xFFFF)


def answered(family: Family, packet: bytes, request: bytes) -> bool:
    """Whether what was received is the whole answer to that request."""
    message = packet[(packet[0] & 0xF) * 4 :] if packet and family.shows_header else packet
    return message[:1] == bytes([family.reply]) and message[4:] == request[4:]


async def ping(wanted: Ping, open_socket: OpenSocket, full_bytes: int = 0) -> ProbeResult:
    """`full_bytes`: what a full packet is; 0 = as the link of the socket's own address carries."""
    measured = full_bytes
    family = family_of(wanted.address)

    def make() -> socket.socket:
        nonlocal measured
        made = _socket(family, socket.SOCK_RAW, family.icmp)
        for option in family.never_fragment:
            made.setsockopt(*option)
        made.connect((wanted.address, 0))
        if wanted.full and not full_bytes:
            measured = read_host().mtu_of(made.getsockname()[0]) or 0
        return made

    try:
        opened = await open_socket(make)
    except OSError as error:
        return ProbeResult(outcome=outcome_of(error), detail=_words(error))
    with opened:
        sizes = {*wanted.sizes, *([measured] if wanted.full and measured else [])}
        identifier = next(_identifiers) & 0xFFFF
        requests = {size: echo_request(family, identifier, number, size) for number, size in enumerate(sorted(sizes))}
        detail = ""
        whole: set[int] = set()
        for _ in range(PING_TRIES):
            detail = _send(opened, [requests[size] for size in sorted(sizes - whole)]) or detail
            detail = await _collect(family, opened, requests, whole) or detail
            if whole == sizes:
                break
    outcome = Outcome.OK if whole else Outcome.UNREACHABLE if detail else Outcome.SILENT
    return ProbeResult(outcome=outcome, detail=detail, sizes=sorted(whole), full_size=measured if wanted.full else 0)


def _send(opened: socket.socket, requests: list[bytes]) -> str:
    """What the kernel refused, "" = nothing."""
    refusal = ""
    for request in requests:
        try:
            opened.send(request)
        except OSError as error:
            refusal = _words(error)
    return refusal


async def _collect(family: Family, opened: socket.socket, requests: dict[int, bytes], whole: set[int]) -> str:
    """Add the sizes answered until all are or the time is over; returns an error that arrived instead."""
    loop = asyncio.get_running_loop()
    refusal = ""
    try:
        async with asyncio.timeout(PING_TRY_S):
            while whole != requests.keys():
                try:
                    packet = await loop.sock_recv(opened, 1 << 16)
                except OSError as error:
                    refusal = _words(error)
                    continue
                whole |= {size for size, request in requests.items() if answered(family, packet, request)}
    except TimeoutError:
        pass
    return refusal


async def connect(wanted: Connect, open_socket: OpenSocket) -> ProbeResult:
    """TCP, SCTP: whether a connection is accepted; it is closed at once. UDP: whether an empty datagram is refused."""
    datagrams = wanted.protocol == UDP
    kind = socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM
    number = socket.IPPROTO_SCTP if wanted.protocol == SCTP else 0
    loop = asyncio.get_running_loop()
    address = (wanted.address, wanted.port)

    try:
        with await open_socket(lambda: _socket(family_of(wanted.address), kind, number)) as opened:
            async with asyncio.timeout(CONNECT_S):
                await loop.sock_connect(opened, address)
            if datagrams:
                opened.send(b"")
                async with asyncio.timeout(UDP_REFUSAL_S):
                    await loop.sock_recv(opened, 1)
    except TimeoutError:
        return ProbeResult(outcome=Outcome.OK if datagrams else Outcome.SILENT)
    except OSError as error:
        return ProbeResult(outcome=outcome_of(error), detail=_words(error))
    return ProbeResult(outcome=Outcome.OK)


def _socket(family: Family, kind: int, protocol: int) -> socket.socket:
    return socket.socket(family.number, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)


def outcome_of(error: OSError) -> ProbeResult.Outcome.ValueType:
    if error.errno in (errno.ECONNREFUSED, errno.ECONNRESET):
        return Outcome.REFUSED
    if error.errno in (errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EMFILE, errno.ENFILE):
        return Outcome.FAILED
    return Outcome.UNREACHABLE


def _words(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "a firewall rule of this host forbids it"
    return os.strerror(error.errno).lower() if error.errno else str(error)
