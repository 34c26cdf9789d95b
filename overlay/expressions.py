"""Rules that nft's text cannot express, as the kernel has them: nf_tables expressions (pure).

Registers of 4 bytes are numbered from 8; register 1 is the first four of them, 2 the next four, and so on.
"""

from __future__ import annotations

import socket
import struct

from overlay.netlink import attribute, nested

AT_LINK_SOURCE = 6
"""Where the source's MAC begins in an Ethernet header; the destination's begins it."""
LEG_MAC_PREFIX = b"\x02\x43"
NODE_PREFIX = b"\xc6\x12"
"""198.18: with the prefix before, what every leg's MAC begins with (`addressing.leg_mac`); and what a mark that names a
node begins with."""
HASH_SEED = 0x70797377
"""The same on each host: a client meets the same backend whichever host it asks."""

_LINK_HEADER, _NETWORK_HEADER, _TRANSPORT_HEADER = 0, 1, 2
_META_MARK, _META_L4PROTO = 3, 16
_CT_MARK = 3
_REGISTER = 1
_WORDS = 8
_HASHED = 3
"""A register that no key reaches into: the longest takes 24 bytes, this one is preceded by 32."""
_ADDRESS: dict[int, tuple[int, int, int]] = {socket.AF_INET: (12, 16, 4), socket.AF_INET6: (8, 24, 16)}
"""Offset of the source's and the destination's address in the network header, their length."""

Rule = bytes
"""Its expressions, one after the other."""


def _expression(name: str, *parts: bytes) -> bytes:
    return nested(1, attribute(1, name), nested(2, *parts))


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value & 0xFFFFFFFF))


def _payload(register: int, base: int, offset: int, length: int) -> bytes:
    return _expression("payload", _number(1, register), _number(2, base), _number(3, offset), _number(4, length))


def _equals(value: bytes) -> bytes:
    """Of register 1's first bytes."""
    return _expression("cmp", _number(1, _REGISTER), _number(2, 0), nested(3, attribute(1, value)))


def _meta(key: int, register: int = _REGISTER) -> bytes:
    return _expression("meta", _number(2, key), _number(1, register))


# --- answers by the host that a connection came through -----------------------------------------------------


def remember_ingress() -> Rule:
    """ether saddr 02:43:c6:12:* ct mark set the MAC's last four bytes.

    For each packet, not only a connection's first: the mark then also comes back to one that conntrack forgot."""
    set_mark = _expression("ct", _number(2, _CT_MARK), _number(4, _REGISTER))
    return (
        _payload(_REGISTER, _LINK_HEADER, AT_LINK_SOURCE, 4)
        + _equals(LEG_MAC_PREFIX + NODE_PREFIX)
        + _payload(_REGISTER, _LINK_HEADER, AT_LINK_SOURCE + 2, 4)
        + set_mark
    )


def recall_ingress() -> Rule:
    """meta mark set ct mark, if that names a node. (The egress hook cannot look at ct itself.)"""
    load = _expression("ct", _number(1, _REGISTER), _number(2, _CT_MARK))
    return load + _equals(NODE_PREFIX) + _expression("meta", _number(2, _META_MARK), _number(3, _REGISTER))


def answer_to_ingress() -> Rule:
    """On egress: the frame goes to the leg of the node that its mark names, in whatever direction its route leads."""
    write = _expression(
        "payload", _number(5, _REGISTER), _number(2, _LINK_HEADER), _number(3, 2), _number(4, 4), _number(6, 0)
    )
    return _meta(_META_MARK) + _equals(NODE_PREFIX) + write


# --- balancing ----------------------------------------------------------------------------------------------


def _turn(slots: int, register: int) -> bytes:
    """numgen inc mod SLOTS"""
    return _expression("numgen", _number(1, register), _number(2, slots), _number(3, 0), _number(4, 0))


def _hash(family: int, slots: int, register: int) -> bytes:
    """jhash saddr mod SLOTS"""
    source, _, length = _ADDRESS[family]
    attributes = (
        _number(1, _HASHED),
        _number(2, register),
        _number(3, length),
        _number(4, slots),
        _number(5, HASH_SEED),
    )
    return _payload(_HASHED, _NETWORK_HEADER, source, length) + _expression("hash", *attributes, _number(7, 0))


def _look_up(name: str) -> bytes:
    return _expression("lookup", attribute(1, name), _number(2, _REGISTER), _number(3, _REGISTER))


def _dnat(family: int, port_register: int = 0) -> bytes:
    port = _number(5, port_register) if port_register else b""
    return _expression("nat", _number(1, 1), _number(2, family), _number(3, _REGISTER), port)


def _slot(family: int, slots: int, by_source: bool, register: int) -> bytes:
    return _hash(family, slots, register) if by_source else _turn(slots, register)


def balance_vip(family: int, backends: str, slots: int, by_source: bool) -> Rule:
    """dnat to daddr . SLOT map @backends"""
    _, destination, length = _ADDRESS[family]
    return (
        _payload(_REGISTER, _NETWORK_HEADER, destination, length)
        + _slot(family, slots, by_source, _WORDS + length // 4)
        + _look_up(backends)
        + _dnat(family)
    )


def note_udp(family: int, asked: str) -> Rule:
    """meta l4proto udp add @asked { daddr }"""
    _, destination, length = _ADDRESS[family]
    return (
        _meta(_META_L4PROTO)
        + _equals(bytes([socket.IPPROTO_UDP]))
        + _payload(_REGISTER, _NETWORK_HEADER, destination, length)
        + _expression("dynset", attribute(1, asked), _number(3, 0), _number(4, _REGISTER))
    )


def balance_port(family: int, backends: str, slots: int, by_source: bool, at_address: bool) -> Rule:
    """dnat to [daddr .] l4proto . dport . SLOT map @backends"""
    _, destination, length = _ADDRESS[family]
    head = length // 4 if at_address else 0
    return (
        (_payload(_REGISTER, _NETWORK_HEADER, destination, length) if at_address else b"")
        + _meta(_META_L4PROTO, _WORDS + head)
        + _payload(_WORDS + head + 1, _TRANSPORT_HEADER, 2, 2)
        + _slot(family, slots, by_source, _WORDS + head + 2)
        + _look_up(backends)
        + _dnat(family, _WORDS + length // 4)
    )
