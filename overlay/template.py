"""The fixed part of a namespace's tables as netlink messages: nft loads the text into a namespace that is thrown away,
and what stands there is read back. The kernel says of what stands exactly what it takes to make it, but for a few
attributes.

Parsing the text takes libnftables five times as long as the kernel takes for the messages; and they fit into one
transaction with the elements, so that a table is never seen without.
"""

from __future__ import annotations

import struct
from collections import Counter
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
        chains, sets, rules = (
            [list(attribute_list(answer, 4)) for answer in _dump(netlink, kind, layout)]
            for kind in (GETCHAIN, GETSET, GETRULE)
        )
        out += [_made(NEWCHAIN, layout, _only(_CHAIN_KEPT, answer)) for answer in chains]
        for index, answer in enumerate(sets):
            # Rules find sets without a name only in the transaction that makes both.
            assert not struct.unpack(">I", dict(answer).get(_SET_FLAGS, bytes(4)))[0] & _SET_ANONYMOUS
            kept = b"".join(attribute(kind, value) for kind, value in answer if kind not in _SET_DROPPED)
            out.append(_made(NEWSET, layout, kept + attribute(_SET_ID, struct.pack(">I", number << 8 | index + 1))))
        out += [_made(NEWRULE, layout, _only(_RULE_KEPT, answer)) for answer in rules]
    return tuple(out)


def balancing_chains(netlink: Netlink, layouts: tuple[Layout, ...]) -> Counter[tuple[int, str]] | None:
    """(family, balancing chain) -> its number of rules. None: the other chains and rules of the tables are not those of
    these layouts, one for one."""
    fixed: list[Message] = []
    counts = Counter[tuple[int, str]]()
    for layout in layouts:
        for kind, kept, name, asked in ((NEWCHAIN, _CHAIN_KEPT, 3, GETCHAIN), (NEWRULE, _RULE_KEPT, 2, GETRULE)):
            for answer in _dump(netlink, asked, layout):
                chain = text(_first(answer, name))
                if balancing(chain) is None:
                    fixed.append(_made(kind, layout, _only(kept, attribute_list(answer, 4))))
                else:
                    counts[layout.family, chain] += kind == NEWRULE
    wanted = [message for message in template(layouts) if message.kind & 0xFF in (NEWCHAIN, NEWRULE)]
    return counts if fixed == wanted else None


def _dump(netlink: Netlink, kind: int, layout: Layout) -> list[bytes]:
    """The answers that are about the layout's table."""
    body = header(layout.family) + attribute(_TABLE, layout.table)
    answers = netlink.dump(NFT_SUBSYSTEM << 8 | kind, body, f"read table {layout.table}")
    return [answer for answer in answers if text(_first(answer, _TABLE)) == layout.table]


def _first(answer: bytes, wanted: int) -> bytes:
    """The value of that attribute, which comes early."""
    return next(value for kind, value in attribute_list(answer, 4) if kind == wanted)


def _only(kinds: Iterable[int], answer: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(attribute(kind, value) for kind, value in answer if kind in kinds)


def _made(kind: int, layout: Layout, body: bytes) -> Message:
    flags = NLM_F_CREATE | (NLM_F_APPEND if kind == NEWRULE else 0)
    return Message(NFT_SUBSYSTEM << 8 | kind, flags, header(layout.family) + body, f"make table {layout.table}")
