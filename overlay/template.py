"""The fixed part of a namespace's tables as netlink messages: nft loads the text into a namespace that is thrown away,
and what stands there is read back. The kernel says of what stands exactly what it takes to make it, but for a few
attributes.

Parsing the text takes libnftables five times as long as the kernel takes for the messages; and they fit into one
transaction with the elements, so that a table is never seen without.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache

from overlay import nft, rtnl
from overlay.elements import balancing
from overlay.netlink import (
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    NLM_F_APPEND,
    NLM_F_CREATE,
    Message,
    Netlink,
    acknowledged,
    attribute,
    attribute_list,
    text,
)
from overlay.nfnl import (
    GETCHAIN,
    GETRULE,
    GETSET,
    NEWCHAIN,
    NEWRULE,
    NEWSET,
    NEWTABLE,
    NFT_SUBSYSTEM,
    add_rule,
    header,
    transaction,
)
from overlay.ruleset import Layout, layouts_text
from overlay.scratch import in_scratch

_TABLE = 1
"""Attribute of chains, sets and rules alike."""
_CHAIN_KEPT = {1: "table", 3: "name", 4: "hook", 5: "policy", 7: "type"}
_SET_DROPPED = {10: "ID", 16: "handle", 19: "backend", 20: "number of elements"}
_SET_FLAGS, _SET_ID, _SET_ANONYMOUS = 3, 10, 1
_RULE_KEPT = {1: "table", 2: "chain", 4: "expressions", 7: "user data"}

Template = tuple[Message, ...]


@lru_cache(maxsize=64)
def template(layouts: tuple[Layout, ...]) -> Template:
    """Made once; a host has its own layouts, and a task one of a few. Raises NetworkError."""
    links = sorted({chain.device for layout in layouts for chain in layout.chains} - {""})
    return in_scratch(lambda: _with_links(links, layouts))


def _with_links(links: Sequence[str], layouts: tuple[Layout, ...]) -> Template:
    """Hooks at links need some of these names."""
    with Netlink(NETLINK_ROUTE) as netlink, open("/proc/thread-self/ns/net") as here:
        pairs = [
            rtnl.new_veth(rtnl.VethEnd(name), rtnl.VethEnd(f"end{number}"), 1500, here.fileno())
            for number, name in enumerate(links)
        ]
        netlink.batch(acknowledged(pairs))
    return make_template(layouts)


def make_template(layouts: tuple[Layout, ...]) -> Template:
    """Load them into the current namespace, which is to be thrown away, and read them."""
    nft.run(layouts_text(layouts))
    with Netlink(NETLINK_NETFILTER) as netlink:
        raw = [
            add_rule(layout.family, layout.table, chain.name, rule)
            for layout in layouts
            for chain in layout.chains
            for rule in chain.raw
        ]
        if raw:
            netlink.transaction(transaction(raw))
        return _read(netlink, layouts)


def _read(netlink: Netlink, layouts: Iterable[Layout]) -> Template:
    out: list[Message] = []
    for number, layout in enumerate(layouts):
        table = attribute(_TABLE, layout.table)
        out.append(_made(NEWTABLE, layout, table))
        out += [_made(NEWCHAIN, layout, _only(_CHAIN_KEPT, answer)) for answer in _dump(netlink, GETCHAIN, layout)]
        for index, answer in enumerate(_dump(netlink, GETSET, layout)):
            # Rules find sets without a name only in the transaction that makes both.
            assert not struct.unpack(">I", dict(answer).get(_SET_FLAGS, bytes(4)))[0] & _SET_ANONYMOUS
            kept = b"".join(attribute(kind, value) for kind, value in answer if kind not in _SET_DROPPED)
            out.append(_made(NEWSET, layout, kept + attribute(_SET_ID, struct.pack(">I", number << 8 | index + 1))))
        out += [_made(NEWRULE, layout, _only(_RULE_KEPT, answer)) for answer in _dump(netlink, GETRULE, layout)]
    return tuple(out)


def stands(netlink: Netlink, layouts: tuple[Layout, ...]) -> bool:
    """Whether the tables have the chains and rules of these layouts, one for one; balancing chains aside."""
    found = [
        _made(kind, layout, _only(kept, answer))
        for layout in layouts
        for kind, kept, name, asked in ((NEWCHAIN, _CHAIN_KEPT, 3, GETCHAIN), (NEWRULE, _RULE_KEPT, 2, GETRULE))
        for answer in _dump(netlink, asked, layout)
        if balancing(text(dict(answer)[name])) is None
    ]
    return found == [message for message in template(layouts) if message.kind & 0xFF in (NEWCHAIN, NEWRULE)]


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
