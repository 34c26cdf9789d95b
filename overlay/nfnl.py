"""nf_tables over raw netlink: elements and balancing chains in atomic transactions, and reading them back.

The fixed part of a table is loaded by nft's own parser (overlay/nft.py), once per namespace. What changes
often goes this way: no text to parse and no dump of the ruleset before each change, 0.05 ms instead of 0.3.
The rules made here are, expression by expression, what nft 1.0.6 generates, so `nft list ruleset` shows them.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from overlay.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    Message,
    Netlink,
    attribute,
    attribute_list,
    attributes,
    nested,
    text,
)
from overlay.ruleset import ASKED_BY_UDP, PROTOCOLS, Element, ElementChange, Elements, Value, chain_backends

_SUBSYSTEM = 10
BRIDGE = 7
"""NFPROTO_BRIDGE: tables of family bridge."""
NEWTABLE, GETTABLE, NEWCHAIN, GETCHAIN, DELCHAIN, NEWRULE, GETRULE, DELRULE = 0, 1, 3, 4, 5, 6, 7, 8
NEWSETELEM, GETSETELEM, DELSETELEM, GETGEN, DELTABLE = 12, 13, 14, 16, 2
_BATCH_BEGIN, _BATCH_END = 16, 17
NFT_GOTO = -4
ELEMENTS_PER_MESSAGE = 400
"""An attribute's length is 16 bits: 400 elements of at most 100 bytes stay below 64 KiB."""
_REGISTER = 1
_REGISTER_WORDS = 8
"""Registers of 4 bytes start here; the first four of them overlay register 1."""
_META_MARK, _META_L4PROTO = 3, 16
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2


def _header(family: int = socket.AF_INET, resource: int = 0) -> bytes:
    return struct.pack("=BB", family, 0) + struct.pack(">H", resource)


def _u32(value: int) -> bytes:
    return struct.pack(">I", value & 0xFFFFFFFF)


def _message(kind: int, flags: int, body: bytes, what: str, tolerated: frozenset[int] = frozenset()) -> Message:
    return Message(_SUBSYSTEM << 8 | kind, flags, _header() + body, what, tolerated)


# --- rules -------------------------------------------------------------------------------------------


def _expression(name: str, *parts: bytes) -> bytes:
    return nested(1, attribute(1, name), nested(2, *parts))


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, _u32(value))


def _rule(table: str, chain: str, *expressions: bytes) -> Message:
    body = attribute(1, table) + attribute(2, chain) + nested(4, *expressions)
    return _message(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, body, f"add a rule to chain {chain} of table {table}")


def _count(backends: int) -> tuple[bytes, bytes]:
    """meta mark set numgen inc mod K"""
    return (
        _expression("numgen", _number(1, _REGISTER), _number(2, backends), _number(3, 0), _number(4, 0)),
        _expression("meta", _number(2, _META_MARK), _number(3, _REGISTER)),
    )


def _load_meta(key: int, register: int) -> bytes:
    return _expression("meta", _number(2, key), _number(1, register))


def _load(register: int, base: int, offset: int, length: int) -> bytes:
    return _expression("payload", _number(1, register), _number(2, base), _number(3, offset), _number(4, length))


def _equals(value: bytes) -> bytes:
    return _expression("cmp", _number(1, _REGISTER), _number(2, 0), nested(3, attribute(1, value)))


def _backend() -> bytes:
    return _expression("lookup", attribute(1, "backends"), _number(2, _REGISTER), _number(3, _REGISTER))


def _dnat(port_register: int = 0) -> bytes:
    port = _number(5, port_register) if port_register else b""
    return _expression("nat", _number(1, 1), _number(2, socket.AF_INET), _number(3, _REGISTER), port)


def _new_chain(table: str, chain: str) -> Message:
    return _message(NEWCHAIN, NLM_F_CREATE, attribute(1, table) + attribute(3, chain), f"add chain {chain} to {table}")


def vip_chain(table: str, chain: str) -> list[Message]:
    """meta l4proto udp add @asked_udp { ip daddr }; dnat to ip daddr . meta mark map @backends"""
    look_up = (
        _load(_REGISTER, _NETWORK_HEADER, 16, 4),
        _load_meta(_META_MARK, _REGISTER_WORDS + 1),
        _backend(),
        _dnat(),
    )
    note = (
        _load_meta(_META_L4PROTO, _REGISTER),
        _equals(bytes([socket.IPPROTO_UDP])),
        _load(_REGISTER, _NETWORK_HEADER, 16, 4),
        _expression("dynset", attribute(1, ASKED_BY_UDP), _number(3, 0), _number(4, _REGISTER)),
    )
    return [
        _new_chain(table, chain),
        _rule(table, chain, *_count(chain_backends(chain))),
        _rule(table, chain, *note),
        _rule(table, chain, *look_up),
    ]


def port_chain(table: str, chain: str) -> list[Message]:
    """For each protocol: meta l4proto P dnat to meta l4proto . th dport . meta mark map @backends"""
    rules = [
        _rule(
            table,
            chain,
            _load_meta(_META_L4PROTO, _REGISTER),
            _equals(bytes([number])),
            _load_meta(_META_L4PROTO, _REGISTER),
            _load(_REGISTER_WORDS + 1, _TRANSPORT_HEADER, 2, 2),
            _load_meta(_META_MARK, _REGISTER_WORDS + 2),
            _backend(),
            _dnat(_REGISTER_WORDS + 1),
        )
        for number in PROTOCOLS.values()
    ]
    return [_new_chain(table, chain), _rule(table, chain, *_count(chain_backends(chain))), *rules]


VIP_CHAIN_RULES = 3
PORT_CHAIN_RULES = 1 + len(PROTOCOLS)


def drop_chain(table: str, chain: str) -> list[Message]:
    """Empty and delete a chain that no element leads to (any more since an earlier transaction)."""
    name = attribute(1, table)
    return [
        _message(DELRULE, 0, name + attribute(2, chain), f"empty chain {chain} of {table}"),
        _message(DELCHAIN, 0, name + attribute(3, chain), f"delete chain {chain} of {table}"),
    ]


# --- elements ----------------------------------------------------------------------------------------


def _element(key: bytes, value: Value) -> bytes:
    out = nested(1, attribute(1, key))
    if isinstance(value, str):
        verdict = nested(2, attribute(1, _u32(NFT_GOTO)), attribute(2, value))
        out += nested(2, verdict)
    elif value is not None:
        out += nested(2, attribute(1, value))
    return nested(1, out)


def _element_messages(
    kind: int, flags: int, table: str, items: Sequence[tuple[Element, Value]], with_values: bool
) -> Iterable[Message]:
    for name, group in groupby(sorted(items, key=lambda item: item[0][0]), key=lambda item: item[0][0]):
        encoded = [_element(key, value if with_values else None) for (_, key), value in group]
        verb = "add to" if kind == NEWSETELEM else "delete from"
        for start in range(0, len(encoded), ELEMENTS_PER_MESSAGE):
            elements = nested(3, *encoded[start : start + ELEMENTS_PER_MESSAGE])
            body = attribute(1, table) + attribute(2, name) + elements
            yield _message(kind, flags, body, f"{verb} set {name} of table {table}")


def change_messages(table: str, change: ElementChange) -> list[Message]:
    """Removals first: the same key may come again with another value."""
    return [
        *_element_messages(DELSETELEM, 0, table, change.remove, with_values=False),
        *_element_messages(NEWSETELEM, NLM_F_CREATE, table, change.add, with_values=True),
    ]


def transaction(messages: Sequence[Message]) -> list[Message]:
    """Framed as one atomic nf_tables transaction, acknowledged once."""
    begin = Message(_BATCH_BEGIN, 0, _header(0, _SUBSYSTEM), "begin an nftables transaction")
    end = Message(_BATCH_END, 0, _header(0, _SUBSYSTEM), "end an nftables transaction")
    last = messages[-1]
    acknowledged = Message(last.kind, last.flags | NLM_F_ACK, last.body, last.what, last.tolerated)
    return [begin, *messages[:-1], acknowledged, end]


def delete_table(table: str) -> Message:
    return _message(DELTABLE, 0, attribute(1, table), f"delete table {table}", frozenset({errno.ENOENT}))


# --- what stands -------------------------------------------------------------------------------------


def generation(netlink: Netlink) -> int:
    """A counter that each transaction in this namespace, of whatever program, raises by one."""
    answer = netlink.ask(_SUBSYSTEM << 8 | GETGEN, _header(0), "read the nftables generation")
    return int(struct.unpack(">I", attributes(answer, 4)[1])[0])


def chains(netlink: Netlink, family: int = socket.AF_INET) -> frozenset[tuple[str, str]]:
    """(table, chain) of the family."""
    answers = netlink.dump(_SUBSYSTEM << 8 | GETCHAIN, _header(family), "read nftables chains")
    found = [attributes(answer, 4) for answer in answers]
    return frozenset((text(item[1]), text(item[3])) for item in found)


def rule_counts(netlink: Netlink, table: str, family: int = socket.AF_INET) -> dict[str, int]:
    """Chain -> its number of rules; {} when there is no such table."""
    kind = _SUBSYSTEM << 8
    standing = [name for owner, name in chains(netlink, family) if owner == table]
    if not standing:
        return {}
    counts = Counter[str]()
    for answer in netlink.dump(kind | GETRULE, _header(family) + attribute(1, table), f"read the rules of {table}"):
        found = attributes(answer, 4)
        if text(found[1]) == table:
            counts[text(found[2])] += 1
    return {chain: counts[chain] for chain in standing}


def elements(netlink: Netlink, table: str, sets: Iterable[str]) -> Elements:
    out: Elements = {}
    for name in sets:
        body = _header() + attribute(1, table) + attribute(2, name)
        for answer in netlink.dump(_SUBSYSTEM << 8 | GETSETELEM, body, f"read set {name} of table {table}"):
            for _, item in attribute_list(attributes(answer, 4).get(3, b"")):
                found = attributes(item)
                out[name, attributes(found[1])[1]] = _value(found.get(2))
    return out


def _value(data: bytes | None) -> Value:
    if data is None:
        return None
    found = attributes(data)
    if 2 in found:
        return text(attributes(found[2]).get(2, b""))
    return found[1]
