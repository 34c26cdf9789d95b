"""Pure: a packet in, a packet out, or None where the question is not ours.

dnslib parses and packs (about 120 us); a cache keyed by the question's bytes, all but the ID, makes a
repeated question cost a dictionary lookup. The cache lives as long as the picture does.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from dnslib import CLASS, EDNS0, PTR, QTYPE, RCODE, RR, A, DNSError, DNSHeader, DNSRecord

from dns.names import TaskView

TTL_S = 1
"""Stale names are failures: short enough not to matter, long enough for a client's own burst."""
ROTATIONS = 8
"""Orders in which a list of addresses is handed out, in turn."""
CACHE_ENTRIES_MAX = 4096
"""Per view; random EDNS cookies would otherwise grow it without end."""
UDP_BYTES_MAX = 1232
"""Largest answer over UDP even if the client offers more: DNS flag day 2020, no fragmentation."""
UDP_BYTES_MIN = 512
"""RFC 1035: what every client takes."""
HEADER_BYTES = 12


class NotAQuestion(ValueError):
    """The packet is not one standard DNS query."""


@dataclass(slots=True)
class _Cached:
    bodies: tuple[bytes, ...]
    next: int = 0


class Responder:
    """Answers for all tasks that share one view."""

    def __init__(self, view: TaskView, seed: int = 0) -> None:
        self._view = view
        self._random = random.Random(seed)
        self._cache: dict[tuple[bytes, bool], _Cached] = {}

    def answer(self, packet: bytes, tcp: bool = False) -> bytes | None:
        """The reply; None = forward it. Raises NotAQuestion for what is none (drop it)."""
        cached = self._cache.get((packet[2:], tcp))
        if cached is None:
            bodies = self._build(packet, tcp)
            if bodies is None:
                return None
            cached = _Cached(bodies)
            if len(self._cache) >= CACHE_ENTRIES_MAX:
                self._cache.clear()
            self._cache[(packet[2:], tcp)] = cached
        body = cached.bodies[cached.next]
        cached.next = (cached.next + 1) % len(cached.bodies)
        return packet[:2] + body

    def _build(self, packet: bytes, tcp: bool) -> tuple[bytes, ...] | None:
        request = parse(packet)
        question = request.q
        if question.qclass != CLASS.IN:
            return None
        name = str(question.qname).rstrip(".").lower()
        if question.qtype == QTYPE.PTR:
            target = self._view.reverse(name)
            if target is None:
                return None if self._view.may_forward else (refusal(request, RCODE.NXDOMAIN)[2:],)
            records = [RR(question.qname, QTYPE.PTR, rdata=PTR(target), ttl=TTL_S)]
            return (_pack(request, records, tcp),)
        addresses = self._view.lookup(name)
        if addresses is None:
            return None if self._view.may_forward else (refusal(request, RCODE.NXDOMAIN)[2:],)
        if question.qtype not in (QTYPE.A, QTYPE.ANY):
            return (_pack(request, [], tcp),)  # the name exists, this type does not: NODATA
        order = list(addresses)
        self._random.shuffle(order)
        bodies: list[bytes] = []
        for turn in range(min(ROTATIONS, max(1, len(order)))):
            start = turn * len(order) // ROTATIONS if len(order) > ROTATIONS else turn
            turned = order[start:] + order[:start]
            records = [RR(question.qname, QTYPE.A, rdata=A(address), ttl=TTL_S) for address in turned]
            bodies.append(_pack(request, records, tcp))
        return tuple(bodies)


def parse(packet: bytes) -> DNSRecord:
    """A question, and nothing else. Raises NotAQuestion."""
    if len(packet) < HEADER_BYTES:
        raise NotAQuestion("shorter than a header")
    flags, questions = struct.unpack_from(">HH", packet, 2)
    if flags & 0x8000 or flags >> 11 & 0xF or questions != 1:
        raise NotAQuestion("not one standard query")
    try:
        return DNSRecord.parse(packet)
    except (DNSError, ValueError, IndexError, struct.error) as error:
        raise NotAQuestion(str(error)) from error


def _reply(request: DNSRecord) -> DNSRecord:
    header = DNSHeader(id=request.header.id, qr=1, aa=1, ra=1, rd=request.header.rd)
    reply = DNSRecord(header, q=request.q)
    if _edns_bytes(request):
        reply.add_ar(EDNS0(udp_len=UDP_BYTES_MAX))
    return reply


def _pack(request: DNSRecord, records: list[RR], tcp: bool) -> bytes:
    """The packed reply less its ID; with TC set and no records where it does not fit in UDP."""
    reply = _reply(request)
    reply.add_answer(*records)
    packed = bytes(reply.pack())
    limit = max(UDP_BYTES_MIN, min(UDP_BYTES_MAX, _edns_bytes(request)))
    if not tcp and len(packed) > limit:
        reply = _reply(request)
        reply.header.tc = 1
        packed = bytes(reply.pack())
    return packed[2:]


def _edns_bytes(request: DNSRecord) -> int:
    """The UDP size that the client offers (RFC 6891); 0 = no EDNS."""
    return next((int(rr.rclass) for rr in request.ar if rr.rtype == QTYPE.OPT), 0)


def refusal(request: DNSRecord, code: int) -> bytes:
    """An empty reply with this RCODE."""
    reply = _reply(request)
    reply.header.rcode = code
    return bytes(reply.pack())
