"""Questions taken apart and replies put together by hand: a few microseconds where a general library takes a hundred.

Names stay in their wire form (RFC 1035 3.1), in lower case: length bytes are below 64, so `bytes.lower` leaves them.
`tests/test_dns_message.py` holds all of this equal to dnslib.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

TTL_S = 1
"""Stale names are failures: short enough not to matter, long enough for a client's own burst."""
UDP_BYTES_MAX = 1232
"""Largest reply over UDP even if the client offers more: DNS flag day 2020, no fragmentation."""
UDP_BYTES_MIN = 512
"""RFC 1035: what every client takes."""
TCP_BYTES_MAX = 65535
NAME_BYTES_MAX = 255
LABEL_BYTES_MAX = 63

A, PTR, TXT, AAAA, SRV, OPT, ANY = 1, 12, 16, 28, 33, 41, 255
IN = 1
NOERROR, SERVFAIL, NXDOMAIN, REFUSED, BADVERS = 0, 2, 3, 5, 16
A_BYTES = 4
COOKIE_OPTION, COOKIE_BYTES, COOKIE_BYTES_MAX = 10, 8, 40  # RFC 7873

_QR, _OPCODE, _AA, _TC, _RD, _RA, _CD = 0x8000, 0x7800, 0x0400, 0x0200, 0x0100, 0x0080, 0x0010
HEADER_BYTES = 12
_HEADER = struct.Struct(">5H")  # flags and the four counts, after the ID
_PAIR = struct.Struct(">HH")
_RECORD = struct.Struct(">HHIH")
_OPT = struct.Struct(">BHHBBHH")
_DNSSEC_OK = 0x8000
_POINTER = 0xC0
_ASKED_NAME = b"\xc0\x0c"
"""The name of the question, at offset 12: replies keep the asker's spelling of it."""


class NotAQuestion(ValueError):
    """The packet is not one standard DNS query."""


class Edns(NamedTuple):
    udp_bytes: int
    version: int
    dnssec_ok: bool
    cookie: bytes
    """What the client sent of its cookie and ours; empty = none."""
    plain: bool
    """No options at all: the same question will come again, byte for byte."""


class Question(NamedTuple):
    name: bytes
    """Wire form, lower case."""
    qtype: int
    qclass: int
    section: bytes
    """Name as spelled, type and class."""
    flags: int
    edns: Edns | None


class Records(NamedTuple):
    """The part of a reply that does not depend on who asks and how."""

    answers: bytes = b""
    answer_count: int = 0
    additional: bytes = b""
    additional_count: int = 0

    def turned(self, number: int) -> Records:
        """The same with another answer first; all have to be of one size."""
        at = number % self.answer_count * (len(self.answers) // self.answer_count)
        return self._replace(answers=self.answers[at:] + self.answers[:at]) if at else self


def parse(packet: bytes) -> Question:
    """Raises NotAQuestion."""
    try:
        flags, questions, *others = _HEADER.unpack_from(packet, 2)
        if flags & (_QR | _OPCODE) or questions != 1:
            raise NotAQuestion("not one standard query")
        at = HEADER_BYTES
        while length := packet[at]:
            if length > LABEL_BYTES_MAX:
                raise NotAQuestion("a name that is not spelled out")
            at += length + 1
        end = at + 5
        qtype, qclass = _PAIR.unpack_from(packet, at + 1)
        if end - 4 - HEADER_BYTES > NAME_BYTES_MAX:
            raise NotAQuestion("a name longer than 255 bytes")
        edns = None
        if any(others):
            edns, rest = _find_edns(packet, end, others[0] + others[1], others[2])
        else:
            rest = end
    except (IndexError, struct.error):
        raise NotAQuestion("it ends too early") from None
    if rest != len(packet):
        raise NotAQuestion("something follows it")
    section = packet[HEADER_BYTES:end]
    return Question(section[:-4].lower(), qtype, qclass, section, flags, edns)


def _find_edns(packet: bytes, at: int, before: int, additional: int) -> tuple[Edns | None, int]:
    """The OPT record, and where the records end. Raises NotAQuestion, IndexError, struct.error."""
    edns: Edns | None = None
    for number in range(before + additional):
        start = at
        while length := packet[at]:
            if length & _POINTER:
                at += 1
                break
            at += length + 1
        rtype, rclass, ttl, size = _RECORD.unpack_from(packet, at + 1)
        data = at + 1 + _RECORD.size
        at = data + size
        if at > len(packet):
            raise NotAQuestion("a record that ends too early")
        if rtype == OPT:
            if edns is not None or packet[start] or number < before:
                raise NotAQuestion("an OPT record out of place")
            cookie = _find_cookie(packet[data:at])
            edns = Edns(rclass, ttl >> 16 & 0xFF, bool(ttl & _DNSSEC_OK), cookie, plain=not size)
    return edns, at


def _find_cookie(options: bytes) -> bytes:
    """Raises NotAQuestion, struct.error."""
    cookie, at = b"", 0
    while at < len(options):
        code, size = _PAIR.unpack_from(options, at)
        value = options[at + 4 : at + 4 + size]
        if len(value) < size:
            raise NotAQuestion("an option that ends too early")
        if code == COOKIE_OPTION:
            if size != COOKIE_BYTES and not 2 * COOKIE_BYTES <= size <= COOKIE_BYTES_MAX:
                raise NotAQuestion("a cookie of a wrong size")
            cookie = value
        at += 4 + size
    return cookie


def pack(
    question: Question, records: Records, rcode: int = NOERROR, *, tcp: bool = False, cookie: bytes = b""
) -> bytes:
    """The reply without its ID. What does not fit loses its additional records, then all: TC is set and the client
    comes back over TCP. `cookie`: the whole value of the option for the client."""
    edns = question.edns
    opt = b""
    limit = TCP_BYTES_MAX if tcp else UDP_BYTES_MIN
    if edns is not None:
        if not tcp:
            limit = max(UDP_BYTES_MIN, min(UDP_BYTES_MAX, edns.udp_bytes))
        option = _PAIR.pack(COOKIE_OPTION, len(cookie)) + cookie if cookie else b""
        opt = _OPT.pack(0, OPT, UDP_BYTES_MAX, rcode >> 4, 0, _DNSSEC_OK if edns.dnssec_ok else 0, len(option)) + option
    authority = _AA if rcode in (NOERROR, NXDOMAIN) else 0
    flags = _QR | _RA | authority | question.flags & (_RD | _CD) | rcode & 0xF
    room = limit - HEADER_BYTES - len(question.section) - len(opt)
    answers, count, additional, more = records
    if len(answers) + len(additional) > room:
        additional, more = b"", 0
        if len(answers) > room:
            answers, count, flags = b"", 0, flags | _TC
    counts = _HEADER.pack(flags, 1, count, 0, more + (edns is not None))
    return b"".join((counts, question.section, answers, additional, opt))


def record(rtype: int, data: bytes, owner: bytes = _ASKED_NAME) -> bytes:
    """One resource record; its owner is the name of the question unless another is given."""
    return owner + _RECORD.pack(rtype, IN, TTL_S, len(data)) + data


def to_wire(name: str) -> bytes | None:
    """The wire form, lower case, of a dotted name; None where it has none: nobody can ask for such a name."""
    labels = name.encode().lower().rstrip(b".").split(b".")  # ASCII letters only, as in questions
    if not all(0 < len(label) <= LABEL_BYTES_MAX for label in labels):
        return None
    wire = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    return wire if len(wire) <= NAME_BYTES_MAX else None


def labels_of(name: bytes) -> list[bytes]:
    """The labels of a name in wire form, without the root's."""
    labels, at = [], 0
    while length := name[at]:
        labels.append(name[at + 1 : at + 1 + length])
        at += length + 1
    return labels
