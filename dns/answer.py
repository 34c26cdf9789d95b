"""Pure: a packet in, a packet out, or None where the question is not ours.

Two caches, gone with the next change of a name in sight: records by name and type, for every spelling, EDNS option and
transport; and whole replies by the question's bytes less its ID, which the server looks up without parsing. A reply is
kept there when its name is asked for a second time.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from collections.abc import Callable, Iterator

from dns.message import (
    A_BYTES,
    AAAA,
    ANY,
    BADVERS,
    COOKIE_BYTES,
    IN,
    NXDOMAIN,
    PTR,
    REFUSED,
    SRV,
    A,
    NotAQuestion,
    Question,
    Records,
    pack,
    parse,
    record,
)
from dns.names import Holder, Target, TaskView

__all__ = ["CacheBudget", "NotAQuestion", "Responder"]

ROTATIONS = 8
"""Orders of a list of addresses that are packed ahead."""
A_RECORD_BYTES, AAAA_RECORD_BYTES = 16, 28
ADDRESSES_MAX = 1400
"""Per answer and family: both together fit in 65,535 bytes of TCP."""
CACHE_BYTES_MAX = 32 << 20
"""Of all views of a host: some 70,000 entries. A task that fills it on purpose costs the others a few us a question."""
ENTRY_BYTES = 400
"""What an entry takes beside its key and its value: dictionary, tuples, iterator."""
SRV_PRIORITY, SRV_WEIGHT = 0, 1
"""RFC 2782: equal targets are chosen at random."""
KEPT_TYPES = frozenset({A, AAAA, PTR, SRV, ANY})
"""What applications ask for; the other 65,531 types would only fill the cache."""

_SRV_DATA = struct.Struct(">HHH")
_NOTHING = Records()


class CacheBudget:
    """Bytes that all caches together may take; when they are used up, all are emptied."""

    def __init__(self, bytes_max: int = CACHE_BYTES_MAX) -> None:
        self.used_bytes = 0
        self._bytes_max = bytes_max
        self._owners: dict[int, Callable[[], None]] = {}

    def join(self, owner: object, forget: Callable[[], None]) -> None:
        self._owners[id(owner)] = forget

    def leave(self, owner: object) -> None:
        forget = self._owners.pop(id(owner))
        forget()

    def take(self, size_bytes: int) -> None:
        """Before something of this size is kept."""
        if self.used_bytes + size_bytes > self._bytes_max:
            for forget in self._owners.values():
                forget()
        self.used_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self.used_bytes -= size_bytes


class _Kept:
    """Records of one name and type, and whose turn it is."""

    __slots__ = ("records", "rotates", "turn")

    def __init__(self, records: Records, rotates: bool, turn: int) -> None:
        self.records = records
        self.rotates = rotates
        self.turn = turn

    def next(self) -> Records:
        if not self.rotates:
            return self.records
        self.turn += 1
        return self.records.turned(self.turn)


class Responder:
    """Answers for all tasks that share one view."""

    def __init__(self, view: TaskView, budget: CacheBudget, seed: int = 0, cookie_key: bytes = b"") -> None:
        """`cookie_key`: a secret of this process, at most 64 bytes; with it cookies are answered (RFC 7873)."""
        self.view = view
        self.replies: dict[bytes, bytes | Iterator[bytes]] = {}
        """Question over UDP less its ID -> replies less their ID, in turn."""
        self._records: dict[tuple[bytes, int], _Kept] = {}
        self._random = random.Random(seed)
        self._cookie_key = cookie_key
        self._budget = budget
        self._kept_bytes = 0
        budget.join(self, self.forget)

    def forget(self) -> None:
        """A name in sight has changed."""
        self.replies.clear()
        self._records.clear()
        self._budget.give_back(self._kept_bytes)
        self._kept_bytes = 0

    def close(self) -> None:
        self._budget.leave(self)

    def answer(self, packet: bytes, tcp: bool = False) -> bytes | None:
        """The reply; None = forward it. Raises NotAQuestion for what is none (drop it)."""
        question = parse(packet)
        name, qtype, qclass, section, _, edns = question
        if qclass not in (IN, ANY):
            return packet[:2] + pack(question, _NOTHING, REFUSED, tcp=tcp)
        if edns is not None and edns.version:
            return packet[:2] + pack(question, _NOTHING, BADVERS, tcp=tcp)
        cookie = self._cookie(edns.cookie) if edns is not None and edns.cookie else b""
        kept = self._records.get((name, qtype))
        if kept is None:
            records = self._find(name, qtype)
            if records is None:
                if self.view.may_forward:
                    return None
                return packet[:2] + pack(question, _NOTHING, NXDOMAIN, tcp=tcp, cookie=cookie)
            rotates = records.answer_count > 1 and qtype in (A, AAAA)
            kept = _Kept(records, rotates, self._random.getrandbits(16) if rotates else 0)
            if qtype in KEPT_TYPES:
                self._take(len(name) + len(records.answers) + len(records.additional))
                self._records[name, qtype] = kept
        elif not tcp and section.startswith(name) and (edns is None or edns.plain):
            self._keep_replies(packet[2:], question, kept)
        return packet[:2] + pack(question, kept.next(), tcp=tcp, cookie=cookie)

    def _keep_replies(self, key: bytes, question: Question, kept: _Kept) -> None:
        """All orders of the addresses, or the next few: once those are handed out the question comes here again."""
        orders = kept.records.answer_count if kept.rotates else 1
        bodies = [pack(question, kept.next()) for _ in range(min(orders, ROTATIONS))]
        if key not in self.replies:
            self._take(len(key) + sum(map(len, bodies)))
        if orders == 1:
            self.replies[key] = bodies[0]
        else:
            self.replies[key] = itertools.cycle(bodies) if orders <= ROTATIONS else iter(bodies)

    def _take(self, size_bytes: int) -> None:
        self._budget.take(size_bytes + ENTRY_BYTES)
        self._kept_bytes += size_bytes + ENTRY_BYTES

    def _cookie(self, sent: bytes) -> bytes:
        client = sent[:COOKIE_BYTES]
        return client + hashlib.blake2b(client, key=self._cookie_key, digest_size=COOKIE_BYTES).digest()

    def _find(self, name: bytes, qtype: int) -> Records | None:
        """None: nothing of ours has this name. Without answers: it exists, but not with this type (NODATA)."""
        found = self.view.lookup(name)
        if found is not None:
            return _address_records(found[1], qtype)
        targets = self.view.targets(name)
        if targets is not None:
            return _srv_records(targets) if qtype in (SRV, ANY) else _NOTHING
        target = self.view.reverse(name)
        if target is None:
            return None
        return Records(record(PTR, target), 1) if qtype in (PTR, ANY) else _NOTHING


def _address_records(holders: tuple[Holder, ...], qtype: int) -> Records:
    if len(holders) == 1:
        a, aaaa = holders[0].a, holders[0].aaaa
    else:
        addresses = dict.fromkeys(address for holder in holders for address in holder.addresses)
        a = b"".join(record(A, address) for address in addresses if len(address) == A_BYTES)
        aaaa = b"".join(record(AAAA, address) for address in addresses if len(address) != A_BYTES)
    if qtype == A:
        aaaa = b""
    elif qtype == AAAA:
        a = b""
    elif qtype != ANY:
        return _NOTHING
    a, aaaa = a[: ADDRESSES_MAX * A_RECORD_BYTES], aaaa[: ADDRESSES_MAX * AAAA_RECORD_BYTES]
    return Records(a + aaaa, len(a) // A_RECORD_BYTES + len(aaaa) // AAAA_RECORD_BYTES)


def _srv_records(targets: tuple[Target, ...]) -> Records:
    """With the addresses of the targets as additional records, so that one question is enough."""
    answers = [record(SRV, _SRV_DATA.pack(SRV_PRIORITY, SRV_WEIGHT, port) + name) for name, port, _ in targets]
    glue = {(name, address) for name, _, addresses in targets for address in addresses}
    additional = [record(A if len(address) == A_BYTES else AAAA, address, name) for name, address in sorted(glue)]
    return Records(b"".join(answers), len(answers), b"".join(additional), len(additional))
