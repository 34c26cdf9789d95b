"""The fixed part of a task's tables as netlink messages: read once from a namespace in which nft loaded the text, then
sent to each new one. The kernel says of what stands exactly what it takes to make it, but for a few attributes.

Parsing the text takes libnftables five times as long as the kernel takes for the messages.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from overlay.netlink import NLM_F_APPEND, NLM_F_CREATE, Message, Netlink, attribute, attribute_list, text
from overlay.nfnl import GETCHAIN, GETRULE, GETSET, NEWCHAIN, NEWRULE, NEWSET, NEWTABLE, NFT_SUBSYSTEM, header
from overlay.ruleset import Layout

_TABLE = 1
"""Attribute of chains, sets and rules alike."""
_CHAIN_KEPT = {1: "table", 3: "name", 4: "hook", 5: "policy", 7: "type"}
_SET_DROPPED = {10: "ID", 16: "handle", 19: "backend", 20: "number of elements"}
_SET_FLAGS, _SET_ID, _SET_ANONYMOUS = 3, 10, 1
_RULE_KEPT = {1: "table", 2: "chain", 4: "expressions", 7: "user data"}

Template = tuple[Message, ...]


class Templates:
    """By layouts. Kept for the life of the process: a task has one of a few."""

    def __init__(self) -> None:
        self._known: dict[tuple[Layout, ...], Template | None] = {}

    def get(self, layouts: tuple[Layout, ...]) -> Template | None:
        """None: nft has to load the text."""
        return self._known.get(layouts)

    def learn(self, netlink: Netlink, layouts: tuple[Layout, ...]) -> None:
        """From tables that stand as just loaded, without any element."""
        if layouts not in self._known:
            self._known[layouts] = _read(netlink, layouts)


def _read(netlink: Netlink, layouts: Iterable[Layout]) -> Template | None:
    """None for a table with sets that have no name: rules find them in the transaction that makes both only."""
    out: list[Message] = []
    for number, layout in enumerate(layouts):
        table = attribute(_TABLE, layout.table)
        out.append(_made(NEWTABLE, layout, table))
        out += [_made(NEWCHAIN, layout, _only(_CHAIN_KEPT, answer)) for answer in _dump(netlink, GETCHAIN, layout)]
        for index, answer in enumerate(_dump(netlink, GETSET, layout)):
            if struct.unpack(">I", dict(answer).get(_SET_FLAGS, bytes(4)))[0] & _SET_ANONYMOUS:
                return None
            kept = b"".join(attribute(kind, value) for kind, value in answer if kind not in _SET_DROPPED)
            out.append(_made(NEWSET, layout, kept + attribute(_SET_ID, struct.pack(">I", number << 8 | index + 1))))
        out += [_made(NEWRULE, layout, _only(_RULE_KEPT, answer)) for answer in _dump(netlink, GETRULE, layout)]
    return tuple(out)


def _dump(netlink: Netlink, kind: int, layout: Layout) -> list[Sequence[tuple[int, bytes]]]:
    """The attributes of each answer that is about the layout's table."""
    body = header(layout.family) + attribute(_TABLE, layout.table)
    answers = netlink.dump(NFT_SUBSYSTEM << 8 | kind, body, f"read table {layout.table}")
    found = [list(attribute_list(answer, 4)) for answer in answers]
    return [answer for answer in found if text(dict(answer)[_TABLE]) == layout.table]


def _only(kinds: Iterable[int], answer: Sequence[tuple[int, bytes]]) -> bytes:
    return b"".join(attribute(kind, value) for kind, value in answer if kind in kinds)


def _made(kind: int, layout: Layout, body: bytes) -> Message:
    flags = NLM_F_CREATE | (NLM_F_APPEND if kind == NEWRULE else 0)
    return Message(NFT_SUBSYSTEM << 8 | kind, flags, header(layout.family) + body, f"make table {layout.table}")
