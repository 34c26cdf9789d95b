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
from dns.names import Target, TaskView

__all__ = ["CacheBudget", "NotAQuestion", "Responder"]

ROTATIONS = 8
"""Orders in which a list of addresses is handed out, in turn."""
ADDRESSES_MAX = 2000
"""Per answer; 28 bytes each, they fit in 65,535 bytes of TCP."""
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

    __slots__ = ("asked", "records", "turns")

    def __init__(self, records: Records) -> None:
        self.records = records
        self.turns = min(ROTATIONS, records.answer_count) if records.stride else 1
        self.asked = 0

    def in_turn(self, number: int) -> Records:
        return self.records.turned(number % self.turns * self.records.answer_count // self.turns)


class Responder:
    """Answers for all tasks that share one view."""

    def __init__(self, view: TaskView, budget: CacheBudget, seed: int = 0, cookie_key: bytes = b"") -> None:
        """`cookie_key`: a secret of this process, at most 64 bytes; with it cookies are answered (RFC 7873)."""
        self.view = view
        self.replies: dict[bytes, Iterator[bytes]] = {}
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
            kept = _Kept(records)
            if qtype in KEPT_TYPES:
                self._take(len(name) + len(records.answers) + len(records.additional))
                self._records[name, qtype] = kept
        elif not tcp and section.startswith(name) and (edns is None or edns.plain):
            self._keep_replies(packet[2:], question, kept)
        kept.asked += 1
        return packet[:2] + pack(question, kept.in_turn(kept.asked), tcp=tcp, cookie=cookie)

    def _keep_replies(self, key: bytes, question: Question, kept: _Kept) -> None:
        bodies = [pack(question, kept.in_turn(number)) for number in range(kept.turns)]
        self._take(len(key) + sum(map(len, bodies)))
        self.replies[key] = itertools.cycle(bodies)

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
            return self._address_records(found.addresses(), qtype)
        targets = self.view.targets(name)
        if targets is not None:
            return _srv_records(targets) if qtype in (SRV, ANY) else _NOTHING
        target = self.view.reverse(name)
        if target is None:
            return None
        return Records(record(PTR, target), 1) if qtype in (PTR, ANY) else _NOTHING

    def _address_records(self, addresses: tuple[bytes, ...], qtype: int) -> Records:
        wanted = [address for address in addresses if qtype in (ANY, _type_of(address))]
        if len(wanted) > 1:
            self._random.shuffle(wanted)
        packed = [record(_type_of(address), address) for address in wanted[:ADDRESSES_MAX]]
        stride = 0 if qtype == ANY or not packed else len(packed[0])
        return Records(b"".join(packed), len(packed), stride=stride)


def _type_of(address: bytes) -> int:
    return A if len(address) == 4 else AAAA


def _srv_records(targets: tuple[Target, ...]) -> Records:
    """With the addresses of the targets as additional records, so that one question is enough."""
    answers = [record(SRV, _SRV_DATA.pack(SRV_PRIORITY, SRV_WEIGHT, port) + name) for name, port, _ in targets]
    glue = {(name, address) for name, _, addresses in targets for address in addresses}
    additional = [record(_type_of(address), address, name) for name, address in sorted(glue)]
    return Records(b"".join(answers), len(answers), b"".join(additional), len(additional))
